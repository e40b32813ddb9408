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


def allocate(spectra: Mapping[str, Spectrum], *, budget: int | None = None, energy: float | None = None) -> dict[str, int]:
    """Ranks by layer: as much weighted energy as fits into `budget` bytes, or as few bytes as reach `energy`.

    Args:
        spectra: by layer name; the order breaks ties.
        budget: bytes that all layers may take together.
        energy: the energy to reach, in the unit of the spectra (||.||^2).

    Returns:
        layer name -> rank; 0 for layers that get nothing. With `energy` out of reach, every layer is at its cap.
    """
    names = list(spectra)
    layer, gain, ratio = _components(spectra)
    if energy is None:
        ratio = ratio * np.array([row.weight for row in spectra.values()])[layer]
    order = np.argsort(-ratio, kind="stable")
    ranks = np.zeros(len(names), dtype=np.int64)
    if energy is not None:
        reached = np.cumsum(gain[order])
        count = int(np.searchsorted(reached, energy * (1 - 1e-12))) + 1
        ranks += np.bincount(layer[order[:count]], minlength=len(names))
        return dict(zip(names, ranks.tolist(), strict=True))
    left = 0 if budget is None else budget
    per_rank = np.array([row.bytes_per_rank for row in spectra.values()])
    fixed = np.array([row.fixed_bytes for row in spectra.values()])
    full = np.zeros(len(names), dtype=bool)
    for n in layer[order]:
        if full[n]:
            continue
        cost = per_rank[n] + (fixed[n] if ranks[n] == 0 else 0)
        if cost > left:
            full[n] = True  # later components of this layer gain less and cost the same
            continue
        left -= cost
        ranks[n] += 1
    return dict(zip(names, ranks.tolist(), strict=True))


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
