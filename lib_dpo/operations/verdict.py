"""The verdict on a pair in a sentence: is this the right base, the right order, a reference at all?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lib_dpo.offsets.coverage import change_left_out, left_out
from lib_dpo.offsets.offset import Pair, blocks_in
from lib_dpo.offsets.prediction import prediction_doubt
from lib_dpo.offsets.recipe import baked_in
from lib_dpo.operations.measure import Row, Tally

# Heuristics on relative size, ||tuned - base|| / ||base|| of the UNet. Diffusion-DPO moves weights by 1 to 3 %
# (2,000 steps at an effective rate near 2e-5); finetunes and merges by 5 to 30 %; unrelated models by 100 % and more.
_LARGER_THAN_DPO = 0.06
_OTHER_MODEL = 0.35
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
    if unet.relative_change > _OTHER_MODEL:
        return Verdict(
            "wrong",
            f"Wrong base: the UNets differ by {percent} of their size, so {tuned} was not tuned from {base}. "
            "Look for the checkpoint it was tuned from.",
        )
    blocks = blocks_in(pair.base)
    if not blocks.is_model:
        return Verdict("doubtful", f"Incomplete files: {base} and {tuned} both hold {blocks.text}. Get them again.")
    other_kind, sure = prediction_doubt(pair)
    if other_kind:
        return Verdict("wrong" if sure else "doubtful", f"{'Wrong' if sure else 'Doubtful'} base: {other_kind}")
    if baked := baked_doubt(pair):
        return Verdict("doubtful", baked)
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
    if hidden := change_left_out(left_out(pair), {"base": base, "tuned": tuned}):
        return Verdict("doubtful", f"Not the whole change: {hidden}, so the offset is less than what differs.")
    if unet.relative_change > _LARGER_THAN_DPO:
        return Verdict(
            "doubtful",
            f"Doubtful base: the UNets differ by {percent} of their size, more than DPO changes. Something else, such as "
            "another finetune, is in the difference too.",
        )
    rest = "and the text encoders agree" if len(tally.components) > 1 else "and only UNets were compared"
    return Verdict("fits", f"Right base: the UNets differ by {percent} of their size, little enough for DPO, {rest}.")


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
    named = ["dpo" in model.name.lower() for model in (pair.base, pair.tuned)]
    if named[0] != named[1]:
        return named[0]
    return [model.components() == ("unet",) for model in (pair.base, pair.tuned)] == [True, False]


_BEYOND_ROUNDING = 4.0  # energy over the rounding floor from which a component counts as changed


def changed_text_encoders(tally: Tally) -> list[str]:
    """Text encoders whose change is more than the rounding of the files explains."""
    return [
        name for name, row in tally.components.items() if name.startswith("te") and row.offset > _BEYOND_ROUNDING * row.noise
    ]
