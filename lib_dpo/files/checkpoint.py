"""Open checkpoints lazily: what is in them, one tensor at a time, metadata, hash.

A .safetensors file is never loaded: its large tensors are views of the mapped file, and memory stays file-backed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import torch

from lib_dpo.errors import BadFileError
from lib_dpo.files.hashes import file_sha256, in_background
from lib_dpo.files.header import (
    TensorInfo,
    brief,
    damaged,
    dtype_name,
    tensor_bytes,
    torch_dtype,
    unreadable,
)
from lib_dpo.files.mapped import MappedFile, OpenFile, changed, state_of
from lib_dpo.files.pickles import PickledFile
from lib_dpo.files.small import read_small

__all__ = [
    "COMPONENTS",
    "Checkpoint",
    "TensorInfo",
    "choose_weights",
    "dtype_name",
    "file_sha256",
    "open_checkpoint",
    "sha256_in_background",
    "tensor_bytes",
    "torch_dtype",
]

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")
PICKLES = (".ckpt", ".pt", ".pth")  # to look into one is to load all of it
# model.safetensors, model.fp16.safetensors, model-00001-of-00002.safetensors, model.fp16-00001-of-00002.safetensors,
# model-00001-of-00002.fp16.safetensors, model.safetensors.index.json, model.safetensors.index.fp16.json
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?(\.(?P<late>\w+))?"
    r"\.safetensors(?P<index>\.index(\.(?P<indexed>\w+))?\.json)?"
)
# names that do not tell whose weights these are
_GENERIC = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model|pytorch_lora_weights)(\.\w+)?(-\d+-of-\d+)?(\.\w+)?"
    r"|unet|text_encoder(_2)?|vae|snapshots|[0-9a-f]{40}"
)


class Checkpoint:
    """A checkpoint that is open, a file or a diffusers folder, to be read one tensor at a time.

    Made by `open_checkpoint`. `infos` is in the order of the data; `files` are all weight files that make it up.
    """

    path: Path
    name: str
    format: Literal["safetensors", "ckpt", "folder"]
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    files: tuple[Path, ...]

    def __init__(self, path: Path, kind: Literal["safetensors", "ckpt", "folder"], parts: Sequence[_Part]) -> None:
        self.path = path
        self.name = _telling_name(path, is_folder=kind == "folder")
        self.format = kind
        self.files = tuple(part.reader.path for part in parts)
        self.metadata = parts[0].reader.metadata
        self._places = {part.prefix + key: (part.reader, key) for part in parts for key in part.keys}
        self.infos = {key: reader.infos[inner] for key, (reader, inner) in self._places.items()}
        self._states = {part.reader.path: part.reader.opened.state for part in parts}

    def read(self, key: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype. It may be a view of the file: never write to it.

        It stays valid after `close`. Raises KeyError for a key that is not in `infos`, or after `close`; BadFileError where
        the file cannot be read any more, or somebody wrote to it meanwhile.
        """
        reader, inner = self._places[key]
        return reader.read(inner)

    def raw(self, key: str) -> memoryview:
        """The bytes of one tensor as stored, little-endian, whatever its dtype, also one that this torch lacks."""
        reader, inner = self._places[key]
        return reader.raw(inner)

    def sha256(self) -> str:
        """SHA-256 of the file. Of several files: of the lines "name\\0hexdigest\\n", relative names, sorted.

        Raises BadFileError where another file has the name by now.
        """
        if len(self.files) == 1:
            return self._sha256(self.files[0])
        names = {file.relative_to(self.path).as_posix(): file for file in self.files}
        lines = "".join(f"{name}\0{self._sha256(names[name])}\n" for name in sorted(names))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _sha256(self, file: Path) -> str:
        digest = file_sha256(file)
        try:
            now = state_of(file.stat())
        except OSError as error:
            raise unreadable(file, error) from error
        if now != self._states[file]:
            raise changed(file, self._states[file], now)
        return digest

    def check_unchanged(self) -> None:
        """Refuse what was read from files that somebody wrote to meanwhile. Raises BadFileError.

        For when the last tensor was used, before anything comes of it; a `with` block that ends without an error does it.
        """
        for opened in {reader.opened for reader, _ in self._places.values()}:
            opened.check()

    def close(self) -> None:
        """Let go of the files. A file stays mapped, and on Windows locked, while a tensor read from it lives."""
        self._places = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.check_unchanged()
        finally:
            self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .safetensors file, a .ckpt (with torch 2.6 or newer), or a diffusers folder, whole or of one UNet.

    Raises BadFileError for what is missing, damaged or something else, UnsafeFileError for pickles that want more
    than tensors or that this torch cannot read safely.
    """
    path = Path(path)
    try:
        is_folder, is_file, is_there = path.is_dir(), path.is_file(), path.exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, a folder above that is closed to us
        raise unreadable(path, error) from error
    if is_folder:
        return Checkpoint(path, "folder", _folder_parts(path))
    if not is_file:
        raise BadFileError(f"{path}: {'is no regular file' if is_there else 'does not exist'}; check the path")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return Checkpoint(path, "safetensors", [_whole(MappedFile(path))])
    if suffix in PICKLES:
        return Checkpoint(path, "ckpt", [_whole(PickledFile(path))])
    raise BadFileError(
        f"{path}: is {suffix or 'without a suffix'}, expected .safetensors, {', '.join(PICKLES)} "
        "or a diffusers folder; choose another file"
    )


def sha256_in_background(checkpoint: Checkpoint) -> Callable[..., str]:
    """Start hashing beside the work; call what comes back to wait for the hash, or for its error: see `in_background`."""
    return in_background(checkpoint.sha256)


def choose_weights(names: Collection[str]) -> tuple[str | None, tuple[str, ...]]:
    """Which of a folder's files are its weights: (the index or None, the files), (None, ()) where there are none.

    As in diffusers, an index with shards wins over a single file. Plain files win over variants, fp16 over others.
    """
    groups: dict[tuple[bool, bool, str, bool], list[re.Match[str]]] = {}
    for match in filter(None, map(_WEIGHTS.fullmatch, sorted(names))):
        variant = match["variant"] or match["late"] or match["indexed"] or ""
        rank = (variant != "", variant != "fp16", variant, match["stem"] == "model")
        groups.setdefault(rank, []).append(match)
    if not groups:
        return None, ()
    best = groups[min(groups)]
    index = next((match[0] for match in best if match["index"]), None)
    shards = tuple(match[0] for match in best if match["shard"] and not match["index"])
    single = tuple(match[0] for match in best if not match["shard"] and not match["index"])
    if single and not (index and shards):
        return None, single
    return index, shards


class _Reader(Protocol):
    @property
    def path(self) -> Path: ...
    @property
    def opened(self) -> OpenFile: ...
    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    def read(self, key: str) -> torch.Tensor: ...
    def raw(self, key: str) -> memoryview: ...


@dataclass(frozen=True)
class _Part:
    """One weight file of a checkpoint, the prefix that its keys get, and which of its keys count."""

    reader: _Reader
    prefix: str
    keys: Iterable[str]


def _whole(reader: _Reader, prefix: str = "") -> _Part:
    return _Part(reader, prefix, reader.infos)


def _folder_parts(path: Path) -> list[_Part]:
    names = _names_in(path)
    if "transformer" in names and "unet" not in names:
        raise BadFileError(
            f"{path}: has transformer/ in place of unet/, expected Stable Diffusion 1, 2 or XL; choose another model"
        )
    parts: list[_Part] = []
    for component in COMPONENTS:
        if component in names and (path / component).is_dir():
            parts += _component_parts(path / component, f"{component}.")
    parts = parts or _component_parts(path, "")
    if not parts:
        raise BadFileError(
            f"{path}: {'holds no weights' if names else 'is empty'}, expected a file or a diffusers folder "
            "(unet/diffusion_pytorch_model.safetensors); check the path or download it again"
        )
    return parts


def _component_parts(folder: Path, prefix: str) -> list[_Part]:
    names = _names_in(folder)
    index, files = choose_weights(names)
    if index:
        return _sharded_parts(folder, index, prefix)
    if any(re.search(r"-\d+-of-\d+", name) for name in files):
        raise damaged(folder / files[0], "it is one of several shards, and their .safetensors.index.json is missing")
    pickles = [name for name in names if name.endswith((".bin", *PICKLES))]
    if pickles and not files:
        raise BadFileError(
            f"{folder}: holds its weights as a pickle only ({pickles[0]}), expected .safetensors; "
            "download the .safetensors version, or convert it"
        )
    return [_whole(MappedFile(folder / name), prefix) for name in files]


def _sharded_parts(folder: Path, index: str, prefix: str) -> list[_Part]:
    weight_map = _weight_map(folder / index)
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise BadFileError(f"{folder / missing[0]}: is missing, {index} names it; download it too")
    readers = {name: MappedFile(folder / name) for name in shards}
    for key, name in weight_map.items():
        if key not in readers[name].infos:
            raise damaged(folder / name, f"it does not hold {brief(key)}, which {index} places there")
    return [
        _Part(reader, prefix, [key for key in reader.infos if weight_map.get(key, name) == name])
        for name, reader in readers.items()
    ]


def _weight_map(path: Path) -> dict[str, str]:
    """Key -> file name of an index of shards; the files must lie beside it."""
    try:
        weight_map: dict[str, str] = json.loads(read_small(path))["weight_map"]
        sound = all(isinstance(name, str) and Path(name).name == name for name in weight_map.values())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise damaged(path, f"it is no index of shards ({type(error).__name__})") from error
    if not weight_map or not sound:
        raise damaged(path, "it names no shards, or shards outside its own folder")
    return weight_map


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error


def _telling_name(path: Path, *, is_folder: bool) -> str:
    full = Path(os.path.abspath(path))  # not resolved: in a hub cache the links have the names, their targets not
    own = full.name if is_folder else full.stem
    for name in (own, *(parent.name for parent in full.parents)):
        if name and not _GENERIC.fullmatch(name):
            return name.rpartition("--")[2] if name.startswith("models--") else name
    return own
