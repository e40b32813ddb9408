"""The files of the bundled model: the base as one SD 1.5 checkpoint, the reference as a UNet of diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import text_encoder_from_hf, unet_from_diffusers, vae_from_diffusers
from lib_dpo.files.hashes import file_sha256
from lib_dpo.toy.bundled import BASE, CLIP, MEASURED, REFERENCE
from lib_dpo.toy.generate import alphas_cumprod
from tools.bundled.recipe import LATENT_SCALE, TEXT_LAYERS, TOKENS, Recipe

_ARCH = ARCHITECTURES["sd1"]
_FROM_WEBUI = "extensions/sd-webui-dpo/models/bundled"  # WebUIs start in their own folder


def write_base(folder: Path, autoencoder: Any, text_encoder: Any, unet: Any, recipe: Recipe) -> None:
    """The base and the configuration beside it that A1111 needs for a model of unusual widths."""
    tensors = dict(_schedule())
    for key, tensor in unet.state_dict().items():
        tensors[_known(unet_from_diffusers(_ARCH, key), key)] = tensor.half()
    for key, tensor in autoencoder.state_dict().items():
        square = ".attentions." in key and tensor.ndim == 2
        tensors[_known(vae_from_diffusers(key), key)] = (tensor[:, :, None, None] if square else tensor).half()
    encoder = _ARCH.text_encoders[0]
    for key, tensor in _text_tensors(text_encoder):
        tensors[_known(text_encoder_from_hf(encoder, key), key)] = tensor
    _save(tensors, folder / BASE)
    (folder / BASE).with_suffix(".yaml").write_text(_yaml(recipe), encoding="utf-8", newline="\n")


def write_reference(folder: Path, unet: Any) -> None:
    """The UNet alone, as the published references are."""
    _save({key: tensor.half() for key, tensor in unet.state_dict().items()}, folder / REFERENCE)
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    known = {"_class_name": "UNet2DConditionModel", **config}
    (folder / REFERENCE).with_name("config.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8", newline="\n")


def hashes(folder: Path) -> dict[str, tuple[int, str]]:
    """Path below the folder -> size in bytes and SHA-256, of every file but the note and the study's figures."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("README.md", MEASURED))
    return {file.relative_to(folder).as_posix(): (file.stat().st_size, file_sha256(file)) for file in files}


def _known(key: str | None, source: str) -> str:
    assert key is not None, f"{source} has no name in the layout of SD 1.5"
    return key


def _schedule() -> Iterator[tuple[str, Tensor]]:
    alphas = alphas_cumprod()
    previous = torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
    yield "betas", (1 - alphas / previous).float()
    yield "alphas_cumprod", alphas.float()
    yield "sqrt_alphas_cumprod", alphas.sqrt().float()
    yield "sqrt_one_minus_alphas_cumprod", (1 - alphas).sqrt().float()


def _text_tensors(text_encoder: Any) -> Iterator[tuple[str, Tensor]]:
    """Under the names of transformers before 5.0, the layers that were not trained as zeros."""
    layer = "text_model.encoder.layers.0."
    found = {"text_model." + key.removeprefix("text_model."): tensor for key, tensor in text_encoder.state_dict().items()}
    for key, tensor in found.items():
        yield key, tensor.half()
    for n in range(TEXT_LAYERS):
        for key in [key for key in found if key.startswith(layer)]:
            name = f"text_model.encoder.layers.{n}.{key.removeprefix(layer)}"
            if name not in found:
                yield name, torch.zeros_like(found[key], dtype=torch.float16)
    if "text_model.embeddings.position_ids" not in found:
        yield "text_model.embeddings.position_ids", torch.arange(TOKENS)[None]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensors[key].cpu().contiguous() for key in sorted(tensors)}, path, metadata={"format": "pt"})


def _yaml(recipe: Recipe) -> str:
    """What A1111 builds the model from; written by hand, since it must be read without any of our code."""
    unet, vae = recipe.unet_widths, recipe.autoencoder_widths
    return f"""\
# The bundled model for AUTOMATIC1111's WebUI: put this file beside {Path(BASE).name}, under the same name.
# `version` is a folder, seen from the folder of the WebUI: change it if the extension has another name there.
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 8
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: {LATENT_SCALE}
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 8
        in_channels: 4
        out_channels: 4
        model_channels: {unet[0]}
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: {[width // unet[0] for width in unet]}
        num_heads: {recipe.unet_heads}
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: {recipe.text_width}
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 64
          in_channels: 3
          out_ch: 3
          ch: {vae[0]}
          ch_mult: {[width // vae[0] for width in vae]}
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: {_FROM_WEBUI}/{CLIP}
"""
