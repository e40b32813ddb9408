"""The offset: tuned minus base, weight by weight in float32. One type for a pair of checkpoints, a dense file, a LoRA."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError, MismatchError, NothingToDoError
from lib_dpo.families.arch import Architecture, Shape
from lib_dpo.families.blocks import block_of
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import Model
from lib_dpo.families.pruning import Blocks, belongs, blocks_of
from lib_dpo.files.checkpoint import Checkpoint
from lib_dpo.files.names import names_apart
from lib_dpo.maths.delta import Term, Whole, total

Kind = Literal["dense", "lora"]
# A GroupNorm's weight lies near 1 in a model and near 0 in an offset; the smallest mean of SD's own norms is about 0.2.
NORM_WEIGHT_OF_A_MODEL = 0.05
POSITIONS = r"(^|\.)position_ids$"  # 0, 1, 2, …: no weights, though some files hold them as floating-point numbers


@dataclass(frozen=True)
class Offset:
    """Deltas by canonical key, each the sum of the `terms` that are read when it is asked for; nothing is held in memory.

    What a key of `bound` adds depends on the weight that it is added to: only `terms_on` gives it.
    """

    checkpoint: Checkpoint  # the file that they are read from
    architecture: Architecture
    kind: Kind
    shapes: Mapping[str, Shape]
    terms: Callable[[str], Sequence[Term]]
    unmatched: tuple[str, ...] = ()  # keys of the file that belong to no weight of the architecture
    twins: tuple[str, ...] = ()  # keys of the file that say again what others say: they count once
    bound: Mapping[str, str] = field(default_factory=dict)  # canonical key -> DoRA, GLoRA
    terms_on: Callable[[str, Tensor], Sequence[Term]] | None = None  # with the weight in its canonical shape

    @property
    def name(self) -> str:
        """What people call the file."""
        return self.checkpoint.name

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.checkpoint.metadata

    def read(self, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One delta on the CPU, summed in `dtype`. It may be a view of the file: never write to it.

        Raises:
            BadTensorError: it holds NaN or Inf.
            MismatchError: it is bound to a model.
        """
        if key in self.bound:
            self.check_free()
        delta = total(self.terms(key), self.shapes[key], dtype)
        # a sum is cheaper than looking at each value; it overflows where the values are huge
        if not bool(torch.isfinite(delta.sum())) and not bool(torch.isfinite(delta).all()):
            raise BadTensorError(f"{self.name}: the offset of {key} holds NaN or Inf; the file is damaged, get it again")
        return delta

    def check_free(self) -> None:
        """Refuse an offset that is bound to a model, where there is none to add it to. Raises MismatchError."""
        for key, form in self.bound.items():
            raise MismatchError(
                f"{self.name} is {form}, first in {key}: what it adds depends on the weights of the model, so it has no "
                "offset of its own; bake it into a checkpoint file, with Save as checkpoint on the page Bake or on the "
                "command line, and compare that with the one before"
            )

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> Offset:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.checkpoint.__exit__(kind, error, traceback)


@dataclass(frozen=True)
class Pair:
    """Two checkpoints that belong together, and the canonical keys (UNet, then text encoders) that both hold."""

    base: Model
    tuned: Model
    keys: tuple[str, ...]

    @property
    def architecture(self) -> Architecture:
        return self.base.architecture

    @property
    def checkpoints(self) -> tuple[Checkpoint, Checkpoint]:
        return self.base.checkpoint, self.tuned.checkpoint

    @property
    def file_names(self) -> tuple[str, str]:
        """What messages call the two files: many references are all named diffusion_pytorch_model.safetensors."""
        return names_apart(self.base.path, self.tuned.path)

    @property
    def names(self) -> tuple[str, str]:
        """What people call base and tuned; the names of their files where that would be the same."""
        names = self.base.name, self.tuned.name
        return self.file_names if names[0] == names[1] else names

    def weight(self, key: str, device: torch.device | str = "cpu", out: Tensor | None = None) -> Tensor:
        """The base's weight in float32 on `device`; the caller's own, to be written to.

        Args:
            out: float32 memory on `device` to use, at least as many values; fresh memory without it. Fresh pages of a
                large tensor take as long as reading it.
        """
        stored = _moved(self.base.read(key), device)
        if out is None:
            return stored.to(torch.float32, copy=True)
        return out[: stored.numel()].view(stored.shape).copy_(stored)

    def to_delta_(self, weight: Tensor, key: str) -> Tensor:
        """Turn a base weight from `weight` into the delta, tuned - base in float32, in place.

        Raises:
            BadTensorError: either file holds NaN or Inf in this tensor.
        """
        tuned = _moved(self.tuned.read(key), weight.device).reshape(weight.shape)
        delta = weight.neg_().add_(tuned)
        if not bool(torch.isfinite(delta.sum())) and not bool(torch.isfinite(delta).all()):
            raise self._blame(key)
        return delta

    def delta(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """Tuned - base in float32, in the base's shape. Raises BadTensorError for NaN or Inf."""
        return self.to_delta_(self.weight(key, device), key)

    def _blame(self, key: str) -> BadTensorError:
        for model, name in zip((self.base, self.tuned), self.file_names, strict=True):
            check_finite(model, key, name)
        return BadTensorError(
            f"{self.file_names[1]}: tensor {key} differs from the base by more than float32 can hold; get the file again"
        )


def _moved(stored: Tensor, device: torch.device | str) -> Tensor:
    """To the device as stored, half the bytes to move, for a cast there; cast here what cannot be: fp8, float64 on MPS."""
    if stored.element_size() == 1 or (stored.dtype == torch.float64 and torch.device(device).type == "mps"):
        stored = stored.float()
    return stored.to(device)


def check_finite(model: Model, key: str, name: str = "") -> None:
    """Refuse a tensor with NaN or Inf. Raises BadTensorError with the names it has in the file.

    Args:
        name: what the message calls the file, where its own name would not tell.
    """
    tensor = model.read(key).float()
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise BadTensorError(
            f"{name or model.path.name}: tensor {' + '.join(model.sources[key].keys)} holds {bad} NaN or Inf of "
            f"{tensor.numel()} values; expected finite numbers: get the file again, or repair it"
        )


def check_is_model(model: Model, name: str = "") -> None:
    """Refuse an offset file where a model is expected. Raises MismatchError. `name` as in `check_finite`."""
    if is_offset_file(model):
        raise MismatchError(f"{name or model.path.name} is an offset file, expected a model; choose the checkpoint itself")


def open_pair(base: Model, tuned: Model) -> Pair:
    """Check that two models belong together.

    Raises:
        MismatchError: other architectures, UNet tensors missing on one side, other shapes, an offset file.
        NothingToDoError: both are the same file.
    """
    if base.path.resolve() == tuned.path.resolve():
        raise NothingToDoError(f"base and tuned are the same file, {base.path.name}; choose the DPO reference as tuned")
    names = names_apart(base.path, tuned.path)
    if base.architecture is not tuned.architecture:
        raise MismatchError(
            f"{names[0]} is {base.architecture.title} but {names[1]} is {tuned.architecture.title}; "
            "base and tuned must be of one architecture"
        )
    if base.recognised.in_channels != tuned.recognised.in_channels:
        raise MismatchError(_channels_message(base, tuned, names))
    _check_unet(base, tuned, names)
    for model, name in zip((base, tuned), names, strict=True):
        check_is_model(model, name)
    ours, shared = base.keys(), set(tuned.keys())
    keys = [key for key in ours if key in shared and block_of(base.architecture, key) not in (None, "VAE")]
    keys = [key for key in keys if not re.search(POSITIONS, key) and _is_own(base.architecture, key)]
    for key in keys:
        if _squeezed(base.shape(key)) != _squeezed(tuned.shape(key)):
            raise MismatchError(
                f"tensor {key} is {_show(base.shape(key))} in {names[0]} but {_show(tuned.shape(key))} in "
                f"{names[1]}; base and tuned must have the same shapes"
            )
    keys.sort(key=lambda key: not key.startswith(UNET))  # stable: the UNet first
    return Pair(base, tuned, tuple(keys))


def _check_unet(base: Model, tuned: Model, names: tuple[str, str]) -> None:
    """Refuse files of which one lacks what the other has of their architecture; what else a file has is no matter here."""
    arch = base.architecture
    ours, theirs = ({key for key in model.keys("unet") if belongs(arch, key)} for model in (base, tuned))
    if ours == theirs:
        return
    found = [blocks_of(arch, keys) for keys in (ours, theirs)]
    if all(blocks.is_model for blocks in found):
        both = " but ".join(f"{name} holds {blocks.text}" for name, blocks in zip(names, found, strict=True))
        raise MismatchError(f"{both}; they have no common offset: use two files of one kind")
    for name, missing in ((names[1], ours - theirs), (names[0], theirs - ours)):
        if missing:
            raise MismatchError(
                f"{name} lacks {len(missing)} of the {len(ours | theirs)} UNet tensors, first {min(missing)}; "
                "expected a complete UNet: get the file again"
            )


def _is_own(arch: Architecture, key: str) -> bool:
    """Whether a key is a weight of the architecture, not of an adapter that was saved within the UNet."""
    return not key.startswith(UNET) or belongs(arch, key)


def blocks_in(model: Model) -> Blocks:
    """Whether a model's UNet is whole, pruned or incomplete."""
    return blocks_of(model.architecture, model.keys("unet"))


def check_left_out(target: Model, blocks: Blocks, key: str, changed_by: str) -> None:
    """Refuse a target that lacks a UNet tensor, unless that was left out on purpose, with its whole block.

    Args:
        blocks: those of the target. changed_by: what the message calls the offset.

    Raises:
        MismatchError: the target is incomplete.
    """
    if blocks.is_model and key in blocks.lacking:
        return
    raise MismatchError(
        f"{target.path.name} lacks the UNet tensor {key}, which {changed_by} changes; expected a complete UNet, found "
        f"{blocks.text}"
    )


def _channels_message(base: Model, tuned: Model, names: tuple[str, str]) -> str:
    channels = (model.recognised.in_channels for model in (base, tuned))
    both = [f"{name} takes {count} input channels" for name, count in zip(names, channels, strict=True)]
    return " but ".join(both) + "; an inpainting model and a plain one have no common offset: use two files of one kind"


def _squeezed(shape: Shape) -> Shape:
    """Without trailing ones: a 1x1 convolution and a linear layer hold the same numbers."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _show(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def licence(pair: Pair) -> str:
    """The licence entries of the two files, or a reminder that both count."""
    said = stated_licence(pair).get("modelspec.license")
    return said or "that of the base and the tuned model (the published DPO models: CreativeML Open RAIL++-M)"


def stated_licence(pair: Pair) -> dict[str, str]:
    """`modelspec.license` as the metadata of one of the two files says it, the tuned one first; empty where neither does."""
    for model in (pair.tuned, pair.base):
        for name in ("modelspec.license", "license"):
            if said := model.checkpoint.metadata.get(name):
                return {"modelspec.license": said}
    return {}


def is_offset_file(model: Model) -> bool:
    """Whether a UNet file holds an offset rather than weights: by its metadata, else by its norms lying near 0."""
    if model.checkpoint.metadata.get("dpo.kind") == "offset":
        return True
    norms = [key for key in model.keys("unet") if key.endswith((".norm.weight", ".in_layers.0.weight"))]
    weights = [model.read(key).float().abs() for key in norms]
    means = [float(weight[weight.isfinite()].double().mean()) for weight in weights if bool(weight.isfinite().any())]
    return bool(means) and sum(means) / len(means) < NORM_WEIGHT_OF_A_MODEL


def dense_offset(model: Model) -> Offset:
    """A dense offset file (diffusers or ldm naming) as an offset.

    Raises:
        MismatchError: the file holds weights, not an offset.
    """
    if not is_offset_file(model):
        raise MismatchError(
            f"{model.path.name} holds the weights of a model, not an offset; expected a LoRA or an offset file: "
            "extract one from this file and its base"
        )
    keys = model.keys()
    read = {name for key in keys for name in model.sources[key].keys}
    return Offset(
        checkpoint=model.checkpoint,
        architecture=model.architecture,
        kind="dense",
        shapes={key: model.shape(key) for key in keys},
        terms=lambda key: [Whole(model.read(key))],
        unmatched=tuple(name for name in model.checkpoint.infos if name not in read),
    )
