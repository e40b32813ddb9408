"""Where the maths runs: choosing a device, telling "out of memory" apart, and the size of a batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lib_dpo.errors import NoMemoryError, SettingError, did_you_mean

logger = logging.getLogger(__name__)

_GPU_BATCH_BYTES = 1 << 29  # float32 bytes of deltas in one batch on a GPU; work space is about three times that


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` (ROCm too), `mps` -> a device that is there.

    Raises:
        SettingError: unknown, or not on this machine.
    """
    name = name.strip().lower()
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        meant = did_you_mean("cuda" if name in ("gpu", "nvidia") else name, ("auto", "cpu", "cuda", "cuda:1", "mps"))
        raise SettingError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:1 or mps{meant}") from None
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise SettingError(f"device {name!r} is not on this machine; choose auto or cpu")
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device or the machine out of memory: by class, or by the messages of torch and its libraries."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    # safetensors 0.4 has an OSError without a number for a file that cannot be mapped
    return isinstance(error, RuntimeError | OSError) and any(mark in str(error) for mark in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP, MPS
    "ALLOC_FAILED",  # cuBLAS, cuSOLVER, cuDNN
    "can't allocate memory",  # torch on the CPU
    "not enough memory",  # the same on Windows
    "Cannot allocate memory",  # mapping a file
)
_OF_THE_GPU = ("CUDA", "HIP", "MPS", "ALLOC_FAILED")


@contextmanager
def memory_in_words(what: str, advice: str) -> Iterator[None]:
    """Have `what` raise NoMemoryError with `advice` where memory runs out. torch's own words go to the log."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("%s ran out of memory", what, exc_info=True)
        on_gpu = isinstance(error, torch.cuda.OutOfMemoryError) or any(mark in str(error) for mark in _OF_THE_GPU)
        raise NoMemoryError(f"{what}: {'the GPU' if on_gpu else 'the machine'} is out of memory; {advice}") from error


def release(device: torch.device) -> None:
    """Give cached memory back to the device after it ran out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def batch_size(device: torch.device, numel: int) -> int:
    """How many matrices of `numel` float32 values to work on at once: one on the CPU, where a batch gains nothing."""
    if device.type == "cpu":
        return 1
    return max(1, _GPU_BATCH_BYTES // (4 * numel))
