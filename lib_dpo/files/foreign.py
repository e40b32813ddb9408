"""Files that are no Stable Diffusion model and no offset, though they lie beside such files: told by their keys."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Foreign:
    """What a file is, in words, and what it is good for or what to take in its place."""

    name: str
    title: str
    advice: str


_LORA = Foreign("lora", "a LoRA", "choose the checkpoint; a LoRA goes where a LoRA or offset file is asked for")
_CHECKPOINT = "choose the checkpoint that it is used with"
_VAE = Foreign("vae", "a VAE alone", "an offset is of the UNet: " + _CHECKPOINT)
_TEXT = Foreign("text_encoder", "a text encoder alone", "an offset is of the UNet: " + _CHECKPOINT)
_BOTH = Foreign("no_unet", "a text encoder and a VAE without a UNet", "choose a file that holds the UNet")
_EMBEDDING = Foreign("embedding", "an embedding (textual inversion)", _CHECKPOINT)
_HYPERNETWORK = Foreign("hypernetwork", "a hypernetwork", _CHECKPOINT)
_UPSCALER = Foreign("upscaler", "an upscaler", "choose a checkpoint")
_OPTIMIZER = Foreign("optimizer", "the state of an optimizer, without the model", "choose the model that was saved beside it")
_IP_ADAPTER = Foreign("ip_adapter", "an IP-adapter", _CHECKPOINT)

# In this order, by any of a file's keys.
_KINDS: tuple[tuple[str, Foreign], ...] = (
    (r"^lora_controlnet$|^lllite_", Foreign("controlnet", "a small ControlNet (Control-LoRA or LLLite)", _CHECKPOINT)),
    (
        r"[._]lora_(up|down|mid|A|B)\b|\blora\.(up|down)\.|_lora\.(up|down)\.|\.(hada|lokr)_[wt]\d|\.oft_\w+$|\.dora_scale$",
        _LORA,
    ),
    (
        r"^control_model\.|^(input_hint_block|zero_convs)\.|controlnet_(cond_embedding|down_blocks|mid_block)",
        Foreign("controlnet", "a ControlNet", _CHECKPOINT),
    ),
    (r"^(image_proj|ip_adapter)\.", _IP_ADAPTER),
    (r"^adapter\.(body|conv_in)\.|^body\.\d+\.(in_conv|block\d)\.", Foreign("t2i_adapter", "a T2I-adapter", _CHECKPOINT)),
    (r"\bmotion_modules\.", Foreign("motion_module", "an AnimateDiff motion module", _CHECKPOINT)),
    (
        r"^(module\.)?(conv_first\.|RRDB_trunk\.|body\.0\.rdb1\.|model\.1\.sub\.0\.|layers\.0\.(residual_group|blocks)\.)",
        _UPSCALER,
    ),
    (r"^(\w+\.)*encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.", Foreign("t5", "a T5 text encoder", "choose a checkpoint")),
    (r"exp_avg|^(optimizer|state)\.\d+\.", _OPTIMIZER),
    (
        r"^model_ema\.diffusion_model",
        Foreign(
            "ema",
            "an EMA copy of a UNet (model_ema.*) without the plain weights",
            "WebUIs do not read it: choose a file that holds model.diffusion_model.*",
        ),
    ),
)
_VAE_KEY = re.compile(
    r"^(first_stage_model\.|vae\.)?(decoder\.(conv_in|up|up_blocks|mid|mid_block)|encoder\.(conv_in|down|down_blocks))\."
)
_TEXT_KEY = re.compile(r"\btext_model\.|\btransformer\.resblocks\.|^(cond_stage_model|conditioner)\.")
_VISION_KEY = re.compile(r"^(vision_model|visual)\.")
_EMBEDDING_KEYS = {"emb_params", "clip_l", "clip_g", "<concept>", "string_to_param.*"}
_MOST_VECTORS, _WIDTHS = 256, (768, 1024, 1280)


def foreign_kind(shapes: Mapping[str, Shape]) -> Foreign | None:
    """What a file without a UNet is; None where its keys tell nothing."""
    for pattern, kind in _KINDS:
        if any(re.search(pattern, key) for key in shapes):
            return kind
    vae, text = (any(pattern.search(key) for key in shapes) for pattern in (_VAE_KEY, _TEXT_KEY))
    if vae or text:
        return _BOTH if vae and text else _VAE if vae else _TEXT
    if any(_VISION_KEY.search(key) for key in shapes):
        return Foreign("image_encoder", "an image encoder (CLIP vision)", _CHECKPOINT)
    if shapes.keys() <= _EMBEDDING_KEYS or _looks_like_vectors(shapes):
        return _EMBEDDING
    return None


def mostly_lora(keys: Collection[str]) -> bool:
    """Whether most of a file's keys are those of a LoRA, of whatever family of models."""
    pattern = next(pattern for pattern, kind in _KINDS if kind is _LORA)
    return sum(bool(re.search(pattern, key)) for key in keys) > len(keys) / 2


def pickled_kind(content: object) -> Foreign | None:
    """What a pickle is that holds no state_dict: trainers and WebUIs keep other things in such files."""
    if not isinstance(content, Mapping):
        return None
    keys = set(content)
    if "string_to_param" in keys:
        return _EMBEDDING
    if "layer_structure" in keys or keys & {320, 640, 768, 1024, 1280}:
        return _HYPERNETWORK
    if keys & {"params_ema", "params"}:
        return _UPSCALER
    if keys & {"param_groups", "optimizer_state_dict"}:
        return _OPTIMIZER
    return _IP_ADAPTER if {"ip_adapter", "image_proj"} <= keys else None


def _looks_like_vectors(shapes: Mapping[str, Shape]) -> bool:
    """A few vectors of the width of a text encoder."""
    return 0 < len(shapes) <= 2 and all(
        0 < len(shape) <= 2 and shape[-1] in _WIDTHS and math.prod(shape[:-1]) <= _MOST_VECTORS for shape in shapes.values()
    )
