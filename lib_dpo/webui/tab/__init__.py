"""The DPO tab: a status line, and a page each to extract, bake, compare, vote blindly and inspect.

May import what webui imports, and the session.
"""

from __future__ import annotations

from typing import Any

from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import blind, compare, inspect, lists, markup, parts
from lib_dpo.webui.tab.bake import page as bake
from lib_dpo.webui.tab.extract import page as extract

_NOT_LOOKED_YET = "The loaded model has not been looked at yet: press ↻."


def build(session: Session) -> Any:
    """The tab as gradio Blocks. Opens no file: what is loaded and the lists of files come when the page shows the tab."""
    import gradio as gr

    with gr.Blocks(analytics_enabled=False) as blocks, gr.Column(elem_id="dpo_tab"):
        with gr.Row(elem_id="dpo_top"):
            status = parts.unsaved(gr.HTML(markup.note(_NOT_LOOKED_YET), elem_id="dpo_status"))
            rescan = parts.refresh_button("dpo_refresh")
            shown = gr.Button("Look again", elem_id="dpo_shown", elem_classes=["dpo-hidden"])  # pressed by dpo.js
            tick = gr.Button(
                "Look at the model", elem_id="dpo_tick", elem_classes=["dpo-hidden"]
            )  # and this, every few seconds
        task = parts.unsaved(gr.Textbox(label="Task of the DPO tab", visible=False, elem_id="dpo_task"))
        tab = parts.Tab(session, status, task, rescans=[rescan])
        with gr.Tabs(elem_id="dpo_pages"):
            for module in (extract, bake, compare, blind, inspect):
                module.page(tab)
        extract.hand_over(tab)
        foot = parts.unsaved(gr.HTML("", elem_id="dpo_foot"))
        lists.wire(tab, shown, tick, foot)
    return blocks
