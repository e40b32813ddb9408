"""stored + weight * delta bit for bit against float64 by hand, whatever the dtypes, the terms and the values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib_dpo.maths import addition
from lib_dpo.maths.addition import add_rounded
from lib_dpo.maths.delta import Product, Term, Whole, total

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
FLOAT8 = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)]


def by_hand(stored: Tensor, terms: Sequence[Term], weight: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum rounded once by numpy (bfloat16: by its bits), and the sum itself, both float64."""
    delta = np.zeros((stored.shape[0] if stored.ndim else 1, max(1, stored.numel() // max(1, len(stored)))))
    for term in terms:
        rows = slice(term.first_row, term.first_row + term.rows)
        if isinstance(term, Whole):
            delta[rows] += term.scale * term.values.double().reshape(delta[rows].shape).numpy()
        else:
            delta[rows] += term.scale * (term.up.double().numpy() @ term.down.double().numpy())
    before, change = stored.double().numpy().reshape(delta.shape), weight * delta
    exact = np.where(change == 0, before, before + change)
    if dtype == BRAIN:
        rounded = to_bfloat16(exact)
    else:
        with np.errstate(over="ignore"):
            rounded = exact.astype({HALF: np.float16, SINGLE: np.float32}[dtype]).astype(np.float64)
    return torch.from_numpy(rounded).reshape(stored.shape), torch.from_numpy(exact).reshape(stored.shape)


def to_bfloat16(exact: np.ndarray) -> np.ndarray:
    """To a multiple of the step of 8 significant bits, ties to even: exact in float64."""
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-300))), -126) - 7)
    return np.copysign(np.rint(exact / step) * step, exact)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(stored: Tensor, terms: Sequence[Term], weight: float, dtype: torch.dtype) -> None:
    found = add_rounded(stored, terms, weight, dtype)
    wanted, exact = by_hand(stored, terms, weight, dtype)
    assert found.result.dtype == dtype
    assert found.result.shape == stored.shape
    assert bits(found.result) == bits(wanted.to(dtype))
    assert found.changed == bool((wanted != stored.to(dtype).double()).any())
    change = weight * total(terms, tuple(stored.shape), torch.float64)
    assert found.wanted == pytest.approx(float(change.square().sum()), rel=1e-4, abs=1e-40)
    lost = float((wanted - exact).square().sum())
    assert math.sqrt(found.lost) == pytest.approx(math.sqrt(lost), rel=1e-2, abs=1e-6 * float(exact.abs().max()))


@st.composite
def sums(draw: st.DrawFn) -> tuple[Tensor, list[Term], float, torch.dtype]:
    """Tensors of every kind that a file may hold; on a coarse grid exact sums lie between two neighbours, as ties do."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtypes = st.sampled_from([HALF, BRAIN, SINGLE])
    grid = draw(st.sampled_from([None, 2.0**-14, 2.0**-12]))

    def values(*shape: int, size: float) -> Tensor:
        found = torch.randn(shape, generator=generator) * size
        found[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2]))] = -0.0
        return found if grid is None else (found / grid).round() * grid

    rows, kernel = draw(st.integers(1, 40)), draw(st.sampled_from([(), (3, 3)]))
    shape = (3 * rows, draw(st.integers(1, 40)), *kernel)
    columns = math.prod(shape[1:])
    small = draw(st.sampled_from([1e-7, 1e-4, 1e-2, 1.0]))
    terms: list[Term] = []
    for _ in range(draw(st.integers(1, 3))):
        height, first = draw(st.sampled_from([(3 * rows, 0), (rows, 0), (rows, rows), (rows, 2 * rows)]))
        kind = draw(st.sampled_from(["whole", "whole numbers", "product"]))
        if kind == "whole":
            scale = draw(st.sampled_from([1.0, 1.0, 1 / 3, -2.0]))
            terms.append(Whole(values(height, *shape[1:], size=small).to(draw(dtypes)), first, scale))
        elif kind == "whole numbers":
            steps = torch.randint(-127, 128, (height, *shape[1:]), generator=generator, dtype=torch.int8)
            terms.append(Whole(steps, first, draw(st.sampled_from([1.0, 1 / 3, 2.0**-14])) * small))
        else:
            rank, root = draw(st.integers(1, 70)), math.sqrt(small)
            up, down = values(height, rank, size=root).to(draw(dtypes)), values(rank, columns, size=root).to(draw(dtypes))
            terms.append(Product(up, down, draw(st.sampled_from([1.0, 0.5, 1 / 3, 0.0, -2.0])), first))
    stored = values(*shape, size=draw(st.sampled_from([0.0, 1e-6, 0.03, 1.0]))).to(draw(dtypes))
    return stored, terms, draw(st.sampled_from([1.0, -1.0, 0.8, 0.3, 2.0, 1e-3])), draw(dtypes)


@settings(max_examples=300, deadline=None)
@given(sums())
def test_the_bits_are_those_of_the_float64_sum_rounded_once(case: tuple[Tensor, list[Term], float, torch.dtype]) -> None:
    check(*case)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_a_tensor_that_lies_in_another_order(dtype: torch.dtype) -> None:
    """As those of a .ckpt may."""
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(300, 200, generator=generator) * 0.03).to(dtype).t()
    delta = torch.randn(300, 200, generator=generator).mul_(1e-3).t()
    check(stored, [Whole(delta)], 1.0, dtype)


def test_unsure_sums_are_mended_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addition, "_AT_ONCE", 1000)
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(700, 500, generator=generator) * 0.02).half()
    up, down = (torch.randn(*shape, generator=generator) * 0.02 for shape in ((700, 8), (8, 500)))
    check(stored, [Product(up.half(), down.half(), 1.0)], 1.0, HALF)


def test_nan_in_a_factor_is_nan_where_it_is_in_the_sum() -> None:
    down = torch.ones(2, 3)
    down[0, 1] = math.nan
    found = add_rounded(torch.ones(4, 3).half(), [Product(torch.ones(4, 2), down, 1.0)], 1.0, HALF)
    assert torch.isnan(found.result).any(0).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_several_tiles_and_every_one_of_many_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(700, 2500, generator=generator) * 0.03).to(dtype)
    up, down = (torch.randn(*shape, generator=generator) * 4e-3 for shape in ((700, 64), (64, 2500)))
    check(stored, [Product(up.half(), down.half(), 0.7)], 0.9, dtype)
    check(stored, [Whole(torch.randn(700, 2500, generator=generator) * 1e-4)], 1.0, dtype)


def test_float32_serves_nearly_all_values_of_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The price is that of float32 only as long as few values are unsure."""
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(512, 2048, generator=generator) * 0.03).half()
    up, down = (torch.randn(*shape, generator=generator) * 3.5e-3 for shape in ((512, 64), (64, 2048)))
    seen, at = [], addition._delta_at

    def counted(parts: addition._Parts, rows: Tensor, columns: Tensor) -> Tensor:
        seen.append(len(rows))
        return at(parts, rows, columns)

    monkeypatch.setattr(addition, "_delta_at", counted)
    monkeypatch.setattr(addition, "_exact", None)
    add_rounded(stored, [Product(up, down, 1.0)], 1.0, HALF)
    assert 0 < sum(seen) < 0.01 * stored.numel()


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, *FLOAT8])
def test_values_that_the_delta_leaves_alone_keep_their_bits(dtype: torch.dtype) -> None:
    stored = torch.tensor([[0.0, -0.0, 1.0, -1e-7, 6e-8, 440.0]] * 3).to(dtype)
    for term in (
        Whole(torch.zeros(3, 6)),
        Product(torch.zeros(3, 4), torch.ones(4, 6), 1.0),
        Product(torch.ones(3, 4), torch.ones(4, 6), 0.0),
    ):
        found = add_rounded(stored, [term], -0.7, dtype)
        assert bits(found.result) == bits(stored)
        assert not found.changed
        assert found.wanted == found.lost == 0


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_the_nearest_of_all_its_values(dtype: torch.dtype) -> None:
    """By hand: of the 256 values the nearest to the float64 sum, and of two as near the one with an even last bit."""
    codes = torch.arange(256, dtype=torch.uint8)
    table = codes.view(dtype).double()
    table, codes = table[table.isfinite()], codes[table.isfinite()]
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(64, 48, generator=generator) * 3).to(dtype)
    grid = (torch.randn(64, 48, generator=generator) * 16).round() / 64  # so that ties occur
    product = Product(torch.randn(64, 4, generator=generator), torch.randn(4, 48, generator=generator), 0.1)
    for terms in ([Whole(grid)], [product], [Whole(grid), product]):
        exact = stored.double() + total(terms, (64, 48), torch.float64)
        apart = (exact[..., None] - table).abs()
        is_near = apart == apart.amin(-1, keepdim=True)
        wanted = table[(is_near * (1 + (codes % 2 == 0))).argmax(-1)]
        assert torch.equal(add_rounded(stored, terms, 1.0, dtype).result.double(), wanted)


@pytest.mark.parametrize("huge", [1e20, 3e38, math.inf, math.nan])
def test_what_leaves_float32_on_the_way_is_the_float64_sum_or_is_seen(huge: float) -> None:
    up, down = torch.full((2, 2), huge), torch.full((2, 3), 1 / huge if huge < 1e30 else 1e-38)
    stored = torch.ones(2, 3, dtype=HALF)
    found = add_rounded(stored, [Product(up, down, 0.5)], 1.0, HALF)
    if math.isfinite(huge):
        assert bits(found.result) == bits((stored.double() + 0.5 * (up.double() @ down.double())).half())
    else:
        assert not math.isfinite(found.wanted)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_a_sum_beyond_the_dtype_shows_in_what_is_lost(dtype: torch.dtype) -> None:
    stored = torch.full((2, 2), 6e4 if dtype == HALF else 3e38).to(dtype)
    found = add_rounded(stored, [Whole(stored.float() / 2)], 1.0, dtype)
    assert not torch.isfinite(found.result).any()
    assert not math.isfinite(found.lost)


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 0)])
def test_scalars_vectors_and_empty_tensors(shape: tuple[int, ...]) -> None:
    stored = torch.ones(shape, dtype=HALF)
    found = add_rounded(stored, [Whole(torch.full(shape, 0.25))], 2.0, HALF)
    assert torch.equal(found.result, torch.full(shape, 1.5, dtype=HALF))
    assert found.changed == bool(stored.numel())
