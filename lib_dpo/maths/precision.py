"""The number formats that outputs come in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PRECISION: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to a narrower floating-point dtype in one rounding, ties to even.

    torch itself goes by float32 and rounds twice. Rounding to odd there (towards zero, last bit set when inexact) makes
    the second rounding the only one (Boldo & Melquiond 2008, Emulation of FMA and correctly rounded sums).
    """
    if dtype in (torch.float64, torch.float32):
        return exact.to(dtype)
    near = exact.float()
    bits = near.view(torch.int32)
    beyond = near.double().abs() > exact.abs()
    odd = torch.where(near.double() == exact, bits, (bits - beyond.int()) | 1)
    return odd.view(torch.float32).to(dtype)
