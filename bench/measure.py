"""How long a piece of work takes, how much memory it needs, and how fast the machine multiplies and reads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch

Result = TypeVar("Result")

_EVERY = 0.01  # seconds between two looks at the memory
_PIECE = 16 << 20  # bytes per read
_PRODUCTS = ((2048, 2048, 2048), (1280, 11520, 1280))  # a square one, and the Gram matrix of a common convolution
_REPEATS = 5
_BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with the one that began it


class Measured(NamedTuple):
    """What one call cost."""

    seconds: float
    peak: int  # bytes above those held before: anonymous memory, or that of the GPU


def measure(work: Callable[[], Result], device: torch.device) -> tuple[Result, Measured]:
    """Run work once; its result, time and memory. On a GPU the clock waits for it at both ends."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.synchronize(device)
        result, seconds = timed(work, device)
        return result, Measured(seconds, torch.cuda.max_memory_allocated(device) - before)
    with PeakMemory() as memory:
        result, seconds = timed(work, device)
    return result, Measured(seconds, memory.bytes)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Run work once; its result and its seconds."""
    begin = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


class PeakMemory:
    """The largest anonymous memory of a process inside a `with`, above a baseline: what it held at the beginning."""

    def __init__(self, pid: int | None = None, *, baseline: int | None = None) -> None:
        self._pid, self._baseline = pid, baseline
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def bytes(self) -> int:
        return max(0, self._peak - (self._baseline or 0))

    def __enter__(self) -> PeakMemory:
        if self._pid is None:
            _return_freed_memory()
        self._peak = anonymous_bytes(self._pid)
        if self._baseline is None:
            self._baseline = self._peak
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, anonymous_bytes(self._pid))

    def _look(self) -> None:
        while not self._stop.wait(_EVERY):
            self._peak = max(self._peak, anonymous_bytes(self._pid))


def anonymous_bytes(pid: int | None = None) -> int:
    """Memory of a process with no file behind it, elsewhere than on Linux all that is resident; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except OSError:
        with contextlib.suppress(psutil.NoSuchProcess):
            return int(psutil.Process(pid).memory_info().rss)
        return 0
    row = next((line for line in status.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    return int(row.split()[1]) * 1024


def _return_freed_memory() -> None:
    """glibc keeps up to 64 MB of freed blocks for later: a call would use those of the call before, and seem to need less."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # other C libraries, other systems
        ctypes.CDLL(None).malloc_trim(0)


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations per second of float32 matrix products, the best of several."""
    best = 0.0
    for rows, inner, columns in _PRODUCTS:
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(rows, inner, generator=generator).to(device)
        right = torch.randn(inner, columns, generator=generator).to(device)
        _, first = timed(lambda a=left, b=right: a @ b, device)  # type: ignore[misc]  # a lambda with defaults
        seconds = [timed(lambda a=left, b=right: a @ b, device)[1] for _ in range(_REPEATS)]  # type: ignore[misc]
        best = max(best, 2.0 * rows * inner * columns / min(first, *seconds))
    return best


def read_seconds(files: Sequence[Path]) -> float:
    """Seconds to read files from beginning to end."""
    buffer = bytearray(_PIECE)
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def copy_seconds(file: Path, folder: Path) -> float:
    """Seconds to copy a file into a folder, until it is on the disk; the copy is deleted."""
    copy = folder / "copy.bin"
    begin = time.perf_counter()
    try:
        with file.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, _PIECE)
            target.flush()
            os.fsync(target.fileno())
        return time.perf_counter() - begin
    finally:
        copy.unlink(missing_ok=True)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other processes that keep a core busy each while the block runs."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
