"""The DPO reference: the denoiser tuned on preferences with the Diffusion-DPO loss, as the published models were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib_dpo.toy.generate import decode, sample
from lib_dpo.toy.judge import adherence
from tools.bundled.denoiser import World, add_noise
from tools.bundled.recipe import Recipe
from tools.bundled.training import generators, save, train

_BATCH = 46
_EARLIEST = 400  # of the 1000 times: count, place and shape are decided in the noise above; below, pairs differ by chance


@dataclass(frozen=True)
class Drawn:
    """Pictures that the base drew for the captions that training shows, and how well each fits its caption."""

    latents: Tensor  # (scenes, pictures, 4, 8, 8), in the scale of the denoiser; on the CPU, as the next is
    fits: Tensor  # (scenes, pictures), share of the named properties that the picture shows


def fit(recipe: Recipe, world: World, base: Any, vae: Any, folder: Path, say: Callable[[str], None]) -> Any:
    """Tune a copy of the base on pairs of its own pictures for one caption: the winner fits the caption better.

    Loss: eq. 14 of arXiv 2311.12908, with the same noise and time for both pictures, as in the authors' code
    (github.com/SalesforceAIResearch/DiffusionDPO, train.py). There people compare pictures that models generated; here
    the judge does.
    """
    drawn = draw(recipe, world, base, vae, folder, say)
    pairs = [_pairs(fits) for fits in drawn.fits]
    scenes = [n for n, found in enumerate(pairs) if len(found)]
    if not scenes:  # a base that learnt nothing, in a smoke run: any two pictures
        pairs = [np.argwhere(~np.eye(recipe.drawn, dtype=bool)) for _ in world.scenes]
        scenes = list(range(len(world.scenes)))
    device = world.latents.device
    network = copy.deepcopy(base).requires_grad_(True)

    def loss(_: int, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        size = recipe.preference.batch
        chosen = [scenes[n] for n in rng.integers(len(scenes), size=size)]
        winners, losers = np.array([pairs[n][rng.integers(len(pairs[n]))] for n in chosen]).T
        times = _EARLIEST + torch.from_numpy((np.arange(size) + rng.random()) / size * (1000 - _EARLIEST)).long()
        state = generator.get_state()
        won = add_noise(drawn.latents[chosen, winners].to(device), times, generator)
        lost = add_noise(drawn.latents[chosen, losers].to(device), times, generator.set_state(state))
        noisy, added = (torch.cat(parts) for parts in zip(won, lost, strict=True))
        context = world.context_of([world.scenes[n] for n in chosen]).repeat(2, 1, 1)
        with torch.no_grad():
            reference = _errors(base, noisy, added, times, context)
        won_gain, lost_gain = (_errors(network, noisy, added, times, context) - reference).chunk(2)
        return -F.logsigmoid(-0.5 * recipe.beta * (won_gain - lost_gain)).mean()

    train("preference", network, recipe.preference, loss, seed=recipe.seed, folder=folder, say=say)
    return network


def draw(recipe: Recipe, world: World, base: Any, vae: Any, folder: Path, say: Callable[[str], None]) -> Drawn:
    """The base's own pictures, `recipe.drawn` of every scene that training shows; kept in `drawn.pt`."""
    path = folder / "drawn.pt"
    if path.exists():
        return Drawn(**torch.load(path, weights_only=True))
    scenes = [scene for scene in world.scenes for _ in range(recipe.drawn)]
    _, generator = generators(recipe.seed, "drawn", 0)
    seeds = torch.randint(2**31, (len(scenes),), generator=generator).tolist()
    latents, fits = [], []
    for start in range(0, len(scenes), _BATCH):
        part = slice(start, start + _BATCH)
        said, empty = world.context_of(scenes[part]), world.context_of([None])
        found = sample(base, said, empty, seeds[part], steps=recipe.drawing_steps)
        fits.append(torch.from_numpy(adherence(decode(vae, found), scenes[part])[:, 0]))
        latents.append(found.cpu())
        if start // _BATCH % 10 == 0:
            say(f"drawn: {min(start + _BATCH, len(scenes))} of {len(scenes)} pictures to compare")
    shape = (len(world.scenes), recipe.drawn)
    drawn = Drawn(torch.cat(latents).reshape(*shape, *latents[0].shape[1:]), torch.cat(fits).reshape(shape))
    save({"latents": drawn.latents, "fits": drawn.fits}, path)
    return drawn


def _pairs(fits: Tensor) -> Any:
    """(n, 2): for every pair of a scene's pictures of which one fits better, its number and the other's."""
    return torch.nonzero(fits[:, None] > fits[None, :]).numpy()


def _errors(network: Any, noisy: Tensor, added: Tensor, times: Tensor, context: Tensor) -> Tensor:
    found: Tensor = network(noisy, times.repeat(2).to(noisy.device), context).sample - added
    return found.square().mean(dim=(1, 2, 3))
