"""A few values of each edited tensor, by which the edit is known again in milliseconds without hashing the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["edited", "gone", "mixed"]

_SAMPLES, _CANDIDATES = 16, 512  # values kept of each tensor, and those they are chosen from
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@dataclass(frozen=True)
class Marks:
    """The values that edits changed most, as bits."""

    keys: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    index: Tensor  # (n, k), positions in row-major order
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
        """(n, k) bits of the marks' own dtypes; one transfer for each device and dtype.

        A1111 casts some layers to float32 while they run, and a copy that was put aside meanwhile stays float32.
        """
        indexes: dict[torch.device, Sequence[Tensor]] = {}
        rows: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        numbers: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        with torch.no_grad():
            for n, key in enumerate(self.keys):
                for tensor in read(key):
                    place = tensor.device, self.dtypes[n]
                    if tensor.device not in indexes:
                        indexes[tensor.device] = self.index.to(tensor.device).unbind()
                    row = _bits_at(tensor, indexes[tensor.device][n])
                    if tensor.dtype is not self.dtypes[n]:
                        row = _bits_of(row.view(tensor.dtype).to(self.dtypes[n]))
                rows.setdefault(place, []).append(row)
                numbers.setdefault(place, []).append(n)
            found = torch.empty_like(self.after)
            for place, own in rows.items():
                found[numbers[place]] = torch.stack(own).cpu().long()
        return found


@dataclass
class Marker:
    """Takes marks while tensors are edited: `before` a tensor is written to, `after` it was."""

    _keys: list[str] = field(default_factory=list)
    _dtypes: list[torch.dtype] = field(default_factory=list)
    _rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def before(self, tensor: Tensor) -> Tensor:
        """Bits of a tensor that is about to be written to."""
        return _bits_at(tensor, _candidates(tensor.numel()).to(tensor.device))

    def after(self, key: str, tensor: Tensor, before: Tensor) -> None:
        """Keep the candidates that changed most.

        Args:
            before: what `before` gave for this tensor.
        """
        candidates = _candidates(tensor.numel())
        after = _bits_at(tensor, candidates.to(tensor.device))
        change = after.view(tensor.dtype).float() - before.view(tensor.dtype).float()
        most = change.abs().topk(min(_SAMPLES, change.numel())).indices.cpu()
        most = most.repeat(math.ceil(_SAMPLES / most.numel()))[:_SAMPLES]
        self._keys.append(key)
        self._dtypes.append(tensor.dtype)
        self._rows.append((candidates[most], before.cpu()[most].long(), after.cpu()[most].long()))

    def marks(self) -> Marks:
        """All marks taken so far."""
        index, before, after = (torch.stack(column) for column in zip(*self._rows, strict=True))
        return Marks(tuple(self._keys), tuple(self._dtypes), index, before, after)


@lru_cache(maxsize=256)
def _candidates(numel: int) -> Tensor:
    """Positions spread over a tensor with so many values."""
    count = min(numel, _CANDIDATES)
    return torch.arange(count) * numel // count


def _bits_at(tensor: Tensor, positions: Tensor) -> Tensor:
    """Bits of single values, as integers of the same size; `take` counts in row-major order whatever the memory format."""
    return _bits_of(tensor).take(positions)


def _bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])
