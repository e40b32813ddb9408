"""A LoRA at another rank, from its factors alone: QR of both, then the SVD of the small core. Never a dense delta."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError, MismatchError, SettingError
from lib_dpo.files.checkpoint import Checkpoint
from lib_dpo.files.header import dtype_name
from lib_dpo.files.writer import SafetensorsWriter
from lib_dpo.maths.fp8 import LARGEST_PRODUCT, ROUNDING, Extent, factor_scale
from lib_dpo.maths.lowrank import carrying, recompress
from lib_dpo.maths.precision import dtype_of, full_precision, narrowed
from lib_dpo.maths.ranks import Spectrum, allocate
from lib_dpo.maths.threads import side_by_side
from lib_dpo.offsets.lora.alphas import encoder_of, readable_alphas
from lib_dpo.offsets.lora.card import CardFate, fate_text, write_card
from lib_dpo.offsets.lora.file import FileModules, read_modules
from lib_dpo.offsets.lora.metadata import ENTRY_BYTES
from lib_dpo.offsets.lora.offset import read_decomposed, read_factors
from lib_dpo.offsets.lora.scale import ADAPTER_CONFIG, PeftSettings, form_scale
from lib_dpo.operations.rank_plan import size_weight
from lib_dpo.operations.resize_metadata import NewPair, energy_claimed, resized_metadata
from lib_dpo.progress import Progress, Steps
from lib_dpo.settings import RankPolicy, size_meant

_FACTORS = ("up", "down", "mid", "alpha")
_ATTENTION = re.compile(r"(.+self_attn[._])(?:q|k|v|out)_proj")


@dataclass(frozen=True)
class ResizeReport:
    """What was written; energy is relative to all that the LoRA that came in changes.

    `energy_of_change` is what is left of the change that the LoRA was extracted from, where its metadata says how much of
    it the LoRA held. The two shares multiply because an extracted LoRA is an orthogonal projection of the change, and the
    best smaller one a projection of that: what each step misses is orthogonal to the other (but for rounding).
    """

    path: Path
    layers: int
    file_bytes: int
    ranks_before: tuple[int, int]
    ranks_after: tuple[int, int]
    energy_kept: float
    energy_of_change: float | None = None
    twins: tuple[str, ...] = ()  # keys that said again what others say: not written
    exhausted: int = 0  # layers at a lower rank than was asked for and they had, whose other components carry nothing
    card: CardFate = "none"  # of what WebUIs show of it

    @property
    def card_text(self) -> str:
        """That the LoRA has no card of this tool, for people; empty where it has."""
        return fate_text(self.card, self.path)

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        return {
            "output": str(self.path),
            "layers": self.layers,
            "file_bytes": self.file_bytes,
            "ranks_before": {"min": self.ranks_before[0], "max": self.ranks_before[1]},
            "ranks_after": {"min": self.ranks_after[0], "max": self.ranks_after[1]},
            "energy_kept_of_lora": self.energy_kept,
            "energy_kept_of_change": self.energy_of_change,
            "twins_left_out": list(self.twins),
            "exhausted_layers": self.exhausted,
            "card": self.card,
        }


@dataclass(frozen=True)
class _Core:
    """One module: shapes, and the spectrum of up @ down times its scale, without components that carry nothing.

    `alpha` is the key that carries the scale; None where no program would look for one, and the factors have to.
    """

    parts: Mapping[str, str]
    values: Tensor  # float64, one at least and `rank` at most
    scale: float
    rank: int
    alpha: str | None


def resize(
    lora: Checkpoint,
    output: Path,
    policy: RankPolicy,
    *,
    precision: str = "keep",
    overwrite: bool = False,
    card: bool = True,
    on_progress: Progress | None = None,
) -> ResizeReport:
    """Write the LoRA with new ranks; alpha / rank * up @ down approximates what it was, so strengths mean the same.

    Args:
        card: whether the LoRA gets a card for the lists of WebUIs.

    Raises:
        MismatchError: no LoRA pairs in the file, or other decompositions.
        BadTensorError: factors that do not fit together, or hold NaN or Inf.
        SettingError: a size too small for any layer, a rank above every layer's own.
        OutputError: the output exists or cannot be written.
    """
    found = read_modules(lora)
    pairs = _pairs(lora, found)
    others = _others(found)
    steps = Steps(2 * len(pairs), on_progress)
    with full_precision():

        def core(name: str) -> _Core:
            parts = pairs[name]
            up, down, scale = read_factors(lora, parts, found.settings)
            values = recompress(up, down.flatten(1))[1] * abs(scale)
            values = values[: max(1, int(carrying(values).sum()))]
            return _Core(parts, values, scale, down.shape[0], _alpha_key(name, parts))

        cores = {}
        with side_by_side(core, pairs) as done:
            for name, cores[name] in zip(pairs, done, strict=True):
                steps.advance(1, name)
        ranks = _ranks(lora, cores, others, policy, precision=precision, title=output.stem)
        job = _Job(lora, found.settings, policy, precision, _other_energy(lora, found))
        kept = _write(job, cores, others, ranks, output, overwrite=overwrite, steps=steps)
    claimed = energy_claimed(lora.metadata)
    return ResizeReport(
        path=output,
        layers=sum(rank > 0 for rank in ranks.values()),
        file_bytes=output.stat().st_size,
        ranks_before=(min(core.rank for core in cores.values()), max(core.rank for core in cores.values())),
        ranks_after=(min((r for r in ranks.values() if r), default=0), max(ranks.values())),
        energy_kept=kept,
        energy_of_change=None if claimed is None else claimed * kept,
        twins=found.twins,
        exhausted=sum(ranks[name] < _own(policy, lora, core) and ranks[name] < core.rank for name, core in cores.items()),
        card=write_card(output, source=lora.path) if card else "none",
    )


def _pairs(lora: Checkpoint, found: FileModules) -> dict[str, Mapping[str, str]]:
    """The parts of all pairs, by module. Raises MismatchError: there are none, or what is bound to a model lies among them."""
    for row in found.modules:
        if row.form and row.form.bound:
            raise MismatchError(
                f"{lora.path.name}: {row.name} is {row.form.bound}, whose result depends on the model's weights: what a lower "
                "rank keeps cannot be told from the file; bake it into a checkpoint, and extract a LoRA from base and result"
            )
    pairs = {row.name: row.parts for row in found.modules if row.form and row.form.name == "LoRA"}
    if not pairs:
        forms = sorted({row.form.name for row in found.modules if row.form})
        holds = f": it holds {' and '.join(forms)}, which no rank can cut; bake it, and extract a LoRA from base and result"
        raise MismatchError(
            f"{lora.path.name} holds no LoRA pairs (lora_up and lora_down){holds if forms else '; expected a LoRA file'}"
        )
    return pairs


def _others(found: FileModules) -> dict[str, str]:
    """Keys that are copied as they are, and the parts they are; `` for those that belong to no module."""
    others = dict.fromkeys(found.unknown, "")
    for row in found.modules:
        others |= {key: part for part, key in row.parts.items() if "up" not in row.parts or part not in _FACTORS}
    return others


def _other_energy(lora: Checkpoint, found: FileModules) -> float:
    """The energy of the LoHa and LoKr that are copied. Raises MismatchError: their scale lies outside of their tensors."""
    energy = 0.0
    for row in found.modules:
        if row.form and row.form.name in ("LoHa", "LoKr"):
            if form_scale(lora, found.settings, row.parts, row.form.rank).source in ("metadata", ADAPTER_CONFIG):
                raise MismatchError(
                    f"{lora.path.name}: {row.name} is a {row.form.name} whose scale is in its PEFT settings, which a resized "
                    "file does not carry; bake it, and extract a LoRA from base and result"
                )
            change = read_decomposed(lora, row.parts, row.form, found.settings)
            energy += float(change.values.double().square().sum()) * change.scale**2
    return energy


def _alpha_key(name: str, parts: Mapping[str, str]) -> str | None:
    """Where the scale of a module is written: under its own alpha, or a new one where kohya's names promise one.

    PEFT and diffusers know no alphas (diffusers refuses a file with one): there the factors carry the scale.
    """
    if "alpha" in parts:
        return parts["alpha"]
    return f"{name}.alpha" if ".lora_up." in parts["up"] else None


def _ranks(
    lora: Checkpoint, cores: Mapping[str, _Core], others: Mapping[str, str], policy: RankPolicy, *, precision: str, title: str
) -> dict[str, int]:
    """The new rank of each module, 0 where it is left out."""
    if policy.fixed:
        return _fixed_ranks(lora, cores, policy)
    spectra = _spectra(lora, cores, precision)
    whole = _whole_attention(cores)
    rest = {
        name: replace(row, energies=row.energies[1:], fixed_bytes=0, cap=row.cap - 1) if name in whole else row
        for name, row in spectra.items()
    }
    if policy.energy is not None:
        total = sum(float(row.energies.sum()) for row in spectra.values())
        taken = sum(float(spectra[name].energies[0]) for name in whole)
        ranks = allocate(rest, energy=policy.energy * total * (1 + ROUNDING * (precision == "fp8")) - taken)
    else:
        size = policy.size_mb or 0.0
        longest = [NewPair(rank, 1.234567e-05, convolution) for rank in (1, 2) for convolution in (False, True)]
        metadata = resized_metadata(lora, policy, title, 1 / 3, longest)
        overhead = len(json.dumps(metadata).encode()) + ENTRY_BYTES
        overhead += sum(lora.infos[key].nbytes + ENTRY_BYTES + len(key) for key in others)
        overhead += sum(spectra[name].bytes_per_rank + spectra[name].fixed_bytes for name in whole)
        budget = int(size * 1e6) - overhead
        ranks = allocate(rest, budget=budget)
        if budget < 0 or not (whole or any(ranks.values())):
            least = overhead if whole else overhead + min(row.bytes_per_rank + row.fixed_bytes for row in rest.values())
            raise SettingError(
                f"size {size:g} MB holds no layer of {lora.path.name}; expected at least {least / 1e6:.2g} MB"
                + size_meant(size, least / 1e6)
            )
    return {name: rank + (name in whole) for name, rank in ranks.items()}


def _fixed_ranks(lora: Checkpoint, cores: Mapping[str, _Core], policy: RankPolicy) -> dict[str, int]:
    """The rank that was asked for, or what carries something. Raises SettingError: no module has so many."""
    largest = max(core.rank for core in cores.values())
    if policy.fixed and policy.fixed > largest:
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


def _spectra(lora: Checkpoint, cores: Mapping[str, _Core], precision: str) -> dict[str, Spectrum]:
    """What each further component of a module keeps, and what it costs."""
    spectra = {}
    for name, core in cores.items():
        numel = math.prod(lora.infos[core.parts["up"]].shape) + math.prod(lora.infos[core.parts["down"]].shape)
        if "mid" in core.parts:  # its kernel goes into the new down factor
            numel *= math.prod(lora.infos[core.parts["mid"]].shape[2:])
        per_rank = _dtype(lora, core, precision).itemsize * numel // core.rank
        energies = core.values.square().numpy()
        weight = size_weight(name, float(energies.sum()))
        spectra[name] = Spectrum(energies, per_rank, 3 * (ENTRY_BYTES + len(name)), len(core.values), weight)
    return spectra


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


@dataclass(frozen=True)
class _Job:
    """What is resized, and how."""

    lora: Checkpoint
    settings: PeftSettings | None
    policy: RankPolicy
    precision: str
    other_energy: float  # of LoHa and LoKr, which are copied


def _write(
    job: _Job,
    cores: Mapping[str, _Core],
    others: Mapping[str, str],
    ranks: Mapping[str, int],
    output: Path,
    *,
    overwrite: bool,
    steps: Steps,
) -> float:
    """Write the file; the share of the LoRA's energy that its numbers keep."""
    lora = job.lora
    expected = sum(info.nbytes for info in lora.infos.values())
    missed = 0.0
    with SafetensorsWriter(
        output, overwrite=overwrite, expected_bytes=expected, max_tensors=len(lora.infos) + len(cores), compact=True
    ) as writer:
        least = {name: float(core.values.norm()) * ranks[name] / LARGEST_PRODUCT for name, core in cores.items()}
        alphas = readable_alphas(_alphas(job, cores, ranks), least)
        for name, alpha in alphas.items():  # all alphas first: they are float32, and so every tensor stays aligned
            writer.add(cores[name].alpha or "", torch.tensor(alpha, dtype=torch.float32))
        copied = _copy(lora, writer, others)  # before the factors too, which may be of one byte
        with side_by_side(lambda name: _smaller(job, name, cores[name], ranks[name], alphas.get(name)), cores) as done:
            for name, smaller in zip(cores, done, strict=True):
                for key, tensor in smaller.tensors.items():
                    writer.add(key, tensor)
                missed += smaller.missed
                steps.advance(1, name)
        total = copied + sum(float(core.values.square().sum()) for core in cores.values()) + job.other_energy
        kept = 1 - missed / total if total else 1.0
        written = [
            NewPair(ranks[name], alphas.get(name, ranks[name]), _is_convolution(lora, core))
            for name, core in cores.items()
            if ranks[name]
        ]
        writer.finish(resized_metadata(lora, job.policy, output.stem, kept, written), sources=[lora])
    return kept


def _alphas(job: _Job, cores: Mapping[str, _Core], ranks: Mapping[str, int]) -> dict[str, float]:
    """The alphas of modules that have one: their scales stay, but for fp8, which wants factors of a size.

    Raises:
        SettingError: fp8 was asked for a file whose names have no place for an alpha.
    """
    written = {name: core for name, core in cores.items() if ranks[name]}
    if job.precision == "fp8":
        if without := next((name for name, core in written.items() if not core.alpha), None):
            raise SettingError(f"{job.lora.path.name}: {without} has no alpha, which fp8 needs; choose the precision fp16")
        extents: dict[str, list[Extent]] = {}
        for name, core in written.items():
            up, down = (math.prod(job.lora.infos[core.parts[part]].shape) // core.rank for part in ("up", "down"))
            extents.setdefault(encoder_of(name), []).append(Extent(float(core.values.norm()), up, down))
        scales = {component: factor_scale(own) for component, own in extents.items()}
        return {name: scales[encoder_of(name)] * ranks[name] for name in written}
    return {name: core.scale * ranks[name] for name, core in written.items() if core.alpha}


class _Smaller(NamedTuple):
    """The new factors of a module by key, and the energy that they miss of the old ones."""

    tensors: Mapping[str, Tensor]
    missed: float


def _smaller(job: _Job, name: str, core: _Core, rank: int, alpha: float | None) -> _Smaller:
    """A module at another rank; no tensors at rank 0. May be called from several threads at once.

    Args:
        alpha: as it is written; None where the factors have to carry the whole scale.
    """
    if not rank:
        return _Smaller({}, float(core.values.square().sum()))
    lora = job.lora
    up, down, _ = read_factors(lora, core.parts, job.settings)
    U, S, Vh = recompress(up, down.flatten(1))
    scale = 1.0 if alpha is None else alpha / rank
    if scale != core.scale:  # what the alpha does not carry goes into the factors
        S, U = S * abs(core.scale / scale), U * math.copysign(1, core.scale * scale)
    root = S[:rank].sqrt()
    dtype = _dtype(lora, core, job.precision)
    tilt = (len(U) / Vh.shape[1]) ** 0.25 if dtype.itemsize == 1 else 1.0  # as in `Factors`
    down_factor, up_factor = narrowed(root[:, None] * Vh[:rank] / tilt, dtype), narrowed(U[:, :rank] * root * tilt, dtype)
    if not all(bool(torch.isfinite(factor.float()).all()) for factor in (down_factor, up_factor)):
        raise SettingError(f"{lora.path.name}: {name} does not fit into {dtype_name(dtype)}; choose the precision fp32")
    kernel = lora.infos[core.parts["up"]].shape[2:]
    tensors = {
        core.parts["down"]: down_factor.reshape(rank, *down.shape[1:]),
        core.parts["up"]: up_factor.reshape(-1, rank, *kernel),
    }
    return _Smaller(tensors, _missed((up, down.flatten(1), core.scale), (up_factor, down_factor, scale)))


def _copy(lora: Checkpoint, writer: SafetensorsWriter, others: Mapping[str, str]) -> float:
    """Copy what is no pair; the energy of the differences among it. Raises BadTensorError for NaN or Inf in one."""
    energy = 0.0
    for key, part in others.items():
        info = lora.infos[key]
        writer.add_raw(key, info.dtype, info.shape, lora.raw(key))
        if part in ("diff", "diff_b"):
            own = float(lora.read(key).double().square().sum())
            if not math.isfinite(own):
                raise BadTensorError(f"{lora.path.name}: {key} holds NaN or Inf; the file is damaged, get it again")
            energy += own
    return energy


def _missed(before: tuple[Tensor, Tensor, float], after: tuple[Tensor, Tensor, float]) -> float:
    """||a B A - a' B' A'||^2 of two products from their factors alone, in float64."""

    def inner(one: tuple[Tensor, Tensor, float], other: tuple[Tensor, Tensor, float]) -> float:
        up = one[0].double().mT @ other[0].double()  # (rank, rank')
        down = one[1].double() @ other[1].double().mT
        return float((up * down).sum()) * one[2] * other[2]

    return max(0.0, inner(before, before) - 2 * inner(before, after) + inner(after, after))


def _dtype(lora: Checkpoint, core: _Core, precision: str) -> torch.dtype:
    if precision != "keep":
        return dtype_of(precision)
    return lora.read(core.parts["up"]).dtype
