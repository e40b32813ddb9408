"""The autoencoder: 64x64 pictures to 8x8 latents of four channels, in the layout of SD 1.5's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib_dpo.toy.pictures import Pictures, Scene, all_scenes, draw
from tools.bundled.recipe import LATENT_SCALE, Recipe
from tools.bundled.training import device_of, generators, noise, train

_NOISE = 0.05  # added to latents of about unit size while training: neighbours in latent space then look alike
_BATCH = 64


def build(recipe: Recipe) -> Any:
    """An untrained AutoencoderKL of diffusers."""
    diffusers: Any = importlib.import_module("diffusers")
    torch_seed = torch.Generator().manual_seed(recipe.seed)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=recipe.autoencoder_widths,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=64,
        scaling_factor=LATENT_SCALE,
    )
    initialise(network, torch_seed)
    return network


def initialise(network: torch.nn.Module, generator: torch.Generator) -> None:
    """Every matrix drawn from the generator (Glorot 2010, and 0 for the last layer of each residual branch); biases 0."""
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        fan_out, fan_in = parameter.shape[0] * parameter[0, 0].numel(), parameter[0].numel()
        bound = (6 / (fan_in + fan_out)) ** 0.5
        if name.endswith(("conv2.weight", "to_out.0.weight", "net.2.weight", "proj_out.weight")):
            bound *= 0.3
        parameter.data.uniform_(-bound, bound, generator=generator)


def fit(recipe: Recipe, folder: Path, say: Callable[[str], None], device: torch.device) -> Any:
    """Train it on drawn pictures, then let its latents have mean 0 and variance 1 / LATENT_SCALE^2, as SD 1.5's have.

    At last the decoder alone is trained on, to draw edges and corners sharply; latents stay what they are. SD's own
    decoder was improved the same way (huggingface.co/stabilityai/sd-vae-ft-mse).
    """
    network = build(recipe).to(device)
    scenes = all_scenes()

    def loss(_: int, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = rng.integers(len(scenes), size=recipe.autoencoder.batch)
        pictures = to_tensor(draw([scenes[n] for n in chosen], rng), device)
        latents = network.encode(pictures).latent_dist.mean
        noisy = latents + _NOISE * noise(latents, generator)
        error = network.decode(noisy).sample - pictures
        total: Tensor = error.abs().mean() + error.square().mean() + 1e-3 * latents.square().mean()
        return total

    train("autoencoder", network, recipe.autoencoder, loss, seed=recipe.seed, folder=folder, average=0.99, say=say)
    rng, _ = generators(recipe.seed, "normalise", 0)
    _normalise(network.cpu(), draw(scenes, rng))  # in float64, which Apple's devices lack
    _sharpen(network.to(device), recipe, scenes, folder, say, device)
    return network


def _sharpen(
    network: Any, recipe: Recipe, scenes: Sequence[Scene], folder: Path, say: Callable[[str], None], device: torch.device
) -> None:
    decoder = network.decoder.requires_grad_(True)

    def loss(_: int, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = rng.integers(len(scenes), size=recipe.decoder.batch)
        pictures = to_tensor(draw([scenes[n] for n in chosen], rng), device)
        with torch.no_grad():
            latents = network.encode(pictures).latent_dist.mean
            ready = network.post_quant_conv(latents + _NOISE / LATENT_SCALE * noise(latents, generator))
        error = decoder(ready) - pictures
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()  # arXiv 1511.05440, eq. 6, with alpha 1
        total: Tensor = error.abs().mean() + error.square().mean() + edges
        return total

    train("decoder", decoder, recipe.decoder, loss, seed=recipe.seed, folder=folder, average=0.99, say=say)


@torch.no_grad()
def _normalise(network: Any, pictures: Pictures) -> None:
    """Fold a shift and a rotation of the latents into the 1x1 convolutions after the encoder and before the decoder.

    Afterwards the four channels are uncorrelated, with mean 0 and variance 1 once multiplied by LATENT_SCALE.
    """
    latents = torch.cat(
        [network.encode(batch).latent_dist.mean for batch in torch.split(to_tensor(pictures, device_of(network)), _BATCH)]
    )
    rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    spread = values.clamp_min(1e-8).sqrt() * LATENT_SCALE
    after, before = network.quant_conv, network.post_quant_conv
    turn = (vectors / spread).T  # latent -> turn @ (latent - mean)
    weight, bias = after.weight[:4, :, 0, 0].double(), after.bias[:4].double()
    after.weight[:4, :, 0, 0] = (turn @ weight).to(after.weight.dtype)
    after.bias[:4] = (turn @ (bias - mean)).to(after.bias.dtype)
    after.weight[4:] = 0.0
    after.bias[4:] = -20.0  # the log of the variance: latents are certain
    before.bias += (before.weight[:, :, 0, 0].double() @ mean).to(before.bias.dtype)
    before.weight[:, :, 0, 0] = (before.weight[:, :, 0, 0].double() @ (vectors * spread)).to(before.weight.dtype)


@torch.no_grad()
def encode(network: Any, scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """One drawn picture of every scene as latents for the denoiser, (n, 4, 8, 8)."""
    device = device_of(network)
    parts = []
    for start in range(0, len(scenes), _BATCH):
        pictures = to_tensor(draw(scenes[start : start + _BATCH], rng), device)
        parts.append(network.encode(pictures).latent_dist.mean * LATENT_SCALE)
    return torch.cat(parts)


def to_tensor(pictures: Pictures, device: torch.device) -> Tensor:
    """(n, size, size, 3) of bytes -> (n, 3, size, size) of floats from -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
