"""The card «Before you bake»: whether an offset is one for the loaded model, what baking it costs, and what would survive."""

from __future__ import annotations

from typing import Any

import torch

from lib_dpo.errors import DpoError
from lib_dpo.families.blocks import block_labels
from lib_dpo.offsets.lora.unplaced import twin_lines, unplaced_lines
from lib_dpo.offsets.patch import Patch, check_changes
from lib_dpo.pictures.curve import heat_map
from lib_dpo.settings import strength_to_bake
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup, parts
from lib_dpo.webui.tab.standing import about, given

_MUCH = 0.9  # of a change: what survives is not worth a second thought
_FIT = (
    '<div class="dpo-doors"><button type="button" data-dpo-page="inspect" data-dpo-to="dpo_inspect_fit" '
    'title="On the page Inspect: whether your model is near enough to the base of the offset">Does it fit?</button></div>'
)
_NONE = (
    "There is no LoRA and no offset file yet. Make one on the page Extract, or put one that you have into the folder of your "
    "LoRAs, and press ↻."
)


def nothing_to_bake(session: Session, _: str | None) -> list[Any]:
    """What to do where the list of offsets is empty."""
    empty = not parts.offsets(session)
    return [parts.update(value=markup.note(_NONE) if empty else "", visible=empty)]


def foreseen_now(session: Session, offset: str | None, blocks: str | None, strength: float | None) -> list[Any]:
    """What `foresee` says, and what that is about."""
    html = foresee(session, offset, blocks, strength)
    if not html:
        return [html, None]
    return [
        html,
        given(html, lambda: about(session, offset or "", model=True, baked=True), asked=(offset, blocks, strength)),
    ]


def foresee(session: Session, offset: str | None, blocks: str | None, strength: float | None = 1.0) -> str:
    """Before anything is done: whether the offset is one for the loaded model, what it will cost, and what survives of it."""
    title = "Before you bake"
    if not offset:
        return ""
    try:
        patch = session.patch(offset, blocks=blocks or "")
        check_changes(patch.offset, patch.blocks)
        needed = session.host.live.bake_bytes(patch)
        kept, survives = _survives(session, patch, strength)
    except DpoError as error:
        return markup.card(title, session.library.names_only(str(error)), mood="bad")
    except Exception as error:  # noqa: BLE001  # the edge
        return parts.error_html(session, error)
    status = session.status()
    inside = " and ".join(map(str, status.in_file))
    kind = "a LoRA" if patch.lora else "an offset file"
    family = patch.architecture.title
    return markup.card(
        title,
        f"{patch.name} is {kind} for {family}, as the loaded model is: it can be baked.",
        f"Undo needs {markup.size(needed)} of main memory, for the {len(patch.changed_keys()):,} weights that change.",
        survives,
        f"The loaded file has {inside} baked in already: this comes on top." if inside else "",
        f"It takes the place of {status.baked.offset}, which is baked in now." if status.baked else "",
        *markup.sentences(twin_lines(patch.offset.twins) + unplaced_lines(patch.offset.unmatched)),
        mood="doubt" if inside or patch.offset.unmatched or kept < _MUCH else "good",
        body=_FIT + _where(session, patch),
    )


def _survives(session: Session, patch: Patch, strength: float | None) -> tuple[float, str]:
    """The share of the change that the loaded model's number format can hold, and a sentence; 1 where nothing is to be said."""
    try:
        asked = strength_to_bake(strength)
    except DpoError:  # of no strength there is nothing to say; the click will say what is wrong
        return 1.0, ""
    share, storage = session.survives(patch, asked)
    dtype = getattr(torch, storage, None)
    if session.loaded().online or not isinstance(dtype, torch.dtype):
        return 1.0, f"The model is stored as {storage}: nothing is rounded away, the change is added in every step."
    if share is None:
        return 1.0, ""
    held = f"About {markup.percent(share)} of the change survives" if share > 0 else "Nothing of the change survives"
    sentence = f"{held} rounding to the model's numbers ({storage}) at strength {asked:g}."
    return share, f"{sentence} {_advice(dtype)}" if share < _MUCH else sentence


def _advice(dtype: torch.dtype) -> str:
    if dtype.itemsize == 1:
        return (
            "8-bit numbers are too coarse for it: switch FP8 storage off in the settings, or let it keep FP16 copies for LoRAs "
            "there, and load the model again."
        )
    if dtype == torch.bfloat16:
        return "bfloat16 is eight times as coarse as float16: load the model in float16 if it is to take up more."
    if dtype == torch.float16:
        return (
            "The change is small beside the weights: a larger strength leaves more of it, and so does a model in float32 "
            "(start the WebUI with no-half), also when the LoRA stands in the prompt."
        )
    return ""


def _where(session: Session, patch: Patch) -> str:
    """Where the pair of the offset changed, as a guide for the blocks; nothing where that pair was not analysed here."""
    from lib_dpo.operations.diff import heat_map_of

    base, tuned = (patch.offset.metadata.get(f"dpo.{name}_sha256", "") for name in ("base", "tuned"))
    figures = session.figures.look((base, tuned)) if base and tuned else None
    if figures is None:
        return ""
    arch = patch.architecture
    rows = heat_map_of(arch, figures.rows)
    labels = [label for label in block_labels(arch) if any(label in row for row in rows.values())]
    return markup.folded("Where DPO changed it", heat_map(rows, labels, "Where it changed, in % of the weights"))
