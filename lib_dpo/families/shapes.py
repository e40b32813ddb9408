"""The tensors of a Stable Diffusion checkpoint: names and shapes, at any width.

Written as the loops that build the models, so that the lists need no data files and no torch. The UNet stands here
twice, in the naming of ldm/sgm and in that of diffusers, each with loops of its own: neither list is translated from
the other, so the two can test a key map. Both walks take the way of the forward pass.

Sources: ldm/modules/diffusionmodules/{openaimodel,model}.py in github.com/CompVis/stable-diffusion, sgm/modules in
github.com/Stability-AI/generative-models, UNet2DConditionModel in github.com/huggingface/diffusers, CLIPTextModel in
github.com/huggingface/transformers, and github.com/mlfoundations/open_clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from lib_dpo.errors import SettingError
from lib_dpo.families.arch import ARCHITECTURES, Shape, TextEncoder

Rows = Iterator[tuple[str, Shape]]

LATENT = 4  # channels of a latent image
_STEPS = 1000
_TOKENS = 77
_SCHEDULE = {
    "ldm": ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    "sgm": ("denoiser.sigmas",),
}
_POSITION_IDS = "embeddings.position_ids"

# the parts of a resnet in forward order: norm, convolution, time embedding, norm, convolution, shortcut
_LDM_RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
_DIFFUSERS_RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
_VAE_RESNET = ("norm1", "conv1", "", "norm2", "conv2", "nin_shortcut")
_VAE_MULTIPLIERS = (1, 2, 4, 4)


@dataclass(frozen=True)
class Sizes:
    """The widths of a model. They change its shapes and never its keys."""

    channels: int  # of the UNet's first level
    text: tuple[int, ...]  # width of each text encoder
    in_channels: int = LATENT  # 9 for inpainting
    vocabulary: int = 49408
    size_embedding: int = 256  # of each number of SDXL's size conditioning
    vae: int = 128  # of the VAE's first level

    @property
    def context(self) -> int:
        """Width of what cross-attention sees: the outputs of all text encoders side by side."""
        return sum(self.text)


@dataclass(frozen=True)
class _UNet:
    """What sets one architecture's UNet apart, whatever its widths."""

    multipliers: tuple[int, ...]  # of the width, by level
    depths: tuple[int, ...]  # transformer blocks by level
    middle_depth: int  # -1: the first resnet alone, -2: no middle block, as ComfyUI counts too
    linear: bool  # proj_in and proj_out are linear layers, not 1x1 convolutions
    size_numbers: int  # numbers in the size conditioning; 0: no label_emb
    resnets: int = 2  # on each level of the way down; one more on the way up


_UNETS = {
    "sd1": _UNet((1, 2, 4, 4), (1, 1, 1, 0), 1, linear=False, size_numbers=0),
    "sd2": _UNet((1, 2, 4, 4), (1, 1, 1, 0), 1, linear=True, size_numbers=0),
    "sdxl": _UNet((1, 2, 4), (0, 2, 10), 10, linear=True, size_numbers=6),
    "sdxl-refiner": _UNet((1, 2, 4, 4), (0, 4, 4, 0), 4, linear=True, size_numbers=5),
    "sd1-small": _UNet((1, 2, 4, 4), (1, 1, 1, 0), 1, linear=False, size_numbers=0, resnets=1),
    "sd2-small": _UNet((1, 2, 4, 4), (1, 1, 1, 0), 1, linear=True, size_numbers=0, resnets=1),
    "sd1-tiny": _UNet((1, 2, 4), (1, 1, 1), -2, linear=False, size_numbers=0, resnets=1),
    "sd2-tiny": _UNet((1, 2, 4), (1, 1, 1), -2, linear=True, size_numbers=0, resnets=1),
    "koala": _UNet((1, 2, 4), (0, 2, 6), 6, linear=True, size_numbers=6, resnets=1),
}
REAL_SIZES = {
    "sd1": Sizes(320, (768,)),
    "sd2": Sizes(320, (1024,)),
    "sdxl": Sizes(320, (768, 1280)),
    "sdxl-refiner": Sizes(384, (1280,)),
    "sd1-small": Sizes(320, (768,)),
    "sd2-small": Sizes(320, (1024,)),
    "sd1-tiny": Sizes(320, (768,)),
    "sd2-tiny": Sizes(320, (1024,)),
    "koala": Sizes(320, (768, 1280)),
}


def small(arch: str) -> Sizes:
    """Widths about a tenth of the real ones, for tests: all keys, 20 to 55 MB in half precision."""
    text = tuple(48 + 16 * n for n in range(len(REAL_SIZES[_known(arch)].text)))
    return Sizes(channels=32, text=text, vocabulary=64, size_embedding=16, vae=8)


@cache
def checkpoint_shapes(arch: str, sizes: Sizes | None = None) -> Mapping[str, Shape]:
    """Canonical key -> shape of a whole checkpoint: schedule, UNet, text encoders and VAE. Not to be changed: made once.

    For sd1 and sdxl the keys are those of the published half-precision files. SD 2 has the same schedule as SD 1 here;
    its files differ in which more of these constants they carry.
    """
    sizes = sizes or REAL_SIZES[_known(arch)]
    architecture = ARCHITECTURES[_known(arch)]
    shapes: dict[str, Shape] = dict.fromkeys(_SCHEDULE[architecture.layout], (_STEPS,))
    shapes.update(("model.diffusion_model." + key, shape) for key, shape in _unet_ldm(_UNETS[arch], sizes))
    for encoder, width in zip(architecture.text_encoders, sizes.text, strict=True):
        rows = (_hf_clip if encoder.naming == "hf" else _open_clip)(encoder, width, sizes.vocabulary)
        shapes.update((encoder.prefix + key, shape) for key, shape in rows)
    shapes.update(("first_stage_model." + key, shape) for key, shape in _vae(sizes.vae))
    return MappingProxyType(shapes)


def checkpoint_dtype(key: str) -> str:
    """The dtype (safetensors name) of a tensor in a published half-precision checkpoint, from its canonical key."""
    if key.endswith(_POSITION_IDS):
        return "I64"
    return "F32" if any(key in names for names in _SCHEDULE.values()) else "F16"


def unet_diffusers_shapes(arch: str, sizes: Sizes | None = None) -> dict[str, Shape]:
    """Key -> shape of the UNet in a diffusers folder."""
    return dict(_unet_diffusers(_UNETS[_known(arch)], sizes or REAL_SIZES[arch]))


def unet_name_pairs(arch: str) -> dict[str, str]:
    """Canonical key -> diffusers key of each UNet tensor, found by walking both lists at the same time."""
    canonical = [key for key in checkpoint_shapes(arch) if key.startswith("model.diffusion_model.")]
    return dict(zip(canonical, unet_diffusers_shapes(arch), strict=True))


def unet_diffusers_config(arch: str, sizes: Sizes | None = None) -> dict[str, object]:
    """What diffusers expects in the config.json beside the UNet."""
    unet, sizes = _UNETS[_known(arch)], sizes or REAL_SIZES[arch]
    widths = [sizes.channels * multiplier for multiplier in unet.multipliers]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.depths]
    config: dict[str, object] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": sizes.in_channels,
        "out_channels": LATENT,
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "layers_per_block": unet.resnets,
        # a level without attention ignores its number, and the middle block takes the last one
        "transformer_layers_per_block": [*(depth or 1 for depth in unet.depths[:-1]), unet.depths[-1] or unet.middle_depth],
        "cross_attention_dim": sizes.context,
        "use_linear_projection": unet.linear,
        # diffusers takes this for the number of heads: 8 in SD 1, heads of 64 channels later
        "attention_head_dim": [max(1, width // 64) for width in widths] if unet.linear else 8,
    }
    if unet.middle_depth == -2:
        config["mid_block_type"] = None
    if unet.size_numbers:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": sizes.size_embedding,
            "projection_class_embeddings_input_dim": _label_width(unet, sizes),
        }
    return config


def _known(arch: str) -> str:
    if arch not in _UNETS:
        raise SettingError(f"architecture {arch!r} is not known; expected one of {', '.join(_UNETS)}")
    return arch


# ---- layers ----


def _layer(name: str, *shape: int) -> Rows:
    """A weight of this shape (out first) and its bias; a norm when there is only one number."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _resnet(name: str, parts: tuple[str, ...], inner: int, outer: int, time: int) -> Rows:
    norm1, conv1, time_projection, norm2, conv2, shortcut = parts
    yield from _layer(f"{name}.{norm1}", inner)
    yield from _layer(f"{name}.{conv1}", outer, inner, 3, 3)
    if time:
        yield from _layer(f"{name}.{time_projection}", outer, time)
    yield from _layer(f"{name}.{norm2}", outer)
    yield from _layer(f"{name}.{conv2}", outer, outer, 3, 3)
    if inner != outer:
        yield from _layer(f"{name}.{shortcut}", outer, inner, 1, 1)


def _transformer(name: str, width: int, depth: int, context: int, *, linear: bool) -> Rows:
    """A spatial transformer, which has the same names in all layouts."""
    kernel = () if linear else (1, 1)
    yield from _layer(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", width, width, *kernel)
    for n in range(depth):
        block = f"{name}.transformer_blocks.{n}"
        for attention, seen in (("attn1", width), ("attn2", context)):
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_k.weight", (width, seen)
            yield f"{block}.{attention}.to_v.weight", (width, seen)
            yield from _layer(f"{block}.{attention}.to_out.0", width, width)
        yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)  # GEGLU: value and gate
        yield from _layer(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _layer(f"{block}.{norm}", width)
    yield from _layer(f"{name}.proj_out", width, width, *kernel)


def _middle(names: tuple[str, str, str], parts: tuple[str, ...], width: int, unet: _UNet, sizes: Sizes) -> Rows:
    """The middle block: resnet, transformer, resnet, or what is left of it."""
    if unet.middle_depth >= -1:
        yield from _resnet(names[0], parts, width, width, 4 * sizes.channels)
    if unet.middle_depth >= 0:
        yield from _transformer(names[1], width, unet.middle_depth, sizes.context, linear=unet.linear)
        yield from _resnet(names[2], parts, width, width, 4 * sizes.channels)


def _label_width(unet: _UNet, sizes: Sizes) -> int:
    """Width of SDXL's second condition: the pooled text and the embedded sizes."""
    return sizes.text[-1] + unet.size_numbers * sizes.size_embedding


# ---- UNet, ldm and sgm ----


def _unet_ldm(unet: _UNet, sizes: Sizes) -> Rows:
    width, time = sizes.channels, 4 * sizes.channels
    yield from _layer("time_embed.0", time, width)
    yield from _layer("time_embed.2", time, time)
    if unet.size_numbers:
        yield from _layer("label_emb.0.0", time, _label_width(unet, sizes))
        yield from _layer("label_emb.0.2", time, time)
    yield from _layer("input_blocks.0.0", width, sizes.in_channels, 3, 3)
    skips = [width]
    for level, (multiplier, depth) in enumerate(zip(unet.multipliers, unet.depths, strict=True)):
        for _ in range(unet.resnets):
            block, outer = f"input_blocks.{len(skips)}", sizes.channels * multiplier
            yield from _resnet(f"{block}.0", _LDM_RESNET, width, outer, time)
            if depth:
                yield from _transformer(f"{block}.1", outer, depth, sizes.context, linear=unet.linear)
            width = outer
            skips.append(width)
        if level < len(unet.multipliers) - 1:
            yield from _layer(f"input_blocks.{len(skips)}.0.op", width, width, 3, 3)
            skips.append(width)
    names = ("middle_block.0", "middle_block.1", "middle_block.2")
    yield from _middle(names, _LDM_RESNET, width, unet, sizes)
    yield from _output_blocks_ldm(unet, sizes, skips)
    yield from _layer("out.0", sizes.channels)
    yield from _layer("out.2", LATENT, sizes.channels, 3, 3)


def _output_blocks_ldm(unet: _UNet, sizes: Sizes, skips: list[int]) -> Rows:
    """Each block takes what the one before gives and the last of the skips that is still unused."""
    width, number = skips[-1], 0
    for level in reversed(range(len(unet.multipliers))):
        outer, depth = sizes.channels * unet.multipliers[level], unet.depths[level]
        for last in (*[False] * unet.resnets, True):
            block = f"output_blocks.{number}"
            yield from _resnet(f"{block}.0", _LDM_RESNET, width + skips.pop(), outer, 4 * sizes.channels)
            if depth:
                yield from _transformer(f"{block}.1", outer, depth, sizes.context, linear=unet.linear)
            if last and level:
                yield from _layer(f"{block}.{2 if depth else 1}.conv", outer, outer, 3, 3)
            width, number = outer, number + 1


# ---- UNet, diffusers ----


def _unet_diffusers(unet: _UNet, sizes: Sizes) -> Rows:
    widths = [sizes.channels * multiplier for multiplier in unet.multipliers]
    time, last = 4 * sizes.channels, widths[-1]
    yield from _layer("time_embedding.linear_1", time, sizes.channels)
    yield from _layer("time_embedding.linear_2", time, time)
    if unet.size_numbers:
        yield from _layer("add_embedding.linear_1", time, _label_width(unet, sizes))
        yield from _layer("add_embedding.linear_2", time, time)
    yield from _layer("conv_in", widths[0], sizes.in_channels, 3, 3)
    for n, depth in enumerate(unet.depths):
        inputs = [widths[max(n - 1, 0)], *[widths[n]] * (unet.resnets - 1)]
        yield from _diffusers_block(f"down_blocks.{n}", inputs, widths[n], unet, sizes, depth=depth)
        if n < len(widths) - 1:
            yield from _layer(f"down_blocks.{n}.downsamplers.0.conv", widths[n], widths[n], 3, 3)
    names = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    yield from _middle(names, _DIFFUSERS_RESNET, last, unet, sizes)
    backwards = widths[::-1]
    for n, depth in enumerate(reversed(unet.depths)):
        width, before, after = backwards[n], backwards[max(n - 1, 0)], backwards[min(n + 1, len(widths) - 1)]
        inputs = [before + width, *[width + width] * (unet.resnets - 1), width + after]
        yield from _diffusers_block(f"up_blocks.{n}", inputs, width, unet, sizes, depth=depth)
        if n < len(widths) - 1:
            yield from _layer(f"up_blocks.{n}.upsamplers.0.conv", width, width, 3, 3)
    yield from _layer("conv_norm_out", widths[0])
    yield from _layer("conv_out", LATENT, widths[0], 3, 3)


def _diffusers_block(name: str, inputs: list[int], width: int, unet: _UNet, sizes: Sizes, *, depth: int) -> Rows:
    for j, inner in enumerate(inputs):
        yield from _resnet(f"{name}.resnets.{j}", _DIFFUSERS_RESNET, inner, width, 4 * sizes.channels)
        if depth:
            yield from _transformer(f"{name}.attentions.{j}", width, depth, sizes.context, linear=unet.linear)


# ---- text encoders and VAE ----


def _hf_clip(encoder: TextEncoder, width: int, vocabulary: int) -> Rows:
    """CLIPTextModel below "text_model."."""
    yield _POSITION_IDS, (1, _TOKENS)
    yield "embeddings.token_embedding.weight", (vocabulary, width)
    yield "embeddings.position_embedding.weight", (_TOKENS, width)
    for n in range(encoder.layers):
        layer = f"encoder.layers.{n}"
        yield from _layer(f"{layer}.layer_norm1", width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{layer}.self_attn.{part}", width, width)
        yield from _layer(f"{layer}.layer_norm2", width)
        yield from _layer(f"{layer}.mlp.fc1", 4 * width, width)
        yield from _layer(f"{layer}.mlp.fc2", width, 4 * width)
    yield from _layer("final_layer_norm", width)


def _open_clip(encoder: TextEncoder, width: int, vocabulary: int) -> Rows:
    """The text half of an open_clip model, with q, k and v in one matrix."""
    yield "token_embedding.weight", (vocabulary, width)
    yield "positional_embedding", (_TOKENS, width)
    for n in range(encoder.layers):
        layer = f"transformer.resblocks.{n}"
        yield from _layer(f"{layer}.ln_1", width)
        yield f"{layer}.attn.in_proj_weight", (3 * width, width)
        yield f"{layer}.attn.in_proj_bias", (3 * width,)
        yield from _layer(f"{layer}.attn.out_proj", width, width)
        yield from _layer(f"{layer}.ln_2", width)
        yield from _layer(f"{layer}.mlp.c_fc", 4 * width, width)
        yield from _layer(f"{layer}.mlp.c_proj", width, 4 * width)
    yield from _layer("ln_final", width)
    yield "text_projection", (width, width)
    yield "logit_scale", ()


def _vae(channels: int) -> Rows:
    widths = [channels * multiplier for multiplier in _VAE_MULTIPLIERS]
    last = len(widths) - 1
    yield from _layer("encoder.conv_in", channels, 3, 3, 3)
    width = channels
    for level, outer in enumerate(widths):
        for j in range(2):
            yield from _resnet(f"encoder.down.{level}.block.{j}", _VAE_RESNET, width, outer, 0)
            width = outer
        if level < last:
            yield from _layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    yield from _vae_middle("encoder.mid", width)
    yield from _layer("encoder.norm_out", width)
    yield from _layer("encoder.conv_out", 2 * LATENT, width, 3, 3)  # mean and log variance
    yield from _layer("quant_conv", 2 * LATENT, 2 * LATENT, 1, 1)
    yield from _layer("post_quant_conv", LATENT, LATENT, 1, 1)
    yield from _layer("decoder.conv_in", width, LATENT, 3, 3)
    yield from _vae_middle("decoder.mid", width)
    for level in reversed(range(len(widths))):
        for j in range(3):
            yield from _resnet(f"decoder.up.{level}.block.{j}", _VAE_RESNET, width, widths[level], 0)
            width = widths[level]
        if level:
            yield from _layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from _layer("decoder.norm_out", width)
    yield from _layer("decoder.conv_out", 3, width, 3, 3)


def _vae_middle(name: str, width: int) -> Rows:
    yield from _resnet(f"{name}.block_1", _VAE_RESNET, width, width, 0)
    yield from _layer(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _layer(f"{name}.attn_1.{part}", width, width, 1, 1)
    yield from _resnet(f"{name}.block_2", _VAE_RESNET, width, width, 0)
