"""Block weights by hand: presets, a slider for each group of blocks and kind of layer, and the text that both write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib_dpo.errors import SettingError
from lib_dpo.families.blocks import BlockWeights, parse_blocks
from lib_dpo.families.layer_kinds import KINDS
from lib_dpo.webui.tab import parts
from lib_dpo.webui.tab.parts import field_options

PRESETS = {
    "Everything": "",
    "UNet only": "TE=0",
    "Only the way down (composition)": "ALL=0,IN=1",
    "Only the middle": "ALL=0,MID=1",
    "Only the way up (detail, style)": "ALL=0,OUT=1",
    "Without the middle": "MID=0",
    "Half on the way up": "OUT=0.5",
    "Attention only": "FF=0,PROJ=0,CONV=0,EMB=0,NORM=0",
    "Convolutions only": "ATTN=0,FF=0,PROJ=0,EMB=0,NORM=0",
}
OWN = "As set below"
GROUPS = {
    "IN": "Way down (composition)", "MID": "Middle", "OUT": "Way up (detail, style)", "TE": "Text encoder",
    "ATTN": "Attention", "FF": "Feed-forward", "CONV": "Convolutions",
}  # fmt: skip
_KINDS = ("ATTN", *KINDS.values())
_MOST = 2.0


def controls() -> tuple[Any, list[Any]]:
    """The text of the weights, and the events after which it is another one and its user has let go.

    Presets, sliders and the text follow each other.
    """
    import gradio as gr

    preset = gr.Dropdown(
        choices=[*PRESETS, OWN], value="Everything", label="Blocks", elem_id="dpo_bake_preset",
        info="Which parts of the model change",
    )  # fmt: skip
    with gr.Accordion("Each part by itself", open=False, elem_id="dpo_bake_groups"):
        sliders = [
            gr.Slider(
                minimum=-_MOST, maximum=_MOST, step=0.05, value=1.0, label=label, elem_id=f"dpo_bake_group_{name.lower()}"
            )
            for name, label in GROUPS.items()
        ]
        text = gr.Textbox(value="", lines=1, max_lines=1, **field_options("blocks"), elem_id="dpo_bake_blocks")
    for each in (preset, text, *sliders):
        parts.unsaved(each)
    # .input, not .change: what the page itself sets must not come back while its user goes on
    filled = parts.on(preset.input, chosen, [preset], [text, *sliders], **parts.UNASKED)
    for slider in sliders:
        parts.on(slider.input, moved, [text, *sliders], [text, preset], **parts.UNASKED)
    parts.on(text.input, shown, [text], [preset, *sliders], **parts.UNASKED)
    return text, [text.blur, text.submit, filled.then, *(slider.release for slider in sliders)]


def chosen(preset: str) -> list[Any]:
    """Text and sliders of a preset."""
    if preset not in PRESETS:
        return [parts.update() for _ in range(1 + len(GROUPS))]
    return [PRESETS[preset], *of_groups(PRESETS[preset])]


def moved(text: str, *values: float) -> list[Any]:
    """The text with what the sliders say, and its preset; as they are where it cannot be read, for then they say nothing."""
    try:
        found = with_groups(text, values)
    except SettingError:
        return [parts.update(), parts.update()]
    return [found, _preset_of(found)]


def shown(text: str) -> list[Any]:
    """Preset and sliders of a text; as they are where it cannot be read, as in the middle of a word."""
    try:
        values = of_groups(text)
    except SettingError:
        return [parts.update() for _ in range(1 + len(GROUPS))]
    return [_preset_of(text), *values]


def of_groups(text: str) -> list[float]:
    """The weight of each of GROUPS, as far as a slider goes. Raises SettingError."""
    weights = parse_blocks(text)
    return [min(_MOST, max(-_MOST, _weight(weights, name))) for name in GROUPS]


def with_groups(text: str, values: Sequence[float]) -> str:
    """Block weights that give each of GROUPS its value; what is finer than a group stays. Raises SettingError."""
    named = dict(parse_blocks(text).weights)
    for name, before, value in zip(GROUPS, of_groups(text), values, strict=True):
        if value == before:
            continue
        named.pop(name, None)
        if _weight(BlockWeights(tuple(named.items())), name) != value:
            named[name] = value
    return str(BlockWeights(tuple(named.items())))


def _preset_of(text: str) -> str:
    return next((name for name, preset in PRESETS.items() if parse_blocks(preset) == parse_blocks(text)), OWN)


def _weight(weights: BlockWeights, name: str) -> float:
    return weights.kind(name) if name in _KINDS else weights.block(name)
