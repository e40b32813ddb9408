"""A .safetensors file that stays open and is read in place, as it was when it was opened or not at all.

Another file under its name changes nothing for who has this one open. A program that writes into it, or cuts it short, is
noticed by size and time of writing. Linux kills a process that touches mapped pages which a file no longer has, or which
its disk cannot read, so all pages of a tensor are asked for first, in a way that fails with an error.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import weakref
from pathlib import Path
from typing import BinaryIO

import torch

from lib_dpo.errors import BadFileError, BadTensorError
from lib_dpo.files.header import brief, parse_header, torch_dtype, unreadable

_READ_UP_TO = 2 << 20  # bytes of a tensor: to read so few takes no longer than to map them, and nothing can happen to them then
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: makes pages present, or says that it cannot; Python has no name for it
_PIECE = 8 << 20
State = tuple[int, int]


def state_of(status: os.stat_result) -> State:
    """By what a file that was written to is known: size in bytes, time of writing in nanoseconds."""
    return status.st_size, status.st_mtime_ns


def changed(path: Path, before: State, now: State) -> BadFileError:
    """The error for a file that is no longer what it was when it was opened."""
    what = f"it has {now[0]} bytes, expected {before[0]}" if now[0] != before[0] else "somebody wrote to it"
    return BadFileError(f"{path}: was changed while it was being read ({what}); start again when it is complete")


class OpenFile:
    """Holds a file open, and knows what it was then. It is let go with the last reference, since other threads may read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.number = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.number)
        self.state = state_of(os.fstat(self.number))

    def check(self) -> None:
        """Raises BadFileError where somebody wrote to it."""
        try:
            now = state_of(os.fstat(self.number))
        except OSError as error:
            raise unreadable(self.path, error) from error
        if now != self.state:
            raise changed(self.path, self.state, now)

    def read(self, begin: int, end: int) -> bytearray:
        """Bytes of the file, in memory of their own. Raises BadFileError where it has them no more."""
        data = bytearray(end - begin)
        view, done = memoryview(data), 0
        while done < len(data):
            count = os.preadv(self.number, [view[done:]], begin + done)
            if not count:
                self.check()
                raise BadFileError(f"{self.path}: ends at byte {begin + done}, expected {end}; download it again")
            done += count
        return data


class MappedFile:
    """A .safetensors file, mapped privately: its pages are the file's own as long as nobody writes to them."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.opened = OpenFile(path, file)
                header = parse_header(path, file)
                # Never closed by hand: torch.frombuffer does not lock it, and tensors would point to nowhere.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise unreadable(path, error) from error
        self.path, self.infos, self.metadata = path, header.infos, header.metadata
        self._spans = header.spans

    def read(self, key: str) -> torch.Tensor:
        """One tensor; see `Checkpoint.read`."""
        info, begin = self.infos[key], self._spans[key][0]
        dtype = torch_dtype(info.dtype)
        if dtype is None:
            raise BadTensorError(
                f"{self.path}: {brief(key)} is {info.dtype}, which torch {torch.__version__} cannot compute with; "
                "use a newer torch, or a file in F16, BF16 or F32"
            )
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        data = self._data(key)
        if isinstance(data, memoryview) and begin % dtype.itemsize:  # the format allows it, not every processor does
            data = bytearray(data)
        return torch.frombuffer(data, dtype=dtype).reshape(info.shape)

    def raw(self, key: str) -> memoryview:
        """The bytes of one tensor as stored."""
        return memoryview(self._data(key)).toreadonly()

    def _data(self, key: str) -> memoryview | bytearray:
        begin, end = self._spans[key]
        self.opened.check()
        try:
            if end - begin <= _READ_UP_TO and hasattr(os, "preadv"):
                return self.opened.read(begin, end)
            self._prepare(begin, end)
        except OSError as error:
            self.opened.check()
            raise unreadable(self.path, error) from error
        return memoryview(self._map)[begin:end]

    def _prepare(self, begin: int, end: int) -> None:
        """Have all of it read in one go, which is 1.5 times as fast from a cold disk. Raises OSError where it cannot be."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        page = begin - begin % mmap.PAGESIZE
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_WILLNEED, page, end - page)
        if not sys.platform.startswith("linux"):
            return
        try:
            for piece in range(page, end, _PIECE):  # no other Python code runs during a call
                self._map.madvise(_POPULATE_READ, piece, min(_PIECE, end - piece))
        except OSError as error:
            if error.errno != errno.EINVAL:  # an older Linux
                raise
