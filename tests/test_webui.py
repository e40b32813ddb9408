"""What AUTOMATIC1111 and the Forge family have in common, over stand-ins of the modules that they bring."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_scripts import Script, Strict

from lib_dpo.errors import Cancelled


class Total:
    """The console's total, as modules/shared_total_tqdm.py keeps it: made at the first step, until it is cleared."""

    def __init__(self) -> None:
        self.done = 0

    def update(self) -> None:
        self.done += 1

    def clear(self) -> None:
        self.done = 0


class State:
    interrupted = skipped = stopping_generation = False
    job_count = -1
    textinfo = ""

    def begin(self, job: str) -> None:
        self.job_count = -1

    def end(self) -> None:
        self.job_count = 0


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    found = Strict("shared", state=State(), total_tqdm=Total(), opts=SimpleNamespace(temp_dir=""))
    tasks = Strict(
        "progress", pending_tasks={}, create_task_id=lambda kind: f"task({kind})", add_task_to_queue=lambda task: None,
        start_task=lambda task: None, finish_task=lambda task: None,
    )  # fmt: skip
    children: dict[str, ModuleType] = {"shared": found, "progress": tasks, "scripts": Strict("scripts", Script=Script)}
    children["call_queue"] = Strict("call_queue", queue_lock=threading.Lock())
    for name in ("paths", "processing", "sd_models", "sd_samplers"):
        children[name] = Strict(name)
    monkeypatch.setitem(sys.modules, "modules", Strict("modules", __path__=[], **children))
    for name, module in children.items():
        monkeypatch.setitem(sys.modules, f"modules.{name}", module)
    monkeypatch.delitem(sys.modules, "lib_dpo.hosts.a1111_family", raising=False)
    yield found
    sys.modules.pop("lib_dpo.hosts.a1111_family", None)  # it holds the stand-ins


def host() -> Any:
    from lib_dpo.hosts.a1111_family import WebUI

    return WebUI("AUTOMATIC1111", "v1.10.1", SimpleNamespace())  # type: ignore[arg-type]


def test_an_interrupted_grid_leaves_no_total_in_the_console(shared: Any):
    def draw() -> None:
        with host().job("Compare") as job:
            job.cells(4)
            for step in range(10):
                shared.total_tqdm.update()
                shared.state.interrupted = step == 5
                job.check()

    with pytest.raises(Cancelled, match="stopped by Interrupt"):
        draw()
    assert shared.total_tqdm.done == 0
    assert not shared.state.interrupted


def test_a_finished_grid_leaves_no_total_either(shared: Any):
    with host().job("Compare") as job:
        job.cells(1)
        shared.total_tqdm.update()
    assert shared.total_tqdm.done == 0
