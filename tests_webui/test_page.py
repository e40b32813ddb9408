"""The tab on the page, with a mouse and a keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from conftest import EXACT, LORA, Report, choose
from files import BASE, OTHER, REFERENCE
from page import Tab
from pictures import PROMPT, Offset, distance, draw, known, request, same
from playwright.sync_api import Browser
from server import Server
from test_bake import fingerprint, known_fingerprint

SCRIPT = "script_txt2img_dpo_offset"


@pytest.fixture
def tab(chromium: Browser, server: Server) -> Iterator[Tab]:
    opened = Tab(chromium, server)
    yield opened
    errors = opened.errors
    opened.close()
    assert not errors


def test_five_pages_and_a_true_status(tab: Tab, server: Server) -> None:
    tab.dpo()
    pages = ["Extract", "Bake", "Compare", "Blind test", "Inspect"]
    assert tab.pages() == pages
    assert server.get("status")["text"] in tab.text("dpo_status")
    for name in pages:
        tab.dpo(name)
        assert tab.page.locator(f"#dpo_{name.split()[0].lower()}").first.is_visible()
    assert "everything that DPO needs was found" in tab.text("dpo_foot")


def test_extract_by_a_click(tab: Tab, server: Server) -> None:
    tab.dpo("Extract")
    assert REFERENCE in tab.field("dpo_extract_reference").input_value()
    tab.fill("dpo_extract_name", "clicked")
    tab.fill("dpo_extract_rank", "4")
    tab.page.locator("#dpo_extract_overwrite input").first.check()
    tab.watch_progress()
    tab.click("dpo_extract_go")
    said = tab.wait_for_text("dpo_extract_result", "clicked is written")
    assert "<lora:clicked:1>" in said
    assert tab.progress()  # what it says depends on when the host's page first asks: a small model is done in a second
    assert tab.page.locator("#dpo_extract .progressDiv:visible").count() == 0
    assert distance(known(server), draw(server, f"{PROMPT} <lora:clicked:1>")) > 0


def test_a_new_lora_is_in_the_scripts_list_at_once(tab: Tab) -> None:
    """Without a refresh by hand: after the tab wrote it, and when the script comes into sight."""
    tab.dpo("Extract")
    tab.fill("dpo_extract_name", "listed-at-once")
    tab.fill("dpo_extract_rank", "4")
    tab.page.locator("#dpo_extract_overwrite input").first.check()
    tab.click("dpo_extract_go")
    tab.wait_for_text("dpo_extract_result", "listed-at-once is written")
    for page, field in (("Bake", "dpo_bake_offset"), ("Compare", "dpo_compare_offset"), ("Inspect", "dpo_inspect_file")):
        tab.dpo(page)
        tab.choose(field, "listed-at-once")
    tab.top("txt2img")
    tab.page.locator(f"#{SCRIPT}_enabled .label-wrap").first.click()  # opens it
    tab.choose(f"{SCRIPT}_offset", "listed-at-once")


def test_analyse_by_a_click(tab: Tab) -> None:
    tab.dpo("Extract")
    tab.click("dpo_extract_analyse")
    assert "Is it the right base?" in tab.wait_for_text("dpo_extract_pair_result", "LoRA or bake?")


def test_analysed_again_and_a_point_that_moves(tab: Tab, report: Report) -> None:
    """Spectra are remembered by the files' hashes; the mark on the curve follows a slider."""
    tab.dpo("Extract")
    for what in ("first", "again"):
        seconds = tab.seconds("dpo_extract_analyse", "dpo_extract_pair_result")
        report.measure(f"Analyse by a click, {what}", seconds, "s")
    tab.wait_for_text("dpo_extract_outlook", "→")
    tab.fill("dpo_extract_rank", "2")
    tab.wait_for_text("dpo_extract_outlook", "Rank 2 →")
    report.measure("from a slider to the moved point", tab.milliseconds_of_a_move("dpo_extract_rank", 3), "ms")
    tab.wait_for_text("dpo_extract_outlook", "Rank 3 →")


def test_bake_and_undo_by_clicks(tab: Tab, server: Server, exact: dict) -> None:
    before, plain = known_fingerprint(server), known(server)
    tab.dpo("Bake")
    tab.choose("dpo_bake_offset", f"{EXACT}.safetensors")
    tab.wait_for_text("dpo_bake_before", "it can be baked")
    tab.fill("dpo_bake_strength", "0.5")
    tab.click("dpo_bake_go")
    tab.wait_for_text("dpo_bake_result", "Baked into the loaded model")
    assert server.get("status")["text"] in tab.wait_for_text("dpo_status", "× 0.5")
    assert not same(draw(server), plain)
    tab.click("dpo_bake_undo")
    tab.wait_for_text("dpo_bake_result", "bit for bit")
    tab.wait_for_text("dpo_status", "clean")
    assert fingerprint(server) == before
    assert same(draw(server), plain)


def test_a_part_of_the_unet_at_half_strength(tab: Tab, server: Server, lora: dict) -> None:
    """By a slider of its own; Undo is off where nothing is baked."""
    plain = known(server)
    tab.dpo("Bake")
    tab.choose("dpo_bake_offset", LORA)
    tab.wait_for_text("dpo_bake_before", "it can be baked")
    assert tab.page.locator("#dpo_bake_undo").first.is_disabled()
    tab.page.locator("#dpo_bake_groups").get_by_text("Each part by itself").first.click()
    tab.fill("dpo_bake_group_mid", "0.5")
    tab.until(lambda: tab.field("dpo_bake_blocks").input_value() == "MID=0.5", "the block weights say so")
    as_script, whole = (draw(server, offset=Offset(LORA, 1.0, blocks)) for blocks in ("MID=0.5", ""))
    tab.click("dpo_bake_go")
    tab.wait_for_text("dpo_bake_result", "MID=0.5")
    tab.until(lambda: tab.page.locator("#dpo_bake_undo").first.is_enabled(), "Undo is on")
    baked = draw(server)
    assert distance(baked, as_script) < distance(baked, whole)
    tab.click("dpo_bake_undo")
    tab.wait_for_text("dpo_bake_result", "bit for bit")
    assert same(draw(server), plain)


def test_a_saved_checkpoint_is_in_the_hosts_list(tab: Tab, server: Server, lora: dict) -> None:
    """Without a refresh by hand, and chosen there it draws other pictures."""
    plain = known(server)
    tab.dpo("Bake")
    tab.choose("dpo_bake_offset", LORA)
    tab.fill("dpo_bake_save_name", "saved-by-a-click")
    tab.page.locator("#dpo_bake_save_overwrite input").first.check()
    tab.click("dpo_bake_save_go")
    tab.wait_for_text("dpo_bake_result", "saved-by-a-click is saved")
    try:
        _choose_in_the_hosts_list(tab, "saved-by-a-click")
        tab.until(lambda: not same(draw(server), plain), "pictures are those of the new checkpoint")
        tab.wait_for_text("dpo_status", "saved-by-a-click")
    finally:
        choose(server, BASE)


def _choose_in_the_hosts_list(tab: Tab, name: str) -> None:
    """The list of checkpoints above all tabs."""
    field = tab.page.locator("#setting_sd_model_checkpoint input").first
    field.click()
    field.fill(name)
    tab.page.locator("ul.options li, [role=option]").filter(has_text=name).first.click()


def test_compare_by_a_click(tab: Tab, lora: dict) -> None:
    """The pictures reach the page: gradio writes them to a folder of the host, which may never have been made."""
    _compare(tab)
    _pictures_are_shown(tab)


def _compare(tab: Tab) -> None:
    tab.dpo("Compare")
    tab.choose("dpo_compare_offset", LORA)
    tab.fill("dpo_compare_prompts", PROMPT)
    if not tab.field("dpo_compare_steps").is_visible():
        tab.page.locator("#dpo_compare_more .label-wrap").first.click()
    for name, value in (("strengths", "1"), ("seeds", "1"), ("steps", "1"), ("width", "64"), ("height", "64")):
        tab.fill(f"dpo_compare_{name}", value)
    tab.click("dpo_compare_go")


def _pictures_are_shown(tab: Tab) -> None:
    tab.until(lambda: tab.page.locator("#dpo_compare_result .dpo-card").count(), "the verdict")
    for elem_id in ("dpo_compare_cells", "dpo_compare_where"):
        tab.page.wait_for_function(f"() => (document.querySelector('#{elem_id} img') || {{}}).naturalWidth > 0")


def test_a_cell_opens_large_over_the_untouched_picture(tab: Tab, lora: dict) -> None:
    _compare(tab)
    _pictures_are_shown(tab)
    tab.page.locator("#dpo_compare_cells .dpo-cell").nth(1).click()
    large = tab.page.locator("dialog.dpo-large")
    assert large.locator(".dpo-wipe img").count() == 2
    tab.page.keyboard.press("Escape")
    tab.until(lambda: large.count() == 0, "the large picture is closed")


def test_undo_and_compare_is_offered_where_something_is_baked(tab: Tab, server: Server, lora: dict) -> None:
    server.do("bake", offset=LORA, strength=1)
    _compare(tab)
    tab.wait_for_text("dpo_compare_result_alert", "undo it first")
    tab.click("dpo_compare_undo")
    _pictures_are_shown(tab)
    assert server.get("status")["baked"] is None


def test_compare_where_pictures_cannot_be_written(tab: Tab, server: Server, lora: dict) -> None:
    """The folder for them is a file: a sentence, not gradio's bare "Error"; where it is only missing it is made."""
    folder = server.data / "pictures of answers"
    before = server.get("/sdapi/v1/options")["temp_dir"] or ""
    folder.mkdir()
    server.post("/sdapi/v1/options", temp_dir=str(folder))
    try:
        shutil.rmtree(folder)
        folder.touch()
        _compare(tab)
        if server.flavour.pictures_in_files:
            tab.wait_for_text("dpo_compare_result_alert", "No picture could be shown")
            folder.unlink()
            tab.click("dpo_compare_go")
        _pictures_are_shown(tab)
        assert folder.is_dir() == server.flavour.pictures_in_files
    finally:
        server.post("/sdapi/v1/options", temp_dir=before)


def test_a_refusal_is_a_sentence(tab: Tab) -> None:
    tab.dpo("Extract")
    tab.fill("dpo_extract_name", "../evil")
    tab.click("dpo_extract_go")
    tab.until(lambda: tab.page.locator("#dpo_extract_result_alert [role=alert]").count(), "an alert")
    assert tab.page.locator("#dpo_extract .progressDiv:visible").count() == 0


def test_inspect_by_a_click(tab: Tab, lora: dict) -> None:
    tab.dpo("Inspect")
    tab.choose("dpo_inspect_file", LORA)
    tab.click("dpo_inspect_look")
    assert "LoRA" in tab.wait_for_text("dpo_inspect_result", "SHA-256")


def test_does_it_fit_by_a_click(tab: Tab) -> None:
    """The pair on another checkpoint."""
    tab.dpo("Inspect")
    tab.choose("dpo_inspect_target", OTHER)
    tab.choose("dpo_inspect_base", BASE)
    tab.choose("dpo_inspect_reference", REFERENCE)
    tab.click("dpo_inspect_fit")
    tab.until(lambda: "Strength to start with" in tab.text("dpo_inspect"), "a strength to start with")


def test_a_reference_to_fetch_without_a_network(tab: Tab) -> None:
    """The server runs without one: what can be fetched is listed, and where to put files by hand is said."""
    tab.dpo("Extract")
    tab.page.locator("#dpo_references .label-wrap").first.click()
    tab.until(lambda: "mhdang" in tab.text("dpo_references"), "the published references")
    tab.click("dpo_references_ask")
    tab.until(lambda: "models/DPO" in tab.text("dpo_references_view") + tab.text("dpo_references_alert"), "where to put it")


def test_pasting_switches_the_script_on_and_off(tab: Tab, server: Server, lora: dict) -> None:
    with_it = request(server, offset=Offset(LORA, 0.7, "IN=0.5,MID=0")).infotexts[0]
    without = request(server).infotexts[0]
    _paste(tab, with_it)
    tab.until(lambda: _is_on(tab), "the script is on")
    assert tab.field(f"{SCRIPT}_offset").input_value() == LORA
    assert float(tab.field(f"{SCRIPT}_strength").input_value()) == 0.7
    assert tab.field(f"{SCRIPT}_blocks").input_value() == "IN=0.5,MID=0"
    _paste(tab, without)
    tab.until(lambda: not _is_on(tab), "the script is off")


def test_a_picture_with_the_script(tab: Tab, server: Server, lora: dict) -> None:
    """Pasted, generated with the button, and the same to the pixel as by the API."""
    found = request(server, offset=Offset(LORA, 0.7))
    _paste(tab, found.infotexts[0])
    tab.until(lambda: _is_on(tab), "the script is on")
    tab.click("txt2img_generate")
    tab.until(lambda: "DPO strength: 0.7" in tab.text("html_info_txt2img"), "the picture's infotext")


def test_send_to_img2img_brings_the_script_along(tab: Tab, server: Server, lora: dict) -> None:
    """As PNG Info does: switch, offset, strength, blocks and rank; and off where the picture was made without."""
    there = SCRIPT.replace("txt2img", "img2img")
    sent = {"offset": LORA, "strength": "0.7", "blocks": "IN=0.5,MID=0", "rank": "2"}
    for offset in (Offset(LORA, 0.7, "IN=0.5,MID=0", rank=2), None):
        _paste(tab, request(server, offset=offset).infotexts[0])
        tab.until(lambda wanted=bool(offset): _is_on(tab) == wanted, "the script is as in the infotext")
        tab.click("txt2img_generate")
        tab.until(lambda wanted=bool(offset): _says_offset(tab) == wanted, "the picture is there")
        tab.click("txt2img_send_to_img2img")
        tab.until(lambda wanted=bool(offset): _is_on(tab, there) == wanted, "the script of img2img is as that of txt2img")
        if offset:
            tab.until(lambda: _fields(tab, there) == sent, "all of it was sent")


def _paste(tab: Tab, infotext: str) -> None:
    tab.top("txt2img")
    tab.field("txt2img_prompt").fill(infotext)
    tab.click("paste")


def _fields(tab: Tab, script: str) -> dict[str, str]:
    return {name: tab.field(f"{script}_{name}").input_value() for name in ("offset", "strength", "blocks", "rank")}


def _says_offset(tab: Tab) -> bool | None:
    """Whether the infotext below the picture has an offset; None where there is no infotext."""
    said = tab.text("html_info_txt2img")
    return "DPO offset" in said if "Steps:" in said else None


def _is_on(tab: Tab, script: str = SCRIPT) -> bool:
    return tab.page.locator(f"#{script}_enabled-visible-checkbox").is_checked()
