"""Write .safetensors files tensor by tensor, so that no output is ever held whole in memory, and all or nothing.

The safetensors library writes a file from all of its tensors at once. Here room for the header is kept at the start of
a temporary file, the tensors follow one by one, and the header comes last. Only a file that is complete and has been
opened again gets its name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from lib_dpo.errors import BadFileError, OutputError
from lib_dpo.files.atomic import AtomicFile, check_safetensors_output, encodable, megabytes
from lib_dpo.files.checkpoint import Checkpoint
from lib_dpo.files.header import (
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    dtype_name,
    header_excess,
    read_header,
    tensor_bytes,
    tensor_nbytes,
)

logger = logging.getLogger(__name__)

# The first hash that WebUIs knew LoRAs by (Additional Networks, kohya's sshs_legacy_hash): 8 digits of the SHA-256 of
# 64 KiB of the file at 1 MiB, header included, so only the writer can tell it.
LEGACY_HASH = "legacy??"
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000

_ENTRY_BYTES = 256  # room for a tensor in the header: its key (110 in SDXL's longest) and about 90 of punctuation
_WORTH_MOVING = 256  # header room left over is closed where it exceeds 1/256 of the data
_PIECE = 16 << 20
# what every version of the library since 0.4.2 knows; a file with other dtypes is copied, but not opened with it
_OLD_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"}


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

    _output: AtomicFile

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
        self._output = AtomicFile(self.path, overwrite=self._overwrite, needed=self._needed)
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

    def finish(
        self, metadata: Mapping[str, str], *, sources: Iterable[Checkpoint] = (), check: Callable[[Path], None] | None = None
    ) -> None:
        """Write the header, check the file by opening it again, and give it its name.

        A metadata entry whose value is `LEGACY_HASH` gets the old hash of the finished file (see there).

        Args:
            sources: what the tensors were made from; a file of them that was written to meanwhile discards this one.
            check: called with the complete file before it gets its name; an error raised in it discards the file.
        """
        metadata = {key: encodable(value) for key, value in metadata.items()}
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
        for source in sources:
            source.check_unchanged()
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
                f"{self.path}: its keys and metadata take {megabytes(len(header))}, expected at most "
                f"{megabytes(MAX_HEADER_BYTES)}; write less metadata"
            )
        if problem := header_excess(header):
            raise OutputError(f"{self.path}: {problem}; write less metadata")
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


def _up_to_8(count: int) -> int:
    return -(-count // 8) * 8
