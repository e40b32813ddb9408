"""Small pictures in groups below headings: several of one prompt and seed side by side, each with a word on it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from lib_dpo.pictures.lettering import Type, typeface, wrap, write

_WIDEST, _NARROWEST = 960, 640  # pixels
_MARGIN = 14
_GAP = 6  # between the pictures of an item
_APART = 22  # between items
_TEXT, _HEAD, _TITLE = 11, 13, 15  # pixels
_INK, _SOFT, _PAPER = "#1f2933", "#64748b", "#ffffff"


@dataclass(frozen=True)
class Item:
    """Pictures of one prompt and seed, all of one size, with a word above each."""

    prompt: str
    seed: int
    pictures: Sequence[tuple[str, Image.Image]]


@dataclass(frozen=True)
class Group:
    """Items below a heading; there may be none."""

    heading: str
    items: Sequence[Item]


def gallery(title: str, note: str, groups: Sequence[Group]) -> bytes:
    """PNG of all groups, as many items in a line as fit."""
    text, head, bold = typeface(_TEXT), typeface(_HEAD, bold=True), typeface(_TITLE, bold=True)
    canvas = Image.new("RGB", (_width(groups), 1), _PAPER)
    y = _MARGIN
    for words, face, colour in ((title, bold, _INK), (note, text, _SOFT)):
        canvas, y = _words(canvas, y, words, face, colour)
    for group in groups:
        canvas, y = _words(canvas, y + _MARGIN, group.heading, head, _INK)
        for line in _lines(group.items):
            canvas, y = _line(canvas, y + _GAP, line, text)
    buffer = io.BytesIO()
    _taller(canvas, y + _MARGIN).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _words(canvas: Image.Image, y: int, words: str, face: Type, colour: str) -> tuple[Image.Image, int]:
    lines = wrap(words, face, canvas.width - 2 * _MARGIN, 4)
    below = y + len(lines) * face.height + _GAP
    canvas = _taller(canvas, below)
    write(ImageDraw.Draw(canvas), (_MARGIN, y), lines, face, colour)
    return canvas, below


def _width(groups: Sequence[Group]) -> int:
    """As wide as the longest line of items."""
    lines = [line for group in groups for line in _lines(group.items)]
    used = (sum(_item_width(item) + _APART for item in line) - _APART + 2 * _MARGIN for line in lines)
    return max(_NARROWEST, *used, 0)


def _lines(items: Sequence[Item]) -> list[Sequence[Item]]:
    if not items:
        return []
    fit = max(1, (_WIDEST - 2 * _MARGIN + _APART) // (_item_width(items[0]) + _APART))
    return [items[start : start + fit] for start in range(0, len(items), fit)]


def _item_width(item: Item) -> int:
    return sum(picture.width + _GAP for _, picture in item.pictures) - _GAP


def _line(canvas: Image.Image, y: int, items: Sequence[Item], face: Type) -> tuple[Image.Image, int]:
    prompts = [wrap(f"{item.prompt}, seed {item.seed}", face, _item_width(item), 2) for item in items]
    words = y + max(map(len, prompts)) * face.height
    pictures = words + face.height + 2
    below = pictures + items[0].pictures[0][1].height + _GAP
    canvas = _taller(canvas, below)
    draw = ImageDraw.Draw(canvas)
    x = _MARGIN
    for item, lines in zip(items, prompts, strict=True):
        write(draw, (x, y), lines, face, _INK)
        for word, picture in item.pictures:
            write(draw, (x, words), [word], face, _SOFT)
            canvas.paste(picture, (x, pictures))
            x += picture.width + _GAP
        x += _APART - _GAP
    return canvas, below


def _taller(canvas: Image.Image, height: int) -> Image.Image:
    if height <= canvas.height:
        return canvas
    taller = Image.new("RGB", (canvas.width, height), _PAPER)
    taller.paste(canvas, (0, 0))
    return taller
