"""Write .safetensors files tensor by tensor, so that no output is ever held whole in memory, and all or nothing.

The safetensors library writes a file from all of its tensors at once. Here room for the header is kept at the start of
a temporary file, the tensors follow one by one, and the header comes last. Only a file that is complete and has been
opened again gets its name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from lib_dpo.errors import BadFileError, OutputError
from lib_dpo.files.checkpoint import tensor_bytes
from lib_dpo.files.header import MAX_HEADER_BYTES, Header, TensorInfo, dtype_name, read_header, tensor_nbytes

logger = logging.getLogger(__name__)

# The first hash that WebUIs knew LoRAs by (Additional Networks, kohya's sshs_legacy_hash): 8 digits of the SHA-256 of
# 64 KiB of the file at 1 MiB, header included, so only the writer can tell it.
LEGACY_HASH = "legacy??"
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000

_ENTRY_BYTES = 256  # room for a tensor in the header: its key (110 in SDXL's longest) and about 90 of punctuation
_WORTH_MOVING = 256  # header room left over is closed where it exceeds 1/256 of the data
_PIECE = 16 << 20
_ABANDONED_S = 24 * 3600
# what every version of the library since 0.4.2 knows; a file with other dtypes is copied, but not opened with it
_OLD_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"}


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
    if _encodable(str(path)) != str(path):
        raise OutputError(f"{path}: has a name that is not UTF-8, which the library cannot open; choose another")
    check_output(path, overwrite=overwrite)


class SafetensorsWriter:
    """Writes one .safetensors file: `with SafetensorsWriter(...) as out`, then `add` each tensor, then `finish`.

    Leaving the block without `finish`, by an error or by Ctrl-C, removes what was written. Missing folders are made.
    Tensors lie in the file in the order of `add`. Readers like a tensor to begin at a multiple of its item size: add
    those with larger items first, or keep the order of the file that is copied.

    Args:
        overwrite: replace a file of that name. Without it such a file is kept, also one that appears meanwhile.
        expected_bytes: what all tensors take together; checked against the free space before anything is written.
        max_tensors, max_metadata_bytes: room kept for the header; a larger header costs one more pass over the data.
        compact: leave no room unused, at the cost of that pass.
    """

    _output: _AtomicFile

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        expected_bytes: int,
        max_tensors: int,
        max_metadata_bytes: int = 1 << 20,
        compact: bool = False,
    ) -> None:
        self.path = Path(path)
        check_safetensors_output(self.path, overwrite=overwrite)
        self._overwrite = overwrite
        self._start = _up_to_8(8 + max_tensors * _ENTRY_BYTES + max_metadata_bytes)
        self._needed = self._start + expected_bytes
        self._infos: dict[str, TensorInfo] = {}
        self._position = 0
        self._compact = compact

    def __enter__(self) -> SafetensorsWriter:
        self._output = _AtomicFile(self.path, overwrite=self._overwrite, needed=self._needed)
        self._output.file.seek(self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._output.discard()

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Write one tensor in its own dtype. Nothing of it is kept."""
        self.add_raw(key, dtype_name(tensor.dtype), tuple(tensor.shape), tensor_bytes(tensor))

    def add_raw(self, key: str, dtype: str, shape: Sequence[int], data: memoryview | bytes) -> None:
        """Write one tensor from its bytes in another file, whatever its dtype (a safetensors name)."""
        nbytes = tensor_nbytes(dtype, shape)
        if memoryview(data).nbytes != nbytes:
            raise ValueError(f"{key}: {memoryview(data).nbytes} bytes, expected {nbytes} for {dtype} {list(shape)}")
        if key in self._infos or key == "__metadata__":
            raise ValueError(f"{key}: has been added already, or is no key that the format allows")
        with self._output.writing() as file:
            file.write(data)
        self._infos[key] = TensorInfo(dtype, tuple(shape), nbytes)
        self._position += nbytes

    def finish(self, metadata: Mapping[str, str], *, check: Callable[[Path], None] | None = None) -> None:
        """Write the header, check the file by opening it again, and give it its name.

        A metadata entry whose value is `LEGACY_HASH` gets the old hash of the finished file (see there).

        Args:
            check: called with the complete file before it gets its name; an error raised in it discards the file.
        """
        metadata = {key: _encodable(value) for key, value in metadata.items()}
        header = self._header(metadata)
        room = self._start - 8
        needs_legacy_hash = LEGACY_HASH in metadata.values()
        with self._output.writing() as file:
            wasteful = (room - len(header)) * _WORTH_MOVING > self._position
            if len(header) > room or wasteful or self._compact or (needs_legacy_hash and self._start > _LEGACY_START):
                _move(file, self._start, 8 + len(header), self._position)
                room = len(header)
            file.truncate(8 + room + self._position)
            if needs_legacy_hash:
                digest = _legacy_hash(file, 8 + room)
                metadata = {key: digest if text == LEGACY_HASH else text for key, text in metadata.items()}
                header = self._header(metadata)  # as long as before
            file.seek(0)
            file.write(room.to_bytes(8, "little") + header.ljust(room))
            file.flush()
            os.fsync(file.fileno())
        self._check(8 + room, metadata)
        if check:
            check(self._output.part)
        self._output.publish()

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"metadata {key!r}: {type(value).__name__}, expected str for key and value")
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        for key, info in self._infos.items():
            offsets = (position, position + info.nbytes)
            entries[key] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
            position += info.nbytes
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        header = header.ljust(_up_to_8(len(header)))
        if len(header) > MAX_HEADER_BYTES:
            raise OutputError(
                f"{self.path}: its keys and metadata take {_mb(len(header))}, the format allows "
                f"{_mb(MAX_HEADER_BYTES)}; write less metadata"
            )
        return header

    def _check(self, start: int, metadata: Mapping[str, str]) -> None:
        """Read back what was written, with our own reader and with the library."""
        spans, position = {}, start
        for key, info in self._infos.items():
            spans[key] = (position, position + info.nbytes)
            position += info.nbytes
        part = self._output.part
        try:
            found = read_header(part)
        except BadFileError as error:
            raise OutputError(f"{self.path}: was not written correctly ({error}); check the disk") from error
        if found != Header(self._infos, spans, dict(metadata)) or not _opens_in_library(part, self._infos):
            raise OutputError(f"{self.path}: reads back differently from what was written; check the disk")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a small text file in UTF-8, all or nothing. A file of that name is replaced, missing folders are made."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """The same for bytes, such as a picture."""
    path = Path(path)
    check_output(path, overwrite=True)
    output = _AtomicFile(path, overwrite=True, needed=len(data))
    try:
        with output.writing() as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        output.publish()
    finally:
        output.discard()


class _AtomicFile:
    """A file under a temporary name beside its own, until `publish` or `discard`."""

    def __init__(self, path: Path, *, overwrite: bool, needed: int) -> None:
        self.path = path
        self.part = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.part")
        self._overwrite = overwrite
        self._made: list[Path] = []
        try:
            with _explained(path):
                self._made = _make_folders(path.parent)
                _remove_abandoned(path)
                free = shutil.disk_usage(path.parent).free
                if free < needed:
                    raise OutputError(f"{path}: needs {_mb(needed)}, {_mb(free)} are free; free some space")
                self.file = open(self.part, "x+b")  # noqa: SIM115  closed by publish and discard
        except BaseException:
            self.discard()
            raise

    @contextlib.contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """The open file. After an error it cannot be written to any more, since nobody knows what reached it."""
        try:
            with _explained(self.path):
                yield self.file
        except BaseException:
            self.discard()
            raise

    def publish(self) -> None:
        """Give the file, which is on the disk by now, its own name."""
        with _explained(self.path):
            self.file.close()
            if self._overwrite:
                os.replace(self.part, self.path)
            else:
                _rename_to_new(self.part, self.path)
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
        with contextlib.suppress(OSError):
            self.part.unlink()
        for folder in self._made:
            with contextlib.suppress(OSError):  # somebody else put something into it
                folder.rmdir()
        self._made = []


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the system says while an output is written into an OutputError."""
    try:
        yield
    except FileExistsError as error:
        raise OutputError(f"{path}: exists already; choose another name, or allow it to be replaced") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path}: the disk is full ({error.strerror}); free some space") from error
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); check the disk") from error


def _rename_to_new(part: Path, path: Path) -> None:
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


def _remove_abandoned(path: Path) -> None:
    """Remove what a killed process left of the same output a day ago or earlier."""
    ours = re.compile(re.escape(f".{path.name[:50]}.") + r"[0-9a-f]{8}\.part")
    for file in path.parent.iterdir():
        if ours.fullmatch(file.name):
            with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                if time.time() - file.stat().st_mtime > _ABANDONED_S:
                    file.unlink()
                    logger.info("removed %s, left behind by a process that was killed", file)


def _move(file: BinaryIO, source: int, target: int, count: int) -> None:
    """Move bytes within a file, in the order in which nothing is overwritten before it was read."""
    offsets = range(0, count, _PIECE)
    for offset in offsets if target < source else reversed(offsets):
        file.seek(source + offset)
        data = file.read(min(_PIECE, count - offset))
        file.seek(target + offset)
        file.write(data)


def _legacy_hash(file: BinaryIO, data_start: int) -> str:
    if data_start > _LEGACY_START:
        raise ValueError(f"a header of {data_start} bytes reaches into the part that the legacy hash is made of")
    file.seek(_LEGACY_START)
    return hashlib.sha256(file.read(_LEGACY_BYTES)).hexdigest()[: len(LEGACY_HASH)]


def _opens_in_library(path: Path, infos: Mapping[str, TensorInfo]) -> bool:
    if not {info.dtype for info in infos.values()} <= _OLD_DTYPES:
        return True
    try:
        with safe_open(str(path), framework="pt") as file:
            return set(file.keys()) == set(infos)
    except SafetensorError as error:
        logger.error("%s: %s", path, error)
        return False


def _same_file(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return False


def _up_to_8(count: int) -> int:
    return -(-count // 8) * 8


def _encodable(text: str) -> str:
    """Text that UTF-8 can hold: names of files may have bytes that Python shows as surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else text


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
