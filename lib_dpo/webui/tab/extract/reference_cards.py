"""What the section says: the table of references, what is agreed to, how far the fetch is, and which base was found."""

from __future__ import annotations

from lib_dpo.errors import DpoError
from lib_dpo.files.references.fetch import Offer
from lib_dpo.files.references.known import FORMS, NOT_KNOWN, Known, known
from lib_dpo.progress import duration
from lib_dpo.webui.references.picker import Bases, Fetching, Row
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup
from lib_dpo.webui.tab.markup import Mood

_HEAD = ("Reference", "State", "Base", "Form", "Size", "Licence", "Tuned for")
_ALL = 0.9999  # share of a fetch after which only the search for its base is left
_OTHERS_NAMED = 3  # bases that fit less well


def table_html(session: Session) -> str:
    """The published references, and what is here of them."""
    rows = "".join(_row_html(row) for row in session.references.rows())
    head = "".join(f'<th scope="col">{name}</th>' for name in _HEAD)
    return (
        markup.note(f'What no page says of a reference is "{NOT_KNOWN}": the hub is asked for it before anything is fetched.')
        + '<div class="dpo-scroll" tabindex="0"><table class="dpo-table dpo-references">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row_html(row: Row) -> str:
    reference = row.reference
    link = f'<a href="{markup.text(reference.page)}" target="_blank" rel="noreferrer">{markup.text(reference.name)}</a>'
    state = f"begun: {markup.size(row.kept)} are here" if row.state == "begun" else row.state
    cells = (state, reference.base, FORMS[reference.form], _size(reference), _licence(reference), reference.tuned_for)
    mark = ' class="dpo-here"' if row.state == "here" else ""
    return f'<tr{mark}><th scope="row">{link}</th>{"".join(f"<td>{markup.text(cell)}</td>" for cell in cells)}</tr>'


def _size(reference: Known) -> str:
    return markup.size(reference.size) if reference.size else NOT_KNOWN


def _licence(reference: Known) -> str:
    return reference.licence or NOT_KNOWN


def known_html(session: Session, name: str) -> str:
    """What is known of a reference without asking."""
    reference = known(name or "")
    if reference is None:
        return ""
    if not reference.can_be_fetched:
        sentence = f"{reference.name}: {FORMS[reference.form]}. {reference.remark} See {reference.page}"
        return markup.note(sentence)
    if any(row.reference is reference and row.state == "here" for row in session.references.rows()):
        return markup.note(f"{session.references.place(reference)} is here already.")
    return markup.note(
        "«Ask the hub» says size, licence and folder first, and fetches nothing. "
        f"{session.references.by_hand(reference.name)}. {reference.remark}"
    )


def by_hand_html(session: Session, name: str) -> str:
    """What to put where by hand."""
    try:
        return markup.card("Without a download from here", session.references.by_hand(name) + ". Then press ↻ beside the list.")
    except DpoError:  # there is no such reference: said already
        return ""


def offer_html(session: Session, offer: Offer) -> str:
    """What is agreed to."""
    reference, kept = offer.reference, offer.kept
    rest = f", of which {markup.size(kept)} are here already" if kept else ""
    rows: list[tuple[str, object]] = [
        ("From", f"{reference.repo}: {offer.file}"),
        ("Size", f"{markup.size(offer.size)}{rest}"),
        ("Licence", offer.licence),
        ("To", session.references.place(reference)),
        ("SHA-256", offer.sha256 or "the hub announces none, so what comes can be checked for its size alone"),
    ]
    return markup.card(
        f"Fetch {reference.name}?",
        "Nothing was fetched yet. The licence is its author's: read it on the page of the reference before you agree.",
        reference.remark, body=markup.facts(rows),
    )  # fmt: skip


def fetch_html(session: Session, last: Fetching) -> str:
    """How far a fetch is, or how it ended."""
    record, name = last.record, last.offer.reference.name
    if last.fetched:
        return _fetched_html(session, last)
    if not record.is_over:
        share = record.share
        left = "" if record.seconds_left is None else f", about {duration(record.seconds_left)} left"
        words = f"{markup.percent(share)} of {markup.size(last.offer.size)}{left}"
        if record.stop or share >= _ALL:
            words = "Stopping" if record.stop else "All of it is here and checked; looking for its base among the checkpoints"
        bar = f'<progress class="dpo-fetching" max="1" value="{share:.4f}" aria-label="{markup.text(words)}"></progress>'
        return markup.card(f"Fetching {name}", f"{words}. It goes on when this page is closed.", body=bar)
    if record.state == "cancelled":
        kept = last.offer.kept
        rest = f"{markup.size(kept)} are kept: Ask the hub, and it goes on from there." if kept else "Nothing of it is kept."
        return markup.card(f"{name} was not fetched to the end", f"You stopped it. {rest}", mood="doubt")
    words = session.library.names_only(record.error)
    return markup.card(f"{name} could not be fetched", *markup.sentences([words, session.references.by_hand(name)]), mood="bad")


def _fetched_html(session: Session, last: Fetching) -> str:
    found = last.fetched
    assert found
    announced = "as the hub announced" if found.announced else "the hub announced none"
    rows: list[tuple[str, object]] = [
        ("File", session.references.place(last.offer.reference)),
        ("Size", markup.size(found.size)),
        ("SHA-256", f"{found.sha256}, {announced}"),
    ]
    if last.bases is None:
        return markup.card(f"{found.path.name} is here", last.offer.reference.remark, mood="good", body=markup.facts(rows))
    label = "Use this pair" if last.bases.fitting else "Use this reference"
    door = markup.door("dpo_references_take", label, "Put it into the lists of the page Extract")
    body = markup.facts(rows) + f'<div class="dpo-doors">{door}</div>'
    return markup.card(f"{found.path.name} is here", *_bases_words(last.bases), mood="good", body=body)


def base_html(reference: str, bases: Bases) -> str:
    """Which checkpoint is the base of a reference, to be put into the list."""
    door = markup.door("dpo_extract_take_base", "Use it as the base", "Put it into the list Base")
    body = f'<div class="dpo-doors">{door}</div>' if bases.fitting else ""
    mood: Mood = "good" if bases.fitting else "doubt"
    return markup.card(f"Which checkpoint is the base of {reference}?", *_bases_words(bases), mood=mood, body=body)


def _bases_words(bases: Bases) -> list[str]:
    """What was found among the checkpoints."""
    words = []
    if bases.fitting:
        name, change = bases.fitting[0]
        size = markup.percent(change)
        words.append(f"{name} fits as its base: the UNets differ by {size} of their size, as little as DPO changes.")
        others = [f"{name} ({markup.percent(change)})" for name, change in bases.fitting[1 : 1 + _OTHERS_NAMED]]
        if others:
            words.append(f"These are near, too: {', '.join(others)}.")
    else:
        words.append(
            f"None of the {bases.looked_at} checkpoints that were looked into is its base: get the model it was tuned from."
        )
    if bases.not_looked_into:
        words.append(f"Not looked into, for it would be loaded whole: {', '.join(bases.not_looked_into[:_OTHERS_NAMED])}.")
    return words
