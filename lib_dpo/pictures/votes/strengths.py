"""Which strength is liked best, from votes between pictures of different strengths.

The model of Bradley and Terry (1952) with strength as a smooth covariate: the log-odds of preferring strength a to b are
f(a) - f(b), where f(s) = β₁ u + β₂ u² with u = s / S and S the largest strength that was tried, so that f(0) = 0 is the
untouched model. "No difference" counts as half a vote for each. The prior β ~ N(0, 4²) (a ridge) keeps f finite where all
votes agree.

The interval is a bootstrap over prompts: votes on one prompt are of one kind, so prompts are drawn, not votes. It holds the
best strength of simulated voters in 9 of 10 tests; where their liking is no parabola in strength, in 3 of 4. A few votes that
all agree come out of every bootstrap alike, and leave much open all the same: there it is drawn from Laplace's approximation of
the posterior of β.

What is asked for next is the pair which tells most by the D-optimal rule: the largest p (1 - p) xᵀ C x, where x is what the
pair sees of β, C the covariance of β so far, and p the probability of the answer that is foreseen.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib_dpo.pictures.votes.ballots import Vote

Matrix = NDArray[np.float64]
Pair = tuple[float, float]

MIN_PROMPTS = 8  # below it, no interval can be drawn from prompts
_PRECISION = 1 / 4.0**2  # of the prior
_ROUNDS = 25  # of Newton's method: the problem is convex, 5 to 8 do
_DRAWS = 400
_GRID = 201  # strengths at which f is looked at
_DIGITS = 2  # of a strength that people are told
_FLAT = 1e-6  # log-odds between the best and the worst strength, below which no vote told them apart


@dataclass(frozen=True)
class Curve:
    """How strengths are liked: f at a grid of strengths, in log-odds against the untouched model, and where it is highest."""

    strengths: tuple[float, ...]
    liking: tuple[float, ...]
    best: float
    interval: Pair | None  # of the best strength, 95 %; None with votes on fewer than MIN_PROMPTS prompts, or on a flat curve
    gain: float  # f(best), log-odds
    votes: int
    prompts: int
    tried: tuple[float, ...]  # strengths that were voted on, and 0

    def preferred(self, strength: float) -> float:
        """How often a picture of this strength is preferred to the untouched one, 0 to 1."""
        return float(_logistic(np.interp(strength, self.strengths, self.liking)))

    @property
    def text(self) -> str:
        """The figures in a sentence or two."""
        if self.is_flat:
            return f"No strength is preferred to another so far, in {self.votes} votes."
        if self.interval is None:
            needed = f"an interval needs votes on {MIN_PROMPTS} prompts"
            return f"Best strength so far {self.best:g}, from {self.votes} votes; {needed}."
        low, high = self.interval
        where = f"Best strength {self.best:g} (95 % interval {low:g} to {high:g})"
        beyond = ""
        if self.best and self.best in (self.tried[0], self.tried[-1]):
            end = "largest" if self.best > 0 else "smallest"
            beyond = f" It is the {end} that was tried: one beyond it may be better."
        return f"{where}, from {self.votes} votes on {self.prompts} prompts.{beyond}"

    @property
    def is_flat(self) -> bool:
        """Whether the votes tell no strength from another."""
        return max(self.liking) - min(self.liking) < _FLAT

    def as_json(self) -> dict[str, Any]:
        """What the API shows."""
        return {
            "best": self.best,
            "interval": self.interval and list(self.interval),
            "gain": self.gain,
            "votes": self.votes,
            "prompts": self.prompts,
            "strengths": list(self.strengths),
            "liking": list(self.liking),
            "tried": list(self.tried),
            "text": self.text,
        }


def best_strength(votes: Sequence[Vote], *, seed: int = 0) -> Curve | None:
    """Fit the curve. None without votes between different strengths.

    Args:
        votes: on one offset in one model; skipped ones and pairs of one strength do not count.
        seed: of the bootstrap: the same votes give the same interval.
    """
    votes = [vote for vote in votes if vote.answer != "skip" and vote.a != vote.b]
    if not votes:
        return None
    prompts = sorted({vote.prompt for vote in votes})
    pairs = sorted({_ordered(vote) for vote in votes})
    tried = sorted({0.0, *itertools.chain.from_iterable(pairs)})
    span = max(map(abs, tried))
    x = _features(pairs, span)
    asked, liked = _counted(votes, prompts, pairs)
    grid = np.linspace(tried[0], tried[-1], _GRID)
    basis = _basis(grid, span)
    beta = _fit(x, asked.sum(0)[None], liked.sum(0)[None])[0]
    curve = basis @ beta
    flat = curve.max() - curve.min() < _FLAT
    best = 0.0 if flat else round(float(grid[curve.argmax()]), _DIGITS)
    interval = None
    if len(prompts) >= MIN_PROMPTS and not flat:
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), _DRAWS)
        peaks = grid[(_fit(x, drawn @ asked, drawn @ liked) @ basis.T).argmax(1)]
        if not np.ptp(peaks):
            precision = _PRECISION * np.eye(len(beta)) + _information(x, asked.sum(0), beta)
            betas = rng.multivariate_normal(beta, np.linalg.inv(precision), _DRAWS)
            peaks = grid[(betas @ basis.T).argmax(1)]
        low, high = (round(float(value), _DIGITS) for value in np.quantile(peaks, (0.025, 0.975)))
        interval = min(low, best), max(high, best)
    return Curve(
        tuple(grid.tolist()), tuple(curve.tolist()), best, interval, float(curve.max()), len(votes), len(prompts), tuple(tried)
    )


def next_pair(votes: Sequence[Vote], strengths: Sequence[float], pending: Sequence[Pair] = ()) -> Pair:
    """The pair of different strengths whose answer tells most; the larger strength first.

    Args:
        strengths: that may be asked for, with 0 where the untouched model takes part; at least two.
        pending: pairs that are asked already, and not answered.
    """
    candidates = [(high, low) for low, high in itertools.combinations(sorted(set(strengths)), 2)]
    votes = [vote for vote in votes if vote.answer != "skip" and vote.a != vote.b]
    answered = sorted({_ordered(vote) for vote in votes})
    span = max(map(abs, itertools.chain.from_iterable([*candidates, *answered])))
    x = _features(candidates, span)
    beta, precision = np.zeros(x.shape[1]), _PRECISION * np.eye(x.shape[1])
    if answered:
        known = _features(answered, span)
        asked, liked = (each.sum(0) for each in _counted(votes, sorted({vote.prompt for vote in votes}), answered))
        beta = _fit(known, asked[None], liked[None])[0]
        precision = precision + _information(known, asked, beta)
    if pending:
        precision = precision + _information(_features(pending, span), np.ones(len(pending)), beta)
    p = _logistic(x @ beta)
    told = p * (1 - p) * np.einsum("ni,ij,nj->n", x, np.linalg.inv(precision), x)
    return candidates[int(told.argmax())]


def _ordered(vote: Vote) -> Pair:
    return max(vote.a, vote.b), min(vote.a, vote.b)


def _counted(votes: Sequence[Vote], prompts: Sequence[str], pairs: Sequence[Pair]) -> tuple[Matrix, Matrix]:
    """How often each pair was asked, and the higher strength liked, by prompt: two of (prompts, pairs)."""
    row = {prompt: n for n, prompt in enumerate(prompts)}
    column = {pair: n for n, pair in enumerate(pairs)}
    asked, liked = np.zeros((len(row), len(column))), np.zeros((len(row), len(column)))
    for (prompt, pair, share), count in Counter((vote.prompt, _ordered(vote), _share(vote)) for vote in votes).items():
        asked[row[prompt], column[pair]] += count
        liked[row[prompt], column[pair]] += count * share
    return asked, liked


def _share(vote: Vote) -> float:
    """Of a vote, what is for the higher strength."""
    if vote.answer == "none":
        return 0.5
    return float((vote.answer == "a") == (vote.a > vote.b))


def _basis(strengths: Matrix, span: float) -> Matrix:
    """(n,) -> (n, 2)"""
    u = strengths / (span or 1.0)
    return np.stack([u, u**2], axis=-1)


def _features(pairs: Sequence[Pair], span: float) -> Matrix:
    """What each pair sees of β, (pairs, 2)."""
    both = np.array(pairs, dtype=float)
    return _basis(both[:, 0], span) - _basis(both[:, 1], span)


def _fit(x: Matrix, asked: Matrix, liked: Matrix) -> Matrix:
    """β of many sets of counts at once, by Newton's method: (sets, 2).

    Args:
        x: (pairs, 2). asked, liked: (sets, pairs).
    """
    beta = np.zeros((len(asked), x.shape[1]))
    ridge = _PRECISION * np.eye(x.shape[1])
    for _ in range(_ROUNDS):
        p = _logistic(beta @ x.T)
        slope = (liked - asked * p) @ x - _PRECISION * beta
        curvature = np.einsum("sp,pi,pj->sij", asked * p * (1 - p), x, x) + ridge
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        beta = beta + step * np.minimum(1, 2 / np.maximum(np.abs(step).max(1, keepdims=True), 1e-9))  # never a wild step
        if np.abs(step).max() < 1e-9:
            break
    return beta


def _information(x: Matrix, asked: Matrix, beta: Matrix) -> Matrix:
    """Fisher's information of so many votes, (2, 2)."""
    p = _logistic(x @ beta)
    found: Matrix = np.einsum("p,pi,pj->ij", asked * p * (1 - p), x, x)
    return found


def _logistic(values: Any) -> Matrix:
    found: Matrix = 1 / (1 + np.exp(-np.clip(values, -50, 50)))
    return found
