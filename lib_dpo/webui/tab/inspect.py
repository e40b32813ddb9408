"""The last page: what a file is, and whether an offset fits a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lib_dpo.errors import DpoError
from lib_dpo.hosts.base import Job
from lib_dpo.offsets.file_kinds import labelled, plain_name
from lib_dpo.pictures.bars import block_columns, rank_columns, strength_line
from lib_dpo.settings import in_digits
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import clicks, markup, parts
from lib_dpo.webui.tab.markup import Mood
from lib_dpo.webui.tab.parts import Tab
from lib_dpo.webui.tab.standing import About, about

if TYPE_CHECKING:
    from lib_dpo.operations.compat import CompatReport
    from lib_dpo.operations.inspect import Inspection

_HINT = "Choose a file to see what it is, or three to see whether the offset of a pair fits a model."
_COMPONENTS = {
    "unet": "UNet", "te": "text encoder", "te1": "text encoder 1", "te2": "text encoder 2", "vae": "VAE",
}  # fmt: skip
FOUND = "Found among your checkpoints"  # the first choice of a base: the one from which the reference was tuned
_LONGEST = 300  # letters of one metadata entry that are shown


def page(tab: Tab) -> None:
    """Two questions at the left, answers at the right."""
    import gradio as gr

    with parts.page("Inspect", "dpo_inspect"), gr.Row(elem_classes=["dpo-page"]):
        with gr.Column(elem_classes=["dpo-controls"]):
            _heading(
                "What is this file?", "Kind, family, what it was made from, and what it says of itself.", "dpo_inspect_what"
            )
            file = parts.file_dropdown(
                tab, everything, likely=parts.first, label="File", elem_id="dpo_inspect_file",
                info="A checkpoint, reference, LoRA or offset file",
            )  # fmt: skip
            with gr.Row(elem_classes=["dpo-buttons"]):
                look = gr.Button("What is it?", elem_id="dpo_inspect_look")
            _heading(
                "Does it fit my model?", "How far your model is from the base, and whether DPO is in it.", "dpo_inspect_fits"
            )
            target = parts.file_dropdown(
                tab, models, likely=parts.first, label="Your model", value=parts.LOADED,
                elem_id="dpo_inspect_target", info="Any finetune or merge, Pony too",
            )  # fmt: skip
            base = parts.file_dropdown(
                tab, bases, likely=parts.first, label="Base of the pair", value=FOUND,
                elem_id="dpo_inspect_base", info="The model before DPO",
            )  # fmt: skip
            reference = parts.file_dropdown(
                tab, references, likely=parts.named_dpo, label="DPO reference of the pair",
                elem_id="dpo_inspect_reference", info="The model after DPO",
            )  # fmt: skip
            with gr.Row(elem_classes=["dpo-buttons"]):
                fit = gr.Button("Does it fit?", variant="primary", elem_id="dpo_inspect_fit")
                parts.interrupt_button(tab, "dpo_inspect_interrupt")
        with gr.Column(elem_classes=["dpo-answers"]):
            place = parts.results(tab, "dpo_inspect_result", _HINT)
    session = tab.session

    def of_three(target: str, base: str, reference: str) -> About:
        tuned = session.library.reference(_name(reference))
        chosen = _name(target), session.references.nearest.get(tuned, FOUND) if base == FOUND else _name(base)
        return about(session, *chosen, tuned, model=not all(chosen))

    clicks.start(tab, look, partial(what_is, session), [file], [place], about=lambda name: about(session, _name(name)))
    clicks.start(tab, fit, partial(does_it_fit, session), [target, base, reference], [place], about=of_three)


def _heading(question: str, sentence: str, elem_id: str) -> None:
    import gradio as gr

    parts.unsaved(gr.HTML(markup.headed(question, sentence), elem_id=elem_id))


def everything(session: Session) -> list[str]:
    """The names of all lists, each once, and what each file is."""
    library = session.library
    files: dict[str, Path] = {}
    for entry in (*library.references(), *library.checkpoints(), *library.offsets()):
        files.setdefault(entry.name, entry.path)
    return labelled(files.items())


def models(session: Session) -> list[str]:
    """The loaded checkpoint, and all others with what each is, as far as the list of everything had time to look."""
    return [parts.LOADED, *labelled(((entry.name, entry.path) for entry in session.library.checkpoints()), seconds=0)]


def bases(session: Session) -> list[str]:
    """The same, and before them that it is to be found."""
    return [FOUND, *models(session)]


def references(session: Session) -> list[str]:
    """Tuned models, in the same way."""
    return labelled(((entry.name, entry.path) for entry in session.library.references()), seconds=0)


def _name(choice: str | None) -> str:
    """What the session calls a file of these lists."""
    return plain_name(parts.checkpoint_name(choice))


def what_is(session: Session, task: str | None, name: str) -> str:
    """A file in plain words, its figures, and what its metadata says."""
    return _inspection_html(session.inspect(_name(name)))  # no job: it may be asked while pictures are made


def does_it_fit(session: Session, task: str | None, target: str, base: str, reference: str) -> str:
    """The verdict on a model and a pair, and a table by block."""
    names = _name(target), _name(reference)

    def work(job: Job) -> tuple[CompatReport, str]:
        found = session.references.nearest_base(session.library.reference(names[1]), job) if base == FOUND else ""
        return session.compat(job, target=names[0], base=found or _name(base), reference=names[1]), found

    html = _fit_html(*session.jobs.run("Does it fit?", work, task_id=task))
    return _beside_a_bake(session, names[0]) + html


def _beside_a_bake(session: Session, target: str) -> str:
    """That a bake in the loaded model does not count, where its file was asked about."""
    try:
        status = session.status()
        asked = session.library.any(target) if target else None
    except DpoError:  # it went meanwhile; the answer stands
        return ""
    if not status.baked or not status.model or asked not in (None, status.model.path):
        return ""
    told = f"{status.baked.offset} × {status.baked.strength:g}"
    return markup.note(
        f"When this was asked, the loaded model had {told} baked in. That does not count here, only its file does."
    )


# ---- in words ----


def _inspection_html(found: Inspection) -> str:
    family = found.family or "an unknown architecture"
    known: Mood = "plain" if found.kind != "unknown" else "doubt"
    answer = (
        f"It is {found.title}."
        if found.what
        else f"It is {found.title}, {family}."
        if found.kind != "unknown"
        else f"Not a model that is known here: {family}."
    )
    body = markup.facts([*_origin(found), *_facts(found)]) + _pictures(found)
    html = markup.card(f"What is {found.path.name}?", answer, mood=known, body=body)
    if found.breeds:
        html += markup.card("Will an offset do the same on it?", *(_sentence(b.text) for b in found.breeds), mood="doubt")
    html += "".join(markup.card("Note", words) for words in (*found.notes, *found.unplaced()))
    if found.metadata:
        entries = [(key, _short(value)) for key, value in sorted(found.metadata.items())]
        html += markup.folded(f"Metadata ({len(entries)})", markup.facts(entries))
    return html


def _origin(found: Inspection) -> list[tuple[str, object]]:
    """What a LoRA or offset file was made from, and what it keeps of that: what people look for first."""
    said = found.metadata
    rows: list[tuple[str, object]] = [
        (title, said[key]) for title, key in (("Base", "dpo.base"), ("DPO reference", "dpo.tuned")) if said.get(key)
    ]
    if found.energy_kept is not None:
        rows.append(("Keeps", f"{markup.percent(found.energy_kept)} of the change it was made from, as its metadata says"))
    if found.baked_in:
        rows.append(("Baked in", ", ".join(map(str, found.baked_in)) + ", as its metadata says"))
    return rows


def _facts(found: Inspection) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    if found.ranks:
        low, high = found.ranks
        rows += [("Ranks", low if low == high else f"{low} to {high}"), ("Scale", found.scale_text)]
    rows.append(("Holds", ", ".join(_COMPONENTS.get(name, name) for name in found.components) or "nothing that is known here"))
    if found.beside:
        rows.append(("Beside them", found.beside))
    rows += [
        ("Size", f"{markup.size(found.file_bytes)}, {found.tensors:,} tensors, {found.parameters / 1e6:,.1f} M values"),
        ("Numbers", ", ".join(f"{count:,} × {dtype}" for dtype, count in found.dtypes.items())),
        ("Layout", found.layout),
    ]
    if found.card and found.card.text:
        rows.append(("Its card", found.card.text))
    rows.append(("SHA-256", found.sha256))
    return rows


def _pictures(found: Inspection) -> str:
    """Where a LoRA changes the model, and its ranks where they differ."""
    html = ""
    if found.block_shares:
        shares = {block: (share,) for block, share in found.block_shares.items()}
        html += block_columns(shares, ["share"], "Where it changes the model: shares of its energy by block")
    if len(found.rank_counts) > 1:
        html += rank_columns(found.rank_counts, "How many layers have which rank")
    return html


def fit_mood(report: CompatReport) -> Mood:
    """The mark of the verdict; a model that was held against itself was not judged."""
    return "doubt" if report.itself else markup.LEVELS[report.level]


def _fit_html(report: CompatReport, found: str) -> str:
    inside = f"{in_digits(report.strength_inside, '+.2f')} ± {report.strength_error:.2f}"
    body = strength_line(
        report.strength_inside, report.strength_error, f"DPO in it already: {inside} (0 none, 1 all of it)"
    ) + markup.facts([
        *([("Base, found among your checkpoints", found)] if found else []),
        ("Strength to start with", f"{report.suggested_strength:.2g}"),
        ("Distance from the base", f"{markup.percent(report.drift)} of the weights' size"),
        ("Direction shared with the offset", f"{report.cosine:+.3f} (cosine: 1 the same, 0 unrelated)"),
    ])  # fmt: skip
    if report.blocks:
        both = {name: (row.relative_drift, row.relative_offset) for name, row in report.blocks.items()}
        body += block_columns(both, ["your model", "the offset"], "Distance from the base by block, of the weights' size")
    card = markup.card("Does it fit your model?", report.text, mood=fit_mood(report), body=body)
    rows = [
        (
            name, markup.percent(row.relative_drift), markup.percent(row.relative_offset), in_digits(row.strength, "+.2f"),
            f"{row.cosine:+.3f}",
        )
        for name, row in report.blocks.items()
    ]  # fmt: skip
    head = ("Block", "Distance from the base", "Size of the offset", "DPO inside", "Shared direction")
    return card + markup.folded("By block", markup.table(head, rows))


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _short(value: str) -> str:
    words = " ".join(value.split())
    return words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"
