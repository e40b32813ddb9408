"""stored + weight * delta with one rounding: the bits of the sum in float64, at the price of float32.

For half precision and below the sum is formed in float32, with a bound on its error. Rounding never turns an order
around: where the lower and the upper end of what the exact sum can be round to the same bits, those are its bits. The few
values where they do not, one in a thousand to one in ten, are computed again in float64. Targets in float32 get float64
throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lib_dpo.maths.delta import Product, Term, Whole, flat
from lib_dpo.maths.precision import narrowed, round_once

_TILE, _COLUMNS = 1 << 18, 2048  # values and columns at most: larger ones leave the cache, smaller ones cost calls
_AT_ONCE = 1 << 20  # numbers in float64, a few of which are held for each unsure value and component: 24 MB
_UNIT = 2.0**-24  # half the distance of neighbours in float32, relative
_HUGE = 1e15  # factors and deltas from which on float32 might overflow
_TINY = 1e-35  # more than what underflow in float32 takes from a product
_MANY = 8  # where one value in so many is unsure, a product of matrices is cheaper than as many scalar products
_BITS = {1: torch.uint8, 2: torch.int16}
_Tile = tuple[slice, slice]
_Places = tuple[Tensor, Tensor]  # rows and columns


@dataclass(frozen=True)
class Sum:
    """The result, ||weight * delta||^2, ||result - exact sum||^2, and whether any value differs from the stored one."""

    result: Tensor
    wanted: float
    lost: float
    changed: bool


def add_rounded(stored: Tensor, terms: Sequence[Term], weight: float, dtype: torch.dtype) -> Sum:
    """Add a delta to a tensor in one rounding, ties to even. Values that the delta leaves alone keep their bits.

    To be called where autocast and TF32 are off.

    Args:
        stored: any float dtype and shape, on the CPU; not written to.
        terms: of the delta; their rows are those of `stored`.
        dtype: of the result. Values beyond it become Inf, or NaN in some kinds of float8.
    """
    result = torch.empty(stored.shape, dtype=dtype)
    if not result.numel():
        return Sum(result, 0.0, 0.0, changed=False)
    old, new = flat(stored).contiguous(), flat(result)  # tensors of a .ckpt may lie in another order
    parts = [_Factors(term) if isinstance(term, Product) else _Matrix(term) for term in terms]
    is_near = new.element_size() <= 2 and old.element_size() <= 4 and all(part.size < _HUGE for part in parts)
    wanted = lost = 0.0
    unsure: list[_Places] = []
    for tile in _tiles(old):
        found = _near(old[tile], parts, tile, weight, dtype) if is_near else None
        if found is None:
            new[tile], change, missed = _exact(old[tile], parts, tile, weight, dtype)
        else:
            new[tile], change, missed, places = found
            unsure.append(places)
        wanted += _energy(change)
        lost += _energy(missed)
    for rows, columns in _gathered(unsure, max(part.rank for part in parts) if parts else 1):
        sums, exact = _rounded(_picked(old, rows, columns), _delta_at(parts, rows, columns).mul_(weight), dtype)
        _bits(new)[rows, columns] = _bits(sums)
        lost += _energy(sums.double().sub_(exact))
    return Sum(result, wanted * weight * weight, lost, changed=_differ(new, old, dtype))


def _gathered(unsure: Sequence[_Places], rank: int) -> Iterator[_Places]:
    """The places of all tiles, as many at once as memory allows: each of the many small steps costs a call."""
    if unsure:
        rows, columns = (torch.cat(each) for each in zip(*unsure, strict=True))
        step = max(1, _AT_ONCE // max(1, rank))
        yield from ((rows[start : start + step], columns[start : start + step]) for start in range(0, len(rows), step))


def _differ(new: Tensor, old: Tensor, dtype: torch.dtype) -> bool:
    if dtype == old.dtype and dtype.itemsize > 1:
        return not torch.equal(new, old)
    return any(bool((new[tile].float() != old[tile].to(dtype).float()).any()) for tile in _tiles(old))


def _tiles(matrix: Tensor) -> Iterator[_Tile]:
    rows, columns = matrix.shape
    wide = min(columns, _COLUMNS)
    high = max(1, _TILE // wide)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            yield slice(top, min(top + high, rows)), slice(left, min(left + wide, columns))


def _energy(tile: Tensor) -> float:
    """||tile||^2; a scalar product takes less than half of the time of a norm."""
    flat = tile.reshape(-1)
    return float(torch.dot(flat, flat))


def _largest(values: Tensor) -> float:
    """The largest |value|, NaN where there is one; a sixth of the time of the norm of that name."""
    if not values.numel():
        return 0.0
    least, most = torch.aminmax(values.float() if values.element_size() <= 2 else values)  # torch 2.1 has none of float16
    return max(abs(float(least)), abs(float(most)))


class _Matrix:
    """A whole term: what of a tile it gives, and how far its float32 is from it."""

    def __init__(self, term: Whole) -> None:
        self.first_row, self.rows, self.rank, self._scale = term.first_row, term.rows, 1, term.scale
        self._values = flat(term.values)
        self.size = _largest(self._values) * abs(term.scale)

    def tile(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        values = self._values[rows, columns].to(dtype)
        return values if self._scale == 1.0 else values * self._scale

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        values = _picked(self._values, rows, columns).double()
        return values if self._scale == 1.0 else values * self._scale

    def error(self, rows: slice, columns: slice, others: int) -> float:
        return self.size * (8 + 2 * others) * _UNIT + _TINY


class _Factors:
    """The same of a product.

    A scalar product of n terms is off by at most (n + 2) u ||x|| ||y||, in whatever order they are added, with or without
    fused operations (Higham 2002, section 3.1, and Cauchy-Schwarz). The rest is for conversion, scale and weight, and for
    adding terms up; _TINY for underflow.
    """

    def __init__(self, term: Product) -> None:
        self.first_row, self.rows, self._term = term.first_row, term.rows, term
        self._up, self._down = term.up.float() * term.scale, term.down.float()
        self._row_norms = torch.linalg.vector_norm(self._up, dim=1)
        self._column_norms = torch.linalg.vector_norm(self._down, dim=0)
        self.rank = term.up.shape[1]
        up, down = (float(norms.max()) if norms.numel() else 0.0 for norms in (self._row_norms, self._column_norms))
        self.size = max(up, down, up * down, abs(term.scale)) if up == up and down == down else math.inf  # NaN: bit for bit too
        self._underflow = _TINY * self.rank * (1 + up) * (1 + down) * (1 + abs(term.scale))

    @cached_property
    def _exact(self) -> tuple[Tensor, Tensor]:
        return self._term.up.double(), self._term.down.double().T.contiguous()

    def tile(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float32:
            return self._up[rows] @ self._down[:, columns]
        up, down = self._exact
        return (up[rows] @ down[columns].T).mul_(self._term.scale)

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        up, down = self._exact
        return (up[rows] * down[columns]).sum(1).mul_(self._term.scale)

    def error(self, rows: slice, columns: slice, others: int) -> float:
        norms = float(self._row_norms[rows].max()) * float(self._column_norms[columns].max())
        return norms * (self.rank + 8 + 2 * others) * _UNIT + self._underflow


_Parts = Sequence[_Matrix | _Factors]


def _delta(parts: _Parts, tile: _Tile, dtype: torch.dtype) -> Tensor:
    """A tile of the delta; it may be a view of what is stored."""
    rows, columns = tile
    if len(parts) == 1 and parts[0].first_row == 0 and rows.stop <= parts[0].rows:
        return parts[0].tile(rows, columns, dtype)
    delta = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=dtype)
    for part, own, place in _overlaps(parts, rows):
        delta[place] += part.tile(own, columns, dtype)
    return delta


def _error(parts: _Parts, tile: _Tile) -> float:
    """How far a value of a tile of the float32 delta may be from the exact one."""
    return sum(part.error(own, tile[1], len(parts)) for part, own, _ in _overlaps(parts, tile[0]))


def _overlaps(parts: _Parts, rows: slice) -> Iterator[tuple[_Matrix | _Factors, slice, slice]]:
    """Parts that have some of the rows, with these as their own rows and as rows of the tile."""
    for part in parts:
        first, last = max(rows.start, part.first_row), min(rows.stop, part.first_row + part.rows)
        if first < last:
            shift = part.first_row
            yield part, slice(first - shift, last - shift), slice(first - rows.start, last - rows.start)


def _delta_at(parts: _Parts, rows: Tensor, columns: Tensor) -> Tensor:
    """Single values of the delta, float64."""
    if len(parts) == 1 and parts[0].first_row == 0 and int(rows.max()) < parts[0].rows:
        return parts[0].at(rows, columns)
    delta = torch.zeros(len(rows), dtype=torch.float64)
    for part in parts:
        own = rows - part.first_row
        inside = ((own >= 0) & (own < part.rows)).nonzero().flatten()
        delta[inside] += part.at(own[inside], columns[inside])
    return delta


def _rounded(stored: Tensor, change: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """stored + change of a float64 change, in one rounding, and before it."""
    before = stored.double()
    # -0.0 + 0.0 would lose its sign
    exact = torch.where(change == 0, before, before + change)
    return round_once(exact, dtype), exact


def _exact(stored: Tensor, parts: _Parts, tile: _Tile, weight: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A tile of the sum, of the delta, and what rounding took from the sum."""
    delta = _delta(parts, tile, torch.float64)
    sums, exact = _rounded(stored, delta * weight, dtype)
    return sums, delta, sums.double().sub_(exact)


def _near(
    stored: Tensor, parts: _Parts, tile: _Tile, weight: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, _Places] | None:
    """The same by way of float32, and where of the whole tensor its bits are unsure; None where that is at many places.

    The bound holds the rounding of the sum and of its bounds, one unit each, and one for what is rounded in computing it.
    What rounding took counts as 0 where it is unsure.
    """
    delta, before = _delta(parts, tile, torch.float32), stored.float()
    middle = torch.add(before, delta, alpha=weight)
    error = torch.tensor(abs(weight) * _error(parts, tile) + _TINY)
    bound = torch.add(error, middle.abs(), alpha=3 * _UNIT)
    low, sums = narrowed(torch.sub(middle, bound), dtype), narrowed(bound.add_(middle), dtype)
    unsure = np.flatnonzero(_bits(low).numpy() != _bits(sums).numpy())
    if len(unsure) * _MANY > sums.numel():
        return None
    rows, columns = map(torch.from_numpy, np.divmod(unsure, sums.shape[1]))
    places = rows + tile[0].start, columns + tile[1].start
    missed = middle.sub_(sums.float() if sums.element_size() == 1 else sums)  # float8 takes no part in arithmetic
    missed[rows, columns] = 0
    return sums, delta, missed, places


def _picked(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    if matrix.element_size() == 1:  # older torch picks no values out of float8
        return _bits(matrix)[rows, columns].view(matrix.dtype)
    return matrix[rows, columns]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])
