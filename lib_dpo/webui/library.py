"""Which files a WebUI's user can choose: by name, from the host's own lists and the reference folder, never by path.

A *checkpoint* is in the host's list. A *reference* is a tuned model: whole, UNet alone or a diffusers folder, from the
reference folder, the checkpoints, or what lies among the LoRAs without being one. What this tool baked is no reference, for
it holds an offset that there is already, rounded: it is not offered, and is found by its name all the same. An *offset* is
a LoRA or a dense offset file.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from lib_dpo.errors import DpoError, NotFoundError, nearest, printable
from lib_dpo.families.model import Model
from lib_dpo.files.checkpoint import PICKLES, open_checkpoint
from lib_dpo.files.names import output_path
from lib_dpo.hosts.base import FileEntry, Host
from lib_dpo.offsets.lora.keys import is_lora
from lib_dpo.offsets.offset import is_offset_file
from lib_dpo.offsets.recipe import is_bake

logger = logging.getLogger(__name__)

FileKind = Literal["lora", "offset", "model", "other"]

_MODEL_SUFFIXES = (".safetensors", ".ckpt")
_FOLDER_MARKS = ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
_LARGER_THAN_A_LORA = 1_000_000_000  # bytes from which a file among the LoRAs is looked at: a UNet of SD 1.5 in fp16 has 1.7 GB
_FOLDERS = re.compile(
    r"(?<![\w./\\:])(?:[A-Za-z]:[\\/]|[\\/])(?:[^\s\\/:;,'\"()]+[\\/])+(?=[^\s\\/:;,'\"()])"
)  # of an absolute path
_DEPTH = 3  # folders below the reference folder that are looked into


class Library:
    """The lists of one host.

    Of checkpoints the header is read once, for what was baked into them, and of LoRAs nothing; files of the reference folder
    are opened once.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._kinds: dict[tuple[str, int, int], FileKind] = {}
        self._bakes: dict[tuple[str, int, int], bool] = {}

    def checkpoints(self) -> list[FileEntry]:
        """The host's own list."""
        return _distinct(self._host.checkpoints())

    def references(self) -> list[FileEntry]:
        """Tuned models to diff against, without our own bakes."""
        return [entry for entry in self._tuned() if not self._is_bake(entry.path)]

    def _tuned(self) -> list[FileEntry]:
        """Tuned models: the reference folder first, then checkpoints, then large files among the LoRAs."""
        own = [entry for entry in self._in_reference_dir() if self.kind(entry.path) == "model"]
        among_loras = [
            FileEntry(entry.path.name, entry.path)
            for entry in self._host.loras()
            if _size(entry.path) > _LARGER_THAN_A_LORA and self.kind(entry.path) == "model"
        ]
        return _distinct([*own, *self.checkpoints(), *among_loras])

    def offsets(self) -> list[FileEntry]:
        """What can be baked or applied: the host's LoRAs, and offset files and LoRAs of the reference folder."""
        own = [entry for entry in self._in_reference_dir() if self.kind(entry.path) in ("lora", "offset")]
        return _distinct([*own, *self._host.loras()])

    def checkpoint(self, name: str) -> Path:
        """The file of a checkpoint's name. Raises NotFoundError."""
        return self._find(name, "checkpoint", self.checkpoints)

    def reference(self, name: str) -> Path:
        """The file or folder of a reference's name. Raises NotFoundError."""
        return self._find(name, "DPO reference", self._tuned)

    def offset(self, name: str) -> Path:
        """The file of an offset's name. Raises NotFoundError."""
        return self._find(name, "offset", self.offsets)

    def name_of(self, offset: Path) -> str:
        """The name under which an offset's file is listed."""
        return next((entry.name for entry in self.offsets() if entry.path == offset), offset.stem)

    def any(self, name: str) -> Path:
        """The file of a name from any of the lists. Raises NotFoundError."""
        return self._find(name, "file", lambda: [*self.checkpoints(), *self._tuned(), *self.offsets()])

    def same_pair(self, name: str, kind: FileKind) -> FileEntry | None:
        """An offset of that kind made from the same base and reference as the named one: itself, where it is of that kind.

        Told by the hashes in the metadata; None where there is none. Raises NotFoundError for an unknown name.
        """
        path = self.offset(name)
        if self.kind(path) == kind:
            return FileEntry(name, path)
        hashes = _pair_hashes(path)
        if hashes is None:
            return None
        return next((e for e in self.offsets() if self.kind(e.path) == kind and _pair_hashes(e.path) == hashes), None)

    def whole(self, name: str) -> FileEntry | None:
        """What holds all of the offset that the named file holds a part of: an offset file or an exact LoRA of its pair.

        None where the named one is such a file itself, or none is known. Raises NotFoundError for an unknown name.
        """
        path = self.offset(name)
        hashes = _pair_hashes(path)
        if hashes is None or self._is_whole(path):
            return None
        return next((e for e in self.offsets() if self._is_whole(e.path) and _pair_hashes(e.path) == hashes), None)

    def new_lora(self, name: str) -> Path:
        """Where a new LoRA of that name goes. Raises OutputError for a name that is none."""
        return output_path(self._host.lora_dir, name)

    def new_checkpoint(self, name: str) -> Path:
        """Where a new checkpoint of that name goes. Raises OutputError for a name that is none."""
        return output_path(self._host.checkpoint_dir, name)

    def new_offset(self, name: str) -> Path:
        """Where a new offset file of that name goes: the reference folder. Raises OutputError for a name that is none."""
        return output_path(self._host.reference_dir, name)

    def kind(self, path: Path) -> FileKind:
        """What a file is, from its header; remembered until it changes."""
        key = _state(path)
        if key is None:
            return "other"
        if key not in self._kinds:
            self._kinds[key] = _kind(path)
        return self._kinds[key]

    def _is_whole(self, path: Path) -> bool:
        kind = self.kind(path)
        return kind == "offset" or (kind == "lora" and _form(path) == "exact")

    def _is_bake(self, path: Path) -> bool:
        """Whether we baked an offset into a file, says its header; remembered until it changes."""
        key = _state(path)
        if key is None:
            return False
        if key not in self._bakes:
            self._bakes[key] = _says_bake(path)
        return self._bakes[key]

    def names_only(self, text: str) -> str:
        """A message without the server's folders: people know files by the names of the lists."""
        for folder in (self._host.checkpoint_dir, self._host.lora_dir, self._host.reference_dir):
            for written in (str(folder), str(folder.absolute()), printable(str(folder.absolute()))):  # as errors write it
                text = text.replace(f"{written}{os.sep}", "").replace(written, folder.name)
        return _FOLDERS.sub("", text)

    def place(self, path: Path) -> str:
        """Where a file that was written lies: its name behind that of the folder."""
        return f"{path.parent.name}/{path.name}"

    def _find(self, name: str, what: str, entries: Callable[[], Iterable[FileEntry]]) -> Path:
        wanted = name.strip()
        listed = list(entries())
        for names in (_whole_name, _file_name, _short_names):  # the most exact wins over the whole list
            found = {entry.path: entry for entry in listed if wanted in names(entry)}
            if len(found) > 1:
                known = ", ".join(entry.name for entry in found.values())
                raise NotFoundError(
                    f"there are several files for the {what} {wanted!r}: {printable(known)}; give one whole name"
                )
            if found:
                return self._there(next(iter(found.values())), what)
        if wanted and self._host.may_use_paths() and Path(wanted).is_absolute() and Path(wanted).exists():
            return Path(wanted)
        if not wanted:
            raise NotFoundError(f"no {what} is chosen; choose one from the list")
        near = nearest(wanted, (known for entry in listed for known in (entry.name, *_short_names(entry))))
        advice = f"did you mean {printable(near)!r}?" if near else "choose one from the list, or refresh it after adding a file"
        raise NotFoundError(f"there is no {what} named {printable(wanted)[:120]!r}; {advice}")

    def _there(self, entry: FileEntry, what: str) -> Path:
        if not entry.path.exists():
            raise NotFoundError(f"the {what} {entry.name!r} has vanished from the disk; refresh the list and choose another")
        return entry.path

    def _in_reference_dir(self) -> list[FileEntry]:
        folder = self._host.reference_dir
        try:
            found = list(_walk(folder, folder, _DEPTH, frozenset({folder.resolve()})))
        except OSError as error:  # missing, or closed to us
            logger.debug("%s", error)
            return []
        return sorted(found, key=lambda entry: entry.name.casefold())


def _whole_name(entry: FileEntry) -> tuple[str, ...]:
    return (entry.name,)


def _file_name(entry: FileEntry) -> tuple[str, ...]:
    return (entry.path.name,)


def _short_names(entry: FileEntry) -> tuple[str, ...]:
    """Without suffix, and without the hash that a host may put behind a name."""
    return (entry.path.stem, entry.name.rsplit(" [", 1)[0], Path(entry.name).stem)


def _walk(folder: Path, root: Path, depth: int, above: frozenset[Path]) -> Iterable[FileEntry]:
    """The files and model folders below a folder. A link to a folder that it lies in leads nowhere new."""
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        if path.name.startswith("."):
            continue
        if path.is_file() and path.suffix.lower() in _MODEL_SUFFIXES:
            yield FileEntry(name, path)
        elif path.is_dir():
            if any((path / mark).exists() for mark in _FOLDER_MARKS):
                yield FileEntry(name, path)
            elif depth and (place := path.resolve()) not in above:
                yield from _walk(path, root, depth - 1, above | {place})


def _kind(path: Path) -> FileKind:
    if path.suffix.lower() in PICKLES:  # gigabytes to look into, and nobody publishes offsets so
        return "model"
    try:
        with open_checkpoint(path) as checkpoint:
            if is_lora(checkpoint.infos):
                return "lora"
            return "offset" if is_offset_file(Model(checkpoint)) else "model"
    except DpoError:
        return "other"


def _state(path: Path) -> tuple[str, int, int] | None:
    """What tells whether a file has changed; None where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return str(path), stat.st_mtime_ns, stat.st_size


def _says_bake(path: Path) -> bool:
    try:
        return is_bake(path)
    except DpoError:  # damaged: said when it is used
        return False


def _pair_hashes(path: Path) -> tuple[str, str] | None:
    with open_checkpoint(path) as checkpoint:
        hashes = tuple(checkpoint.metadata.get(f"dpo.{which}_sha256", "") for which in ("base", "tuned"))
    return (hashes[0], hashes[1]) if all(hashes) else None


def _form(path: Path) -> str:
    """What our metadata calls the form of a LoRA; empty in files of others."""
    with open_checkpoint(path) as checkpoint:
        return checkpoint.metadata.get("dpo.form", "")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_text(name: str) -> bool:
    """Whether a name can be shown and sent: one that is not UTF-8 on the disk holds surrogates."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _distinct(entries: Iterable[FileEntry]) -> list[FileEntry]:
    """The first of each name and of each file."""
    names: set[str] = set()
    files: set[Path] = set()
    found = []
    for entry in entries:
        if entry.name not in names and entry.path not in files and _is_text(entry.name):
            names.add(entry.name)
            files.add(entry.path)
            found.append(entry)
    return found
