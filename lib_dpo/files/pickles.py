"""Torch checkpoints (.ckpt, .pt, .pth), unpickled without running code from the file, or refused."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lib_dpo.errors import BadFileError, BadTensorError, DpoError, UnsafeFileError
from lib_dpo.files.foreign import pickled_kind
from lib_dpo.files.header import (
    TensorInfo,
    brief,
    damaged,
    dtype_name,
    mistaken_for,
    tensor_bytes,
    unreadable,
)
from lib_dpo.files.mapped import OpenFile
from lib_dpo.files.pickle_scan import check_pickles, runs_code

_SAFE_PICKLES_SINCE = (2, 6)  # of torch: before, weights_only could be escaped (CVE-2025-32434)


class PickledFile:
    """A torch checkpoint, unpickled without running code; its tensors are mapped where the file is a zip archive."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.opened = OpenFile(path, file)
        except OSError as error:
            raise unreadable(path, error) from error
        content = _unpickle(path)
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        if not isinstance(content, Mapping):
            raise BadFileError(f"{path}: holds a {type(content).__name__}, expected a state_dict; choose another file")
        self._tensors = {
            key: _plain(path, key, tensor)
            for key, value in content.items()
            if isinstance(key, str) and isinstance(tensor := _number(key, value), torch.Tensor)
        }
        if found := pickled_kind(content):
            raise BadFileError(f"{path}: is {found.title}, expected the tensors of a model; {found.advice}")
        if not self._tensors:
            raise BadFileError(f"{path}: holds no tensors, expected a state_dict; choose another file")
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self.infos = {
            key: TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.numel() * tensor.element_size())
            for key, tensor in self._tensors.items()
        }

    def read(self, key: str) -> torch.Tensor:
        self.opened.check()
        return self._tensors[key]

    def raw(self, key: str) -> memoryview:
        return tensor_bytes(self.read(key))


def _unpickle(path: Path) -> Any:
    if tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) < _SAFE_PICKLES_SINCE:
        raise UnsafeFileError(
            f"{path}: torch {torch.__version__} cannot read pickles safely (CVE-2025-32434), expected torch 2.6; "
            "convert the file to .safetensors, or upgrade torch"
        )
    try:
        with path.open("rb") as file:
            head = file.read(10)
    except OSError as error:
        raise unreadable(path, error) from error
    is_zip = head.startswith(b"PK\x03\x04")
    what = "a safetensors file" if head[8:] == b'{"' else mistaken_for(head)
    if what and not is_zip and not head.startswith(b"\x80"):
        raise BadFileError(f"{path}: is {what}, expected a torch checkpoint; rename it or download it again")
    try:
        check_pickles(path, is_zip=is_zip)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters raises an error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise runs_code(path, code[1] if code else "not a plain state_dict") from error
    except DpoError:
        raise
    except Exception as error:  # a damaged pickle makes torch.load raise anything: KeyError, IndexError, RuntimeError
        raise damaged(path, f"it cannot be read as a torch checkpoint ({type(error).__name__})") from error


def _number(key: str, value: Any) -> Any:
    """A LoRA's alpha as a tensor where it is a plain number, as kohya's scripts take it too; everything else as it is."""
    is_alpha = key.endswith(".alpha") and isinstance(value, (int, float)) and not isinstance(value, bool)
    return torch.tensor(float(value), dtype=torch.float64) if is_alpha else value


def _plain(path: Path, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Refuse what is no plain row of numbers held by the file, such as one number spread over terabytes."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise BadTensorError(
            f"{path}: {brief(key)} is {tensor.layout} {tensor.dtype} on {tensor.device}, expected a plain tensor; "
            "convert the file to .safetensors"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise BadTensorError(f"{path}: {brief(key)} is larger than the data stored for it; download the file again")
    return tensor.detach()
