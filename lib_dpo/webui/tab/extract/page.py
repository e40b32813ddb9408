"""The first page: what DPO changed, and that as a LoRA or an offset file."""

from __future__ import annotations

from functools import partial
from pathlib import PurePosixPath
from typing import Any

from lib_dpo.errors import DpoError
from lib_dpo.settings import DEFAULT_RANK, FIELDS, LORA_PRECISIONS, METHODS, PROFILES, ExtractSettings, Method
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import clicks, markup, parts
from lib_dpo.webui.tab.extract import outlook, references
from lib_dpo.webui.tab.extract.cards import analysis_html, extracted_html, first_view, offset_html
from lib_dpo.webui.tab.extract.outlook import BY_ENERGY, BY_RANK, BY_SIZE, EXACT, PRESETS, policy_of
from lib_dpo.webui.tab.parts import Tab, field_options
from lib_dpo.webui.tab.standing import About, Place, about

_DOORS = {"compare": "dpo_compare_offset", "bake": "dpo_bake_offset"}  # pages that take the new file, and into which list
_DENSE = (
    "An offset file holds the whole change, in float32, for exact bakes. It is as large as a UNet, and is written into the "
    "reference folder."
)


def page(tab: Tab) -> None:
    """Controls at the left, results at the right."""
    import gradio as gr

    with parts.page("Extract", "dpo_extract"):
        intro = parts.unsaved(gr.HTML("", elem_id="dpo_extract_first"))
        wire_references = references.section(tab)
        with gr.Row(elem_classes=["dpo-page"]):
            with gr.Column(elem_classes=["dpo-controls"]):
                base = parts.file_dropdown(
                    tab, parts.checkpoints, likely=parts.first, label="Base", value=parts.LOADED, elem_id="dpo_extract_base",
                    info="The model before DPO, such as SD 1.5 or SDXL 1.0 itself",
                )  # fmt: skip
                reference = parts.file_dropdown(
                    tab, parts.references, likely=parts.named_dpo, label="DPO reference", elem_id="dpo_extract_reference",
                    info="The model after DPO: a checkpoint, or a UNet alone in models/DPO",
                )  # fmt: skip
                with gr.Row(elem_classes=["dpo-buttons"]):
                    find = gr.Button("Find its base", elem_id="dpo_extract_find")
                    look = gr.Button("Analyse", elem_id="dpo_extract_analyse")
                (by, rank, size, energy), exact, presets = _size_controls()
                curve, known = parts.unsaved(gr.HTML("", elem_id="dpo_extract_outlook")), gr.State(None)
                conv_rank, settings = _advanced_controls()
                name = gr.Textbox(
                    label="Name of the new file",
                    placeholder="as the reference",
                    lines=1,
                    max_lines=1,
                    elem_id="dpo_extract_name",
                )
                overwrite = gr.Checkbox(False, label="Replace a file of this name", elem_id="dpo_extract_overwrite")
                with gr.Row(elem_classes=["dpo-buttons"]):
                    go = gr.Button("Extract DPO LoRA", variant="primary", elem_id="dpo_extract_go")
                    dense = gr.Button("Write offset file", elem_id="dpo_extract_dense")
                    parts.interrupt_button(tab, "dpo_extract_interrupt")
                gr.HTML(markup.note(_DENSE), elem_id="dpo_extract_dense_help")
            with gr.Column(elem_classes=["dpo-answers"]):
                place = parts.results(tab, "dpo_extract_result", "")
                pair_place = parts.results(tab, "dpo_extract_pair_result", "")
                written, found = gr.State(""), gr.State("")
                take = gr.Button("Use this base", elem_id="dpo_extract_take_base", elem_classes=["dpo-hidden"])
                doors = {
                    name: gr.Button(f"To {name}", elem_id=f"dpo_extract_to_{name}", elem_classes=["dpo-hidden"])
                    for name in _DOORS
                }
    for unsaved in (name, overwrite):
        parts.unsaved(unsaved)
    session, pair = tab.session, [base, reference]
    library = session.library

    def of_pair(base: str, reference: str, *_: Any) -> About:
        return about(session, parts.checkpoint_name(base), library.reference(reference), model=True)

    def of_reference(reference: str) -> About:
        return about(session, library.reference(reference))

    def of_lora(base: str, reference: str, name: str, *_: Any) -> About:
        return about(session, library.new_lora(_name(name, reference, "lora")), model=True)

    def of_offset(base: str, reference: str, name: str, *_: Any) -> About:
        return about(session, library.new_offset(_name(name, reference, "offset")))

    numbers = [by, rank, conv_rank, size, energy]
    shown = {rank: BY_RANK, conv_rank: BY_RANK, size: BY_SIZE, energy: BY_ENERGY, exact: EXACT}
    parts.follow(tab, [by], lambda choice: [parts.update(visible=name == choice) for name in shown.values()], list(shown))
    parts.follow(tab, [reference], lambda chosen: [first_view(session, chosen)], [intro])
    controls, ends = [*numbers, *settings[1:]], [rank, conv_rank]
    _curve_follows(tab, pair, controls, (curve, known), ends)
    for which, button in presets.items():
        parts.on(button.click, partial(outlook.preset, session, which), [known], numbers, **parts.UNASKED)
    clicks.start(tab, find, partial(references.find_base, session), [reference], [pair_place, found], about=of_reference)
    parts.on(take.click, partial(_based, session), [found], [base], **parts.UNASKED)
    wire_references(base, reference)
    named = [*pair, name, overwrite]
    clicks.start(
        tab, look, partial(analyse, session), [*pair, *controls], [pair_place, curve, known, *ends], about=of_pair
    )  # fmt: skip
    clicks.start(
        tab, go, partial(extract, session), [*named, *numbers, *settings], [place, written], about=of_lora, writes="offset"
    )  # fmt: skip
    clicks.start(tab, dense, partial(write_offset, session), named, [place, written], about=of_offset, writes="offset")
    tab.doors.extend((button, _DOORS[name], written, name) for name, button in doors.items())


def _curve_follows(tab: Tab, pair: list[Any], controls: list[Any], curve: tuple[Any, Any], ends: list[Any]) -> None:
    """Draw the curve anew for another pair, and move its mark with the controls.

    Args:
        curve: where it is shown, and what is kept of it. ends: sliders that end where the pair's layers do.
    """
    ahead = partial(outlook.outlook, tab.session)
    for each in pair:
        parts.on(each.change, ahead, [*pair, *controls], [*curve, *ends], **parts.UNASKED)
    tab.places.append(Place(*curve, again=lambda *values: ahead(*values)[:2], inputs=[*pair, *controls]))
    parts.follow(tab, controls, partial(outlook.moved, tab.session), [curve[0]], beside=[curve[1]])


def hand_over(tab: Tab) -> None:
    """Let the other pages take the file that was written last; when all pages are built. dpo.js presses and shows."""
    lists = {listed.component.elem_id: listed for listed in tab.lists}
    for button, target, written, page in tab.doors:
        listed = lists[target]
        event = parts.on(
            button.click, partial(_chosen, tab.session, listed), [written], [listed.component], **parts.UNASKED
        )  # fmt: skip
        parts.on(event.then, None, [], [], js=f"() => {{ window.dpoOpen && dpoOpen('dpo_{page}', '{target}'); }}")


def _based(session: Session, found: str) -> Any:
    """The list of bases with the one that was found; as it is where that is gone."""
    choices = parts.checkpoints(session)
    return parts.update(choices=choices, value=found) if found in choices else parts.update()


def _chosen(session: Session, listed: parts.Listed, written: str) -> Any:
    """A list with the new file chosen; as it is where the file is gone."""
    try:
        name = session.library.name_of(session.library.offset(written))
    except DpoError:
        return parts.update()
    return parts.update(choices=listed.choices(session), value=name)


def _size_controls() -> tuple[list[Any], Any, dict[str, Any]]:
    """How large the LoRA becomes: a choice and the numbers that go with it, a word on exact ones, buttons that set them."""
    import gradio as gr

    by = gr.Radio(
        choices=[BY_RANK, BY_SIZE, BY_ENERGY, EXACT], value=BY_RANK, label="Choose the LoRA's size by", elem_id="dpo_extract_by"
    )
    with gr.Row(elem_classes=["dpo-presets"]):
        presets = {
            name: gr.Button(label, elem_id=f"dpo_extract_preset_{name}", size="sm") for name, (label, _) in PRESETS.items()
        }
    rank = gr.Slider(minimum=1, maximum=320, step=1, value=DEFAULT_RANK, **field_options("rank"), elem_id="dpo_extract_rank")
    size = gr.Number(
        value=80, label="Size in MB", info="Divided among the layers by what they count for in the model's predictions",
        visible=False, elem_id="dpo_extract_size",
    )  # fmt: skip
    energy = gr.Slider(
        minimum=1, maximum=100, step=1, value=50, label="Share of the change to keep, in %",
        info="Each layer gets the rank that it needs. A large share makes a large file",
        visible=False, elem_id="dpo_extract_energy",
    )  # fmt: skip
    exact = gr.HTML(
        markup.note("All of the UNet's change, a byte for each weight. Where text "
                    "encoders changed, their matrices too, which makes it larger; their norms and embeddings are left out. "
                    "A LoRA (LoKr) for prompts in WebUIs and ComfyUI; diffusers cannot read it. Profile, method and "
                    "precision do not matter for it."),
        visible=False, elem_id="dpo_extract_exact",
    )  # fmt: skip
    return [by, rank, size, energy], exact, presets


def _advanced_controls() -> tuple[Any, list[Any]]:
    """The rank of convolutions, and what is seldom changed."""
    import gradio as gr

    defaults = ExtractSettings()
    rows = {"method": ("method", METHODS), "profile": ("profile", PROFILES), "precision": ("lora_precision", LORA_PRECISIONS)}
    with gr.Accordion("Advanced", open=False, elem_id="dpo_extract_advanced"):
        conv_rank = gr.Slider(
            minimum=0, maximum=320, step=1, value=0, label=FIELDS["conv_rank"].label, elem_id="dpo_extract_conv_rank",
            info="Of 3x3 convolutions; 0: the same as Rank",
        )  # fmt: skip
        return conv_rank, [
            gr.Dropdown(
                choices=list(choices), value=getattr(defaults, name), **field_options(field), elem_id=f"dpo_extract_{name}"
            )
            for name, (field, choices) in rows.items()
        ]


# ---- what happens at a click ----


def analyse(session: Session, task: str | None, base: str, reference: str, *controls: Any) -> list[Any]:
    """Verdicts as cards with the heat map; the curve, what it is about, and the ends of the sliders."""
    found = session.jobs.run(
        "Analyse",
        lambda job: session.analyse(job, base=parts.checkpoint_name(base), reference=reference or "", spectra=True),
        task_id=task,
    )
    return [analysis_html(session, found), *outlook.outlook(session, base, reference, *controls)]


def extract(
    session: Session, task: str | None, base: str, reference: str, name: str, overwrite: bool,
    by: str, rank: float, conv_rank: float, size: float, energy: float, method: Method, profile: str, precision: str,
) -> list[str]:  # fmt: skip
    """Write the LoRA; its result card, and its name."""
    policy = policy_of(by, rank, conv_rank, size, energy)
    settings = ExtractSettings(form="exact")
    if by != EXACT:
        settings = ExtractSettings(policy, method=method, profile=profile, precision=precision)
    found = session.jobs.run(
        "Extract DPO LoRA",
        lambda job: session.extract(
            job, base=parts.checkpoint_name(base), reference=reference or "", name=_name(name, reference, "lora"),
            settings=settings, overwrite=bool(overwrite),
        ),
        task_id=task,
    )  # fmt: skip
    return [extracted_html(session, found), found.name]


def write_offset(session: Session, task: str | None, base: str, reference: str, name: str, overwrite: bool) -> list[str]:
    """Write the offset file; its result card, and its name."""
    found = session.jobs.run(
        "Write offset file",
        lambda job: session.write_offset(
            job, base=parts.checkpoint_name(base), reference=reference or "", name=_name(name, reference, "offset"),
            overwrite=bool(overwrite),
        ),
        task_id=task,
    )  # fmt: skip
    return [offset_html(session, found), found.path.stem]


def _name(name: str | None, reference: str | None, kind: str) -> str:
    """The name that was typed, or one after the reference."""
    typed = (name or "").strip()
    stem = PurePosixPath((reference or "").rsplit(" [", 1)[0].replace("\\", "/")).name.removesuffix(".safetensors")
    return typed or (f"{stem.removesuffix('.ckpt')}-{kind}" if stem else "")
