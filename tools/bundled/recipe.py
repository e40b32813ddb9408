"""Sizes, steps and seeds of the bundled model, and of the short run that the tests make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lib_dpo.toy.generate import STEPS


@dataclass(frozen=True)
class Stage:
    """How long one network is trained, and how fast."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out."""

    seed: int = 0
    autoencoder: Stage = Stage(1600, 8, 1.5e-3)
    decoder: Stage = Stage(1500, 8, 1e-3)
    text_encoder: Stage = Stage(400, 128, 1e-3)
    denoiser: Stage = Stage(4000, 64, 1e-3)
    preference: Stage = Stage(400, 32, 1e-4)
    beta: float = 2000.0  # of the Diffusion-DPO loss
    pictures: int = 32  # of every scene, drawn by the program and encoded once
    drawn: int = 8  # of every scene, by the base: those that are compared
    drawing_steps: int = STEPS  # of each of them
    autoencoder_widths: tuple[int, ...] = (32, 32, 32, 32)
    unet_widths: tuple[int, ...] = (32, 64, 32, 32)
    unet_heads: int = 8
    text_width: int = 64
    text_heads: int = 1
    text_layers: int = 2  # that are trained; the rest of the twelve are zero, which leaves what passes through unchanged


SHIPPED = Recipe()
SMOKE = replace(
    SHIPPED,
    autoencoder=Stage(2, 2, 1e-3),
    decoder=Stage(2, 2, 1e-3),
    text_encoder=Stage(2, 4, 1e-3),
    denoiser=Stage(2, 4, 1e-3),
    preference=Stage(2, 2, 1e-4),
    pictures=1,
    drawn=2,
    drawing_steps=1,
)

# SD 1.5's own numbers
LATENT_SCALE = 0.18215
TOKENS = 77
VOCABULARY = 49408
TEXT_LAYERS = 12
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
