"""A report as one HTML file: pictures inside, nothing loaded from anywhere, readable on a phone, in light and in dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #55606e; --line: #e2e8f0; --paper: #fff; --card: #f8fafc;
  --accent: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e9ee; --soft: #a3adba; --line: #334155; --paper: #14191f; --card: #1d242c; --accent: #fb923c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; }
p, li { max-width: 46rem; }
.toys { border-left: 4px solid var(--accent); padding: 0.1rem 0 0.1rem 1rem; }
.cards { display: flex; flex-wrap: wrap; gap: 0.8rem; margin: 1.5rem 0; padding: 0; list-style: none; }
.cards li { flex: 1 1 11rem; background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 0.8rem 1rem; }
.cards strong { display: block; font-size: 1.5rem; line-height: 1.3; }
.cards span, figcaption, footer { color: var(--soft); font-size: 0.9rem; }
figure { margin: 1rem 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 0.6rem; background: #fff; }
.scroll img { display: block; margin: 0 auto; max-width: 100%; min-width: 40rem; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.25rem 0.9rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.text { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem; padding: 1rem; }
pre { margin: 0; font: 0.85rem/1.5 ui-monospace, monospace; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture of the page. `alt` says what it shows to those who do not see it."""

    title: str
    png: bytes
    alt: str
    text: str


@dataclass(frozen=True)
class Card:
    """A figure to be seen at first sight."""

    figure: str
    text: str


def page(
    title: str,
    *,
    lead: str,
    warning: str,
    cards: Sequence[Card],
    findings: Sequence[str],
    pictures: Sequence[Picture],
    table: Sequence[Sequence[str]],
    printed: str,
    foot: str,
) -> str:
    """The whole file.

    Args:
        table: rows of text, the first one the heads of the columns.
        printed: what the command wrote to the terminal.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
<p class="toys">{escape(warning)}</p>
<ul class="cards">
{_each(f"<li><strong>{escape(card.figure)}</strong><span>{escape(card.text)}</span></li>" for card in cards)}
</ul>
<h2>What was found</h2>
<ul>
{_each(f"<li>{escape(line)}</li>" for line in findings)}
</ul>
{_each(map(_figure, pictures))}
<h2>The figures</h2>
{_table(table)}
<h2>What the command wrote</h2>
<div class="text" tabindex="0" role="region" aria-label="What the command wrote"><pre>{escape(printed)}</pre></div>
</main>
<footer><p>{escape(foot)}</p></footer>
</body>
</html>
"""


def _each(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def _figure(picture: Picture) -> str:
    source = "data:image/png;base64," + base64.b64encode(picture.png).decode("ascii")
    return f"""<h2>{escape(picture.title)}</h2>
<figure>
<div class="scroll" tabindex="0" role="region" aria-label="{escape(picture.title)}">
<img src="{source}" alt="{escape(picture.alt)}">
</div>
<figcaption>{escape(picture.text)}</figcaption>
</figure>"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in rows[0])
    body = _each(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows[1:])
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
