"""A checkpoint as a diffusers pipeline: built from its own tensors, without a network and without a folder of configs.

Widths, depths and heads are read off the shapes; what shapes do not tell (SD 2's v-prediction, unusual numbers of heads)
comes from the sidecar .yaml and from marker keys, where they are. diffusers, transformers and accelerate are an extra.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_dpo.errors import MismatchError, missing_extra
from lib_dpo.families.arch import Architecture, TextEncoder
from lib_dpo.families.keymap import QKV, VAE, fused_layer, text_encoder_to_hf, unet_to_diffusers, vae_to_diffusers
from lib_dpo.families.model import Model
from lib_dpo.files.small import read_small
from lib_dpo.offsets.offset import blocks_in
from lib_dpo.offsets.prediction import prediction_of

_HEAD_WIDTH = 64  # of CLIP, and of the UNets from SD 2 on; SD 1 has 8 heads whatever its widths
_SD1_HEADS = 8
_SD2_PENULTIMATE = 23  # layers of OpenCLIP ViT-H that SD 2 uses of 24
_NORM_GROUPS = 32
_LATENTS = range(8, 257)  # sides of latent images that a model may be made for


@dataclass(frozen=True)
class Weights:
    """A diffusers pipeline, and its parameters by canonical key: views of the live ones, joined where the file has them so."""

    pipeline: Any
    tensors: Mapping[str, Tensor]


def open_pipeline(model: Model, tokenizer: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Weights:
    """Build the pipeline of an SD 1.x, SD 2.x or SDXL checkpoint.

    Args:
        tokenizer: a folder with CLIP's vocab.json and merges.txt.

    Raises:
        MissingExtraError: diffusers is not installed.
        MismatchError: a part is missing, such as the VAE of a UNet-only file, or a refiner, which makes no pictures alone.
    """
    diffusers, transformers = _libraries()
    check_whole(model)
    arch = model.architecture
    config = _sidecar(model.path)
    live: dict[str, Tensor] = {}
    place = _Place(dtype, torch.device(device))
    unet = _filled(diffusers.UNet2DConditionModel(**_unet_config(model, config)), _unet_names(model), model, place, live)
    vae = _filled(diffusers.AutoencoderKL(**_vae_config(model)), _vae_names(model), model, place, {})
    encoders = [_text_encoder(transformers, model, encoder, config, place, live) for encoder in arch.text_encoders]
    words = transformers.CLIPTokenizer.from_pretrained(str(tokenizer))
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        prediction_type="v_prediction" if prediction_of(model).kind == "v" else "epsilon",
    )  # fmt: skip
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler, "text_encoder": encoders[0], "tokenizer": words}
    if arch.name == "sdxl":
        padded = transformers.CLIPTokenizer.from_pretrained(str(tokenizer), pad_token="!")  # id 0, as open_clip pads
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=encoders[1], tokenizer_2=padded)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return Weights(pipeline, live)  # never moved afterwards: `live` would stay behind


@dataclass(frozen=True)
class _Place:
    """Where weights go before they are filled in: moving a module gives its parameters new memory."""

    dtype: torch.dtype
    device: torch.device

    def take(self, module: Any) -> Any:
        # diffusers' own `to` warns of nothing
        return torch.nn.Module.to(module, self.device, self.dtype).eval().requires_grad_(False)


def check_whole(model: Model) -> None:
    """Refuse what makes no pictures on its own. Raises MismatchError."""
    if model.architecture.name == "sdxl-refiner":
        raise MismatchError(f"{model.path.name} is a refiner, which finishes the pictures of another model; open an SDXL base")
    blocks = blocks_in(model)
    if blocks.pruned or not blocks.is_model:
        raise MismatchError(
            f"{model.path.name} holds {blocks.text}, with which no pictures can be made here; open a model with a whole UNet"
        )
    missing = {"unet", "vae", *(each.block.lower() for each in model.architecture.text_encoders)} - set(model.components())
    if missing:
        raise MismatchError(f"{model.path.name} lacks {', '.join(sorted(missing))}; expected a whole checkpoint")


def _libraries() -> tuple[Any, Any]:
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise missing_extra("making pictures needs", "diffusers", "transformers", "accelerate") from error
    return diffusers, transformers


# ---- configurations ----


def _sidecar(path: Path) -> Mapping[str, Any]:
    """The parameters of the .yaml beside a checkpoint; empty without one."""
    file = path.with_suffix(".yaml")
    if not file.is_file():
        return {}
    import yaml

    content = yaml.safe_load(read_small(file))
    found = content.get("model", {}).get("params", {}) if isinstance(content, dict) else {}
    return found if isinstance(found, dict) else {}


def made_for(model: Model) -> int:
    """The side in pixels of the pictures that a model was made for, as its sidecar .yaml or its family says.

    What the .yaml of SD 2 says of the size is not asked: as published it is 512 for the models of 768 too.
    """
    try:
        config = _sidecar(model.path)
    except Exception:  # noqa: BLE001  # a damaged .yaml: whoever loads the model says so
        config = {}
    if model.architecture.name == "sd2" and config:
        return model.architecture.side if prediction_of(model).kind == "v" else 512
    latent = config.get("image_size")
    if model.architecture.name == "sd1" and type(latent) is int and latent in _LATENTS:
        return 8 * latent
    return model.architecture.side


def _unet_config(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    arch = model.architecture
    shapes = {unet_to_diffusers(arch, key): model.shape(key) for key in model.keys("unet")}
    widths = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(arch.levels)]
    depths = [_depth(shapes, f"down_blocks.{level}.attentions.0.") for level in range(arch.levels)]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    attention = next(key for key in shapes if key and key.endswith("attn2.to_k.weight"))
    heads = _given(config, "unet_config", "num_heads")
    linear = arch.name != "sd1"
    unet: dict[str, Any] = {
        "sample_size": arch.side // 8,
        "in_channels": model.recognised.in_channels,
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "layers_per_block": 2,
        # a level without attention ignores its number, and the middle block takes the last one
        "transformer_layers_per_block": [*(d or 1 for d in depths[:-1]), _depth(shapes, "mid_block.attentions.0.")],
        "cross_attention_dim": shapes[attention][1],
        "use_linear_projection": linear,
        # diffusers takes this for the number of heads
        "attention_head_dim": [max(1, w // _HEAD_WIDTH) for w in widths] if linear else heads or _SD1_HEADS,
        "norm_num_groups": min(_NORM_GROUPS, widths[0]),  # fewer channels than groups: the tests' models
    }
    if "add_embedding.linear_1.weight" in shapes:
        pooled = model.shape(arch.text_encoders[-1].prefix + "text_projection")[1]
        width = shapes["add_embedding.linear_1.weight"][1]
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - pooled) // 6,  # sizes and crops: six numbers
            "projection_class_embeddings_input_dim": width,
        }
    return unet


def _depth(names: Iterable[str | None], prefix: str) -> int:
    numbers = {m[1] for name in names if name and (m := re.match(re.escape(prefix) + r"transformer_blocks\.(\d+)\.", name))}
    return len(numbers)


def _given(config: Mapping[str, Any], part: str, name: str) -> Any:
    return config.get(part, {}).get("params", {}).get(name)


def _vae_config(model: Model) -> dict[str, Any]:
    levels = len({key.split(".")[3] for key in model.keys("vae") if key.startswith(VAE + "encoder.down.")})
    widths = [model.shape(f"{VAE}encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 2,
        "latent_channels": model.shape(VAE + "post_quant_conv.weight")[0],
        "norm_num_groups": min(_NORM_GROUPS, widths[0]),
        "force_upcast": model.architecture.name == "sdxl",  # its VAE overflows in float16; diffusers decodes it in float32 then
        "scaling_factor": 0.13025 if model.architecture.name == "sdxl" else 0.18215,
    }


def _text_config(model: Model, encoder: TextEncoder, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    vocabulary, width = model.shape(encoder.prefix + _EMBEDDING[encoder.naming])
    inner = model.shape(encoder.prefix + _FIRST_LINEAR[encoder.naming])[0]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": config.get("text_heads") or max(1, width // _HEAD_WIDTH),
        "hidden_act": "quick_gelu" if encoder.naming == "hf" else "gelu",
        "projection_dim": width,
        # transformers 4 took the last token for the largest id where this is 2; the ids of the tokenizer say it outright
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }


_EMBEDDING = {"hf": "embeddings.token_embedding.weight", "open_clip": "token_embedding.weight"}
_FIRST_LINEAR = {"hf": "encoder.layers.0.mlp.fc1.weight", "open_clip": "transformer.resblocks.0.mlp.c_fc.weight"}


# ---- weights ----


def _unet_names(model: Model) -> dict[str, str]:
    names = {key: unet_to_diffusers(model.architecture, key) for key in model.keys("unet")}
    return {key: name for key, name in names.items() if name}


def _vae_names(model: Model) -> dict[str, str]:
    names = {key: vae_to_diffusers(key) for key in model.keys("vae")}
    return {key: name for key, name in names.items() if name}


def _filled(module: Any, names: Mapping[str, str], model: Model, place: _Place, live: dict[str, Tensor]) -> Any:
    """Copy a file's tensors into a module; `live` gets its parameters by canonical key.

    Raises:
        MismatchError: parameters that the file lacks.
    """
    module = place.take(module)
    own = dict(module.named_parameters())
    lacking = own.keys() - set(names.values())
    if lacking:
        raise MismatchError(
            f"{model.path.name} lacks {len(lacking)} tensors, first {min(lacking)}; expected a whole checkpoint"
        )
    with torch.no_grad():
        for key, name in names.items():
            if name in own:
                own[name].copy_(model.read(key).reshape(own[name].shape))
                live[key] = own[name].data
    return module


def _text_encoder(
    transformers: Any,
    model: Model,
    encoder: TextEncoder,
    config: Mapping[str, Any],
    place: _Place,
    live: dict[str, Tensor],
) -> Any:
    arch: Architecture = model.architecture
    layers = _SD2_PENULTIMATE if arch.name == "sd2" and encoder.layers > _SD2_PENULTIMATE else encoder.layers
    projected = arch.name == "sdxl" and encoder.naming == "open_clip"
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    settings = transformers.CLIPTextConfig(**_text_config(model, encoder, _text_settings(config), layers))
    module = place.take(kind(settings))
    own = {_plain(name): parameter for name, parameter in module.named_parameters()}
    filled: set[str] = set()
    with torch.no_grad():
        for key in model.keys(encoder.block.lower()):
            for names, whole in _places(arch, encoder, key, own).items():
                whole.copy_(model.read(key).reshape(whole.shape))
                live[key] = whole
                filled |= set(names)
    lacking = own.keys() - filled
    if lacking:
        raise MismatchError(f"{model.path.name} lacks {len(lacking)} tensors of {encoder.block}, first {min(lacking)}")
    return module


def _plain(name: str) -> str:
    """A parameter's name with the leading text_model. that transformers 5 dropped from its modules."""
    return name if name.startswith(("text_model.", "text_projection.")) else "text_model." + name


def _places(
    arch: Architecture, encoder: TextEncoder, key: str, own: Mapping[str, torch.nn.Parameter]
) -> dict[tuple[str, ...], Tensor]:
    """Where a canonical tensor lives: the names of the parameters it makes up, and one view that writes to them all."""
    if fused_layer(encoder, key.replace("in_proj_bias", "in_proj_weight")) is not None:
        layer, kind = key.split(".resblocks.")[1].split(".")[0], "bias" if key.endswith("bias") else "weight"
        names = tuple(f"text_model.encoder.layers.{layer}.self_attn.{letter}_proj.{kind}" for letter in QKV)
        if names[0] not in own:
            return {}
        whole = torch.cat([own[name].data for name in names])
        for name, part in zip(names, whole.chunk(len(names)), strict=True):
            own[name].data = part  # views of one tensor, as the file has them
        return {names: whole}
    if key == encoder.prefix + "text_projection":
        own_name = "text_projection.weight"
        return {(own_name,): own[own_name].data.T} if own_name in own else {}
    hf = text_encoder_to_hf(encoder, key)
    return {(hf,): own[hf].data} if hf and hf in own else {}


def _text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The number of heads from the config.json of the folder that a sidecar .yaml names for its text encoder."""
    folder = _given(config, "cond_stage_config", "version")
    file = Path(str(folder or "")) / "config.json"
    if not folder or not file.is_file():
        return {}
    content = json.loads(read_small(file))
    return {"text_heads": content.get("text_config", content).get("num_attention_heads")}
