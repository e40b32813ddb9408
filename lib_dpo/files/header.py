"""The header of a .safetensors file, checked before anything in it is trusted, and the names of its dtypes.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch

from lib_dpo.errors import BadFileError, NoMemoryError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit: trainers put the tags of all their pictures into it
_MOST_VALUES = 500_000  # names, numbers and texts: those of 50,000 tensors and more, of which models have a few thousand
_FIELDS = {"dtype", "shape", "data_offsets"}
_DEEPEST = 125  # lists and objects within one another in a field; the library's limit is 128 from the beginning
_LONGEST_NAME = 1000  # of a tensor; those of models have 150 characters at most

# name in the header, bits per element, attribute of torch (None: torch has no dtype with one value per element)
_DTYPES: tuple[tuple[str, int, str | None], ...] = (
    ("F64", 64, "float64"),
    ("F32", 32, "float32"),
    ("F16", 16, "float16"),
    ("BF16", 16, "bfloat16"),
    ("F8_E4M3", 8, "float8_e4m3fn"),
    ("F8_E5M2", 8, "float8_e5m2"),
    ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    ("F8_E8M0", 8, "float8_e8m0fnu"),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("F4", 4, None),
    ("I64", 64, "int64"),
    ("I32", 32, "int32"),
    ("I16", 16, "int16"),
    ("I8", 8, "int8"),
    ("U64", 64, "uint64"),
    ("U32", 32, "uint32"),
    ("U16", 16, "uint16"),
    ("U8", 8, "uint8"),
    ("BOOL", 8, "bool"),
    ("C64", 64, "complex64"),
)
_BITS = {name: bits for name, bits, _ in _DTYPES}
_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, _, attribute in _DTYPES if attribute and hasattr(torch, attribute)
}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}

# EFAULT: of pages of a mapped file that cannot be had
_OF_THE_DISK = (errno.EIO, errno.EFAULT)

# what is often found under the name of a checkpoint, by its first bytes
_MISTAKEN: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, perhaps a .ckpt"),
    (b"\x80", "a Python pickle, perhaps an old .ckpt"),
    (b"<", "a web page, so its download did not work"),
    (b"version ", "a git-lfs pointer, to be replaced by `git lfs pull`"),
    (b"GGUF", "a GGUF file"),
)


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor, before it is read. `dtype` is the safetensors name, such as "F16"."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a .safetensors file holds, in data order, and between which bytes of the file each tensor lies."""

    infos: dict[str, TensorInfo]
    spans: dict[str, tuple[int, int]]
    metadata: dict[str, str]


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a safetensors dtype name; None where this torch has none."""
    return _TORCH.get(name)


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype. Raises KeyError where the format has none."""
    return _NAMES[dtype]


def is_float(name: str) -> bool:
    """Whether a safetensors dtype name is one of floating-point numbers; also of those that this torch lacks."""
    return name[0] == "F" or name == "BF16"


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor as stored. Raises ValueError for an unknown dtype or a last byte that is not full."""
    if dtype not in _BITS:
        raise ValueError(f"unknown dtype {dtype!r}, expected one of {', '.join(_BITS)}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8:
        raise ValueError(f"{dtype} of shape {list(shape)} does not fill whole bytes")
    return bits // 8


def read_header(path: str | Path) -> Header:
    """Read and check the header of a .safetensors file. Raises BadFileError for whatever does not add up."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return parse_header(path, file)
    except OSError as error:
        raise unreadable(path, error) from error


def parse_header(path: Path, file: BinaryIO) -> Header:
    """As `read_header`, from a file that is open at its start; `path` is for the messages."""
    size = os.fstat(file.fileno()).st_size
    raw = _header_bytes(path, file, size)
    entries = _header_entries(path, raw)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata is not text only")
    rows = [(*_checked_entry(path, key, entry), key) for key, entry in entries.items()]
    rows.sort(key=lambda row: row[:2])
    start, position = 8 + len(raw), 0
    for begin, end, _, key in rows:
        if begin != position:
            raise damaged(path, f"{brief(key)} begins at byte {begin} of the data, expected {position}")
        position = end
    if start + position != size:
        raise damaged(path, f"it has {size} bytes, expected {start + position} by its header")
    return Header(
        infos={key: info for _, _, info, key in rows},
        spans={key: (start + begin, start + end) for begin, end, _, key in rows},
        metadata=metadata,
    )


def header_excess(raw: bytes) -> str:
    """What a header has too much of to be read in little time and memory; empty where nothing. A long text is one value."""
    if _values(raw) > _MOST_VALUES and _values_outside_texts(raw) > _MOST_VALUES:
        return f"its header holds more than {_MOST_VALUES:,} names, numbers and texts"
    return ""


def _values(raw: bytes) -> int:
    """At least as many as there are values in JSON: it counts marks in texts too."""
    return sum(raw.count(mark) for mark in (b",", b"[", b"{"))


def _values_outside_texts(raw: bytes) -> int:
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    texts = plain.count(b'"') // 2
    return texts if texts > _MOST_VALUES else _values(b"".join(plain.split(b'"')[::2]))


def mistaken_for(head: bytes) -> str | None:
    """What a file is in truth, by its first bytes, where it is a thing that often has the wrong name."""
    return next((what for start, what in _MISTAKEN if head.startswith(start)), None)


def brief(content: object) -> str:
    """Anything that a file says, as a short piece of one line."""
    text = str(content) if isinstance(content, Exception) else repr(content)
    return text if len(text) <= 100 else text[:80] + "…"


def damaged(path: Path, found: str) -> BadFileError:
    """The error for a file that is not what it should be, whatever was found."""
    return BadFileError(f"{path}: {found}; the file is damaged or incomplete, download it again")


def _too_much(path: Path, found: str) -> BadFileError:
    return BadFileError(f"{path}: {found}; no model needs as much, choose another file")


def unreadable(path: Path, error: Exception) -> BadFileError | NoMemoryError:
    """The error for a file that the system does not let us read, or map for want of memory."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return NoMemoryError(f"{path}: the machine is out of memory; close other programs")
    reason = getattr(error, "strerror", None) or error
    where = "the disk that it is on" if getattr(error, "errno", None) in _OF_THE_DISK else "the path and its permissions"
    return BadFileError(f"{path}: cannot be read ({reason}); check {where}")


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) == 8 and 2 <= length <= size - 8:
        if length > MAX_HEADER_BYTES:
            raise _too_much(path, f"its header has {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        raw = file.read(length)
        if problem := header_excess(raw):
            raise _too_much(path, problem)
        return raw
    if what := mistaken_for(head):
        raise BadFileError(f"{path}: is {what}, expected a safetensors file; download it again or choose another file")
    if size < 10:
        raise damaged(path, f"it has {size} bytes, expected a safetensors header" if size else "the file is empty")
    raise damaged(path, f"it announces a header of {length} bytes, expected 2 to {size - 8}")


def _header_entries(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_checked_object, parse_int=_whole_number, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a key twice, a number too long, too deep
        raise damaged(path, f"its header is no valid JSON ({brief(error)})") from error
    if not isinstance(content, dict):
        raise damaged(path, f"its header is a JSON {type(content).__name__}, expected an object")
    return content


def _whole_number(digits: str) -> int | float:
    """-0 is a fraction, as for the library: no size."""
    return -0.0 if digits == "-0" else int(digits)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _is_deep(value: Any, left: int = _DEEPEST) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not left or any(_is_deep(each, left - 1) for each in inner)


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    for text in (*found, *(value for value in found.values() if isinstance(value, str))):
        text.encode("utf-8")  # fails for half a surrogate pair, which could never be written again
    return found


def _checked_entry(path: Path, key: str, entry: Any) -> tuple[int, int, TensorInfo]:
    """Where a tensor begins and ends in the data, and what the header says of it, once all of it fits together."""
    if len(key) > _LONGEST_NAME:
        raise damaged(path, f"the name {brief(key)} has {len(key):,} characters, expected at most {_LONGEST_NAME:,}")
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if any(_is_deep(fields[name]) for name in fields.keys() - _FIELDS):  # the library passes over other fields too
        raise damaged(path, f"the entry of {brief(key)} is nested too deeply")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise damaged(path, f"the entry of {brief(key)} lacks a valid dtype, shape or data_offsets")
    if len(shape) > 64 or math.prod(max(size, 1) for size in shape) >= 1 << 56:  # what torch can count
        raise damaged(path, f"{brief(key)} has the impossible shape {brief(shape)}")
    try:
        nbytes = tensor_nbytes(dtype, shape)
    except ValueError as error:
        raise damaged(path, f"{brief(key)}: {brief(error)}") from error
    begin, end = offsets
    if end - begin != nbytes:
        raise damaged(path, f"{brief(key)} has {end - begin} bytes, expected {nbytes} for {dtype} {brief(shape)}")
    return begin, end, TensorInfo(dtype, tuple(shape), nbytes)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it lies so on the CPU already."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data.toreadonly()
