"""Who is compared: ways from the offset of a weight to two factors, ours and those in use elsewhere.

Each takes a weight's offset (out, in) or (out, in, kh, kw) in float32, a rank and a seed, and gives up (out, r) and
down (r, in*kh*kw), whose product approximates the flattened offset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from lycoris.utils import extract_conv, extract_linear
from torch import Tensor

from lib_dpo.lowrank import factorise
from lib_dpo.settings import Method

Approximation = tuple[Tensor, Tensor]
_CLAMP_QUANTILE = 0.99


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    name: str  # in the JSON
    title: str
    run: Callable[[Tensor, int, int], Approximation]
    samples: int | None = None  # layers of each shape that it gets; None: all of them
    blocks: int | None = None  # Krylov blocks, of those that are tuned by them


def ours(weight: Tensor, rank: int, seed: int, *, method: Method, blocks: int | None = None) -> Approximation:
    """lib_dpo by one of its methods."""
    A = weight.flatten(1)
    return factorise(A, min(rank, *A.shape), method=method, seeds=(seed,), blocks=blocks)[:2]


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
        Contestant("exact", "ours, exact", partial(ours, method="exact")),
        Contestant("auto", "ours, auto", partial(ours, method="auto")),
        *(_tuned(number) for number in blocks),
        Contestant("svd_lowrank", "torch.svd_lowrank(q=r, niter=2), as SD.Next", svd_lowrank, svd_lowrank_samples),
        Contestant("full_matrix", "full-matrix SVD, clamped at 0.99, as kohya", full_matrix, 1),
        Contestant("lycoris", "LyCORIS extract_linear, extract_conv", lycoris, 1),
    ]


def _tuned(blocks: int) -> Contestant:
    run = partial(ours, method="randomized", blocks=blocks)
    return Contestant("tuned", f"ours, tuned: {blocks} Krylov blocks", run, blocks=blocks)
