"""Random steps on a live WebUI: bakes, pictures, LoRAs in prompts, undo, other checkpoints; in the end it is as it was."""

from __future__ import annotations

import os
import random

import pytest
from conftest import EXACT, LORA, Report, choose
from files import BASE, OTHER
from pictures import PROMPT, Offset, draw, known, same
from server import Server
from test_bake import fingerprint, known_fingerprint

pytestmark = pytest.mark.usefixtures("lora", "exact")
STEPS, SEED = int(os.environ.get("DPO_SOAK", "20")), int(os.environ.get("DPO_SOAK_SEED", "0"))
GROWTH = 256 << 20  # bytes between the second quarter and the last; the small model takes less than 100 MB, with all copies


def test_random_steps_leave_weights_pictures_and_memory_as_they_were(server: Server, report: Report) -> None:
    before, plain, made = known_fingerprint(server), known(server), random.Random(SEED)
    steps: list[str] = []
    held: list[int] = []
    for _ in range(STEPS):
        steps.append(made.choice((_bake, _bake, _undo, _draw, _draw_with_offset, _draw_with_lora, _switch))(server, made))
        held.append(server.rss())
    if server.get("status")["model"]["file"] != BASE:
        choose(server, BASE)
    server.do("unbake")
    assert fingerprint(server) == before, f"seed {SEED}: {steps}"
    assert same(draw(server), plain), f"seed {SEED}: {steps}"
    quarter = len(held) // 4
    second, last = (sum(part) / len(part) for part in (held[quarter : 2 * quarter], held[-quarter:]))
    report.measure(
        f"{STEPS} random steps, seed {SEED}: growth of memory", (last - second) / 2**20, "MiB", f"of {last / 2**20:.0f}"
    )
    assert last - second < GROWTH, f"seed {SEED}: {steps}"


def _bake(server: Server, made: random.Random) -> str:
    offset, strength = made.choice((LORA, EXACT)), round(made.uniform(0.1, 1.5), 2)
    baked = server.do("bake", offset=offset, strength=strength)
    assert (baked["offset"], baked["strength"]) == (offset, strength)
    told = server.get("status")["baked"]
    assert (told["offset"], told["strength"]) == (offset, strength)
    return f"bake {offset} x {strength}"


def _undo(server: Server, made: random.Random) -> str:
    was = server.get("status")["baked"] is not None
    assert server.do("unbake") == {"undone": was}
    if server.get("status")["model"]["file"] == BASE:
        assert fingerprint(server) == known_fingerprint(server)
    return "undo"


def _draw(server: Server, made: random.Random) -> str:
    draw(server)
    return "draw"


def _draw_with_offset(server: Server, made: random.Random) -> str:
    draw(server, offset=Offset(made.choice((LORA, EXACT)), 0.5))
    return "draw with an offset"


def _draw_with_lora(server: Server, made: random.Random) -> str:
    draw(server, f"{PROMPT} <lora:{LORA}:1>")
    return "draw with a LoRA"


def _switch(server: Server, made: random.Random) -> str:
    checkpoint = made.choice((BASE, OTHER))
    choose(server, checkpoint)
    return f"choose {checkpoint}"
