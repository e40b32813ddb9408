"""The WebUI's page in a browser: the system's Chromium, with nothing from other machines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Locator, Page, sync_playwright
from server import Server

TIMEOUT_MS = 120_000
CLICK_MS = 20_000
_ANSWERED_MS = 2_000
_TABS, _PAGES = (f"#{elem_id} > .tab-nav, #{elem_id} > .tab-wrapper" for elem_id in ("tabs", "dpo_pages"))
_ARGS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # pages ask for fonts elsewhere
_NAMES = ("chromium", "chromium-browser", "google-chrome")

_SECONDS = """([button, place]) => new Promise((done) => {
    const busy = () => document.getElementById(place).getAttribute("aria-busy"), began = performance.now();
    document.getElementById(button).click();
    const watch = setInterval(() => {
        if (busy() === "false") { clearInterval(watch); done((performance.now() - began) / 1000); }
    }, 5);
})"""
_MILLISECONDS_OF_A_MOVE = """([slider, value]) => new Promise((done) => {
    const place = document.getElementById("dpo_extract_outlook");
    const field = document.querySelector(`#${slider} input[type=range]`);
    const before = place.innerHTML, began = performance.now();
    const watch = setInterval(() => {
        if (place.innerHTML !== before) { clearInterval(watch); done(performance.now() - began); }
    }, 2);
    field.value = value;
    field.dispatchEvent(new Event("input", {bubbles: true}));
})"""


@contextmanager
def browser() -> Iterator[Browser]:
    """The Chromium of $CHROMIUM, or the first that is installed."""
    found = os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, _NAMES) if path), None)
    if not found:
        raise FileNotFoundError(f"no browser: install one of {', '.join(_NAMES)}, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=_ARGS)
        try:
            yield opened
        finally:
            opened.close()


class Tab:
    """The page of one server, with the errors of its scripts."""

    def __init__(self, browser: Browser, server: Server) -> None:
        self.errors: list[str] = []
        self._server = server
        self.page: Page = browser.new_page(viewport={"width": 1400, "height": 1600})
        self.page.set_default_timeout(CLICK_MS)
        self.page.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack}"))
        self.open()

    def open(self) -> None:
        """Load the page and wait until its scripts have run."""
        self.page.goto(self._server.url, wait_until="domcontentloaded")
        self._wait_for_scripts()

    def reload_ui(self) -> None:
        """Press the host's Reload UI, and wait until the page has loaded itself again, as the host's script does.

        The page is not closed: Playwright's close() has no end where a page is about to load itself.
        """
        started = self._server.starts()
        self.top("Settings")
        self.page.evaluate("() => { window.beforeReload = true; }")
        self.click("settings_restart_gradio")
        self.until(lambda: self._server.starts() > started, "the WebUI has started anew")
        self._server.wait_for_start(started + 1)
        self.page.wait_for_function("() => !window.beforeReload", timeout=TIMEOUT_MS)
        self._wait_for_scripts()

    def _wait_for_scripts(self) -> None:
        self.page.wait_for_function("() => typeof opts === 'object' && Object.keys(opts).length > 10", timeout=TIMEOUT_MS)
        self.page.wait_for_selector("#txt2img_prompt textarea")

    def close(self) -> None:
        """When the host has answered: AUTOMATIC1111 1.10.1 counts tokens a moment after a prompt changed, and where the page
        is gone by then, its Reload UI never ends, with this extension or without."""
        self.page.wait_for_timeout(_ANSWERED_MS)
        self.page.close()

    # ---- where to ----

    def top(self, title: str) -> None:
        """Show one of the host's tabs."""
        self.page.locator("#tabs > .tab-nav > button, #tabs > .tab-wrapper button[role=tab]").filter(
            has_text=title
        ).first.click()

    def dpo(self, name: str = "") -> None:
        """Show our tab, and a page of it."""
        self.top("DPO")
        if name:
            self.page.locator(_PAGES).get_by_text(name, exact=True).first.click()
        self.until(lambda: "not been looked at" not in self.text("dpo_status"), "the status line is filled")

    # ---- what stands there ----

    def field(self, elem_id: str) -> Locator:
        """The text or number field of a component."""
        return (
            self.page.locator(f"#{elem_id}").locator("textarea, input[type=number], input[type=text], input:not([type])").first
        )

    def text(self, elem_id: str) -> str:
        return self.page.locator(f"#{elem_id}").first.inner_text()  # 3.41 gives one id to a block and to what is in it

    def pages(self) -> list[str]:
        """The titles of our pages."""
        return [title.strip() for title in self.page.locator(_PAGES).first.locator("button").all_inner_texts() if title.strip()]

    def fill(self, elem_id: str, value: str) -> None:
        field = self.field(elem_id)
        field.fill(value)
        field.press("Tab")

    def choose(self, elem_id: str, value: str) -> None:
        """Choose from a list by typing; Enter alone would take the first that holds these letters.

        Some lists say what a file is behind its name.
        """
        field = self.page.locator(f"#{elem_id}").first.locator("input").first
        field.click()
        field.fill(value)
        named = (
            f"{of} [aria-label{name}']" for of in (f"#{elem_id}", "ul.options") for name in (f"='{value}", f"^='{value} ·")
        )
        self.page.locator(", ".join(named)).first.click()
        field.press("Tab")

    def click(self, elem_id: str) -> None:
        self.page.locator(f"#{elem_id}").first.click()

    def wait_for_text(self, elem_id: str, wanted: str) -> str:
        self.until(lambda: wanted in self.text(elem_id), f"{wanted!r} in {elem_id}, which says {self.text(elem_id)[:300]!r}")
        return self.text(elem_id)

    def seconds(self, button: str, place: str) -> float:
        """From a click to the end of the work that it starts."""
        return float(self.page.evaluate(_SECONDS, [button, place]))

    def milliseconds_of_a_move(self, slider: str, value: float) -> float:
        """From a slider's move to the moved point on the curve of the page Extract."""
        return float(self.page.evaluate(_MILLISECONDS_OF_A_MOVE, [slider, str(value)]))

    def watch_progress(self) -> None:
        """Keep what the host's progress bars show from now on, for `progress`."""
        self.page.evaluate(
            """() => {
                window.seenProgress = [];
                const look = () => document.querySelectorAll('#tab_dpo .progressDiv').forEach(
                    bar => window.seenProgress.push(bar.textContent));
                new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
            }"""
        )

    def progress(self) -> list[str]:
        found: list[str] = self.page.evaluate("() => window.seenProgress")
        return found

    def until(self, condition: Callable[[], Any], what: str, ms: int = TIMEOUT_MS) -> None:
        for _ in range(ms // 100):
            if condition():
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"not after {ms / 1000:.0f} s: {what}")
