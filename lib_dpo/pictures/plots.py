"""The pictures of `diff`: where the UNet changed, how the spectrum falls, what a file of a given size keeps."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib_dpo.families.blocks import block_labels
from lib_dpo.files.atomic import write_bytes_atomic
from lib_dpo.operations.diff import DiffReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, SOFT, LINE = "#1f2933", "#c2410c", "#64748b", "#e2e8f0"


@dataclass(frozen=True)
class Looks:
    """The colours of a picture: its paper, what stands on it, and the map of matplotlib for amounts, from none to most."""

    paper: str
    ink: str
    soft: str
    line: str
    accent: str
    nothing: str  # where there is no weight
    amounts: str


LIGHT = Looks("#ffffff", INK, SOFT, LINE, ACCENT, "#f1f5f9", "YlOrRd")
DARK = Looks("#14191f", "#e5e9ee", "#a3adba", "#334155", "#fb923c", "#1d242c", "inferno")


def plot_diff(report: DiffReport, path: Path, *, dark: bool = False) -> None:
    """Write the picture of a pair as PNG: heat-map, and spectrum and size curve where the report has spectra.

    Args:
        dark: light ink on dark paper, for a dark page.

    Raises:
        OutputError: the picture cannot be written.
    """
    rows, looks = 2 if report.spectra else 1, DARK if dark else LIGHT
    figure = new_figure(12, 4.6 * rows)
    grid = figure.add_gridspec(rows, 2, height_ratios=[1, 0.9][:rows])
    heat = figure.add_subplot(grid[0, :])
    _heat_map(heat, figure, report, looks)
    if report.spectra:
        _spectrum(figure.add_subplot(grid[1, 0]), report, looks)
        _size_curve(figure.add_subplot(grid[1, 1]), report, looks)
    figure.suptitle(f"{report.tuned} minus {report.base}", fontsize=13, weight="bold")
    _colour(figure, looks)
    write_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, measures in inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG. Raises OutputError: it cannot be written."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": "sd-webui-dpo"})
    write_bytes_atomic(path, picture.getvalue())


def _colour(figure: Any, looks: Looks) -> None:
    """Give paper, frames, ticks, and whatever text has no colour of its own, theirs: no setting of matplotlib is touched."""
    from matplotlib.text import Text

    figure.set_facecolor(looks.paper)
    for axes in figure.axes:
        if not axes.images:
            axes.set_facecolor(looks.paper)
        axes.tick_params(which="both", colors=looks.ink)
        for spine in axes.spines.values():
            spine.set_edgecolor(looks.ink)
    for text in figure.findobj(Text):
        if text.get_color() == "black":
            text.set_color(looks.ink)


def _heat_map(axes: Axes, figure: Any, report: DiffReport, looks: Looks) -> None:
    labels = [name for name in block_labels(report.tally.architecture) if name in report.tally.blocks]
    heat = report.heat_map()
    kinds = list(heat)
    values = np.array([[100 * heat[kind].get(label, math.nan) for label in labels] for kind in kinds])
    image = axes.imshow(values, aspect="auto", cmap=looks.amounts, vmin=0)
    axes.set_facecolor(looks.nothing)
    axes.set_xticks(range(len(labels)), labels, rotation=90 if len(labels) > 16 else 0, fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
    axes.set_xticks(np.arange(-0.5, len(labels)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(kinds)), minor=True)
    axes.grid(which="minor", color=looks.paper, linewidth=1.5)
    axes.tick_params(which="both", length=0)
    verdict = f"{report.verdict.text} Noise floor {100 * report.tally.total.noise_floor:.2g} %."
    axes.set_title(f"Where it changed: size of the change in % of the weights\n{verdict}", fontsize=9.5, loc="left")
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.01)
    bar.set_label("% of the weights", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _spectrum(axes: Axes, report: DiffReport, looks: Looks) -> None:
    spectra = report.spectra
    assert spectra is not None, "called only with spectra"
    values = np.array(spectra.mean_spectrum)
    axes.loglog(np.arange(1, len(values) + 1), np.maximum(values, 1e-6), color=looks.accent, linewidth=2)
    for rank in (16, 64, 128):
        if rank < len(values):
            axes.axvline(rank, color=looks.soft, linewidth=0.8, linestyle=":")
            axes.annotate(
                f"rank {rank}", (rank, 1), xytext=(3, -4), textcoords="offset points", fontsize=7.5, color=looks.soft, va="top"
            )
    axes.set_xlabel("component", fontsize=9)
    axes.set_ylabel("singular value, first = 1", fontsize=9)
    axes.set_title("How the change is spread: mean spectrum of all layers", fontsize=10, loc="left")
    plain(axes, looks)


def _size_curve(axes: Axes, report: DiffReport, looks: Looks) -> None:
    spectra = report.spectra
    assert spectra is not None, "called only with spectra"
    best = 100 * np.array(spectra.energy_at_size)
    axes.plot(spectra.size_mb, best, color=looks.accent, linewidth=2, label="ranks chosen per layer, by energy")
    sizes, kept = np.array(spectra.size_mb_at_rank), 100 * np.array(spectra.energy_at_rank)
    grows = np.diff(sizes, prepend=0.0) > 0  # beyond the rank that the layers can have, all are one point
    shown = grows & (sizes <= max(spectra.size_mb, default=math.inf))
    axes.plot(sizes[shown], kept[shown], "o-", color=looks.soft, markersize=4, linewidth=1, label="the same rank everywhere")
    for rank, x, y in zip(np.array(spectra.ranks)[shown], sizes[shown], kept[shown], strict=True):
        if rank >= 16:
            axes.annotate(f"{rank}", (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7.5, color=looks.soft)
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.set_xlabel("size of the LoRA in MB (fp16)", fontsize=9)
    axes.set_ylabel("energy kept, %", fontsize=9)
    axes.set_title("What a LoRA of a given size keeps", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    plain(axes, looks)


def plain(axes: Axes, looks: Looks = LIGHT) -> None:
    """Small ticks, a light grid, no frame."""
    axes.tick_params(labelsize=8)
    axes.grid(which="major", color=looks.line, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
