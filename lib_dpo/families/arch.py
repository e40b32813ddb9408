"""Architectures and layouts as table rows, and how a list of tensors is recognised as one of them.

Recognition looks at key names and dimensions, never at the file's name and never at widths: a small model
with the structure of SD 1.5 is an SD 1.5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lib_dpo.errors import MismatchError
from lib_dpo.files.foreign import foreign_kind, mostly_lora

Layout = Literal["ldm", "sgm", "diffusers"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of an architecture and the names it goes by."""

    prefix: str  # canonical, in the ldm/sgm layout
    naming: Literal["hf", "open_clip"]  # how the canonical keys are spelled
    layers: int
    folder: str  # sub-folder of a diffusers model
    kohya: str  # prefix of LoRA module names
    block: str


@dataclass(frozen=True)
class Architecture:
    """One model family. `attention` lists the resolution levels that carry transformer blocks.

    `resnets` is their number on each level of the way down; on the way up there is one more.
    """

    name: str
    title: str
    layout: Layout
    levels: int
    attention: tuple[int, ...]
    text_encoders: tuple[TextEncoder, ...]
    kohya_unet: Literal["diffusers", "sgm"]  # which spelling kohya's scripts use for this family
    ss_base_model_version: str
    modelspec: str
    side: int  # of the pictures that the family was made for, in pixels
    resnets: int = 2


_CLIP_L = "text_model."
ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            name="sd1",
            title="SD 1.x",
            layout="ldm",
            levels=4,
            attention=(0, 1, 2),
            text_encoders=(TextEncoder("cond_stage_model.transformer." + _CLIP_L, "hf", 12, "text_encoder", "lora_te", "TE1"),),
            kohya_unet="diffusers",
            ss_base_model_version="sd_v1",
            modelspec="stable-diffusion-v1",
            side=512,
        ),
        Architecture(
            name="sd2",
            title="SD 2.x",
            layout="ldm",
            levels=4,
            attention=(0, 1, 2),
            text_encoders=(TextEncoder("cond_stage_model.model.", "open_clip", 24, "text_encoder", "lora_te", "TE1"),),
            kohya_unet="diffusers",
            ss_base_model_version="sd_v2",
            modelspec="stable-diffusion-v2-512",
            side=768,
        ),
        Architecture(
            name="sdxl",
            title="SDXL",
            layout="sgm",
            levels=3,
            attention=(1, 2),
            text_encoders=(
                TextEncoder("conditioner.embedders.0.transformer." + _CLIP_L, "hf", 12, "text_encoder", "lora_te1", "TE1"),
                TextEncoder("conditioner.embedders.1.model.", "open_clip", 32, "text_encoder_2", "lora_te2", "TE2"),
            ),
            kohya_unet="sgm",
            ss_base_model_version="sdxl_base_v1-0",
            modelspec="stable-diffusion-xl-v1-base",
            side=1024,
        ),
        Architecture(
            name="sdxl-refiner",
            title="SDXL refiner",
            layout="sgm",
            levels=4,
            attention=(1, 2),
            text_encoders=(TextEncoder("conditioner.embedders.0.model.", "open_clip", 32, "text_encoder_2", "lora_te", "TE1"),),
            kohya_unet="sgm",
            ss_base_model_version="sdxl_refiner_v1-0",
            modelspec="stable-diffusion-xl-v1-refiner",
            side=1024,
        ),
    )
}

# UNets from which blocks were removed and the rest trained on: with one resnet a level all blocks have other numbers, and
# without the innermost level other levels too. BK-SDM (arXiv 2305.15798) and Segmind's small-sd and tiny-sd; KOALA
# (arXiv 2312.04005). Those of SSD-1B and Vega keep SDXL's numbers: see `pruning`.
ARCHITECTURES |= {
    row.name: row
    for row in (
        replace(ARCHITECTURES["sd1"], name="sd1-small", title="SD 1.x with one resnet a level", resnets=1),
        replace(ARCHITECTURES["sd2"], name="sd2-small", title="SD 2.x with one resnet a level", resnets=1),
        replace(ARCHITECTURES["sd1"], name="sd1-tiny", title="SD 1.x without its innermost level", levels=3, resnets=1),
        replace(ARCHITECTURES["sd2"], name="sd2-tiny", title="SD 2.x without its innermost level", levels=3, resnets=1),
        replace(ARCHITECTURES["sdxl"], name="koala", title="SDXL with one resnet a level", resnets=1, kohya_unet="diffusers"),
    )
}

# What a checkpoint of a family that we do not support gives itself away by: a part of one of its keys.
_REFUSED: tuple[tuple[str, str], ...] = (
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("double_stream_blocks.", "a Flux-like model"),
    ("single_transformer_blocks.", "Flux (diffusers)"),
    ("time_stack.", "Stable Video Diffusion"),
    ("temporal_transformer_blocks.", "a video model"),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet (diffusers)"),
    ("clip_txt_mapper.", "Stable Cascade"),
    ("transformer_blocks.0.adaln_single", "PixArt"),
    (".scale_weight", "a scaled fp8 checkpoint"),
    (".weight_scale", "a scaled fp8 checkpoint"),
    (".scale_input", "a scaled fp8 checkpoint"),
    ("scaled_fp8", "a scaled fp8 checkpoint"),
    (".comfy_quant", "a quantised checkpoint"),
    (".quant_state.", "a 4-bit quantised checkpoint"),
)
# Ends of the names beside a layer's weight of what its numbers are multiplied by, in the spellings that were seen.
_SCALES = ("scale", "scales", "scale_inv", "weight_scale", "weight_scalar", "input_scale", "absmax", "scalar")
_MODEL = "a model"
SUPPORTED = ", ".join(row.title for row in ARCHITECTURES.values() if row.resnets == 2)

_UNET_PREFIXES: tuple[tuple[Layout, str], ...] = (
    ("ldm", "model.diffusion_model."),
    ("ldm", "diffusion_model."),
    ("ldm", ""),
    ("diffusers", "unet."),
    ("diffusers", ""),
)


@dataclass(frozen=True)
class Recognised:
    """What a list of tensors is: architecture, layout and the prefix that its UNet keys carry."""

    architecture: Architecture
    layout: Layout
    unet_prefix: str
    in_channels: int
    notes: tuple[str, ...] = ()


def _is_scale(key: str, keys: Collection[str]) -> bool:
    """Whether a tensor scales the weight that lies beside it: `X.scale` or `X.weight.scale` with `X.weight`."""
    head, _, end = key.rpartition(".")
    return end in _SCALES and (f"{head}.weight" in keys or (head.endswith(".weight") and head in keys))


def recognise(shapes: Mapping[str, Shape], *, name: str, expected: str = _MODEL) -> Recognised:
    """Recognise a checkpoint, UNet file or dense offset file from its tensors' names and dimensions.

    Args:
        shapes: key -> shape, as in the file.
        name: the file, for messages.
        expected: what it was to be, for messages.

    Raises:
        MismatchError: another family of models, or something else than a model, named where we know it.
    """
    if mostly_lora(shapes):  # of a family that we do not support too
        raise _no_unet(shapes, name, expected)
    for mark, family in _REFUSED:
        if any(mark in key for key in shapes):
            raise MismatchError(f"{name}: this is {family}, which is not supported yet; expected one of {SUPPORTED}")
    if scaled := next((key for key in shapes if _is_scale(key, shapes)), None):
        raise MismatchError(
            f"{name}: this is a quantised checkpoint, whose numbers are multiplied by others such as {scaled}, which is not "
            f"supported yet; expected one of {SUPPORTED} in plain numbers"
        )
    layout, prefix = _find_unet(shapes, name, expected)
    conv_in = shapes[prefix + ("input_blocks.0.0.weight" if layout == "ldm" else "conv_in.weight")]
    architecture = _as_pruned(_architecture(shapes, layout, prefix, name), shapes, layout, prefix)
    if layout == "ldm" and architecture.layout == "sgm":
        layout = "sgm"
    return Recognised(architecture, layout, prefix, conv_in[1], _notes(conv_in[1]))


def _find_unet(shapes: Mapping[str, Shape], name: str, expected: str) -> tuple[Layout, str]:
    for layout, prefix in _UNET_PREFIXES:
        mark = "input_blocks.0.0.weight" if layout == "ldm" else "conv_in.weight"
        second = "time_embed.0.weight" if layout == "ldm" else "time_embedding.linear_1.weight"
        shape = shapes.get(prefix + mark)
        if shape is not None and len(shape) == 4 and prefix + second in shapes:
            return layout, prefix
    raise _no_unet(shapes, name, expected)


def _no_unet(shapes: Mapping[str, Shape], name: str, expected: str) -> MismatchError:
    found = foreign_kind(shapes)
    if found:
        advice = found.advice if expected == _MODEL else f"choose {expected}"
        return MismatchError(f"{name}: is {found.title}, expected {expected}; {advice}")
    first = ", ".join(list(shapes)[:3])
    return MismatchError(
        f"{name}: no UNet found among its {len(shapes)} tensors ({first}{', …' if len(shapes) > 3 else ''}); expected a Stable "
        "Diffusion checkpoint (model.diffusion_model.*), a diffusers UNet (down_blocks.*) or a diffusers folder"
    )


def _architecture(shapes: Mapping[str, Shape], layout: Layout, prefix: str, name: str) -> Architecture:
    ldm = layout == "ldm"
    if prefix + ("label_emb.0.0.weight" if ldm else "add_embedding.linear_1.weight") in shapes:
        if any(key.startswith(prefix + ("input_blocks.1.1." if ldm else "down_blocks.0.attentions.")) for key in shapes):
            raise MismatchError(f"{name}: this is SD 2.1 unCLIP, which is not supported yet; expected {SUPPORTED}")
        four_levels = prefix + ("input_blocks.10.0.in_layers.0.weight" if ldm else "down_blocks.3.resnets.0.norm1.weight")
        return ARCHITECTURES["sdxl-refiner" if four_levels in shapes else "sdxl"]
    proj_in = shapes.get(prefix + ("input_blocks.1.1.proj_in.weight" if ldm else "down_blocks.0.attentions.0.proj_in.weight"))
    if proj_in is None:
        raise MismatchError(
            f"{name}: its UNet has neither a label embedding nor attention at the first level, so it is none of {SUPPORTED}"
        )
    return ARCHITECTURES["sd1" if len(proj_in) == 4 else "sd2"]


def _as_pruned(arch: Architecture, shapes: Mapping[str, Shape], layout: Layout, prefix: str) -> Architecture:
    """The same or, where each level has one resnet only, the row for such a UNet."""
    if layout == "ldm":
        one = prefix + "input_blocks.2.0.op.weight" in shapes
        deep = prefix + "input_blocks.7.0.in_layers.0.weight" in shapes
    else:
        second = tuple(
            f"{prefix}{side}_blocks.{level}.resnets.{n}." for side, n in (("down", 1), ("up", 2)) for level in range(4)
        )
        one = prefix + "up_blocks.1.resnets.1.norm1.weight" in shapes and not any(key.startswith(second) for key in shapes)
        deep = prefix + "down_blocks.3.resnets.0.norm1.weight" in shapes
    if not one:
        return arch
    if arch.name == "sdxl":
        return ARCHITECTURES["koala"]
    return ARCHITECTURES.get(f"{arch.name}-{'small' if deep else 'tiny'}", arch)


def _notes(in_channels: int) -> tuple[str, ...]:
    if in_channels == 4:
        return ()
    what = {9: "an inpainting model", 8: "an instruct-pix2pix model"}.get(in_channels, "an unusual model")
    return (f"{what}: its first convolution has {in_channels} input channels",)
