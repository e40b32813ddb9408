"""What pages add to the card of a LoRA: the strength that votes like best, and a picture before and after."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lib_dpo.errors import DpoError, NotFoundError
from lib_dpo.offsets.lora.card import keep_weight, write_preview
from lib_dpo.offsets.patch import Patch
from lib_dpo.pictures.plan import UNTOUCHED, Cell, Images, Plan, Variant
from lib_dpo.webui.session import Session

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

_NOT_YET = "votes on several strengths of a whole LoRA, without block weights, tell its best one; there are too few so far"


def best_strength(session: Session) -> float | None:
    """The best strength that the blind test found for its LoRA; None where it is of something else, or has no interval yet.

    Raises:
        NotFoundError: no test is running, or its file is gone.
    """
    curve = session.blind.figures().curve
    if curve is None or curve.interval is None or curve.best <= 0 or session.blind.blocks or _lora(session) is None:
        return None
    return curve.best


def keep_best(session: Session) -> str:
    """Make that the LoRA's preferred weight, which WebUIs put behind its name in a prompt; a sentence on what was done.

    Raises:
        NotFoundError: there is none. OutputError: the card cannot be written.
    """
    best, lora = best_strength(session), _lora(session)
    if best is None or lora is None:
        raise NotFoundError(_NOT_YET)
    return keep_weight(lora, best)


def _lora(session: Session) -> Path | None:
    path = session.library.offset(session.blind.offset)
    return path if session.library.kind(path) == "lora" else None


def give_previews(
    plan: Plan, columns: Mapping[Variant, tuple[int, float]], patches: Sequence[Patch], images: Images
) -> tuple[str, ...]:
    """Show the first prompt before and after on the cards of LoRAs that this tool wrote, at the largest strength up to 1.

    Args:
        columns: number of the patch, and its strength. patches: what was compared, each as a whole.

    Returns:
        A sentence on each card that got a picture, or could not.
    """
    from lib_dpo.pictures.preview import preview_png

    said = []
    for number, patch in enumerate(patches):
        strengths = {strength: variant for variant, (of, strength) in columns.items() if of == number and 0 < strength <= 1}
        if patch.lora is None or patch.blocks.weights or patch.rank or not strengths:
            continue
        strength, (prompt, seed) = max(strengths), plan.rows[0]
        pair = images[Cell(prompt, seed, UNTOUCHED)], images[Cell(prompt, seed, strengths[strength])]
        try:
            if write_preview(patch.checkpoint.path, preview_png(*pair)):
                said.append(
                    f"the preview beside {patch.name}, which lists show, is now the first pair at strength {strength:g}"
                )
        except (DpoError, OSError):
            logger.exception("the preview of %s could not be written", patch.checkpoint.path)
            said.append(f"the card of {patch.name} could not be given a picture")
    return tuple(said)
