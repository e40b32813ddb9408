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
    def is_told(self) -> bool:
        """Of a share: not where none of it and all of it are as likely."""
        return self.high - self.low < 1

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
    became_right: int  # pictures, from strength 0 to the full change
    became_wrong: int
    gain: Interval  # of the full change over the base
    best: float  # the strength of the highest mean
    rise: Interval  # from strength 0 to the best
    fall: Interval  # from the best to the last strength
    plateau: tuple[float, float]  # first and last strength that are not surely worse than the best
    suggested: float
    loras: tuple[LoraPoint, ...]  # by rising rank

    @property
    def told(self) -> bool:
        """Whether so many pictures tell that the full change does anything at all."""
        return self.gain.rises or self.gain.falls

    @property
    def suggested_is_best(self) -> bool:
        """Whether the suggested strength lies on the plateau."""
        return self.plateau[0] <= self.suggested <= self.plateau[1]

    def as_json(self) -> dict[str, Any]:
        return {
            "adherence": [one.as_json() for one in self.points],
            "became_right": self.became_right,
            "became_wrong": self.became_wrong,
            "gain": self.gain.as_json(),
            "best": self.best,
            "rise": self.rise.as_json(),
            "fall": self.fall.as_json(),
            "plateau": list(self.plateau),
            "suggested": self.suggested,
            "suggested_on_plateau": self.suggested_is_best,
            "loras": [one.as_json() for one in self.loras],
        }

    @classmethod
    def from_json(cls, figures: Mapping[str, Any]) -> Findings:
        """What `as_json` gave; other keys do not matter."""
        first, last = figures["plateau"]
        return cls(
            points=tuple(Point(**one) for one in figures["adherence"]),
            became_right=figures["became_right"],
            became_wrong=figures["became_wrong"],
            gain=Interval(**figures["gain"]),
            best=figures["best"],
            rise=Interval(**figures["rise"]),
            fall=Interval(**figures["fall"]),
            plateau=(first, last),
            suggested=figures["suggested"],
            loras=tuple(
                LoraPoint(
                    one["rank"], one["energy_kept"], Point(**one["adherence"]), Interval(**one["gain"]),
                    Interval(**one["share_of_gain"]) if one["share_of_gain"] else None,
                )
                for one in figures["loras"]
            ),
        )  # fmt: skip


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
        became_right=int((full > base).sum()),
        became_wrong=int((full < base).sum()),
        gain=gain(base, full),
        best=best,
        rise=gain(base, strengths[best]),
        fall=gain(strengths[best], strengths[points[-1].strength]),
        plateau=plateau(strengths),
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


def plateau(strengths: Mapping[float, Scores]) -> tuple[float, float]:
    """First and last of the neighbouring strengths, around the best one, that are not surely worse than it.

    Sure is what the paired differences show: the same prompts and seeds at both strengths.
    """
    order = sorted(strengths)
    best = _best([point(strength, strengths[strength]) for strength in order]).strength
    first = last = order.index(best)
    while first > 0 and not gain(strengths[order[first - 1]], strengths[best]).rises:
        first -= 1
    while last + 1 < len(order) and not gain(strengths[order[last + 1]], strengths[best]).rises:
        last += 1
    return order[first], order[last]


def _best(points: Sequence[Point]) -> Point:
    return max(points, key=lambda one: one.mean)


def _error(values: Scores) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))
