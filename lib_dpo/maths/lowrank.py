"""Best approximations of low rank, and nothing else: matrices in, factors out.

Two methods give the leading singular subspace of A (out, in):

* `randomized`: block Krylov iteration with a Rayleigh-Ritz step (Musco & Musco 2015, arXiv 1504.05477, Algorithm 2),
  every block re-orthonormalised, A^T X kept from the recurrence so that the projection costs no extra product.
* `exact`: eigenvectors of the Gram matrix of the short side. All singular values, three to forty times faster than an
  SVD. Values below about 3e-4 of the largest drown in float32 rounding, where they carry 1e-7 of the energy.

The approximation is the projection U (U^T A), which is right for any orthonormal U: no singular value is divided by, but
for sharing it between the factors, and there only one that is no rounding noise.
All functions take one matrix (out, in) or a batch (batch, out, in) of float32 on any device.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lib_dpo.maths.precision import narrowed
from lib_dpo.settings import Method

logger = logging.getLogger(__name__)

# Krylov: blocks of 3/8 of the rank. Ten keep 99.93 to 99.96 % of the optimum of single 1280x1280 layers at rank 64 (flat
# spectrum, i^-0.3); small ranks take 12. At about the same cost, 11 blocks of 20 kept 99.92 % and 8 of 32 kept 99.91 %.
# Each block costs two products with A.
_BLOCKS, _BLOCKS_SMALL_RANK, _SMALL_RANK = 10, 12, 64
# Costs of the two methods relative to a float32 matrix product: `eigh` of an s x s matrix takes as long as 11 s^3
# operations of a product, and a product with a thin block (32 to 64 columns) runs at 0.8 of the full rate.
_EIGH_COST = 11.0
_THIN_RATE = 0.8
_TURNS, _LEFT = 5, 0.5  # Gram-Schmidt: turns at most, and what one must leave of each row to be the last
_PANEL = 1024  # columns: 5 MB of a matrix with 1280 rows
_NOTHING = 1e-4  # of the largest: less than rounding its own factors to fp16 takes, more than float32 files leave as noise
_GRAM_FLOOR = 1e-3  # of the largest: a float32 Gram matrix gives up to 7e-4 for singular values that are 0
_GRAM_COLUMNS = 4096  # turned into float64 at once
_SMALLEST = 1e-7  # largest value of a matrix that is factorised as it is
_KRYLOV_OVERHEAD = 2e8  # operations in the time that its many small calls take


class Factors(NamedTuple):
    """`up @ down` approximates A; both carry the square root of the singular values, for fp16's sake.

    up (..., out, rank), down (..., rank, in), singular_values (..., rank) in falling order.
    """

    up: Tensor
    down: Tensor
    singular_values: Tensor

    def rounded(self, dtype: torch.dtype, alpha: float, *, least: int = 0) -> tuple[Tensor, Tensor, float]:
        """up and down in a dtype, without components that are 0 in it but for the first `least`, and their scale.

        The scale is alpha / rank, and scale * up @ down approximates A: what the alpha does not carry lies in the factors.
        """
        factors = self
        while True:  # fewer components make the scale larger and the factors smaller: more of them may be 0 then
            up, down, scale = factors._stored(dtype, alpha)
            carries = (up.float() != 0).any(0) & (down.float() != 0).any(1)  # older torch compares no float8
            carries[:least] = True
            if bool(carries.all()):
                return up, down, scale
            kept = carries.nonzero()[:, 0]
            factors = Factors(factors.up[:, kept], factors.down[kept], factors.singular_values[kept.cpu()])

    def _stored(self, dtype: torch.dtype, alpha: float) -> tuple[Tensor, Tensor, float]:
        scale = alpha / self.up.shape[1] if self.up.shape[1] else 1.0
        left = right = scale**-0.5
        if dtype.itemsize == 1:  # few exponents: the numbers of both factors are made about as large
            tilt = (self.up.shape[0] / self.down.shape[1]) ** 0.25
            left, right = left * tilt, right / tilt
        up, down = (self.up, self.down) if left == right == 1 else (self.up * left, self.down * right)
        return narrowed(up, dtype), narrowed(down, dtype), scale


def seed_for(seed: int, key: str) -> int:
    """One seed per key, so that order, batching and device do not change the result."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:7], "little")


def factorise(
    A: Tensor, rank: int, *, method: Method = "auto", seeds: Sequence[int] = (0,), blocks: int | None = None
) -> Factors:
    """Approximate A by factors of a given rank, as near to the truncated SVD as the method comes.

    Components below 1e-4 of the largest carry nothing, 1e-8 of its energy or rounding noise: they come last, as zeros.

    Args:
        A: float32, (out, in) or (batch, out, in).
        rank: 1 to min(out, in).
        method: `auto` takes the cheaper one by the cost model of `choose_method`.
        seeds: one per matrix of the batch; the starting block is drawn from them on the CPU.
        blocks: Krylov blocks; fewer are faster and less exact. None takes the number that keeps 99.9 % of the optimum.

    Raises:
        ValueError: a rank outside 1..min(out, in), or a wrong number of seeds.
        torch.linalg.LinAlgError: the eigenvalue solver did not converge.
    """
    if A.ndim == 2:
        up, down, values = factorise(A[None], rank, method=method, seeds=seeds, blocks=blocks)
        return Factors(up[0], down[0], values[0])
    out, in_ = A.shape[-2:]
    short, long = min(out, in_), max(out, in_)
    if not 1 <= rank <= short:
        raise ValueError(f"rank {rank} is outside 1..{short} of a {out}x{in_} matrix")
    if len(seeds) != len(A):
        raise ValueError(f"{len(seeds)} seeds for {len(A)} matrices")
    scale = _root_of_scale(A)
    if scale is not None:
        A = A / scale**2
    wide = A if out <= in_ else A.mT  # (batch, short, long)
    blocks = blocks or krylov_blocks(rank)
    if resolve_method(short, long, rank, method, blocks=blocks) == "exact":
        U, projection = _gram_subspace(wide, rank)
    else:
        U, projection = _krylov_subspace(wide, rank, seeds, blocks)
    values, order = projection.norm(dim=-1).sort(dim=-1, descending=True, stable=True)  # (batch, rank)
    values = values.where(carrying(values), torch.zeros_like(values))
    root = values.sqrt()[..., None]
    left = U.gather(-1, order[:, None].expand_as(U)) * root.mT  # (batch, short, rank)
    share = root.reciprocal().where(root > 0, torch.zeros_like(root))
    right = projection.gather(-2, order[..., None].expand_as(projection)) * share  # (batch, rank, long)
    if scale is not None:
        left, right, values = left * scale, right * scale, values * scale[..., 0] ** 2
    return Factors(left, right, values) if out <= in_ else Factors(right.mT, left.mT, values)


def _root_of_scale(A: Tensor) -> Tensor | None:
    """Powers of two (batch, 1, 1) whose squares bring matrices near 1 that have fourth powers beyond float32, 1 for others.

    None where all are 1.
    """
    largest = torch.linalg.vector_norm(A, math.inf, dim=(-2, -1)).tolist()
    beyond = [value > 0 and not _SMALLEST < value < 1 / _SMALLEST for value in largest]
    if not any(beyond):
        return None
    roots = [2.0 ** (math.frexp(value)[1] // 2) if far else 1.0 for value, far in zip(largest, beyond, strict=True)]
    return A.new_tensor(roots)[:, None, None]


def resolve_method(
    short: int, long: int, rank: int, method: Method, *, blocks: int | None = None
) -> Literal["exact", "randomized"]:
    """The method that `factorise` runs: where a Krylov basis would span everything, the exact one, which costs less."""
    if method == "auto":
        method = choose_method(short, long, rank)
    return "exact" if (blocks or krylov_blocks(rank)) * block_size(rank) >= short else method


def choose_method(short: int, long: int, rank: int) -> Literal["exact", "randomized"]:
    """The cheaper method for one matrix, by counted operations and the measured rates at the head of this file.

    The choice depends on the shape alone, so that the same input always gives the same output.
    """
    if krylov_blocks(rank) * block_size(rank) >= short:
        return "exact"
    exact, krylov = operations(short, long, rank, "exact"), operations(short, long, rank, "randomized")
    return "exact" if exact + _EIGH_COST * short**3 <= krylov / _THIN_RATE + _KRYLOV_OVERHEAD else "randomized"


def operations(short: int, long: int, rank: int, method: Method) -> float:
    """Floating-point operations of the matrix products of one factorisation (eigenvalue solver left out)."""
    if method == "auto":
        method = choose_method(short, long, rank)
    basis = krylov_blocks(rank) * block_size(rank)
    if method == "exact" or basis >= short:
        return 2.0 * short * long * (short + rank)
    powers = 2.0 * short * long * (2 * basis - block_size(rank))
    return powers + 2.0 * long * basis * (basis + rank) + 4.0 * short * basis * basis


def block_size(rank: int) -> int:
    """Columns of one Krylov block."""
    return max(4, (3 * rank + 7) // 8)


def krylov_blocks(rank: int) -> int:
    """Blocks of the Krylov basis that keep at least 99.9 % of the optimum at this rank."""
    return _BLOCKS if rank >= _SMALL_RANK else _BLOCKS_SMALL_RANK


def singular_values(A: Tensor) -> Tensor:
    """All singular values in falling order, float64 (..., min(out, in)) on the CPU, from the Gram matrix of the short side.

    Those that carry nothing are 0, as in `factorise`. Meant for energies, ranks and budgets: below 1e-3 of the largest one
    a float32 Gram matrix holds rounding noise, and where half of the values lie there it is made in float64, on the CPU.
    """
    wide = A if A.shape[-2] <= A.shape[-1] else A.mT
    values, floor = _roots_of_eigenvalues(wide @ wide.mT), _GRAM_FLOOR
    if bool((values[..., values.shape[-1] // 2] < floor * values[..., 0]).any()):
        floor = _NOTHING
        gram = torch.zeros(*wide.shape[:-1], wide.shape[-2], dtype=torch.float64)
        for panel in torch.split(wide, _GRAM_COLUMNS, dim=-1):
            part = panel.cpu().double()
            gram += part @ part.mT
        values = _roots_of_eigenvalues(gram)
    return values.where(values > floor * values[..., :1], torch.zeros_like(values))


def _roots_of_eigenvalues(gram: Tensor) -> Tensor:
    """In falling order, float64 on the CPU."""
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.cpu().flip(-1).double().clamp_min(0).sqrt()


def energy(A: Tensor) -> float:
    """||A||^2 of a tensor of any shape and size: rows in its own dtype, their sum in float64 on the CPU (MPS has none)."""
    rows = A.flatten(1).norm(dim=-1) if A.ndim > 1 else A
    return float(rows.cpu().double().square().sum())


def residual_energy_(A: Tensor, up: Tensor, down: Tensor, scale: float = 1.0) -> float:
    """||A - scale up down||^2 of one matrix; A is overwritten with the residual to save a copy."""
    return energy(A.addmm_(up.to(A), down.to(A), alpha=-scale))


def carrying(values: Tensor) -> Tensor:
    """Which singular values (..., rank), in falling order, carry anything: more than 1e-4 of the largest, none of zeros."""
    return values > _NOTHING * values[..., :1]


def recompress(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of `up @ down` from its factors alone: QR of each, then the SVD of the rank x rank core, in float64.

    Args:
        up (out, rank), down (rank, in), any float dtype.

    Returns:
        U (out, k), S (k,), Vh (k, in) in float64, k = min(out, rank, in), S in falling order.
    """
    Q_up, R_up = torch.linalg.qr(up.double())
    Q_down, R_down = torch.linalg.qr(down.double().mT)
    U, S, Vh = torch.linalg.svd(R_up @ R_down.mT, full_matrices=False)
    return Q_up @ U, S, Vh @ Q_down.mT


def _gram_subspace(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors U (batch, short, rank) of a wide A, and U^T A, by eigh of A A^T."""
    U = _leading_eigenvectors(A @ A.mT, rank)
    return U, U.mT @ A


def _leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, falling. MPS has no eigh before 2026: done on the CPU there."""
    where = "cpu" if gram.device.type == "mps" else gram.device
    vectors: Tensor = torch.linalg.eigh(gram.to(where)).eigenvectors
    return vectors[..., -rank:].flip(-1).to(gram.device)


def _krylov_subspace(A: Tensor, rank: int, seeds: Sequence[int], blocks: int) -> tuple[Tensor, Tensor]:
    """The same from the Krylov space of A A^T: blocks X_0, A A^T X_0, ..., each orthonormal to those before.

    Blocks are kept as rows, so that each is one piece of memory to read and to write.
    """
    batch, short, long = A.shape
    width = block_size(rank)
    basis = A.new_empty(batch, blocks * width, short)
    image = A.new_empty(batch, blocks * width, long)  # basis A, filled block by block
    X = torch.stack([torch.randn(width, short, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(A)
    for start in range(0, blocks * width, width):
        block = slice(start, start + width)
        basis[:, block] = _orthonormal(X, basis[:, :start])
        if start + width < blocks * width:
            X = _there_and_back(A, basis[:, block], image[:, block])
        else:
            torch.matmul(basis[:, block], A, out=image[:, block])
    # Rayleigh-Ritz: the best rank-r subspace inside the basis.
    W = _leading_eigenvectors(image @ image.mT, rank)  # (batch, rows, rank)
    return basis.mT @ W, W.mT @ image


def _there_and_back(A: Tensor, X: Tensor, image: Tensor) -> Tensor:
    """X A A^T for a few rows X; X A is written to `image`.

    On the CPU panel by panel, so that the way back finds each panel of A in the cache: a fifth faster where A is larger
    than that. One panel where it is not, or on a GPU, where it saves less than it starts kernels.
    """
    panels = max(1, A.shape[-1] // _PANEL) if A.device.type == "cpu" else 1
    back = torch.zeros_like(X)
    for panel, part in zip(A.tensor_split(panels, dim=-1), image.tensor_split(panels, dim=-1), strict=True):
        torch.matmul(X, panel, out=part)
        back += part @ panel.mT
    return back


def _orthonormal(X: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows that span X, orthogonal to the rows of `basis`: block Gram-Schmidt and Cholesky QR.

    In exact arithmetic only the last two blocks of a Krylov basis overlap with the next one (Golub & Underwood 1977,
    block Lanczos): they are taken out first, then what rounding has left of all. That is Gram-Schmidt done twice, as it
    has to be (Giraud et al. 2005), at little more than the price of once. Where a turn took much away another one follows.

    Products only, so that a batch on a GPU stays there. A shift (Fukaya et al. 2020, shifted CholeskyQR) keeps the
    Cholesky factor defined when X has lost rank; such rows come out as noise that the next turns make orthogonal. The
    factor is inverted: a product with it is five times as fast as solving.
    """
    width = X.shape[-2]
    identity = torch.eye(width, dtype=X.dtype, device=X.device)
    recent = basis[:, -2 * width :]
    X = X - (X @ recent.mT) @ recent
    for _ in range(_TURNS):
        before = X.norm(dim=-1, keepdim=True)
        X = X - (X @ basis.mT) @ basis
        norms = X.norm(dim=-1, keepdim=True)
        X = X / norms.clamp_min(torch.finfo(X.dtype).tiny)
        gram = X @ X.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(width * torch.finfo(X.dtype).eps)
        L = torch.linalg.cholesky(gram)
        X = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False) @ X
        if float(torch.minimum((norms / before).amin(), L.diagonal(dim1=-2, dim2=-1).amin())) > _LEFT:
            break  # neither the basis nor the rows before took much away from any
    return X
