"""The third page: the same pictures at several strengths, the untouched model first, and how strong the effect is."""

from __future__ import annotations

import base64
import io
from functools import partial
from typing import TYPE_CHECKING, Any

from lib_dpo.errors import NotFoundError, SettingError
from lib_dpo.offsets.lora.unplaced import twin_lines, unplaced_lines
from lib_dpo.settings import FIELDS
from lib_dpo.webui.results import Comparison
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup, parts
from lib_dpo.webui.tab.markup import Mood
from lib_dpo.webui.tab.parts import Tab
from lib_dpo.webui.tab.standing import about

if TYPE_CHECKING:
    from PIL.Image import Image

    from lib_dpo.offsets.offset import Offset
    from lib_dpo.pictures.effects import EffectReport
    from lib_dpo.pictures.plan import Cell

_MOODS: dict[str, Mood] = {"none": "doubt", "subtle": "good", "strong": "good", "broken": "bad"}
_WORDS = {"none": "No visible effect", "subtle": "A subtle effect", "strong": "A strong effect", "broken": "Too much"}
_JPEG_QUALITY = 92
_LONGEST = 40  # letters of a prompt in a list
_HINT = (
    "One picture per prompt, seed and strength, and the untouched model beside them. What you see is what a LoRA or bake of "
    "that strength will do to your model."
)


def page(tab: Tab) -> None:
    """Controls at the left, pictures at the right."""
    import gradio as gr

    with parts.page("Compare", "dpo_compare"), gr.Row(elem_classes=["dpo-page"]):
        with gr.Column(elem_classes=["dpo-controls"]):
            offset = parts.file_dropdown(
                tab, parts.offsets, likely=parts.named_dpo, label="Offset to compare", elem_id="dpo_compare_offset",
                info="A LoRA or an offset file",
            )  # fmt: skip
            strengths = gr.Textbox(
                value="0.5, 1, 1.5", label="Strengths", lines=1, max_lines=1, elem_id="dpo_compare_strengths",
                info="Numbers, or a range such as 0-2 (+0.5)",
            )  # fmt: skip
            prompts = gr.Textbox(
                label="Prompts", lines=3, info="One per line; name several things in each", elem_id="dpo_compare_prompts"
            )
            negative = gr.Textbox(label="Negative prompt", lines=1, elem_id="dpo_compare_negative")
            take = gr.Button("Take from txt2img", elem_id="dpo_compare_take", visible=tab.session.in_webui)
            seeds, *rest = _picture_controls(tab.session)
            blocks = rest.pop()
            with gr.Row(elem_classes=["dpo-buttons"]):
                go = gr.Button("Compare", variant="primary", elem_id="dpo_compare_go")
                parts.interrupt_button(tab, "dpo_compare_interrupt")
        with gr.Column(elem_classes=["dpo-answers"]):
            place = parts.results(tab, "dpo_compare_result", _HINT, keep=True)
            grid = parts.picture(label="All pictures", visible=False, elem_id="dpo_compare_grid")
            pair = parts.unsaved(
                gr.Dropdown(
                    choices=[], allow_custom_value=True, label="Before and after", visible=False, elem_id="dpo_compare_pair",
                    info="Move the line over the picture with the mouse, a finger or the arrow keys",
                )
            )  # fmt: skip
            wipe = parts.unsaved(gr.HTML("", elem_id="dpo_compare_wipe"))
            where = parts.picture(label="Where they differ", visible=False, elem_id="dpo_compare_where")
            made = gr.State(None)
    for unsaved in (prompts, negative, seeds, blocks, rest[2]):
        parts.unsaved(unsaved)
    session = tab.session
    parts.start(
        tab, go, partial(compare, session), [offset, strengths, prompts, negative, seeds, *rest, blocks],
        [place, grid, pair, wipe, where, made],
        about=lambda offset, *_: about(session, session.library.offset(offset), model=True, baked=True),
    )  # fmt: skip
    parts.on(pair.input, partial(look, session), [made, pair], [wipe, where], show_progress="hidden")
    taken = [prompts, negative, seeds, *rest]
    own = f"values.slice(0, {len(taken)})"
    parts.on(take.click, None, taken, taken, js=f"(...values) => window.dpoFromTxt2img ? dpoFromTxt2img({own}) : {own}")


def _picture_controls(session: Session) -> list[Any]:
    """Seeds, steps, CFG, sampler, width, height, block weights."""
    import gradio as gr

    samplers = session.host.samplers()
    with gr.Row():
        seeds = gr.Textbox(
            value="1, 2", label="Seeds", lines=1, max_lines=1, info="Or 1-4; -1 is a random one", elem_id="dpo_compare_seeds"
        )
        sampler = gr.Dropdown(
            choices=samplers, value=samplers[0] if samplers else None, allow_custom_value=True, label="Sampler",
            info="How pictures are drawn", elem_id="dpo_compare_sampler",
        )  # fmt: skip
    with gr.Row():
        steps = gr.Slider(minimum=1, maximum=150, step=1, value=20, label="Steps", elem_id="dpo_compare_steps")
        cfg = gr.Slider(minimum=1.0, maximum=30.0, step=0.5, value=7.0, label="CFG scale", elem_id="dpo_compare_cfg")
    with gr.Row():
        width, height = (
            gr.Slider(
                minimum=0, maximum=2048, step=8, value=0, label=label, info="0: what the model was made for",
                elem_id=f"dpo_compare_{label.lower()}",
            )
            for label in ("Width", "Height")
        )  # fmt: skip
    blocks = gr.Textbox(
        value="", lines=1, max_lines=1, label="Block weights to compare with", elem_id="dpo_compare_blocks",
        info=f"As on the page Bake: {FIELDS['blocks'].help}",
    )  # fmt: skip
    return [seeds, steps, cfg, sampler, width, height, blocks]


# ---- what happens ----


def compare(
    session: Session, task: str | None, offset: str, strengths: str, prompts: str, negative: str, seeds: str,
    steps: float, cfg: float, sampler: str, width: float, height: float, blocks: str,
) -> list[Any]:  # fmt: skip
    """Make the pictures; verdict, grid, the pair that the verdict suggests, and where it differs."""
    numbers = {"steps": steps, "CFG scale": cfg, "width": width, "height": height}
    for name, value in numbers.items():
        if value is None:
            raise SettingError(f"{name}: a number is missing")
    session.host.check_pictures()
    found = session.jobs.run(
        "Compare",
        lambda job: session.compare(
            job, offset=offset or "", strengths=strengths or "", prompts=(prompts or "").splitlines(),
            negative=negative or "", seeds=str(seeds or ""), steps=int(steps), cfg_scale=float(cfg), sampler=sampler or "",
            width=int(width), height=int(height), blocks=blocks or "",
        ),
        task_id=task,
    )  # fmt: skip
    labels = _labels(found)
    start = next(
        (label for label, cell in labels.items() if cell.variant == found.report.suggested), next(iter(labels))
    )  # fmt: skip
    grid = found.grid.image
    grid.info["parameters"] = found.grid.infotext  # the WebUI writes it into the file that the page shows
    wipe, where = look(session, found, start)
    return [
        _report_html(found.report, found.offset),
        parts.update(value=grid, visible=True),
        parts.update(choices=list(labels), value=start, visible=True),
        wipe,
        where,
        found,
    ]


def look(session: Session, found: Comparison | None, label: str | None) -> list[Any]:
    """One picture before and after, and where they differ."""
    from lib_dpo.pictures.drawing import difference_map

    try:
        if found is None or label not in (labels := _labels(found)):
            raise NotFoundError("these pictures are gone; compare again")
        session.host.check_pictures()  # someone may have emptied the temporary folder meanwhile
        before, after = _pair(found, labels[label])
        where = difference_map(before, after)
    except Exception as error:  # noqa: BLE001  # the edge
        return [parts.error_html(session, error), parts.update(value=None, visible=False)]
    return [wipe_html(before, after, labels[label].variant.label), parts.update(value=where, visible=True)]


def _labels(found: Comparison) -> dict[str, Cell]:
    """The pictures that have an untouched one beside them, by what the list calls them."""
    from lib_dpo.pictures.plan import UNTOUCHED

    changed = [cell for cell in found.plan.cells if cell.variant != UNTOUCHED]
    return {f"{n}. {cell.variant.label}, seed {cell.seed}: {_short(cell.prompt)}": cell for n, cell in enumerate(changed, 1)}


def _pair(found: Comparison, cell: Cell) -> tuple[Image, Image]:
    from lib_dpo.pictures.plan import UNTOUCHED, Cell

    return found.images[Cell(cell.prompt, cell.seed, UNTOUCHED)], found.images[cell]


# ---- in words and pictures ----


def _report_html(report: EffectReport, offset: Offset) -> str:
    rows = [
        (
            f"{effect.variant.label}{' ← start here' if effect.variant == report.suggested else ''}",
            effect.text,
            f"{effect.difference:.1f}",
            f"{effect.least:.1f} to {effect.most:.1f}",
            f"{100 * effect.structure:.0f} %",
        )
        for effect in report.effects
    ]
    head = ("", "Effect", "Mean difference", "Least to most", "Same structure")
    caption = "Differences in grey levels of 255, against the untouched model"
    table = markup.table(head, rows, caption)
    gaps = markup.sentences(twin_lines(offset.twins) + unplaced_lines(offset.unmatched))
    body = table + markup.note(report.caveat)
    return markup.card(_WORDS[report.level], report.text, *gaps, mood=_MOODS[report.level], body=body)


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


def _data(image: Image) -> str:
    data = io.BytesIO()
    image.convert("RGB").save(data, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= _LONGEST else prompt[: _LONGEST - 1] + "…"
