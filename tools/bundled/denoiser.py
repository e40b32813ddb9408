"""The denoiser: a UNet with the blocks and key names of SD 1.5's, trained on latents with careless captions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib_dpo.toy.generate import alphas_cumprod
from lib_dpo.toy.pictures import Scene, all_scenes, held_out
from tools.bundled.autoencoder import encode, initialise
from tools.bundled.captions import all_captions, seen_by_captioner
from tools.bundled.recipe import Recipe
from tools.bundled.text_encoder import embed
from tools.bundled.training import generators, noise, train

_UNNAMED = 0.1  # of the pictures are shown with the empty caption, for guidance
_MOST_WEIGHT = 5.0  # of the signal-to-noise ratio


@dataclass(frozen=True)
class World:
    """What the denoiser learns from: encoded pictures of the scenes that are not held out, and embedded captions."""

    scenes: tuple[Scene, ...]
    latents: Tensor  # (scenes, pictures, 4, 8, 8)
    rows: dict[Scene | None, int]  # of `context`; None is the empty caption
    context: Tensor  # (captions, 77, width)

    def context_of(self, said: Sequence[Scene | None]) -> Tensor:
        return self.context[[self.rows[scene] for scene in said]]


def make_world(recipe: Recipe, autoencoder: Any, text_encoder: Any, tokenizer: Any) -> World:
    """Draw and encode the pictures, and embed every caption."""
    scenes = shown_scenes()
    rng, _ = generators(recipe.seed, "pictures", 0)
    latents = encode(autoencoder, [scene for scene in scenes for _ in range(recipe.pictures)], rng)
    said: list[Scene | None] = [None, *all_captions()]
    return World(
        scenes=scenes,
        latents=latents.reshape(len(scenes), recipe.pictures, *latents.shape[1:]),
        rows={scene: n for n, scene in enumerate(said)},
        context=embed(text_encoder, tokenizer, said),
    )


def shown_scenes() -> tuple[Scene, ...]:
    """The scenes that training shows."""
    hidden = set(held_out())
    return tuple(scene for scene in all_scenes() if scene not in hidden)


def build(recipe: Recipe) -> Any:
    """An untrained UNet2DConditionModel of diffusers."""
    diffusers: Any = importlib.import_module("diffusers")
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=recipe.unet_widths,
        layers_per_block=2,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.unet_heads,  # diffusers means their number here
        norm_num_groups=32,
    )
    initialise(network, torch.Generator().manual_seed(recipe.seed))
    return network


def fit(recipe: Recipe, world: World, folder: Path, say: Callable[[str], None]) -> Any:
    """Train it to predict the noise, weighted as in Min-SNR (arXiv 2303.09556)."""
    network = build(recipe).to(world.latents.device)
    alphas = alphas_cumprod()
    ratio = alphas / (1 - alphas)
    weights = (ratio.clamp_max(_MOST_WEIGHT) / ratio).float()
    hidden = set(held_out())

    def loss(_: int, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        size = recipe.denoiser.batch
        chosen = rng.integers(len(world.scenes), size=size)
        latents = world.latents[chosen, rng.integers(world.latents.shape[1], size=size)]
        said = [_said_of(world.scenes[n], hidden, rng) for n in chosen]
        times = torch.from_numpy((np.arange(size) + rng.random()) / size * len(alphas)).long()
        noisy, added = add_noise(latents, times, generator)
        found = network(noisy, times.to(noisy.device), world.context_of(said)).sample
        error = (found - added).square().mean(dim=(1, 2, 3))
        total: Tensor = (weights[times].to(error.device) * error).mean()
        return total

    train("denoiser", network, recipe.denoiser, loss, seed=recipe.seed, folder=folder, say=say)
    return network


def _said_of(scene: Scene, hidden: set[Scene], rng: np.random.Generator) -> Scene | None:
    """A careless caption, but none that is held out."""
    if rng.random() < _UNNAMED:
        return None
    said = seen_by_captioner(scene, rng)
    return scene if said in hidden else said


def add_noise(latents: Tensor, times: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy latents at the given times, and the noise that was added."""
    share = alphas_cumprod()[times].float().reshape(-1, 1, 1, 1).to(latents.device)
    added = noise(latents, generator)
    return share.sqrt() * latents + (1 - share).sqrt() * added, added
