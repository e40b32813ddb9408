"""What the host shows of the files that lie beside a LoRA, and of the tab in another language."""

from __future__ import annotations

import json

from conftest import LORA
from files import REFERENCE
from page import Tab
from pictures import PROMPT
from playwright.sync_api import Browser
from server import REPOSITORY, Server

NAME = "with-a-card"


def test_the_hosts_card_of_a_new_lora(chromium: Browser, server: Server) -> None:
    """Its sentence, the preferred weight in the tag that a click puts into the prompt, and the picture of a comparison."""
    server.do("extract", reference=REFERENCE, name=NAME, rank=2, overwrite=True)
    server.do("compare", offset=NAME, prompts=[PROMPT], strengths="1", seeds="1", steps=1, width=64, height=64)
    (file,) = (server.data / "models").rglob(f"{NAME}.json")
    told = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(told | {"preferred weight": 1.4}), encoding="utf-8")
    tab = Tab(chromium, server)
    try:
        tab.top("txt2img")
        tab.page.locator("#txt2img_extra_tabs").get_by_text("Lora", exact=True).first.click()
        tab.click("txt2img_lora_extra_refresh")
        card = tab.page.locator(f"#txt2img_lora_cards [data-name='{NAME}']").first
        tab.until(lambda: "1.4" in str(card.get_attribute("onclick")), "the weight in the tag")
        assert told["description"].partition(".")[0] in card.inner_text()
        assert f"{NAME}.preview.png" in str(card.locator("img.preview").get_attribute("src"))
    finally:
        file.unlink()
        tab.close()


def test_the_tab_in_german(chromium: Browser, server: Server, lora: dict) -> None:
    """Chosen in the host's settings as its users do; the files come with the extension."""
    words = json.loads((REPOSITORY / "localizations" / "de_DE.json").read_text(encoding="utf-8"))
    tab = Tab(chromium, server)
    server.post("/sdapi/v1/options", localization="de_DE")
    try:
        tab.reload_ui()
        tab.dpo()
        for elem_id, english in (("dpo_extract_analyse", "Analyse"), ("dpo_extract_go", "Extract DPO LoRA")):
            assert words[english] in tab.text(elem_id)
        tab.page.locator("#dpo_pages").get_by_text(words["Bake"], exact=True).first.click()
        tab.until(lambda: tab.field("dpo_bake_offset").input_value() != "", "the lists are filled")
        tab.choose("dpo_bake_offset", LORA)
        tab.until(lambda: tab.page.locator("#dpo_bake_before .dpo-card").count(), "what the bake will do")
        assert words["Offset"] in tab.text("dpo_bake_offset")
    finally:
        server.post("/sdapi/v1/options", localization="None")
        tab.reload_ui()
        tab.close()
