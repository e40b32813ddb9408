"""How well pictures follow their prompts at every strength of an offset, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from lib_dpo.offset import Offset
from lib_dpo.toy.bundled import Networks, generate
from lib_dpo.toy.judge import adherence
from lib_dpo.toy.pictures import Scene, held_out

_Z = 1.959964  # two-sided 95 %

Scores = NDArray[np.float64]  # (pictures,), 1 where a picture shows everything that its caption names


@dataclass(frozen=True)
class Point:
    """Share of the pictures that show everything their captions name, at one strength."""

    strength: float
    mean: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def prompts(count: int) -> tuple[list[Scene], list[int]]:
    """Held-out scenes in turn, and a seed for each picture: the same for every strength."""
    scenes = held_out()
    return [scenes[n % len(scenes)] for n in range(count)], list(range(1000, 1000 + count))


def scores_at(
    networks: Networks,
    offset: Offset | None,
    strength: float,
    count: int,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Generate at one strength and judge; leaves the networks at that strength."""
    scenes, seeds = prompts(count)
    networks.set_unet(offset, strength)
    return adherence(generate(networks, scenes, seeds, on_progress=on_progress), scenes)[:, 1]


def point(strength: float, scores: Scores) -> Point:
    """Mean and 95 % interval of a share (Wilson 1927)."""
    n, mean = len(scores), float(scores.mean())
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Point(strength, mean, centre - half, centre + half, n)


def gain(before: Scores, after: Scores) -> tuple[float, float, float]:
    """Mean of the paired differences (same prompt, same seed) and its 95 % interval."""
    difference = after - before
    half = _Z * float(difference.std(ddof=1)) / math.sqrt(len(difference))
    mean = float(difference.mean())
    return mean, mean - half, mean + half


def plateau(points: Sequence[Point]) -> tuple[float, float]:
    """The strengths, first to last, whose interval reaches the best mean."""
    best = max(points, key=lambda one: one.mean)
    near = [one.strength for one in points if one.high >= best.mean]
    return min(near), max(near)
