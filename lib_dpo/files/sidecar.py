"""The .yaml beside a checkpoint, from which hosts read how to load it: copied or removed with the file that is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lib_dpo.files.atomic import check_output, write_bytes_atomic
from lib_dpo.files.small import read_small

SidecarFate = Literal["copied", "replaced", "removed", "kept", "none"]


SIDECAR_TEXT = {
    "copied": "copied the target's .yaml to {}",
    "replaced": "replaced {}, which was another one, by the target's .yaml",
    "removed": "removed {}: the target has no .yaml, and hosts would have loaded the new file with it",
}


def check_sidecar(target: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse a .yaml beside the output that is not the target's: hosts would load the output with it.

    Raises:
        OutputError: it would have to be replaced or removed, and `overwrite` is not set.
    """
    if _sidecar_fate(target, output) in ("copied", "replaced", "removed"):
        check_output(output.with_suffix(".yaml"), overwrite=overwrite)


def _sidecar_fate(target: Path, output: Path) -> SidecarFate:
    """What is to be done so that the output has the sidecar .yaml of the target, or none where that has none."""
    wanted, found = _sidecar(target), _sidecar(output)
    if wanted == found:
        return "none" if found is None else "kept"
    if wanted is None:
        return "removed"
    return "copied" if found is None else "replaced"


def _sidecar(checkpoint: Path) -> bytes | None:
    """The .yaml beside a checkpoint file, from which hosts read the prediction type; None without one."""
    file = checkpoint.with_suffix(".yaml") if checkpoint.name and not checkpoint.is_dir() else None
    return read_small(file) if file and file.is_file() else None


@contextmanager
def sidecar_in_place(target: Path, output: Path, *, overwrite: bool) -> Iterator[SidecarFate]:
    """Have the output's sidecar as it is to be, before the output gets its name; an error in the block undoes it."""
    check_sidecar(target, output, overwrite=overwrite)  # again: another one may have appeared meanwhile
    fate, before = _sidecar_fate(target, output), _sidecar(output)
    try:
        _put(output.with_suffix(".yaml"), _sidecar(target))
        yield fate
    except BaseException:
        _put(output.with_suffix(".yaml"), before)
        raise


def _put(file: Path, content: bytes | None) -> None:
    """Make a file hold this, or be gone for None. One that does already is not touched."""
    if content is None:
        if file.is_file():
            file.unlink()
    elif not file.is_file() or read_small(file) != content:
        write_bytes_atomic(file, content)
