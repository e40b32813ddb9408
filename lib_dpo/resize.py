"""A LoRA at another rank, from its factors alone: QR of both, then the SVD of the small core. Never a dense delta."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_dpo.checkpoint import Checkpoint
from lib_dpo.errors import MismatchError, SettingError
from lib_dpo.header import dtype_name
from lib_dpo.lora import (
    ADAPTER_METADATA,
    ENTRY_BYTES,
    STALE_METADATA,
    check_decomposition,
    check_module,
    group_keys,
    read_factors,
)
from lib_dpo.lowrank import full_precision, recompress
from lib_dpo.precision import PRECISION
from lib_dpo.progress import Progress, Steps
from lib_dpo.ranks import Spectrum, allocate
from lib_dpo.settings import RankPolicy
from lib_dpo.writer import SafetensorsWriter

_FACTORS = ("up", "down", "mid", "alpha")
# What no longer holds of a resized file.
_STALE = (
    *STALE_METADATA,
    ADAPTER_METADATA,
    "dpo.energy_kept",  # and its parts
    "dpo.rank_policy",
)
_ATTENTION = re.compile(r"(.+self_attn[._])(?:q|k|v|out)_proj")


@dataclass(frozen=True)
class ResizeReport:
    """What was written; energy is relative to the LoRA that came in."""

    path: Path
    layers: int
    file_bytes: int
    ranks_before: tuple[int, int]
    ranks_after: tuple[int, int]
    energy_kept: float

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        return {
            "output": str(self.path),
            "layers": self.layers,
            "file_bytes": self.file_bytes,
            "ranks_before": {"min": self.ranks_before[0], "max": self.ranks_before[1]},
            "ranks_after": {"min": self.ranks_after[0], "max": self.ranks_after[1]},
            "energy_kept_of_lora": self.energy_kept,
        }


@dataclass(frozen=True)
class _Core:
    """One module: shapes, and the spectrum of up @ down times its scale."""

    parts: Mapping[str, str]
    values: Tensor  # float64 (rank,)
    scale: float
    rank: int


def resize(
    lora: Checkpoint,
    output: Path,
    policy: RankPolicy,
    *,
    precision: str = "keep",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ResizeReport:
    """Write the LoRA with new ranks; alpha / rank stays as it is, so strengths mean the same.

    Raises:
        MismatchError: no LoRA pairs in the file, or other decompositions.
        BadTensorError: factors that do not fit together, or hold NaN or Inf.
        SettingError: a size too small for any layer, a rank above every layer's own.
        OutputError: the output exists or cannot be written.
    """
    check_decomposition(lora)
    grouped, others = group_keys(lora.infos)
    pairs = {name: parts for name, parts in grouped.items() if "up" in parts and "down" in parts}
    if not pairs:
        raise MismatchError(f"{lora.path.name} holds no LoRA pairs (lora_up and lora_down); expected a LoRA file")
    for name, parts in grouped.items():
        check_module(lora, parts, name)
        others += [key for part, key in parts.items() if name not in pairs or part not in _FACTORS]
    steps = Steps(2 * len(pairs), on_progress)
    with full_precision():
        cores = {}
        for name, parts in pairs.items():
            up, down, scale = read_factors(lora, parts)
            values = recompress(up, down.flatten(1))[1] * abs(scale)
            cores[name] = _Core(parts, values, scale, down.shape[0])
            steps.advance(1, name)
        ranks = _ranks(lora, cores, others, policy, precision=precision, title=output.stem)
        kept = _write(lora, cores, others, ranks, output, precision, overwrite, policy, steps)
    return ResizeReport(
        path=output,
        layers=sum(rank > 0 for rank in ranks.values()),
        file_bytes=output.stat().st_size,
        ranks_before=(min(core.rank for core in cores.values()), max(core.rank for core in cores.values())),
        ranks_after=(min((r for r in ranks.values() if r), default=0), max(ranks.values())),
        energy_kept=kept,
    )


def _ranks(
    lora: Checkpoint, cores: Mapping[str, _Core], others: list[str], policy: RankPolicy, *, precision: str, title: str
) -> dict[str, int]:
    if policy.fixed:
        largest = max(core.rank for core in cores.values())
        if policy.fixed > largest:
            raise SettingError(
                f"rank {policy.fixed} is above the LoRA's own {largest}; resizing only makes smaller: expected 1 to {largest}"
            )
        convolutions = [core.rank for core in cores.values() if _is_convolution(lora, core)]
        if policy.conv_rank and policy.conv_rank > max(convolutions, default=largest):
            raise SettingError(
                f"conv_rank {policy.conv_rank} is above the convolutions' own {max(convolutions, default=largest)}; resizing "
                "only makes smaller"
            )
        return {name: min(_own(policy, lora, core), len(core.values)) for name, core in cores.items()}
    spectra = {}
    for name, core in cores.items():
        numel = math.prod(lora.infos[core.parts["up"]].shape) + math.prod(lora.infos[core.parts["down"]].shape)
        if "mid" in core.parts:  # its kernel goes into the new down factor
            numel *= math.prod(lora.infos[core.parts["mid"]].shape[2:])
        per_rank = _dtype(lora, core, precision).itemsize * numel // core.rank
        spectra[name] = Spectrum(core.values.square().numpy(), per_rank, 3 * (ENTRY_BYTES + len(name)), len(core.values))
    whole = _whole_attention(cores)
    rest = {
        name: replace(row, energies=row.energies[1:], fixed_bytes=0, cap=row.cap - 1) if name in whole else row
        for name, row in spectra.items()
    }
    if policy.energy is not None:
        total = sum(float(row.energies.sum()) for row in spectra.values())
        taken = sum(float(spectra[name].energies[0]) for name in whole)
        ranks = allocate(rest, energy=policy.energy * total - taken)
    else:
        size = policy.size_mb or 0.0
        metadata = _metadata(lora, policy, title, 1.0)
        overhead = len(json.dumps(metadata).encode()) + ENTRY_BYTES
        overhead += sum(lora.infos[key].nbytes + ENTRY_BYTES + len(key) for key in others)
        overhead += sum(spectra[name].bytes_per_rank + spectra[name].fixed_bytes for name in whole)
        budget = int(size * 1e6) - overhead
        ranks = allocate(rest, budget=budget)
        if budget < 0 or not (whole or any(ranks.values())):
            raise SettingError(f"size {size:g} MB holds no layer of {lora.path.name}; choose a larger size")
    return {name: rank + (name in whole) for name, rank in ranks.items()}


def _whole_attention(names: Iterable[str]) -> set[str]:
    """Modules of text encoders that get one component at least: hosts take CLIP-G's q, k, v and out together or not at all.

    Names do not tell SD 2's encoder, which is of that kind, from SD 1's, so all encoders are treated alike.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        if match := _ATTENTION.fullmatch(name):
            groups.setdefault(match[1], []).append(name)
    return {name for group in groups.values() if len(group) > 1 for name in group}


def _own(policy: RankPolicy, lora: Checkpoint, core: _Core) -> int:
    return policy.conv_rank if policy.conv_rank and _is_convolution(lora, core) else policy.fixed or 0


def _is_convolution(lora: Checkpoint, core: _Core) -> bool:
    """Whether a module has a kernel beyond 1x1, in its down factor or in the one between."""
    return math.prod(lora.infos[core.parts["mid" if "mid" in core.parts else "down"]].shape[2:]) > 1


def _write(
    lora: Checkpoint,
    cores: Mapping[str, _Core],
    others: list[str],
    ranks: Mapping[str, int],
    output: Path,
    precision: str,
    overwrite: bool,
    policy: RankPolicy,
    steps: Steps,
) -> float:
    """Write the file; the share of the LoRA's energy that its numbers keep."""
    expected = sum(lora.infos[key].nbytes for key in lora.infos)
    missed = 0.0
    with SafetensorsWriter(
        output, overwrite=overwrite, expected_bytes=expected, max_tensors=len(lora.infos), compact=True
    ) as writer:
        for name, core in cores.items():  # all alphas first: they are float32, and so every tensor stays aligned
            if "alpha" in core.parts and ranks[name]:
                writer.add(core.parts["alpha"], torch.tensor(core.scale * ranks[name], dtype=torch.float32))
        for name, core in cores.items():
            rank = ranks[name]
            if not rank:
                missed += float(core.values.square().sum())
            else:
                up, down, _ = read_factors(lora, core.parts)
                U, S, Vh = recompress(up, down.flatten(1))
                if "alpha" not in core.parts:  # its scale was kept elsewhere: here it goes into the factors
                    S, U = S * abs(core.scale), U * math.copysign(1, core.scale)
                root = S[:rank].sqrt()
                dtype = _dtype(lora, core, precision)
                down_factor, up_factor = (root[:, None] * Vh[:rank]).to(dtype), (U[:, :rank] * root).to(dtype)
                if not all(bool(torch.isfinite(factor.float()).all()) for factor in (down_factor, up_factor)):
                    raise SettingError(
                        f"{lora.path.name}: {name} does not fit into {dtype_name(dtype)}; choose the precision fp32"
                    )
                writer.add(core.parts["down"], down_factor.reshape(rank, *down.shape[1:]))
                scale = core.scale if "alpha" in core.parts else 1.0
                missed += _missed((up, down.flatten(1), core.scale), (up_factor, down_factor, scale))
                kernel = lora.infos[core.parts["up"]].shape[2:]
                writer.add(core.parts["up"], up_factor.reshape(-1, rank, *kernel))
            steps.advance(1, name)
        for key in others:
            info = lora.infos[key]
            writer.add_raw(key, info.dtype, info.shape, lora.raw(key))
        kept = _kept(cores, missed)
        writer.finish(_metadata(lora, policy, output.stem, kept))
    return kept


def _missed(before: tuple[Tensor, Tensor, float], after: tuple[Tensor, Tensor, float]) -> float:
    """||a B A - a' B' A'||^2 of two products from their factors alone, in float64."""

    def inner(one: tuple[Tensor, Tensor, float], other: tuple[Tensor, Tensor, float]) -> float:
        up = one[0].double().mT @ other[0].double()  # (rank, rank')
        down = one[1].double() @ other[1].double().mT
        return float((up * down).sum()) * one[2] * other[2]

    return max(0.0, inner(before, before) - 2 * inner(before, after) + inner(after, after))


def _kept(cores: Mapping[str, _Core], missed: float) -> float:
    total = sum(float(core.values.square().sum()) for core in cores.values())
    return 1 - missed / total if total else 1.0


def _metadata(lora: Checkpoint, policy: RankPolicy, title: str, kept: float) -> dict[str, str]:
    """The LoRA's own without what no longer holds; it goes by its new name where it went by that of its file."""
    metadata = {key: text for key, text in lora.metadata.items() if not key.startswith(_STALE)}
    if metadata.get("modelspec.title") == lora.name:
        metadata["modelspec.title"] = title
    dim, conv_dim = str(policy.fixed or "Dynamic"), str(policy.conv_rank or policy.fixed or "Dynamic")
    arguments = json.dumps({"conv_dim": conv_dim, "conv_alpha": conv_dim})
    return metadata | {
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": arguments,
        "dpo.resized": f"{policy}, from {lora.name}, {kept:.6f} of its energy",
    }


def _dtype(lora: Checkpoint, core: _Core, precision: str) -> torch.dtype:
    if precision != "keep":
        return PRECISION[precision]
    return lora.read(core.parts["up"]).dtype
