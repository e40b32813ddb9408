"""The second page: an offset into the loaded model and out again, and as a checkpoint of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lib_dpo.errors import DpoError
from lib_dpo.hosts.base import Baked
from lib_dpo.offsets.lora.unplaced import twin_lines, unplaced_lines
from lib_dpo.offsets.patch import check_changes
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup, parts
from lib_dpo.webui.tab.parts import Tab, field_options
from lib_dpo.webui.tab.standing import Place, about, given

PRESETS = {
    "Everything": "",
    "UNet only": "TE=0",
    "Only the way down (composition)": "ALL=0,IN=1",
    "Only the middle": "ALL=0,MID=1",
    "Only the way up (detail, style)": "ALL=0,OUT=1",
    "Without the middle": "MID=0",
    "Half on the way up": "OUT=0.5",
}
_HINT = "Bake adds the offset to the loaded model in memory, until Undo or until another checkpoint is loaded. No file changes."


def page(tab: Tab) -> None:
    """Controls at the left, what they will do and did at the right."""
    import gradio as gr

    with parts.page("Bake", "dpo_bake"), gr.Row(elem_classes=["dpo-page"]):
        with gr.Column(elem_classes=["dpo-controls"]):
            offset = parts.file_dropdown(
                tab, parts.offsets, likely=parts.named_dpo, label="Offset", elem_id="dpo_bake_offset",
                info="A LoRA, or an offset file for the exact change",
            )  # fmt: skip
            strength = gr.Slider(
                minimum=-2.0, maximum=2.0, step=0.05, value=1.0, **field_options("strength"), elem_id="dpo_bake_strength"
            )
            with gr.Row():
                preset = gr.Dropdown(
                    choices=list(PRESETS), value="Everything", label="Blocks", elem_id="dpo_bake_preset",
                    info="Which parts of the model change",
                )  # fmt: skip
                blocks = gr.Textbox(value="", lines=1, max_lines=1, **field_options("blocks"), elem_id="dpo_bake_blocks")
            with gr.Row(elem_classes=["dpo-buttons"]):
                go = gr.Button("Bake", variant="primary", elem_id="dpo_bake_go")
                undo = gr.Button("Undo", elem_id="dpo_bake_undo")
                parts.interrupt_button(tab, "dpo_bake_interrupt")
            save_name, overwrite, save_go = _save_controls()
        with gr.Column(elem_classes=["dpo-answers"]):
            before = parts.unsaved(gr.HTML("", elem_id="dpo_bake_before"))
            foreseen = gr.State(None)
            place = parts.results(tab, "dpo_bake_result", _HINT)
    for unsaved in (preset, blocks, save_name, overwrite):
        parts.unsaved(unsaved)
    session, chosen = tab.session, [offset, strength, blocks]
    filled = parts.on(preset.change, PRESETS.get, [preset], [blocks], **parts.UNASKED)
    ahead = partial(foreseen_now, session)
    for changed in (offset.change, blocks.blur, blocks.submit, filled.then):  # not at every key: it opens the file
        parts.on(changed, ahead, [offset, blocks], [before, foreseen], **parts.UNASKED)
    tab.places.append(Place(before, foreseen, again=ahead, inputs=[offset, blocks]))
    loaded = partial(about, session, model=True, baked=True)
    parts.start(tab, go, partial(bake, session), chosen, [place], about=lambda *_: loaded())
    parts.start(tab, undo, partial(unbake, session), [], [place], about=loaded)
    parts.start(
        tab, save_go, partial(save, session), [*chosen, save_name, overwrite], [place], writes=True,
        about=lambda *values: about(session, session.library.new_checkpoint(_new_name(session, values[3]))),
    )  # fmt: skip


def _save_controls() -> tuple[Any, Any, Any]:
    import gradio as gr

    with gr.Column(elem_classes=["dpo-group"]):
        gr.HTML(
            markup.headed(
                "Save as checkpoint",
                "Writes the loaded checkpoint's file plus the offset, strength and blocks chosen above. It is made from the "
                "file, not from the weights in memory, so it need not be baked first, and no LoRA of a prompt gets into it.",
            ),
            elem_id="dpo_bake_save_help",
        )
        name = gr.Textbox(
            label="Name of the new checkpoint",
            placeholder="as the loaded one, with -dpo",
            lines=1,
            max_lines=1,
            elem_id="dpo_bake_save_name",
        )
        overwrite = gr.Checkbox(False, label="Replace a checkpoint of this name", elem_id="dpo_bake_save_overwrite")
        return name, overwrite, gr.Button("Save as checkpoint", elem_id="dpo_bake_save_go")


# ---- what happens ----


def foreseen_now(session: Session, offset: str | None, blocks: str | None) -> list[Any]:
    """What `foresee` says, and what that is about."""
    html = foresee(session, offset, blocks)
    return [html, given(html, lambda: about(session, offset or "", model=True, baked=True)) if html else None]


def foresee(session: Session, offset: str | None, blocks: str | None) -> str:
    """Before anything is done: whether the offset is one for the loaded model, and what baking it will cost."""
    title = "Before you bake"
    if not offset:
        return ""
    try:
        patch = session.patch(offset, blocks=blocks or "")
        check_changes(patch.offset, patch.blocks)
        needed = session.host.live.bake_bytes(patch)
    except DpoError as error:
        return markup.card(title, session.library.names_only(str(error)), mood="bad")
    except Exception as error:  # noqa: BLE001  # the edge
        return parts.error_html(session, error)
    status = session.status()
    inside = " and ".join(map(str, status.in_file))
    kind = "a LoRA" if patch.lora else "an offset file"
    family = patch.architecture.title
    return markup.card(
        title,
        f"{patch.name} is {kind} for {family}, as the loaded model is: it can be baked.",
        f"Undo needs {markup.size(needed)} of memory, for the {len(patch.changed_keys()):,} weights that change.",
        f"The loaded file has {inside} baked in already: this comes on top." if inside else "",
        f"It takes the place of {status.baked.offset}, which is baked in now." if status.baked else "",
        *markup.sentences(twin_lines(patch.offset.twins) + unplaced_lines(patch.offset.unmatched)),
        "To see whether your model is near enough to the base, ask «Does it fit?» on the page Inspect.",
        mood="doubt" if inside or patch.offset.unmatched else "good",
    )


def bake(session: Session, task: str | None, offset: str, strength: float, blocks: str) -> str:
    """Into the loaded model."""
    found = session.jobs.run(
        "Bake",
        lambda job: session.bake(job, offset=offset or "", strength=strength, blocks=blocks or ""),
        task_id=task,
    )
    return _baked_html(found)


def unbake(session: Session, task: str | None) -> str:
    """Out of it again."""
    if not session.jobs.run("Undo", session.unbake, task_id=task):
        return markup.note("Nothing was baked: the model is as its file has it.")
    return markup.card("Undone", "The loaded model is again what it was before, bit for bit.", mood="good")


def save(
    session: Session, task: str | None, offset: str, strength: float, blocks: str, name: str, overwrite: bool
) -> str:  # fmt: skip
    """A new checkpoint from the loaded one's file."""
    new = _new_name(session, name)
    found = session.jobs.run(
        "Save as checkpoint",
        lambda job: session.save(
            job, name=new, offset=offset or "", strength=strength, blocks=blocks or "", overwrite=bool(overwrite)
        ),
        task_id=task,
    )
    lost = f"Rounding to the file's number format lost {markup.percent(found.rounding_loss)} of the change."
    gaps = markup.sentences(twin_lines(found.twins) + unplaced_lines(found.not_applied))
    body = markup.facts([
        ("File", session.library.place(found.path)), ("Offset", offset),
        ("Strength", f"{found.strength:g}"), ("Blocks", found.blocks or "everything"),
        ("Changed", f"{found.changed:,} tensors"), ("Kept as they were", f"{found.kept:,} tensors"),
        *([("In it before", ", ".join(map(str, found.already)))] if found.already else []),
        *([("Configuration", session.library.names_only(found.sidecar_text))] if found.sidecar_text else []),
    ])  # fmt: skip
    return markup.card(f"{found.path.stem} is saved", lost, *gaps, mood="doubt" if found.not_applied else "good", body=body)


def _new_name(session: Session, typed: str) -> str:
    return (typed or "").strip() or f"{Path(session.loaded().name).stem}-dpo"


def _baked_html(found: Baked) -> str:
    missing = markup.sentences(unplaced_lines(found.not_applied))
    twins = markup.sentences(twin_lines(found.twins))
    nothing = (
        ""
        if found.tensors
        else "No value of the model changed: the offset holds nothing but zeros here, or too little to round to. Choose a "
        "larger strength, or another offset."
    )
    online = "The weights are quantised, so it is added anew in every step: a little slower." if found.online else ""
    body = markup.facts([
        ("Offset", found.offset), ("Strength", f"{found.strength:g}"), ("Blocks", found.blocks or "everything"),
        ("Changed", f"{found.tensors:,} weights"), ("Memory for Undo", markup.size(found.bytes_kept)),
    ])  # fmt: skip
    return markup.card(
        "Baked into the loaded model",
        "Every picture you make now has it, until Undo or until another checkpoint is loaded.",
        nothing, *twins, *missing, online, mood="doubt" if missing or nothing else "good", body=body,
    )  # fmt: skip
