"""A delta as the sum of the terms that it is stored as: whole matrices, and products of two factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """scale * values, as it is stored: of any float dtype or int8, and of any shape with `rows` rows. It may view a file."""

    values: Tensor
    first_row: int = 0
    scale: float = 1.0

    @property
    def rows(self) -> int:
        return self.values.shape[0] if self.values.ndim else 1


@dataclass(frozen=True)
class Product:
    """scale * up @ down; up (rows, rank), down (rank, columns), of any float dtype."""

    up: Tensor
    down: Tensor
    scale: float
    first_row: int = 0

    @property
    def rows(self) -> int:
        return self.up.shape[0]


Term = Whole | Product


def total(terms: Sequence[Term], shape: Shape, dtype: torch.dtype) -> Tensor:
    """The sum of terms as one tensor of this shape, computed in `dtype`. A single whole term in it comes as it is."""
    if len(terms) == 1 and isinstance(terms[0], Whole) and terms[0].values.numel() == math.prod(shape):
        values = terms[0].values.to(dtype).reshape(shape)
        return values if terms[0].scale == 1.0 else values * terms[0].scale
    delta = torch.zeros(shape, dtype=dtype)
    for term in terms:
        rows = delta[term.first_row : term.first_row + term.rows]
        if isinstance(term, Whole):
            rows.add_(term.values.to(dtype).reshape(rows.shape), alpha=term.scale)
        else:
            rows.add_((term.up.to(dtype) @ term.down.to(dtype)).reshape(rows.shape), alpha=term.scale)
    return delta


def flat(tensor: Tensor) -> Tensor:
    """A tensor as a matrix with its rows: (out, in * kh * kw) of a convolution, (n, 1) of a vector."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
