"""A few values of each edited tensor, by which the edit is known again in milliseconds without hashing the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lib_dpo.arch import Shape

Verdict = Literal["edited", "gone", "mixed"]

_SAMPLES, _CANDIDATES = 16, 4096  # values kept of each tensor, and those they are chosen from
_DIMENSIONS = 4  # of the largest tensors, convolutions
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@dataclass(frozen=True)
class Marks:
    """The values that edits changed most, as bits."""

    keys: tuple[str, ...]
    index: Tensor  # (n, dimensions, k)
    before: Tensor  # (n, k)
    after: Tensor  # (n, k)

    def compare(self, read: Callable[[str], Iterable[Tensor]]) -> Verdict:
        """Whether weights are the edited ones, all others, or a mixture. Tensors that rounding left alone tell nothing.

        Args:
            read: the tensor of a key, then what counts in its place, if anything. Each is read before the next is asked
                for: another thread may put an original aside and then change the tensor, and one of the two is right.
        """
        found = self._sample(read)
        same = (found == self.after).all(1)
        if bool(same.all()):
            return "edited"
        telling = (self.before != self.after).any(1)
        return "mixed" if bool((same & telling).any()) else "gone"

    def _sample(self, read: Callable[[str], Iterable[Tensor]]) -> Tensor:
        """(n, k) bits; one transfer for each device that holds weights."""
        indexes: dict[torch.device, Tensor] = {}
        rows: dict[torch.device, list[Tensor]] = {}
        numbers: dict[torch.device, list[int]] = {}
        for n, key in enumerate(self.keys):
            for tensor in read(key):
                device = tensor.device
                if device not in indexes:
                    indexes[device] = self.index.to(device)
                row = _bits_at(tensor, indexes[device][n]).long()
            rows.setdefault(device, []).append(row)
            numbers.setdefault(device, []).append(n)
        found = torch.empty_like(self.after)
        for device, own in rows.items():
            found[numbers[device]] = torch.stack(own).cpu()
        return found


@dataclass
class Marker:
    """Takes marks while tensors are edited: `before` a tensor is written to, `after` it was."""

    _keys: list[str] = field(default_factory=list)
    _rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def before(self, tensor: Tensor) -> Tensor:
        return _bits_at(tensor, _candidates(tuple(tensor.shape)).to(tensor.device))

    def after(self, key: str, tensor: Tensor, before: Tensor) -> None:
        """Keep the candidates that changed most.

        Args:
            before: what `before` gave for this tensor.
        """
        candidates = _candidates(tuple(tensor.shape))  # (dimensions, candidates)
        after = _bits_at(tensor, candidates.to(tensor.device))
        change = after.view(tensor.dtype).float() - before.view(tensor.dtype).float()
        most = change.abs().topk(min(_SAMPLES, change.numel())).indices.cpu()
        most = most.repeat(math.ceil(_SAMPLES / most.numel()))[:_SAMPLES]
        self._keys.append(key)
        self._rows.append((candidates[:, most], before.cpu()[most].long(), after.cpu()[most].long()))

    def marks(self) -> Marks:
        index, before, after = (torch.stack(column) for column in zip(*self._rows, strict=True))
        return Marks(tuple(self._keys), index, before, after)


@lru_cache(maxsize=256)
def _candidates(shape: Shape) -> Tensor:
    """Positions spread over a tensor of this shape, (dimensions, candidates); rows beyond its own dimensions are 0."""
    numel = math.prod(shape)
    flat = torch.arange(min(numel, _CANDIDATES)) * numel // min(numel, _CANDIDATES)
    index = torch.zeros(_DIMENSIONS, len(flat), dtype=torch.long)
    for dimension in reversed(range(len(shape))):
        index[dimension] = flat % shape[dimension]
        flat = flat // shape[dimension]
    return index


def _bits_at(tensor: Tensor, index: Tensor) -> Tensor:
    """Bits of single values, as integers of the same size; the memory format of the tensor does not matter."""
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    return bits[tuple(index[: bits.ndim])]
