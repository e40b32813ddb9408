"""The third page: the same pictures at several strengths, the untouched model first, and how strong the effect is."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

from lib_dpo.errors import DpoError, NotFoundError, SettingError
from lib_dpo.settings import BUNDLED_BASE, BUNDLED_PROMPTS, FIELDS
from lib_dpo.webui import comparing
from lib_dpo.webui.comparing import Asked, forecast
from lib_dpo.webui.results import Comparison
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import clicks, markup, parts
from lib_dpo.webui.tab.clicks import Show, unseen
from lib_dpo.webui.tab.comparison import cells_html, report_html, wipe_html
from lib_dpo.webui.tab.parts import Tab
from lib_dpo.webui.tab.standing import about

if TYPE_CHECKING:
    from PIL.Image import Image

    from lib_dpo.pictures.plan import Cell

ALONE = "Nothing"  # the choice of no second offset
_LONGEST = 40  # letters of a prompt in a list
_READY_MADE = 3  # prompts
_HINT = (
    "One picture per prompt, seed and strength, and the untouched model beside them. What you see is what a LoRA or bake of "
    "that strength will do to your model."
)


def page(tab: Tab) -> None:
    """What to compare at the left, the rest of its settings folded; pictures at the right."""
    import gradio as gr

    with parts.page("Compare", "dpo_compare"), gr.Row(elem_classes=["dpo-page"]):
        with gr.Column(elem_classes=["dpo-controls"]):
            offset = parts.file_dropdown(
                tab, parts.offsets, likely=parts.named_dpo, label="Offset to compare", elem_id="dpo_compare_offset",
                info="A LoRA or an offset file",
            )  # fmt: skip
            prompts = gr.Textbox(
                label="Prompts", lines=3, elem_id="dpo_compare_prompts",
                info="One per line; name several things in each; empty: three ready-made ones",
            )  # fmt: skip
            with gr.Row(elem_classes=["dpo-buttons"]):
                take = gr.Button("Take from txt2img", elem_id="dpo_compare_take", visible=tab.session.in_webui)
                ready = gr.Button("Ready-made prompts", elem_id="dpo_compare_ready")
            strengths = gr.Textbox(
                value="0.5, 1, 1.5", label="Strengths", lines=1, max_lines=1, elem_id="dpo_compare_strengths",
                info="Numbers, or a range such as 0-2 (+0.5)",
            )  # fmt: skip
            forecast_line = parts.unsaved(gr.HTML("", elem_id="dpo_compare_forecast"))
            with gr.Row(elem_classes=["dpo-buttons"]):
                go = gr.Button("Compare", variant="primary", elem_id="dpo_compare_go")
                undo = gr.Button("Undo and compare", variant="primary", elem_id="dpo_compare_undo", visible=False)
                parts.interrupt_button(tab, "dpo_compare_interrupt")
            with gr.Accordion("Seeds, size, and what else to compare", open=False, elem_id="dpo_compare_more"):
                beside, function = _more(tab)
                seeds = gr.Textbox(
                    value="1, 2", label="Seeds", lines=1, max_lines=1, info="Or 1-4; -1 is a random one",
                    elem_id="dpo_compare_seeds",
                )  # fmt: skip
                sampler, steps, cfg, width, height = sampling_controls(tab.session, "dpo_compare")
                rest = [steps, cfg, sampler, width, height]
                negative = gr.Textbox(label="Negative prompt", lines=1, elem_id="dpo_compare_negative")
                blocks = gr.Textbox(
                    value="", lines=1, max_lines=1, label="Block weights to compare with", elem_id="dpo_compare_blocks",
                    info=f"As on the page Bake: {FIELDS['blocks'].help}",
                )  # fmt: skip
        with gr.Column(elem_classes=["dpo-answers"]):
            place = parts.results(tab, "dpo_compare_result", _HINT, keep=True)
            cells = parts.unsaved(gr.HTML("", elem_id="dpo_compare_cells"))
            pair = parts.unsaved(
                gr.Dropdown(
                    choices=[], allow_custom_value=True, label="Before and after", visible=False, elem_id="dpo_compare_pair",
                    info="Move the line over the picture with the mouse, a finger or the arrow keys",
                )
            )  # fmt: skip
            wipe = parts.unsaved(gr.HTML("", elem_id="dpo_compare_wipe"))
            where = parts.picture(label="Where they differ", visible=False, elem_id="dpo_compare_where")
            folded = gr.Accordion("All of it as one picture, to save", open=False, visible=False, elem_id="dpo_compare_one")
            with folded:
                grid = parts.picture(label="All pictures", elem_id="dpo_compare_grid")
            made = gr.State(None)
    for unsaved in (prompts, negative, seeds, blocks, rest[2]):
        parts.unsaved(unsaved)
    session = tab.session
    inputs = [offset, strengths, prompts, negative, seeds, *rest, blocks, beside, function]
    outputs = [place, cells, grid, folded, pair, wipe, where, made, undo]
    for button, function_of in ((go, compare), (undo, undo_and_compare)):
        clicks.start(
            tab, button, partial(function_of, session), inputs, outputs,
            about=lambda offset, *_: about(session, session.library.offset(offset), model=True, baked=True),
            streams=True,
        )  # fmt: skip
    counted = [strengths, prompts, seeds, rest[0], rest[3], rest[4], beside, function]
    taken = [prompts, negative, seeds, *rest]
    own = f"values.slice(0, {len(taken)})"
    js = f"(...values) => window.dpoFromTxt2img ? dpoFromTxt2img({own}) : {own}"
    parts.follow(tab, counted, lambda *values: [told(session, *values)], [forecast_line])
    parts.on(ready.click, partial(ready_made, session), [], [prompts], **parts.UNASKED)
    parts.on(take.click, None, taken, taken, js=js)
    parts.on(pair.input, partial(look, session), [made, pair], [wipe, where], show_progress="hidden")


def _more(tab: Tab) -> tuple[Any, Any]:
    """A second offset, and the measure of the function."""
    import gradio as gr

    beside = parts.file_dropdown(
        tab, lambda session: [ALONE, *parts.offsets(session)], likely=parts.first, label="Beside it", value=ALONE,
        elem_id="dpo_compare_beside", info="Another offset at the same strengths, such as the exact one beside a LoRA",
    )  # fmt: skip
    function = gr.Checkbox(
        value=False, label="Measure the function kept", elem_id="dpo_compare_function",
        info="How much of what the whole offset changes in this model's predictions the LoRA reproduces. Needs an offset file "
        "or an exact LoRA of the same pair; 30 more steps for each prompt and seed",
    )  # fmt: skip
    return beside, function


def sampling_controls(session: Session, prefix: str, of: str = "") -> list[Any]:
    """Sampler, steps, CFG, width, height: how pictures are drawn.

    Args:
        prefix: what their ids begin with. of: stands behind each label, for labels of the tab differ.
    """
    import gradio as gr

    samplers = session.host.samplers()
    sampler = gr.Dropdown(
        choices=samplers, value=samplers[0] if samplers else None, allow_custom_value=True, label=f"Sampler{of}",
        info="How pictures are drawn", elem_id=f"{prefix}_sampler",
    )  # fmt: skip
    with gr.Row():
        steps = gr.Slider(minimum=1, maximum=150, step=1, value=20, label=f"Steps{of}", elem_id=f"{prefix}_steps")
        cfg = gr.Slider(
            minimum=1.0, maximum=30.0, step=0.5, value=session.cfg_scale, label=f"CFG scale{of}", elem_id=f"{prefix}_cfg"
        )
    with gr.Row():
        width, height = (
            gr.Slider(
                minimum=0, maximum=2048, step=8, value=0, label=f"{label}{of}", info="0: what the model was made for",
                elem_id=f"{prefix}_{label.lower()}",
            )
            for label in ("Width", "Height")
        )  # fmt: skip
    return [sampler, steps, cfg, width, height]


# ---- what happens ----


def compare(
    session: Session, task: str | None, offset: str, strengths: str, prompts: str, negative: str, seeds: str,
    steps: float, cfg: float, sampler: str, width: float, height: float, blocks: str, beside: str = ALONE,
    function: bool = False, *, undo: bool = False, show: Show = unseen,
) -> list[Any]:  # fmt: skip
    """Make the pictures, each shown as it comes; verdict, cells, grid, the pair that the verdict suggests, where it differs."""
    numbers = {"steps": steps, "CFG scale": cfg, "width": width, "height": height}
    for name, value in numbers.items():
        if value is None:
            raise SettingError(f"{name}: a number is missing")
    session.host.check_pictures()
    if session.host.live.baked() and not undo:
        show(parts.update(), *[parts.update()] * 7, parts.update(visible=True))  # the error says why
    asked = Asked(
        offset=offset or "", strengths=strengths or "", prompts=_lines(prompts) or ready_made(session).splitlines(),
        negative=negative or "", seeds=str(seeds or ""), steps=int(steps), cfg_scale=float(cfg), sampler=sampler or "",
        width=int(width), height=int(height), blocks=blocks or "", beside=_name(beside), function=bool(function), undo=undo,
    )  # fmt: skip
    try:
        found = session.jobs.run(
            "Compare",
            lambda job: comparing.compare(
                session, job, asked, lambda *made: show(parts.update(), cells_html(*made, done=False))
            ),
            task_id=task,
        )  # fmt: skip
    except BaseException:
        show(parts.update(), "")  # no half of a table stays
        raise
    labels = _labels(found)
    start = next(
        (label for label, cell in labels.items() if cell.variant == found.report.suggested), next(iter(labels))
    )  # fmt: skip
    grid = found.grid.image
    grid.info["parameters"] = found.grid.infotext  # the WebUI writes it into the file that the page shows
    wipe, where = look(session, found, start)
    return [
        report_html(found),
        cells_html(found.plan, found.images),
        parts.update(value=grid),
        parts.update(visible=True),
        parts.update(choices=list(labels), value=start, visible=True),
        wipe,
        where,
        found,
        parts.update(visible=False),
    ]


def undo_and_compare(session: Session, task: str | None, *values: Any, show: Show = unseen) -> list[Any]:
    """The same on the model without what is baked into it."""
    return compare(session, task, *values, undo=True, show=show)


def told(
    session: Session, strengths: str, prompts: str, seeds: str, steps: float, width: float, height: float, beside: str,
    function: bool,
) -> str:  # fmt: skip
    """How many pictures that is, and how long; nothing while the lists are being written."""
    try:
        lines = _lines(prompts) or ready_made(session).splitlines()
        asked = Asked(
            "offset", lines, seeds=str(seeds or ""), strengths=strengths or "", steps=int(steps or 0),
            width=int(width or 0), height=int(height or 0), beside=_name(beside), function=bool(function),
        )  # fmt: skip
        return markup.note(f"{forecast(session, asked)}.")
    except DpoError as error:
        return markup.note(error)


def ready_made(session: Session) -> str:
    """A prompt of each of three kinds, other ones each time; for the toy model some that it knows."""
    from lib_dpo.pictures.votes.prompts import PROMPTS

    loaded = session.host.live.loaded()
    if loaded and loaded.path.name == BUNDLED_BASE:
        return "\n".join(random.sample(BUNDLED_PROMPTS, _READY_MADE))
    return "\n".join(random.choice(PROMPTS[kind]) for kind in random.sample(sorted(PROMPTS), _READY_MADE))


def _lines(prompts: str | None) -> list[str]:
    return [line for line in (prompts or "").splitlines() if line.strip()]


def _name(beside: str | None) -> str:
    return "" if not beside or beside == ALONE else beside


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


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= _LONGEST else prompt[: _LONGEST - 1] + "…"
