"""What the page Extract says: first of all, on a pair that was analysed, and on the files that were written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_dpo.families.blocks import block_labels
from lib_dpo.files.references.known import REFERENCES
from lib_dpo.pictures.curve import heat_map, spectrum_curve
from lib_dpo.settings import DEFAULT_RANK
from lib_dpo.webui.results import Analysis, Extracted
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup, parts
from lib_dpo.webui.tab.markup import Mood

if TYPE_CHECKING:
    from lib_dpo.operations.diff import DiffReport, Spectra
    from lib_dpo.operations.write_offset import OffsetReport

_MUCH = 0.5  # of the change, from which on a LoRA of the default rank does for most uses


def first_view(session: Session, reference: str | None) -> str:
    """What the tab does and the way through it; where there is no reference, which file to put where."""
    folder = session.host.reference_dir
    place = f"{folder.parent.name}/{folder.name}"
    chosen = f"Chosen: {reference}. Others go into {place}."
    there = bool(reference or parts.named_dpo(parts.references(session)))  # the list is filled a moment after the page is shown
    none = f"A model after DPO. Fetch one below, or put a file into {place} and press ↻ beside the list."
    choose = f"A model after DPO: choose one in the list. Others go into {place}."
    steps = [
        ("Get a reference", chosen if reference else choose if there else none),
        ("Extract", "Analyse the pair, choose a size on the curve, and write the LoRA."),
        ("Compare", "See pictures with and without it. Then use it in prompts, or bake it into a model."),
    ]
    rows = "".join(f"<li><b>{markup.text(name)}</b> {markup.text(words)}</li>" for name, words in steps)
    return (
        '<section class="dpo-first">'
        "<p>This tab takes what preference tuning (DPO) changed in a model, and gives it to you as a LoRA for other models of "
        f"the same family.</p><ol>{rows}</ol>{'' if there else _where_from(place)}</section>"
    )


def _where_from(place: str) -> str:
    """The published references, and what to call their files here."""
    rows = "".join(
        f'<li><a href="{each.page}" target="_blank" rel="noreferrer">{each.repo}</a> has {each.file} '
        f"({markup.size(each.size)}): save that as {place}/{each.name}.safetensors</li>"
        for each in REFERENCES
        if each.file and each.size
    )
    return (
        '<p class="dpo-note">There is no reference yet. «Get a reference» below fetches one; or get one of these by hand:</p>'
        f"<ul>{rows}</ul>"
    )


def analysis_html(session: Session, found: Analysis) -> str:
    """The answers about a pair, and where its change lies."""
    from lib_dpo.operations.verdict import changed_text_encoders  # the maths, without which a WebUI starts

    report = found.diff
    verdict, encoders = report.verdict, changed_text_encoders(report.tally)
    cards = [
        markup.card("Is it the right base?", verdict.text, mood=markup.LEVELS[verdict.level]),
        _fit_card(session, found),
        markup.card("LoRA or bake?", *_lora_or_bake(report.spectra, encoders=bool(encoders))),
        markup.card("Which strength to start with?", _strength(found)),
    ]
    if found.not_kept:
        cards.append(markup.note(f"The figures are not remembered: {found.not_kept}. The next look will take as long again."))
    return "".join(cards) + _figures(report)


def _fit_card(session: Session, found: Analysis) -> str:
    title = "Does it fit the loaded model?"
    if found.compat:
        return markup.card(title, found.compat.text, mood=markup.LEVELS[found.compat.level])
    status = session.status()
    if status.model is None:
        return markup.card(title, "No checkpoint is loaded, so this cannot be said yet.")
    if status.architecture is None or status.architecture.name != found.diff.architecture:
        own = status.architecture.title if status.architecture else "not a model that DPO is known for"
        of_pair = found.diff.tally.architecture.title
        return markup.card(title, f"No: {status.model.name} is {own} and this pair is {of_pair}.", mood="bad")
    verdict = found.diff.verdict
    if found.loaded == "reference":
        return markup.card(title, f"{status.model.name} is the reference itself: all of it is in it already.", mood="doubt")
    if verdict.level != "fits":
        return markup.card(
            title, f"{status.model.name} is the base of this pair. {verdict.text}", mood=markup.LEVELS[verdict.level]
        )
    return markup.card(title, f"Yes: {status.model.name} is itself the base.", mood="good")


def _lora_or_bake(spectra: Spectra | None, *, encoders: bool) -> list[str]:
    """What the figures of this pair speak for; `encoders`: whether text encoders changed, which no offset file holds."""
    if not spectra:
        return ["A LoRA for trying, an exact LoRA or a bake for all of the change."]
    kept_at = dict(zip(spectra.ranks, spectra.energy_at_rank, strict=True))
    rank = min(DEFAULT_RANK, max(kept_at))
    kept, most = kept_at[rank], max(kept_at.values())
    unet = " of the UNet's part" if encoders else ""
    found = f"at rank {rank} it keeps {markup.percent(kept)} of this change ({markup.in_words(kept)})"
    if kept >= markup.NEARLY_ALL:
        return [f"A LoRA: {found}. Then a bake would add nothing that you can see."]
    if kept >= _MUCH:
        return [
            f"Start with a LoRA: {found}, and at its largest {markup.percent(most)}.",
            f"For the rest, write an exact LoRA, or bake from an offset file: both hold all{unet or ' of it'}.",
        ]
    return [
        f"A LoRA to try it, more to have it: {found}, for the change is spread over very many directions; at its largest "
        f"{markup.percent(most)}.",
        f"All{unet or ' of it'} is in an exact LoRA, for prompts, or in an offset file, to bake: that costs nothing when you "
        "generate.",
    ]


def _strength(found: Analysis) -> str:
    if not found.compat:
        if found.loaded == "reference":
            return "0: the loaded model is the reference, which has all of it already."
        if found.diff.verdict.level != "fits":
            return "0.5 or less, if at all: first look for the right base."
        return "1, the full change; 0.5 to 1.5 is worth comparing (page Compare)."
    start = found.compat.suggested_strength
    if not start:
        return "0: the model has all of it already."
    return f"{start:.2g}; compare a little less and a little more (page Compare)."


def _figures(report: DiffReport) -> str:
    tally = report.tally
    parts_ = [
        (name, f"{markup.percent(row.relative_change)} of {row.numel / 1e6:.1f} M weights' size; rounding alone explains "
               f"{markup.percent(row.noise_floor)}")
        for name, row in tally.components.items()
    ]  # fmt: skip
    labels = [name for name in block_labels(tally.architecture) if name in tally.blocks]
    changed = [(name, tally.blocks[name].relative_change) for name in labels if tally.blocks[name].offset]
    heat = heat_map(report.heat_map(), labels, "Where it changed, in % of the weights")
    body = markup.facts([*parts_, ("VAE", report.vae)])
    body += markup.bars("Size of the change by block, in % of the weights", ((n, v, markup.percent(v)) for n, v in changed))
    spectrum = ""
    if report.spectra:
        curve = spectrum_curve(report.spectra.mean_spectrum, "Singular values, the first as 1: mean of all layers")
        spectrum = markup.folded("How the change is spread", curve)
    return f'<section class="dpo-card dpo-plain">{heat}</section>{spectrum}{markup.folded("The figures", body)}'


def extracted_html(session: Session, found: Extracted) -> str:
    """The card of a new LoRA, from which it can be used."""
    in_webui = session.in_webui
    report = found.report
    kept = report.tally.total.energy_kept
    used = [rank for rank in report.ranks.values() if rank]
    ranks = "" if not used else str(used[0]) if min(used) == max(used) else f"{min(used)} to {max(used)}"
    sentences = [f"The LoRA keeps {markup.in_words(kept)} of what DPO changed: {markup.percent(kept)} of the energy."]
    if report.energy_wanted is not None and kept < report.energy_wanted - 1e-4:
        sentences.append(
            f"You asked for {markup.percent(report.energy_wanted)}: a LoRA that keeps more would be larger than the "
            "layers that it stands for. An offset file holds all of the change."
        )
    if report.exhausted:
        sentences.append(report.exhausted_text + ".")
    rows: list[tuple[str, object]] = [
        ("File", session.library.place(report.path)), ("Size", markup.size(report.file_bytes)), ("Layers", report.layers),
        ("Numbers", report.precision) if report.form == "exact" else ("Ranks", ranks or "no pairs"),
    ]  # fmt: skip
    if report.form == "exact":
        sentences.append("WebUIs and ComfyUI read it in prompts as any LoRA; diffusers does not.")
    sentences += [f"{text}." for text in (report.wider_text, report.card_text) if text]
    mood: Mood = "good"
    if found.matched is None:
        rows.append(("Loaded model", "of another family: the LoRA is not for it"))
    else:
        matched, of = found.matched
        mood = "good" if matched == of else "doubt"
        rows.append(("This WebUI's loader" if in_webui else "The loader here", f"knows {matched:,} of its {of:,} keys"))
    body = markup.facts(rows)
    if in_webui:
        body += "<p>In the prompt:</p>" + markup.code(f"<lora:{found.name}:1>")
    body += _doors(f"<lora:{found.name}:1>" if in_webui else "")
    cards = markup.card(f"{found.name} is written", *sentences, mood=mood, body=body)
    if report.verdict.level != "fits":
        cards = markup.card("Look at the base first", report.verdict.text, mood=markup.LEVELS[report.verdict.level]) + cards
    return cards


def offset_html(session: Session, found: OffsetReport) -> str:
    """The card of a new offset file."""
    kept = found.kept.total.energy_kept
    left_out = "The text encoders differ too; an offset file holds the UNet only." if found.text_encoder_left_out else ""
    body = markup.facts(
        [("File", session.library.place(found.path)), ("Size", markup.size(found.file_bytes)), ("Tensors", found.tensors)]
    )
    cards = markup.card(
        f"{found.path.stem} is written",
        f"It holds {'all' if kept >= markup.ALL else markup.percent(kept)} of what DPO changed.", left_out,
        mood="good" if kept >= markup.NEARLY_ALL else "doubt", body=body + _doors(),
    )  # fmt: skip
    if found.verdict.level != "fits":
        cards = markup.card("Look at the base first", found.verdict.text, mood=markup.LEVELS[found.verdict.level]) + cards
    return cards


def _doors(tag: str = "") -> str:
    """Where to go with the new file; dpo.js opens these doors. `tag` is what a prompt would hold of it."""
    prompt = ""
    if tag:
        title = "Put the LoRA into the prompt of txt2img"
        prompt = f'<button type="button" data-dpo-prompt="{markup.text(tag)}" title="{title}">Use in prompt</button>'
    doors = [
        ("dpo_extract_to_compare", "Compare", "See pictures with and without it"),
        ("dpo_extract_to_bake", "Bake", "Add it to the loaded model"),
    ]
    buttons = "".join(markup.door(press, label, title) for press, label, title in doors)
    return f'<div class="dpo-doors">{prompt}{buttons}</div>'
