"""The picture on the card of a LoRA: before at the left, after at the right."""

from __future__ import annotations

import io

from PIL import Image as PilImage
from PIL.Image import Image

_WIDEST = 512  # pixels of each half
_GAP = 4


def preview_png(before: Image, after: Image) -> bytes:
    """Two pictures of one size side by side, each at most 512 pixels wide, as a PNG."""
    width, height = before.size
    if width > _WIDEST:
        width, height = _WIDEST, max(1, round(height * _WIDEST / width))
    both = PilImage.new("RGB", (2 * width + _GAP, height), "white")
    for picture, left in ((before, 0), (after, width + _GAP)):
        both.paste(picture.convert("RGB").resize((width, height), PilImage.Resampling.LANCZOS), (left, 0))
    data = io.BytesIO()
    both.save(data, format="PNG", optimize=True)
    return data.getvalue()
