"""The controls of the always-on script, and how infotexts fill them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lib_dpo.webui.generation import INFOTEXT, NO_OFFSET, TITLE
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import parts

_WIDEST_SLIDER, _STEP = 2.0, 0.05


def script_controls(
    session: Session, elem_id: Callable[[str], str], accordion: Callable[..., Any]
) -> tuple[list[Any], list[tuple[Any, Any]], list[Any]]:
    """Components in the order of the script's arguments, infotext fields, and which of those "Send to" buttons carry: all.

    The arguments: enabled, offset, strength, blocks, rank. The hosts find a field by the name or the function that it has in
    both tabs, `target in paste_field_names` in modules/infotext_utils.py.

    Called several times by the host, also outside of any page: it may keep nothing.

    Args:
        elem_id: the host's, unique in each of its tabs.
        accordion: the host's InputAccordion, whose value is whether it is open.
    """
    import gradio as gr

    with accordion(False, label=TITLE, elem_id=elem_id("enabled")) as enabled:
        with gr.Row():
            offset = gr.Dropdown(
                label="Offset",
                choices=[NO_OFFSET, *(entry.name for entry in session.host.loras())],  # opens no file; 🔄 lists all
                value=NO_OFFSET,
                allow_custom_value=True,  # a list of files may be older than the files
                elem_id=elem_id("offset"),
            )
            refresh = gr.Button("🔄", elem_id=elem_id("refresh"), elem_classes=["tool"])
            strength = gr.Slider(
                label="Strength",
                minimum=-_WIDEST_SLIDER,
                maximum=_WIDEST_SLIDER,
                step=_STEP,
                value=1.0,
                elem_id=elem_id("strength"),
            )
        with gr.Row():
            blocks = gr.Textbox(
                label="Block weights",
                value="",
                lines=1,
                placeholder="everywhere; or such as IN=0.5,MID=0,OUT=1",
                elem_id=elem_id("blocks"),
            )
            rank = gr.Number(label="Rank of the LoRA (0: all)", value=0, precision=0, elem_id=elem_id("rank"))
    parts.unsaved(offset)
    # dpo.js presses it too: when the script comes into sight, and after the tab has written a file
    parts.on(refresh.click, lambda: gr.update(choices=_offsets(session)), [], [offset], **parts.UNASKED)
    fields = [
        (enabled, _is_on),  # a function: an infotext without our keys switches the script off
        (offset, INFOTEXT["offset"]),
        (strength, INFOTEXT["strength"]),
        (blocks, _blocks),
        (rank, _rank),
    ]
    return [enabled, offset, strength, blocks, rank], fields, [target for _, target in fields]


def _offsets(session: Session) -> list[str]:
    return [NO_OFFSET, *(entry.name for entry in session.library.offsets())]


def _is_on(infotext: Mapping[str, Any]) -> bool:
    return INFOTEXT["offset"] in infotext


def _blocks(infotext: Mapping[str, Any]) -> str | None:
    """The block weights; none where the infotext has an offset without them; left alone where it has no offset."""
    return str(infotext.get(INFOTEXT["blocks"], "")) if _is_on(infotext) else None


def _rank(infotext: Mapping[str, Any]) -> int | None:
    """The rank; 0 where the infotext has an offset without one; left alone where it has no offset."""
    try:
        return int(infotext.get(INFOTEXT["rank"], 0)) if _is_on(infotext) else None
    except ValueError:
        return 0
