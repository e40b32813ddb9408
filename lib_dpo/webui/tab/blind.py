"""The page *Blind test*: two pictures, one of them with the offset, sides hidden; a vote by click or key; what votes say."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from lib_dpo.errors import DpoError, NotFoundError, SettingError
from lib_dpo.pictures.votes.ballots import Vote
from lib_dpo.settings import FIELDS
from lib_dpo.webui import blind, cards
from lib_dpo.webui.blind import Asked, Figures
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import clicks, markup, parts
from lib_dpo.webui.tab.compare import sampling_controls
from lib_dpo.webui.tab.markup import Mood
from lib_dpo.webui.tab.parts import Tab
from lib_dpo.webui.tab.standing import about

_HINT = (
    "Two pictures of one prompt and seed, one with the offset and one without it: choose the better one. Which is which is "
    "told after your vote. With several strengths, votes between them find the best one."
)
_KEYS = (
    "Click a picture, or press ← or →; ↓ no difference, ↑ skip. The wheel, + and − zoom both pictures alike, and 0 shows "
    "them whole."
)
_TITLES: dict[str, tuple[str, Mood]] = {
    "better": ("DPO is preferred", "good"),
    "worse": ("DPO is not preferred", "bad"),
    "no difference": ("No difference that matters", "doubt"),
    "open": ("So far", "plain"),
}
_BUTTONS = (("left", "← Left"), ("none", "↓ No difference"), ("skip", "↑ Skip"), ("right", "Right →"))


def page(tab: Tab) -> None:
    """What to test on top, the pair below it over the whole width, the figures last."""
    import gradio as gr

    session = tab.session
    with parts.page("Blind test", "dpo_blind"):
        with gr.Row(elem_classes=["dpo-page"]):
            with gr.Column(elem_classes=["dpo-controls"]):
                offset = parts.file_dropdown(
                    tab, parts.offsets, likely=parts.named_dpo, label="Offset to vote on", elem_id="dpo_blind_offset",
                    info="A LoRA or an offset file",
                )  # fmt: skip
                strengths = gr.Textbox(
                    value="1", label="Strengths to vote on", lines=1, max_lines=1, elem_id="dpo_blind_strengths",
                    info="One, against the untouched model; or several, to find the best: 0.5, 1, 1.5, 2",
                )  # fmt: skip
            with gr.Column(elem_classes=["dpo-controls"]):
                prompts = gr.Textbox(
                    label="Prompts to vote on", lines=3, elem_id="dpo_blind_prompts",
                    info="One per line; empty: the 60 that come with DPO",
                )  # fmt: skip
                take = gr.Button("Take from txt2img", elem_id="dpo_blind_take", visible=session.in_webui)
        with gr.Accordion("How pictures are drawn", open=False, elem_id="dpo_blind_how"):
            how = _picture_controls(session)
        with gr.Row(elem_classes=["dpo-buttons"]):
            go = gr.Button("Start or go on", variant="primary", elem_id="dpo_blind_go")
            parts.interrupt_button(tab, "dpo_blind_interrupt")
        place = parts.results(tab, "dpo_blind_result", _HINT, keep=True)
        view = parts.unsaved(gr.HTML("", elem_id="dpo_blind_view"))
        with gr.Row(elem_classes=["dpo-buttons", "dpo-votes"]):
            buttons = {choice: gr.Button(label, elem_id=f"dpo_blind_{choice}") for choice, label in _BUTTONS}
        figures = parts.unsaved(gr.HTML("", elem_id="dpo_blind_figures"))
        with gr.Row(elem_classes=["dpo-buttons"]):
            keep = gr.Button("Keep as this LoRA's preferred weight", visible=False, elem_id="dpo_blind_keep")
            export = gr.Button("Votes as a file", elem_id="dpo_blind_export", elem_classes=["dpo-interrupt"])
        kept = parts.unsaved(gr.HTML("", elem_id="dpo_blind_kept"))
        file = parts.unsaved(gr.HTML("", elem_id="dpo_blind_file"))
        looks = gr.Button("Look for the next pair", elem_id="dpo_blind_look", elem_classes=["dpo-hidden"])  # by dpo.js
        pair = gr.State("")
    seeds, blocks = how[1], how[-1]
    for unsaved in (prompts, how[0], seeds, blocks, how[2]):
        parts.unsaved(unsaved)
    clicks.start(
        tab, go, partial(start, session), [offset, strengths, prompts, *how], [place, view, figures, pair],
        about=lambda offset, *_: about(session, session.library.offset(offset), model=True, baked=True),
    )  # fmt: skip
    shown = [view, figures, pair]
    for choice, button in buttons.items():
        parts.on(button.click, partial(vote, session, choice), [pair], shown, **parts.UNASKED)
    parts.on(looks.click, partial(look, session), [pair], shown, **parts.UNASKED)
    parts.on(figures.change, partial(offer, session), [], [keep, kept], **parts.UNASKED)
    parts.on(keep.click, partial(keep_weight, session), [], [kept], **parts.UNASKED)
    parts.on(export.click, partial(votes_file, session), [], [file], **parts.UNASKED)
    taken = [prompts, how[0], seeds, how[3], how[4], how[2], how[5], how[6]]
    own = f"values.slice(0, {len(taken)})"
    parts.on(take.click, None, taken, taken, js=f"(...values) => window.dpoFromTxt2img ? dpoFromTxt2img({own}) : {own}")


def _picture_controls(session: Session) -> list[Any]:
    """Negative prompt, seeds, sampler, steps, CFG, width, height, block weights."""
    import gradio as gr

    with gr.Row():
        negative = gr.Textbox(label="Negative prompt of the pairs", lines=1, elem_id="dpo_blind_negative")
        seeds = gr.Textbox(
            value="1", label="Seeds of the pairs", lines=1, max_lines=1, elem_id="dpo_blind_seeds",
            info="When all prompts were shown, the next seed follows",
        )  # fmt: skip
    sampling = sampling_controls(session, "dpo_blind", " of the pairs")
    blocks = gr.Textbox(
        value="", lines=1, max_lines=1, label="Block weights to vote on", elem_id="dpo_blind_blocks",
        info=f"As on the page Bake: {FIELDS['blocks'].help}",
    )  # fmt: skip
    return [negative, seeds, *sampling, blocks]


# ---- what happens ----


def start(
    session: Session, task: str | None, offset: str, strengths: str, prompts: str, negative: str, seeds: str, sampler: str,
    steps: float, cfg: float, width: float, height: float, blocks: str,
) -> list[Any]:  # fmt: skip
    """Begin, or go on: a sentence on what is voted on, the first pair, the figures so far, and the pair's id."""
    for name, value in {"steps": steps, "CFG scale": cfg, "width": width, "height": height}.items():
        if value is None:
            raise SettingError(f"{name}: a number is missing")
    session.jobs.run(
        f"{blind.TITLE}, first pair",
        lambda job: session.blind.start(
            job, offset=offset or "", strengths=strengths or "", prompts=(prompts or "").splitlines(), negative=negative or "",
            seeds=str(seeds or ""), blocks=blocks or "", steps=int(steps), cfg_scale=float(cfg), sampler=sampler or "",
            width=int(width), height=int(height),
        ),
        task_id=task,
    )  # fmt: skip
    place = session.library.place(session.blind.folder)
    return [markup.note(f"{_KEYS} Votes are kept in {place}: closing the page loses none."), *_shown(session)]


def vote(session: Session, choice: str, pair: str) -> list[Any]:
    """Write the vote down; the next pair, the figures with what was just voted on, and the next pair's id."""
    try:
        session.blind.vote(pair or "", choice)
        return _shown(session)
    except Exception as error:  # noqa: BLE001  # the edge
        return [parts.update(), parts.error_html(session, error), parts.update()]


def look(session: Session, pair: str) -> list[Any]:
    """The pair that is voted on now, where the page shows another one or none: it was drawn meanwhile, or the page is new."""
    try:
        asked = session.blind.current()
        if asked and asked.id == pair:
            return [parts.update(), parts.update(), parts.update()]
        if asked is None and not session.blind.problem:
            return [_waiting(), parts.update(), ""]
        return _shown(session)
    except NotFoundError:  # no test is running: nobody asked for anything
        return [parts.update(), parts.update(), parts.update()]
    except Exception as error:  # noqa: BLE001  # the edge
        return [parts.error_html(session, error), parts.update(), parts.update()]


def offer(session: Session) -> list[Any]:
    """The button that keeps the best strength, where there is one; what it said of an earlier one goes."""
    try:
        best = cards.best_strength(session)
    except DpoError:  # no test, or its file is gone: nothing to keep
        best = None
    if best is None:
        return [parts.update(visible=False), ""]
    return [parts.update(value=f"Keep {best:g} as this LoRA's preferred weight", visible=True), ""]


def keep_weight(session: Session) -> str:
    """Put the best strength into the card of the LoRA."""
    try:
        return markup.note(cards.keep_best(session))
    except Exception as error:  # noqa: BLE001  # the edge
        return parts.error_html(session, error)


def votes_file(session: Session) -> str:
    """A link that saves the votes: it holds them itself, so that no folder has to be opened to the page."""
    try:
        data = base64.b64encode(session.blind.export().encode("utf-8")).decode("ascii")
    except Exception as error:  # noqa: BLE001  # the edge
        return parts.error_html(session, error)
    return (
        f'<p class="dpo-note"><a download="dpo-votes.jsonl" href="data:application/jsonl;base64,{data}">dpo-votes.jsonl</a></p>'
    )


def _shown(session: Session) -> list[Any]:
    asked = session.blind.current()
    if asked:
        view = pair_html(asked)
    else:
        view = markup.alert(session.library.names_only(session.blind.problem)) if session.blind.problem else _waiting()
    return [view, figures_html(session.blind.figures(), session.blind.last), asked.id if asked else ""]


# ---- in words and pictures ----


def _waiting() -> str:
    return '<p class="dpo-note dpo-waiting" role="status">The next pair is being drawn…</p>'


def pair_html(asked: Asked) -> str:
    """Both pictures side by side. Nothing here differs between them but the pixels."""
    figures = "".join(
        f'<figure data-dpo-vote="{side}"><img src="data:image/jpeg;base64,{base64.b64encode(data).decode("ascii")}" '
        f'alt="{side} picture" draggable="false"></figure>'
        for side, data in zip(("left", "right"), asked.jpeg, strict=True)
    )
    zoom = '<label class="dpo-zoom">Zoom <input type="range" min="1" max="8" step="0.5" value="1"></label>'
    prompt = f'<p class="dpo-note">{markup.text(asked.prompt)}</p>'
    return f'<div class="dpo-blind">{figures}</div><div class="dpo-under">{prompt}{zoom}</div>'


def figures_html(figures: Figures, last: Vote | None = None) -> str:
    """What was just voted on, and what all votes say."""
    title, mood = _TITLES[figures.tally.verdict]
    if figures.tally.opposite:
        title = title.replace("DPO", "The opposite of DPO")
    sentences, body = [figures.tally.text], ""
    if figures.curve:
        curve = figures.curve
        sentences.insert(0, curve.text)
        rows = [(f"{strength:g}", f"{100 * curve.preferred(strength):.0f} %") for strength in curve.tried if strength]
        body = markup.table(("Strength", "Preferred to the untouched model"), rows)
    found = markup.note(_told(last)) if last else ""
    found += markup.card(title, *sentences, mood=mood, body=body)
    return found + "".join(markup.note(problem) for problem in figures.problems[:5])


def _told(vote: Vote) -> str:
    other = "right" if vote.side == "left" else "left"
    names = {vote.side: _strength(vote.a), other: _strength(vote.b)}
    chosen = {"a": _strength(vote.a), "b": _strength(vote.b), "none": "no difference", "skip": "nothing: skipped"}
    return f"That was {names['left']} at the left and {names['right']} at the right. You chose {chosen[vote.answer]}."


def _strength(value: float) -> str:
    return f"strength {value:g}" if value else "the untouched model"
