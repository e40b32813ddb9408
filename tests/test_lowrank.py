"""Low rank, against float64 SVD by hand: properties rather than numbers, as scikit-learn tests its randomized_svd."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from lib_dpo.maths import lowrank
from lib_dpo.maths.lowrank import factorise, recompress, seed_for, singular_values
from lib_dpo.maths.precision import full_precision, narrowed, round_once


def matrix(out: int, in_: int, exponent: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float32 matrix with singular values i^-exponent, and these values in float64."""
    generator = torch.Generator().manual_seed(seed)
    short = min(out, in_)
    U = torch.linalg.qr(torch.randn(out, short, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(in_, short, generator=generator, dtype=torch.float64))[0]
    S = torch.arange(1, short + 1, dtype=torch.float64) ** -exponent
    return ((U * S) @ V.T).float(), S


def kept(A: Tensor, up: Tensor, down: Tensor) -> float:
    """Energy kept, in float64."""
    rest = A.double() - up.double() @ down.double()
    return float(1 - rest.square().sum() / A.double().square().sum())


@pytest.mark.parametrize("exponent", [0.15, 0.3, 0.7])
@pytest.mark.parametrize("rank", [8, 16, 64, 96])
@pytest.mark.parametrize("shape", [(640, 640), (320, 2880), (1280, 320)])
def test_randomized_keeps_999_thousandths_of_the_optimum_on_flat_spectra(
    exponent: float, rank: int, shape: tuple[int, int]
) -> None:
    A, S = matrix(*shape, exponent)
    up, down, values = factorise(A, rank, method="randomized")
    optimum = float(S[:rank].square().sum() / S.square().sum())
    assert kept(A, up, down) >= 0.999 * optimum
    assert torch.all(values[:-1] >= values[1:] * (1 - 1e-5))


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64), (5, 200)])
def test_exact_equals_the_truncated_svd(shape: tuple[int, int]) -> None:
    A, S = matrix(*shape, 0.5)
    rank = min(shape) // 2 or 1
    up, down, values = factorise(A, rank, method="exact")
    U, S64, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    best = (U[:, :rank] * S64[:rank]) @ Vh[:rank]
    torch.testing.assert_close((up @ down).double(), best, atol=2e-6, rtol=0)
    torch.testing.assert_close(values.double(), S64[:rank], atol=1e-6, rtol=1e-5)
    assert torch.allclose(singular_values(A), S, atol=3e-4)


def test_factors_are_balanced() -> None:
    A, _ = matrix(80, 120, 0.4)
    up, down, values = factorise(A, 8, method="exact")
    torch.testing.assert_close(up.square().sum(0), values, rtol=1e-4, atol=0)
    torch.testing.assert_close(down.square().sum(1), values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_low_rank_matrix_comes_back_exactly_at_a_higher_rank(method: str) -> None:
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(300, 5, generator=generator) @ torch.randn(5, 500, generator=generator)
    up, down, values = factorise(A, 24, method=method)  # type: ignore[arg-type]
    assert kept(A, up, down) > 1 - 1e-9
    assert torch.isfinite(up).all()
    assert torch.isfinite(down).all()
    assert float(values[5] / values[0]) < 1e-3


def test_a_zero_matrix_gives_zero_factors() -> None:
    for method in ("exact", "randomized"):
        up, down, _ = factorise(torch.zeros(200, 300), 8, method=method)  # type: ignore[arg-type]
        assert not (up @ down).any()
        assert torch.isfinite(up).all()
        assert torch.isfinite(down).all()


def test_transposing_the_matrix_transposes_the_factors() -> None:
    A, _ = matrix(120, 200, 0.3)
    up, down, _ = factorise(A, 10, method="randomized")
    up_t, down_t, _ = factorise(A.T.contiguous(), 10, method="randomized")
    torch.testing.assert_close(up @ down, (up_t @ down_t).T, atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_bits_and_another_seed_the_same_energy() -> None:
    A, _ = matrix(640, 1280, 0.3)
    first, again = (factorise(A, 16, method="randomized", seeds=(7,)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = factorise(A, 16, method="randomized", seeds=(8,))
    assert not torch.equal(first.up, other.up)
    assert kept(A, other.up, other.down) == pytest.approx(kept(A, first.up, first.down), rel=1e-3)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_batch_gives_what_its_matrices_give_alone(method: str) -> None:
    matrices = [matrix(160, 240, exponent, seed)[0] for seed, exponent in enumerate((0.2, 0.5, 1.0))]
    batch = factorise(torch.stack(matrices), 8, method=method, seeds=(1, 2, 3))  # type: ignore[arg-type]
    for n, A in enumerate(matrices):
        alone = factorise(A, 8, method=method, seeds=(n + 1,))  # type: ignore[arg-type]
        torch.testing.assert_close(batch.up[n] @ batch.down[n], alone.up @ alone.down, atol=1e-5, rtol=0)


def test_more_blocks_never_keep_less() -> None:
    A, _ = matrix(640, 640, 0.1)
    energies = [kept(A, *factorise(A, 32, method="randomized", blocks=blocks)[:2]) for blocks in (2, 4, 6, 8)]
    assert energies == sorted(energies)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.5, 4.0, 8.0])
def test_krylov_blocks_are_orthonormal_to_all_before_them(exponent: float) -> None:
    A, _ = matrix(300, 400, exponent)
    basis = torch.empty(1, 0, 300)
    X = torch.randn(1, 8, 300, generator=torch.Generator().manual_seed(0))
    for _ in range(12):
        basis = torch.cat((basis, lowrank._orthonormal(X, basis)), dim=1)
        X = basis[:, -8:] @ A @ A.mT
    # a few hundred times eps where A has lost rank, 1e-5 else; it enters the energy kept by its square
    torch.testing.assert_close(basis @ basis.mT, torch.eye(96)[None], atol=1e-4 if exponent > 1 else 1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(96, 130), (130, 96)])
def test_panels_give_what_one_product_gives(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "_PANEL", 40)
    A = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    A = A if shape[0] < shape[1] else A.mT
    X, image = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(1)), torch.empty(2, 7, 130)
    back = lowrank._there_and_back(A.expand(2, -1, -1), X, image)
    torch.testing.assert_close(image, X @ A)
    torch.testing.assert_close(back, X @ A @ A.mT, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_a_rank_outside_the_matrix_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.40"):
        factorise(torch.ones(40, 50), rank)


def test_auto_takes_the_exact_method_for_small_and_the_randomized_for_large_matrices() -> None:
    assert lowrank.choose_method(36, 320, 16) == "exact"
    assert lowrank.choose_method(1280, 1280, 64) == "randomized"
    assert lowrank.choose_method(1280, 11520, 64) == "randomized"
    assert lowrank.choose_method(1280, 1280, 1280) == "exact"


def test_recompress_is_the_svd_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(70, 12, generator=generator), torch.randn(12, 90, generator=generator)
    U, S, Vh = recompress(up, down)
    expected = torch.linalg.svdvals(up.double() @ down.double())[:12]
    torch.testing.assert_close(S, expected)
    torch.testing.assert_close((U * S) @ Vh, up.double() @ down.double())


def test_full_precision_restores_what_it_changes() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32  # of convolutions
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32  # torch's own choice
    finally:
        torch.set_float32_matmul_precision("highest")


def test_full_precision_is_put_back_by_the_last_of_two_threads() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        one, other = full_precision(), full_precision()
        with ThreadPoolExecutor(1) as elsewhere:
            one.__enter__()
            elsewhere.submit(other.__enter__).result()
            one.__exit__(None, None, None)
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            elsewhere.submit(other.__exit__, None, None, None).result()
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.newest
def test_full_precision_beside_a_host_that_uses_the_newer_setting() -> None:
    script = """
import torch
torch.backends.cuda.matmul.fp32_precision = "tf32"
from lib_dpo.maths.precision import full_precision
with full_precision():
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
assert torch.backends.cuda.matmul.fp32_precision == "tf32"
cudnn = torch.backends.cudnn
cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "tf32", "ieee"
with full_precision():
    assert cudnn.conv.fp32_precision == "ieee"
assert cudnn.conv.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_what_is_beyond_float8_is_no_number_on_any_torch(kind: str) -> None:
    """Newer torch makes the largest number there is of it."""
    dtype = getattr(torch, kind)
    most = torch.finfo(dtype).max
    values = torch.tensor([0.0, 1.0, -most, most * 1.01, most * 1.2, -1e9])
    found = narrowed(values, dtype).float()
    assert found[:4].tolist() == [0.0, 1.0, -most, most]
    assert not torch.isfinite(found[4:]).any()
    assert not torch.isfinite(round_once(values[4:].double(), dtype).float()).any()


def test_works_under_autocast_and_on_inference_tensors() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        A, _ = matrix(64, 96, 0.5)
        with full_precision():
            up, down, _ = factorise(A, 64, method="exact")
            assert up.dtype == torch.float32
            assert kept(A, up, down) > 1 - 1e-9


def test_seeds_differ_by_key_and_by_seed() -> None:
    seeds = {seed_for(seed, key) for seed in (0, 1) for key in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
