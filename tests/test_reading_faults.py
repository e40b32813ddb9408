"""Inputs that change or cannot be read while they are read, clocks that jump, devices without memory: a sentence, nothing else.

Each work of tests/test_faults.py, and those that only look, in a process of its own: what is cut short under a mapping ends
the process on Linux. `make faults` does each more often, at other tensors.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_faults import DONE, REFUSED, WORKS, RefusedError, _files, _pair, _quietly, _run, folder, inputs  # noqa: F401
from tiny import FAULTS

from lib_dpo.errors import BadFileError, DpoError
from lib_dpo.files import hashes, mapped
from lib_dpo.files.checkpoint import Checkpoint, open_checkpoint
from lib_dpo.files.mapped import MappedFile
from lib_dpo.maths import lowrank

Harm = Callable[[Path], None]
LOOKS: dict[str, Callable[[Path], None]] = {
    "diff": lambda folder: _look("diff", *_pair(folder)),
    "verify": lambda folder: _look("verify", *_pair(folder), "--lora", folder / "in" / "lora.safetensors"),
    "compat": lambda folder: _look("compat", *_pair(folder), "--target", folder / "in" / "target.safetensors"),
    "inspect": lambda folder: _look("inspect", folder / "in" / "lora.safetensors"),
}
ALL = {**WORKS, **LOOKS}
READ_ALL, MAP_ALL = 1 << 60, 0  # for mapped._READ_UP_TO: the tensors here are small, those of models are not
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not say that a page cannot be read")


def _look(*args: object) -> None:
    code = tiny.run(*args)
    if code == REFUSED:
        raise RefusedError
    assert code == DONE


@pytest.fixture
def place(folder: Path) -> Path:  # noqa: F811
    tiny.save(folder / "in" / "target.safetensors", tiny.base(seed=3), torch.float16)
    return folder


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _written_to(path: Path) -> None:
    """Other weights in the same bytes, as a program does that saves over its file."""
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))


def _replaced(path: Path) -> None:
    """A file of the same size with other weights takes its name."""
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    _written_to(other)
    os.replace(other, path)


HARMS: dict[str, Harm] = {"cut short": _cut_short, "written to": _written_to, "replaced": _replaced}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ALL)
def test_an_input_that_changes_while_it_is_read(name: str, harm: str, place: Path) -> None:
    """Refused, or made wholly of what was there; no half of one and half of the other, and no end of the process."""
    work, made = ALL[name], random.Random(f"{name} {harm} {FAULTS}")
    before = _files(place)
    reads = _in_a_child(lambda: _count_reads(work, place))
    expected = _tensors(place)
    for number in range(max(2, FAULTS // len(ALL))):
        _restore(place, before)
        limit = (READ_ALL, MAP_ALL)[number % 2]
        at = made.randrange(reads) if number > 1 else (reads - 1) * number  # the first and the last, then any
        end = _in_a_child(lambda limit=limit, at=at: _harmed(work, place, HARMS[harm], at, limit))
        assert end in (DONE, REFUSED), f"read {at} of {reads}: the process ended with {end}"
        assert end == REFUSED or harm == "replaced", f"read {at} of {reads}"
        found = _tensors(place)
        if end == REFUSED:
            assert not found, "nothing is left"
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items()), "wholly of the old"
        assert not list(place.rglob("*.part"))


def _in_a_child(work: Callable[[], int]) -> int:
    """A number that work finds in a process of its own; minus the signal that ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _quietly(lambda: _told(work, writing))
    os.close(writing)
    with os.fdopen(reading) as told:
        answer = told.read()
    end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return int(answer) if answer else end or -signal.SIGKILL


def _told(work: Callable[[], int], writing: int) -> None:
    os.write(writing, str(work()).encode())


def _at_each_read(told: Callable[[int, Path], None]) -> None:
    """Have every tensor that is read told before, by its number, with its file."""
    numbers = itertools.count()

    def telling(real: Callable[[MappedFile, str], Any]) -> Callable[[MappedFile, str], Any]:
        def read(self: MappedFile, key: str) -> Any:
            told(next(numbers), self.path)
            return real(self, key)

        return read

    MappedFile.read = telling(MappedFile.read)  # type: ignore[method-assign]
    MappedFile.raw = telling(MappedFile.raw)  # type: ignore[method-assign]


def _count_reads(work: Callable[[Path], None], place: Path) -> int:
    seen: list[int] = []
    _at_each_read(lambda number, path: seen.append(number))
    work(place)
    return len(seen)


def _harmed(work: Callable[[Path], None], place: Path, harm: Harm, at: int, limit: int) -> int:
    mapped._READ_UP_TO = limit
    _at_each_read(lambda number, path: harm(path) if number == at else None)
    return _ended(work, place)


def _ended(work: Callable[[Path], None], place: Path) -> int:
    try:
        work(place)
    except (DpoError, RefusedError):
        return REFUSED
    return DONE


def _restore(place: Path, before: dict[str, str]) -> None:
    """What works made is removed, and the inputs are as they were."""
    for path in [path for path in place.rglob("*") if path.is_file()]:
        kept = path.parent.parent / "kept" / path.parent.name / path.name
        ...
