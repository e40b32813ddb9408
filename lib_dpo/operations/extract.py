"""From a pair of checkpoints to a LoRA file, layer by layer, and how good the written numbers are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_dpo.errors import NothingToDoError, OutputError
from lib_dpo.families.keymap import component_of
from lib_dpo.files.header import tensor_bytes
from lib_dpo.files.writer import LEGACY_HASH, SafetensorsWriter
from lib_dpo.maths.devices import resolve_device
from lib_dpo.maths.lowrank import energy
from lib_dpo.maths.precision import dtype_of, full_precision
from lib_dpo.maths.threads import side_by_side
from lib_dpo.offsets.coverage import LeftOut, nothing_changed
from lib_dpo.offsets.coverage import left_out as tensors_left_out
from lib_dpo.offsets.layers import Layer, plan_layers
from lib_dpo.offsets.lora.card import CardFate, fate_text, write_card
from lib_dpo.offsets.lora.metadata import METADATA_BYTES, kohya_metadata
from lib_dpo.offsets.offset import Pair, licence, stated_licence
from lib_dpo.operations.decompose import Decomposer
from lib_dpo.operations.forms import Exact, Form, LowRank, Prepared, check_fits
from lib_dpo.operations.measure import Tally, measure
from lib_dpo.operations.rank_plan import left_out
from lib_dpo.operations.verdict import Verdict, changed_text_encoders, right_base
from lib_dpo.progress import Progress, Steps
from lib_dpo.settings import ExtractSettings


@dataclass(frozen=True)
class ExtractReport:
    """What was written and how good it is."""

    path: Path
    architecture: str
    form: str
    precision: str
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
    wider: int  # layers of an exact LoRA that int8 did not do for
    card: CardFate = "none"  # of what WebUIs show of it

    @property
    def exhausted_text(self) -> str:
        """That layers got fewer components than asked for, for people; empty where none did."""
        if not self.exhausted:
            return ""
        return f"{self.exhausted} of {self.layers} layers hold fewer components than asked for: their change has no more"

    @property
    def wider_text(self) -> str:
        """That layers of an exact LoRA take more bytes, for people; empty where none does."""
        if not self.wider:
            return ""
        return (
            f"{self.wider} of {self.layers} layers hold a few values far above the others, and take two bytes or more a weight"
        )

    @property
    def card_text(self) -> str:
        """That the LoRA has no card of this tool, for people; empty where it has."""
        return fate_text(self.card, self.path)

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        used = [rank for rank in self.ranks.values() if rank]
        return {
            "output": str(self.path),
            "architecture": self.architecture,
            "layers": self.layers,
            "file_bytes": self.file_bytes,
            "form": self.form,
            "precision": self.precision,
            "rank_policy": self.policy,
            "ranks": {"min": min(used, default=0), "max": max(used, default=0)},
            "capped_layers": self.capped,
            "exhausted_layers": self.exhausted,
            "wider_layers": self.wider,
            "components": list(self.components),
            **self.tally.energy_kept(),
            "energy_wanted": self.energy_wanted,
            "noise_floor": self.tally.total.noise_floor,
            "relative_change": self.tally.total.relative_change,
            "verdict": self.verdict.as_json(),
            "methods": dict(self.methods),
            "fallbacks": dict(self.fallbacks),
            "left_out": [row.as_json() for row in self.left_out],
            "card": self.card,
        }


def extract(
    pair: Pair,
    output: Path,
    settings: ExtractSettings,
    *,
    overwrite: bool = False,
    card: bool = True,
    source: Callable[[], Mapping[str, str]] = dict,
    on_progress: Progress | None = None,
) -> ExtractReport:
    """Write the LoRA of a pair; energy kept is measured on the numbers as they are written, and the file is read again.

    Args:
        card: whether the LoRA gets a card for the lists of WebUIs.
        source: called once, last; entries for the metadata, such as names and hashes of the two files.
        on_progress: called after each layer; raising in it cancels and leaves nothing behind.

    Raises:
        NothingToDoError: base and tuned are equal.
        SettingError: a rank beyond every layer, or a size too small for any.
        BadTensorError: NaN or Inf, by key.
        OutputError: the output exists, cannot be written, or differs when read again.
    """
    device = resolve_device(settings.device)
    dtype_of(settings.precision)
    with full_precision():
        encoders = _measure_text_encoders(pair)
        components = ("unet", *changed_text_encoders(encoders))
        decomposer = Decomposer(pair, device, method=settings.method, seed=settings.seed)
        profile = settings.profile
        form: Form
        if settings.form == "exact":
            profile = "exact"  # which holds what any profile does
            layers = plan_layers(pair, profile, components)
            steps = Steps(sum(layer.numel for layer in layers), on_progress)
            form = Exact(pair, layers, decomposer)
        else:
            layers = plan_layers(pair, profile, components)
            passes = 1 + (not settings.policy.fixed) + (settings.precision == "fp8")
            steps = Steps(passes * sum(layer.numel for layer in layers), on_progress)
            form = LowRank(pair, layers, components, settings, decomposer, steps)
        run = _Run(pair, Path(output), settings, profile, components, layers, form, decomposer, steps)
        report = run.write(encoders, overwrite=overwrite, source=source, device=device)
    return replace(report, card=write_card(report.path)) if card else report


def _measure_text_encoders(pair: Pair) -> Tally:
    """Text encoders before anything else: whether they changed decides what is extracted."""
    tally = Tally(pair.architecture)
    for key in pair.keys:
        if component_of(pair.architecture, key) != "unet":
            tally.add(key, measure(pair, key)[1])
    return tally


@dataclass
class _Run:
    """One writing pass: the form, the open file, and what was measured on the way."""

    pair: Pair
    output: Path
    settings: ExtractSettings
    profile: str
    components: tuple[str, ...]
    layers: Sequence[Layer]
    form: Form
    decomposer: Decomposer
    steps: Steps

    def write(
        self, encoders: Tally, *, overwrite: bool, source: Callable[[], Mapping[str, str]], device: torch.device
    ) -> ExtractReport:
        self.tally = Tally(self.pair.architecture)
        self.digest = hashlib.sha256()
        self.written = 0
        with SafetensorsWriter(
            self.output,
            overwrite=overwrite,
            expected_bytes=METADATA_BYTES + self.form.expected_bytes,
            max_tensors=3 * len(self.layers),
            compact=True,
        ) as self.writer:
            for key, tensor in self.form.first():
                self._add(key, tensor)
            with side_by_side(self.form.prepare, self.form.batches(), device, ahead=self.form.ahead) as prepared:
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
                    f"{self.pair.file_names[1]} changes nothing that an exact LoRA carries; write an offset file"
                    if self._is_exact
                    else f"{self.pair.file_names[1]} changes nothing that the profile {self.profile} carries; choose "
                    "the profile webui or full, or write an offset file"
                )
            verdict = self._verdict(encoders)
            metadata = {**self._metadata(verdict), **source()}
            self.writer.finish(metadata, sources=self.pair.checkpoints, check=self._check_written)
        form = self.form
        return ExtractReport(
            path=self.output,
            architecture=self.pair.architecture.name,
            form=self.settings.form,
            precision=self._precision,
            policy=self._policy,
            components=self.components,
            ranks=form.used,
            layers=self.written,
            file_bytes=self.output.stat().st_size,
            tally=self.tally,
            verdict=verdict,
            methods=self.decomposer.methods,
            fallbacks=self.decomposer.fallbacks,
            energy_wanted=self.settings.policy.energy,
            left_out=tensors_left_out(self.pair),
            capped=form.capped if isinstance(form, LowRank) else 0,
            exhausted=form.exhausted if isinstance(form, LowRank) else 0,
            wider=form.wider if isinstance(form, Exact) else 0,
        )

    @property
    def _is_exact(self) -> bool:
        return self.settings.form == "exact"

    @property
    def _precision(self) -> str:
        return "int8" if self._is_exact else self.settings.precision

    @property
    def _policy(self) -> str:
        return "exact" if self._is_exact else str(self.settings.policy)

    def _write_batch(self, batch: Sequence[Prepared]) -> None:
        for prepared in batch:
            layer = prepared.layer
            if not prepared.rows:
                self._write_whole(layer)
                continue
            for part, tensor in prepared.tensors.items():
                self._add(f"{layer.module.name}.{part}", tensor)
            if prepared.tensors:
                self.written += 1
                self.form.count(prepared)
            for key, row in prepared.rows.items():
                self.tally.add(key, row)
        for prepared in batch:
            self.steps.advance(prepared.layer.numel, prepared.layer.module.key)

    def _write_whole(self, layer: Layer) -> None:
        """Write a norm or a dense layer: the rounded deltas of its weight and its bias, where either changed."""
        names = ("w_norm", "b_norm") if layer.kind == "norm" else ("diff", "diff_b")
        rows, tensors = [], []
        for key in layer.keys:
            delta, row = measure(self.pair, key)
            rounded = delta.to(self.form.whole_dtype)
            row.residual = energy(delta - rounded.float())
            check_fits(layer, row.residual, "fp16" if self._is_exact else self.settings.precision, self.form.advice)
            rows.append(row)
            tensors.append(rounded)
            self.tally.add(key, row)
        if any(row.offset for row in rows):
            for name, tensor in zip(names, tensors, strict=True):
                self._add(f"{layer.module.name}.{name}", tensor)
            self.written += 1

    def _add(self, key: str, tensor: Tensor) -> None:
        tensor = tensor.cpu().contiguous()
        self.digest.update(tensor_bytes(tensor))
        self.writer.add(key, tensor)

    def _verdict(self, encoders: Tally) -> Verdict:
        everything = Tally(self.pair.architecture)
        everything.components = {**encoders.components, **self.tally.components}
        return right_base(self.pair, everything)

    def _metadata(self, verdict: Verdict) -> dict[str, str]:
        (dim, alpha), (conv_dim, conv_alpha) = (self.form.dims(wide_convolutions=wide) for wide in (False, True))
        kohya = kohya_metadata(
            self.pair.architecture,
            dim=(dim, conv_dim),
            alpha=(alpha, conv_alpha),
            title=self.output.stem,
            is_lokr=self.settings.form == "exact",
        )
        return kohya | {
            "ss_output_name": self.output.stem,
            "ss_sd_model_name": self.pair.base.path.name,
            **stated_licence(self.pair),
            "sshs_model_hash": self.digest.hexdigest(),
            "sshs_legacy_hash": LEGACY_HASH,
            "dpo.kind": "lora",
            "dpo.form": self.settings.form,
            "dpo.precision": self._precision,
            "dpo.base": self.pair.base.name,
            "dpo.tuned": self.pair.tuned.name,
            "dpo.architecture": self.pair.architecture.name,
            "dpo.method": self.settings.method,
            "dpo.seed": str(self.settings.seed),
            "dpo.rank_policy": self._policy,
            "dpo.profile": self.profile,
            **self.tally.energy_metadata(),
            "dpo.noise_floor": repr(self.tally.total.noise_floor),
            "dpo.verdict": verdict.text,
            "dpo.licence": licence(self.pair),
        }

    def _check_written(self, file: Path) -> None:
        """Read the file again: its data must be, byte for byte, what energy kept was measured on."""
        digest = hashlib.sha256()
        with file.open("rb") as written:
            written.seek(8 + int.from_bytes(written.read(8), "little"))
            while piece := written.read(1 << 24):
                digest.update(piece)
        if digest.digest() != self.digest.digest():
            raise OutputError(f"{self.output} reads back differently from what was written; check the disk and try again")
