"""A comparison on the page: the verdict, all pictures as cells that open large, the curve of the effect, before and after."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from lib_dpo.offsets.lora.unplaced import twin_lines, unplaced_lines
from lib_dpo.webui.results import Comparison
from lib_dpo.webui.tab import markup
from lib_dpo.webui.tab.markup import Mood

if TYPE_CHECKING:
    from PIL.Image import Image

    from lib_dpo.pictures.effects import Effect, EffectReport
    from lib_dpo.pictures.function import FunctionReport
    from lib_dpo.pictures.plan import Cell, Images, Plan

_MOODS: dict[str, Mood] = {"none": "doubt", "subtle": "good", "strong": "good", "broken": "bad"}
_WORDS = {"none": "No visible effect", "subtle": "A subtle effect", "strong": "A strong effect", "broken": "Too much"}
_JPEG_QUALITY = 92
_WHILE_DRAWING = 192  # pixels of the longer side: all cells are sent again with each new one
_WIDE, _HIGH, _MARGIN = 320, 120, 28  # of the curve, in SVG's own units


def report_html(found: Comparison) -> str:
    """The verdict, what it rests on, and what is to be known of model and file."""
    report = found.report
    head = ("", "Effect", "Mean", "Range", "Same structure")
    rows = [_row(effect, report) for effect in report.effects]
    caption = "Differences in grey levels of 255, against the untouched model"
    offsets = found.offsets
    known = [
        *found.remarks,
        *(line for offset in offsets for line in twin_lines(offset.twins) + unplaced_lines(offset.unmatched)),
    ]
    body = curve_html(report) + markup.table(head, rows, caption) + markup.note(report.caveat)
    verdict = markup.card(_WORDS[report.level], report.text, *markup.sentences(known), mood=_MOODS[report.level], body=body)
    return verdict + (function_html(found.function, offsets[0].name, found.whole) if found.function else "")


def function_html(kept: FunctionReport, name: str, whole: str) -> str:
    """How much of the whole offset's effect on the predictions a file keeps."""
    interval = kept.interval
    between = f" (95 %: {markup.percent(interval[0])} to {markup.percent(interval[1])})" if interval else ""
    return markup.card(
        f"{name} keeps {markup.percent(kept.kept)} of the function",
        f"Of what {whole} changes in this model's predictions, {name} reproduces {markup.percent(kept.kept)}{between}.",
        f"Measured at strength 1 and {kept.timesteps} steps, without guidance, over {len(kept.prompts)} prompts and "
        f"{len(kept.seeds)} seeds; the whole offset changes the predictions by {markup.percent(kept.change)} of their size.",
    )


def _row(effect: Effect, report: EffectReport) -> tuple[str, ...]:
    start = " ← start here" if effect.variant == report.suggested else ""
    return (
        f"{effect.variant.label}{start}",
        effect.text,
        f"{effect.difference:.1f}",
        f"{effect.least:.1f} to {effect.most:.1f}",
        f"{100 * effect.structure:.0f} %",
    )


def curve_html(report: EffectReport) -> str:
    """Strength against mean difference as an SVG in the page's colours; nothing for fewer than three strengths."""
    points = sorted((effect.variant.value, effect) for effect in report.effects if isinstance(effect.variant.value, float))
    if len(points) < 3:
        return ""
    left, right = min(0.0, points[0][0]), max(0.0, points[-1][0])
    top = max(effect.difference for _, effect in points) or 1.0

    def place(strength: float, difference: float) -> tuple[float, float]:
        across = _MARGIN + (strength - left) / (right - left) * (_WIDE - 2 * _MARGIN)
        return across, _HIGH - _MARGIN - difference / top * (_HIGH - 2 * _MARGIN)

    known = sorted([(0.0, 0.0), *((strength, effect.difference) for strength, effect in points)])
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*each) for each in known))
    marks = "".join(_mark(place(strength, effect.difference), effect, report) for strength, effect in points)
    ground = _HIGH - _MARGIN
    return (
        f'<svg class="dpo-effects" viewBox="0 0 {_WIDE} {_HIGH}" role="group" aria-label="Effect at each strength">'
        f'<line class="dpo-axis" x1="{_MARGIN}" x2="{_WIDE - _MARGIN}" y1="{ground}" y2="{ground}"/>'
        f'<polyline points="{line}"/>{marks}</svg>'
    )


def _mark(at: tuple[float, float], effect: Effect, report: EffectReport) -> str:
    x, y = at
    said = f"strength {effect.variant.value:g}: {effect.difference:.1f} grey levels, {effect.text}"
    chosen = " dpo-chosen" if effect.variant == report.suggested else ""
    return (
        f'<g class="dpo-point{chosen}" tabindex="0" role="img" aria-label="{markup.text(said)}">'
        f'<title>{markup.text(said)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        f'<text x="{x:.1f}" y="{y - 8:.1f}">{effect.difference:.1f}</text>'
        f'<text x="{x:.1f}" y="{_HIGH - 12}">{effect.variant.value:g}</text></g>'
    )


# ---- pictures ----


def cells_html(plan: Plan, images: Images, *, done: bool = True) -> str:
    """All pictures, a row for each prompt and seed; those that are not made yet are empty frames.

    A press on one opens it large, with the untouched one of its row under the line (javascript/dpo.js).

    Args:
        done: whether all are made; until then they are sent small.
    """
    from lib_dpo.pictures.plan import Cell

    longest = 0 if done else _WHILE_DRAWING
    head = "".join(f'<th scope="col">{markup.text(variant.label)}</th>' for variant in plan.variants)
    lines = []
    for prompt, seed in plan.rows:
        row = [Cell(prompt, seed, variant) for variant in plan.variants]
        shown = "".join(f"<td>{_cell(cell, images, longest, done=done)}</td>" for cell in row)
        lines.append(f'<tr><th scope="row">{markup.text(prompt)}<small>seed {seed}</small></th>{shown}</tr>')
    said = (
        "All pictures; press one to see it large"
        if done
        else f"Picture {min(len(images) + 1, len(plan.cells))} of {len(plan.cells)}"
    )
    return (
        f'<div class="dpo-scroll" tabindex="0"><table class="dpo-cells"><caption>{said}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(cell: Cell, images: Images, longest: int, *, done: bool) -> str:
    image = images.get(cell)
    if image is None:
        return '<span class="dpo-empty" aria-label="not made yet"></span>'
    said = f"{cell.variant.label}, seed {cell.seed}: {cell.prompt}"
    shown = f'<img src="{_data(image, longest)}" alt="{markup.text(said)}">'
    return f'<button type="button" class="dpo-cell" title="Open large">{shown}</button>' if done else shown


def wipe_html(before: Image, after: Image, label: str) -> str:
    """Two pictures over each other, and a range that moves the line between them: by mouse, finger and arrow keys.

    It opens where they differ most: in the middle there may be nothing to see.
    """
    from lib_dpo.pictures.drawing import where_most

    at = round(100 * where_most(before, after))
    return (
        f'<div class="dpo-wipe" style="--dpo-at:{at}%"><img src="{_data(before)}" alt="Before: the untouched model">'
        f'<img src="{_data(after)}" alt="After: {markup.text(label)}">'
        f'<span class="dpo-tag dpo-left">untouched</span><span class="dpo-tag dpo-right">{markup.text(label)}</span>'
        f'<input type="range" min="0" max="100" value="{at}" aria-label="Line between before, left, and after, right"></div>'
        + markup.note("Where they differ:")
    )


def _data(image: Image, longest: int = 0) -> str:
    """A picture for the page itself.

    Args:
        longest: pixels of its longer side at most; 0 for all of it.
    """
    if longest:
        image = image.copy()
        image.thumbnail((longest, longest))
    data = io.BytesIO()
    image.convert("RGB").save(data, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
