"""Names of the same tensor in different layouts: canonical (ldm/sgm), diffusers, kohya LoRA.

Everything is a table of prefixes, written once in one direction; the inverse is derived from it. A key is translated
by its longest prefix that stands in the table, so depth and widths do not matter.

The naming of diffusers follows its conversion scripts (scripts/convert_original_stable_diffusion_to_diffusers.py in
github.com/huggingface/diffusers), the LoRA names those of kohya-ss/sd-scripts (networks/lora.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from lib_dpo.families.arch import Architecture, TextEncoder

UNET = "model.diffusion_model."
VAE = "first_stage_model."
FIRST_CONVOLUTION = UNET + "input_blocks.0.0.weight"  # takes nine channels in an inpainting model

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
VAE_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.15
QKV = ("q", "k", "v")  # order of the rows in open_clip's fused in_proj


# ---- tables: canonical prefix -> diffusers prefix, without the component's own prefix ----


@cache
def unet_table(levels: int, attention: tuple[int, ...], count: int = 2) -> Mapping[str, str]:
    """UNet prefixes, ldm/sgm -> diffusers, for a UNet of `count` resnets a level with attention at the given levels."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    table["middle_block.1"] = "mid_block.attentions.0"
    for level in range(levels):
        first = (count + 1) * level  # of the level's blocks on the way up; down, conv_in comes before them
        for j in range(count):
            resnets[f"input_blocks.{first + j + 1}.0"] = f"down_blocks.{level}.resnets.{j}"
            table[f"input_blocks.{first + j + 1}.1"] = f"down_blocks.{level}.attentions.{j}"
        table[f"input_blocks.{first + count + 1}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        has_attention = levels - 1 - level in attention
        for j in range(count + 1):
            resnets[f"output_blocks.{first + j}.0"] = f"up_blocks.{level}.resnets.{j}"
            if has_attention:
                table[f"output_blocks.{first + j}.1"] = f"up_blocks.{level}.attentions.{j}"
        upsampler = f"output_blocks.{first + count}.{2 if has_attention else 1}.conv"
        table[upsampler] = f"up_blocks.{level}.upsamplers.0.conv"
    for ours, theirs in resnets.items():
        table |= {f"{ours}.{part}": f"{theirs}.{name}" for part, name in _RESNET.items()}
    return table


@cache
def open_clip_table(layers: int) -> Mapping[str, str]:
    """Text encoder prefixes, open_clip -> transformers. The fused in_proj and the projection are not here (see model)."""
    table = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
    }
    for n in range(layers):
        for ours, theirs in _OPEN_CLIP_LAYER.items():
            table[f"transformer.resblocks.{n}.{ours}"] = f"text_model.encoder.layers.{n}.{theirs}"
    return table


@cache
def vae_table() -> Mapping[str, str]:
    """VAE prefixes, ldm -> diffusers. The mid attention is a 1x1 convolution there and a linear layer here."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, blocks in (("encoder", 2), ("decoder", 3)):
        table |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        resnets = {f"{side}.mid.block_{j + 1}": f"{side}.mid_block.resnets.{j}" for j in range(2)}
        for part, name in _VAE_ATTENTION.items():
            table[f"{side}.mid.attn_1.{part}"] = f"{side}.mid_block.attentions.0.{name}"
        for level in range(4):
            ours, theirs = (
                (f"{side}.down.{level}", f"{side}.down_blocks.{level}")
                if side == "encoder"
                else (f"{side}.up.{level}", f"{side}.up_blocks.{3 - level}")
            )
            resnets |= {f"{ours}.block.{j}": f"{theirs}.resnets.{j}" for j in range(blocks)}
            sampler = "downsample" if side == "encoder" else "upsample"
            table[f"{ours}.{sampler}.conv"] = f"{theirs}.{sampler}rs.0.conv"
        for ours, theirs in resnets.items():
            table |= {f"{ours}.{part}": f"{theirs}.{name}" for part, name in _VAE_RESNET.items()}
    return table


@cache
def _inverse(function: object, *args: object) -> Mapping[str, str]:
    table = function(*args)  # type: ignore[operator]  # one of the three table functions above
    inverse = {theirs: ours for ours, theirs in table.items()}
    assert len(inverse) == len(table), "a key map must be a bijection"
    return inverse


def swap_prefix(key: str, table: Mapping[str, str]) -> str | None:
    """`key` with its longest prefix (whole dotted parts) that stands in the table exchanged; None when there is none."""
    end = len(key)
    while end > 0:
        head = table.get(key[:end])
        if head is not None:
            return head + key[end:]
        end = key.rfind(".", 0, end)
    return None


# ---- UNet: canonical <-> diffusers ----


def unet_to_diffusers(arch: Architecture, key: str) -> str | None:
    """Canonical UNet key -> diffusers UNet key (no prefix); None for keys outside the UNet."""
    if not key.startswith(UNET):
        return None
    return swap_prefix(key[len(UNET) :], unet_table(arch.levels, arch.attention, arch.resnets))


def unet_from_diffusers(arch: Architecture, key: str) -> str | None:
    """The inverse of `unet_to_diffusers`."""
    inner = swap_prefix(key, _inverse(unet_table, arch.levels, arch.attention, arch.resnets))
    return None if inner is None else UNET + inner


def text_encoder_from_hf(encoder: TextEncoder, key: str) -> str | None:
    """transformers key ("text_model...") -> canonical key of that encoder; None where the map is not one to one."""
    if encoder.naming == "hf":
        prefix = "text_model."
        return encoder.prefix + key[len(prefix) :] if key.startswith(prefix) else None
    inner = swap_prefix(key, _inverse(open_clip_table, encoder.layers))
    return None if inner is None else encoder.prefix + inner


def text_encoder_to_hf(encoder: TextEncoder, key: str) -> str | None:
    """The inverse of `text_encoder_from_hf`."""
    if not key.startswith(encoder.prefix):
        return None
    inner = key[len(encoder.prefix) :]
    return "text_model." + inner if encoder.naming == "hf" else swap_prefix(inner, open_clip_table(encoder.layers))


def vae_from_diffusers(key: str) -> str | None:
    """diffusers VAE key (no prefix) -> canonical key; the names of diffusers before 0.15 are understood too."""
    for old, new in VAE_OLD_ATTENTION.items():
        key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
    inner = swap_prefix(key, _inverse(vae_table))
    return None if inner is None else VAE + inner


def vae_to_diffusers(key: str) -> str | None:
    """Canonical VAE key -> diffusers key (no prefix)."""
    return swap_prefix(key[len(VAE) :], vae_table()) if key.startswith(VAE) else None


# ---- components and blocks ----


def component_of(arch: Architecture, key: str) -> str | None:
    """`unet`, `te1`, `te2`, `vae`, or None for what belongs to none of them."""
    if key.startswith(UNET):
        return "unet"
    if key.startswith(VAE):
        return "vae"
    for encoder in arch.text_encoders:
        if key.startswith(encoder.prefix):
            return encoder.block.lower()
    return None


# ---- LoRA modules ----


@dataclass(frozen=True)
class LoraModule:
    """One module of a LoRA file: its name there, and the rows of the canonical weight that it changes."""

    name: str  # lora_unet_..., without the suffix
    key: str  # canonical key of the weight
    part: int | None = None  # 0, 1, 2 for q, k, v of a fused in_proj; None for the whole weight
    transposed: bool = False  # the weight is kept as (in, out): open_clip's text_projection

    @property
    def bias(self) -> str:
        """Canonical key of the bias beside the weight."""
        return self.key[: -len("weight")] + "bias"


def lora_modules(arch: Architecture, key: str) -> tuple[LoraModule, ...]:
    """The LoRA modules, under the names kohya writes, that change one canonical weight; empty if there is none.

    UNet: every weight (norms too: the profile decides). Text encoders: the six linears of each layer, the fused
    in_proj of open_clip as three.
    """
    if key.startswith(UNET) and key.endswith(".weight"):
        module = key[len(UNET) : -len(".weight")]
        if arch.kohya_unet == "diffusers" and module != "out.0":  # hosts know the final norm only as out_0
            module = unet_to_diffusers(arch, key[: -len(".weight")]) or module
        return (LoraModule("lora_unet_" + module.replace(".", "_"), key),)
    for encoder in arch.text_encoders:
        if key.startswith(encoder.prefix):
            return tuple(_text_encoder_modules(encoder, key))
    return ()


_TE_LINEAR = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight")
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_weight")


def fused_layer(encoder: TextEncoder, key: str) -> str | None:
    """The layer number when `key` is the fused q/k/v weight of an open_clip encoder."""
    if encoder.naming != "open_clip" or not key.startswith(encoder.prefix):
        return None
    match = _FUSED.fullmatch(key[len(encoder.prefix) :])
    return match[1] if match else None


def _text_encoder_modules(encoder: TextEncoder, key: str) -> Iterable[LoraModule]:
    layer = fused_layer(encoder, key)
    if layer is not None:
        for part, letter in enumerate(QKV):
            yield LoraModule(f"{encoder.kohya}_text_model_encoder_layers_{layer}_self_attn_{letter}_proj", key, part)
        return
    hf = text_encoder_to_hf(encoder, key)
    if hf is not None and _TE_LINEAR.fullmatch(hf):
        yield LoraModule(f"{encoder.kohya}_{hf[: -len('.weight')].replace('.', '_')}", key)
