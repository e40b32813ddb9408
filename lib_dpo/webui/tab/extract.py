"""The first page: what DPO changed, and that as a LoRA or an offset file."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lib_dpo.errors import SettingError
from lib_dpo.families.blocks import block_labels
from lib_dpo.settings import DEFAULT_RANK, FIELDS, LORA_PRECISIONS, METHODS, PROFILES, ExtractSettings, Method, RankPolicy
from lib_dpo.webui.results import Analysis, Extracted
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup, parts
from lib_dpo.webui.tab.markup import Mood
from lib_dpo.webui.tab.parts import Tab, field_options
from lib_dpo.webui.tab.standing import About, about

if TYPE_CHECKING:
    from lib_dpo.operations.diff import DiffReport, Spectra
    from lib_dpo.operations.write_offset import OffsetReport

BY_RANK, BY_SIZE, BY_ENERGY, EXACT = "Rank", "File size", "Share of the change", "Exact"
_MOODS: dict[str, Mood] = {
    "fits": "good", "base": "good", "doubtful": "doubt", "weaker": "doubt", "contained": "doubt", "other": "doubt",
    "wrong": "bad",
}  # fmt: skip
_HINT = "Choose a base and a DPO reference, then Analyse: it says whether they belong together before anything is written."


def page(tab: Tab) -> None:
    """Controls at the left, results at the right."""
    import gradio as gr

    with parts.page("Extract", "dpo_extract"), gr.Row(elem_classes=["dpo-page"]):
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
                look = gr.Button("Analyse", elem_id="dpo_extract_analyse")
                spectra = gr.Checkbox(
                    False, label="With what each size keeps (slower)", elem_id="dpo_extract_spectra"
                )  # fmt: skip
            numbers = _size_controls(tab)
            settings = _advanced_controls()
            name = gr.Textbox(
                label="Name of the new file", placeholder="as the reference", lines=1, max_lines=1, elem_id="dpo_extract_name"
            )
            overwrite = gr.Checkbox(False, label="Replace a file of this name", elem_id="dpo_extract_overwrite")
            with gr.Row(elem_classes=["dpo-buttons"]):
                go = gr.Button("Extract DPO LoRA", variant="primary", elem_id="dpo_extract_go")
                dense = gr.Button("Write offset file", elem_id="dpo_extract_dense")
                parts.interrupt_button(tab, "dpo_extract_interrupt")
            gr.HTML(markup.note(
                "An offset file holds the whole change, in float32, for exact bakes. It is as large as a UNet, and is written "
                "into the reference folder."
            ), elem_id="dpo_extract_dense_help")  # fmt: skip
        with gr.Column(elem_classes=["dpo-answers"]):
            place = parts.results(tab, "dpo_extract_result", _HINT)
            plot = parts.picture(label="Where the change lies and how it is spread", visible=False, elem_id="dpo_extract_plot")
    for unsaved in (name, overwrite, spectra):
        parts.unsaved(unsaved)
    session, pair = tab.session, [base, reference]
    library = session.library

    def of_pair(base: str, reference: str, *_: Any) -> About:
        return about(session, parts.checkpoint_name(base), library.reference(reference), model=True)

    def of_lora(base: str, reference: str, name: str, *_: Any) -> About:
        return about(session, library.new_lora(_name(name, reference, "lora")), model=True)

    def of_offset(base: str, reference: str, name: str, *_: Any) -> About:
        return about(session, library.new_offset(_name(name, reference, "offset")))

    named = [*pair, name, overwrite]
    parts.start(tab, look, partial(analyse, session), [*pair, spectra, tab.theme], [place, plot], about=of_pair)
    parts.start(
        tab, go, partial(extract, session), [*named, *numbers, *settings], [place], about=of_lora, writes=True
    )  # fmt: skip
    parts.start(tab, dense, partial(write_offset, session), named, [place], about=of_offset, writes=True)


def _size_controls(tab: Tab) -> list[Any]:
    """How large the LoRA becomes: a choice, and the number that goes with it."""
    import gradio as gr

    by = gr.Radio(
        choices=[BY_RANK, BY_SIZE, BY_ENERGY, EXACT], value=BY_RANK, label="Choose the LoRA's size by", elem_id="dpo_extract_by"
    )
    with gr.Row():
        rank = gr.Slider(
            minimum=1, maximum=320, step=1, value=DEFAULT_RANK, **field_options("rank"), elem_id="dpo_extract_rank"
        )
        conv_rank = gr.Slider(
            minimum=0, maximum=320, step=1, value=0, label=FIELDS["conv_rank"].label, elem_id="dpo_extract_conv_rank",
            info="Of 3x3 convolutions; 0: the same as Rank",
        )  # fmt: skip
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
        markup.note("All of the UNet's change, a byte for each weight: 0.86 GB for SD 1.5, 2.6 GB for SDXL. Where text "
                    "encoders changed, their matrices too, which makes it larger; their norms and embeddings are left out. "
                    "A LoRA (LoKr) for prompts in WebUIs and ComfyUI; diffusers cannot read it. Profile, method and "
                    "precision do not matter for it."),
        visible=False, elem_id="dpo_extract_exact",
    )  # fmt: skip
    shown = {rank: BY_RANK, conv_rank: BY_RANK, size: BY_SIZE, energy: BY_ENERGY, exact: EXACT}
    parts.follow(tab, by, lambda choice: [parts.update(visible=name == choice) for name in shown.values()], list(shown))
    return [by, rank, conv_rank, size, energy]


def _advanced_controls() -> list[Any]:
    import gradio as gr

    defaults = ExtractSettings()
    rows = {"method": ("method", METHODS), "profile": ("profile", PROFILES), "precision": ("lora_precision", LORA_PRECISIONS)}
    with gr.Accordion("Advanced", open=False, elem_id="dpo_extract_advanced"):
        return [
            gr.Dropdown(
                choices=list(choices), value=getattr(defaults, name), **field_options(field), elem_id=f"dpo_extract_{name}"
            )
            for name, (field, choices) in rows.items()
        ]


# ---- what happens at a click ----


def analyse(session: Session, task: str | None, base: str, reference: str, spectra: bool, theme: str = "") -> list[Any]:
    """Verdicts as cards, and the picture where spectra were asked for, in the colours of the page's theme."""
    if spectra:
        session.host.check_pictures()
    found = session.jobs.run(
        "Analyse",
        lambda job: session.analyse(job, base=parts.checkpoint_name(base), reference=reference or "", spectra=bool(spectra)),
        task_id=task,
    )
    picture = _plot(found.diff, theme) if found.diff.spectra else None
    shown = parts.update(value=picture, visible=picture is not None)
    return [_analysis_html(session, found), shown]


def extract(
    session: Session, task: str | None, base: str, reference: str, name: str, overwrite: bool,
    by: str, rank: float, conv_rank: float, size: float, energy: float, method: Method, profile: str, precision: str,
) -> str:  # fmt: skip
    """Write the LoRA; its result card."""
    policy = _policy(by, rank, conv_rank, size, energy)
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
    return _extracted_html(session, found)


def write_offset(session: Session, task: str | None, base: str, reference: str, name: str, overwrite: bool) -> str:
    """Write the offset file; its result card."""
    found = session.jobs.run(
        "Write offset file",
        lambda job: session.write_offset(
            job, base=parts.checkpoint_name(base), reference=reference or "", name=_name(name, reference, "offset"),
            overwrite=bool(overwrite),
        ),
        task_id=task,
    )  # fmt: skip
    return _offset_html(session, found)


def _policy(by: str, rank: float | None, conv_rank: float | None, size: float | None, energy: float | None) -> RankPolicy:
    """The size controls as a rank policy. Raises SettingError."""
    if by == EXACT:
        return RankPolicy()
    if by == BY_SIZE:
        return RankPolicy(size_mb=_number(size, "size in MB"))
    if by == BY_ENERGY:
        return RankPolicy(energy=_number(energy, "share of the change") / 100)
    return RankPolicy(rank=int(_number(rank, "rank")), conv_rank=int(conv_rank or 0) or None)


def _number(value: float | None, what: str) -> float:
    if value is None:
        raise SettingError(f"the {what} is missing; give a number")
    return value


def _name(name: str | None, reference: str | None, kind: str) -> str:
    """The name that was typed, or one after the reference."""
    typed = (name or "").strip()
    stem = PurePosixPath((reference or "").rsplit(" [", 1)[0].replace("\\", "/")).name.removesuffix(".safetensors")
    return typed or (f"{stem.removesuffix('.ckpt')}-{kind}" if stem else "")


# ---- in words ----


def _analysis_html(session: Session, found: Analysis) -> str:
    report = found.diff
    verdict = report.verdict
    cards = [
        markup.card("Is it the right base?", verdict.text, mood=_MOODS[verdict.level]),
        _fit_card(session, found),
        markup.card("LoRA or bake?", *_lora_or_bake(report.spectra)),
        markup.card("Which strength to start with?", _strength(found)),
    ]
    return "".join(cards) + _figures(report)


def _fit_card(session: Session, found: Analysis) -> str:
    title = "Does it fit the loaded model?"
    if found.compat:
        return markup.card(title, found.compat.text, mood=_MOODS[found.compat.level])
    status = session.status()
    if status.model is None:
        return markup.card(title, "No checkpoint is loaded, so this cannot be said yet.")
    if status.architecture is None or status.architecture.name != found.diff.architecture:
        own = status.architecture.title if status.architecture else "not a model that DPO is known for"
        of_pair = found.diff.tally.architecture.title
        return markup.card(title, f"No: {status.model.name} is {own} and this pair is {of_pair}.", mood="bad")
    return markup.card(title, f"Yes: {status.model.name} is itself the base or the reference.", mood="good")


def _lora_or_bake(spectra: Spectra | None) -> list[str]:
    general = (
        "Start with a LoRA: it is small and you can turn it up and down as you like. When you know the strength you like, "
        "bake it from an offset file: that holds all of the change and costs nothing when you generate."
    )
    if not spectra:
        return [
            general,
            "To see how much a LoRA of each size keeps, tick «With what each size keeps» and Analyse again (slower).",
        ]
    best = dict(zip(spectra.ranks, zip(spectra.energy_at_rank, spectra.size_mb_at_rank, strict=True), strict=True))
    rank = min(DEFAULT_RANK, max(best))
    kept, size = best[rank]
    return [
        f"A LoRA of rank {rank} keeps at best {markup.percent(kept)} of this change ({markup.in_words(kept)}), in "
        f"{size:.3g} MB.",
        general,
    ]


def _strength(found: Analysis) -> str:
    if not found.compat:
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
    rows = [(name, tally.blocks[name]) for name in block_labels(tally.architecture) if name in tally.blocks]
    changed = [(name, row.relative_change, markup.percent(row.relative_change)) for name, row in rows if row.offset]
    body = markup.facts([*parts_, ("VAE", report.vae)])
    body += markup.bars("Size of the change by block, in % of the weights", changed)
    return markup.folded("The figures", body)


def _extracted_html(session: Session, found: Extracted) -> str:
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
    if report.wider_text:
        sentences.append(report.wider_text + ".")
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
    body += markup.note(("Or choose" if in_webui else "Choose") + f" it {_places(in_webui)}.")
    cards = markup.card(f"{found.name} is written", *sentences, mood=mood, body=body)
    if report.verdict.level != "fits":
        cards = markup.card("Look at the base first", report.verdict.text, mood=_MOODS[report.verdict.level]) + cards
    return cards


def _offset_html(session: Session, found: OffsetReport) -> str:
    left_out = "The text encoders differ too; an offset file holds the UNet only." if found.text_encoder_left_out else ""
    body = markup.facts(
        [("File", session.library.place(found.path)), ("Size", markup.size(found.file_bytes)), ("Tensors", found.tensors)]
    )
    cards = markup.card(
        f"{found.path.stem} is written",
        f"It holds all of what DPO changed. Choose it {_places(session.in_webui)}.",
        left_out, mood="good", body=body,
    )  # fmt: skip
    if found.verdict.level != "fits":
        cards = markup.card("Look at the base first", found.verdict.text, mood=_MOODS[found.verdict.level]) + cards
    return cards


def _places(in_webui: bool) -> str:
    """Where an offset can be used."""
    return "on the pages Compare and Bake" + (", or in «DPO offset» below the prompt" if in_webui else "")


def _plot(report: DiffReport, theme: str) -> Any:
    """The picture of `diff --plot`, in memory."""
    from PIL import Image

    from lib_dpo.pictures.plots import plot_diff

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "diff.png"
        plot_diff(report, path, dark=theme == parts.DARK)
        with Image.open(path) as picture:
            return picture.copy()
