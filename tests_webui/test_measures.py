"""What it costs, measured on this machine; printed at the end. Nothing fails here but what is out of all proportion."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from conftest import RANK, Report, clean
from files import BASE, REFERENCE
from page import Tab, browser
from pictures import PROMPT, Offset, draw, grid
from server import PROBE, REPOSITORY, Server

LORA, EXACT = "measured", "measured-exact"
_REPEATS = 3
_BAKES = 7
_STEP: dict[str, Any] = {"steps": 1}


@pytest.fixture(scope="module")
def offsets(process: Server, folders: Any) -> None:
    """Both kinds of offset of a pair of the real size."""
    process.ensure(folders(full=True))
    clean(process)
    process.do("extract", reference=REFERENCE, name=LORA, rank=RANK, overwrite=True)
    process.do("offset", reference=REFERENCE, name=EXACT, precision="fp32", overwrite=True)


def test_start_and_idle(process: Server, folders: Any, report: Report) -> None:
    process.ensure(folders(full=False), links=(PROBE, REPOSITORY))
    clean(process)
    spent = process.get("/dpo-probe")
    start = spent["import"][0] + spent["tab"][0] + sum(spent["ui"])
    report.measure("start: loading our script", spent["import"][0], "s")
    report.measure("start: building the tab", spent["tab"][0], "s")
    report.measure("start: the script's controls", sum(spent["ui"]), "s", f"{len(spent['ui'])} times")
    report.measure("start: all of ours", start, "s", "of " + _startup(process))
    hooks = ("process", "after_extra_networks_activate", "process_batch", "process_before_every_sampling")
    before = {name: sum(process.get("/dpo-probe").get(name, [])) for name in hooks}
    times = [_seconds(lambda: draw(process)) for _ in range(5)]
    after = process.get("/dpo-probe")
    cost = sum(sum(after.get(name, [])) - before[name] for name in hooks) / len(times)
    report.measure("switched off: our hooks in one picture", 1000 * cost, "ms", f"of {median(times):.2f} s")
    assert start < 5
    assert cost < 0.05


def _startup(server: Server) -> str:
    line = next(line for line in server.log().splitlines() if "Startup time:" in line)
    return line.partition("Startup time:")[2].strip().partition(" ")[0]


def test_changing_the_strength(full_server: Server, offsets: None, report: Report) -> None:
    """Cells of a grid that differ in strength, beside the host's own: the same LoRA in the prompt, changed by Prompt S/R."""
    tag = f"<lora:{LORA}:{{}}>"
    values = [f"{strength:g}" for strength in (1, 0.9, 0.8, 0.7)]
    ways: dict[str, Callable[[], object]] = {
        "no change": lambda: grid(full_server, ("Seed", ["1", "2", "3", "4"]), **_STEP),
        "host": lambda: grid(
            full_server, ("Prompt S/R", [tag.format(value) for value in values]), prompt=f"{PROMPT} {tag.format(1)}", **_STEP
        ),
        "LoRA": lambda: grid(full_server, ("[DPO] Strength", values), offset=Offset(LORA), **_STEP),
        "offset file": lambda: grid(full_server, ("[DPO] Strength", values), offset=Offset(EXACT), **_STEP),
    }
    for way in ways.values():  # files and caches warm
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, way in ways.items():
            times[name].append(_seconds(way) / len(values))
    cell = {name: median(found) for name, found in times.items()}
    change = {name: max(cell[name] - cell["no change"], 0.0) for name in ("host", "LoRA", "offset file")}
    report.measure("one cell of a grid, 64x64, 1 step", cell["no change"], "s")
    report.measure("a new strength of a LoRA in the prompt (the host's own)", change["host"], "s")
    report.measure("a new strength of the same LoRA as DPO offset", change["LoRA"], "s", _ratio(change["LoRA"], change["host"]))
    report.measure(
        "a new strength of an offset file", change["offset file"], "s", _ratio(change["offset file"], change["host"])
    )


def test_bake_and_undo(full_server: Server, offsets: None, report: Report) -> None:
    """Beside the least that it could take: the offset file read once, and the changed weights written once."""
    file = full_server.data / "models" / "DPO" / f"{EXACT}.safetensors"
    plain = draw(full_server)
    bakes, undos, floors, late = [], [], [], []
    kept = 0
    for _ in range(_BAKES):
        began = time.perf_counter()
        kept = full_server.do("bake", offset=EXACT, strength=1)["bytes_kept"]
        bakes.append(time.perf_counter() - began)
        late.append(_first_picture(full_server))
        undos.append(_seconds(lambda: full_server.do("unbake")))
        floors.append(_floor(file, kept))
    assert (draw(full_server) == plain).all()
    # The least of each: where memory comes from a hypervisor, the first bakes mostly wait for it.
    bake, undo, floor = min(bakes), min(undos), min(floors)
    note = f"{kept / 1e9:.2f} GB of originals kept; all: " + ", ".join(f"{seconds:.1f}" for seconds in bakes)
    report.measure("reading that file and copying these weights once", floor, "s")
    report.measure("bake of an offset file, SD 1.5", bake, "s", f"{_ratio(bake, floor)} that; {note}")
    report.measure("the first picture after a bake, beyond the next", median(late), "s")
    report.measure("undo", undo, "s", f"{_ratio(undo, floor)} that")
    report.measure("memory of the WebUI afterwards", full_server.rss() / 1e9, "GB")


def test_the_tab_on_a_model_of_the_real_size(full_server: Server, offsets: None, report: Report) -> None:
    """Waits of a person: the size curve, also while a job runs, and a saved checkpoint beside a copy of the file."""
    with browser() as chromium:
        tab = Tab(chromium, full_server)
        tab.dpo("Extract")
        for what in ("the spectra are in no cache", "again"):
            report.measure(f"Analyse, SD 1.5: {what}", tab.seconds("dpo_extract_analyse", "dpo_extract_pair_result"), "s")
        tab.wait_for_text("dpo_extract_outlook", "→")
        first, *others = [tab.milliseconds_of_a_move("dpo_extract_rank", rank) for rank in range(35, 41)]
        report.measure("from a slider to the moved point", median(others), "ms", f"the first time {first:.0f} ms")
        job = full_server.post("extract", reference=REFERENCE, name=LORA, rank=RANK, overwrite=True, wait=False)
        moves = [tab.milliseconds_of_a_move("dpo_extract_rank", rank) for rank in range(41, 46)]
        running = full_server.get(f"jobs/{job['id']}")["state"] == "running"
        report.measure("the same beside an extraction", median(moves), "ms", "" if running else "it was over by then")
        while full_server.get(f"jobs/{job['id']}")["state"] in ("waiting", "running"):
            time.sleep(0.5)
        tab.dpo("Bake")
        tab.choose("dpo_bake_offset", f"{EXACT}.safetensors")
        tab.fill("dpo_bake_save_name", "saved")
        tab.page.locator("#dpo_bake_save_overwrite input").first.check()
        saving = tab.seconds("dpo_bake_save_go", "dpo_bake_result")
        assert "saved is saved" in tab.wait_for_text("dpo_bake_result", "saved is saved")
        tab.close()
    folder = full_server.data / "models" / "Stable-diffusion"
    copying = _seconds(lambda: _copy(folder / BASE, folder / "copied.part"))
    for made in ("saved.safetensors", "copied.part"):
        (folder / made).unlink()
    report.measure("Save as checkpoint from the tab, SD 1.5", saving, "s", f"{_ratio(saving, copying)} a copy of the file")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "r+b") as file:
        os.fsync(file.fileno())


def _first_picture(server: Server) -> float:
    """What the next picture takes more than the one after it: some hosts do the work then."""
    first = _seconds(lambda: draw(server, **_STEP))
    return max(0.0, first - _seconds(lambda: draw(server, **_STEP)))


def _floor(file: Path, nbytes: int) -> float:
    weights = np.ones(max(nbytes, 1) // 4, dtype=np.float32)
    target = np.empty_like(weights)
    target[:] = 0  # pages are there
    buffer = bytearray(16 << 20)
    began = time.perf_counter()
    with open(file, "rb", buffering=0) as source:
        while source.readinto(buffer):
            pass
    target[:] = weights
    return time.perf_counter() - began


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.2f} times" if other else ""
