"""Which of the checkpoints that are here a reference was tuned from, by what is in them: a look at a few tensors of each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lib_dpo.errors import Cancelled, DpoError, NothingToDoError
from lib_dpo.families.model import open_model
from lib_dpo.files.checkpoint import PICKLES
from lib_dpo.maths.precision import full_precision
from lib_dpo.offsets.offset import Pair, open_pair
from lib_dpo.progress import Progress

_SAMPLE = 40  # matrices of each component that are read


@dataclass(frozen=True)
class BaseFound:
    """A checkpoint that a reference may have been tuned from. `change`: ||reference - base|| / ||base|| of the sample."""

    path: Path
    change: float


@dataclass(frozen=True)
class BasesFound:
    """Those that fit, the nearest first; how many were looked at; and those that would have had to be loaded whole."""

    fitting: tuple[BaseFound, ...]
    looked_at: int
    pickles: tuple[Path, ...] = ()


def right_bases(reference: Path, candidates: Sequence[Path], *, on_progress: Progress | None = None) -> BasesFound:
    """The checkpoints to which a reference's difference is as small, and as unlike rounding, as DPO makes it.

    Of several that fit, such as a base and a finetune of it, the true one is nearest: what a finetune changed adds to the
    difference. Files that cannot be opened, or are of another architecture, are passed over.

    Raises:
        BadFileError: the reference cannot be read.
    """
    found: list[BaseFound] = []
    wanted = [path for path in candidates if path.suffix.lower() not in PICKLES]
    with open_model(reference):  # says what is wrong with it, once
        pass
    for number, path in enumerate(wanted):
        if on_progress:
            on_progress(number, len(wanted), path.name)
        try:
            change = _change(reference, path)
        except Cancelled:
            raise
        except DpoError:  # another architecture, the reference itself, damaged: no base of it
            continue
        if change is not None:
            found.append(BaseFound(path, change))
    found.sort(key=lambda each: each.change)
    pickles = tuple(path for path in candidates if path.suffix.lower() in PICKLES)
    return BasesFound(tuple(found), len(wanted), pickles)


def _change(reference: Path, base: Path) -> float | None:
    """The relative size of the difference where the verdict on the sample is good, else None."""
    # the maths is imported when it is needed: a WebUI starts without it
    from lib_dpo.operations.measure import Tally, measure
    from lib_dpo.operations.verdict import right_base

    with ExitStack() as stack:
        pair = open_pair(stack.enter_context(open_model(base)), stack.enter_context(open_model(reference)))
        tally = Tally(pair.architecture)
        with full_precision():
            for key in _sample(pair):
                tally.add(key, measure(pair, key)[1])
        if not tally.components["unet"].offset:
            raise NothingToDoError(f"{base.name}: holds the same UNet as {reference.name}; choose another file")
        return tally.components["unet"].relative_change if right_base(pair, tally).level == "fits" else None


def _sample(pair: Pair) -> list[str]:
    """Matrices of each component, evenly spread from its first to its last."""
    kinds: dict[str, list[str]] = {}
    for key in pair.keys:
        if key.endswith("weight") and len(pair.base.shape(key)) > 1:
            kinds.setdefault(key.split(".")[0], []).append(key)
    return [key for keys in kinds.values() for key in keys[:: max(1, len(keys) // _SAMPLE)]]
