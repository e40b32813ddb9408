"""What a pair's difference looks like: sizes per block and kind of layer, verdict, spectrum, size against fidelity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib_dpo.families.arch import Architecture
from lib_dpo.families.blocks import block_labels, block_of
from lib_dpo.families.layer_kinds import KINDS, kind_of
from lib_dpo.families.pruning import Blocks
from lib_dpo.maths.ranks import Spectrum, break_even_rank, size_curve
from lib_dpo.offsets.coverage import LeftOut, left_out
from lib_dpo.offsets.offset import Pair, blocks_in
from lib_dpo.offsets.prediction import Prediction, predictions
from lib_dpo.operations.measure import Row, Tally
from lib_dpo.operations.outlook.figures import Figures, measure_figures
from lib_dpo.operations.outlook.figures import Spectra as SpectraFigures
from lib_dpo.operations.verdict import Verdict, changed_text_encoders, right_base
from lib_dpo.progress import Progress

_CURVE_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_FP16 = 2
_SPECTRUM_POINTS = 64


@dataclass(frozen=True)
class Spectra:
    """Figures from the singular values of every layer; energies as shares of ||offset||^2 of what is extracted."""

    ranks: list[int]
    energy_at_rank: list[float]  # the optimum of a LoRA with this rank in every layer, capped as `extract` caps it
    size_mb_at_rank: list[float]  # fp16
    size_mb: list[float]  # along the optimal allocation of ranks
    energy_at_size: list[float]
    mean_spectrum: list[float]  # root mean square of sigma_i / sigma_1 over layers
    effective_rank: dict[str, float]  # by block: exp of the entropy of the energies (Roy & Vetterli 2007), mean

    def as_json(self) -> dict[str, Any]:
        """The figures that `diff` prints; the spectrum thinned to what a plot shows."""
        return {
            "rank": {"rank": self.ranks, "energy": self.energy_at_rank, "size_mb": self.size_mb_at_rank},
            "size": {"size_mb": self.size_mb, "energy": self.energy_at_size},
            "mean_spectrum": _thinned(self.mean_spectrum),
            "effective_rank": self.effective_rank,
        }


@dataclass(frozen=True)
class DiffReport:
    """The figures of a pair."""

    architecture: str
    base: str
    tuned: str
    tally: Tally
    verdict: Verdict
    kinds: dict[str, dict[str, Row]]  # kind of layer -> block -> sums
    largest: list[tuple[str, float]]  # canonical keys of the largest relative changes
    vae: str
    blocks: Blocks
    left_out: tuple[LeftOut, ...]
    predictions: Mapping[str, Prediction]
    spectra: Spectra | None

    def heat_map(self) -> dict[str, dict[str, float]]:
        """Relative change by kind of layer and block, in the order of the forward pass; kinds that changed only."""
        return _relative(self.tally.architecture, self.kinds)

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints, and those behind its picture."""
        labels = block_labels(self.tally.architecture)
        blocks = {name: self.tally.blocks[name].as_json() for name in labels if name in self.tally.blocks}
        return {
            "architecture": self.architecture,
            "base": self.base,
            "tuned": self.tuned,
            "verdict": self.verdict.as_json(),
            **self.tally.total.as_json(),
            "components": {name: row.as_json() for name, row in self.tally.components.items()},
            "changed_text_encoders": changed_text_encoders(self.tally),
            "blocks": blocks,
            "heat_map": self.heat_map(),
            "largest_relative_changes": [{"key": key, "relative_change": value} for key, value in self.largest],
            "vae": self.vae,
            "unet": self.blocks.text,
            "left_out": [row.as_json() for row in self.left_out],
            "prediction": {name: found.as_json() for name, found in self.predictions.items()},
            "spectra": self.spectra.as_json() if self.spectra else None,
        }


def diff(pair: Pair, *, spectra: bool = False, device: str = "auto", on_progress: Progress | None = None) -> DiffReport:
    """Measure a pair, tensor by tensor; with `spectra`, all singular values of every layer too (minutes for SDXL).

    Raises:
        NothingToDoError: base and tuned are equal.
        BadTensorError: NaN or Inf, by key.
        SettingError: a device that is not there.
    """
    return report_on(pair, measure_figures(pair, spectra=spectra, device=device, on_progress=on_progress))


def report_on(pair: Pair, figures: Figures) -> DiffReport:
    """The report on a pair whose figures are known: nothing but headers and a few small tensors is read."""
    tally = Tally(pair.architecture)
    relative: list[tuple[str, float]] = []
    for key, row in figures.rows.items():
        tally.add(key, row)
        relative.append((key, row.relative_change))
    relative.sort(key=lambda item: -item[1])
    return DiffReport(
        architecture=pair.architecture.name,
        base=pair.base.name,
        tuned=pair.tuned.name,
        tally=tally,
        verdict=right_base(pair, tally),
        kinds=_by_kind(pair.architecture, figures.rows),
        largest=relative[:10],
        vae=figures.vae,
        blocks=blocks_in(pair.base),
        left_out=left_out(pair),
        predictions=predictions(pair),
        spectra=_spectra(pair, figures.spectra) if figures.spectra else None,
    )


def heat_map_of(arch: Architecture, rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """As `DiffReport.heat_map`, of the rows of `Figures`, without the pair's files."""
    return _relative(arch, _by_kind(arch, rows))


def _by_kind(arch: Architecture, rows: Mapping[str, Row]) -> dict[str, dict[str, Row]]:
    """Sums by kind of layer and block."""
    kinds: dict[str, dict[str, Row]] = {kind: {} for kind in KINDS}
    for key, row in rows.items():
        block = block_of(arch, key)
        if block is not None:
            kinds[kind_of(key)].setdefault(block, Row()).add(row)
    return kinds


def _relative(arch: Architecture, kinds: Mapping[str, Mapping[str, Row]]) -> dict[str, dict[str, float]]:
    labels = block_labels(arch)
    return {
        kind: {name: rows[name].relative_change for name in labels if name in rows and rows[name].base}
        for kind, rows in kinds.items()
        if any(row.offset for row in rows.values())
    }


def _spectra(pair: Pair, known: SpectraFigures) -> Spectra:
    layers = [layer for layer in known.plans["portable"] if layer.kind == "pair"]
    rows: dict[str, Spectrum] = {}
    effective: dict[str, list[float]] = {}
    for layer in layers:
        energies = known.energies.get(layer.module.name)
        if energies is not None:
            rows[layer.module.name] = Spectrum(energies, _FP16 * sum(layer.matrix), 0, break_even_rank(*layer.matrix))
            effective.setdefault(block_of(pair.architecture, layer.module.key) or "", []).append(_effective_rank(energies))
    largest = max(min(layer.matrix) for layer in layers)
    ranks = [rank for rank in _CURVE_RANKS if rank <= largest]  # those that `extract` takes
    at_rank = [sum(float(s.energies[: min(rank, s.cap)].sum()) for s in rows.values()) / known.total for rank in ranks]
    sizes = [sum(s.bytes_per_rank * min(rank, s.cap) for s in rows.values()) / 1e6 for rank in ranks]
    curve = size_curve(rows)
    return Spectra(
        ranks=ranks,
        energy_at_rank=at_rank,
        size_mb_at_rank=sizes,
        size_mb=[size / 1e6 for size in curve[0]],
        energy_at_size=[value / known.total for value in curve[1]],
        mean_spectrum=_mean_spectrum(list(rows.values())),
        effective_rank={block: float(np.mean(values)) for block, values in effective.items()},
    )


def _effective_rank(energies: NDArray[np.float64]) -> float:
    shares = energies[energies > 0] / energies.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _thinned(spectrum: list[float]) -> dict[str, list[Any]]:
    """A spectrum at `_SPECTRUM_POINTS` components at most, numbered from 1 and evenly spread on a logarithmic axis."""
    last = max(1, len(spectrum))
    at = np.unique(np.geomspace(1, last, _SPECTRUM_POINTS).round().astype(np.int64))[: len(spectrum)].tolist()
    return {"component": at, "value": [spectrum[n - 1] for n in at]}


def _mean_spectrum(rows: list[Spectrum]) -> list[float]:
    """Root mean square over layers of the i-th singular value, the first as 1; layers that have no i-th count as 0."""
    total = np.zeros(max((len(row.energies) for row in rows), default=0))
    for row in rows:
        total[: len(row.energies)] += row.energies / row.energies[0]
    return [float(value) for value in np.sqrt(total / len(rows))]
