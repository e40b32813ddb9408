"""The picture of a study: adherence against strength, and what LoRAs keep of the gain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib_dpo.pictures.plots import ACCENT, INK, SOFT, new_figure, plain, write_figure
from lib_dpo.toy.study import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLATEAU, _LORA = "#fef3c7", "#0f766e"


def plot_study(findings: Findings, path: Path, *, study: Findings | None = None) -> None:
    """Write what became of the pictures and, if so many can tell them apart, the curve and the LoRAs' shares, as PNG.

    Args:
        study: what many more pictures of the same model found: plotted where these cannot tell.

    Raises:
        OutputError: the picture cannot be written.
    """
    figure = new_figure(12, 5.2)
    told = findings if findings.told or not study else study
    panels = [(1.75, _curve), (1.0, _loras)][: 2 if told.loras else 1]
    turned, *others = figure.subplots(1, 1 + len(panels), width_ratios=[0.7, *(width for width, _ in panels)])
    _turned(turned, findings)
    for axes, (_, draw) in zip(others, panels, strict=True):
        if told.told:
            draw(axes, told)
        else:
            _untold(axes, told)
    n = findings.points[0].n
    title = f"Do the pictures show what their prompts say? {n} pictures of held-out prompts a point, toy model"
    if told is study:
        title = f"Do the pictures show what their prompts say? Left: these {n} pictures of a toy model; right: its study of "
        title += f"{study.points[0].n} a point"
    figure.suptitle(title, fontsize=11.5, color=INK, weight="bold")
    write_figure(figure, path)


def _turned(axes: Axes, findings: Findings) -> None:
    bars = axes.bar([0, 1], [findings.became_right, findings.became_wrong], color=[_LORA, ACCENT], width=0.6)
    axes.bar_label(bars, fontsize=10)
    axes.set_xticks([0, 1], ["became\nright", "became\nwrong"])
    axes.set_xlim(-0.6, 1.6)
    axes.set_ylim(0, 1.15 * max(findings.became_right, findings.became_wrong, 4))
    axes.locator_params(axis="y", integer=True)
    axes.set_ylabel(f"of {findings.points[0].n} pictures", fontsize=9)
    axes.set_title("From strength 0 to 1", fontsize=10, loc="left")
    plain(axes)
    axes.set_axisbelow(True)


def _untold(axes: Axes, findings: Findings) -> None:
    """In place of figures that would be chance."""
    axes.set_axis_off()
    text = f"{findings.points[0].n} pictures cannot tell\nthese apart: nothing is plotted"
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=10, color=SOFT, transform=axes.transAxes)


def _curve(axes: Axes, findings: Findings) -> None:
    points = findings.points
    strengths = np.array([one.strength for one in points])
    mean, low, high = (100 * np.array([getattr(one, name) for one in points]) for name in ("mean", "low", "high"))
    first, last = findings.plateau
    reach = 0.02 * (strengths[-1] - strengths[0])  # a plateau of one strength is still to be seen
    axes.axvspan(first - reach, last + reach, color=_PLATEAU, linewidth=0, label="best, and not told apart from it")
    axes.axhline(mean[0], color=SOFT, linewidth=1, linestyle="--", label="without DPO")
    axes.axvline(findings.suggested, color=INK, linewidth=1, linestyle=":", label=f"suggested strength, {findings.suggested:g}")
    axes.fill_between(strengths, low, high, color=ACCENT, alpha=0.15, linewidth=0)
    axes.errorbar(
        strengths, mean, yerr=np.array([mean - low, high - mean]), color=ACCENT, marker="o", markersize=5, linewidth=2,
        elinewidth=1, capsize=3, label="full change, 95 % intervals",
    )  # fmt: skip
    axes.set_xlabel("strength of the offset", fontsize=9)
    axes.set_ylabel("pictures that show all their prompt names, %", fontsize=9)
    axes.set_xticks(np.arange(0, strengths[-1] + 0.1, 0.5))
    axes.set_ylim(0, min(100.0, 1.4 * high.max()))  # room for the legend
    axes.set_title("Adherence against strength", fontsize=10, loc="left")
    axes.legend(fontsize=8, facecolor="white", framealpha=1, edgecolor="none", loc="best")  # the band runs behind it
    plain(axes)


def _loras(axes: Axes, findings: Findings) -> None:
    """Shares of the gain, of the ranks whose share so many pictures tell; the energy kept, of all."""
    axes.set_xlabel("rank of the LoRA, at strength 1", fontsize=9)
    places = np.arange(len(findings.loras))
    axes.set_xticks(places, [str(one.rank) for one in findings.loras])
    axes.axhline(100, color=ACCENT, linewidth=1, linestyle="--", label="full change")
    axes.plot(
        places, [100 * one.energy_kept for one in findings.loras], "s", color=SOFT, markersize=5,
        markerfacecolor="white", label="energy kept",
    )  # fmt: skip
    axes.set_ylabel("% of the full change", fontsize=9)
    told = [(n, one.share) for n, one in enumerate(findings.loras) if one.share and one.share.is_told]
    title, floor, top = "What a LoRA keeps (gain: not told)", 0.0, 110.0
    if told:
        rows = 100 * np.array([share for _, share in told])
        axes.errorbar(
            [n for n, _ in told], rows[:, 0], yerr=np.array([rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]]), fmt="o",
            color=_LORA, markersize=6, elinewidth=1.2, capsize=4, label="gain kept, 95 % intervals",
        )  # fmt: skip
        title, floor, top = "What a LoRA keeps of the gain", min(0.0, *rows[:, 1]), max(110.0, *(rows[:, 2] + 5))
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_ylim(floor, 1.25 * top)  # room for the legend
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    plain(axes)
