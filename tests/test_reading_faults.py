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
from test_faults import DONE, REFUSED, WORKS, RefusedError, _pair, _quietly, _run, folder, inputs  # noqa: F401
from tiny import FAULTS

from lib_dpo.errors import BadFileError, DpoError
from lib_dpo.files import hashes, mapped
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.files.mapped import MappedFile

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

Harm = Callable[[Path], None]
LOOKS: dict[str, Callable[[Path], None]] = {
    "diff": lambda place: _look("diff", *_pair(place)),
    "verify": lambda place: _look("verify", *_pair(place), "--lora", place / "in" / "lora.safetensors"),
    "compat": lambda place: _look("compat", *_pair(place), "--target", place / "in" / "target.safetensors"),
    "inspect": lambda place: _look("inspect", place / "in" / "lora.safetensors"),
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


@pytest.mark.parametrize("name", ALL)
def test_an_input_that_changes_while_it_is_read(name: str, place: Path) -> None:
    """Refused, or made wholly of what was there; no half of one and half of the other, and no end of the process."""
    work, made = ALL[name], random.Random(f"{name} {FAULTS}")
    before = _contents(place)
    reads = _in_a_child(lambda: _count_reads(work, place))
    expected = _made(place, before)
    first = reads // 2  # before, a list or a host may look at the file, which is opened anew when it is its turn
    for number, harm in enumerate(list(HARMS) * max(1, FAULTS // (2 * len(ALL)))):
        _restore(place, before)
        limit = (MAP_ALL, READ_ALL)[number % 2]
        at = made.randrange(first, reads) if number > 1 else (first, reads - 1)[number]
        end = _in_a_child(lambda harm=harm, limit=limit, at=at: _harmed(work, place, HARMS[harm], at, limit))
        where = f"{harm} at read {at} of {reads}"
        assert end in (DONE, REFUSED), f"{where}: the process ended with {end}"
        assert end == REFUSED or harm == "replaced", where
        found = _made(place, before)
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


def _contents(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "cache" not in path.parts}


def _restore(place: Path, before: dict[Path, bytes]) -> None:
    """What works made is removed, and the inputs are as they were."""
    for path in _contents(place):
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)


def _made(place: Path, before: dict[Path, bytes]) -> dict[str, torch.Tensor]:
    """The tensors of the files that a work made."""
    files = [path for path in place.rglob("*.safetensors") if path not in before]
    return {f"{path.name} {key}": tensor for path in files for key, tensor in load_file(path).items()}


@linux
@pytest.mark.parametrize("limit", [READ_ALL, MAP_ALL])
def test_a_file_that_is_cut_short_after_the_last_look_at_it(place: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The moment between looking at its size and reading it: an error of reading, since the pages are asked for first."""
    path = place / "in" / "base.safetensors"

    def work() -> int:
        mapped._READ_UP_TO = limit
        with open_checkpoint(path) as checkpoint:
            mapped.OpenFile.check = lambda self: None  # type: ignore[method-assign]
            os.truncate(path, 10_000)
            with pytest.raises(BadFileError):
                checkpoint.read(max(checkpoint.infos, key=lambda key: checkpoint.infos[key].nbytes)).sum()
        return DONE

    assert _in_a_child(work) == DONE


@pytest.mark.parametrize("limit", [READ_ALL, MAP_ALL])
@pytest.mark.parametrize("name", ALL)
def test_a_disk_that_fails_in_the_middle_of_a_file(
    name: str, limit: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A work on small tensors reads them, one on large ones maps them: both are asked of the system, and it says no."""
    before, numbers, said = _contents(place), itertools.count(), ""
    monkeypatch.setattr(mapped, "_READ_UP_TO", limit)

    def failing(real: Callable[..., Any], error: int) -> Callable[..., Any]:
        def fail(*args: Any) -> Any:
            if next(numbers) > 300:  # lists that look at a file leave out what cannot be read
                raise OSError(error, os.strerror(error))
            return real(*args)

        return fail

    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO))
    monkeypatch.setattr(MappedFile, "_prepare", failing(MappedFile._prepare, errno.EFAULT))
    try:
        ALL[name](place)
    except RefusedError:
        said = capsys.readouterr().err
    except DpoError as error:
        said = str(error)
    assert "cannot be read (" in said
    assert "check the disk that it is on" in said
    assert not _made(place, before)


def test_a_hash_is_of_the_file_that_was_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "in" / "base.safetensors"
    with open_checkpoint(path) as checkpoint:
        _replaced(path)
        with pytest.raises(BadFileError, match="was changed while it was being read"):
            checkpoint.sha256()
    with open_checkpoint(path) as checkpoint:
        monkeypatch.setattr(hashes, "_hash", _fail_with(OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(BadFileError, match="check the disk that it is on"):
            checkpoint.sha256()


def _fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


def test_what_only_a_look_showed_is_refused_too(place: Path) -> None:
    """Where nothing is written, the block in which a file is open ends with the same look."""
    path = place / "in" / "base.safetensors"
    checkpoint = open_checkpoint(path)

    def look() -> None:
        with checkpoint:
            checkpoint.read(next(iter(checkpoint.infos)))
            _written_to(path)

    with pytest.raises(BadFileError, match="somebody wrote to it"):
        look()


@pytest.mark.parametrize("hours", [5, -5, 30_000, -30_000])
def test_a_clock_that_jumps_changes_nothing(hours: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back and forth with every look at it: what is made, what is remembered, what is removed, and the time that is left."""
    before, real, looks = _contents(place), time.time, itertools.count()
    WORKS["extract in the tab"](place)
    expected = _made(place, before)
    _restore(place, before)
    held = place / "in" / ".other.safetensors.0123abcd.part"
    held.write_bytes(b"of a program that works")
    monkeypatch.setattr(time, "time", lambda: real() + hours * 3600 * (next(looks) % 2))
    WORKS["extract in the tab"](place)
    found = _made(place, before)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    for name in ("base", "tuned"):
        path = place / "in" / f"{name}.safetensors"
        assert hashes.file_sha256(path) == hashes._hash(path)
    assert held.exists()


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()]
)
def test_a_device_without_memory_is_said_and_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    before = _contents(place)
    for operation in ("svd", "qr", "eigh"):
        monkeypatch.setattr(torch.linalg, operation, _fail_with(error))
    with pytest.raises(RefusedError):
        WORKS["extract"](place)
    assert "out of memory" in capsys.readouterr().err
    assert not _made(place, before)
    assert not list(place.rglob("*.part"))
