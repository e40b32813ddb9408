"""What is measured while tensors pass by: energies per block, rounding noise, and the verdict on a pair in a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lib_dpo.families.arch import Architecture
from lib_dpo.families.keymap import block_labels, block_of, component_of
from lib_dpo.maths.lowrank import energy
from lib_dpo.offsets.coverage import change_left_out, left_out
from lib_dpo.offsets.offset import Pair, blocks_in
from lib_dpo.offsets.prediction import prediction_doubt
from lib_dpo.offsets.recipe import baked_in

# dtype -> (mantissa bits, exponent of the smallest step). IEEE 754, bfloat16, and OCP FP8 (arXiv 2209.05433).
_GRID: Mapping[torch.dtype, tuple[int, int]] = {
    torch.float16: (10, -24),
    torch.bfloat16: (7, -133),
    torch.float32: (23, -149),
    torch.float64: (52, -1074),
} | {
    getattr(torch, name): grid
    for name, grid in {
        "float8_e4m3fn": (3, -9),
        "float8_e5m2": (2, -16),
        "float8_e4m3fnuz": (3, -10),
        "float8_e5m2fnuz": (2, -17),
        "float8_e8m0fnu": (0, -127),
    }.items()
    if hasattr(torch, name)
}
_SAMPLE = 1 << 14  # values looked at per tensor: one tensor's mean step^2 is then known to about 1 %

# Heuristics on relative size, ||tuned - base|| / ||base|| of the UNet. Diffusion-DPO moves weights by 1 to 3 %
# (2,000 steps at an effective rate near 2e-5); finetunes and merges by 5 to 30 %; unrelated models by 100 % and more.
_LARGER_THAN_DPO = 0.06
_OTHER_MODEL = 0.35
_NOTHING_BUT_NOISE = 0.5  # share of the change that rounding explains, from which on there is hardly an offset
_BEYOND_ROUNDING = 4.0  # energy over the rounding floor from which a component counts as changed


def rounding_energy(stored: Tensor) -> float:
    """Expected ||rounding error||^2 of a tensor as stored: the sum of step^2 / 12, estimated on an even sample.

    A float32 tensor that holds only float16 (or bfloat16) values counts as what it really is.
    """
    if not stored.numel():
        return 0.0
    flat = stored.reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    dtype = stored.dtype
    values = sample.float()
    if dtype == torch.float32:
        for narrow in (torch.float16, torch.bfloat16):
            if bool((values.to(narrow).float() == values).all()) and bool(values.any()):
                dtype = narrow
                break
    bits, smallest = _GRID[dtype]
    exponent = torch.frexp(values).exponent.double() - 1 - bits
    exponent = torch.where(values == 0, torch.full_like(exponent, smallest), exponent)
    step = torch.exp2(exponent.clamp_min(smallest))
    return float(step.square().mean() / 12) * flat.numel()


@dataclass
class Row:
    """Sums over the tensors of one block, one component, or all of them. Energies are ||.||^2 in float64."""

    numel: int = 0
    base: float = 0.0
    offset: float = 0.0
    residual: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def add(self, other: Row) -> None:
        self.numel += other.numel
        self.base += other.base
        self.offset += other.offset
        self.residual += other.residual
        self.noise += other.noise
        self.largest = max(self.largest, other.largest)

    @property
    def energy_kept(self) -> float:
        """1 - ||offset - approximation||^2 / ||offset||^2; 1 where there is nothing to keep."""
        return 1.0 - self.residual / self.offset if self.offset else 1.0

    @property
    def relative_change(self) -> float:
        """||offset|| / ||base||."""
        return math.sqrt(self.offset / self.base) if self.base else 0.0

    @property
    def rms(self) -> float:
        return math.sqrt(self.offset / self.numel) if self.numel else 0.0

    @property
    def noise_floor(self) -> float:
        """The share of ||offset||^2 that the rounding of the two files' dtypes alone explains, at most 1."""
        return min(1.0, self.noise / self.offset) if self.offset else 0.0

    def as_json(self) -> dict[str, float]:
        """The figures of `diff`."""
        return {
            "parameters": self.numel,
            "rms": self.rms,
            "relative_change": self.relative_change,
            "largest": self.largest,
            "noise_floor": self.noise_floor,
        }


@dataclass
class Tally:
    """Rows per block and per component, filled tensor by tensor."""

    architecture: Architecture
    blocks: dict[str, Row] = field(default_factory=dict)
    components: dict[str, Row] = field(default_factory=dict)

    def add(self, key: str, row: Row) -> None:
        """Count one tensor under its block and component; keys outside of both are not counted."""
        block, component = block_of(self.architecture, key), component_of(self.architecture, key)
        if block is None or component is None:
            return
        self.blocks.setdefault(block, Row()).add(row)
        self.components.setdefault(component, Row()).add(row)

    @property
    def total(self) -> Row:
        """Sum over the components."""
        row = Row()
        for component in self.components.values():
            row.add(component)
        return row

    def energy_kept(self) -> dict[str, Any]:
        """In all, per component and per block in the order of the forward pass."""
        labels = block_labels(self.architecture)
        blocks = sorted(self.blocks, key=lambda label: labels.index(label) if label in labels else len(labels))
        return {
            "energy_kept": self.total.energy_kept,
            "energy_kept_by_component": {name: row.energy_kept for name, row in self.components.items()},
            "energy_kept_by_block": {name: self.blocks[name].energy_kept for name in blocks},
        }

    def energy_metadata(self) -> dict[str, str]:
        """The same as entries of a file's metadata."""
        return {f"dpo.{name}": json.dumps(value) for name, value in self.energy_kept().items()}


def measure(
    pair: Pair,
    key: str,
    *,
    device: torch.device | str = "cpu",
    part: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Row]:
    """One tensor's delta, float32 on `device`, and its row of figures.

    Args:
        part: 0, 1 or 2 for q, k or v of a fused in_proj; None for the whole tensor.
        out: memory for the delta, as in `Pair.weight`.

    Raises:
        BadTensorError: NaN or Inf in either file, by key.
    """

    def own(tensor: Tensor) -> Tensor:
        return tensor if part is None else tensor.chunk(3)[part]

    weight = pair.weight(key, device, out)
    base_energy = energy(own(weight))
    delta = own(pair.to_delta_(weight, key))
    offset = energy(delta)
    row = Row(
        numel=delta.numel(),
        base=base_energy,
        offset=offset,
        # equal tensors were rounded alike: their difference holds no noise
        noise=sum(rounding_energy(own(model.read(key))) for model in (pair.base, pair.tuned)) if offset else 0.0,
        largest=max(abs(float(bound)) for bound in torch.aminmax(delta)) if delta.numel() else 0.0,
    )
    return delta, row


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


def changed_text_encoders(tally: Tally) -> list[str]:
    """Text encoders whose change is more than the rounding of the files explains."""
    return [
        name for name, row in tally.components.items() if name.startswith("te") and row.offset > _BEYOND_ROUNDING * row.noise
    ]


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
