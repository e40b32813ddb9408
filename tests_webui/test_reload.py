"""Reload UI: everything of ours is made anew, and what is baked stays and is known."""

from __future__ import annotations

import json

from conftest import EXACT
from page import Tab, browser
from pictures import Offset, axes, draw, known, same
from server import Server
from test_bake import fingerprint, known_fingerprint
from test_xyz import OURS


def test_reload_keeps_the_bake_and_doubles_nothing(server: Server, exact: dict) -> None:
    before, plain = known_fingerprint(server), known(server)
    server.do("bake", offset=EXACT, strength=0.8)
    baked, status = draw(server), server.get("status")["text"]
    with browser() as chromium:
        tab = Tab(chromium, server)
        tab.reload_ui()
        tab.dpo()
        assert status in tab.text("dpo_status")
        assert tab.page.locator("#tab_dpo").count() == 1
        assert tab.page.locator("#script_txt2img_dpo_offset_enabled").count() == 1
        tab.close()
    assert server.get("status")["text"] == status
    assert [axes(server).count(label) for label in OURS] == [1] * len(OURS)
    for kind in ("txt2img", "img2img"):
        assert server.get("/sdapi/v1/scripts")[kind].count("dpo offset") == 1
    assert same(draw(server), baked)
    assert not same(draw(server, offset=Offset(EXACT, 0.2)), baked)
    assert server.do("unbake") == {"undone": True}
    assert fingerprint(server) == before
    assert same(draw(server), plain)


def test_a_saved_choice_shows_its_field(server: Server) -> None:
    """Defaults that the user saved (ui-config.json) are put into the page without a change event."""
    saved = server.data / "ui-config.json"
    before = saved.read_text(encoding="utf-8")
    settings = json.loads(before)
    (key,) = [key for key in settings if key.endswith("Choose the LoRA's size by/value")]
    saved.write_text(json.dumps({**settings, key: "Size"}), encoding="utf-8")
    try:
        with browser() as chromium:
            tab = Tab(chromium, server)
            tab.reload_ui()
            tab.dpo("Extract")
            tab.until(lambda: tab.page.locator("#dpo_extract_size").first.is_visible(), "the field of the saved choice")
            assert not tab.page.locator("#dpo_extract_rank").first.is_visible()
            tab.close()
    finally:
        saved.write_text(before, encoding="utf-8")
