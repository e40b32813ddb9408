"""How much of a change survives in the number format of the model that it is added to, from some of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lib_dpo.families.model import Model
from lib_dpo.maths.addition import add_rounded
from lib_dpo.maths.delta import Term, Whole, flat
from lib_dpo.maths.precision import full_precision
from lib_dpo.offsets.patch import Patch

_VALUES = 8192  # of each tensor


def survival(target: Model, patch: Patch, strength: float, dtype: torch.dtype) -> float | None:
    """The share of strength x offset that is left after one rounding to `dtype`: 1 - ||stored - exact||^2 / ||change||^2.

    The same as 1 - `BakeReport.rounding_loss` over some rows of each tensor, counted for all of it.

    Args:
        target: the file of the model, whose weights count as they are in `dtype`.
        patch: of the same architecture; not of a form that is bound to a model (DoRA, GLoRA).

    Returns:
        None where nothing would change.

    Raises:
        BadTensorError: damaged.
    """
    wanted = lost = 0.0
    with full_precision():
        for number, key in enumerate(patch.changed_keys()):
            source = target.sources.get(key)
            if source is None or len(source.keys) > 1 or source.transpose:
                continue
            whole = flat(target.checkpoint.read(source.keys[0]))
            shape = patch.offset.shapes[key]
            if len(whole) != shape[0] or whole.numel() != math.prod(shape):  # a first convolution of more channels
                continue
            count = min(len(whole), max(1, _VALUES // max(1, whole.shape[1])))
            first = number * 7919 % (len(whole) - count + 1)  # somewhere else in each tensor
            terms = _rows(patch.offset.terms(key), first, count)
            found = add_rounded(whole[first : first + count].to(dtype), terms, strength * patch.weight(key), dtype)
            wanted += found.wanted * len(whole) / count
            lost += found.lost * len(whole) / count
    return 1 - lost / wanted if wanted else None


def _rows(terms: Sequence[Term], first: int, count: int) -> list[Term]:
    """Of each term the rows that it has among `count` from `first` on, as terms of a matrix of these alone."""
    found: list[Term] = []
    for term in terms:
        begin, end = max(first, term.first_row), min(first + count, term.first_row + term.rows)
        if begin >= end:
            continue
        own = slice(begin - term.first_row, end - term.first_row)
        if isinstance(term, Whole):
            found.append(Whole(flat(term.values)[own], begin - first, term.scale))
        else:
            found.append(type(term)(term.up[own], term.down, term.scale, begin - first))
    return found
