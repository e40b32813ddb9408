"""The pictures of a comparison: one labelled grid, and where two pictures differ."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage
from PIL import ImageDraw
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from lib_dpo.pictures.effects import difference, pixels
from lib_dpo.pictures.lettering import Type, longest_word, typeface, typeface_for, wrap, write
from lib_dpo.pictures.plan import Cell, Images, Plan

_INK, _SOFT, _LINE, _PAPER = "#1f2933", "#64748b", "#e2e8f0", "#ffffff"
_SMALLEST = 9  # pixels of type; smaller is not read

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive


@dataclass(frozen=True)
class Grid:
    """A drawn comparison. `boxes` says where each picture lies, for a page that lets people click on one."""

    image: Image
    infotext: str
    boxes: Mapping[Cell, Box]

    def png(self) -> bytes:
        """The grid as a PNG file that the WebUIs' "PNG Info" reads."""
        info = PngInfo()
        info.add_text("parameters", self.infotext)
        data = io.BytesIO()
        self.image.save(data, format="PNG", pnginfo=info)
        return data.getvalue()


@dataclass(frozen=True)
class _Block:
    """Some lines of text, ready to be drawn."""

    lines: list[str]
    face: Type
    colour: str = _INK

    @property
    def height(self) -> int:
        return len(self.lines) * self.face.height


def draw_grid(
    plan: Plan, images: Images, *, model: str, offset: str, settings: Mapping[str, Any] | None = None, note: str = ""
) -> Grid:
    """One picture of all: a row per prompt and seed, a column per variant, labels that grow with the cells.

    Pictures are drawn pixel for pixel; one that is smaller than the largest lies in the middle of its cell.

    Args:
        settings: what all pictures have in common ("Steps": 20, "Negative prompt": ..., ...): footer and infotext.
        note: a sentence below the title, such as the verdict.
    """
    settings = settings or {}
    layout = _Layout(plan, max(image.width for image in images.values()), max(image.height for image in images.values()))
    columns, label_height = _column_labels(plan, layout)
    width = layout.left + len(plan.variants) * (layout.column + layout.gap) + layout.apart + layout.margin
    text_width = width - 2 * layout.margin
    title = _block(f"{model} with {offset}", layout.size * 1.25, text_width, 3, bold=True)
    remark = _block(note, layout.size, text_width, 4, colour=_SOFT)
    footer = _block(_footer(plan, settings), layout.size * 0.8, text_width, 4, colour=_SOFT)
    top = layout.margin + title.height + remark.height + layout.margin + label_height + layout.gap
    lefts, tops = layout.places(plan, top)
    bottom = tops[-1] + layout.row + layout.margin
    canvas = PilImage.new("RGB", (width, bottom + footer.height + layout.margin), _PAPER)
    draw = ImageDraw.Draw(canvas)
    write(draw, (layout.margin, layout.margin), title.lines, title.face, title.colour)
    write(draw, (layout.margin, layout.margin + title.height), remark.lines, remark.face, remark.colour)
    write(draw, (layout.margin, bottom), footer.lines, footer.face, footer.colour)
    for block, left in zip(columns, lefts, strict=True):
        baseline = top - layout.gap - block.height  # the labels stand on the pictures
        write(draw, (left + layout.column / 2, baseline), block.lines, block.face, block.colour, centred=True)
    _row_labels(draw, plan, layout, tops, width)
    boxes = {}
    for (prompt, seed), y in zip(plan.rows, tops, strict=True):
        for variant, x in zip(plan.variants, lefts, strict=True):
            cell = Cell(prompt, seed, variant)
            boxes[cell] = _paste(canvas, images[cell], (x + (layout.column - images[cell].width) // 2, y))
    return Grid(canvas, infotext(plan, model=model, offset=offset, settings=settings), boxes)


class _Layout:
    """All measures follow from the size of the pictures, in pixels."""

    def __init__(self, plan: Plan, width: int, height: int) -> None:
        typical = math.sqrt(width * height)
        # 11 at 64, 17 at 256, 28 at 512, 49 at 1024: such a grid is looked at scaled down to the width of a screen
        self.size = max(11, round(7 + 0.041 * typical))
        self.gap = max(3, round(self.size * 0.3))
        self.margin = max(12, round(self.size * 0.9))
        self.apart = 2 * self.gap  # more space behind the untouched column, and between prompts
        self.column = max(width, 5 * self.size)
        labels = [*plan.prompts, *(f"seed {seed}" for seed in plan.seeds)]
        widest = max(face.width(face.clean(label)) for label in labels for face in [typeface_for(label, self.size)])
        self.label = min(14 * self.size, math.ceil(widest))  # at most about 26 characters
        self.row = max(height, 2 * typeface(self.size).height)
        self.left = self.margin + self.label + self.margin

    def places(self, plan: Plan, top: int) -> tuple[list[int], list[int]]:
        """The left edges of the columns and the top edges of the rows."""
        step = self.column + self.gap
        lefts = [self.left + i * step + (self.apart if i else 0) for i in range(len(plan.variants))]
        tops = [top + i * (self.row + self.gap) + (i // len(plan.seeds)) * 2 * self.apart for i in range(len(plan.rows))]
        return lefts, tops


def _block(text: str, size: float, width: float, lines: int, *, bold: bool = False, colour: str = _INK) -> _Block:
    face = typeface_for(text, max(_SMALLEST, round(size)), bold)
    return _Block(wrap(text, face, width, lines) if text.strip() else [], face, colour)


def _column_labels(plan: Plan, layout: _Layout) -> tuple[list[_Block], int]:
    """The labels of all columns in one size, in which their longest word fits if it can, and their height."""
    labels = [variant.label for variant in plan.variants]
    size = layout.size
    while size > _SMALLEST and _longest_word(labels, size) > layout.column:
        size -= 1

    def blocks(width: float) -> list[_Block]:
        widths = [max(width, min(_longest_word([label], size), layout.column)) for label in labels]
        colours = [_SOFT] + [_INK] * (len(labels) - 1)
        rows = zip(labels, widths, colours, strict=True)
        return [_block(label, size, most, 3, bold=True, colour=colour) for label, most, colour in rows]

    found = blocks(layout.column)
    if any(len(block.lines) > 1 for block in found):  # then all break alike: not "strength 1" beside "strength / 0.5"
        narrow = blocks(0)
        found = narrow if all(len(block.lines) <= 2 for block in narrow) else found
    return found, max(block.height for block in found)


def _longest_word(labels: Sequence[str], size: int) -> float:
    return max(longest_word(label, typeface_for(label, size, bold=True)) for label in labels)


def _row_labels(draw: ImageDraw.ImageDraw, plan: Plan, layout: _Layout, tops: Sequence[int], width: int) -> None:
    """A prompt beside the first of its rows, as much of it as fits there, and each row's seed below."""
    for i, ((prompt, seed), y) in enumerate(zip(plan.rows, tops, strict=True)):
        first = i % len(plan.seeds) == 0
        seed_block = _block(f"seed {seed}", layout.size * 0.85, layout.label, 1, colour=_SOFT)
        if first:
            if i:
                rule = y - layout.apart - layout.gap // 2
                draw.line((layout.margin, rule, width - layout.margin - 1, rule), fill=_LINE, width=max(1, layout.gap // 4))
            room = (layout.row - seed_block.height - layout.gap // 2) // typeface(layout.size).height
            text = _block(prompt, layout.size, layout.label, max(1, room))
            write(draw, (layout.margin, y), text.lines, text.face, text.colour)
            y += text.height + layout.gap // 2
        write(draw, (layout.margin, y), seed_block.lines, seed_block.face, seed_block.colour)


def _paste(canvas: Image, picture: Image, at: tuple[int, int]) -> Box:
    rgb = picture if picture.mode == "RGB" else PilImage.fromarray(pixels(picture).round().astype(np.uint8))
    canvas.paste(rgb, at)
    return (*at, at[0] + picture.width, at[1] + picture.height)


def _footer(plan: Plan, settings: Mapping[str, Any]) -> str:
    last = "Negative prompt"  # as it may be long
    names = sorted((name for name, value in settings.items() if str(value).strip()), key=lambda name: name == last)
    return " · ".join([str(plan), *(f"{name} {settings[name]}" for name in names)])


def infotext(plan: Plan, *, model: str, offset: str, settings: Mapping[str, Any]) -> str:
    """How the grid was made, in the form that WebUIs read back: the first prompt and seed, and the lists in quotes."""
    settings = dict(settings)
    negative = " ".join(str(settings.pop("Negative prompt", "")).split())
    listed = {
        "Steps": settings.pop("Steps", None),
        **settings,
        "Seed": plan.seeds[0],
        "Size": settings.pop("Size", f"{plan.width}x{plan.height}"),
        "Model": settings.pop("Model", model),
        "Script": "DPO compare",
        "Compare offset": offset,
        "Compare columns": ", ".join(variant.label for variant in plan.variants),
        "Compare seeds": ", ".join(map(str, plan.seeds)),
        "Compare prompts": "\n".join(plan.prompts) if len(plan.prompts) > 1 else None,
    }
    lines = [plan.prompts[0]] + ([f"Negative prompt: {negative}"] if negative else [])
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in listed.items() if value is not None)])


def _quoted(value: Any) -> str:
    """As the WebUI quotes values that hold its separators."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ',:\n"') else text


# ---- where two pictures differ ----

_COLOURS = np.array(  # black, violet, red, orange, cream: even steps of lightness, as matplotlib's magma (CC0) has them
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97), (254, 194, 135),
     (252, 253, 191)], dtype=np.float64,
)  # fmt: skip
SCALES = (8, 16, 32, 64, 128, 255)  # grey levels that the brightest colour may stand for
_SHOWN = 0.995  # share of the pixels that a scale must hold
_AROUND = 8  # columns that count for one another: within a sixteenth of the width to each side


_LEAST_MAP = 256  # pixels: below, a legend is too small to read


def difference_map(before: Image, after: Image, *, scale: float | None = None) -> Image:
    """The absolute difference of two pictures, amplified and in colours, above a bar that says what they stand for.

    Args:
        scale: grey levels (of 255) of the brightest colour; give one to maps that are to be compared (the smallest of
            SCALES that holds nearly all pixels).

    Raises:
        SettingError: pictures of different size.
    """
    levels = difference(pixels(before), pixels(after))
    if scale is None:
        scale = difference_scale(levels)
    picture = PilImage.fromarray(_coloured(levels / scale))
    picture = picture.resize((picture.width * (times := -(-_LEAST_MAP // picture.width)), picture.height * times), resample=0)
    size = max(12, round(7 + 0.02 * math.sqrt(picture.width * picture.height)))
    width, bar = max(picture.width, 12 * size), max(4, size // 2)
    mean = f"mean {levels.mean(dtype=np.float64):.2g} of 255"
    texts = [_block(text, size, width, 1, colour=_SOFT) for text in ("0", f"{scale:g}{'' if scale >= 255 else ' or more'}")]
    caption = _block(mean if levels.any() else "no difference", size, width, 1)
    top = picture.height + max(3, size // 3)
    canvas = PilImage.new("RGB", (width, top + bar + texts[0].height + caption.height + size // 3), _PAPER)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    canvas.paste(PilImage.fromarray(_coloured(np.tile(np.linspace(0, 1, width), (bar, 1)))), (0, top))
    draw = ImageDraw.Draw(canvas)
    for text, x in zip(texts, (0, width - texts[1].face.width(texts[1].lines[0])), strict=True):
        write(draw, (x, top + bar), text.lines, text.face, text.colour)
    write(draw, (width / 2, top + bar + texts[0].height), caption.lines, caption.face, caption.colour, centred=True)
    return canvas


def where_most(before: Image, after: Image) -> float:
    """The column in which two pictures differ most, as a share of their width: 0 left, 1 right, 0.5 where they are the same.

    Neighbouring columns count too, so that a wide change outweighs one bright line.

    Raises:
        SettingError: pictures of different size.
    """
    columns = difference(pixels(before), pixels(after)).sum(axis=0, dtype=np.float64)
    if not columns.any():
        return 0.5
    reach = len(columns) // (2 * _AROUND)
    near = np.convolve(columns, np.ones(2 * reach + 1), mode="same")
    best = np.flatnonzero(near >= near.max() * (1 - 1e-9))
    return float((best[len(best) // 2] + 0.5) / len(columns))


def difference_scale(levels: NDArray[Any]) -> float:
    """The smallest of SCALES that holds nearly all differences."""
    most = float(np.quantile(levels, _SHOWN))
    return float(next((scale for scale in SCALES if scale >= most), SCALES[-1]))


def _coloured(share: NDArray[Any]) -> NDArray[np.uint8]:
    """0 to 1 as colours, (height, width) -> (height, width, 3)."""
    at = np.clip(share, 0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(at.astype(np.intp), len(_COLOURS) - 2)
    part = (at - low)[..., None]
    return np.asarray((_COLOURS[low] * (1 - part) + _COLOURS[low + 1] * part).round(), dtype=np.uint8)
