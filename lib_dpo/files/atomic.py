"""Files that appear whole or not at all: refused early where they could not be written, and renamed into place at the end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lib_dpo.errors import OutputError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_ABANDONED_S = 24 * 3600


def check_output(path: str | Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse early an output that could not be written in the end, or that is one of the inputs.

    The inputs (`Checkpoint.files`) are refused even with `overwrite`: they are being read while the output is written.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, expected the name of a file; add a file name")
    for source in inputs:
        if _same_file(path, source):
            raise OutputError(f"{path}: is one of the inputs, expected another name; choose one")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name, or allow it to be replaced")
    folder = next((parent for parent in Path(os.path.abspath(path)).parents if parent.exists()), None)
    if folder is None or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot be created, {folder} is no folder that may be written to; choose another one")


_OTHER_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensor", ".sft")


def check_safetensors_output(path: str | Path, *, overwrite: bool) -> None:
    """The same for the file of a `SafetensorsWriter`, by its name alone: before inputs are opened or downloaded."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors" and not path.is_dir():
        stem = path.with_suffix("") if path.suffix.lower() in _OTHER_SUFFIXES else path
        raise OutputError(f"{path}: expected a name that ends in .safetensors; write {stem}.safetensors")
    if encodable(str(path)) != str(path):
        raise OutputError(f"{path}: has a name that is not UTF-8, which the library cannot open; choose another")
    check_output(path, overwrite=overwrite)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a small text file in UTF-8, all or nothing. A file of that name is replaced, missing folders are made."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """The same for bytes, such as a picture."""
    path = Path(path)
    check_output(path, overwrite=True)
    output = AtomicFile(path, overwrite=True, needed=len(data))
    try:
        with output.writing() as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        output.publish()
    finally:
        output.discard()


class AtomicFile:
    """A file under a temporary name beside its own, until `publish` or `discard`."""

    file: BinaryIO
    part: Path  # the temporary name

    def __init__(self, path: Path, *, overwrite: bool, needed: int) -> None:
        self.path = path
        self._overwrite = overwrite
        self._made: list[Path] = []
        try:
            with explained(path):
                self._made = _make_folders(path.parent)
                _remove_abandoned(path)
                free = shutil.disk_usage(path.parent).free
                if free < needed:
                    raise OutputError(f"{path}: needs {megabytes(needed)}, {megabytes(free)} are free; free some space")
                self.file, self.part = _create(path)
        except BaseException:
            self.discard()
            raise

    @contextlib.contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """The open file. After an error it cannot be written to any more, since nobody knows what reached it."""
        try:
            with explained(self.path):
                yield self.file
        except BaseException:
            self.discard()
            raise

    def publish(self) -> None:
        """Give the file, which is on the disk by now, its own name."""
        with explained(self.path):
            self.file.flush()
            if sys.platform == "win32":  # where no open file is renamed; elsewhere the lock is held until the file has its name
                self.file.close()
            if self._overwrite:
                os.replace(self.part, self.path)
            else:
                rename_to_new(self.part, self.path)
            self.file.close()
        self._made = []
        with contextlib.suppress(OSError):  # Windows and some network drives do not sync folders
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Leave nothing behind; after `publish` there is nothing left to do."""
        with contextlib.suppress(OSError, AttributeError):  # a full disk refuses the rest of the buffer; never opened
            self.file.close()
        with contextlib.suppress(OSError, AttributeError):
            self.part.unlink()
        for folder in self._made:
            with contextlib.suppress(OSError):  # somebody else put something into it
                folder.rmdir()
        self._made = []


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says while an output is written into an OutputError."""
    try:
        yield
    except FileExistsError as error:
        raise OutputError(f"{path}: exists already; choose another name, or allow it to be replaced") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path}: the disk is full ({error.strerror}); free some space") from error
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); check the disk") from error


def rename_to_new(part: Path, path: Path) -> None:
    """Rename, but never over another file. Raises FileExistsError."""
    if os.name == "nt":
        os.rename(part, path)
        return
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as exFAT: a moment between check and rename remains
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from None
        os.replace(part, path)
    else:
        part.unlink()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that were missing, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _create(path: Path) -> tuple[BinaryIO, Path]:
    """A new file beside an output, locked as long as it is open, so that others can tell it from one left behind."""
    while True:
        part = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.part")
        file = open(part, "x+b")  # noqa: SIM115  closed by publish and discard
        if _lock(file) is not False and part.exists():
            return file, part
        file.close()  # somebody took it for left behind, in the moment before it was locked


def _lock(file: BinaryIO) -> bool | None:
    """Whether the file is ours alone now; None where nobody can tell. Windows needs no lock: it removes no open file."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of the same output: files that no process holds."""
    ours = re.compile(re.escape(f".{path.name[:50]}.") + r"[0-9a-f]{8}\.part")
    for part in path.parent.iterdir():
        if ours.fullmatch(part.name):
            with contextlib.suppress(OSError):  # gone meanwhile, open on Windows, or somebody else's
                _remove_unless_held(part)


def _remove_unless_held(part: Path) -> None:
    if sys.platform == "win32":  # which refuses where it is open
        part.unlink()
        return
    with open(part, "r+b") as file:  # removed while we hold it: its maker may be about to lock it
        locked = _lock(file)
        if locked or (locked is None and time.time() - part.stat().st_mtime > _ABANDONED_S):  # longer than any work
            part.unlink()
            logger.info("removed %s, left behind by a process that was killed", part)


def _same_file(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return False


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: names of files may have bytes that Python shows as surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else text


def megabytes(count: int) -> str:
    """A size in bytes as people read it; MB are 10^6 bytes."""
    return f"{count / 1e6:,.1f} MB"
