"""One command as several processes: the same pictures as from one, and an error where one of them ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lib_dpo
from lib_dpo.maths.processes import ALONE, Processes, launched
from lib_dpo.toy import bundled, series
from lib_dpo.toy.bundled import BASE, BATCH, FOLDER, REFERENCE
from lib_dpo.toy.series import _share

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
ROOT = Path(__file__).resolve().parents[1]
LONGEST = 600  # seconds, on a machine that is busy with something else

# The command line with pictures that need no model, and a process 1 that goes wrong at its second one.
FAULTY = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from PIL import Image
from lib_dpo.errors import HostError
from lib_dpo.hosts.base import Picture
from lib_dpo.hosts.standalone import Standalone, StandaloneLive

fault, drawn = sys.argv.pop(1), []

def load(self, path):
    self._path, unet = path, SimpleNamespace(dtype=torch.float32)
    self._weights = SimpleNamespace(pipeline=SimpleNamespace(unet=unet), tensors={})

def generate(self, request, patch, strength):
    drawn.append(request)
    if os.environ["RANK"] == "1" and len(drawn) == 2:
        Path("second").touch()
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "fails":
            raise HostError("the GPU of this process caught fire")
        if fault == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60 if fault == "waits" and len(drawn) > 1 else 0.2)
    return Picture(Image.new("RGB", (64, 64)), "")

StandaloneLive.load, Standalone.generate = load, generate
from lib_dpo.__main__ import console
console()
"""


def command(*words: object, processes: int = 2) -> list[str]:
    """What `accelerate launch` is given to start two processes on a CPU; --multi_gpu is its word for its own launcher."""
    options = (
        "--multi_gpu",
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        0,
    )
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes, *options)
    return [str(word) for word in (*launch, *words)]


def launch(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command(*words), cwd=cwd, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False
    )


@pytest.fixture(scope="module")
def offset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offset") / "offset.safetensors"
    lib_dpo.write_offset(FOLDER / BASE, FOLDER / REFERENCE, path)
    return path


def compare(offset: Path, folder: Path, *options: object) -> list[object]:
    words = ("--prompt", "two red circles", "--prompt", "one blue cross", "--strengths", 1, "--steps", 2, "--device", "cpu")
    return ["compare", "--model", FOLDER / BASE, "--offset", offset, *words, "-o", folder / "grid.png", *options]


# ---- the same as alone ----


@pytest.mark.newest
def test_two_processes_draw_the_grid_of_one(offset: Path, tmp_path: Path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    words = {folder: compare(offset, folder, "--seeds", "1-3", "--each", folder / "each") for folder in (alone, shared)}
    figures = tiny.figures(tmp_path / "alone.json", *words[alone])
    done = launch("-m", "lib_dpo", *words[shared], "--json", tmp_path / "shared.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tiny.snapshot(alone) == tiny.snapshot(shared)
    assert len(figures["pictures"]) == 12
    again = json.loads((tmp_path / "shared.json").read_text(encoding="utf-8"))
    assert again["effects"] == figures["effects"]
    assert done.stdout.count(f"wrote {shared / 'grid.png'}") == 1  # one of them speaks


SMALL = """
from lib_dpo.toy import bundled, series
series.STUDY = series.Amount(pictures=8, strengths=(0.0, 1.0), ranks=(2,))
bundled.BATCH = series.BATCH = 2  # twelve batches, four each: the second four are shared
bundled.generate.__kwdefaults__["steps"] = 2
"""


@pytest.mark.newest
@pytest.mark.slow
def test_two_processes_find_in_a_study_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def words(name: str) -> Sequence[object]:
        return "demo", "--study", "-o", tmp_path / name

    for module, name in ((series, "STUDY"), (series, "BATCH"), (bundled, "BATCH")):
        monkeypatch.setattr(module, name, getattr(module, name))  # has it put back at the end
    monkeypatch.setitem(bundled.generate.__kwdefaults__, "steps", 2)
    exec(SMALL)
    alone = tiny.figures(tmp_path / "alone.json", *words("alone"))
    script = tmp_path / "small.py"
    script.write_text(SMALL + "from lib_dpo.__main__ import console\nconsole()\n", encoding="utf-8")
    done = launch(script, *words("shared"), "--json", tmp_path / "shared.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    script.unlink()
    shared = json.loads((tmp_path / "shared.json").read_text(encoding="utf-8"))
    assert _untimed(shared) == _untimed(alone)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in ("alone", "shared")]
    assert files[0] == files[1]
    assert len(files[0]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "alone.json", "shared", "shared.json"]


def _untimed(figures: Any) -> Any:
    """Figures without times, and without the folder."""
    if isinstance(figures, dict):
        return {key: _untimed(value) for key, value in figures.items() if "seconds" not in key}
    if isinstance(figures, list):
        return [_untimed(value) for value in figures]
    return Path(figures).name if isinstance(figures, str) and os.sep in figures else figures


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_shares_are_all_of_it_in_order(count: int):
    each = [Processes(index, count) for index in range(count)]
    assert [item for one in each for item in one.share(range(12))] == list(range(12))
    assert max(len(one.share(range(12))) for one in each) == -(-12 // count)
    drawn = [(n, place) for one in each for n, part in _share(3, 2 * BATCH + 5, one) for place in range(part.start, part.stop)]
    assert drawn == [(n, place) for n in range(3) for place in range(2 * BATCH + 5)]
    assert all(part.start % BATCH == 0 for one in each for _, part in _share(3, 2 * BATCH + 5, one))


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    third = Processes(5, 6, local=2)
    assert [Processes(n, 6, local=n).device("auto") for n in (0, 1)] == ["cuda:0", "cuda:1"]
    assert [third.device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    assert ALONE.device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert third.device("auto") == "auto"


# ---- when something goes wrong ----


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY, encoding="utf-8")
    return script


SENTENCES = {
    "dies": "error: a process of this command died",
    "fails": "error: process 1 of 2, counted from 0, failed; nothing was written: the GPU of this process caught fire",
    "interrupted": "cancelled",
}


@pytest.mark.newest
@pytest.mark.parametrize("fault", SENTENCES)
def test_one_that_ends_ends_all_and_nothing_is_written(fault: str, faulty: Path, offset: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = launch(faulty, fault, *compare(offset, out, "--seeds", "1-8", "--each", out / "each"), cwd=tmp_path)
    assert (tmp_path / "second").exists(), done.stderr
    assert done.returncode != 0
    assert any(line.startswith(SENTENCES[fault]) for line in done.stderr.splitlines()), done.stderr
    assert str(ROOT / "lib_dpo") not in done.stderr, done.stderr  # no traceback of ours
    assert not out.exists()


@pytest.mark.newest
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_stops_all(number: signal.Signals, faulty: Path, offset: Path, tmp_path: Path):
    out = tmp_path / "out"
    words = command(faulty, "waits", *compare(offset, out, "--seeds", "1-8"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            _wait_for(tmp_path / "second")
            launcher.send_signal(number)
            _, told = launcher.communicate(timeout=LONGEST)
        finally:
            launcher.terminate()
    assert launcher.returncode != 0
    assert told.count("cancelled") == 2, told  # both write to one pipe: their lines may run together
    assert not out.exists()


def _wait_for(path: Path) -> None:
    until = time.monotonic() + LONGEST
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.1)


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **meeting}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_two")
def test_work_for_one_is_refused(capsys: pytest.CaptureFixture[str]):
    assert tiny.run("inspect", FOLDER / BASE) == 2
    assert "2 processes were launched, and inspect is work for one" in capsys.readouterr().err


@pytest.mark.usefixtures("second_of_two")
def test_several_need_accelerate(offset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert tiny.run(*compare(offset, tmp_path)) == 2
    assert "-m pip install accelerate" in capsys.readouterr().err


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("missing", [["MASTER_ADDR"], ["MASTER_ADDR", "MASTER_PORT"]])
def test_several_that_cannot_meet_are_refused(
    missing: list[str], offset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    for name in missing:
        monkeypatch.delenv(name)
    assert tiny.run(*compare(offset, tmp_path)) == 2
    said = capsys.readouterr().err
    assert f"2 processes, but {' and '.join(missing)} is not set" in said
    assert "unset WORLD_SIZE" in said


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}])
def test_one_process_knows_nothing_of_accelerate(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert launched() == 1
    assert tiny.run("inspect", FOLDER / BASE) == 0
