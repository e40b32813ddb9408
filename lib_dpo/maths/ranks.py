"""How many components each layer gets: pure functions on spectra.

Spectra are sorted, so the gain of one more component never grows, and taking the components in the order of
energy per byte over all layers at once reaches an energy with the fewest bytes (greedy on a concave gain). A size budget
takes them in the order of weighted energy per byte: what a layer's energy is worth differs between layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Energies = NDArray[np.float64]


@dataclass(frozen=True)
class Spectrum:
    """One layer as the allocation sees it: energies (squared singular values, falling) and sizes in bytes."""

    energies: Energies
    bytes_per_rank: int
    fixed_bytes: int  # what the layer costs in the file beside its factors: names, shapes, alpha
    cap: int  # largest rank allowed
    weight: float = 1.0  # what the layer's energy is worth beside that of others, where a size has to be divided


def break_even_rank(out: int, in_: int) -> int:
    """The rank up to which factors are smaller than the layer itself, at least 1 and at most min(out, in)."""
    return max(1, min(out * in_ // (out + in_), out, in_))


class Ranking:
    """All components of all layers in the order in which they are taken: what each policy of a file takes is a beginning of it.

    Args:
        spectra: by layer name; the order breaks ties.
        weighted: by weighted energy per byte, for sizes; else by energy per byte.
    """

    def __init__(self, spectra: Mapping[str, Spectrum], *, weighted: bool) -> None:
        self.names = list(spectra)
        self._per_rank = np.array([row.bytes_per_rank for row in spectra.values()], dtype=np.int64)
        self._fixed = np.array([row.fixed_bytes for row in spectra.values()], dtype=np.int64)
        gains: list[Any] = [row.energies[: row.cap] for row in spectra.values()]
        layer = np.repeat(np.arange(len(gains)), [len(gain) for gain in gains])
        gain = np.concatenate(gains) if gains else np.zeros(0)
        ratio = gain / self._per_rank[layer] if len(gain) else gain
        if weighted:
            ratio = ratio * np.array([row.weight for row in spectra.values()])[layer]
        order = np.argsort(-ratio, kind="stable")
        self._layer, self._reached = layer[order], np.cumsum(gain[order])
        is_first = np.zeros(len(layer), dtype=bool)
        if len(layer):
            is_first[np.unique(self._layer, return_index=True)[1]] = True
        self._spent = np.cumsum(self._per_rank[self._layer] + np.where(is_first, self._fixed[self._layer], 0))

    def reaching(self, energy: float) -> dict[str, int]:
        """The ranks that reach an energy with the fewest bytes; out of reach, every layer is at its cap."""
        return self._of_first(int(np.searchsorted(self._reached, energy * (1 - 1e-12))) + 1)

    def within(self, budget: int) -> dict[str, int]:
        """The ranks of the components that fit into so many bytes, the first that do not passed over."""
        start = int(np.searchsorted(self._spent, budget, side="right"))
        ranks = self._counts(start)
        left = budget - (int(self._spent[start - 1]) if start else 0)
        cheapest = int(self._per_rank.min()) if len(self.names) else 0
        full = np.zeros(len(self.names), dtype=bool)
        for n in self._layer[start:]:
            if left < cheapest:
                break
            if full[n]:
                continue
            cost = self._per_rank[n] + (self._fixed[n] if ranks[n] == 0 else 0)
            if cost > left:
                full[n] = True  # later components of this layer gain less and cost the same
                continue
            left -= int(cost)
            ranks[n] += 1
        return dict(zip(self.names, ranks.tolist(), strict=True))

    def steps(self, points: int) -> list[dict[str, int]]:
        """Ranks along the way from one component to all, at most `points` of them, evenly spread over the components."""
        last = len(self._layer) - 1
        return (
            [self._of_first(int(at) + 1) for at in np.unique(np.linspace(0, last, points).astype(np.int64))]
            if last >= 0
            else []
        )

    def _of_first(self, count: int) -> dict[str, int]:
        return dict(zip(self.names, self._counts(count).tolist(), strict=True))

    def _counts(self, count: int) -> NDArray[np.int64]:
        return np.bincount(self._layer[:count], minlength=len(self.names)).astype(np.int64)


def allocate(spectra: Mapping[str, Spectrum], *, budget: int | None = None, energy: float | None = None) -> dict[str, int]:
    """Ranks by layer: as much weighted energy as fits into `budget` bytes, or as few bytes as reach `energy`.

    Args:
        spectra: by layer name; the order breaks ties.
        budget: bytes that all layers may take together.
        energy: the energy to reach, in the unit of the spectra (||.||^2).

    Returns:
        layer name -> rank; 0 for layers that get nothing. With `energy` out of reach, every layer is at its cap.
    """
    if energy is not None:
        return Ranking(spectra, weighted=False).reaching(energy)
    return Ranking(spectra, weighted=True).within(budget or 0)


def size_curve(spectra: Mapping[str, Spectrum], points: int = 60) -> tuple[list[float], list[float]]:
    """Bytes and energy along the allocation that keeps most energy, for a curve of energy against size."""
    layer, gain, ratio = _components(spectra)
    order = np.argsort(-ratio, kind="stable")
    per_rank = np.array([row.bytes_per_rank for row in spectra.values()])
    sizes, energies = np.cumsum(per_rank[layer[order]]), np.cumsum(gain[order])
    at = np.unique(np.linspace(0, len(order) - 1, points).astype(np.int64)) if len(order) else np.zeros(0, np.int64)
    return sizes[at].astype(float).tolist(), energies[at].tolist()


def _components(spectra: Mapping[str, Spectrum]) -> tuple[NDArray[np.int64], Energies, Energies]:
    """All components of all layers: layer number, energy, energy per byte."""
    gains: list[Any] = [row.energies[: row.cap] for row in spectra.values()]
    layer = np.repeat(np.arange(len(gains)), [len(gain) for gain in gains])
    gain = np.concatenate(gains) if gains else np.zeros(0)
    cost = np.array([row.bytes_per_rank for row in spectra.values()], dtype=np.float64)
    ratio = gain / cost[layer] if len(gain) else gain
    return layer, gain, ratio
