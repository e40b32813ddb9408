"""Which file each policy would give, in bytes and in energy kept, from the figures of a pair: nothing is read or written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from lib_dpo.maths.fp8 import ROUNDING
from lib_dpo.maths.precision import dtype_of
from lib_dpo.maths.ranks import Ranking, Spectrum
from lib_dpo.offsets.layers import Layer
from lib_dpo.operations.outlook.figures import Figures
from lib_dpo.operations.rank_plan import fixed_ranks, ranks_for_energy, ranks_for_size, spectrum_of
from lib_dpo.settings import RankPolicy

Way = Literal["rank", "size", "energy"]
_Tensor = tuple[str, str, int, tuple[int, ...]]  # key, dtype as safetensors calls it, bytes of an item, shape

_METADATA_BYTES = 2100  # of a LoRA: the hashes, the verdict, energy kept by block; 2.0 to 2.2 kB were written
_CURVE_POINTS = 28
_NOTHING = [0.0]
_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "fp8": "F8_E4M3"}


@dataclass(frozen=True)
class Foreseen:
    """A file that is not written yet. `ranks` of the layers that would be in it; none of an exact LoRA."""

    file_bytes: int
    energy_kept: float  # a share, 0 to 1
    ranks: Mapping[str, int]

    @property
    def largest_rank(self) -> int:
        return max(self.ranks.values(), default=0)


class Sizes:
    """Every file of one profile and precision."""

    def __init__(self, figures: Figures, *, profile: str = "portable", precision: str = "fp16") -> None:
        assert figures.spectra, "sizes follow from spectra"
        self._figures, self._spectra, self._precision = figures, figures.spectra, precision
        self._item = dtype_of(precision).itemsize
        self._layers = figures.spectra.plans[profile]
        self._pairs = [layer for layer in self._layers if layer.kind == "pair"]
        self._curves: dict[Way, list[Foreseen]] = {}

    @property
    def components(self) -> tuple[str, ...]:
        """What changed: `unet`, and text encoders."""
        return self._spectra.components

    @property
    def largest_rank(self) -> int:
        """From which on no layer takes more: the end of every way to choose a rank."""
        return max(spectrum.cap for spectrum in self._rows.values())

    def foresee(self, policy: RankPolicy) -> Foreseen:
        """The file of a policy. Raises SettingError: a rank beyond every layer, or a size too small for any."""
        return self._of(self._ranks(policy))

    def exact(self) -> Foreseen:
        """The file that holds the whole change, as int8; a layer that int8 does not do for takes more.

        Norms and embeddings of text encoders have no place in a LoRA: their change is missing in it.
        """
        tensors: list[_Tensor] = []
        kept = 0.0
        for layer in self._spectra.plans["exact"]:
            name, bias = layer.module.name, self._change(layer.module.bias)
            if layer.kind == "norm":
                tensors += self._whole_tensors(layer, "fp16")
                kept += sum(self._change(key) for key in layer.keys)
                continue
            kept += self._spectra.changes.get(name, 0.0) + (bias if layer.kind == "exact" else 0.0)
            if self._spectra.changes.get(name) or bias or layer.required:
                tensors += [(f"{name}.lokr_w1", "F32", 4, (1, 1)), (f"{name}.lokr_w2", "I8", 1, layer.shape)]
                if layer.kind == "exact" and bias:
                    tensors.append((f"{name}.diff_b", "F16", 2, layer.shape[:1]))
        return Foreseen(_file_bytes(tensors), min(1.0, kept / self._spectra.total), {})

    def curve(self, way: Way) -> list[Foreseen]:
        """Files from the smallest to the largest, as one way of choosing sizes gives them."""
        if way not in self._curves:
            if way == "rank":
                plans: Sequence[Mapping[str, int]] = [self._ranks(RankPolicy(rank=rank)) for rank in _spread(self.largest_rank)]
            else:
                plans = self._ranking(way).steps(_CURVE_POINTS)
            self._curves[way] = [self._of(ranks) for ranks in plans]
        return self._curves[way]

    # ---- inside ----

    def _ranks(self, policy: RankPolicy) -> dict[str, int]:
        if policy.fixed:
            return fixed_ranks(self._layers, policy)
        if policy.size_mb is not None:
            return ranks_for_size(self._layers, self._rows, self._ranking("size"), self._item, policy.size_mb)
        whole = sum(self._change(key) for layer in self._layers if layer.kind != "pair" for key in layer.keys)
        pairs = sum(self._spectra.changes.get(layer.module.name, 0.0) for layer in self._pairs)
        rest = max(0.0, self._spectra.total - pairs - whole)
        return ranks_for_energy(self._ranking("energy"), policy.energy or 1.0, pairs, whole, rest, self._item)

    def _of(self, ranks: Mapping[str, int]) -> Foreseen:
        """The file in which the layers have these ranks, as far as their changes have components."""
        kept, used = 0.0, {}
        tensors: list[_Tensor] = []
        for layer in self._layers:
            name = layer.module.name
            if layer.kind != "pair":
                tensors += self._whole_tensors(layer, "fp16" if self._item == 1 else self._precision)
                kept += sum(self._change(key) for key in layer.keys)
                continue
            reached = self._reached.get(name, _NOTHING)
            rank = max(min(ranks.get(name, 0), len(reached) - 1), int(layer.required))
            if rank:
                used[name] = rank
                kept += reached[min(rank, len(reached) - 1)]
                tensors += self._pair_tensors(layer, rank)
        rounding = 1 - ROUNDING if self._item == 1 else 1.0
        return Foreseen(_file_bytes(tensors), kept * rounding / self._spectra.total, used)

    def _whole_tensors(self, layer: Layer, precision: str) -> list[_Tensor]:
        """Of a norm or a dense layer, where it or its bias changed."""
        if not any(self._change(key) for key in layer.keys):
            return []
        parts = {"w_norm": layer.shape, "b_norm": layer.shape}
        if layer.kind != "norm":
            parts = {"diff": layer.shape, "diff_b": layer.shape[:1]}
        dtype, item = _DTYPES[precision], dtype_of(precision).itemsize
        return [(f"{layer.module.name}.{part}", dtype, item, shape) for part, shape in parts.items()]

    def _pair_tensors(self, layer: Layer, rank: int) -> list[_Tensor]:
        name, kernel, dtype = layer.module.name, layer.shape[2:], _DTYPES[self._precision]
        wide = self._item in (1, 4)  # alphas of fp8 and float32 files are float32
        return [
            (f"{name}.alpha", "F32" if wide else "F16", 4 if wide else 2, ()),
            (f"{name}.lora_down.weight", dtype, self._item, (rank, *layer.shape[1:])),
            (f"{name}.lora_up.weight", dtype, self._item, (layer.shape[0], rank, *(1 for _ in kernel))),
        ]

    @cached_property
    def _rows(self) -> dict[str, Spectrum]:
        """Layers as the allocation sees them; those that did not change have nothing to take."""
        empty = np.zeros(0)
        return {
            name: spectrum_of(layer, self._spectra.energies.get(name, empty), self._spectra.changes.get(name, 0.0), self._item)
            for layer in self._pairs
            for name in (layer.module.name,)
        }

    @cached_property
    def _reached(self) -> dict[str, list[float]]:
        """Energy of the first 0, 1, 2, ... components of each layer, those that are 0 left out."""
        return {name: [0.0, *np.cumsum(values[values > 0]).tolist()] for name, values in self._spectra.energies.items()}

    @cached_property
    def _by_size(self) -> Ranking:
        return Ranking(self._rows, weighted=True)

    @cached_property
    def _by_energy(self) -> Ranking:
        return Ranking(self._rows, weighted=False)

    def _ranking(self, way: Way) -> Ranking:
        return self._by_size if way == "size" else self._by_energy

    def _change(self, key: str) -> float:
        row = self._figures.rows.get(key)
        return row.offset if row else 0.0


def _file_bytes(tensors: Sequence[_Tensor]) -> int:
    """What a file of these tensors takes, header and all."""
    header, position = _METADATA_BYTES, 0
    for key, dtype, item, shape in tensors:
        end = position + item * math.prod(shape)
        numbers = f'[{",".join(map(str, shape))}],"data_offsets":[{position},{end}]'
        header += len(f'"{key}":{{"dtype":"{dtype}","shape":{numbers}}},')
        position = end
    return header + position


def _spread(last: int) -> list[int]:
    """Ranks from 1 to the last: those that people choose, and as many between them."""
    return sorted({min(last, round(2 ** (half / 2))) for half in range(2 * last.bit_length() + 1)})
