"""Words in pictures, with Pillow alone: which font there is, and how text is broken into lines that fit."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont

# From here on DejaVu lacks most characters: Chinese, Japanese and Korean are written without spaces and break anywhere.
_WIDE = r"\u2e80-\ud7ff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
_IS_WIDE = re.compile(f"[{_WIDE}]")
_PIECES = re.compile(rf"\s+|[{_WIDE}]|[^\s{_WIDE}_/-]*\w[_/-]+|[^\s{_WIDE}_/-]+|[^\s{_WIDE}]")
_WIDE_FONTS = (  # of Linux, Windows and macOS, by file name: Pillow looks in the system's folders
    "NotoSansCJK-Regular.ttc", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc", "YuGothM.ttc", "msyh.ttc", "malgun.ttf",
    "PingFang.ttc", "Hiragino Sans GB.ttc",
)  # fmt: skip


@dataclass(frozen=True)
class Type:
    """A typeface in a size, and what it takes to set text in it."""

    font: Any  # a FreeTypeFont, or Pillow's own bitmap font
    height: int  # of a line

    @property
    def scalable(self) -> bool:
        return isinstance(self.font, ImageFont.FreeTypeFont)

    def clean(self, text: str) -> str:
        """Text in one line, with only what this font can draw: a bitmap font refuses what is not Latin-1."""
        text = " ".join(text.split())
        text = "".join(character if character.isprintable() else "?" for character in text)
        return text if self.scalable else text.encode("latin-1", "replace").decode("latin-1")

    def width(self, text: str) -> float:
        return float(self.font.getlength(text))


@lru_cache(maxsize=64)
def typeface(size: int, bold: bool = False, wide: bool = False) -> Type:
    """The best font that is here: DejaVu Sans of matplotlib or of the system, else Pillow's own.

    Args:
        size: in pixels. Pillow before 10.1 cannot scale its own.
        wide: for Chinese, Japanese or Korean text, from the system where it has such a font.
    """
    if file := _font_file(bold, wide):
        return Type(ImageFont.truetype(file, size), round(1.3 * size))
    try:
        return Type(ImageFont.load_default(size), round(1.3 * size))
    except TypeError:  # Pillow 9 and 10.0
        return Type(ImageFont.load_default(), 13)


@lru_cache
def _font_file(bold: bool, wide: bool) -> str | None:
    """The first font that opens. Kept, as Pillow walks through all of the system's fonts for a name."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    candidates: list[str] = [*(_WIDE_FONTS if wide else ()), *_matplotlib_font(name), name]
    for candidate in candidates:
        try:
            ImageFont.truetype(candidate, 10)
        except OSError:
            continue
        return candidate
    return None


def typeface_for(text: str, size: int, bold: bool = False) -> Type:
    """The font for a text: another one where it holds Chinese, Japanese or Korean."""
    return typeface(size, bold, wide=_IS_WIDE.search(text) is not None)


def _matplotlib_font(name: str) -> Iterator[str]:
    """Where matplotlib keeps the font, found without importing it."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin:
        yield str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name)


def wrap(text: str, face: Type, width: float, lines: int) -> list[str]:
    """Text in at most so many lines of this width in pixels; what is left over becomes "…".

    Lines break between words, behind hyphens, slashes and underscores, and within a word that is longer than a line.
    """
    done: list[str] = []
    line = ""
    for piece in _pieces(face.clean(text), face, width):
        if face.width((line + piece).rstrip()) <= width:
            line += piece
            continue
        if len(done) == lines - 1:
            return [*done, _shortened(line, face, width)]
        done.append(line.rstrip())
        line = piece.lstrip()
    return [*done, line.rstrip()] if line.strip() or not done else done


def _pieces(text: str, face: Type, width: float) -> Iterator[str]:
    for match in _PIECES.finditer(text):
        piece = match[0]
        while len(piece) > 1 and face.width(piece) > width:
            fits = max(1, _fitting(piece, face, width))
            yield piece[:fits]
            piece = piece[fits:]
        yield piece


def _fitting(text: str, face: Type, width: float) -> int:
    """How many characters of a text fit."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if face.width(text[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low


def _shortened(line: str, face: Type, width: float) -> str:
    """The line with "…" at its end, behind a whole word unless that leaves less than half."""
    ellipsis = "…" if face.scalable else "..."
    fits = _fitting(line, face, width - face.width(ellipsis))
    if fits < len(line) and line[fits].strip():
        space = line.rfind(" ", 0, fits)
        fits = space if space > fits // 2 else fits
    return line[:fits].rstrip(" ,.;:") + ellipsis


def longest_word(text: str, face: Type) -> float:
    """Width in pixels of the widest piece that is not broken without need."""
    return max((face.width(match[0].strip()) for match in _PIECES.finditer(face.clean(text))), default=0.0)


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], lines: list[str], face: Type, colour: str, *, centred: bool = False
) -> None:
    """Draw lines below one another, the first with its top at this point; centred: `at` is the middle of the top."""
    x, y = at
    for i, line in enumerate(lines):
        left = x - face.width(line) / 2 if centred else x
        draw.text((round(left), round(y + i * face.height)), line, fill=colour, font=face.font)
