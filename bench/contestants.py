"""Who is compared: ways from the offset of a weight to two factors, ours and those in use elsewhere.

Each takes the offsets of some weights of one shape, (out, in) or (out, in, kh, kw) in float32, a rank and seeds, and gives
up (out, r) and down (r, in*kh*kw) for each, whose product approximates the flattened offset. All may use all cores: ours
works on several layers at once as `extract` does, the others take one layer after the other as the tools that they are from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from lycoris.utils import extract_conv, extract_linear
from torch import Tensor

from lib_dpo.maths.lowrank import Factors, factorise
from lib_dpo.maths.threads import side_by_side
from lib_dpo.settings import Method

Approximation = tuple[Tensor, Tensor]
_CLAMP_QUANTILE = 0.99
_EXACT_SAMPLES = 8  # of each shape: its energy is known, and all of SDXL would take as long as all others of ours together


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    name: str  # in the JSON
    title: str
    run: Callable[[Sequence[Tensor], int, Sequence[int]], list[Approximation]]
    samples: int | None = None  # layers of each shape that it gets; None: all of them
    blocks: int | None = None  # Krylov blocks, of those that are tuned by them


def ours(
    weights: Sequence[Tensor], rank: int, seeds: Sequence[int], *, method: Method, blocks: int | None = None
) -> list[Approximation]:
    """lib_dpo by one of its methods: side by side on the CPU, as one batch on a GPU."""
    matrices = [weight.flatten(1) for weight in weights]
    rank = min(rank, *matrices[0].shape)
    device = weights[0].device
    if device.type != "cpu":
        batch = factorise(torch.stack(matrices), rank, method=method, seeds=seeds, blocks=blocks)
        return list(zip(batch.up, batch.down, strict=True))

    def alone(job: tuple[Tensor, int]) -> Factors:
        return factorise(job[0], rank, method=method, seeds=job[1:], blocks=blocks)

    with side_by_side(alone, zip(matrices, seeds, strict=True), device) as done:
        return [factors[:2] for factors in done]


def one_by_one(way: Callable[[Tensor, int, int], Approximation]) -> Callable[..., list[Approximation]]:
    """A way for one weight, run for several in turn."""

    def run(weights: Sequence[Tensor], rank: int, seeds: Sequence[int]) -> list[Approximation]:
        return [way(weight, rank, seed) for weight, seed in zip(weights, seeds, strict=True)]

    return run


def full_matrix(weight: Tensor, rank: int, seed: int) -> Approximation:
    """What kohya's extract_lora_from_models.py does, and many after it: a full SVD, and both factors clamped."""
    A = weight.flatten(1)
    rank = min(rank, *A.shape)
    U, S, Vh = torch.linalg.svd(A)
    up, down = U[:, :rank] @ torch.diag(S[:rank]), Vh[:rank]
    bound = float(torch.cat((up.flatten(), down.flatten())).quantile(_CLAMP_QUANTILE))
    return up.clamp(-bound, bound), down.clamp(-bound, bound)


def lycoris(weight: Tensor, rank: int, seed: int) -> Approximation:
    """LyCORIS' own functions. It keeps a layer whole where the rank is half its outputs or more."""
    extract = extract_linear if weight.ndim == 2 else extract_conv
    found, kind = extract(weight, mode="fixed", mode_param=rank, device=weight.device)
    if kind == "full":
        return torch.eye(len(weight), device=weight.device), weight.flatten(1)
    down, up, _ = found
    return up.flatten(1), down.flatten(1)


def svd_lowrank(weight: Tensor, rank: int, seed: int) -> Approximation:
    """torch's randomized SVD as SD.Next calls it. It draws from the global generator."""
    A = weight.flatten(1)
    U, S, V = torch.svd_lowrank(A, q=min(rank, *A.shape), niter=2)
    return U * S, V.mT


def contestants(blocks: Sequence[int], *, svd_lowrank_samples: int | None = None) -> list[Contestant]:
    """All of them. `blocks`: numbers of Krylov blocks, one of which reaches svd_lowrank's energy."""
    return [
        Contestant("randomized", "ours, randomized", partial(ours, method="randomized")),
        Contestant("exact", "ours, exact", partial(ours, method="exact"), _EXACT_SAMPLES),
        Contestant("auto", "ours, auto", partial(ours, method="auto")),
        *(_tuned(number) for number in blocks),
        Contestant("svd_lowrank", "torch.svd_lowrank(q=r, niter=2), as SD.Next", one_by_one(svd_lowrank), svd_lowrank_samples),
        Contestant("full_matrix", "full-matrix SVD, clamped at 0.99, as kohya", one_by_one(full_matrix), 1),
        Contestant("lycoris", "LyCORIS extract_linear, extract_conv", one_by_one(lycoris), 1),
    ]


def _tuned(blocks: int) -> Contestant:
    run = partial(ours, method="randomized", blocks=blocks)
    return Contestant("tuned", f"ours, tuned: {blocks} Krylov blocks", run, blocks=blocks)
