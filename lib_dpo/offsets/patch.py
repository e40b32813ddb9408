"""An offset made ready to be applied to a live model: block weights, a rank, and one row for each module it changes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lib_dpo.errors import BadFileError, BadTensorError, MismatchError, NothingToDoError, SettingError
from lib_dpo.families.arch import Architecture
from lib_dpo.families.blocks import EVERYWHERE, BlockWeights, check_blocks
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import Model
from lib_dpo.files.checkpoint import Checkpoint
from lib_dpo.maths.delta import total
from lib_dpo.offsets.lora.file import LoraFile, LoraLayer
from lib_dpo.offsets.lora.offset import lora_offset, open_lora, read_change, truncated_factors
from lib_dpo.offsets.lora.scale import ADAPTER_CONFIG
from lib_dpo.offsets.offset import Offset, dense_offset

_WEIGHT, _BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class Row:
    """What one module gets: `scale * up @ down`, or `diff`, and `bias`; block weights are in `scale`, `diff` and `bias`.

    `key` is the canonical key of the module's weight, or of the tensor itself where it has no module of its own (a fused
    in_proj, an embedding). `up` is (out, rank), `down` (rank, in) or (rank, in, kh, kw), both in the file's dtype; `diff`
    and `bias` have the shapes of the tensors they change.
    """

    key: str
    part: int | None = None  # 0, 1, 2: the rows of q, k, v in a fused in_proj
    up: Tensor | None = None
    down: Tensor | None = None
    scale: float = 1.0
    diff: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Patch:
    """An offset and everything that decides what it does to a model, but the strength.

    `id` changes with the content of the file, the blocks and the rank: hosts know by it what is applied already.
    """

    offset: Offset
    blocks: BlockWeights
    rank: int | None
    id: str
    lora: LoraFile | None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.offset.checkpoint

    @property
    def name(self) -> str:
        return self.offset.name

    @property
    def architecture(self) -> Architecture:
        return self.offset.architecture

    def weight(self, key: str) -> float:
        """The block weight of a canonical key."""
        return self.blocks.of(self.architecture, key)

    def changed_keys(self) -> list[str]:
        """Canonical keys that change: those whose block weight is not 0."""
        return [key for key in self.offset.shapes if self.weight(key)]

    def changes_text_encoder(self) -> bool:
        return any(not key.startswith(UNET) for key in self.changed_keys())

    def delta(self, key: str) -> Tensor:
        """One dense delta in float32 on the CPU, block weight included. It may be a view of the file: never write to it.

        Raises:
            BadTensorError: NaN or Inf.
        """
        delta, weight = self.offset.read(key), self.weight(key)
        return delta if weight == 1.0 else delta * weight

    def rows(self) -> Iterator[Row]:
        """One row for each module that changes, read when asked for.

        Raises:
            BadTensorError: NaN or Inf, by key.
        """
        if self.lora is None:
            yield from self._dense_rows()
            return
        for layer in self.lora.layers:
            weight = self.weight(layer.module.key)
            if weight:
                yield self._lora_row(self.lora, layer, weight)

    def again(self) -> Patch:
        """The same, with its file opened anew: for whoever keeps it longer than the one who opened this one.

        Raises:
            BadFileError: another file has the name by now.
        """
        other = open_patch(self.checkpoint.path, self.architecture, blocks=self.blocks, rank=self.rank)
        if other.id != self.id:
            other.close()
            raise BadFileError(f"{self.checkpoint.path}: was replaced while it was being read; start again")
        return other

    def close(self) -> None:
        self.offset.close()

    def _lora_row(self, lora: LoraFile, layer: LoraLayer, weight: float) -> Row:
        parts = layer.parts
        bias = self._scaled(self.checkpoint.read(parts["diff_b"]), parts["diff_b"], weight) if "diff_b" in parts else None
        form = layer.form
        if form is not None and form.name == "LoRA":
            up, down, scale = truncated_factors(lora, layer, self.rank)
            return Row(layer.module.key, layer.module.part, up=up, down=down, scale=scale * weight, bias=bias)
        if form is None:
            return Row(layer.module.key, layer.module.part, bias=bias)
        change = read_change(lora, layer)
        first = next(key for part, key in parts.items() if part not in ("alpha", "diff_b"))
        diff = self._scaled(total([change], self._shape_of(layer), torch.float32), first, weight)
        return Row(layer.module.key, layer.module.part, diff=diff, bias=bias)

    def _shape_of(self, layer: LoraLayer) -> tuple[int, ...]:
        """The shape of the rows that a layer changes."""
        rows, *rest = self.offset.shapes[layer.module.key]
        return (rows // (1 if layer.module.part is None else 3), *rest)

    def _scaled(self, stored: Tensor, name: str, weight: float) -> Tensor:
        tensor = stored.float()
        if not bool(torch.isfinite(tensor).all()):
            raise BadTensorError(f"{self.name}: {name} holds NaN or Inf; the file is damaged, get it again")
        return tensor if weight == 1.0 else tensor * weight

    def _dense_rows(self) -> Iterator[Row]:
        keys = self.changed_keys()
        held = set(keys)
        for key in keys:
            if key.endswith(_BIAS):
                if key[: -len(_BIAS)] + _WEIGHT not in held:
                    yield Row(key[: -len(_BIAS)] + _WEIGHT, bias=self.delta(key))
                continue
            bias = key[: -len(_WEIGHT)] + _BIAS if key.endswith(_WEIGHT) else ""
            yield Row(key, diff=self.delta(key), bias=self.delta(bias) if bias in held else None)


def open_patch(
    path: str | Path,
    expected: Architecture | None = None,
    *,
    blocks: BlockWeights = EVERYWHERE,
    rank: int | None = None,
    bound: bool = False,
) -> Patch:
    """Open a LoRA or a dense offset file to be applied; the caller closes it.

    Args:
        expected: as in `read_lora`.
        rank: keep the strongest `rank` components of each layer; of a LoRA only.
        bound: take a LoRA too that is bound to the weights of a model, to be added to a file: it has no `rows` or `delta`.

    Raises:
        SettingError: a block that the architecture lacks, a rank below 1 or above the LoRA's, a rank for a dense file.
        MismatchError, BadFileError: as `open_offset`; or the LoRA is bound to the weights of a model (DoRA, GLoRA).
    """
    checkpoint, lora = open_lora(path, expected)
    try:
        if lora is None:
            offset = dense_offset(Model(checkpoint))
            if rank is not None:
                raise SettingError(
                    f"{offset.name} is a dense offset file, which has no rank; choose a LoRA, or leave the rank out"
                )
        else:
            own = lora.largest_rank()
            if rank is not None and not own:
                raise SettingError(
                    f"{checkpoint.name} has no pairs (lora_up and lora_down) that a rank could cut; leave the rank out"
                )
            if rank is not None and not 1 <= rank <= own:
                raise SettingError(f"rank {rank} is outside 1 to {own}, the rank of {checkpoint.name}; choose one within")
            offset = lora_offset(lora, rank)
            if not bound or rank is not None:  # which components are the strongest depends on the weights too
                offset.check_free()
        check_blocks(blocks, offset.architecture)
    except BaseException:
        checkpoint.close()
        raise
    return Patch(offset, blocks, rank, _content_id(checkpoint, lora, blocks, rank), lora)


def check_changes(offset: Offset, blocks: BlockWeights) -> None:
    """Refuse block weights that leave nothing of an offset.

    Raises:
        NothingToDoError: every tensor that it changes lies in a block of weight 0.
    """
    if all(blocks.of(offset.architecture, key) == 0 for key in offset.shapes):
        raise NothingToDoError(
            f"the block weights {blocks} leave nothing of {offset.name}: nothing would change; give a block that it changes "
            "another weight than 0"
        )


def _content_id(checkpoint: Checkpoint, lora: LoraFile | None, blocks: BlockWeights, rank: int | None) -> str:
    """Twelve hex digits: the files by path, size and time of writing (hashing takes seconds), the rest in full."""
    config = lora is not None and lora.settings is not None and lora.settings.source == ADAPTER_CONFIG
    read = (*checkpoint.files, *([checkpoint.path.with_name(ADAPTER_CONFIG)] if config else ()))
    files = [(str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in read]
    return hashlib.sha256(repr((files, str(blocks), rank)).encode()).hexdigest()[:12]


def fitted(delta: Tensor, shape: tuple[int, ...], key: str, offset_name: str, target_name: str) -> Tensor:
    """The delta in the target's shape. A first convolution with more input channels (inpainting) gets zeros for them.

    Raises:
        MismatchError: it fits no other way.
    """
    if tuple(delta.shape) == shape:
        return delta
    if delta.numel() == math.prod(shape) and delta.shape[:1] == shape[:1]:
        return delta.reshape(shape)
    is_first = key.endswith("input_blocks.0.0.weight") and delta.ndim == len(shape) == 4
    if is_first and delta.shape[1] < shape[1] and (delta.shape[0], *delta.shape[2:]) == (shape[0], *shape[2:]):
        extra = delta.new_zeros((shape[0], shape[1] - delta.shape[1], *shape[2:]))
        return torch.cat((delta, extra), dim=1)
    raise MismatchError(
        f"{key} is {'x'.join(map(str, delta.shape))} in {offset_name} but {'x'.join(map(str, shape))} in {target_name}; "
        "the offset was made for another model"
    )
