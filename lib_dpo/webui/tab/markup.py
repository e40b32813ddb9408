"""HTML for results and errors. All text is escaped here, for names and metadata come from files of other people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Literal

from lib_dpo.errors import printable

Mood = Literal["good", "doubt", "bad", "plain"]

# A verdict is never told by colour alone.
_SIGNS: Mapping[Mood, str] = {"good": "✓", "doubt": "!", "bad": "✗", "plain": ""}
# The one mark of each verdict, on all pages.
LEVELS: Mapping[str, Mood] = {
    "fits": "good", "base": "good", "doubtful": "doubt", "weaker": "doubt", "contained": "doubt", "other": "doubt",
    "wrong": "bad",
}  # fmt: skip
ALL = 0.9995  # of the change: below it a figure stands instead of the word
NEARLY_ALL = 0.9  # of the change: what a LoRA lacks then is not to be seen
_SHARES: tuple[tuple[float, str], ...] = (
    (0.995, "all"),
    (NEARLY_ALL, "nearly all"),
    (0.7, "most"),
    (0.55, "more than half"),
    (0.45, "about half"),
    (0.29, "about a third"),
    (0.2, "about a quarter"),
    (0.1, "a small part"),
    (0.0, "very little"),
)


def text(value: object) -> str:
    """Anything as text that is safe between tags and in attributes."""
    return escape(printable(str(value)), quote=True)


def alert(message: object) -> str:
    """What went wrong, in a sentence that screen readers speak at once."""
    return f'<p class="dpo-alert" role="alert">{text(_sentence(str(message)))}</p>'


def note(message: object) -> str:
    """A quiet sentence."""
    return f'<p class="dpo-note">{text(_sentence(str(message)))}</p>'


def headed(title: str, sentence: str) -> str:
    """What a group of controls does."""
    return f'<h4 class="dpo-head">{text(title)}</h4>{note(sentence)}'


def card(title: str, *sentences: str, mood: Mood = "plain", body: str = "") -> str:
    """A question or result with its answer.

    Args:
        sentences: plain text.
        body: HTML of this module, below the sentences.
    """
    sign = f'<span class="dpo-sign" aria-hidden="true">{_SIGNS[mood]}</span>' if _SIGNS[mood] else ""
    lines = "".join(f"<p>{text(sentence)}</p>" for sentence in sentences if sentence)
    return f'<section class="dpo-card dpo-{mood}"><h4>{sign}<span>{text(title)}</span></h4>{lines}{body}</section>'


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values."""
    cells = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in rows)
    return f'<dl class="dpo-facts">{cells}</dl>'


def bars(caption: str, rows: Iterable[tuple[str, float, str]]) -> str:
    """A table of label, bar and figure; the longest bar is the largest value."""
    rows = list(rows)
    most = max((abs(value) for _, value, _ in rows), default=0.0) or 1.0
    lines = "".join(
        f'<tr><th scope="row">{text(label)}</th><td class="dpo-bar"><span style="width:{100 * abs(value) / most:.1f}%">'
        f"</span></td><td>{text(figure)}</td></tr>"
        for label, value, figure in rows
    )
    return f'<table class="dpo-bars"><caption>{text(caption)}</caption><tbody>{lines}</tbody></table>'


def table(head: Iterable[str], rows: Iterable[Iterable[object]], caption: str = "") -> str:
    """Rows under a head; the first column names its row."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    lines = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    inside = f"{title}<thead><tr>{top}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="dpo-scroll" tabindex="0"><table class="dpo-table">{inside}</table></div>'


def _cells(row: Iterable[object]) -> str:
    first, *rest = row
    return f'<th scope="row">{text(first)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in rest)


def folded(summary: str, body: str, *, is_open: bool = False) -> str:
    """HTML of this module behind a line that opens it."""
    return f"<details{' open' if is_open else ''}><summary>{text(summary)}</summary>{body}</details>"


def door(press: str, label: str, title: str) -> str:
    """A button inside of an answer that presses one of the page's, by its id; dpo.js does it."""
    return f'<button type="button" data-dpo-press="{text(press)}" title="{text(title)}">{text(label)}</button>'


def preformatted(content: str) -> str:
    """Text with its own lines."""
    lines = "\n".join(text(line) for line in content.splitlines())
    return f'<pre class="dpo-pre" tabindex="0">{lines}</pre>'


def code(content: str) -> str:
    """Something to be copied, as it is."""
    return f'<p><code class="dpo-code">{text(content)}</code></p>'


def sentences(lines: Iterable[str]) -> list[str]:
    """Lines of a report as sentences of a card."""
    return [_sentence(line).rstrip(".") + "." for line in lines]


def percent(share: float) -> str:
    """0.3062 as `30.6 %`; small shares keep two digits."""
    return f"{100 * share:.2g} %" if abs(share) < 0.1 else f"{100 * share:.1f} %"


def in_words(share: float) -> str:
    """A share as people say it."""
    return next((words for least, words in _SHARES if share >= least), "nothing")


def size(count: float) -> str:
    """Bytes, in MB or GB as file managers count them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _sentence(message: str) -> str:
    """With a capital, unless it begins with the name of a file."""
    first = message.split(maxsplit=1)[0] if message.strip() else ""
    if any(sign in first.rstrip(".:,;") for sign in "._-/\\"):
        return message
    return message[:1].upper() + message[1:]
