"""Does an offset fit a finetune: how far it drifted from the base, and whether DPO is in it already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lib_dpo.errors import MismatchError
from lib_dpo.families.blocks import block_labels, block_of
from lib_dpo.families.keymap import component_of
from lib_dpo.families.model import Model
from lib_dpo.maths.lowrank import energy
from lib_dpo.maths.precision import full_precision
from lib_dpo.maths.threads import Scratch, side_by_side
from lib_dpo.offsets.breeds import breeds_of
from lib_dpo.offsets.coverage import LeftOut, left_out_of_unets, nothing_changed
from lib_dpo.offsets.offset import Pair, blocks_in, check_finite, check_is_model, check_left_out
from lib_dpo.offsets.prediction import Prediction, prediction_doubt, prediction_of, predictions, target_doubt
from lib_dpo.offsets.recipe import baked_in
from lib_dpo.operations.measure import rounding_energy
from lib_dpo.operations.verdict import baked_doubt, order_doubt, size_doubt
from lib_dpo.progress import Progress, Steps
from lib_dpo.settings import in_digits

# Heuristics on drift, ||target - base|| / ||base|| of the UNet. Finetunes and merges of SD 1.5 and SDXL lie near 5 to
# 25 %; Pony and Illustrious, trained for very long, beyond.
_NEAR, _FAR = 0.02, 0.35
_COULD_BE = 0.5  # a model in which so much of DPO may be, within three errors, is not called one without it
_ALL = 0.97  # of the strength that was baked in: beyond it a LoRA kept the whole change, as an exact one does
_CAREFUL = 0.5  # the strength to begin with where nobody can tell
_CONTAINED, _ERRORS = 0.15, 3.0  # DPO counts as contained from this strength on, if it is beyond three errors

_PIECE = 1 << 16  # values of an inner product in float32
_SAME_FILE = (
    "{} is the base too, so it was compared with itself: if DPO started from it, the offset fits exactly, at "
    "strength 1. If it is a finetune or merge, give as the base the checkpoint that DPO started from."
)


@dataclass
class _Sums:
    """Inner products over tensors: base, drift = target - base, offset = tuned - base."""

    base: float = 0.0
    drift: float = 0.0
    offset: float = 0.0
    both: float = 0.0  # <drift, offset>
    rounding: float = 0.0  # of the base, expected: it is in drift and offset alike when the target is stored more finely

    def add(self, other: _Sums) -> None:
        self.base += other.base
        self.drift += other.drift
        self.offset += other.offset
        self.both += other.both
        self.rounding += other.rounding

    @property
    def relative_drift(self) -> float:
        return math.sqrt(self.drift / self.base) if self.base else 0.0

    @property
    def relative_offset(self) -> float:
        return math.sqrt(self.offset / self.base) if self.base else 0.0

    @property
    def cosine(self) -> float:
        """Between drift and offset; 0 where either is zero."""
        product = math.sqrt(self.drift * self.offset)
        return self.both / product if product else 0.0

    @property
    def strength(self) -> float:
        """Least squares: the s for which s * offset explains most of the drift."""
        return self.both / self.offset if self.offset else 0.0

    def as_json(self) -> dict[str, float]:
        return {
            "drift": self.relative_drift,
            "offset": self.relative_offset,
            "cosine": self.cosine,
            "strength_inside": self.strength,
        }


Level = Literal["fits", "weaker", "contained", "base", "other"]


@dataclass(frozen=True)
class CompatReport:
    """How the target relates to the pair."""

    architecture: str
    level: Level
    text: str
    drift: float
    cosine: float
    strength_inside: float
    strength_error: float
    suggested_strength: float
    blocks: Mapping[str, _Sums] = field(default_factory=dict)
    no_place: tuple[str, ...] = ()  # tensors of the offset that a pruned target does not have
    left_out: tuple[LeftOut, ...] = ()
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    itself: bool = False  # the target is the base too

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        return {
            "architecture": self.architecture,
            "verdict": {"level": self.level, "text": self.text},
            "drift": self.drift,
            "cosine": self.cosine,
            "strength_inside": self.strength_inside,
            "strength_inside_error": self.strength_error,
            "suggested_strength": self.suggested_strength,
            "blocks": {name: row.as_json() for name, row in self.blocks.items()},
            "no_place": list(self.no_place),
            "left_out": [row.as_json() for row in self.left_out],
            "prediction": {name: found.as_json() for name, found in self.predictions.items()},
        }


def compat(target: Model, pair: Pair, *, on_progress: Progress | None = None) -> CompatReport:
    """Drift of the target's UNet from the base per block, its cosine with the offset, and the DPO strength inside.

    The strength is the least-squares s of drift = s * offset. Its error is the jackknife over tensors, which allows for
    whole layers moving together (a plain least-squares error over all weights would be absurdly small), and the share of
    the offset that is the base's own rounding, which a more finely stored target shows as drift too.

    Raises:
        MismatchError: other architectures, or a target that lacks UNet tensors or is an offset file.
        NothingToDoError: base and tuned are equal.
        BadTensorError: NaN or Inf, by key.
    """
    if target.architecture is not pair.architecture:
        raise MismatchError(
            f"{target.path.name} is {target.architecture.title} but the pair is {pair.architecture.title}; "
            "the offset cannot be applied to it"
        )
    check_is_model(target)
    keys = [key for key in pair.keys if component_of(pair.architecture, key) == "unet"]
    held, its = set(target.keys("unet")), blocks_in(target)
    steps = Steps(len(keys), on_progress)
    tensors: list[_Sums] = []
    no_place: list[str] = []
    blocks: dict[str, _Sums] = {name: _Sums() for name in block_labels(pair.architecture)}

    largest = max((math.prod(pair.base.shape(key)) for key in keys), default=0)
    bases, drifts = Scratch(largest), Scratch(largest)

    def compared(key: str) -> _Sums | None:
        """None for a tensor that the target does not have."""
        if key not in held:
            check_left_out(target, its, key, "the pair")
            return None
        base = pair.weight(key, out=bases.memory)
        drift = drifts.shaped(base.shape).copy_(_comparable(target.read(key), base, key, target)).sub_(base)
        if not bool(torch.isfinite(drift.sum())):
            check_finite(target, key)
        size = energy(base)
        offset = pair.to_delta_(base, key)
        return _Sums(size, energy(drift), energy(offset), _inner(drift, offset), rounding_energy(pair.base.read(key)))

    with full_precision(), side_by_side(compared, keys) as done:
        for key, sums in zip(keys, done, strict=True):
            if sums is None:
                no_place.append(key)
            else:
                tensors.append(sums)
                blocks[block_of(pair.architecture, key) or ""].add(sums)
            steps.advance(1, key)
    if not any(sums.offset for sums in tensors):
        raise nothing_changed(pair, "UNet", "there is no offset")
    rows = left_out_of_unets(pair, target, keys)
    report = _judge(target, pair, tensors, {name: row for name, row in blocks.items() if row.base}, rows)
    return _with_no_place(report, target, no_place, len(keys)) if no_place else report


def _comparable(weight: Tensor, base: Tensor, key: str, target: Model) -> Tensor:
    """The target's weight in the base's shape; of an inpainting model's first convolution the ordinary channels."""
    if weight.shape == base.shape:
        return weight
    if weight.numel() == base.numel():
        return weight.reshape(base.shape)
    if key.endswith("input_blocks.0.0.weight") and weight.ndim == base.ndim == 4:
        ordinary = weight[:, : base.shape[1]]
        if ordinary.shape == base.shape:
            return ordinary
    shapes = ["x".join(map(str, shape)) for shape in (weight.shape, base.shape)]
    raise MismatchError(f"{target.path.name}: {key} is {shapes[0]} but {shapes[1]} in the base; the offset does not fit")


def _inner(a: Tensor, b: Tensor) -> float:
    """<a, b>: pieces in float32, their sum in float64; of what has one dimension in float64."""
    if a.ndim < 2:
        return float((a.double() * b.double()).sum())
    return math.fsum(
        float(x @ y) for x, y in zip(torch.split(a.flatten(), _PIECE), torch.split(b.flatten(), _PIECE), strict=True)
    )


def _judge(
    target: Model, pair: Pair, tensors: list[_Sums], blocks: Mapping[str, _Sums], rows: tuple[LeftOut, ...]
) -> CompatReport:
    total = _Sums()
    for sums in tensors:
        total.add(sums)
    error = math.hypot(_jackknife(tensors, total), total.rounding / total.offset if total.offset else 0.0)
    level, text, suggested = _verdict(target, pair, total, error)
    return CompatReport(
        itself=target.path.resolve() == pair.base.path.resolve(),
        architecture=pair.architecture.name,
        level=level,
        text=text,
        drift=total.relative_drift,
        cosine=total.cosine,
        strength_inside=total.strength,
        strength_error=error,
        suggested_strength=suggested,
        blocks=blocks,
        left_out=rows,
        predictions=predictions(pair) | {"target": prediction_of(target)},
    )


def _verdict(target: Model, pair: Pair, total: _Sums, error: float) -> tuple[Level, str, float]:
    """How the offset fits, in words too, and the strength to begin with."""
    level, text, suggested = _by_the_weights(target, pair, total, error)
    if other_kind := target_doubt(target, pair) or _distilled_alone(target, pair):
        suggested = suggested if level == "contained" else _CAREFUL
        level, text = "other", f"{other_kind} By the weights: {text}"
    if doubt := _pair_doubt(pair, total):
        level, text, suggested = "other", f"{doubt} As they are: {text}", _CAREFUL
    return level, text, suggested


def _by_the_weights(target: Model, pair: Pair, total: _Sums, error: float) -> tuple[Level, str, float]:
    """The same by drift and offset alone."""
    strength = total.strength
    drift = f"{100 * total.relative_drift:.3g} %"
    inside = f"{in_digits(strength)} ± {error:.2f}"
    if target.path.resolve() == pair.base.path.resolve():
        return "base", _SAME_FILE.format(target.name), 1.0
    if total.relative_drift == 0:
        text = f"{target.name} holds the same UNet as the base: the offset fits exactly. Start at strength 1."
        return "base", text, 1.0
    if _is_real(strength, error):
        rest = _rest(strength)
        return "contained", _contained(target, pair, strength, inside, rest), rest
    if _is_real(-strength, error):
        rest = _rest(strength)
        text = f"{target.name} holds the opposite of DPO, at strength {inside}: add {rest:.2f} for the full change."
        return "fits", text, rest
    if total.relative_drift > _FAR:
        text = (
            f"{target.name} is far from the base ({drift} of its size away, as Pony is), so the offset will do less and may "
            "do something else. Try strengths 0.3 to 1 and compare; a LoRA is easier to turn down than a bake."
        )
        return "weaker", text, _CAREFUL
    told = strength + _ERRORS * error <= _COULD_BE
    start = 1.0 if told or strength < _COULD_BE else _CAREFUL
    untold = "" if told else f"; its weights cannot tell whether DPO is in it ({inside})"
    if total.relative_drift > _NEAR:
        without = untold or f" without DPO in it ({inside})"
        text = (
            f"{target.name} is a finetune of the base ({drift} of its size away){without}: the offset fits. Start at "
            f"strength {start:g} and compare {start / 2:g} to {1.5 * start:g}."
        )
        return "fits", text, start
    return "fits", f"{target.name} is close to the base ({drift}){untold}: the offset fits. Start at strength {start:g}.", start


def _is_real(strength: float, error: float) -> bool:
    """Whether so much of DPO is in the target, and no chance."""
    return strength > _CONTAINED and strength > _ERRORS * error


def _rest(strength: float) -> float:
    """What is left to add for the full change, in steps of 0.05."""
    return round(max(0.0, 1.0 - strength) / 0.05) * 0.05


def _contained(target: Model, pair: Pair, strength: float, inside: str, rest: float) -> str:
    """That DPO is in the target already, what its metadata says was baked in, and what to do about the rest."""
    record = baked_in(target.checkpoint.metadata)
    recorded = f" ({' and '.join(map(str, record))}, as its metadata says)" if record else ""
    advice = f"add about {rest:.2f} more for the full change" if rest else "adding more would overdo it"
    if any(each.kind == "lora" for each in record) and strength < _ALL * sum(each.strength for each in record):
        # more of anything would overdo what the LoRA kept, and not make up for what it did not
        advice = "that is the part which the LoRA keeps; for all of it bake an offset file into the model as it was before"
    found = f"DPO is already in {target.name}, {inside} times the whole change{recorded}: {advice}."
    # a base that is itself a finetune is further from every other model, and so seems to lack what these hold
    return found if record else f"{found} That holds if DPO started from {pair.names[0]}, and not from a model before it."


def _with_no_place(report: CompatReport, target: Model, no_place: list[str], count: int) -> CompatReport:
    """The same of a pruned target."""
    text = (
        f"{target.name} is {blocks_in(target).text}: {len(no_place)} of the offset's {count} tensors have no place in it, so "
        f"it takes a part of the offset only. By the rest: {report.text}"
    )
    return replace(report, level="other", text=text, no_place=tuple(no_place))


def _pair_doubt(pair: Pair, total: _Sums) -> str:
    """A sentence where the two files are no pair of a base and its reference, else nothing."""
    too_large = size_doubt(pair, total.relative_offset)
    return prediction_doubt(pair)[0] or baked_doubt(pair) or order_doubt(pair) or (too_large.text if too_large else "")


def _distilled_alone(target: Model, pair: Pair) -> str:
    """A sentence where the target is distilled for few steps, and the pair is not; else nothing."""
    if any(breed.kind == "distilled" for model in (pair.base, pair.tuned) for breed in breeds_of(model)):
        return ""
    found = next((breed for breed in breeds_of(target) if breed.kind == "distilled"), None)
    return f"{target.name} is of another kind than the pair: {found.text}." if found else ""


def _jackknife(tensors: list[_Sums], total: _Sums) -> float:
    """Standard error of the strength, leaving one tensor out at a time (Efron 1982, The Jackknife)."""
    n = len(tensors)
    left_out = [(total.both - t.both) / rest for t in tensors if (rest := total.offset - t.offset) > 0]
    if n < 2 or len(left_out) < 2:
        return 0.0
    mean = sum(left_out) / len(left_out)
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left_out))
