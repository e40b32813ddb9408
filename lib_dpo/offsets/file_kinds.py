"""What a file is, in two or three words for a list; remembered until the file changes.

The header tells it, but for UNet and offset, which have the same names and shapes: there its norms do.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from lib_dpo.errors import DpoError
from lib_dpo.families.arch import ARCHITECTURES, recognise
from lib_dpo.files.checkpoint import PICKLES
from lib_dpo.files.header import Header, read_header
from lib_dpo.offsets.lora.keys import is_lora
from lib_dpo.offsets.offset import NORM_WEIGHT_OF_A_MODEL

_SIGN = " · "  # between the name of a file and its kind
_LABELLED = re.compile(rf"(?s)(.+){_SIGN}(LoRA|exact LoRA|offset|UNet|checkpoint|folder|not a model)(, [^{_SIGN.strip()}]+)?")
_WHOLE = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_model.")  # what a UNet alone does not have
_NORMS = (".norm.weight", ".in_layers.0.weight", ".norm1.weight")  # of UNets, in ldm's names and in diffusers'
_FEW = 8
_known: dict[tuple[str, int, int], str] = {}
_reading = threading.Lock()  # held while the rest of a list is read


def labelled(files: Iterable[tuple[str, Path]], *, seconds: float = 0.25) -> list[str]:
    """Names with the kinds of their files behind them; without where there was no more time.

    The rest is read in the background, for the next look.

    Args:
        seconds: to spend on files that were not looked at before.
    """
    until = time.monotonic() + seconds
    found, rest = [], []
    for name, path in files:
        kind = _kind(path, look=time.monotonic() < until)
        found.append(f"{name}{_SIGN}{kind}" if kind else name)
        if not kind:
            rest.append(path)
    if rest and _reading.acquire(blocking=False):
        threading.Thread(target=_read_on, args=(rest,), name="dpo kinds", daemon=True).start()
    return found


def _read_on(rest: Iterable[Path]) -> None:
    try:
        for path in rest:
            _kind(path, look=True)
    finally:
        _reading.release()


def plain_name(choice: str) -> str:
    """The name of a file that `labelled` gave, or that somebody typed."""
    match = _LABELLED.fullmatch(choice)
    return match[1] if match else choice


def _kind(path: Path, *, look: bool) -> str:
    """The kind of a file; empty where it is gone, or unknown and not to be looked at."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    if path.is_dir():
        return "folder"
    state = (str(path), stat.st_mtime_ns, stat.st_size)
    if state not in _known and look:
        _known[state] = _read(path)
    return _known.get(state, "")


def _read(path: Path) -> str:
    if path.suffix.lower() in PICKLES:  # gigabytes to look into
        return "checkpoint"
    try:
        header = read_header(path)
        if is_lora(header.infos):
            what, name = _lora(header)
        else:
            found = recognise({key: info.shape for key, info in header.infos.items()}, name=path.name)
            what, name = _model(header, path), found.architecture.name
    except DpoError:
        return "not a model"
    return f"{what}, {ARCHITECTURES[name].title}" if name in ARCHITECTURES else what


def _lora(header: Header) -> tuple[str, str]:
    said = header.metadata
    what = "exact LoRA" if said.get("dpo.form") == "exact" else "LoRA"
    version = "sd_v2" if said.get("ss_v2") == "True" else said.get("ss_base_model_version", "")
    told = (row.name for row in ARCHITECTURES.values() if version.startswith(row.ss_base_model_version))
    return what, said.get("dpo.architecture") or (next(told, "") if version else "")


def _model(header: Header, path: Path) -> str:
    if any(key.startswith(_WHOLE) for key in header.infos):
        return "checkpoint"
    if header.metadata.get("dpo.kind") == "offset" or _norms_are_near_zero(header, path):
        return "offset"
    return "UNet"


def _norms_are_near_zero(header: Header, path: Path) -> bool:
    """As `is_offset_file`, of a few norms that are read by themselves: what others publish says nothing in its header."""
    norms = [key for key in header.infos if key.endswith(_NORMS)]
    with safe_open(path, framework="pt") as file:
        few = [file.get_tensor(key).float().abs().mean() for key in norms[:: max(1, len(norms) // _FEW)]]
    return bool(few) and float(sum(few)) / len(few) < NORM_WEIGHT_OF_A_MODEL
