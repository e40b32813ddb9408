"""Files as they are typed on a command line: pasted quotes, ~, patterns, hub: names, and the nearest name for a wrong one.

Shells of Windows expand neither ~ nor patterns, and shells elsewhere do not after an equals sign (--base=~/model).
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from lib_dpo.errors import BadFileError, DpoError, OutputError, SettingError, nearest, printable
from lib_dpo.maths.processes import launched

_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "‘": "’", "«": "»", "`": "`"}
_MODELS = (".safetensors", ".ckpt", ".pt", ".pth")
_WEB = re.compile(r"https?://", re.IGNORECASE)
_SHOWN = 5  # names of a folder in a message
_LOOKED_AT = 10_000  # entries of a folder


def input_file(args: argparse.Namespace, typed: str | Path) -> Path:
    """The one file or folder that was typed, fetched from the hub where it is a hub: name and `args.yes` or a person agrees.

    Raises:
        BadFileError: there is none, or a pattern that more than one fits. SettingError: a name that is misspelt.
        As `hub.resolve` for hub: names.
    """
    from lib_dpo.files.hub import PREFIX, resolve  # with torch, which `--help` has no use for

    typed = str(typed)
    if typed.startswith(PREFIX):
        return resolve(typed, consent=lambda question: _agreed(args, question))
    found = input_files(typed)
    if len(found) > 1:
        raise BadFileError(f"{printable(typed)}: fits {len(found)} files, {_some(found)}; expected one: give its name")
    return found[0]


def input_files(typed: str) -> list[Path]:
    """The files that were typed, several where it is a pattern. Raises as `input_file` does."""
    from lib_dpo.files.hub import meant_on_the_hub

    name = os.path.expanduser(unquoted(typed))
    if os.path.lexists(name):
        return [Path(name)]
    if meant := meant_on_the_hub(typed.strip()):
        raise SettingError(f"{printable(typed)}: is no file here; for a name on the hub write {meant}")
    if _WEB.match(typed.strip()):
        raise SettingError(f"{printable(typed)}: is an address of the web; download the file, and give its name here")
    found = _matches(name)
    if not found and re.search("[*?]", name):
        raise BadFileError(f"{printable(typed)}: no file fits this pattern; {_advice(Path(name), patterns=True)}")
    return found or [_same_name(Path(name), typed)]


def input_folder(typed: str) -> Path:
    """A type of argparse: a folder that is there."""
    name = Path(os.path.expanduser(unquoted(typed)))
    if name.is_dir():
        return name
    what = "is a file, expected a folder" if name.exists() else f"does not exist; {_advice(name, folders=True)}"
    raise argparse.ArgumentTypeError(f"{printable(typed)}: {what}")


def output_file(typed: str) -> Path:
    """A type of argparse: the name of a file to write."""
    name = os.path.expanduser(unquoted(typed))
    if name.endswith(("/", os.sep)) or not name:
        raise argparse.ArgumentTypeError(f"{printable(typed)!r} is a folder, expected the name of a file; add one to it")
    if re.search("[*?]", name):
        raise argparse.ArgumentTypeError(f"{printable(typed)!r} is a pattern, expected the name of one file")
    return Path(name)


def output_folder(typed: str) -> Path:
    """A type of argparse: a folder to write to, there or not."""
    return Path(os.path.expanduser(unquoted(typed)))


def unquoted(typed: str) -> str:
    """Without quotes that were pasted along with a name, and without the one that cmd.exe leaves behind a last backslash."""
    if os.path.lexists(typed):
        return typed
    name = typed.strip()
    if len(name) > 1 and _QUOTES.get(name[0]) == name[-1]:
        return name[1:-1].strip()
    return name[:-1] if name.endswith('"') else typed


def _agreed(args: argparse.Namespace, question: str) -> bool:
    if args.yes:
        return True
    if launched() > 1 or not sys.stdin.isatty():  # several processes would ask the same terminal at once
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _matches(pattern: str) -> list[Path]:
    """What a pattern fits. Brackets are tried as themselves first: names of models have them."""
    for form in (pattern.replace("[", "[[]"), pattern):
        if glob.has_magic(form) and (found := sorted(glob.glob(form, recursive=True))):
            return [Path(name) for name in found]
    return []


def _same_name(path: Path, typed: str) -> Path:
    """The one file whose name looks the same: macOS and others write é in two ways. Raises BadFileError without one."""
    same = [entry for entry in _entries(path.parent) if _normal(entry.name) == _normal(path.name)]
    if len(same) == 1:
        return same[0]
    raise BadFileError(f"{printable(typed)}: does not exist; {_advice(path)}")


def _advice(path: Path, *, folders: bool = False, patterns: bool = False) -> str:
    """What to type instead of a path that is not there: the nearest name in the deepest folder that is."""
    if not path.parent.is_dir():
        return _advice(path.parent, folders=True)
    known = [entry for entry in _entries(path.parent) if entry.is_dir() or (not folders and entry.suffix.lower() in _MODELS)]
    by_name = {entry.name: entry for entry in known} | {entry.stem: entry for entry in known if not entry.is_dir()}
    near = None if patterns else nearest(path.name, by_name)
    if near:
        return f"did you mean {printable(str(by_name[near]))}?"
    place = f"the folder {printable(str(path.parent))}" if str(path.parent) != "." else "this folder"
    models = [entry for entry in known if folders or not entry.is_dir()]
    what = "folder" if folders else "model"
    return f"{place} holds {_some(models)}" if models else f"{place} holds no {what}: check the path"


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(Path(folder, entry.name) for entry, _ in zip(found, range(_LOOKED_AT), strict=False))
    except OSError:
        return []


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _some(paths: Sequence[Path]) -> str:
    names = ", ".join(printable(path.name) for path in paths[:_SHOWN])
    return names + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")


def folders_to_make(paths: Iterable[Path | None]) -> list[Path]:
    """The folders of these files that are not there yet."""
    folders = dict.fromkeys(path.parent for path in paths if path is not None)
    return [folder for folder in folders if not folder.exists()]


def check_inputs_apart(args: argparse.Namespace) -> None:
    """Refuse an output that is one of the inputs before it is refused for being there. Raises OutputError."""
    output = getattr(args, "output", None)
    if output is None or not output.is_file():
        return
    for option in ("base", "tuned", "target", "model", "offset", "lora"):
        typed = getattr(args, option, None)
        name = Path(os.path.expanduser(unquoted(str(typed)))) if typed else None
        if name and name.is_file() and name.samefile(output):
            raise OutputError(f"{output}: is one of the inputs (--{option}), expected another name after -o; choose one")


def check_not_swapped(model_option: str, model: Path, offset_option: str, offset: Path) -> None:
    """Refuse a LoRA or offset file where a model belongs and a model where the offset does. Raises SettingError.

    What only one of the two is, the command itself says.
    """
    kinds = _kind(model), _kind(offset)
    if kinds[0] in ("lora", "offset") and kinds[1] in ("checkpoint", "unet"):
        first, second = (_A[kind] for kind in kinds)
        raise SettingError(f"{model_option} {model.name} is {first}, {offset_option} {offset.name} {second}: exchange them")


_A = {"lora": "a LoRA", "offset": "an offset file", "checkpoint": "a checkpoint", "unet": "a UNet"}


def _kind(path: Path) -> str:
    """lora, offset, checkpoint or unet, by the names of the tensors; empty where it cannot be told."""
    from lib_dpo.families.model import Model
    from lib_dpo.files.checkpoint import open_checkpoint
    from lib_dpo.offsets.lora.keys import is_lora
    from lib_dpo.offsets.offset import is_offset_file

    try:
        with open_checkpoint(path) as checkpoint:
            if is_lora(checkpoint.infos):
                return "lora"
            model = Model(checkpoint)
            return "offset" if is_offset_file(model) else "unet" if model.components() == ("unet",) else "checkpoint"
    except (DpoError, OSError):
        return ""
