"""Weights as a few characters: by what an undo and the tests know that a live model is bit-equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lib_dpo.files.header import tensor_bytes


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf; looks at each only where their sum is not finite, which is 20 times as fast."""
    readable = tensor.float() if tensor.element_size() == 1 else tensor  # torch has neither sum nor isfinite for float8
    return bool(torch.isfinite(readable.sum(dtype=torch.float32))) or bool(torch.isfinite(readable).all())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, by sorted name. A host that turns float16 into float32 changes no value."""
    sha256 = hashlib.sha256()
    for key in sorted(tensors):
        values = narrowest(tensors[key].detach())
        sha256.update(f"{key} {values.dtype} ".encode())
        sha256.update(tensor_bytes(values))
    return sha256.hexdigest()


def checksum(tensors: Mapping[str, Tensor], *, stored: bool = False) -> str:
    """Of sums over blocks of 8 kB of the same: ten times as fast as `digest`.

    It notices whatever else than an intent to deceive changes weights.

    Args:
        stored: of the bits as they are stored, which is faster where no host turns one dtype into another.
    """
    sha256 = hashlib.sha256()
    for key in sorted(tensors):
        values = tensors[key].detach() if stored else narrowest(tensors[key].detach())
        data = values.contiguous().view(-1).view(torch.uint8)
        if data.storage_offset() % 8:
            data = data.clone()
        blocks = data.numel() // _BLOCK
        sums = data[: blocks * _BLOCK].view(torch.int64).view(blocks, _BLOCK // 8).sum(1)  # wraps around
        sha256.update(f"{key} {values.dtype} {data.numel()} ".encode())
        sha256.update(tensor_bytes(sums.cpu()))
        sha256.update(tensor_bytes(data[blocks * _BLOCK :].cpu()))
    return sha256.hexdigest()


_BLOCK = 8192  # bytes


def narrowest(tensor: Tensor) -> Tensor:
    """The same values in the smallest of bfloat16, float16 and float32 that holds them all; other dtypes as they are."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return tensor
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.dtype is dtype or _holds(dtype, tensor):
            return tensor.to(dtype)
    return tensor


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether the values survive this dtype; the first few settle it for most weights."""
    return all(torch.equal(part.to(dtype).to(part.dtype), part) for part in (tensor.reshape(-1)[:_FEW], tensor))


_FEW = 4096
