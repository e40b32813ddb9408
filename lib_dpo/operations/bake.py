"""Target + strength x offset, as a new checkpoint file: streamed tensor by tensor, everything else copied byte for byte.

Of a diffusers folder the UNet alone is written, as one file under diffusers' names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError, MismatchError, NothingToDoError
from lib_dpo.families.blocks import EVERYWHERE, BlockWeights, check_blocks
from lib_dpo.families.keymap import component_of
from lib_dpo.families.model import Model
from lib_dpo.files.header import dtype_name, torch_dtype
from lib_dpo.files.sidecar import SIDECAR_TEXT, SidecarFate, check_sidecar, sidecar_in_place
from lib_dpo.files.writer import SafetensorsWriter
from lib_dpo.maths.addition import Sum, add_rounded
from lib_dpo.maths.delta import Term, Whole
from lib_dpo.maths.precision import dtype_of, full_precision
from lib_dpo.maths.threads import side_by_side
from lib_dpo.offsets.offset import Offset, blocks_in, check_finite, check_is_model, check_left_out
from lib_dpo.offsets.patch import fitted
from lib_dpo.offsets.recipe import Ingredient, baked_in, with_recipe
from lib_dpo.progress import Progress, Steps

_AHEAD = 1  # tensors per thread that may wait to be written: 60 MB each at most


@dataclass(frozen=True)
class BakeReport:
    """What was changed, and how much of the change survived the rounding to the stored dtype."""

    path: Path
    architecture: str
    strength: float
    blocks: str
    changed: int  # tensors of which a value differs from the target's
    kept: int
    not_applied: tuple[str, ...]
    rounding_loss: float  # ||stored - exact||^2 / ||strength * offset||^2
    sidecar: SidecarFate  # what was done with the .yaml beside the output
    unet_only: bool  # the target is a diffusers folder
    already: tuple[Ingredient, ...]  # baked into the target before, as its metadata says
    twins: tuple[str, ...] = ()  # keys of the offset that say again what others say: they count once

    @property
    def sidecar_text(self) -> str:
        """What was done with the .yaml, for people; empty where nothing was."""
        return SIDECAR_TEXT.get(self.sidecar, "").format(self.path.with_suffix(".yaml"))

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        return {
            "output": str(self.path),
            "architecture": self.architecture,
            "strength": self.strength,
            "blocks": self.blocks,
            "tensors_changed": self.changed,
            "tensors_kept": self.kept,
            "not_applied": list(self.not_applied),
            "twins": list(self.twins),
            "rounding_loss": self.rounding_loss,
            "sidecar": self.sidecar,
            "already_baked_in": [asdict(ingredient) for ingredient in self.already],
            "unet_only": self.unet_only,
        }


def bake(
    target: Model,
    offset: Offset,
    output: Path,
    *,
    strength: float = 1.0,
    blocks: BlockWeights = EVERYWHERE,
    rank: int | None = None,
    precision: str = "keep",
    overwrite: bool = False,
    hashes: Callable[[], tuple[str, str]] | None = None,
    on_progress: Progress | None = None,
) -> BakeReport:
    """Write `target + strength * offset`: the sums in float64, rounded once to the stored dtype.

    Args:
        target: of a diffusers folder the UNet is written, and text encoders are among what was not applied.
        rank: to which the offset was cut when it was opened, for the recipe.
        precision: `keep` leaves every dtype as it is; fp16, bf16, fp32 convert UNet, text encoders and VAE.
        hashes: called last; SHA-256 of the target's and the offset's file, for the merge recipe.

    Raises:
        MismatchError: other architectures, a target that lacks tensors or has other shapes, or is itself an offset file.
        SettingError: a block that the architecture does not have.
        BadTensorError: NaN or Inf in the offset or in the result.
        NothingToDoError: no value would differ from the target's, at the end of the work. Nothing is written then.
        OutputError: the output, or another .yaml beside it, exists or cannot be written.
    """
    plan, not_applied = _plan(target, offset)
    check_blocks(blocks, target.architecture)
    check_sidecar(target.path, output, overwrite=overwrite)
    run = _Run(target, offset, strength, blocks, precision)
    unet_only, prefix = _is_folder(target), _written_prefix(target)
    infos = {key: info for key, info in target.checkpoint.infos.items() if key.startswith(prefix)}
    dtypes = {key: run.output_dtype(key, plan.get(key)) for key in infos}
    if precision != "keep" or unet_only:  # widest numbers first, so that every tensor stays aligned
        dtypes = dict(sorted(dtypes.items(), key=lambda item: -_item_bytes(item[1])))
    expected = sum(_item_bytes(dtypes[key]) * max(1, math.prod(infos[key].shape)) for key in infos)
    steps = Steps(expected, on_progress)
    with SafetensorsWriter(output, overwrite=overwrite, expected_bytes=expected, max_tensors=len(infos)) as writer:
        _write_tensors(writer, run, plan, dtypes, steps)
        if not run.changed:
            raise NothingToDoError(_nothing_changed(run, plan))
        metadata = with_recipe(
            target.checkpoint.metadata,
            Ingredient(offset.name, strength, str(blocks), rank, offset.kind),
            models=(target.name, offset.name),
            hashes=hashes() if hashes else ("", ""),
            name=output.stem,
            half=precision == "fp16",
        )
        with sidecar_in_place(target.path, output, overwrite=overwrite) as sidecar:
            writer.finish(metadata, sources=[target.checkpoint, offset.checkpoint])
    return BakeReport(
        path=output,
        architecture=target.architecture.name,
        strength=strength,
        blocks=str(blocks),
        changed=run.changed,
        kept=len(infos) - run.changed,
        not_applied=not_applied,
        rounding_loss=run.lost / run.wanted if run.wanted else 0.0,
        sidecar=sidecar,
        unet_only=unet_only,
        already=baked_in(target.checkpoint.metadata),
        twins=offset.twins,
    )


def _write_tensors(
    writer: SafetensorsWriter, run: _Run, plan: Mapping[str, str], dtypes: Mapping[str, str], steps: Steps
) -> None:
    """All tensors in the order of `dtypes`; byte for byte where nothing changes."""
    checkpoint, prefix = run.target.checkpoint, _written_prefix(run.target)

    def tensor(key: str) -> Sum | None:
        unchanged = key not in plan and dtypes[key] == checkpoint.infos[key].dtype
        return None if unchanged else run.tensor(key, plan.get(key), dtypes[key])

    with full_precision(), side_by_side(tensor, dtypes, ahead=_AHEAD) as done:
        for (key, dtype), found in zip(dtypes.items(), done, strict=True):
            info, name = checkpoint.infos[key], key.removeprefix(prefix)
            if found is None:
                writer.add_raw(name, dtype, info.shape, checkpoint.raw(key))
            else:
                writer.add(name, found.result)
                run.count(found)
            steps.advance(info.nbytes, key)


def _nothing_changed(run: _Run, plan: Mapping[str, str]) -> str:
    """Why a bake left every value as it was."""
    offset, target = run.offset.name, run.target.path.name
    if not plan:
        return f"{target} has no place for any of the tensors that {offset} changes; choose an offset for such a model"
    if not run.wanted:
        return (
            f"{offset} at strength {run.strength:g} changes nothing of {target}: its changes are all 0, by their own numbers, "
            "an alpha of 0, or the strength and blocks chosen; inspect the offset, or choose others"
        )
    return (
        f"{offset} at strength {run.strength:g} changes nothing of {target}: each change is too small for its number format; "
        "choose a larger strength, or a target or precision of fp32"
    )


def _plan(target: Model, offset: Offset) -> tuple[dict[str, str], tuple[str, ...]]:
    """File key -> canonical key for what changes, and the offset's keys that the target has no place for."""
    name, prefix = target.path.name, _written_prefix(target)
    if target.architecture is not offset.architecture:
        raise MismatchError(
            f"{offset.name} is an offset for {offset.architecture.title} but {name} is {target.architecture.title}; "
            "they must be of one architecture"
        )
    check_is_model(target)
    weights, blocks = set(target.keys()), blocks_in(target)
    plan: dict[str, str] = {}
    not_applied = []
    for key, shape in offset.shapes.items():
        source = target.sources.get(key)
        if source is None and component_of(target.architecture, key) == "unet":
            check_left_out(target, blocks, key, offset.name)
        if source is None or len(source.keys) > 1 or source.transpose or not source.keys[0].startswith(prefix):
            not_applied.append(key)
            continue
        if key not in weights:
            stored = target.checkpoint.infos[source.keys[0]].dtype
            raise BadTensorError(
                f"{name}: tensor {source.keys[0]} is stored as {stored}, which no offset can be added to; expected "
                "floating-point numbers: use an fp16, bf16 or fp32 copy of the file"
            )
        fitted(torch.empty(shape, device="meta"), target.shape(key), key, offset.name, name)
        plan[source.keys[0]] = key
    return plan, (*not_applied, *offset.unmatched)


def _is_folder(target: Model) -> bool:
    """Whether it is a diffusers folder: no single file can hold what is in one under its own names."""
    return target.checkpoint.format == "folder" and target.recognised.layout == "diffusers"


def _written_prefix(target: Model) -> str:
    """What the file keys to write begin with, and lose: `unet.` of a whole diffusers folder, nothing of all others."""
    return target.recognised.unet_prefix if _is_folder(target) else ""


class _Run:
    """The arithmetic of one bake and what it counts."""

    def __init__(self, target: Model, offset: Offset, strength: float, blocks: BlockWeights, precision: str) -> None:
        self.target, self.offset, self.strength, self.blocks = target, offset, strength, blocks
        self.precision = precision
        self.canonical = {name: key for key, source in target.sources.items() for name in source.keys}
        self.changed = 0
        self.wanted = self.lost = 0.0

    def output_dtype(self, key: str, canonical: str | None) -> str:
        """dtype of a tensor in the output, in safetensors' spelling."""
        stored = self.target.checkpoint.infos[key].dtype
        if self.precision == "keep" or stored[0] not in "FB" or stored == "BOOL":
            return stored
        component = component_of(self.target.architecture, self.canonical.get(key, ""))
        return dtype_name(dtype_of(self.precision)) if component else stored

    def tensor(self, key: str, canonical: str | None, dtype: str) -> Sum:
        """The tensor to write: changed by the offset, or converted only. May be called from several threads at once."""
        stored = self.target.checkpoint.read(key)
        to = torch_dtype(dtype)
        assert to is not None, "only dtypes that were read are written"
        weight = self.strength * self.blocks.of(self.target.architecture, canonical) if canonical else 0.0
        if canonical is None or weight == 0:
            return Sum(stored.to(to), 0.0, 0.0, changed=False)
        found = add_rounded(stored, self._terms(canonical, stored), weight, to)
        if not math.isfinite(found.wanted) and canonical not in self.offset.bound:
            self.offset.read(canonical, torch.float64)
        if not math.isfinite(found.lost) and not _all_finite(found.result):
            check_finite(self.target, canonical)
            raise BadTensorError(
                f"{self.target.path.name}: {key} would hold NaN or Inf as {dtype} after adding {weight:g} x the offset; use "
                "a smaller strength, or the precision fp32"
            )
        return found

    def _terms(self, canonical: str, stored: Tensor) -> Sequence[Term]:
        """What the offset adds to a tensor of the target."""
        shape = tuple(stored.shape)
        if canonical in self.offset.bound:
            return self._bound_terms(canonical, stored)
        if math.prod(self.offset.shapes[canonical]) == math.prod(shape):
            return self.offset.terms(canonical)
        delta = self.offset.read(canonical, torch.float64)
        return [Whole(fitted(delta, shape, canonical, self.offset.name, self.target.path.name))]

    def _bound_terms(self, canonical: str, stored: Tensor) -> Sequence[Term]:
        """The same of DoRA and GLoRA, which need the tensor itself."""
        own, name = self.offset.shapes[canonical], self.target.path.name
        if math.prod(own) != stored.numel():
            raise MismatchError(
                f"{canonical} is {'x'.join(map(str, stored.shape))} in {name}, but {self.offset.name} is "
                f"{self.offset.bound[canonical]} for {'x'.join(map(str, own))}; choose a target of that shape"
            )
        assert self.offset.terms_on is not None, "what is bound can be read on a weight"
        check_finite(self.target, canonical)
        return self.offset.terms_on(canonical, stored)

    def count(self, found: Sum) -> None:
        """Add what became of one tensor to the report's figures."""
        self.wanted += found.wanted
        self.lost += found.lost
        self.changed += found.changed


def _all_finite(tensor: Tensor) -> bool:
    """torch lacks isfinite for float8."""
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def _item_bytes(dtype: str) -> int:
    known = torch_dtype(dtype)
    return torch.empty(0, dtype=known).element_size() if known is not None else 1
