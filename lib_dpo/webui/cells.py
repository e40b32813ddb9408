"""One cell of the host's X/Y/Z plot: the axes of its plot, and a card in its place where it cannot be drawn.

The plot gives a shallow copy of its `p` to each cell. Interrupting the host would take the cells behind it too, and an
exception would leave a black cell that says nothing (scripts/xyz_grid.py there, AUTOMATIC1111 1.10).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_WHY, _GUARDED = "dpo_cell_failed", "dpo_cell_guarded"  # attributes of `p`: the sentence, and itself
_PAPER, _INK = "#fff4f2", "#7f1d1d"


class _CellError(Exception):
    """Ends the sampling of one cell."""


def plot_axes(p: Any) -> tuple[str, ...] | None:
    """The labels of the axes, where `p` is that of an X/Y/Z plot or of one of its cells; None where no plot runs."""
    arguments: Sequence[Any] = getattr(p, "script_args", None) or ()
    scripts = getattr(getattr(p, "scripts", None), "selectable_scripts", ())
    chosen = arguments[0] if arguments else 0  # 0 is no script
    if not isinstance(chosen, int) or not 0 < chosen <= len(scripts):
        return None
    script = scripts[chosen - 1]
    options = getattr(script, "current_axis_options", None)
    if options is None:
        return None
    types = arguments[script.args_from : script.args_to][0:9:3]  # each axis: type, values, values as a list
    return tuple(options[kind].label for kind in types if isinstance(kind, int) and 0 < kind < len(options))


def guard(p: Any) -> None:
    """Let `fail` end this cell while it is drawn, too."""
    if getattr(p, _GUARDED, None) is p:  # the attribute of another cell may have been copied with it
        return
    setattr(p, _GUARDED, p)
    draw = p.sample

    def sample(*args: Any, **kwargs: Any) -> Any:
        if not hasattr(p, _WHY):
            try:
                return draw(*args, **kwargs)
            except _CellError:
                pass
        return _cards(p, getattr(p, _WHY))

    p.sample = sample


def fail(p: Any, why: str) -> None:
    """Draw a card with the sentence in the place of a cell. It is not saved as a picture of its own."""
    guard(p)
    setattr(p, _WHY, why)
    p.do_not_save_samples = True
    sampler = getattr(p, "sampler", None)
    if sampler is not None:  # in the middle of `p.sample`: Forge's hook is called there
        sampler.sample = sampler.sample_img2img = _stop


def _stop(*args: Any, **kwargs: Any) -> None:
    raise _CellError


class _Decoded(list[Any]):
    """Pictures that need no VAE, as the host marks them."""

    already_decoded = True


def _cards(p: Any, why: str) -> _Decoded:
    """One for each picture of the batch: (3, height, width), -1 to 1, float32."""
    import numpy as np
    import torch

    p.restore_faces, p.color_corrections, p.overlay_images, p.mask_for_overlay = False, None, None, None
    width, height = p.width, p.height
    if getattr(p, "enable_hr", False):
        width, height = getattr(p, "hr_upscale_to_x", 0) or width, getattr(p, "hr_upscale_to_y", 0) or height
    values = torch.from_numpy(np.asarray(card(why, width, height)).astype("float32") / 127.5 - 1).movedim(2, 0)
    return _Decoded([values] * max(1, len(p.prompts)))


def card(text: str, width: int, height: int) -> Image:
    """A sentence as a picture of this size in pixels, as large as it fits."""
    from PIL import Image, ImageDraw

    from lib_dpo.pictures.lettering import typeface_for, wrap, write

    picture = Image.new("RGB", (width, height), _PAPER)
    margin = max(2, min(width, height) // 24)
    inside = width - 2 * margin, height - 2 * margin
    for size in range(max(9, min(width, height) // 14), 7, -1):
        face = typeface_for(text, size)
        lines = wrap(text, face, inside[0], max(1, inside[1] // face.height))
        if " ".join(text.split()).replace(" ", "") == "".join(lines).replace(" ", ""):
            break
    write(ImageDraw.Draw(picture), (margin, margin), lines, face, _INK)
    return picture
