"""Faults that really happen to everything that writes files: what was there is intact, and what is new is whole.

SIGKILL, half of them at a random time, the others at one of the steps at which files are opened, renamed or removed, where a
moment counts; files that may grow no further, and memory that runs out, by the limits of the system. `make faults` does each
many times; otherwise it happens to each kind of work a few times.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("Windows has neither fork nor SIGKILL", allow_module_level=True)
import resource

import tiny
import torch
from fake_host import FakeHost
from safetensors import safe_open
from test_hub import environment
from test_references import DATA, DPO, FilesHub, needs_library
from tiny import FAULTS

from lib_dpo.errors import DpoError
from lib_dpo.files.references.known import UNET_FILE
from lib_dpo.maths.devices import memory_in_words
from lib_dpo.settings import ExtractSettings, RankPolicy
from lib_dpo.webui.session import Session

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")  # of sys.addaudithook
Work = Callable[[Path], None]


def _extract(folder: Path, *options: object) -> None:
    _run("extract", *_pair(folder), "-o", folder / "out.safetensors", *options)


def _offset(folder: Path) -> None:
    _run("offset", *_pair(folder), "-o", folder / "out.safetensors")


def _bake(folder: Path) -> None:
    target, offset = folder / "in" / "base.safetensors", folder / "in" / "lora.safetensors"
    _run("bake", "--target", target, "--offset", offset, "-o", folder / "out.safetensors")


def _resize(folder: Path) -> None:
    _run("resize", "--lora", folder / "in" / "lora.safetensors", "-o", folder / "out.safetensors", "--rank", 2)


def _save(folder: Path) -> None:
    """Save as checkpoint, as the tab does it."""
    host = FakeHost(folder / "models")
    with memory_in_words("the fake host", "load less"):
        host.live.load(host.checkpoint_dir / "base.safetensors")
    session = Session(host)
    session.jobs.run("save", lambda job: session.save(job, name="out", offset="lora", strength=1.0, overwrite=True))


def _in_the_tab(folder: Path) -> None:
    """Extract, as the tab does it."""
    host = FakeHost(folder / "models")
    session = Session(host)
    settings = ExtractSettings(RankPolicy(2))
    session.jobs.run(
        "extract",
        lambda job: session.extract(
            job, base="base.safetensors", reference="tuned.safetensors", name="out", settings=settings, overwrite=True
        ),
    )


WORKS: dict[str, Work] = {
    "extract": lambda folder: _extract(folder, "--rank", 4),
    "extract exact": lambda folder: _extract(folder, "--form", "exact"),
    "offset": _offset,
    "bake": _bake,
    "resize": _resize,
    "save in the tab": _save,
    "extract in the tab": _in_the_tab,
}


def _pair(folder: Path) -> tuple[object, ...]:
    return "--base", folder / "in" / "base.safetensors", "--tuned", folder / "in" / "tuned.safetensors"


class RefusedError(Exception):
    """A command ended with the exit code of a refusal."""


def _run(*args: object) -> None:
    code = tiny.run(*args, "--overwrite")
    if code == REFUSED:
        raise RefusedError
    assert code == 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    base = tiny.save(folder / "base.safetensors", tiny.base(), torch.float16)
    tuned = tiny.save(folder / "tuned.safetensors", tiny.tuned(rms=1e-2), torch.float16)
    assert tiny.run("extract", "--base", base, "--tuned", tuned, "-o", folder / "lora.safetensors", "--rank", 4) == 0
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """Inputs under `in` for commands, and where a host has them."""
    places = {"base": "Stable-diffusion", "tuned": "DPO", "lora": "Lora"}
    for name, place in places.items():
        for target in (tmp_path / "in", tmp_path / "models" / place):
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{name}.safetensors").write_bytes((inputs / f"{name}.safetensors").read_bytes())
    return tmp_path


def _files(folder: Path) -> dict[str, str]:
    """Every file by its place, with a hash of its bytes."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*")) if file.is_file()
    }  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_a_kill_leaves_everything_whole(name: str, folder: Path) -> None:
    work, made = WORKS[name], random.Random(f"{name} {FAULTS}")
    inputs = _files(folder)
    steps, seconds = _unkilled(work, folder)
    after = _files(folder)
    new = {place for place in after if place not in inputs and "cache" not in place}
    assert new, "the work writes something"
    survived = 0
    for number in range(max(2, FAULTS // len(WORKS))):
        overwritten = number % 4 == 3  # over what the run before left
        if not overwritten:
            _remove(folder, new)
        before = _files(folder)
        if number % 2:
            killed = _killed(work, folder, at_step=made.randrange(1, steps + 1))
        else:
            killed = _killed(work, folder, after=made.uniform(0, 1.1 * seconds))
        survived += not killed
        found = _files(folder)
        for place in inputs:
            assert found[place] == inputs[place], f"{place} was changed"
        for place in new & set(found):
            _check_whole(folder / place, folder, before.get(place), found[place])
        _unkilled(work, folder)
        left = {place for place in _files(folder) if place not in after and "cache" not in place}
        assert not left, "the next run cleans up"
    assert survived <= max(2, FAULTS // len(WORKS)) // 2, "most kills must come while the work goes on"


FETCH = """
import sys
from pathlib import Path
from lib_dpo.files.references.fetch import ask, fetch
from lib_dpo.errors import DpoError
from lib_dpo.files.references.known import known
fetch(ask(known("dpo-sd1.5"), Path(sys.argv[1])), lambda *told: print(*told, flush=True))
"""


@needs_library
def test_a_killed_fetch_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed after so many megabytes, again and again: nothing under the final name before all is there and checked."""
    hub, made = FilesHub(), random.Random(FAULTS)
    hub.repos = {DPO: {UNET_FILE: DATA, "unet/config.json": b"{}"}}
    hub.slow = 0.005
    variables = environment(tmp_path, hub.endpoint)
    try:
        for number in range(max(2, FAULTS // 12)):
            folder = tmp_path / str(number)
            target, kept = folder / "dpo-sd1.5.safetensors", 0
            for _ in range(2):
                kept = max(kept, _fetched_until(made.uniform(0.2, 1), folder, variables))
                assert not target.exists()
            assert _fetched_until(None, folder, variables) == 0
            assert target.read_bytes() == DATA
            assert [each.name for each in folder.iterdir()] == [target.name]
            assert any(hub.ranges[-3:]) == (kept > 0), "what came before was not asked for again"
    finally:
        hub.server.shutdown()
        hub.server.server_close()


def _fetched_until(share: float | None, folder: Path, variables: dict[str, str]) -> int:
    """Fetch, and kill it at a share of the download; the bytes that are kept then."""
    command = [sys.executable, "-c", FETCH, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables, cwd=ROOT) as process:
        assert process.stdout
        for line in process.stdout:
            done, _, _ = line.split(" ", 2)
            if share is not None and int(done) >= share * len(DATA):
                process.kill()
                break
        process.stdout.read()
        assert process.wait() == (0 if share is None else -signal.SIGKILL)
    return sum(each.stat().st_size for each in folder.iterdir() if each.name != "dpo-sd1.5.safetensors")


@pytest.mark.parametrize("name", WORKS)
def test_a_file_that_may_grow_no_further_is_said_and_leaves_nothing(name: str, folder: Path) -> None:
    """As on a full disk, in the middle of a write."""
    work, made = WORKS[name], random.Random(f"{name} {FAULTS}")
    inputs = _files(folder)
    _unkilled(work, folder)
    after = _files(folder)
    new = {place for place in after if place not in inputs and "cache" not in place}
    largest = max((folder / place).stat().st_size for place in new)
    for number in range(max(2, FAULTS // len(WORKS))):
        if number % 2:  # else over what the run before left
            _remove(folder, new)
        before = _files(folder)
        size = made.randrange(largest)
        assert _limited(work, folder, resource.RLIMIT_FSIZE, size) == REFUSED
        found = _files(folder)
        assert {place: found.get(place) for place in before} == before
        assert {place for place in found if place not in before and "cache" not in place} == set()
        _unkilled(work, folder)


@pytest.mark.parametrize("name", WORKS)
def test_memory_that_runs_out_is_said_and_leaves_nothing(name: str, folder: Path) -> None:
    work, made = WORKS[name], random.Random(f"{name} {FAULTS}")
    inputs = _files(folder)
    ends = []
    for number in range(max(3, FAULTS // len(WORKS))):
        before = _files(folder)
        more = made.randrange(12 << 20) if number else 0
        ends.append(_limited(work, folder, resource.RLIMIT_AS, _address_space() + more))
        assert ends[-1] in (DONE, REFUSED)
        found = _files(folder)
        assert {place: found[place] for place in inputs} == inputs
        if ends[-1] == REFUSED:
            assert {place for place in found if place not in before and "cache" not in place} == set()
    assert REFUSED in ends
    _unkilled(work, folder)


DONE, REFUSED = 0, 2


def _address_space() -> int:
    """Bytes that this process has, and a child of it begins with."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _limited(work: Work, folder: Path, which: int, limit: int) -> int:
    """Run it where the system allows so much and no more; whether it was done, or refused with an error of ours."""
    child = os.fork()
    if not child:
        _quietly(lambda: _within(work, folder, which, limit))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _within(work: Work, folder: Path, which: int, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does: an error, and no end of the process
    resource.setrlimit(which, (limit, limit))
    try:
        work(folder)
    except (DpoError, RefusedError):
        os._exit(REFUSED)


def _remove(folder: Path, places: set[str]) -> None:
    for place in places:
        (folder / place).unlink(missing_ok=True)


def _check_whole(file: Path, folder: Path, before: str | None, now: str) -> None:
    """A file under its own name is that from before, or a complete new one."""
    if now == before:
        return
    assert file.stat().st_size > 0
    if file.suffix == ".safetensors":
        with safe_open(str(file), "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  safe_open is no mapping
                assert torch.isfinite(opened.get_tensor(key).float()).all()
    else:
        assert file.read_text(encoding="utf-8").rstrip().endswith("}")


def _unkilled(work: Work, folder: Path) -> tuple[int, float]:
    """Run it in a process of its own to the end; its steps that concern the folder, and its seconds."""
    reading, writing = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        _quietly(lambda: _counted(work, folder, writing))
    os.close(writing)
    with os.fdopen(reading) as told:
        answer = told.read()
    assert os.waitpid(child, 0)[1] == 0, "the work failed"
    return int(answer), time.monotonic() - began


def _counted(work: Work, folder: Path, writing: int) -> None:
    seen = _watch(folder, None)
    work(folder)
    os.write(writing, str(len(seen)).encode())


def _killed(work: Work, folder: Path, *, at_step: int | None = None, after: float | None = None) -> bool:
    """The same, killed; whether it was before the end."""
    child = os.fork()
    if not child:
        if at_step:
            _watch(folder, at_step)
        _quietly(lambda: work(folder))
    timer = threading.Timer(after, os.kill, (child, signal.SIGKILL)) if after is not None else None
    if timer:
        timer.start()
    # the process stays until it is waited for, so that its number is of no other one when the timer comes
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if timer:
        timer.cancel()
        timer.join()
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "the work failed"
    return status != 0


def _quietly(work: Callable[[], None]) -> None:
    """In a child: never back into pytest."""
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        work()
        code = 0
    except BaseException as error:  # noqa: BLE001  the parent asks for the exit code alone
        print(f"{type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
    finally:
        os._exit(code)


def _watch(folder: Path, at_step: int | None) -> list[str]:
    """Note the steps that concern a folder, and die at one of them."""
    seen: list[str] = []
    here = str(folder)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in STEPS and any(isinstance(each, (str, os.PathLike)) and here in os.fspath(each) for each in args):
            seen.append(event)
            if len(seen) == at_step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen
