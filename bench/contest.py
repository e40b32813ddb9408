"""The contest: every contestant factorises the same offsets of one pair, one layer after the other."""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.contestants import Contestant, contestants, ours, svd_lowrank
from bench.measure import Measured, measure
from lib_dpo.layers import Layer, plan_layers
from lib_dpo.lowrank import full_precision, krylov_blocks, seed_for, singular_values
from lib_dpo.offset import Pair

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Bar = Callable[[Iterable[Layer], str], Iterable[Layer]]

_ROWS = 256  # of a matrix in float64 at once
_TUNED_ON = 3  # layers of each shape

_TUNING_MARGIN = 1e-3  # of the residual: blocks are tuned on one layer of each shape, and must do for all


@dataclass
class Score:
    """Sums over the layers of one contestant. What was sampled counts for all layers of its shape."""

    contestant: Contestant
    layers: int = 0
    seconds: float = 0.0
    offset: float = 0.0  # ||offset||^2
    residual: float = 0.0  # ||offset - up down||^2
    optimum: float = 0.0  # the energy of the best approximation of the same rank
    peak: int = 0
    by_shape: dict[Shape, float] = field(default_factory=dict)  # seconds
    failed: str = ""

    def add(self, shape: Shape, cost: Measured, energies: tuple[float, float, float], weight: float) -> None:
        """Count one layer `weight` times; `energies` are those of the offset, the residual and the optimum."""
        self.layers += 1
        self.seconds += weight * cost.seconds
        self.by_shape[shape] = self.by_shape.get(shape, 0.0) + weight * cost.seconds
        self.offset += weight * energies[0]
        self.residual += weight * energies[1]
        self.optimum += weight * energies[2]
        self.peak = max(self.peak, cost.peak)

    @property
    def energy_kept(self) -> float:
        return 1.0 - self.residual / self.offset

    @property
    def of_optimum(self) -> float:
        return (self.offset - self.residual) / self.optimum


@dataclass(frozen=True)
class Contest:
    """A pair's layers and the rules."""

    pair: Pair
    layers: Sequence[Layer]
    rank: int
    device: torch.device
    bar: Bar

    def run(self, *, svd_lowrank_samples: int | None = None) -> list[Score]:
        """A score per contestant."""
        with full_precision(), torch.random.fork_rng():
            torch.default_generator.manual_seed(0)  # svd_lowrank draws from it
            blocks = self._fewest_blocks()
            # one more, should the sample have been lucky
            entered = contestants((blocks, blocks + 1), svd_lowrank_samples=svd_lowrank_samples)
            scores = [Score(each) for each in entered]
            self._warm_up(scores)
            counts, seen = Counter(layer.shape for layer in self.layers), Counter[Shape]()
            order = random.Random(0)  # nobody always comes first
            for layer in self.bar(self.layers, "contest"):
                delta = self._delta(layer)
                energies = _square(delta), self._optimum(delta)
                for score in order.sample(scores, len(scores)):
                    samples = min(score.contestant.samples or counts[layer.shape], counts[layer.shape])
                    if seen[layer.shape] < samples and not score.failed:
                        self._try(score, layer, delta, energies, counts[layer.shape] / samples)
                seen[layer.shape] += 1
        return _with_one_tuned(scores)

    def _try(self, score: Score, layer: Layer, delta: Tensor, energies: tuple[float, float], weight: float) -> None:
        seed = seed_for(0, layer.module.name)
        try:
            (up, down), cost = measure(lambda: score.contestant.run(delta, self.rank, seed), self.device)
        except RuntimeError as error:  # out of memory, or a solver that does not converge
            score.failed = f"{layer.module.name}: {error}".splitlines()[0]
            logger.warning("%s failed at %s", score.contestant.title, score.failed)
            return
        score.add(layer.shape, cost, (energies[0], _residual(delta, up, down), energies[1]), weight)

    def _warm_up(self, scores: Sequence[Score]) -> None:
        """Once each on the most common shape: libraries load, threads start, memory is mapped."""
        common = Counter(layer.shape for layer in self.layers).most_common(1)[0][0]
        delta = self._delta(next(layer for layer in self.layers if layer.shape == common))
        for score in scores:
            measure(lambda run=score.contestant.run: run(delta, self.rank, 0), self.device)  # type: ignore[misc]

    def _fewest_blocks(self) -> int:
        """Krylov blocks that reach the energy of svd_lowrank on a sample of each shape, weighted by their numbers."""
        groups: dict[Shape, list[Layer]] = defaultdict(list)
        for layer in self.layers:
            groups[layer.shape].append(layer)
        sample = [layer for group in groups.values() for layer in group[:_TUNED_ON]]
        residuals: dict[int, float] = defaultdict(float)  # 0: of svd_lowrank
        most = krylov_blocks(self.rank)
        for layer in self.bar(sample, "tuning"):
            delta, seed = self._delta(layer), seed_for(0, layer.module.name)
            approximations = {0: svd_lowrank(delta, self.rank, seed)} | {
                blocks: ours(delta, self.rank, seed, method="randomized", blocks=blocks) for blocks in range(2, most + 1)
            }
            for blocks, (up, down) in approximations.items():
                count = len(groups[layer.shape])
                residuals[blocks] += count / min(count, _TUNED_ON) * _residual(delta, up, down)
        wanted = residuals[0] * (1 - _TUNING_MARGIN)
        return next((blocks for blocks in range(2, most) if residuals[blocks] <= wanted), most)

    def _delta(self, layer: Layer) -> Tensor:
        return self.pair.delta(layer.module.key, self.device)

    def _optimum(self, delta: Tensor) -> float:
        A = delta.flatten(1)
        return float(singular_values(A)[: min(self.rank, *A.shape)].square().sum())


def prepare(pair: Pair, rank: int, device: torch.device, bar: Bar) -> Contest:
    """All layers of the UNet, convolutions too: those of the portable profile."""
    return Contest(pair, plan_layers(pair, "portable", ("unet",)), rank, device, bar)


def _with_one_tuned(scores: Sequence[Score]) -> list[Score]:
    """Of those tuned the one with the fewest blocks that keeps as much as svd_lowrank, else the best; and all others."""
    tuned = [score for score in scores if score.contestant.name == "tuned" and not score.failed]
    theirs = next(score for score in scores if score.contestant.name == "svd_lowrank")
    enough = [score for score in tuned if theirs.failed or score.of_optimum >= theirs.of_optimum]
    chosen = (enough or tuned[-1:])[:1]
    return [score for score in scores if score.contestant.name != "tuned" or score in chosen]


def _square(delta: Tensor) -> float:
    return sum(float(rows.double().square().sum()) for rows in torch.split(delta.flatten(1), _ROWS))


def _residual(delta: Tensor, up: Tensor, down: Tensor) -> float:
    """||delta - up down||^2 in float64."""
    wide = down.double()
    energy = 0.0
    for rows, part in zip(torch.split(delta.flatten(1), _ROWS), torch.split(up, _ROWS), strict=True):
        energy += float(torch.addmm(rows.double(), part.double(), wide, alpha=-1).square().sum())
    return energy
