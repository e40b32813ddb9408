"""From a pair of checkpoints to a LoRA file: ranks, factors layer by layer, and how good the written numbers are."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_dpo.errors import NothingToDoError, OutputError, SettingError
from lib_dpo.families.keymap import component_of
from lib_dpo.files.header import tensor_bytes
from lib_dpo.files.writer import LEGACY_HASH, SafetensorsWriter
from lib_dpo.maths.devices import batch_size, resolve_device
from lib_dpo.maths.lowrank import Factors, energy
from lib_dpo.maths.precision import PRECISION, full_precision
from lib_dpo.maths.threads import Scratch, side_by_side
from lib_dpo.offsets.coverage import LeftOut, nothing_changed
from lib_dpo.offsets.coverage import left_out as tensors_left_out
from lib_dpo.offsets.layers import Layer, plan_layers
from lib_dpo.offsets.lora.alphas import readable_alphas
from lib_dpo.offsets.lora.metadata import METADATA_BYTES, kohya_metadata
from lib_dpo.offsets.offset import Pair, licence
from lib_dpo.operations.decompose import Decomposer
from lib_dpo.operations.measure import Row, Tally, measure
from lib_dpo.operations.rank_plan import asked_rank, entry_bytes, left_out, plan_ranks
from lib_dpo.operations.verdict import Verdict, changed_text_encoders, right_base
from lib_dpo.progress import Progress, Steps
from lib_dpo.settings import ExtractSettings


@dataclass(frozen=True)
class ExtractReport:
    """What was written and how good it is."""

    path: Path
    architecture: str
    policy: str
    components: tuple[str, ...]
    ranks: Mapping[str, int]  # by LoRA module name; 0 for those left out
    layers: int
    file_bytes: int
    tally: Tally
    verdict: Verdict
    methods: Mapping[str, int]
    fallbacks: Mapping[str, int]
    energy_wanted: float | None
    left_out: tuple[LeftOut, ...]
    capped: int  # layers whose rank is below the one asked for, since larger factors outgrow the layer
    exhausted: int  # layers that were to get more components than their change has, and got all of those

    @property
    def exhausted_text(self) -> str:
        """That layers got fewer components than asked for, for people; empty where none did."""
        if not self.exhausted:
            return ""
        return f"{self.exhausted} of {self.layers} layers hold fewer components than asked for: their change has no more"

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        used = [rank for rank in self.ranks.values() if rank]
        return {
            "output": str(self.path),
            "architecture": self.architecture,
            "layers": self.layers,
            "file_bytes": self.file_bytes,
            "rank_policy": self.policy,
            "ranks": {"min": min(used, default=0), "max": max(used, default=0)},
            "capped_layers": self.capped,
            "exhausted_layers": self.exhausted,
            "components": list(self.components),
            **self.tally.energy_kept(),
            "energy_wanted": self.energy_wanted,
            "noise_floor": self.tally.total.noise_floor,
            "relative_change": self.tally.total.relative_change,
            "verdict": self.verdict.as_json(),
            "methods": dict(self.methods),
            "fallbacks": dict(self.fallbacks),
            "left_out": [row.as_json() for row in self.left_out],
        }


def extract(
    pair: Pair,
    output: Path,
    settings: ExtractSettings,
    *,
    overwrite: bool = False,
    source: Callable[[], Mapping[str, str]] = dict,
    on_progress: Progress | None = None,
) -> ExtractReport:
    """Write the LoRA of a pair; energy kept is measured on the numbers as they are written, and the file is read again.

    Args:
        source: called once, last; entries for the metadata, such as names and hashes of the two files.
        on_progress: called after each layer; raising in it cancels and leaves nothing behind.

    Raises:
        NothingToDoError: base and tuned are equal.
        SettingError: a rank beyond every layer, or a size too small for any.
        BadTensorError: NaN or Inf, by key.
        OutputError: the output exists, cannot be written, or differs when read again.
    """
    device = resolve_device(settings.device)
    with full_precision():
        encoders = _measure_text_encoders(pair)
        components = ("unet", *changed_text_encoders(encoders))
        layers = plan_layers(pair, settings.profile, components)
        decomposer = Decomposer(pair, device, method=settings.method, seed=settings.seed)
        passes = 1 if settings.policy.fixed else 2
        steps = Steps(passes * sum(layer.numel for layer in layers), on_progress)
        ranks = plan_ranks(pair, layers, components, settings, decomposer, steps)
        run = _Run(pair, Path(output), settings, components, layers, ranks, decomposer, steps)
        return run.write(encoders, overwrite=overwrite, source=source, device=device)


def _measure_text_encoders(pair: Pair) -> Tally:
    """Text encoders before anything else: whether they changed decides what is extracted."""
    tally = Tally(pair.architecture)
    for key in pair.keys:
        if component_of(pair.architecture, key) != "unet":
            tally.add(key, measure(pair, key)[1])
    return tally


class _Prepared(NamedTuple):
    """A layer with the figures and the rounded factors to be written: none if it is left out, or no pair."""

    layer: Layer
    row: Row | None
    up: Tensor | None = None
    down: Tensor | None = None


@dataclass
class _Run:
    """One writing pass: the plan, the open file, and what was measured on the way."""

    pair: Pair
    output: Path
    settings: ExtractSettings
    components: tuple[str, ...]
    layers: Sequence[Layer]
    ranks: Mapping[str, int]
    decomposer: Decomposer
    steps: Steps

    def write(
        self, encoders: Tally, *, overwrite: bool, source: Callable[[], Mapping[str, str]], device: torch.device
    ) -> ExtractReport:
        self.tally = Tally(self.pair.architecture)
        self.digest = hashlib.sha256()
        self.written = self.capped = self.exhausted = 0
        self.used = dict.fromkeys(self.ranks, 0)
        ranks = {layer.module.name: self._rank(layer) for layer in self.layers if layer.kind == "pair"}
        alphas = readable_alphas({name: rank for name, rank in ranks.items() if rank})
        self.alphas = {name: alphas.get(name, 1) for name in ranks}
        self.dtype = PRECISION[self.settings.precision]
        largest = max(math.prod(self.pair.base.shape(layer.module.key)) for layer in self.layers)
        self.scratch = Scratch(largest if device.type == "cpu" else 0)
        with SafetensorsWriter(
            self.output,
            overwrite=overwrite,
            expected_bytes=self._expected_bytes(),
            max_tensors=3 * len(self.layers),
            compact=True,
        ) as self.writer:
            with side_by_side(self._prepare, _batches(self.layers, self.ranks, device), device) as prepared:
                for batch in prepared:
                    self._write_batch(batch)
            for key in left_out(self.pair, self.layers, self.components):
                row = measure(self.pair, key)[1]
                row.residual = row.offset
                self.tally.add(key, row)
            if not self.tally.total.offset:
                raise nothing_changed(self.pair, "UNet", "nothing to extract")
            if not self.written:
                raise NothingToDoError(
                    f"{self.pair.file_names[1]} changes nothing that the profile {self.settings.profile} carries; choose "
                    "the profile webui or full, or write an offset file"
                )
            verdict = self._verdict(encoders)
            self.writer.finish({**self._metadata(verdict), **source()}, check=self._check_written)
        return ExtractReport(
            path=self.output,
            architecture=self.pair.architecture.name,
            policy=str(self.settings.policy),
            components=self.components,
            ranks=self.used,
            layers=self.written,
            file_bytes=self.output.stat().st_size,
            tally=self.tally,
            verdict=verdict,
            methods=self.decomposer.methods,
            fallbacks=self.decomposer.fallbacks,
            energy_wanted=self.settings.policy.energy,
            left_out=tensors_left_out(self.pair),
            capped=self.capped,
            exhausted=self.exhausted,
        )

    def _expected_bytes(self) -> int:
        item = torch.finfo(self.dtype).bits // 8
        ranks = self.ranks
        return METADATA_BYTES + sum(
            entry_bytes(layer) + item * (ranks[layer.module.name] * sum(layer.matrix) if layer.kind == "pair" else layer.numel)
            for layer in self.layers
        )

    def _prepare(self, batch: Sequence[Layer]) -> list[_Prepared]:
        """Factors of layers as they will be written, and what these miss. Several of these calls run at once."""
        if batch[0].kind != "pair":
            return [_Prepared(layer, None) for layer in batch]
        scratch = self.scratch.memory if len(batch) == 1 else None
        loaded = [(layer, *self.decomposer.load(layer, scratch)) for layer in batch]
        rank = self._rank(batch[0])
        work = [(layer, delta) for layer, delta, row in loaded if row.offset and rank]
        names = [layer.module.name for layer, _ in work]
        factors = iter(self.decomposer.factorise([delta for _, delta in work], rank, names) if work else ())
        return [
            self._rounded(layer, row, delta, next(factors) if row.offset and rank else None) for layer, delta, row in loaded
        ]

    def _rounded(self, layer: Layer, row: Row, delta: Tensor, factors: Factors | None) -> _Prepared:
        """Factors in the dtype of the file, and in `row` the energy of what they miss. Overwrites `delta`."""
        if factors is None and layer.required:
            out, in_ = layer.matrix
            factors = Factors(torch.zeros(out, 1), torch.zeros(1, in_), torch.zeros(1))
        if factors is None:
            row.residual = row.offset
            return _Prepared(layer, row)
        alpha = self.alphas[layer.module.name]
        up, down, row.residual = self.decomposer.round_(layer, delta, factors, self.dtype, alpha)
        self._check_fits(layer, row.residual)
        return _Prepared(layer, row, up, down)

    def _write_batch(self, batch: Sequence[_Prepared]) -> None:
        for layer, row, up, down in batch:
            if row is None:
                self._write_whole(layer)
                continue
            if up is not None and down is not None and up.shape[1]:
                self._write_pair(layer, up, down)
                self.exhausted += bool(row.offset) and up.shape[1] < self._rank(layer)
            self.tally.add(layer.module.key, row)
        for layer, *_ in batch:
            self.steps.advance(layer.numel, layer.module.key)

    def _rank(self, layer: Layer) -> int:
        """The layer's rank; a required one gets at least one component."""
        return max(self.ranks.get(layer.module.name, 0), int(layer.required))

    def _write_pair(self, layer: Layer, up: Tensor, down: Tensor) -> None:
        """Write alpha and both factors."""
        rank, (_, in_) = up.shape[1], layer.matrix
        kernel = layer.shape[2:]
        # 2-byte alphas keep the file's tensors aligned, and fp16 holds every whole number up to 2048 exactly
        dtype = torch.float32 if self.dtype == torch.float32 else torch.float16
        self._add(layer, "alpha", torch.tensor(self.alphas[layer.module.name], dtype=dtype))
        self._add(layer, "lora_down.weight", down.reshape(rank, in_ // math.prod(kernel), *kernel))
        self._add(layer, "lora_up.weight", up.reshape(layer.shape[0], rank, *(1 for _ in kernel)))
        self.written += 1
        self.used[layer.module.name] = rank
        self.capped += self.ranks[layer.module.name] < asked_rank(self.settings.policy, layer)

    def _check_fits(self, layer: Layer, residual: float) -> None:
        if not residual < float("inf"):  # NaN too
            raise SettingError(f"{layer.module.name} does not fit into {self.settings.precision}; choose the precision fp32")

    def _write_whole(self, layer: Layer) -> None:
        """Write a norm or a dense layer: the rounded deltas of its weight and its bias, where either changed."""
        names = ("w_norm", "b_norm") if layer.kind == "norm" else ("diff", "diff_b")
        rows, tensors = [], []
        for key in layer.keys:
            delta, row = measure(self.pair, key)
            rounded = delta.to(self.dtype)
            row.residual = energy(delta - rounded.float())
            self._check_fits(layer, row.residual)
            rows.append(row)
            tensors.append(rounded)
            self.tally.add(key, row)
        if any(row.offset for row in rows):
            for name, tensor in zip(names, tensors, strict=True):
                self._add(layer, name, tensor)
            self.written += 1

    def _add(self, layer: Layer, part: str, tensor: Tensor) -> None:
        tensor = tensor.cpu().contiguous()
        self.digest.update(tensor_bytes(tensor))
        self.writer.add(f"{layer.module.name}.{part}", tensor)

    def _verdict(self, encoders: Tally) -> Verdict:
        everything = Tally(self.pair.architecture)
        everything.components = {**encoders.components, **self.tally.components}
        return right_base(self.pair, everything)

    def _metadata(self, verdict: Verdict) -> dict[str, str]:
        policy = self.settings.policy
        dim, conv_dim = (self._dim(wide_convolutions=wide) for wide in (False, True))
        alpha, conv_alpha = (self._alpha(wide_convolutions=wide) for wide in (False, True))
        kohya = kohya_metadata(self.pair.architecture, dim=(dim, conv_dim), alpha=(alpha, conv_alpha), title=self.output.stem)
        return kohya | {
            "sshs_model_hash": self.digest.hexdigest(),
            "sshs_legacy_hash": LEGACY_HASH,
            "dpo.kind": "lora",
            "dpo.base": self.pair.base.name,
            "dpo.tuned": self.pair.tuned.name,
            "dpo.architecture": self.pair.architecture.name,
            "dpo.method": self.settings.method,
            "dpo.seed": str(self.settings.seed),
            "dpo.rank_policy": str(policy),
            "dpo.profile": self.settings.profile,
            **self.tally.energy_metadata(),
            "dpo.noise_floor": repr(self.tally.total.noise_floor),
            "dpo.verdict": verdict.text,
            "dpo.licence": licence(self.pair),
        }

    def _dim(self, *, wide_convolutions: bool) -> str:
        """The rank asked for, or the largest that there was of it; `Dynamic`, kohya's word, where none was asked for."""
        policy = self.settings.policy
        asked = policy.conv_rank if wide_convolutions and policy.conv_rank else policy.fixed
        if not asked:
            return "Dynamic"
        names = [each.module.name for each in self.layers if each.is_wide_convolution == wide_convolutions]
        return str(max((self.used.get(name, 0) for name in names), default=0) or asked)

    def _alpha(self, *, wide_convolutions: bool) -> str:
        """The alpha of most layers that are written; as the rank where none of the kind is."""
        names = [each.module.name for each in self.layers if each.is_wide_convolution == wide_convolutions]
        alphas = Counter(self.alphas[name] for name in names if self.used.get(name))
        return f"{alphas.most_common(1)[0][0]:g}" if alphas else self._dim(wide_convolutions=wide_convolutions)

    def _check_written(self, file: Path) -> None:
        """Read the file again: its data must be, byte for byte, what energy kept was measured on."""
        digest = hashlib.sha256()
        with file.open("rb") as written:
            written.seek(8 + int.from_bytes(written.read(8), "little"))
            while piece := written.read(1 << 24):
                digest.update(piece)
        if digest.digest() != self.digest.digest():
            raise OutputError(f"{self.output} reads back differently from what was written; check the disk and try again")


def _batches(layers: Sequence[Layer], ranks: Mapping[str, int], device: torch.device) -> Iterator[list[Layer]]:
    """Layers of equal matrix and rank together, as many as the device takes at once; in file order on the CPU."""
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        size = batch_size(device, layer.numel) if layer.kind == "pair" else 1
        group = groups.setdefault((layer.matrix, ranks.get(layer.module.name, 0), layer.required, layer.kind), [])
        group.append(layer)
        if len(group) >= size:
            yield list(group)
            group.clear()
    yield from (group for group in groups.values() if group)
