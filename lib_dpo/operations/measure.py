"""What is measured while tensors pass by: energies per block and component, and what rounding alone explains."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib_dpo.families.arch import Architecture
from lib_dpo.families.blocks import block_labels, block_of
from lib_dpo.families.keymap import component_of
from lib_dpo.maths.lowrank import energy
from lib_dpo.offsets.offset import Pair

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
# Formats whose values others hold too, the coarsest first: a file may have gone through one of them.
_COARSER = [
    dtype
    for dtype in (getattr(torch, "float8_e5m2", None), getattr(torch, "float8_e4m3fn", None), torch.bfloat16, torch.float16)
    if dtype is not None
]
_TELLING = 4  # different sizes of values: so many do not fall on the coarser grid by chance, as a constant does
_FIRST = 64  # values of a sample that show most formats to be none it went through
_SAMPLE = 1 << 14  # values looked at per tensor: one tensor's mean step^2 is then known to about 1 %


def rounding_energy(stored: Tensor) -> float:
    """Expected ||rounding error||^2 of a tensor as stored: the sum of step^2 / 12, estimated on an even sample.

    A tensor that holds only values of a coarser format, such as float32 of an fp8 or bfloat16 file, counts as what it was.
    """
    if not stored.numel():
        return 0.0
    flat = stored.reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    values = sample.float()
    bits, smallest = _GRID[_rounded_to(values, stored.dtype)]
    exponent = torch.frexp(values).exponent.double() - 1 - bits
    exponent = torch.where(values == 0, torch.full_like(exponent, smallest), exponent)
    step = torch.exp2(exponent.clamp_min(smallest))
    return float(step.square().mean() / 12) * flat.numel()


def _rounded_to(values: Tensor, stored: torch.dtype) -> torch.dtype:
    """The coarsest format that holds all of these float32 values; that in which they are stored where none does."""
    coarser = [dtype for dtype in _COARSER if _GRID[dtype][0] < _GRID[stored][0]]
    for dtype in coarser:
        if all(bool((part.to(dtype).float() == part).all()) for part in (values[:_FIRST], values)):
            steps = values[values != 0].abs().sort().values.diff()
            return dtype if int(steps.count_nonzero()) + 1 >= _TELLING else stored
    return stored


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

    def only(self, components: Collection[str | None]) -> Tally:
        """The same figures of these components and their blocks only."""
        kept = Tally(self.architecture)
        kept.components = {name: row for name, row in self.components.items() if name in components}
        kept.blocks = {name: row for name, row in self.blocks.items() if name[:2] != "TE" or name.lower() in components}
        return kept

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
