"""The verdict on a pair in a sentence: is this the right base, the right order, a reference at all?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lib_dpo.offsets.coverage import LeftOut, change_left_out, left_out
from lib_dpo.offsets.offset import Pair, blocks_in
from lib_dpo.offsets.prediction import prediction_doubt
from lib_dpo.offsets.recipe import baked_in
from lib_dpo.operations.measure import Row, Tally

# Heuristics on relative size, ||tuned - base|| / ||base|| of the UNet. Diffusion-DPO moves weights by 1 to 3 %
# (2,000 steps at an effective rate near 2e-5); finetunes and merges by 5 to 30 %; unrelated models by 100 % and more.
_LARGER_THAN_DPO = 0.06
_OTHER_MODEL = 0.35
_DPO = re.compile(r"(?<![a-z])dpo(?![a-z])", re.IGNORECASE)  # as a word: not that of "endpoint"
_NOTHING_BUT_NOISE = 0.5  # share of the change that rounding explains, from which on there is hardly an offset

Level = Literal["fits", "doubtful", "wrong"]


@dataclass(frozen=True)
class Verdict:
    """Is this the right base? `text` is for people, one or two sentences."""

    level: Level
    text: str

    def as_json(self) -> dict[str, str]:
        return {"level": self.level, "text": self.text}


def right_base(pair: Pair, tally: Tally) -> Verdict:
    """The verdict on a pair from what was measured: text encoder changes, size of the change, order of the files."""
    unet = tally.components.get("unet", Row())
    encoders = changed_text_encoders(tally)
    percent = f"{100 * unet.relative_change:.3g} %"
    base, tuned = pair.names
    too_large = size_doubt(pair, unet.relative_change)
    if too_large and too_large.level == "wrong":
        return too_large
    blocks = blocks_in(pair.base)
    if not blocks.is_model:
        return Verdict("doubtful", f"Incomplete files: {base} and {tuned} both hold {blocks.text}. Get them again.")
    other_kind, sure = prediction_doubt(pair)
    if other_kind:
        return Verdict("wrong" if sure else "doubtful", f"{'Wrong' if sure else 'Doubtful'} base: {other_kind}")
    if baked := baked_doubt(pair):
        return Verdict("doubtful", baked)
    if not unet.offset:
        return Verdict("doubtful", f"No offset: the UNets of {base} and {tuned} are equal, so there is nothing to extract.")
    if unet.noise_floor > _NOTHING_BUT_NOISE:
        return Verdict(
            "doubtful",
            f"Hardly more than rounding: the UNets differ by {percent} of their size, and rounding alone explains "
            f"{100 * unet.noise_floor:.0f} % of that. Either both are the same model, or the files are too coarse: use fp32.",
        )
    if encoders:
        return Verdict(
            "wrong" if unet.relative_change > _LARGER_THAN_DPO else "doubtful",
            f"Probably the wrong base: DPO leaves the text encoder as it is, but {' and '.join(encoders)} of the two files "
            "differ beyond rounding.",
        )
    if swapped := order_doubt(pair):
        return Verdict("doubtful", swapped)
    if inside := baked_in(pair.base.checkpoint.metadata):
        return Verdict(
            "doubtful",
            f"Doubtful base: {base} has {' and '.join(map(str, inside))} baked in, says its metadata, so the difference is not "
            "what DPO changed. Choose the checkpoint it was made from.",
        )
    rows = left_out(pair)
    if hidden := change_left_out(rows, {"base": base, "tuned": tuned}):
        return Verdict("doubtful", f"Not the whole change: {hidden}, so the offset is less than what differs.")
    if too_large:
        return too_large
    rest = _encoders_compared(tally, rows)
    return Verdict("fits", f"Right base: the UNets differ by {percent} of their size, little enough for DPO, {rest}.")


def size_doubt(pair: Pair, change: float) -> Verdict | None:
    """The verdict on a pair whose UNets differ by more of their size than DPO changes, else None."""
    percent = f"{100 * change:.3g} %"
    base, tuned = pair.names
    if change > _OTHER_MODEL:
        return Verdict(
            "wrong",
            f"Wrong base: the UNets differ by {percent} of their size, so {tuned} was not tuned from {base}. "
            "Look for the checkpoint it was tuned from.",
        )
    if change > _LARGER_THAN_DPO:
        return Verdict(
            "doubtful",
            f"Doubtful base: the UNets differ by {percent} of their size, more than DPO changes. Something else, such as "
            "another finetune, is in the difference too.",
        )
    return None


def _encoders_compared(tally: Tally, rows: Sequence[LeftOut]) -> str:
    """Of which text encoders it was seen that they do not differ, as the end of a sentence."""
    both = [name for name in tally.components if name.startswith("te")]
    alone = sorted({row.kind.name for row in rows if row.kind.name.startswith("te")} - set(both))
    if not both:
        return "and only UNets were compared"
    if any(row.kind.name == "one_sided" for row in rows):
        return "and the text encoders agree as far as both files hold them"
    if alone:
        return f"and {' and '.join(both)} of the text encoders agrees; {' and '.join(alone)} is in one file only"
    return "and the text encoders agree"


def baked_doubt(pair: Pair) -> str:
    """A sentence where the tuned file is a bake of our own and so no reference, else nothing."""
    inside = baked_in(pair.tuned.checkpoint.metadata)
    if not inside:
        return ""
    what = " and ".join(map(str, inside))
    return (
        f"No new reference: {pair.names[1]} has {what} baked in by this tool, says its metadata. The difference is that "
        "offset, rounded, and whatever else was changed. Choose the reference that the offset was made from."
    )


def order_doubt(pair: Pair) -> str:
    """A sentence where base and tuned look swapped, else nothing."""
    if not _looks_swapped(pair):
        return ""
    base, tuned = pair.names
    return (
        f"The order looks swapped: {base} looks like the DPO reference and {tuned} like the base. "
        "Exchange them unless you want the opposite of DPO."
    )


def _looks_swapped(pair: Pair) -> bool:
    """By name where exactly one carries DPO in it; else by form, for the published references are UNets alone."""
    named = [_DPO.search(model.name) is not None for model in (pair.base, pair.tuned)]
    if named[0] != named[1]:
        return named[0]
    return [model.components() == ("unet",) for model in (pair.base, pair.tuned)] == [True, False]


_BEYOND_ROUNDING = 4.0  # energy over the rounding floor from which a component counts as changed


def changed_text_encoders(tally: Tally) -> list[str]:
    """Text encoders whose change is more than the rounding of the files explains."""
    return [
        name for name, row in tally.components.items() if name.startswith("te") and row.offset > _BEYOND_ROUNDING * row.noise
    ]
