"""The picture of a study: adherence against strength, and what LoRAs keep of the gain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib_dpo.plots import ACCENT, INK, SOFT, new_figure, plain, write_figure
from lib_dpo.toy.study import FULL, Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLATEAU, _LORA = "#fef3c7", "#0f766e"


def plot_study(findings: Findings, path: Path) -> None:
    """Write the curve and, where LoRAs were tried, their shares of the gain, as PNG.

    Raises:
        OutputError: the picture cannot be written.
    """
    figure = new_figure(12, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.75, 1])
    _curve(left, findings)
    _loras(right, findings)
    n = findings.points[0].n
    title = f"Do the pictures show what their prompts say? {n} pictures of held-out prompts a point, toy model"
    figure.suptitle(title, fontsize=12, color=INK, weight="bold")
    write_figure(figure, path)


def _curve(axes: Axes, findings: Findings) -> None:
    points = findings.points
    strengths = np.array([one.strength for one in points])
    mean, low, high = (100 * np.array([getattr(one, name) for one in points]) for name in ("mean", "low", "high"))
    first, last = findings.plateau
    reach = 0.02 * (strengths[-1] - strengths[0])  # a plateau of one strength is still to be seen
    axes.axvspan(first - reach, last + reach, color=_PLATEAU, linewidth=0, label="not told apart from the best")
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
    """Shares of the gain; where the gain is not sure, adherence itself."""
    axes.set_xlabel("rank of the LoRA, at strength 1", fontsize=9)
    places = np.arange(len(findings.loras))
    axes.set_xticks(places, [str(one.rank) for one in findings.loras])
    shares = [one.share for one in findings.loras if one.share]
    if len(shares) == len(findings.loras):
        rows = np.array(shares) * 100
        axes.axhline(100, color=ACCENT, linewidth=1, linestyle="--", label="full change")
        axes.plot(
            places, [100 * one.energy_kept for one in findings.loras], "s", color=SOFT, markersize=5,
            markerfacecolor="white", label="energy kept",
        )  # fmt: skip
        axes.set_ylabel("% of the full change", fontsize=9)
        axes.set_title("What a LoRA keeps of the gain", fontsize=10, loc="left")
        label, floor, top = "gain kept, 95 % intervals", min(0.0, *rows[:, 1]), max(110.0, *(rows[:, 2] + 5))
    else:
        points = [one.point for one in findings.loras]
        rows = 100 * np.array([(one.mean, one.low, one.high) for one in points]).reshape(-1, 3)
        full = next(one.mean for one in findings.points if one.strength == FULL)
        axes.axhline(100 * full, color=ACCENT, linewidth=1, linestyle="--", label="full change")
        axes.set_ylabel("pictures that show all their prompt names, %", fontsize=9)
        axes.set_title("LoRAs (no sure gain to keep a share of)", fontsize=10, loc="left")
        label, floor, top = "LoRA, 95 % intervals", 0.0, 100.0
    axes.errorbar(
        places, rows[:, 0], yerr=np.array([rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]]), fmt="o", color=_LORA,
        markersize=6, elinewidth=1.2, capsize=4, label=label,
    )  # fmt: skip
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_ylim(floor, top)
    axes.legend(fontsize=8, frameon=False, loc="best")
    plain(axes)
