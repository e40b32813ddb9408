"""Options and fixtures: one server for all tests, clean before each, its log looked at after each."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from files import BASE, REFERENCE, make_data, remove
from flavours import Flavour, flavour_of
from page import browser
from pictures import request
from playwright.sync_api import Browser
from server import Server, running

LORA, EXACT = "dpo", "dpo-exact"
RANK = 8
_LOADED_S = 60


@dataclass
class Report:
    """What is printed at the end and written for the README."""

    webui: dict[str, Any] = field(default_factory=dict)
    measures: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)  # test -> passed, failed or skipped: why

    def measure(self, what: str, value: float, unit: str, note: str = "") -> None:
        self.measures.append({"what": what, "value": round(value, 6), "unit": unit, "note": note})


_report = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("webui")
    group.addoption("--webui", type=Path, required=False, help="folder of an installed WebUI")
    group.addoption("--webui-python", type=Path, help="the Python that this WebUI runs on")
    group.addoption("--webui-files", type=Path, help="where checkpoints are made and kept; without it they are deleted")
    group.addoption("--webui-sdxl", action="store_true", help="SDXL also where it must be of the real size (45 GB of disk)")
    group.addoption("--webui-report", type=Path, help="write results and measures here, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_report] = Report()
    config.addinivalue_line("markers", "errors_logged: the host prints the error that this test provokes")
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def _option(config: pytest.Config, name: str) -> Path:
    value = config.getoption(name)
    if not value:
        raise pytest.UsageError(f"give {name}: see `make help`")
    path = Path(value).expanduser()
    return path.absolute()  # a Python in a virtual environment is a link that must not be followed


# ---- the server ----


@pytest.fixture(scope="session")
def webui(pytestconfig: pytest.Config) -> Path:
    return _option(pytestconfig, "--webui")


@pytest.fixture(scope="session")
def flavour(webui: Path) -> Flavour:
    return flavour_of(webui)


@pytest.fixture(scope="session")
def folders(pytestconfig: pytest.Config, webui: Path, flavour: Flavour) -> Iterator[Any]:
    """Makes the data folder of a size where it is first needed."""
    kept = pytestconfig.getoption("--webui-files")
    root = Path(kept).absolute() if kept else Path(tempfile.mkdtemp(prefix="dpo-webui-"))
    made: dict[bool, Path] = {}

    def folder(full: bool) -> Path:
        full = full or not flavour.any_width
        if full not in made:
            made[full] = make_data(
                root / ("full" if full else "small"), flavour, webui, _option(pytestconfig, "--webui-python"), full=full
            )
        return made[full]

    try:
        yield folder
    finally:
        if not kept:
            remove(root)


@pytest.fixture(scope="session")
def process(pytestconfig: pytest.Config, webui: Path, flavour: Flavour, folders: Any) -> Iterator[Server]:
    """The server, in whatever state the last test left it; tests take `server`."""
    with running(webui, _option(pytestconfig, "--webui-python"), flavour) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for the pages of a module."""
    with browser() as opened:
        yield opened


@pytest.fixture
def server(process: Server, folders: Any, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with a clean base loaded; afterwards nothing of ours may have been printed as an error."""
    process.ensure(folders(full=False))
    yield from _watched(process, request)


@pytest.fixture
def full_server(process: Server, folders: Any, request: pytest.FixtureRequest) -> Iterator[Server]:
    """The same with checkpoints of the real size."""
    process.ensure(folders(full=True))
    yield from _watched(process, request)


def _watched(server: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    clean(server)
    _describe(server, request.config.stash[_report])
    before = len(server.tracebacks())
    yield server
    new = server.tracebacks()[before:]
    assert not new or request.node.get_closest_marker("errors_logged"), "the log has errors of ours:\n" + "\n\n".join(new)


def clean(server: Server) -> None:
    """The base loaded as its file has it."""
    status = server.get("status")
    if status["model"] is None and server.flavour.loads_late:
        request(server, steps=1)
        status = server.get("status")
    for _ in range(_LOADED_S):
        if status["model"] is not None:
            break
        time.sleep(1)  # a picture meanwhile would load the model beside the load of the start, and both may fail
        status = server.get("status")
    if status["model"] is None or status["model"]["file"] != BASE:
        choose(server, BASE)
    if server.get("status")["baked"]:
        server.post("unbake")


def choose(server: Server, checkpoint: str) -> None:
    """Load a checkpoint, with one picture where the host waits for one."""
    server.post("/sdapi/v1/options", sd_model_checkpoint=checkpoint)
    request(server, steps=1)
    model = server.get("status")["model"]
    assert model, "no checkpoint is loaded after a picture"
    assert model["file"] == checkpoint


@pytest.fixture(scope="session")
def lora(process: Server, folders: Any) -> dict[str, Any]:
    """The LoRA named LORA, extracted from the loaded base by the API; what the job told."""
    process.ensure(folders(full=False))
    clean(process)
    found: dict[str, Any] = process.do("extract", reference=REFERENCE, name=LORA, rank=RANK, overwrite=True)
    return found


@pytest.fixture(scope="session")
def exact(process: Server, folders: Any) -> dict[str, Any]:
    """The offset file named EXACT, written by the API."""
    process.ensure(folders(full=False))
    clean(process)
    precision = "fp32" if process.flavour.any_width else "fp16"  # at the real size: half of the memory for undo
    found: dict[str, Any] = process.do("offset", reference=REFERENCE, name=EXACT, precision=precision, overwrite=True)
    return found


# ---- the report ----


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[_report]


def _describe(server: Server, report: Report) -> None:
    if not report.webui:
        told = server.get("status")["host"]
        report.webui = {
            **told, "date": datetime.date.today().isoformat(), "cores": os.cpu_count(), "machine": platform.machine(),
        }  # fmt: skip


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seen.append(report)


_seen: list[pytest.TestReport] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[_report]
    for seen in _seen:
        name = seen.nodeid.partition("::")[0].rpartition("/")[2] + "::" + seen.nodeid.partition("::")[2]
        if seen.skipped:
            found.outcomes[name] = f"skipped: {str(seen.longrepr[2]).removeprefix('Skipped: ')}"  # type: ignore[index]
        elif seen.failed:
            found.outcomes[name] = f"failed: {seen.when}"
        elif seen.when == "call":
            found.outcomes.setdefault(name, "passed")
    if found.measures:
        terminalreporter.section(f"measures: {found.webui.get('name')} {found.webui.get('version')}")
        for row in found.measures:
            terminalreporter.write_line(f"{row['what']:<58} {row['value']:>10.4g} {row['unit']:<6} {row['note']}")
    target = config.getoption("--webui-report")
    if target:
        python = {"tests": sys.version.split()[0]}
        everything = {"webui": found.webui, "python": python, "measures": found.measures, "outcomes": found.outcomes}
        Path(target).write_text(json.dumps(everything, indent=1) + "\n")
