"""What javascript/dpo.js and style.css do with our HTML, in the system's Chromium: without a WebUI, without gradio."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lib_dpo.pictures import curve
from lib_dpo.webui.blind import Asked
from lib_dpo.webui.tab import blind, comparison
from lib_dpo.webui.tab.extract import cards as extract_cards

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
ROOT = Path(__file__).parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or next(
    (path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 800, "height": 600})
    yield opened
    opened.close()


def show(page: Any, html: str) -> None:
    """A page as the host makes it: our style and script, and the tab with something in it."""
    style, script = (ROOT / name for name in ("style.css", "javascript/dpo.js"))
    page.set_content(
        f"<style>{style.read_text(encoding='utf-8')}</style><div id=dpo_tab><div id=dpo_top></div>{html}</div>"
        f"<script>{script.read_text(encoding='utf-8')}</script>"
    )


# ---- before and after ----


@pytest.fixture
def pair() -> tuple[Image.Image, Image.Image]:
    """256 pixels wide; they differ between 40 and 80 alone."""
    before = Image.new("RGB", (256, 256), (90, 120, 150))
    after = before.copy()
    after.paste((255, 240, 0), (40, 60, 80, 200))
    return before, after


def line(page: Any) -> float:
    """Where the line is drawn, as a share of the picture's width."""
    return float(
        page.evaluate("""() => {
        const wipe = document.querySelector(".dpo-wipe");
        return parseFloat(getComputedStyle(wipe, "::after").left) / wipe.getBoundingClientRect().width;
    }""")
    )


def test_the_line_opens_where_the_pair_differs_most(page: Any, pair: tuple[Image.Image, Image.Image]):
    show(page, comparison.wipe_html(*pair, "strength 1"))
    assert 40 / 256 < line(page) < 80 / 256
    show(page, comparison.wipe_html(pair[0], pair[0], "strength 1"))
    assert line(page) == pytest.approx(0.5, abs=0.01)


def test_the_line_follows_mouse_and_arrow_keys(page: Any, pair: tuple[Image.Image, Image.Image]):
    show(page, comparison.wipe_html(*pair, "strength 1"))
    box = page.locator(".dpo-wipe").bounding_box()
    for share in (0.75, 0.1, 0.99):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])  # no button is pressed
        assert line(page) == pytest.approx(share, abs=0.02)
    page.locator(".dpo-wipe input").focus()
    page.keyboard.press("Home")
    assert line(page) == pytest.approx(0, abs=0.01)
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert line(page) == pytest.approx(0.03, abs=0.01)


# ---- a reference that is being fetched ----


def test_a_first_look_that_nobody_heard_is_repeated_until_it_is_answered(page: Any):
    show(
        page,
        '<div id="dpo_top">top</div><div id="dpo_foot"></div><button id="dpo_shown"></button><button id="dpo_tick"></button>',
    )
    page.evaluate("""() => { window.pressed = [];
        for (const each of document.querySelectorAll("button"))
            each.addEventListener("click", () => pressed.push(each.id)); }""")
    shown = "pressed.filter((id) => id === 'dpo_shown').length"
    page.wait_for_function(f"{shown} >= 1", timeout=10_000)
    page.evaluate("() => { document.querySelector('#dpo_foot').textContent = 'everything was found'; pressed.length = 0; }")
    page.wait_for_function("pressed.filter((id) => id === 'dpo_tick').length >= 2", timeout=10_000)
    assert page.evaluate(shown) == 0


def test_a_fetch_is_looked_at_until_it_has_ended_and_then_the_lists_are(page: Any):
    names = ("dpo_references_look", "dpo_shown")
    buttons = "".join(f'<button id="{name}">{name}</button>' for name in names)
    show(page, f'<div id="dpo_references_view"><progress class="dpo-fetching"></progress></div>{buttons}')
    page.evaluate("""() => { window.pressed = [];
        for (const each of document.querySelectorAll("button"))
            each.addEventListener("click", () => pressed.push(each.id)); }""")
    page.wait_for_function("pressed.filter((id) => id === 'dpo_references_look').length >= 2", timeout=10_000)
    page.evaluate("() => { pressed.length = 0; document.querySelector('progress').remove(); }")
    page.wait_for_function("pressed.includes('dpo_shown')", timeout=10_000)
    page.evaluate("() => { pressed.length = 0; }")
    page.wait_for_timeout(2500)
    assert page.evaluate("pressed") == []


# ---- blind test ----


@pytest.fixture
def voting(page: Any) -> Any:
    """A pair, the buttons that gradio makes, and a list of those that were pressed."""
    data = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(data, format="JPEG")
    asked = Asked("id", 1.0, 0.0, "a cat", 1, "left", (data.getvalue(),) * 2, (b"",) * 2)
    buttons = "".join(f'<button id="dpo_blind_{name}">{name}</button>' for name in ("left", "right", "none", "skip", "look"))
    show(
        page,
        f'<div id="dpo_blind_view">{blind.pair_html(asked)}</div><div class="dpo-votes">{buttons}</div><textarea></textarea>',
    )
    page.evaluate("""() => { window.pressed = [];
        for (const each of document.querySelectorAll(".dpo-votes button"))
            each.addEventListener("click", () => pressed.push(each.textContent)); }""")
    return page


def pressed(page: Any) -> list[str]:
    return [name for name in page.evaluate("pressed") if name != "look"]


def test_keys_and_clicks_vote(voting: Any):
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp"):
        voting.keyboard.press(key)
    assert pressed(voting) == ["left", "right", "none", "skip"]
    voting.locator("figure").nth(1).click()
    voting.locator("figure").nth(0).click()
    assert pressed(voting)[4:] == ["right", "left"]


def test_keys_do_not_vote_while_one_types_or_nothing_is_shown(voting: Any):
    voting.locator("textarea").focus()
    voting.keyboard.press("ArrowLeft")
    voting.locator("textarea").blur()
    voting.keyboard.press("Control+ArrowLeft")
    voting.evaluate("document.querySelector('#dpo_blind_view').style.display = 'none'")
    voting.keyboard.press("ArrowLeft")
    assert pressed(voting) == []


def test_a_key_that_is_held_votes_once(voting: Any):
    for _ in range(3):
        voting.keyboard.down("ArrowLeft")
    assert pressed(voting) == ["left"]


def scales(page: Any) -> list[str]:
    return list(page.evaluate("[...document.querySelectorAll('figure img')].map((each) => getComputedStyle(each).transform)"))


def test_both_pictures_are_zoomed_alike(voting: Any):
    box = voting.locator("figure").first.bounding_box()
    voting.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    voting.mouse.wheel(0, -100)
    voting.wait_for_function("getComputedStyle(document.querySelector('figure img')).transform.includes('1.25')")
    left, right = scales(voting)
    assert left == right
    origins = voting.evaluate(
        "[...document.querySelectorAll('figure img')].map((each) => getComputedStyle(each).transformOrigin)"
    )
    assert origins[0] == origins[1]
    assert float(origins[0].split("px")[0]) == pytest.approx(0.25 * box["width"], abs=2)
    voting.keyboard.press("0")
    assert "1.25" not in scales(voting)[0]
    voting.keyboard.press("+")
    assert scales(voting)[0] == scales(voting)[1] == "matrix(1.5, 0, 0, 1.5, 0, 0)"
    assert pressed(voting) == []


def test_the_page_looks_for_a_pair_that_is_being_drawn(voting: Any):
    voting.evaluate("document.querySelector('#dpo_blind_view').innerHTML = '<p class=\"dpo-waiting\">drawn</p>'")
    voting.wait_for_function("pressed.filter((name) => name === 'look').length >= 2", timeout=10_000)


# ---- the card of a new file ----


def test_a_card_puts_its_lora_into_the_prompt_once_and_opens_other_pages(page: Any):
    show(
        page,
        '<button id=dpo_extract_to_bake onclick="window.pressed = (window.pressed || 0) + 1"></button>'
        "<div id=txt2img_prompt><textarea>a cat, &lt;lora:other:0.5&gt; </textarea></div>"
        + extract_cards._doors("<lora:mine:1>"),
    )
    page.evaluate("() => { window.switch_to_txt2img = () => { window.there = true; }; }")
    for _ in range(2):
        page.get_by_role("button", name="Use in prompt").click()
    assert page.locator("textarea").input_value() == "a cat, <lora:other:0.5> <lora:mine:1>"
    assert page.evaluate("() => window.there")
    page.get_by_role("button", name="Bake").click()
    assert page.evaluate("() => window.pressed") == 1


def test_the_hosts_own_list_of_checkpoints_is_filled_anew_after_one_was_written(page: Any):
    pressed = 'onclick="window.pressed = (window.pressed || []).concat(this.id)"'
    show(
        page,
        f"<button id=refresh_sd_model_checkpoint {pressed}></button><button id=forge_refresh_checkpoint {pressed}></button>"
        f"<button hidden id=script_txt2img_dpo_offset_refresh {pressed}></button>",  # or it is pressed when it comes into sight
    )
    page.evaluate("() => dpoEnd('dpo_x_result', '')")
    assert page.evaluate("() => window.pressed") is None
    page.evaluate("() => dpoEnd('dpo_x_result', 'offset')")
    script = "script_txt2img_dpo_offset_refresh"
    assert page.evaluate("() => window.pressed") == [script]
    page.evaluate("() => dpoEnd('dpo_x_result', 'checkpoint')")
    assert page.evaluate("() => window.pressed.slice(1)") == [script, "refresh_sd_model_checkpoint", "forge_refresh_checkpoint"]


def test_what_a_click_gave_is_brought_into_view(page: Any):
    show(page, "<div style='height: 3000px'></div><div id=dpo_x_result_place><div id=dpo_x_result>found</div></div>")
    page.evaluate("() => dpoEnd('dpo_x_result')")
    page.wait_for_function("() => dpoElement('dpo_x_result').getBoundingClientRect().top < window.innerHeight")


# ---- the curve ----


CURVE = [curve.Point(1e6 * 2**n, 0.1 + 0.08 * n) for n in range(9)]
DOTS = [curve.Point(each.x, each.y, f"rank {2**n}") for n, each in enumerate(CURVE)]


@pytest.mark.parametrize("width", [420, 1200])
def test_the_points_of_a_curve_lie_on_its_line_and_tell_their_figures(page: Any, width: int):
    page.set_viewport_size({"width": width, "height": 700})
    marked = curve.Point(CURVE[4].x, CURVE[4].y, "rank 16, chosen")
    show(page, curve.size_curve(CURVE, DOTS, marked, "sizes"))
    line = page.evaluate("""() => {
        const line = document.querySelector(".dpo-curve"), matrix = line.getScreenCTM();
        return [...line.points].map((point) => point.matrixTransform(matrix)).map(({x, y}) => [x, y]);
    }""")
    for place, (x, y) in enumerate(line):
        box = page.locator(".dpo-dot-small").nth(place).bounding_box()
        assert (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) == pytest.approx((x, y), abs=1.5)
    box = page.locator(".dpo-dot-marked").bounding_box()
    assert (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) == pytest.approx(line[4], abs=1.5)
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut"
    tip = page.get_by_text("rank 2", exact=True)
    assert not tip.is_visible()
    page.locator(".dpo-dot-small").nth(1).hover()
    assert tip.is_visible()
    page.mouse.move(0, 0)
    page.keyboard.press("Tab")
    assert page.get_by_text("rank 1", exact=True).is_visible()
