"""Charts drawn in a page: the curve of sizes with a marked point, the spectrum, the heat map. Figures in, markup out.

Lines are SVG that stretches with the page, points and words are HTML above it: sharp at any width, in letters of one size.
Points can be reached with the mouse and the Tab key. Colours are those of the page, by custom properties of its style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_MB = 1e6
_SIZES = (1, 3, 10, 30, 100, 300, 1000, 3000)  # MB at which the curve has a line
_TINY = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # the same for tiny models
_SHARES = (0, 25, 50, 75, 100)


@dataclass(frozen=True)
class Point:
    """A place on a chart, in its own units, and what is said of it."""

    x: float
    y: float
    words: str = ""


def size_curve(curve: Sequence[Point], dots: Sequence[Point], marked: Point | None, caption: str) -> str:
    """Energy kept against the size of the file, sizes on a logarithmic axis.

    Args:
        curve: x in bytes, y a share of 0 to 1; rising. dots: those of its points that can be pointed at.
        marked: the file that is chosen now, on the curve or beside it.
    """
    sizes = [point.x for point in (*curve, *([marked] if marked else []))]
    low, high = min(sizes), max(sizes)
    across = _logarithmic(low / 1.15, max(high, low * 1.5) * 1.1)
    ticks = [(across(mb * _MB), _size_words(mb)) for mb in (*_TINY, *_SIZES) if low <= mb * _MB <= high * 1.05]
    shares = [(float(share), f"{share} %") for share in _SHARES]
    line = [(across(point.x), 100 * point.y) for point in curve]
    guide = [] if not marked else [(across(marked.x), 0.0), (across(marked.x), 100 * marked.y), (0.0, 100 * marked.y)]
    places = [(across(dot.x), 100 * dot.y, dot.words, "dpo-dot-small") for dot in dots]
    if marked:
        places.append((across(marked.x), 100 * marked.y, marked.words, "dpo-dot-marked"))
    return _chart(caption, line, guide, places, ticks, shares)


def spectrum_curve(values: Sequence[float], caption: str) -> str:
    """How singular values fall, both axes logarithmic; values as shares of the first."""
    last = len(values)
    across = _logarithmic(1, max(2, last))
    floor = min(0.1, max(1e-4, min((value for value in values if value > 0), default=1e-4)))
    up = _logarithmic(floor, 1)
    line = [(across(number), up(max(value, floor))) for number, value in enumerate(values, 1)]
    ticks = [(across(number), f"{number}") for number in (1, 10, 100, 1000) if number <= last]
    rows = [(up(value), f"{value:g}") for value in (1, 0.1, 0.01, 0.001) if value >= floor]
    dots = [(across(n), up(max(values[n - 1], floor)), f"component {n}: {values[n - 1]:.2g} of the first", "dpo-dot-small")
            for n in (1, 4, 16, 64, 128, 256) if n <= last]  # fmt: skip
    return _chart(caption, line, [], dots, ticks, rows)


def heat_map(rows: Mapping[str, Mapping[str, float]], columns: Iterable[str], caption: str) -> str:
    """Shares by kind of layer (rows) and block (columns) as a table of shades; blocks without that kind stay empty."""
    columns = list(columns)
    most = max((value for row in rows.values() for value in row.values()), default=0.0) or 1.0
    head = "".join(f'<th scope="colgroup" colspan="{count}">{escape(name)}</th>' for name, count in groups(columns))
    lines = "".join(
        f'<tr><th scope="row">{escape(kind)}</th>{"".join(_cell(kind, name, row.get(name), most) for name in columns)}</tr>'
        for kind, row in rows.items()
    )
    return (
        f'<table class="dpo-heat"><caption>{escape(caption)}; the darkest is {100 * most:.2g} %</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table>"
    )


def _cell(kind: str, block: str, value: float | None, most: float) -> str:
    if value is None:
        return "<td></td>"
    words = escape(f"{block}, {kind}: {100 * value:.2g} %")
    return f'<td class="dpo-shade" style="--dpo-heat:{100 * value / most:.0f}%" title="{words}"></td>'


def groups(columns: Sequence[str]) -> list[tuple[str, int]]:
    """Blocks whose names differ in their number alone, as one heading."""
    found: list[tuple[str, int]] = []
    for name in columns:
        stem = name.rstrip("0123456789")
        if found and found[-1][0] == stem:
            found[-1] = (stem, found[-1][1] + 1)
        else:
            found.append((stem, 1))
    return found


def _chart(
    caption: str,
    line: Sequence[tuple[float, float]],
    guide: Sequence[tuple[float, float]],
    dots: Sequence[tuple[float, float, str, str]],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
) -> str:
    """All places in per cent of the plot, from its lower left corner."""
    grid = "".join(f"M0 {100 - y:.2f}H100" for y, _ in y_ticks) + "".join(f"M{x:.2f} 0V100" for x, _ in x_ticks)
    words = "".join(f'<span class="dpo-tick-y" style="bottom:{y:.2f}%">{escape(text)}</span>' for y, text in y_ticks)
    words += "".join(f'<span class="dpo-tick-x" style="left:{x:.2f}%">{escape(text)}</span>' for x, text in x_ticks)
    guides = f'<polyline class="dpo-guide" points="{_points(guide)}"/>' if guide else ""
    return (
        f'<figure class="dpo-chart"><figcaption>{escape(caption)}</figcaption><div class="dpo-plot">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"><path class="dpo-grid" d="{grid}"/>{guides}'
        f'<polyline class="dpo-curve" points="{_points(line)}"/></svg>{words}{"".join(map(_dot, dots))}</div></figure>'
    )


def _dot(dot: tuple[float, float, str, str]) -> str:
    x, y, words, kind = dot
    side = "dpo-tip-before" if x > 50 else "dpo-tip-after"
    place = f"left:{x:.2f}%;bottom:{y:.2f}%"
    return (
        f'<span class="dpo-dot-on {kind}" tabindex="0" role="img" aria-label="{escape(words)}" style="{place}">'
        f'<span class="dpo-tip {side}" aria-hidden="true">{escape(words)}</span></span>'
    )


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{100 - y:.2f}" for x, y in places)


def _logarithmic(low: float, high: float) -> Callable[[float], float]:
    """Per cent of the way from low to high."""
    return lambda value: 100 * math.log(max(value, low) / low) / math.log(high / low)


def _size_words(mb: float) -> str:
    if mb >= 1000:
        return f"{mb / 1000:g} GB"
    return f"{mb:g} MB" if mb >= 1 else f"{1000 * mb:g} kB"
