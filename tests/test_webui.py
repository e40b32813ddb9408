"""What AUTOMATIC1111 and the Forge family have in common, over stand-ins of the modules that they bring."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from test_scripts import Script, Strict

from lib_dpo.errors import Cancelled, HostError
from lib_dpo.hosts.base import Request


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


class Runner:
    """The host's: it prints an exception in a hook and goes on (modules/scripts.py:852-858)."""

    def call(self, name: str, p: Any, **options: Any) -> None:
        for script in self.scripts:
            with suppress(Exception):
                getattr(script, name)(p, **options)


class Live:
    """A live model of which one hook fails, or which leaves something out."""

    def __init__(self, fails: str = "", lost: str = "") -> None:
        self.fails, self.lost, self.called = fails, lost, list[str]()

    def __getattr__(self, name: str) -> Any:
        def hook(*args: Any) -> None:
            self.called.append(name)
            if name == self.fails:
                raise HostError("8 bits")

        return hook

    def left_out(self) -> str:
        return self.lost


def picture(shared: Any, live: Any) -> Any:
    """One picture of a comparison, as the host draws it."""
    modules = sys.modules
    modules["modules.scripts"].ScriptRunner = Runner
    modules["modules.sd_samplers"].samplers = [SimpleNamespace(name="Euler a")]
    shared.sd_model = object()

    def process_images(p: Any) -> Any:
        p.scripts.call("after_extra_networks_activate", p, extra_network_data={})
        for name in ("process_batch", "process_before_every_sampling"):
            if not shared.state.interrupted:
                p.scripts.call(name, p)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))], infotexts=["text"], comments="")

    processing = modules["modules.processing"]
    processing.process_images = process_images
    processing.StableDiffusionProcessingTxt2Img = lambda **names: SimpleNamespace(close=lambda: None, **names)
    from lib_dpo.hosts.a1111_family import WebUI

    return WebUI("AUTOMATIC1111", "v1.10.1", live).generate(Request("a cat"), SimpleNamespace(name="dpo"), 1.0)  # type: ignore[arg-type]


def test_a_picture_that_a_hook_refuses_is_no_picture_without_the_offset(shared: Any):
    for name in ("on_networks", "on_batch", "on_sampling"):
        shared.state.interrupted = False
        live = Live(fails=name)
        with pytest.raises(HostError, match="8 bits"):
            picture(shared, live)
        assert live.called[-1] == name
    shared.state.interrupted = False
    assert picture(shared, Live()).infotext == "text"


def test_a_picture_that_lacks_a_part_of_the_offset_is_not_compared(shared: Any):
    with pytest.raises(HostError, match="dpo: a part is missing"):
        picture(shared, Live(lost="a part is missing"))
