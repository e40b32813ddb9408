"""Columns drawn in a page: by block, by rank; and a figure with its error on a line. Figures in, markup out, as curve.py.

Columns are SVG that stretches with the page, words are HTML beside it. What a column stands for is its title, for the mouse;
pages have the same figures as a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from lib_dpo.pictures.curve import groups

_MOST_COLUMNS = 16  # of a histogram
_GAP = 0.2  # of a column's place that stays empty
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


def block_columns(rows: Mapping[str, Sequence[float]], series: Sequence[str], caption: str) -> str:
    """Shares by block, such as 0.05 for 5 %, a column for each series beside each other.

    Args:
        rows: values of all series by block, in the order of the model.
    """
    names = list(rows)
    top, ticks = _scale(100 * max((value for values in rows.values() for value in values), default=0.0))
    boxes = []
    for place, (name, values) in enumerate(rows.items()):
        for number, (what, value) in enumerate(zip(series, values, strict=True)):
            words = f"{name}, {what}: {100 * value:.3g} %"
            boxes.append(_box(place, len(names), number, len(series), 100 * value / top, words))
    below, start = [], 0
    for stem, count in groups(names):
        below.append(((start + count / 2) * 100 / len(names), stem))
        start += count
    return _chart(_with_legend(caption, series), boxes, below, [(100 * tick / top, f"{tick:g} %") for tick in ticks])


def rank_columns(counts: Mapping[int, int], caption: str) -> str:
    """How many layers have which rank; neighbouring ranks share a column where there are many."""
    low, high = min(counts), max(counts)
    width = max(1, math.ceil((high - low + 1) / _MOST_COLUMNS)) if len(counts) > _MOST_COLUMNS else 0
    bins: dict[str, int] = {}
    if width:
        for start in range(low, high + 1, width):
            last = min(start + width - 1, high)
            name = f"{start}" if last == start else f"{start}-{last}"
            bins[name] = sum(count for rank, count in counts.items() if start <= rank <= last)
    else:
        bins = {f"{rank}": counts[rank] for rank in sorted(counts)}
    top, ticks = _scale(max(bins.values()))
    boxes = [
        _box(place, len(bins), 0, 1, count / top, f"rank {name}: {count} layers")
        for place, (name, count) in enumerate(bins.items())
    ]
    every = max(1, math.ceil(len(bins) / 6))  # names that fit on a phone
    below = [((place + 0.5) * 100 / len(bins), name) for place, name in enumerate(bins) if place % every == 0]
    return _chart(escape(caption), boxes, below, [(100 * tick / top, f"{tick:g}") for tick in ticks if tick == int(tick)])


def strength_line(value: float, error: float, caption: str) -> str:
    """A strength with its error on a line from 0, the base, to 1, the whole offset."""
    low, high = min(-0.25, value - 1.5 * error), max(1.25, value + 1.5 * error)

    def across(strength: float) -> float:
        return 100 * (strength - low) / (high - low)

    words = f"strength {value:+.2f}, plus or minus {error:.2f}"
    ticks = [(across(0), "0"), (across(1), "1")]
    grid = "".join(f"M{x:.2f} 0V100" for x, _ in ticks)
    below = "".join(f'<span class="dpo-tick-x" style="left:{x:.2f}%">{text}</span>' for x, text in ticks)
    left, middle, right = (across(each) for each in (value - error, value, value + error))
    return (
        f'<figure class="dpo-chart"><figcaption>{escape(caption)}</figcaption><div class="dpo-plot dpo-low">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"><path class="dpo-grid" d="M0 50H100{grid}"/>'
        f'<path class="dpo-curve" d="M{left:.2f} 50H{right:.2f}M{left:.2f} 25V75M{right:.2f} 25V75"/></svg>{below}'
        f'<span class="dpo-dot-on dpo-dot-marked" tabindex="0" role="img" aria-label="{words}" style="left:{middle:.2f}%;'
        f'bottom:50%"></span></div></figure>'
    )


def _box(place: int, places: int, number: int, count: int, share: float, words: str) -> str:
    """One column; `share` is its height, 0 to 1."""
    wide = 100 / places
    each = wide * (1 - _GAP) / count
    left, height = wide * (place + _GAP / 2) + each * number, 100 * min(1.0, max(0.0, share))
    return (
        f'<rect class="dpo-column-{number}" x="{left:.2f}" y="{100 - height:.2f}" width="{each:.2f}" height="{height:.2f}">'
        f"<title>{escape(words)}</title></rect>"
    )


def _scale(most: float) -> tuple[float, list[float]]:
    """A round number at or above the largest value, and up to five ticks on the way there."""
    if most <= 0:
        return 1.0, [0.0]
    unit = 10.0 ** math.floor(math.log10(most / 4))
    step = next(nice * unit for nice in _NICE if nice * unit >= most / 4 * (1 - 1e-9))
    count = math.ceil(most / step - 1e-9)
    return step * count, [round(step * n, 12) for n in range(count + 1)]


def _with_legend(caption: str, series: Sequence[str]) -> str:
    if len(series) < 2:
        return escape(caption)
    keys = "".join(f'<span class="dpo-key dpo-key-{n}">{escape(name)}</span>' for n, name in enumerate(series))
    return f"{escape(caption)} {keys}"


def _chart(caption: str, boxes: Sequence[str], below: Sequence[tuple[float, str]], beside: Sequence[tuple[float, str]]) -> str:
    """`caption` is markup already; places in per cent of the plot, from its lower left corner."""
    grid = "".join(f"M0 {100 - y:.2f}H100" for y, _ in beside)
    words = "".join(f'<span class="dpo-tick-y" style="bottom:{y:.2f}%">{escape(text)}</span>' for y, text in beside)
    words += "".join(f'<span class="dpo-tick-x" style="left:{x:.2f}%">{escape(text)}</span>' for x, text in below)
    return (
        f'<figure class="dpo-chart"><figcaption>{caption}</figcaption><div class="dpo-plot dpo-low-columns">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img"><path class="dpo-grid" d="{grid}"/>{"".join(boxes)}'
        f"</svg>{words}</div></figure>"
    )
