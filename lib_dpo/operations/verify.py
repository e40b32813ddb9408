"""How much of a pair's offset a LoRA or offset file holds: measured from the file alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lib_dpo.errors import BadTensorError, MismatchError
from lib_dpo.families.keymap import component_of
from lib_dpo.maths.lowrank import energy
from lib_dpo.maths.precision import full_precision
from lib_dpo.maths.threads import Scratch, side_by_side
from lib_dpo.offsets.coverage import LeftOut, left_out, nothing_changed
from lib_dpo.offsets.offset import Offset, Pair
from lib_dpo.operations.measure import Row, Tally, measure
from lib_dpo.operations.resize_metadata import energy_claimed
from lib_dpo.operations.verdict import changed_text_encoders
from lib_dpo.progress import Progress, Steps

_MEASURED, _RESIZED = 1e-4, 2e-3  # by which a claim of the metadata may differ; fp8 of fp8 moves energy by 2 in 10,000


@dataclass(frozen=True)
class Fit:
    """The strength at which a file comes nearest to the change of a pair, by least squares, and what it keeps of it there."""

    strength: float
    energy_kept: float


@dataclass(frozen=True)
class VerifyReport:
    """Energy kept, in all, per component and per block."""

    tally: Tally
    components: tuple[str, ...]
    layers: int
    unmatched: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    claimed: float | None  # what the file's own metadata says
    twins: tuple[str, ...] = ()  # keys that say again what others say: they count once
    resized: bool = False  # the claim is a product of two shares: rounding is in it twice
    best_fit: Fit | None = None  # of a file that keeps less than nothing

    @property
    def agrees(self) -> bool:
        """Whether what the metadata says is what was found."""
        return self.claimed is not None and abs(self.claimed - self.tally.total.energy_kept) < (
            _RESIZED if self.resized else _MEASURED
        )

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        return {
            "architecture": self.tally.architecture.name,
            "components": list(self.components),
            **self.tally.energy_kept(),
            "energy_kept_claimed": self.claimed,
            "best_fit": self.best_fit and {"strength": self.best_fit.strength, "energy_kept": self.best_fit.energy_kept},
            "noise_floor": self.tally.total.noise_floor,
            "tensors": self.layers,
            "unmatched": list(self.unmatched),
            "twins": list(self.twins),
            "left_out": [row.as_json() for row in self.left_out],
        }


def verify(offset: Offset, pair: Pair, *, on_progress: Progress | None = None) -> VerifyReport:
    """Compare an offset with the pair it was made from, tensor by tensor.

    Text encoders count when they changed beyond rounding, or when the file changes them.

    Raises:
        MismatchError: other architectures, an offset that is bound to a model (DoRA, GLoRA).
        NothingToDoError: base and tuned are equal.
        BadTensorError: a shape that does not fit, NaN or Inf.
    """
    offset.check_free()
    if offset.architecture is not pair.architecture:
        raise MismatchError(
            f"{offset.name} is for {offset.architecture.title} but the pair is {pair.architecture.title}; "
            "give the two checkpoints that it was made from"
        )
    numel = {key: math.prod(pair.base.shape(key)) for key in pair.keys}
    steps = Steps(sum(numel.values()), on_progress)
    tally, scratch = Tally(pair.architecture), Scratch(max(numel.values()))

    def missed(key: str) -> Row:
        """Its figures, and what the offset misses of it."""
        delta, row = measure(pair, key, out=scratch.memory)
        row.residual = row.offset
        if key in offset.shapes:
            if math.prod(offset.shapes[key]) != delta.numel():
                raise BadTensorError(
                    f"{offset.name}: {key} has the shape {list(offset.shapes[key])}, the pair {list(delta.shape)}; "
                    "the file was made for another model"
                )
            row.residual = energy(delta.sub_(offset.read(key).reshape(delta.shape)))
        return row

    with full_precision(), side_by_side(missed, pair.keys) as rows:
        for key, row in zip(pair.keys, rows, strict=True):
            tally.add(key, row)
            steps.advance(numel[key], key)
    touched = {component_of(pair.architecture, key) for key in offset.shapes}
    kept = tally.only({"unet", *changed_text_encoders(tally), *touched})
    if not kept.total.offset:
        raise nothing_changed(pair, "weights", "there is no change to keep")
    best_fit = _best_fit(offset, pair, kept.total.offset) if kept.total.energy_kept < 0 else None
    return VerifyReport(
        tally=kept,
        components=tuple(kept.components),
        layers=len(offset.shapes),
        unmatched=offset.unmatched + tuple(sorted(offset.shapes.keys() - numel.keys())),
        left_out=left_out(pair),
        claimed=energy_claimed(offset.metadata),
        twins=offset.twins,
        resized="dpo.resized" in offset.metadata,
        best_fit=best_fit,
    )


def _best_fit(offset: Offset, pair: Pair, change: float) -> Fit:
    """A second pass, over what the file holds.

    Args:
        change: ||.||^2 of what it is compared with.
    """
    both = size = 0.0
    with full_precision():
        for key in offset.shapes.keys() & set(pair.keys):
            found = offset.read(key).flatten().double()
            both += float(found @ pair.delta(key).flatten().double())
            size += float(found @ found)
    return Fit(both / size if size else 0.0, both**2 / (size * change) if size else 0.0)
