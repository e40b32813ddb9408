"""Number formats: those that outputs come in, one rounding into them, and full precision while maths runs."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lib_dpo.errors import SettingError

logger = logging.getLogger(__name__)

PRECISION: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32} | (
    {"fp8": torch.float8_e4m3fn} if hasattr(torch, "float8_e4m3fn") else {}
)


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of a precision by its name in settings. Raises SettingError where this torch lacks it."""
    if precision not in PRECISION:
        raise SettingError(f"precision {precision} needs torch 2.1 or later, this is {torch.__version__}; choose fp16")
    return PRECISION[precision]


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To a dtype, in one rounding from float32; what is beyond the range of float8 becomes NaN on every torch.

    Newer torch (2.13) makes the largest number that there is of it, which nobody would notice.
    """
    if dtype.itemsize == 1:
        most, step = torch.finfo(dtype).max, torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(torch.finfo(dtype).max))
        values = values.masked_fill(values.abs() > most + step / 2, math.nan)
    return values.to(dtype)


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
    return narrowed(odd.view(torch.float32), dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast, no TF32, in products and convolutions, and no autograd inside: hosts switch the first two on.

    TF32 is a setting of the whole process: threads may be inside at once, and the last one out puts it back.
    """
    with _WITHOUT_TF32.held(), _plain():
        yield


class _Held:
    """The process's settings for whoever is inside: set by the first in, put back by the last out."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                with ExitStack() as settings:
                    settings.enter_context(_products())
                    settings.enter_context(_convolutions())
                    self._before = settings.pop_all()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._before.close()


_WITHOUT_TF32 = _Held()


@contextmanager
def _products() -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError as error:  # torch 2.9 and later: the host has set fp32_precision, and the two ways do not mix
        logger.debug("%s", error)
        with _setting(torch.backends.cuda.matmul, "fp32_precision", "ieee"):
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _convolutions() -> Iterator[None]:
    """TF32 is torch's own choice for cuDNN's convolutions, whatever the host sets."""
    cudnn = torch.backends.cudnn
    try:
        cudnn.allow_tf32  # noqa: B018  # reading it is the question: it raises where the host has set fp32_precision
    except RuntimeError as error:
        logger.debug("%s", error)
        convolutions = getattr(cudnn, "conv")  # noqa: B009  # in no stubs
        with _setting(convolutions, "fp32_precision", "ieee"):
            yield
        return
    with _setting(cudnn, "allow_tf32", False):
        yield


@contextmanager
def _setting(owner: object, name: str, value: str | bool) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _plain() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield
