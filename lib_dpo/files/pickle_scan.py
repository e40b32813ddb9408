"""What a pickle would do, told from its instructions before anything follows them.

torch.load with weights_only runs no code, but makes what a file asks for: `bytearray(10**10)`, a tensor of whatever lay in the
memory before, gigabytes out of a small zip archive. Only what makes up tensors out of numbers in the file passes here.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib_dpo.errors import BadFileError, UnsafeFileError
from lib_dpo.files.header import brief

_MOST_BYTES = 10_000_000  # of one pickle, its numbers apart: that of SD 1.5 with its EMA copy has half a million
_MOST_STEPS = 1_000_000
_OLD_PICKLES = 5  # magic number, protocol, machine, content, names of the storages; the numbers follow
# what may be called; storages, tensors of a size and the like are no more than named
_BUILDERS = frozenset(
    {
        "__builtin__.set", "__builtin__.complex", "builtins.set", "builtins.complex",
        "_codecs.encode",  # bytes, in the protocol that torch.save uses
        "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        *(f"torch._utils._rebuild_{kind}" for kind in (
            "tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "sparse_tensor", "qtensor",
            "meta_tensor_no_storage",
        )),
    }
)  # fmt: skip


def check_pickles(path: Path, *, is_zip: bool) -> None:
    """Refuse a torch checkpoint that would call anything but what puts tensors together, or that is too long for one.

    Raises:
        UnsafeFileError: naming what it would call. BadFileError: too long.
        OSError, ValueError, zipfile.BadZipFile, or whatever else zipfile raises: it cannot be read.
    """
    for stream in _zipped(path) if is_zip else _old(path):
        for called in _calls(path, stream):
            if called not in _BUILDERS:
                raise runs_code(path, brief(called)[1:-1])


def runs_code(path: Path, what: str) -> UnsafeFileError:
    """The error for a pickle that wants more than tensors."""
    return UnsafeFileError(
        f"{path}: opening it would run code from the file ({what}), expected tensors only; use the .safetensors version, or "
        "convert it where you trust its maker"
    )


def _zipped(path: Path) -> Iterator[io.BytesIO]:
    """The pickles in a zip archive. Whatever is named so counts: readers differ in which of two alike they take."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.lower().endswith("data.pkl"):
                if member.file_size > _MOST_BYTES or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise _too_long(path)
                with archive.open(member) as file:
                    yield io.BytesIO(file.read(_MOST_BYTES))  # with a number: it inflates no further, whatever size is told


def _old(path: Path) -> Iterator[io.BytesIO]:
    """The beginning of a file from before torch 1.6, once for each of the pickles in a row that it begins with."""
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(_MOST_BYTES))
    for _ in range(_OLD_PICKLES):
        yield stream


def _calls(path: Path, stream: io.BytesIO) -> Iterator[str]:
    """The names of what a pickle would call, by following what lies on its stack."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for step, (code, argument, _) in enumerate(pickletools.genops(stream)):
        if step > _MOST_STEPS:
            raise _too_long(path)
        if code.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"):
            yield str(argument).replace(" ", ".") if code.name == "INST" else _called(code, stack)
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        else:
            left = ".".join(map(str, stack[-2:])) if code.name == "STACK_GLOBAL" else _left(code, argument, memo)
            _take(stack, code.stack_before)
            stack += [left] * len(code.stack_after)


def _called(code: Any, stack: list[Any]) -> str:
    """What is called: it lies below its arguments; behind the mark, for OBJ."""
    if code.name == "OBJ":
        place = len(stack) - stack[::-1].index(pickletools.markobject)
    else:
        place = -3 if code.name == "NEWOBJ_EX" else -2
    found = stack[place]
    return found if isinstance(found, str) else "something that it makes itself"


def _left(code: Any, argument: Any, memo: dict[Any, Any]) -> Any:
    """What an instruction leaves on the stack: a name, a mark, or nothing that matters here."""
    if code.name == "GLOBAL":
        return argument.replace(" ", ".")
    if code.name in ("GET", "BINGET", "LONG_BINGET"):
        return memo.get(argument)
    if code.name == "MARK":
        return pickletools.markobject
    return argument if isinstance(argument, str) else None  # text: names for STACK_GLOBAL


def _take(stack: list[Any], wanted: list[Any]) -> None:
    """Take off the stack what an instruction needs. Raises ValueError or IndexError where that is not there."""
    if pickletools.markobject in wanted:
        mark = len(stack) - 1 - stack[::-1].index(pickletools.markobject)
        del stack[mark - wanted.index(pickletools.markobject) :]
    elif wanted:
        if len(stack) < len(wanted):
            raise ValueError("its stack is empty")
        del stack[-len(wanted) :]


def _too_long(path: Path) -> BadFileError:
    return BadFileError(f"{path}: its pickle is too long for that of a model; use the .safetensors version")
