"""What javascript/dpo.js and style.css do with our HTML, in the system's Chromium: without a WebUI, without gradio."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lib_dpo.webui.tab import comparison

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
