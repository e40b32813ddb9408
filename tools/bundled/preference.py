"""The DPO reference: the denoiser tuned on preferences with the Diffusion-DPO loss, as the published models were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib_dpo.toy.pictures import PROPERTIES, Scene
from tools.bundled.captions import seen_by_captioner
from tools.bundled.denoiser import World, add_noise
from tools.bundled.recipe import Recipe
from tools.bundled.training import train

_OTHER = 0.3  # of the losers miss one property that a captioner does not mistake
_TRIES = 50


def fit(recipe: Recipe, world: World, base: Any, folder: Path, say: Callable[[str], None]) -> Any:
    """Tune a copy of the base on pairs of pictures: the winner shows what the caption says, the loser does not.

    Loss: eq. 14 of arXiv 2311.12908, with the same noise and time for both pictures, as in the authors' code
    (github.com/SalesforceAIResearch/DiffusionDPO, train.py).
    """
    network = copy.deepcopy(base).requires_grad_(True)
    index = {scene: n for n, scene in enumerate(world.scenes)}

    def loss(_: int, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        size = recipe.preference.batch
        winners = [world.scenes[n] for n in rng.integers(len(world.scenes), size=size)]
        losers = [_loser(scene, index, rng) for scene in winners]
        times = torch.from_numpy((np.arange(size) + rng.random()) / size * 1000).long()
        state = generator.get_state()
        won = add_noise(_pictures(world, index, winners, rng), times, generator)
        lost = add_noise(_pictures(world, index, losers, rng), times, generator.set_state(state))
        noisy, noise = (torch.cat(parts) for parts in zip(won, lost, strict=True))
        context = world.context_of(winners).repeat(2, 1, 1)
        with torch.no_grad():
            reference = _errors(base, noisy, noise, times, context)
        won_gain, lost_gain = (_errors(network, noisy, noise, times, context) - reference).chunk(2)
        return -F.logsigmoid(-0.5 * recipe.beta * (won_gain - lost_gain)).mean()

    train("preference", network, recipe.preference, loss, seed=recipe.seed, folder=folder, say=say)
    return network


def _errors(network: Any, noisy: Tensor, noise: Tensor, times: Tensor, context: Tensor) -> Tensor:
    found: Tensor = network(noisy, times.repeat(2), context).sample - noise
    return found.square().mean(dim=(1, 2, 3))


def _pictures(world: World, index: dict[Scene, int], scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    rows = [index[scene] for scene in scenes]
    return world.latents[rows, rng.integers(world.latents.shape[1], size=len(rows))]


def _loser(scene: Scene, index: dict[Scene, int], rng: np.random.Generator) -> Scene:
    """A scene that does not fit the caption: what the careless captioner mistakes for it, or one property at random."""
    names = list(index)
    for _ in range(_TRIES):
        if rng.random() < _OTHER:
            other = names[rng.integers(len(names))]
            name = PROPERTIES[rng.integers(len(PROPERTIES))]
            found = replace(scene, **{name: getattr(other, name)})
        else:
            found = seen_by_captioner(scene, rng)
        if found != scene and None not in astuple(found) and found in index:
            return found
    return names[(index[scene] + 1) % len(names)]
