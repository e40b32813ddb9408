"""The environments' own builder: where PyTorch comes from, on faked machines."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fcntl")
from tools import env


class Machine:
    """A Linux without a GPU, whose pip has no index of its own and whose network reaches everything."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices, self.path = folder / "dev", folder / "bin"
        self.config, self.asked = "global.cert='/etc/ssl/certs.crt'\n:env:.find-links='/wheels'", list[str]()
        self.reachable = True
        self.devices.mkdir()
        self.path.mkdir()
        has_gpu = env.has_gpu
        monkeypatch.setenv("PATH", str(self.path))
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(env, "has_gpu", lambda: has_gpu(self.devices))
        monkeypatch.setattr(
            env, "output", lambda *command: self.config if command[1:] == ("-m", "pip", "config", "list") else ""
        )
        monkeypatch.setattr(env, "is_reachable", self.ask)

    def ask(self, url: str) -> bool:
        self.asked.append(url)
        return self.reachable


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_without_a_gpu_the_cpu_build_is_offered(machine: Machine):
    assert env.index_of_cpu_builds("python") == ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    assert machine.asked == ["https://download.pytorch.org/whl/cpu/torch/"]


@pytest.mark.parametrize("trace", ["dev/nvidia0", "dev/nvidiactl", "dev/kfd", "bin/nvidia-smi"])
def test_with_a_gpu_pip_decides(machine: Machine, trace: str, tmp_path: Path):
    (tmp_path / trace).touch(mode=0o755)
    assert (env.index_of_cpu_builds("python"), machine.asked) == ([], [])


@pytest.mark.parametrize(
    "line", ["global.index-url='https://x'", "install.extra-index-url='x'", ":env:.extra-index-url='x'", "global.no-index='1'"]
)
def test_an_index_of_the_users_own_is_kept(machine: Machine, line: str):
    machine.config += f"\n{line}"
    assert (env.index_of_cpu_builds("python"), machine.asked) == ([], [])


def test_elsewhere_pip_decides(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert (env.index_of_cpu_builds("python"), machine.asked) == ([], [])


def test_an_index_out_of_reach_is_not_offered(machine: Machine):
    machine.reachable = False
    assert env.index_of_cpu_builds("python") == []


def test_reaching_nobody_takes_no_time(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # but does not listen
        started = time.monotonic()
        assert not env.is_reachable(f"http://127.0.0.1:{closed.getsockname()[1]}/")
    assert time.monotonic() - started < 10


def test_the_index_is_given_to_pip(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    commands: list[tuple[str, ...]] = []
    place = tmp_path / "envs" / "newest-0"

    def run(*command: str) -> None:
        place.mkdir(exist_ok=True)
        commands.append(command)

    monkeypatch.setattr(env, "run", run)
    env.build(place, base="python3", pins=tmp_path / "pins.txt", title="newest")
    _, install = commands
    assert install[-4:] == ("--extra-index-url", env.CPU_BUILDS, "-r", str(tmp_path / "pins.txt"))
    assert (place / env.MARKER).is_file()
