"""The page *Blind test*, voted on with the keyboard while the host draws."""

from __future__ import annotations

import json

from conftest import LORA, Report
from page import TIMEOUT_MS, Tab
from playwright.sync_api import Browser
from server import Server

_VOTES = 4
_NEXT_PAIR = """(limit) => new Promise((done, failed) => {
    const pictures = () => [...document.querySelectorAll("#dpo_blind_view .dpo-blind img")].map((each) => each.src).join();
    const before = pictures(), began = performance.now();
    const watch = setInterval(() => {
        const now = pictures(), took = performance.now() - began;
        if ((now && now !== before) || took > limit) {
            clearInterval(watch);
            took > limit ? failed(new Error("no other pair")) : done(took);
        }
    }, 5);
    document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
})"""


def test_votes_by_keyboard_are_kept(chromium: Browser, server: Server, lora: dict, report: Report) -> None:
    """Each vote is written down, counted on the page, and followed by the next pair."""
    tab = Tab(chromium, server)
    tab.dpo("Blind test")
    tab.choose("dpo_blind_offset", LORA)
    tab.fill("dpo_blind_prompts", "a cat\na dog\na house\na tree\na boat\na red ball")
    tab.page.locator("#dpo_blind_how .label-wrap").first.click()
    for name, value in (("steps", "1"), ("width", "64"), ("height", "64")):
        tab.fill(f"dpo_blind_{name}", value)
    tab.click("dpo_blind_go")
    tab.wait_for_text("dpo_blind_figures", "No votes yet")
    pair = tab.page.locator("#dpo_blind_view .dpo-blind img")
    took = []
    for _ in range(_VOTES):
        tab.until(lambda: pair.count() == 2, "a pair to vote on")
        tab.page.wait_for_timeout(6000 if not server.flavour.any_width else 1500)  # the next one is drawn ahead
        took.append(tab.page.evaluate(_NEXT_PAIR, TIMEOUT_MS))
    tab.wait_for_text("dpo_blind_figures", f"of {_VOTES}")
    votes = [json.loads(line) for line in server.get("blind/votes")["votes"].splitlines()]
    assert sum(vote["answer"] in ("a", "b") for vote in votes) >= _VOTES
    report.measure("from a vote to the next pair, ready before", sorted(took)[_VOTES // 2], "ms", f"{_VOTES} votes")
    errors = tab.errors
    tab.close()
    assert not errors
