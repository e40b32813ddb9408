"""The section that gets a reference: the published ones, what one of them would take, the fetch, and the base for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lib_dpo.errors import DpoError, OutputError
from lib_dpo.files.references.fetch import Offer
from lib_dpo.webui.references.picker import Fetching, names
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup, parts
from lib_dpo.webui.tab.extract.reference_cards import (
    base_html,
    by_hand_html,
    fetch_html,
    known_html,
    offer_html,
    table_html,
)
from lib_dpo.webui.tab.parts import Tab


def section(tab: Tab) -> Callable[[Any, Any], None]:
    """The folded section. Returns what wires it to the lists of references and bases, which stand below it."""
    import gradio as gr

    session = tab.session
    with gr.Accordion("Get a reference", open=False, elem_id="dpo_references") as folded:
        table = parts.unsaved(gr.HTML("", elem_id="dpo_references_table"))
        with gr.Row(elem_classes=["dpo-with-button", "dpo-references-choice"]):
            choice = parts.unsaved(
                gr.Dropdown(list(names()), value=names()[0], label="Published reference", elem_id="dpo_references_choice")
            )
            look = gr.Button("Ask the hub", elem_id="dpo_references_ask")
        alert = parts.unsaved(gr.HTML("", elem_id="dpo_references_alert"))
        view = parts.unsaved(gr.HTML("", elem_id="dpo_references_view"))
        offer = gr.State(None)
        with gr.Row(elem_classes=["dpo-buttons"]):
            go = gr.Button("Agree and fetch", variant="primary", elem_id="dpo_references_go", visible=False)
            stop = gr.Button("Cancel", elem_id="dpo_references_cancel", visible=False)
        again = gr.Button("Look at the fetch", elem_id="dpo_references_look", elem_classes=["dpo-hidden"])
        take = gr.Button("Use this pair", elem_id="dpo_references_take", elem_classes=["dpo-hidden"])
    shown = [alert, view, offer, go, stop, table]
    parts.on(choice.change, partial(chosen, session), [choice], shown, **parts.UNASKED)
    parts.on(look.click, partial(asked, session), [choice], shown, queue=False)
    parts.on(go.click, partial(started, session), [offer, choice], shown, queue=False)
    parts.on(stop.click, partial(cancelled, session), [choice], shown, **parts.UNASKED)
    parts.on(again.click, partial(followed, session), [choice, offer], shown, **parts.UNASKED)
    parts.follow(tab, [], partial(returned, session), [folded, *shown], beside=[choice, offer])

    def wire(base: Any, reference: Any) -> None:
        parts.on(take.click, partial(taken, session), [], [base, reference], **parts.UNASKED)

    return wire


# ---- what happens ----


def returned(session: Session, name: str, offer: Offer | None) -> list[Any]:
    """As `looked`, for somebody who comes to the page: open where there is no reference, and where a fetch has news."""
    last = session.references.last
    news = last is not None and not last.seen
    is_open = parts.update(open=True) if news or not session.references.any_here() else parts.update()
    return [is_open, *looked(session, name, offer)]


def chosen(session: Session, name: str) -> list[Any]:
    """What is known of another choice; what was offered for the last one does not hold for it."""
    return _page(session, view=known_html(session, name))


def asked(session: Session, name: str) -> list[Any]:
    """What the hub says, to be agreed to; or why it does not, and what to do by hand."""
    try:
        offer = session.references.ask(name)
    except OutputError as error:  # the hub could have delivered it
        return _page(session, parts.error_html(session, error), known_html(session, name))
    except DpoError as error:
        return _page(session, parts.error_html(session, error), by_hand_html(session, name))
    return _page(session, view=offer_html(session, offer), offer=offer)


def started(session: Session, offer: Offer | None, name: str) -> list[Any]:
    """Begin to fetch what was agreed to."""
    try:
        last = session.references.start(offer, name)
    except DpoError as error:
        return _page(session, parts.error_html(session, error), known_html(session, name))
    return _page(session, view=fetch_html(session, last))


def cancelled(session: Session, name: str) -> list[Any]:
    """Stop it; what came stays."""
    session.references.cancel()
    return looked(session, name, None)


def looked(session: Session, name: str, offer: Offer | None) -> list[Any]:
    """How far the fetch is, or how it ended; what was offered or is known where there is none."""
    last = session.references.last
    if offer is not None and not _runs(last):
        return _page(session, view=offer_html(session, offer), offer=offer)
    if last is None:
        return _page(session, view=known_html(session, name))
    last.seen = last.record.is_over
    return _page(session, view=fetch_html(session, last))


def followed(session: Session, name: str, offer: Offer | None) -> list[Any]:
    """As `looked`, every second: the table stays as it is while a fetch runs, for somebody may be reading in it."""
    *shown, table = looked(session, name, offer)
    return [*shown, parts.update() if _runs(session.references.last) else table]


def taken(session: Session) -> list[Any]:
    """The two lists with the reference that was fetched and the base that fits it best."""
    last = session.references.last
    if not last or not last.fetched:
        return [parts.update(), parts.update()]
    bases = [parts.LOADED, *(entry.name for entry in session.library.checkpoints())]
    references = parts.references(session)
    base = last.bases.fitting[0][0] if last.bases and last.bases.fitting else None
    reference = next((name for name in references if name.endswith(last.fetched.path.name)), None)
    return [
        parts.update(choices=bases, value=base) if base in bases else parts.update(),
        parts.update(choices=references, value=reference) if reference else parts.update(),
    ]


def find_base(session: Session, task: str | None, reference: str) -> list[str]:
    """The checkpoints that a chosen reference may have been tuned from, as a card; the nearest one's name."""
    bases = session.jobs.run(
        "Find the base", lambda job: session.references.bases(session.library.reference(reference or ""), job), task_id=task
    )
    return [base_html(reference, bases), bases.fitting[0][0] if bases.fitting else ""]


def _page(session: Session, alert: str = "", view: str = "", offer: Offer | None = None) -> list[Any]:
    runs = _runs(session.references.last)
    words = "Agree and fetch"
    if offer:
        words = f"{words} {markup.size(offer.missing)}" if offer.missing > 0 else "Agree and check what is here"
    return [
        alert,
        view,
        offer,
        parts.update(visible=offer is not None and not runs, value=words),
        parts.update(visible=runs),
        table_html(session),
    ]


def _runs(last: Fetching | None) -> bool:
    return last is not None and not last.record.is_over
