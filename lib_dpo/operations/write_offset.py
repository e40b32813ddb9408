"""The dense offset file: tuned minus base of every UNet tensor, in diffusers naming as the published ones are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_dpo import __version__
from lib_dpo.errors import SettingError
from lib_dpo.families.keymap import component_of, unet_to_diffusers
from lib_dpo.files.writer import SafetensorsWriter
from lib_dpo.maths.lowrank import energy
from lib_dpo.maths.precision import dtype_of, full_precision
from lib_dpo.maths.threads import side_by_side
from lib_dpo.offsets.coverage import LeftOut, left_out, nothing_changed
from lib_dpo.offsets.lora.metadata import modelspec_metadata
from lib_dpo.offsets.offset import Pair, licence
from lib_dpo.operations.measure import Row, Tally, measure
from lib_dpo.operations.verdict import Verdict, changed_text_encoders, right_base
from lib_dpo.progress import Progress, Steps


@dataclass(frozen=True)
class OffsetReport:
    """What was written."""

    path: Path
    architecture: str
    tensors: int
    file_bytes: int
    tally: Tally
    kept: Tally  # what energy kept is told of, as for a LoRA: the UNet, and text encoders that changed, of which none is
    verdict: Verdict
    text_encoder_left_out: bool
    left_out: tuple[LeftOut, ...]

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        return {
            "output": str(self.path),
            "architecture": self.architecture,
            "tensors": self.tensors,
            "file_bytes": self.file_bytes,
            **self.kept.energy_kept(),
            "noise_floor": self.tally.components["unet"].noise_floor,
            "relative_change": self.tally.components["unet"].relative_change,
            "verdict": self.verdict.as_json(),
            "text_encoder_left_out": self.text_encoder_left_out,
            "left_out": [row.as_json() for row in self.left_out],
        }


def write_offset(
    pair: Pair,
    output: Path,
    *,
    precision: str = "fp32",
    overwrite: bool = False,
    source: Callable[[], Mapping[str, str]] = dict,
    on_progress: Progress | None = None,
) -> OffsetReport:
    """Write the UNet's offset. fp16 halves the file.

    In fp32 a bake at strength 1 restores the tuned weights, to one float32 step where base and tuned are far apart in size.

    Raises:
        NothingToDoError: base and tuned are equal.
        BadTensorError: NaN or Inf, by key.
        OutputError: the output exists or cannot be written.
    """
    dtype = dtype_of(precision)
    numel = {key: math.prod(pair.base.shape(key)) for key in pair.keys}
    unet = [key for key in pair.keys if component_of(pair.architecture, key) == "unet"]
    steps = Steps(sum(numel.values()), on_progress)
    tally = Tally(pair.architecture)
    expected = sum(numel[key] for key in unet) * torch.finfo(dtype).bits // 8

    def rounded(key: str) -> tuple[Row, str | None, Tensor | None]:
        """The figures of a tensor's delta, its name in the file, and the delta to be written; None for what is left out."""
        delta, row = measure(pair, key)
        row.residual = row.offset
        name = unet_to_diffusers(pair.architecture, key)
        if name is None:
            return row, None, None
        stored = delta.to(dtype)
        row.residual = 0.0 if stored is delta else energy(delta.sub_(stored))
        if not row.residual < float("inf"):  # NaN too
            raise SettingError(f"the offset of {name} does not fit into {precision}; choose the precision fp32")
        return row, name, stored

    with (
        full_precision(),
        SafetensorsWriter(output, overwrite=overwrite, expected_bytes=expected, max_tensors=len(unet)) as writer,
    ):
        with side_by_side(rounded, pair.keys, ahead=1) as done:
            for key, (row, name, stored) in zip(pair.keys, done, strict=True):
                if name is not None and stored is not None:
                    writer.add(name, stored)
                tally.add(key, row)
                steps.advance(numel[key], key)
        if not tally.components["unet"].offset:
            raise nothing_changed(pair, "UNet", "there is no offset to write")
        verdict = right_base(pair, tally)
        kept = tally.only(("unet", *changed_text_encoders(tally)))
        metadata = {**_metadata(pair, output, precision, tally, kept, verdict), **source()}
        writer.finish(metadata, sources=pair.checkpoints)
    return OffsetReport(
        path=output,
        architecture=pair.architecture.name,
        tensors=len(unet),
        file_bytes=output.stat().st_size,
        tally=tally,
        kept=kept,
        verdict=verdict,
        text_encoder_left_out=any(row.offset for name, row in tally.components.items() if name != "unet"),
        left_out=left_out(pair),
    )


def _metadata(pair: Pair, output: Path, precision: str, tally: Tally, kept: Tally, verdict: Verdict) -> dict[str, str]:
    return {
        "format": "pt",
        **modelspec_metadata(pair.architecture, "offset", output.stem),
        "dpo.kind": "offset",
        "dpo.base": pair.base.name,
        "dpo.tuned": pair.tuned.name,
        "dpo.architecture": pair.architecture.name,
        **kept.energy_metadata(),
        "dpo.noise_floor": repr(tally.components["unet"].noise_floor),
        "dpo.verdict": verdict.text,
        "dpo.precision": precision,
        "dpo.licence": licence(pair),
        "dpo.version": __version__,
    }
