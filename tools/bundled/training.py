"""One training loop for every stage: AdamW, warm-up and cosine, an average of the weights, and files to go on from."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tools.bundled.recipe import Stage

Loss = Callable[[int, np.random.Generator, torch.Generator], Tensor]
_SAVE_EVERY = 60.0  # seconds
_SAY_EVERY = 50  # steps
_WARM_UP = 100  # steps


def train(
    name: str,
    network: nn.Module,
    stage: Stage,
    loss: Loss,
    *,
    seed: int,
    folder: Path,
    average: float = 0.998,
    say: Callable[[str], None],
) -> None:
    """Train a network in place and leave the exponential average of its weights in it.

    Every step draws from generators of its own, seeded by stage and step, so a run that was cut off goes on from its
    last file as if nothing had been.

    Args:
        loss: of (step, numpy's generator, torch's generator), to be minimised.
        folder: keeps `<name>.pt`, the state to go on from.
        average: weight of the past in the average, once the run is long enough.
    """
    path = folder / f"{name}.pt"
    optimiser = torch.optim.AdamW(network.parameters(), lr=stage.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    mean = {key: value.detach().clone() for key, value in network.state_dict().items()}
    first, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device_of(network))
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        mean, first, spent = state["mean"], state["step"], state["seconds"]
    start = saved = time.monotonic() - spent
    total = 0.0
    for step in range(first, stage.steps):
        for group in optimiser.param_groups:
            group["lr"] = stage.rate * _rate_at(step, stage.steps)
        value = loss(step, *generators(seed, name, step))
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        keep = min(average, (1 + step) / (10 + step))
        for key, parameter in network.state_dict().items():
            mean[key].lerp_(parameter, 1 - keep)
        total += value.item()
        last = step + 1 == stage.steps
        if (step + 1) % _SAY_EVERY == 0 or last:
            count = (step + 1 - first) % _SAY_EVERY or min(_SAY_EVERY, step + 1 - first)
            say(f"{name}: step {step + 1} of {stage.steps}, loss {total / count:.4f}, {time.monotonic() - start:.0f} s")
            total = 0.0
        if last or time.monotonic() - saved > _SAVE_EVERY:
            saved = time.monotonic()
            state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "mean": mean}
            save(state | {"step": step + 1, "seconds": time.monotonic() - start}, path)
    network.load_state_dict(mean)
    network.requires_grad_(False).eval()


def generators(seed: int, name: str, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """numpy's and torch's own for one step of one stage."""
    words = np.random.SeedSequence([seed, step, *name.encode()]).generate_state(2)
    return np.random.default_rng(words), torch.Generator().manual_seed(int(words[0]))


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of a tensor's shape, on its device; the generator is the CPU's, so it is the same on all of them."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def device_of(network: nn.Module) -> torch.device:
    """Where a network's weights are."""
    return next(network.parameters()).device


def _rate_at(step: int, steps: int) -> float:
    warm = min(_WARM_UP, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) + 0.01


def save(state: object, path: Path) -> None:
    """Write a file of torch under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
