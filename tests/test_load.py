"""Fifty clients at once on a server that works: each answer is right, each job is done or refused, nothing grows.

`make soak` does it for ten minutes, `make test` for some seconds.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fakes_standalone import tokenizer

pytestmark = pytest.mark.newest
httpx, psutil = pytest.importorskip("httpx"), pytest.importorskip("psutil")
pytest.importorskip("uvicorn")

SECONDS = float(os.environ.get("DPO_LOAD", "8"))
CLIENTS, WORKERS = 50, 8  # of whom the latter start jobs
GROWTH, POOL = 64 << 20, 40  # bytes after the first third; threads in which starlette runs handlers
PAUSE_S = 2  # at most, between two questions of a client: without it fifty clients are as many as the machine can answer
ANSWER_S = 600  # a deadlock, and no machine that is busy: forty threads that look leave a job a fortieth of the time
BUSY = "is running or waiting already"
STATES = {"waiting", "running", "done", "failed", "cancelled"}
JOBS: dict[str, dict[str, Any]] = {
    "bake": {"offset": "dpo", "strength": 0.5},
    "unbake": {},
    "extract": {"base": "base", "reference": "tuned", "rank": 4, "overwrite": True},
    "analyse": {"base": "base", "reference": "tuned"},
}


@dataclass
class Seen:
    """What all clients together saw."""

    answers: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)
    busy: int = 0  # times at which a reader saw a job at work
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, seconds: float) -> None:
        with self.lock:
            self.answers[what] += 1
            self.slowest = max(self.slowest, seconds)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = tiny.save(folder / "Stable-diffusion" / "base.safetensors", tiny.base(), torch.float16)
    tuned = tiny.save(folder / "DPO" / "tuned.safetensors", tiny.only_unet(tiny.tuned(rms=1e-3)))
    pair = ("--base", base, "--tuned", tuned)
    assert tiny.run("extract", *pair, "-o", folder / "Lora" / "dpo.safetensors", "--rank", 8) == 0
    tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """The process and its address."""
    command = [sys.executable, str(Path(__file__).with_name("serve_api.py")), str(models)]
    with open(tmp_path / "server.log", "wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout
        address = process.stdout.readline().removeprefix("serving ").strip()
        assert address, (tmp_path / "server.log").read_text()
        yield psutil.Process(process.pid), address
    finally:
        process.terminate()
        process.wait()
        if process.stdout:
            process.stdout.close()
    assert "Traceback" not in (tmp_path / "server.log").read_text()


def test_fifty_clients_while_jobs_hold_the_lock(server: tuple[Any, str], capsys: pytest.CaptureFixture[str]) -> None:
    process, address = server
    with _client(address) as client:
        truth = {"inspect": _get(client, "inspect", name="dpo"), "fingerprint": _fingerprint(client)}
    seen, end = Seen(), time.monotonic() + SECONDS
    acts: list[Callable[[Any, random.Random, Seen], None]] = [_work] * WORKERS
    acts += [lambda client, made, seen: _read(client, made, seen, truth)] * (CLIENTS - WORKERS)
    threads = [threading.Thread(target=_live, args=(address, n, act, seen, end)) for n, act in enumerate(acts)]
    for thread in threads:
        thread.start()
    held = _held(process, end)
    for thread in threads:
        thread.join(2 * ANSWER_S)
    assert not any(thread.is_alive() for thread in threads), "a client waits for ever"
    assert not seen.wrong, seen.wrong[:5]
    with _client(address) as client:
        assert all(job["state"] == "done" for job in _get(client, "jobs")), "none is left waiting"
        _post(client, "unbake", {})
        assert _fingerprint(client) == truth["fingerprint"]
    growth = max(held[-len(held) // 3 :]) - max(held[: len(held) // 3])
    with capsys.disabled():
        print(f"\n{SECONDS:g} s, {CLIENTS} clients: {dict(seen.answers)}, slowest answer {seen.slowest:.1f} s, ", end="")
        print(f"{seen.busy} looks at a job at work; {held[0] >> 20} MiB to {held[-1] >> 20}, growth {growth / 2**20:.1f}")
    assert seen.busy, "a job held the lock while others looked"
    assert {"bake", "unbake", "extract", "analyse", "status", "inspect", "jobs", "refused"} <= seen.answers.keys()
    assert growth < GROWTH
    assert _settled_threads(process) <= POOL + 20


def _client(address: str) -> Any:
    return httpx.Client(base_url=f"{address}/dpo/v1/", timeout=ANSWER_S, trust_env=False)


def _live(address: str, number: int, act: Callable[..., None], seen: Seen, end: float) -> None:
    """One client, until the end."""
    made = random.Random(number)
    try:
        with _client(address) as client:
            while time.monotonic() < end and not seen.wrong:
                act(client, made, seen)
                time.sleep(made.uniform(0, PAUSE_S))
    except Exception as error:  # noqa: BLE001  told by the test
        seen.wrong.append(f"client {number}: {type(error).__name__}: {error}")


def _held(process: Any, end: float) -> list[int]:
    """Bytes of main memory, twice a second."""
    held = [process.memory_info().rss]
    while time.monotonic() < end:
        time.sleep(0.5)
        held.append(process.memory_info().rss)
    return held


def _settled_threads(process: Any) -> int:
    """Threads once nothing is asked any more."""
    time.sleep(1)
    return int(process.num_threads())


# ---- what clients do ----


def _get(client: Any, path: str, **params: Any) -> Any:
    answer = client.get(path, params=params)
    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:300]}"
    return answer.json()


def _post(client: Any, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:300]}"
    return answer.json()


def _fingerprint(client: Any) -> Any:
    return _get(client, "status", fingerprint=True)["fingerprint"]


def _read(client: Any, made: random.Random, seen: Seen, truth: dict[str, Any]) -> None:
    """Ask for what is there, and hold it against what must be."""
    what, began = made.choices(("status", "jobs", "inspect"), (4, 4, 1))[0], time.monotonic()
    found = _get(client, what, **({"name": "dpo"} if what == "inspect" else {}))
    seen.note(what, time.monotonic() - began)
    if what == "inspect":
        assert found == truth["inspect"]
        return
    if what == "status":
        assert found["model"]["file"] == "base.safetensors"
        assert found["baked"] is None or (found["baked"]["offset"], found["baked"]["strength"]) == ("dpo", 0.5)
        found = found["jobs"]
        assert all(job["state"] in ("waiting", "running", "done") for job in found), "done: since the list was made"
    assert all(job["state"] in STATES and 0 <= job["progress"] <= 1 and not job["error"] for job in found), found
    running = [job["title"] for job in found if job["state"] == "running"]
    seen.busy += bool(running)


def _work(client: Any, made: random.Random, seen: Seen) -> None:
    """Start a job, and see it done; or hear that the same one is at work."""
    what, wait, began = made.choice(list(JOBS)), made.random() < 0.3, time.monotonic()
    names = {"name": f"load-{made.randrange(4)}"} if what == "extract" else {}
    answer = client.post(what, json=JOBS[what] | names | {"wait": wait})
    if answer.status_code == 409:
        assert BUSY in answer.json()["detail"], answer.text
        seen.note("refused", time.monotonic() - began)
        return
    assert answer.status_code == 200, f"{what}: {answer.status_code} {answer.text[:300]}"
    job = answer.json()
    while job["state"] in ("waiting", "running"):
        time.sleep(0.05)
        job = _get(client, f"jobs/{job['id']}")
        assert time.monotonic() - began < ANSWER_S, f"{what} is never done: {job}"
    assert job["state"] == "done", job
    seen.note(what, 0)
