"""The controls of the page, and what its buttons do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lib_dpo.hosts.base import Baked
from lib_dpo.offsets.lora.unplaced import twin_lines, unplaced_lines
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import clicks, markup, parts
from lib_dpo.webui.tab.bake import blocks
from lib_dpo.webui.tab.bake.before import foreseen_now, nothing_to_bake
from lib_dpo.webui.tab.parts import Tab, field_options
from lib_dpo.webui.tab.standing import Place, about

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
            empty = parts.unsaved(gr.HTML("", visible=False, elem_id="dpo_bake_empty"))
            strength = gr.Slider(
                minimum=-2.0, maximum=2.0, step=0.05, value=1.0, **field_options("strength"), elem_id="dpo_bake_strength"
            )
            weights, settled = blocks.controls()
            with gr.Row(elem_classes=["dpo-buttons"]):
                go = gr.Button("Bake", variant="primary", elem_id="dpo_bake_go")
                undo = gr.Button("Undo", interactive=False, elem_id="dpo_bake_undo")
                parts.interrupt_button(tab, "dpo_bake_interrupt")
            save_name, overwrite, save_go = _save_controls()
        with gr.Column(elem_classes=["dpo-answers"]):
            before = parts.unsaved(gr.HTML("", elem_id="dpo_bake_before"))
            foreseen = gr.State(None)
            place = parts.results(tab, "dpo_bake_result", _HINT)
    for unsaved in (save_name, overwrite):
        parts.unsaved(unsaved)
    session, chosen = tab.session, [offset, strength, weights]
    parts.follow(tab, [offset], partial(nothing_to_bake, session), [empty])
    ahead, asked = partial(foreseen_now, session), [offset, weights, strength]
    # not at every key or pixel, for it opens the file; what is missed is seen when the page looks at the model
    for changed in (offset.change, strength.release, *settled):
        parts.on(changed, ahead, asked, [before, foreseen], **parts.UNASKED)
    tab.places.append(Place(before, foreseen, again=ahead, inputs=asked))
    parts.on(tab.status.change, partial(undo_now, session), [], [undo], **parts.UNASKED)
    loaded = partial(about, session, model=True, baked=True)
    clicks.start(tab, go, partial(bake, session), chosen, [place], about=lambda *_: loaded())
    clicks.start(tab, undo, partial(unbake, session), [], [place], about=loaded)
    clicks.start(
        tab, save_go, partial(save, session), [*chosen, save_name, overwrite], [place], writes="checkpoint",
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


def undo_now(session: Session) -> Any:
    """The button Undo, off where there is nothing to undo."""
    return parts.update(interactive=session.status().baked is not None)


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
    proof = "Checked: a checksum over its weights is again the one that was taken before the bake."
    return markup.card("Undone", "The loaded model is again what it was before, bit for bit.", proof, mood="good")


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
