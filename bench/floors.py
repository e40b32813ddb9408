"""What each command cannot do without: its bytes at the machine's bandwidth, its operations at the machine's rates."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.measure import copy_seconds, matmul_rate, read_seconds
from lib_dpo.maths.lowrank import operations
from lib_dpo.offsets.layers import Layer

_HASHED = 64 << 20  # bytes to measure the rate with


@dataclass(frozen=True)
class Rates:
    """Of one machine, each the best of several."""

    start: float  # seconds until a process has the engine imported
    reading: float  # bytes per second
    writing: float  # bytes per second, until they are on the disk
    hashing: float  # SHA-256, bytes per second on one core
    multiplying: float  # float32 operations per second on all cores
    cores: int


@dataclass(frozen=True)
class Needs:
    """Of one command: what no way of doing it can leave out."""

    read: int  # bytes, each once
    written: int = 0  # bytes
    hashed: tuple[int, ...] = ()  # bytes of each file whose SHA-256 goes into the result
    operations: float = 0.0  # of matrix products and eigenvalues

    def bandwidth(self, rates: Rates) -> float:
        """Seconds for its bytes."""
        return self.read / rates.reading + self.written / rates.writing

    def arithmetic(self, rates: Rates) -> float:
        """Seconds for its operations; a file is hashed on one core, several files side by side."""
        hashing = max([sum(self.hashed) / rates.cores, *self.hashed]) / rates.hashing
        return hashing + self.operations / rates.multiplying

    def floor(self, rates: Rates) -> float:
        """Seconds of a process that starts, moves its bytes and then does its operations."""
        return rates.start + self.bandwidth(rates) + self.arithmetic(rates)


def measure_rates(files: Sequence[Path], start: float, folder: Path, device: torch.device) -> Rates:
    """Of the machine as it is now, with files of the benchmark. `start`: seconds, measured before."""
    total = sum(path.stat().st_size for path in files)
    reading = total / min(read_seconds(files), read_seconds(files))
    copied = min(files, key=lambda path: path.stat().st_size)
    size = copied.stat().st_size
    copying = min(copy_seconds(copied, folder), copy_seconds(copied, folder))
    writing = size / max(copying - size / reading, 1e-9)
    return Rates(start, reading, writing, _hash_rate(), matmul_rate(device), torch.get_num_threads())


def _hash_rate() -> float:
    data = bytes(_HASHED)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        hashlib.sha256(data)
        seconds.append(time.perf_counter() - begin)
    return _HASHED / min(seconds)


def of_extraction(layers: Sequence[Layer], rank: int) -> float:
    """Operations of the factorisations and of the products that energy kept is measured with."""
    factorised = sum(operations(short, long, min(rank, short), "auto") for short, long in map(_sides, layers))
    return factorised + of_products(layers, rank)


def of_spectra(layers: Sequence[Layer]) -> float:
    """Of all singular values: the Gram matrix of the short side, and its eigenvalues by tridiagonal form (4/3 n^3)."""
    return sum(2.0 * short * short * long + 4 / 3 * short**3 for short, long in map(_sides, layers))


def of_products(layers: Sequence[Layer], rank: int) -> float:
    """Of `up @ down` of each layer."""
    return sum(2.0 * short * long * min(rank, short) for short, long in map(_sides, layers))


def of_recompression(layers: Sequence[Layer], rank: int) -> float:
    """Of the thin SVD of each `up @ down` from its factors: QR of both with Q formed, and Q times the core's vectors."""
    return sum(6.0 * (short + long) * min(rank, short) ** 2 for short, long in map(_sides, layers))


def _sides(layer: Layer) -> tuple[int, int]:
    short, long = sorted(layer.matrix)
    return short, long
