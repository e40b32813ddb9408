"""LoRA files for tests: pairs with known numbers, under any name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lib_dpo.families.keymap import UNET
from lib_dpo.families.shapes import small, unet_diffusers_config

Tensors = dict[str, torch.Tensor]

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TO_Q_KEY = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
TO_Q_DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TE = "text_model.encoder.layers.0.self_attn.q_proj"
TE_KEY = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"


def pair(out: int = 32, in_: int = 32, *, rank: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """up and down."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, in_, generator=generator)


def product(up: torch.Tensor, down: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * (up.double().flatten(1) @ down.double().flatten(1))


def kohya(name: str, up: torch.Tensor, down: torch.Tensor, alpha: float | None = None) -> Tensors:
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}


def peft(name: str, up: torch.Tensor, down: torch.Tensor, adapter: str = "") -> Tensors:
    dot = f".{adapter}" if adapter else ""
    return {f"{name}.lora_B{dot}.weight": up, f"{name}.lora_A{dot}.weight": down}


def saved(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata=dict(metadata or {}) or None
    )
    return path


def configured(folder: Path, config: Mapping[str, Any]) -> None:
    """PEFT's adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def tiny_unet() -> Any:
    """A UNet of diffusers with all of SD 1.5's modules."""
    import diffusers

    config = {key: value for key, value in unet_diffusers_config("sd1", small("sd1")).items() if key[0] != "_"}
    return diffusers.UNet2DConditionModel(**config)


def pipeline_of(unet: Any, text_encoder: Any = None) -> Any:
    """What loads LoRAs into it."""
    import diffusers

    nothing: Any = None
    return diffusers.StableDiffusionPipeline(
        nothing, text_encoder, nothing, unet, nothing, nothing, nothing, requires_safety_checker=False
    )
