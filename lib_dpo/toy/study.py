"""What a study finds: how well pictures follow their prompts at every strength and with every LoRA, with 95 % intervals.

Pure figures: the scores come from `series`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_Z = 1.959964  # two-sided 95 %
FULL = 1.0  # the strength of the whole change

Scores = NDArray[np.float64]  # (pictures,), 1 where a picture shows everything that its caption names


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def rises(self) -> bool:
        """All of it lies above 0."""
        return self.low > 0

    @property
    def falls(self) -> bool:
        """All of it lies below 0."""
        return self.high < 0

    def as_json(self) -> dict[str, float]:
        return self._asdict()


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


@dataclass(frozen=True)
class LoraPoint:
    """What a LoRA at strength 1 does, beside the full change."""

    rank: int
    energy_kept: float
    point: Point
    gain: Interval  # over the base
    share: Interval | None  # of the full change's gain; None where there is none to share

    def as_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "energy_kept": self.energy_kept,
            "adherence": self.point.as_json(),
            "gain": self.gain.as_json(),
            "share_of_gain": self.share.as_json() if self.share else None,
        }


@dataclass(frozen=True)
class Findings:
    """The curve over the strengths, and the LoRAs. Differences are of the same prompts and seeds."""

    points: tuple[Point, ...]  # by rising strength
    gain: Interval  # of the full change over the base
    best: float  # the strength of the highest mean
    rise: Interval  # from strength 0 to the best
    fall: Interval  # from the best to the last strength
    plateau: tuple[float, float]
    suggested: float
    loras: tuple[LoraPoint, ...]  # by rising rank

    @property
    def suggested_is_best(self) -> bool:
        """Whether the suggested strength lies on the plateau."""
        return self.plateau[0] <= self.suggested <= self.plateau[1]

    def as_json(self) -> dict[str, Any]:
        return {
            "adherence": [one.as_json() for one in self.points],
            "gain": self.gain.as_json(),
            "best": self.best,
            "rise": self.rise.as_json(),
            "fall": self.fall.as_json(),
            "plateau": list(self.plateau),
            "suggested": self.suggested,
            "suggested_on_plateau": self.suggested_is_best,
            "loras": [one.as_json() for one in self.loras],
        }


def find(
    strengths: Mapping[float, Scores], loras: Mapping[int, Scores], energy_kept: Mapping[int, float], suggested: float
) -> Findings:
    """All figures from the scores.

    Args:
        strengths: by strength of the full change; 0 and 1 must be among them.
        loras: by rank, at strength 1; `energy_kept` of the same ranks.
    """
    base, full = strengths[0.0], strengths[FULL]
    points = tuple(point(strength, strengths[strength]) for strength in sorted(strengths))
    best = _best(points).strength
    return Findings(
        points=points,
        gain=gain(base, full),
        best=best,
        rise=gain(base, strengths[best]),
        fall=gain(strengths[best], strengths[points[-1].strength]),
        plateau=plateau(points),
        suggested=suggested,
        loras=tuple(
            LoraPoint(rank, energy_kept[rank], point(FULL, scores), gain(base, scores), share_of_gain(base, scores, full))
            for rank, scores in sorted(loras.items())
        ),
    )


def point(strength: float, scores: Scores) -> Point:
    """Mean and 95 % interval of a share (Wilson 1927)."""
    n, mean = len(scores), float(scores.mean())
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    low, high = max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))  # at 0 and 1 rounding goes beyond
    return Point(strength, mean, low, high, n)


def gain(before: Scores, after: Scores) -> Interval:
    """Mean of the paired differences (same prompt, same seed)."""
    difference = after - before
    mean, half = float(difference.mean()), _Z * _error(difference)
    return Interval(mean, mean - half, mean + half)


def share_of_gain(before: Scores, part: Scores, full: Scores) -> Interval | None:
    """(part - before) / (full - before), means over the pictures, by the delta method for paired data.

    None unless the full gain is surely above 0: a share of nothing means nothing.
    """
    if not gain(before, full).rises:
        return None
    some, whole = part - before, full - before
    share = float(some.mean() / whole.mean())
    half = _Z * _error(some - share * whole) / float(whole.mean())
    return Interval(share, share - half, share + half)


def plateau(points: Sequence[Point]) -> tuple[float, float]:
    """First and last of the neighbouring strengths, around the best one, whose interval reaches the best mean."""
    best = _best(points)
    first = last = points.index(best)
    while first > 0 and points[first - 1].high >= best.mean:
        first -= 1
    while last + 1 < len(points) and points[last + 1].high >= best.mean:
        last += 1
    return points[first].strength, points[last].strength


def _best(points: Sequence[Point]) -> Point:
    return max(points, key=lambda one: one.mean)


def _error(values: Scores) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))
