"""Names of files: as people and API callers give them, never a path out of a folder we know, and as messages show them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lib_dpo.errors import OutputError, printable

_LONGEST = 150
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_RESERVED = re.compile(r"(con|conin\$|conout\$|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE)
_FORBIDDEN_ALIASES = ("none", "addams")  # names that the hosts' LoRA loader treats specially
_SUFFIX = ".safetensors"


def output_path(folder: Path, name: str) -> Path:
    """The file to write for a name that somebody typed: below `folder`, whatever was typed.

    Args:
        name: with or without .safetensors. Letters of any script, spaces and dots are allowed.

    Raises:
        OutputError: empty, too long, with separators or characters that some system forbids, or reserved on Windows.
    """
    stem = name.strip()
    if stem.lower().endswith(_SUFFIX):
        stem = stem[: -len(_SUFFIX)]
    shown = repr(printable(name)[:_LONGEST])
    if not stem:
        raise OutputError("a name is missing; give one for the file to write")
    if len(stem.encode("utf-8", "surrogatepass")) > _LONGEST:
        raise OutputError(f"the name {shown} is too long; expected at most {_LONGEST} bytes")
    bad = _FORBIDDEN.search(stem)
    if bad or not stem.isprintable():
        raise OutputError(
            f"the name {shown} holds {printable(bad[0]) if bad else 'unprintable characters'}, which file names cannot have; "
            "expected a plain name without folders"
        )
    if stem.startswith(".") or stem.endswith((".", " ")) or ".." in stem:
        raise OutputError(f"the name {shown} begins or ends with a dot, or holds two in a row; choose a plain name")
    if _RESERVED.fullmatch(stem) or stem.lower() in _FORBIDDEN_ALIASES:
        raise OutputError(f"the name {shown} is reserved; choose another one")
    return folder / (stem + _SUFFIX)


def names_apart(one: Path, other: Path) -> tuple[str, str]:
    """The names of two files, each with as many folders before it as it takes to tell them apart."""
    first, second = (Path(os.path.abspath(path)).parts for path in (one, other))
    for count in range(1, max(len(first), len(second))):
        if first[-count:] != second[-count:]:
            return str(Path(*first[-count:])), str(Path(*second[-count:]))
    return str(one), str(other)
