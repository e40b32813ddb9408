"""The picture of README's table "What a file of a given size keeps": docs/kept.png, from the table itself.

python -m tools.kept_picture [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from lib_dpo.pictures.plots import ACCENT, INK, LINE, SOFT, new_figure, write_figure

ROOT = Path(__file__).resolve().parent.parent
_HEAD = "| | SD 1.5: size |"
_COLOURS = {"fp16": SOFT, "fp8": ACCENT, "int8": INK, "float32": INK}


class Kept(NamedTuple):
    """One row: its words, and (MB, per cent) of the energy of SD 1.5 and of the function of the toy."""

    name: str
    energy: tuple[float, float]
    function: tuple[float, float]


def table(readme: str) -> list[Kept]:
    """The rows of the table in README's text."""
    lines = readme[readme.index(_HEAD) :].split("\n\n")[0].splitlines()[2:]
    rows = []
    for line in lines:
        name, size, energy, toy_size, _, function, _ = (cell.strip() for cell in line.strip("|").split("|"))
        numbers = [float(cell.split()[0]) for cell in (size, energy, toy_size, function)]
        rows.append(Kept(name.replace("`", ""), (numbers[0], numbers[1]), (numbers[2], numbers[3])))
    return rows


def draw(rows: list[Kept], path: Path) -> None:
    """Two panels of points, size on a logarithmic scale."""
    figure = new_figure(11, 4.2)
    panels = (
        ("SD 1.5, a flat change: energy kept, in %", "energy", (80, 9000), (100, 300, 1000, 3000)),
        ("the toy: function kept, in %", "function", (0.3, 20), (0.5, 2, 8)),
    )
    for n, (title, field, limits, ticks) in enumerate(panels):
        axes = figure.add_subplot(1, 2, n + 1)
        for row in rows:
            x, y = getattr(row, field)
            colour = next(colour for mark, colour in _COLOURS.items() if mark in row.name)
            axes.plot(x, y, marker="D" if "size" in row.name else "o", markersize=8, color=colour, linestyle="none")
            whole = y > 97
            axes.annotate(
                row.name.replace("--", "")
                .replace("precision ", "")
                .replace("form ", "")
                .replace(", ", "\n" if whole else ", "),
                (x, y),
                xytext=(0, -34) if whole else (9, -4),
                textcoords="offset points",
                ha="center" if whole else "left",
                fontsize=9,
                color=colour,
            )
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g} MB" for tick in ticks])
        axes.set_xlim(*limits)
        axes.set_ylim(0, 108)
        axes.minorticks_off()
        axes.grid(color=LINE)
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", fontsize=11)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    write_figure(figure, path)


if __name__ == "__main__":
    draw(
        table((ROOT / "README.md").read_text(encoding="utf-8")),
        Path(sys.argv[1] if sys.argv[1:] else ROOT / "docs" / "kept.png"),
    )
