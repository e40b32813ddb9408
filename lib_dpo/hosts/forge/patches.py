"""A patch in the form that Forge's patchers take: parameter name -> host patch. Low-rank stays low-rank.

LoRA pairs go through the host's own `load_lora` (tuples on some forks, objects on others), everything else is
("diff", (tensor,)), which every fork takes. Such a tensor is a view of the file, lies in memory, or is made on demand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib_dpo.errors import HostError, MismatchError
from lib_dpo.families.arch import Architecture, TextEncoder
from lib_dpo.families.keymap import QKV, UNET, text_encoder_to_hf
from lib_dpo.hosts.forge.on_demand import OnDemand
from lib_dpo.offsets.patch import Patch, Row, fitted
from lib_dpo.progress import Steps

Parameters = Mapping[str, Tensor]
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_SMALL = 1 << 16  # weights: biases and norms, which lie in memory always
_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class HostModel:
    """What patches are made for: the model's name, and its parameters by the host's names."""

    name: str
    unet: Parameters
    clip: Parameters


@dataclass(frozen=True)
class HostPatches:
    """What `add_patches` takes, for the UNet and for the text encoders, and what it was made from."""

    unet: Mapping[str, Any]
    clip: Mapping[str, Any]
    keys: Mapping[str, str]  # parameter name -> canonical key
    not_applied: tuple[str, ...]
    empty: frozenset[str]  # parameter names whose patch is all 0


@dataclass(frozen=True)
class _Place:
    """Where a canonical tensor, or a third of it, lies in the host's model."""

    name: str
    part: int | None = None  # 0, 1, 2: the rows of q, k, v in a fused in_proj
    transposed: bool = False


def quantised(parameter: Tensor) -> bool:
    """Whether sums cannot be written back into it without loss: fp8, bitsandbytes' 4 bits, GGUF, ComfyUI's formats.

    A tensor of ComfyUI's formats (comfy_kitchen's QuantizedTensor) says the dtype that it is computed in: `_qdata` is stored.
    """
    marks = ("gguf_cls", "quant_state", "bnb_quantized", "_qdata")
    return parameter.dtype not in _PLAIN or any(getattr(parameter, mark, None) is not None for mark in marks)


def stored_dtype(parameter: Tensor) -> str:
    """The dtype that its numbers are stored in, without "torch."."""
    stored: Tensor = getattr(parameter, "_qdata", parameter)
    return str(stored.dtype).removeprefix("torch.")


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of the weight that a parameter stands for; quantised ones are packed."""
    real = getattr(parameter, "real_shape", None) or getattr(getattr(parameter, "quant_state", None), "shape", None)
    return tuple(real if real is not None else parameter.shape)


def patch_bytes(patch: Patch, *, on_demand: bool = False) -> int:
    """Memory that the host's form of a patch takes: a LoRA's pairs and biases, and dense deltas that lie in memory."""
    infos, shapes = patch.checkpoint.infos, patch.offset.shapes
    if patch.lora is None:
        return 0 if on_demand or _are_views(patch) else sum(4 * math.prod(shapes[key]) for key in patch.changed_keys())
    total = 0
    for layer in patch.lora.layers:
        if not patch.weight(layer.module.key):
            continue
        as_stored = layer.form is None or layer.form.name == "LoRA"
        total += sum(infos[key].nbytes for part, key in layer.parts.items() if as_stored or part == "diff_b")
        if not (as_stored or on_demand):
            total += 4 * math.prod(shapes[layer.module.key]) // (1 if layer.module.part is None else 3)
    return total


def _are_views(patch: Patch) -> bool:
    """Whether dense deltas are the file's own pages."""
    plain = patch.lora is None and not patch.blocks.weights
    return plain and all(info.dtype == "F32" for info in patch.checkpoint.infos.values())


def host_patches(
    patch: Patch, model: HostModel, load_lora: Callable[[Any, Any], Any], steps: Steps, *, on_demand: bool = False
) -> HostPatches:
    """Read a patch into the host's form. Dense float32 deltas stay views of the file.

    Args:
        load_lora: the host's own.
        on_demand: other dense deltas are read again whenever the host merges, and take no memory; else they are copied. For
            patches that are kept, of weights that are merged once: for others it would be done in each step of a picture.

    Raises:
        MismatchError: tensors that the model lacks or has in other shapes.
        BadTensorError: NaN or Inf, by key.
        HostError: the host's `load_lora` does not understand a pair.
        BadFileError: the file was replaced since the patch was opened.
    """
    shapes = {name: shape_of(parameter) for name, parameter in (*model.unet.items(), *model.clip.items())}
    places = {key: _places(patch.architecture, key, shapes) for key in patch.changed_keys()}
    _check_places(patch, places, shapes, model.name)
    low: dict[str, tuple[Tensor, Tensor, float]] = {}
    dense = _Dense(patch, shapes, model.name, patch.again() if on_demand and not _are_views(patch) else None)
    for row in patch.rows():
        for place in places.get(row.key, ()):
            if row.part not in (None, place.part) or (row.up is None and row.diff is None):
                continue
            if place.transposed or place.name in low or place.name in dense.tensors:  # several modules change it: all of them
                low.pop(place.name, None)
                dense.put(place, row.key, dense.fit(_piece(patch.delta(row.key), place), place, row.key))
            elif row.up is not None:
                low[place.name] = _factors(row, shapes[place.name])
            elif row.diff is not None:
                dense.put(place, row.key, dense.fit(_piece(row.diff, place) if row.part is None else row.diff, place, row.key))
        if row.bias is not None:
            bias = row.key.removesuffix("weight") + "bias"
            for place in places.get(bias, ()):
                dense.put(place, bias, row.bias)
        steps.advance(math.prod(patch.offset.shapes.get(row.key, ())), row.key)
    nothing = {name for name, (up, down, alpha) in low.items() if not (alpha and bool(up.any()) and bool(down.any()))}
    patches = _pairs(low, load_lora) | {name: ("diff", (tensor,)) for name, tensor in dense.tensors.items()}
    return HostPatches(
        unet={name: value for name, value in patches.items() if name in model.unet},
        clip={name: value for name, value in patches.items() if name in model.clip},
        keys={place.name: key for key, found in places.items() for place in found},
        not_applied=(*(key for key, found in places.items() if not found), *patch.offset.unmatched),
        empty=frozenset(nothing | dense.nothing),
    )


def _check_places(
    patch: Patch, places: Mapping[str, Sequence[_Place]], shapes: Mapping[str, tuple[int, ...]], model: str
) -> None:
    """Raises MismatchError for UNet tensors that the model lacks, and for those of other shapes, before anything is read."""
    for key, found in places.items():
        if not found and key.startswith(UNET):
            raise MismatchError(f"{model} lacks the UNet tensor {key}, which {patch.name} changes; expected a complete UNet")
        for place in found:
            empty = torch.empty(patch.offset.shapes[key], device="meta")
            fitted(_piece(empty, place), shapes[place.name], key, patch.name, model)


@dataclass(frozen=True)
class _Dense:
    """Whole differences by the host's names, and which of them are all 0."""

    patch: Patch
    shapes: Mapping[str, tuple[int, ...]]
    model: str
    kept: Patch | None  # reads them on demand; None: what is put here stays
    tensors: dict[str, Tensor] = field(default_factory=dict)
    nothing: set[str] = field(default_factory=set)

    def fit(self, delta: Tensor, place: _Place, key: str) -> Tensor:
        return fitted(delta, self.shapes[place.name], key, self.patch.name, self.model)

    def put(self, place: _Place, key: str, tensor: Tensor) -> None:
        (self.nothing.discard if bool(tensor.any()) else self.nothing.add)(place.name)
        if self.kept is not None and tensor.numel() > _SMALL:
            tensor = OnDemand(tensor.shape, partial(_whole, self.kept, place, key, self.shapes[place.name], self.model))
        self.tensors[place.name] = tensor


def _whole(patch: Patch, place: _Place, key: str, shape: tuple[int, ...], model: str) -> Tensor:
    """All that a patch changes at a place. It holds on to nothing else: hosts keep it as long as the model."""
    return fitted(_piece(patch.delta(key), place), shape, key, patch.name, model)


def _pairs(low: Mapping[str, tuple[Tensor, Tensor, float]], load_lora: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """LoRA pairs in the host's form: as a file under the parameters' own names, with a key map of our own."""
    state_dict: dict[str, Tensor] = {}
    for name, (up, down, alpha) in low.items():
        module = name.removesuffix(".weight")
        state_dict[f"{module}.lora_up.weight"] = up
        state_dict[f"{module}.lora_down.weight"] = down
        state_dict[f"{module}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    loaded = load_lora(state_dict, {name.removesuffix(".weight"): name for name in low})
    found: dict[str, Any] = dict(loaded[0] if isinstance(loaded, tuple) else loaded)  # Forge, Classic and Neo add the rest
    if missing := low.keys() - found.keys():
        raise HostError(f"this WebUI's LoRA loader does not take {min(missing)}; update the WebUI or the extension")
    return found


def _factors(row: Row, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, float]:
    """Copies of up and down, and alpha: hosts multiply by strength * alpha / rank."""
    assert row.up is not None, "called for LoRA rows"
    assert row.down is not None, "up and down come together"
    down = row.down.clone()
    if down.ndim == 4 and len(shape) == 4 and down.shape[1] < shape[1]:  # an inpainting model's first convolution
        extra = down.new_zeros((down.shape[0], shape[1] - down.shape[1], *down.shape[2:]))
        down = torch.cat((down, extra), dim=1)
    return row.up.clone(), down, row.scale * down.shape[0]


def _piece(tensor: Tensor, place: _Place) -> Tensor:
    if place.part is not None:
        return tensor.chunk(3)[place.part]
    return tensor.T.contiguous() if place.transposed else tensor


def _places(arch: Architecture, key: str, names: Collection[str]) -> list[_Place]:
    """Where a canonical tensor lies; empty for what this host has no place for."""
    if key.startswith(UNET):
        found = [_Place(key.removeprefix("model."))]
    else:
        encoder = next((encoder for encoder in arch.text_encoders if key.startswith(encoder.prefix)), None)
        found = _text_encoder_places(encoder, key, names) if encoder else []
    return [place for place in found if place.name in names]


def _text_encoder_places(encoder: TextEncoder, key: str, names: Collection[str]) -> list[_Place]:
    roots = ("clip_l",) if encoder.naming == "hf" else ("clip_g", "clip_h")
    root = next((root for root in roots if any(name.startswith(root + ".") for name in names)), roots[0])
    inner = key.removeprefix(encoder.prefix)
    fused = _FUSED.fullmatch(inner) if encoder.naming == "open_clip" else None
    if fused:
        head = f"{root}.transformer.text_model.encoder.layers.{fused[1]}.self_attn."
        return [_Place(f"{head}{letter}_proj.{fused[2]}", part) for part, letter in enumerate(QKV)]
    if inner == "text_projection":  # Classic keeps it as open_clip does, the others as a linear layer
        return [_Place(f"{root}.transformer.text_projection.weight", transposed=True), _Place(f"{root}.text_projection")]
    hf = text_encoder_to_hf(encoder, key)
    # Textual inversion wraps the token embedding and looks up in a table that patchers do not reach (any fork).
    return [_Place(f"{root}.transformer.{hf}")] if hf and "token_embedding" not in hf else []
