"""The last page: what a file is, and whether an offset fits a model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lib_dpo.settings import in_digits
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup, parts
from lib_dpo.webui.tab.markup import Mood
from lib_dpo.webui.tab.parts import Tab
from lib_dpo.webui.tab.standing import About, about

if TYPE_CHECKING:
    from lib_dpo.operations.compat import CompatReport
    from lib_dpo.operations.inspect import Inspection

_MOODS: dict[str, Mood] = {"base": "doubt", "fits": "good", "weaker": "doubt", "contained": "doubt", "other": "doubt"}
_HINT = "Choose a file to see what it is, or three to see whether the offset of a pair fits a model."
_COMPONENTS = {
    "unet": "UNet", "te": "text encoder", "te1": "text encoder 1", "te2": "text encoder 2", "vae": "VAE",
}  # fmt: skip
_LONGEST = 300  # letters of one metadata entry that are shown


def page(tab: Tab) -> None:
    """Two questions at the left, answers at the right."""
    import gradio as gr

    with parts.page("Inspect", "dpo_inspect"), gr.Row(elem_classes=["dpo-page"]):
        with gr.Column(elem_classes=["dpo-controls"]):
            file = parts.file_dropdown(
                tab, everything, likely=parts.first, label="File", elem_id="dpo_inspect_file",
                info="A checkpoint, reference, LoRA or offset file",
            )  # fmt: skip
            with gr.Row(elem_classes=["dpo-buttons"]):
                look = gr.Button("What is it?", elem_id="dpo_inspect_look")
            target = parts.file_dropdown(
                tab, parts.checkpoints, likely=parts.first, label="Your model", value=parts.LOADED,
                elem_id="dpo_inspect_target", info="Any finetune or merge, Pony too",
            )  # fmt: skip
            base = parts.file_dropdown(
                tab, parts.checkpoints, likely=parts.first, label="Base of the pair", value=parts.LOADED,
                elem_id="dpo_inspect_base", info="The model before DPO",
            )  # fmt: skip
            reference = parts.file_dropdown(
                tab, parts.references, likely=parts.named_dpo, label="DPO reference of the pair",
                elem_id="dpo_inspect_reference", info="The model after DPO",
            )  # fmt: skip
            with gr.Row(elem_classes=["dpo-buttons"]):
                fit = gr.Button("Does it fit?", variant="primary", elem_id="dpo_inspect_fit")
                parts.interrupt_button(tab, "dpo_inspect_interrupt")
        with gr.Column(elem_classes=["dpo-answers"]):
            place = parts.results(tab, "dpo_inspect_result", _HINT)
    session = tab.session

    def of_three(target: str, base: str, reference: str) -> About:
        chosen = [parts.checkpoint_name(name) for name in (target, base)]
        return about(session, *chosen, session.library.reference(reference), model=not all(chosen))

    parts.start(tab, look, partial(what_is, session), [file], [place], about=partial(about, session))
    parts.start(tab, fit, partial(does_it_fit, session), [target, base, reference], [place], about=of_three)


def everything(session: Session) -> list[str]:
    """The names of all lists, each once."""
    library = session.library
    names = [entry.name for entry in (*library.references(), *library.checkpoints(), *library.offsets())]
    return list(dict.fromkeys(names))


def what_is(session: Session, task: str | None, name: str) -> str:
    """A file in plain words, its figures, and what its metadata says."""
    return _inspection_html(session.inspect(name or ""))  # no job: it may be asked while pictures are made


def does_it_fit(session: Session, task: str | None, target: str, base: str, reference: str) -> str:
    """The verdict on a model and a pair, and a table by block."""
    report = session.jobs.run(
        "Does it fit?",
        lambda job: session.compat(
            job, target=parts.checkpoint_name(target), base=parts.checkpoint_name(base), reference=reference or ""
        ),
        task_id=task,
    )
    return _fit_html(report)


# ---- in words ----


def _inspection_html(found: Inspection) -> str:
    family = found.family or "an unknown architecture"
    rows: list[tuple[str, Any]] = [
        ("Layout", found.layout),
        ("Holds", ", ".join(_COMPONENTS.get(name, name) for name in found.components) or "nothing that is known here"),
        ("Size", f"{markup.size(found.file_bytes)}, {found.tensors:,} tensors, {found.parameters / 1e6:,.1f} M values"),
        ("Numbers", ", ".join(f"{count:,} × {dtype}" for dtype, count in found.dtypes.items())),
    ]
    if found.beside:
        rows.insert(2, ("Beside them", found.beside))
    if found.ranks:
        low, high = found.ranks
        rows.append(("Ranks", low if low == high else f"{low} to {high}"))
        rows.append(("Scale", found.scale_text))
    if found.energy_kept is not None:
        rows.append(("Keeps", f"{markup.percent(found.energy_kept)} of the change it was made from, as its metadata says"))
    if found.baked_in:
        rows.append(("Baked in", ", ".join(map(str, found.baked_in)) + ", as its metadata says"))
    rows.append(("SHA-256", found.sha256))
    notes = [*found.notes, *found.unplaced()]
    known = "plain" if found.kind != "unknown" else "doubt"
    answer = (
        f"It is {found.title}."
        if found.what
        else f"It is {found.title}, {family}."
        if found.kind != "unknown"
        else f"Not a model that is known here: {family}."
    )
    html = markup.card(found.path.name, answer, mood=known, body=markup.facts(rows))  # type: ignore[arg-type]
    html += "".join(markup.card("Note", words) for words in notes)
    if found.metadata:
        entries = [(key, _short(value)) for key, value in sorted(found.metadata.items())]
        html += markup.folded(f"Metadata ({len(entries)})", markup.facts(entries))
    return html


def _fit_html(report: CompatReport) -> str:
    inside = f"{in_digits(report.strength_inside, '+.2f')} ± {report.strength_error:.2f}"
    body = markup.facts([
        ("Strength to start with", f"{report.suggested_strength:.2g}"),
        ("Distance from the base", f"{markup.percent(report.drift)} of the weights' size"),
        ("DPO in it already", f"at strength {inside}"),
        ("Direction shared with the offset", f"{report.cosine:+.3f} (cosine: 1 the same, 0 unrelated)"),
    ])  # fmt: skip
    card = markup.card("Does it fit?", report.text, mood=_MOODS[report.level], body=body)
    rows = [
        (name, markup.percent(row.relative_drift), in_digits(row.strength, "+.2f"), f"{row.cosine:+.3f}")
        for name, row in report.blocks.items()
    ]
    head = ("Block", "Distance from the base", "DPO inside", "Shared direction")
    return card + markup.folded("By block", markup.table(head, rows))


def _short(value: str) -> str:
    words = " ".join(value.split())
    return words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"
