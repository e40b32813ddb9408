"""The whole command, `extract` with its defaults, beside what it cannot do without: reading and multiplying."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.floors import of_extraction
from bench.measure import PeakMemory, matmul_rate, read_seconds, timed
from lib_dpo.errors import DpoError
from lib_dpo.files.checkpoint import Checkpoint
from lib_dpo.offsets.layers import Layer
from lib_dpo.offsets.offset import Pair

_ROOT = Path(__file__).resolve().parents[1]
_START = """
import torch, lib_dpo.operations.extract
from bench.measure import anonymous_bytes
if {cuda}: torch.zeros(1, device="cuda")
print(anonymous_bytes())
"""
_SETTLED = 2.5  # seconds after which a file's hash is remembered


@dataclass(frozen=True)
class CommandFigures:
    """One run of the command and the parts of its lower bound."""

    wall: float  # seconds, process start included, hashing left out
    start: float  # seconds to start a process and import the engine
    read: float  # seconds to read both files once
    to_device: float | None  # seconds to bring both files to the GPU
    operations: float
    rate: float  # operations per second
    peak: int  # bytes of anonymous memory over a process that has only imported the engine
    file_bytes: int
    energy_kept: float

    @property
    def bound(self) -> float:
        """Seconds to read both files and to do the operations at the machine's rate."""
        return self.read + self.operations / self.rate

    @property
    def ratio(self) -> float:
        return self.wall / self.bound

    @property
    def device_ratio(self) -> float | None:
        """Without process start, to the time to bring both files to the GPU."""
        return (self.wall - self.start) / self.to_device if self.to_device else None


def measure_command(pair: Pair, layers: Sequence[Layer], rank: int, device: torch.device, folder: Path) -> CommandFigures:
    """Run `python -m lib_dpo extract` on a pair, in the same state of the page cache as the reading beside it."""
    checkpoints = (pair.base.checkpoint, pair.tuned.checkpoint)
    files = [file for checkpoint in checkpoints for file in checkpoint.files]
    for checkpoint in checkpoints:
        time.sleep(max(0.0, _SETTLED - (time.time() - os.path.getmtime(checkpoint.files[0]))))
        checkpoint.sha256()
    process_start(device)  # the first one reads torch from the disk
    start, baseline = process_start(device)
    rates, reads = [matmul_rate(device)], [read_seconds(files)]
    to_device = [_to_device(checkpoints, device)] if device.type == "cuda" else []
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as output:
        wall, peak = _extract(pair, rank, device, Path(output), baseline)
        report = json.loads((Path(output) / "report.json").read_text())
    if to_device:
        to_device.append(_to_device(checkpoints, device))
    reads.append(read_seconds(files))
    rates.append(matmul_rate(device))
    return CommandFigures(
        wall=wall,
        start=start,
        read=statistics.mean(reads),
        to_device=statistics.mean(to_device) if to_device else None,
        operations=of_extraction(layers, rank),
        rate=max(rates),
        peak=peak,
        file_bytes=report["file_bytes"],
        energy_kept=report["energy_kept"],
    )


def process_start(device: torch.device) -> tuple[float, int]:
    """Seconds until a process has the engine imported and the device ready, and the anonymous memory that it holds then."""
    begin = time.perf_counter()
    code = _START.format(cuda=device.type == "cuda")
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True, capture_output=True, text=True)
    return time.perf_counter() - begin, int(done.stdout)


def _extract(pair: Pair, rank: int, device: torch.device, folder: Path, baseline: int) -> tuple[float, int]:
    paths = [str(path.resolve()) for path in (pair.base.path, pair.tuned.path, folder / "lora.safetensors")]
    arguments = ["--base", paths[0], "--tuned", paths[1], "-o", paths[2], "--rank", str(rank), "--device", str(device)]
    return run_command(["extract", *arguments, "--json", str(folder.resolve() / "report.json")], baseline)


def run_command(arguments: Sequence[str], baseline: int, cache: Path | None = None) -> tuple[float, int]:
    """Run `python -m lib_dpo` with these arguments. Returns its seconds and its peak of anonymous memory above `baseline`.

    Args:
        cache: a folder for what it remembers, such as hashes of files; that of the user if none is given.

    Raises:
        DpoError: it failed; with its own words.
    """
    command = [sys.executable, "-m", "lib_dpo", *arguments]
    begin = time.perf_counter()
    places = {"XDG_CACHE_HOME": str(cache), "LOCALAPPDATA": str(cache)} if cache else {}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=_ROOT, env=os.environ | places, **pipes) as process:
        try:
            with PeakMemory(process.pid, baseline=baseline) as memory:
                _, said = process.communicate()
        except BaseException:
            process.kill()
            raise
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise DpoError(f"`{' '.join(command)}` ended with {process.returncode}: {said.strip()}")
    return seconds, memory.bytes


def _to_device(checkpoints: Sequence[Checkpoint], device: torch.device) -> float:
    """Seconds to bring all tensors of both files to the device, one at a time."""

    def bring() -> None:
        for checkpoint in checkpoints:
            for key in checkpoint.infos:
                checkpoint.read(key).to(device)

    return timed(bring, device)[1]
