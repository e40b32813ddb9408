"""The contest: every contestant factorises the same offsets of one pair, a few layers of one shape after the other."""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bench.contestants import Approximation, Contestant, contestants, one_by_one, ours, svd_lowrank
from bench.measure import Measured, measure
from lib_dpo.maths.devices import batch_size
from lib_dpo.maths.lowrank import krylov_blocks, seed_for, singular_values
from lib_dpo.maths.precision import full_precision
from lib_dpo.maths.threads import side_by_side
from lib_dpo.offsets.layers import Layer, plan_layers
from lib_dpo.offsets.offset import Pair

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Bar = Callable[[Iterable[Layer], str], Iterable[Layer]]

_ROWS = 256  # of a matrix in float64 at once
_ROUNDS = 4  # layers for each core in a group: a core that waits at the end of each would count for more than in `extract`
_TUNING_MARGIN = 1e-3  # of the residual: blocks are tuned on one layer of each shape, and must do for all


class Energies(NamedTuple):
    """Of one layer; `residual` differs from contestant to contestant."""

    offset: float
    optimum: float
    residual: float = 0.0


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

    def add(self, shape: Shape, cost: Measured, energies: Sequence[Energies], weight: float) -> None:
        """Count a group of layers, each `weight` times."""
        self.layers += len(energies)
        self.seconds += weight * cost.seconds
        self.by_shape[shape] = self.by_shape.get(shape, 0.0) + weight * cost.seconds
        self.offset += weight * sum(layer.offset for layer in energies)
        self.residual += weight * sum(layer.residual for layer in energies)
        self.optimum += weight * sum(layer.optimum for layer in energies)
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
            for group in self._groups():
                deltas, shape = [self._delta(layer) for layer in group], group[0].shape
                with side_by_side(self._energies, deltas, self.device) as found:
                    energies = list(found)
                for score in order.sample(scores, len(scores)):
                    samples = min(score.contestant.samples or counts[shape], counts[shape])
                    rest = min(len(group), samples - seen[shape])
                    if rest > 0 and not score.failed:
                        self._try(score, group[:rest], deltas[:rest], energies[:rest], counts[shape] / samples)
                seen[shape] += len(group)
        return _with_one_tuned(scores)

    def _groups(self) -> Iterator[list[Layer]]:
        """Layers of one shape, a few for each core; on a GPU a batch of `extract`."""
        groups: dict[Shape, list[Layer]] = defaultdict(list)
        for layer in self.bar(self.layers, "contest"):
            group = groups[layer.shape]
            group.append(layer)
            on_cpu = self.device.type == "cpu"
            if len(group) >= (_ROUNDS * torch.get_num_threads() if on_cpu else batch_size(self.device, layer.numel)):
                yield groups.pop(layer.shape)
        yield from groups.values()

    def _try(
        self, score: Score, layers: Sequence[Layer], deltas: Sequence[Tensor], energies: Sequence[Energies], weight: float
    ) -> None:
        names = [layer.module.name for layer in layers]
        seeds = [seed_for(0, name) for name in names]
        try:
            found, cost = measure(lambda: score.contestant.run(deltas, self.rank, seeds), self.device)
        except RuntimeError as error:  # out of memory, or a solver that does not converge
            score.failed = f"{names[0]}: {error}".splitlines()[0]
            logger.warning("%s failed at %s", score.contestant.title, score.failed)
            return
        with side_by_side(_with_residual, zip(energies, deltas, found, strict=True), self.device) as measured:
            score.add(layers[0].shape, cost, list(measured), weight)

    def _warm_up(self, scores: Sequence[Score]) -> None:
        """Once each on the most common shape: libraries load, threads start, memory is mapped."""
        common = Counter(layer.shape for layer in self.layers).most_common(1)[0][0]
        delta = self._delta(next(layer for layer in self.layers if layer.shape == common))
        for score in scores:
            measure(lambda run=score.contestant.run: run([delta], self.rank, [0]), self.device)  # type: ignore[misc]

    def _fewest_blocks(self) -> int:
        """Krylov blocks that reach the energy of svd_lowrank on one layer of each shape, weighted by their numbers."""
        groups: dict[Shape, list[Layer]] = defaultdict(list)
        for layer in self.layers:
            groups[layer.shape].append(layer)
        sample = [group[0] for group in groups.values()]
        residuals: dict[int, float] = defaultdict(float)  # 0: of svd_lowrank
        most = krylov_blocks(self.rank)
        for layer in self.bar(sample, "tuning"):
            deltas, seeds = [self._delta(layer)], [seed_for(0, layer.module.name)]
            approximations = {0: one_by_one(svd_lowrank)(deltas, self.rank, seeds)} | {
                blocks: ours(deltas, self.rank, seeds, method="randomized", blocks=blocks) for blocks in range(2, most + 1)
            }
            for blocks, found in approximations.items():
                residuals[blocks] += len(groups[layer.shape]) * _residual(deltas[0], *found[0])
        wanted = residuals[0] * (1 - _TUNING_MARGIN)
        return next((blocks for blocks in range(2, most) if residuals[blocks] <= wanted), most)

    def _delta(self, layer: Layer) -> Tensor:
        return self.pair.delta(layer.module.key, self.device)

    def _energies(self, delta: Tensor) -> Energies:
        A = delta.flatten(1)
        return Energies(_square(delta), float(singular_values(A)[: min(self.rank, *A.shape)].square().sum()))


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


def _with_residual(row: tuple[Energies, Tensor, Approximation]) -> Energies:
    energies, delta, (up, down) = row
    return energies._replace(residual=_residual(delta, up, down))


def _square(delta: Tensor) -> float:
    return sum(float(rows.double().square().sum()) for rows in torch.split(delta.flatten(1), _ROWS))


def _residual(delta: Tensor, up: Tensor, down: Tensor) -> float:
    """||delta - up down||^2 in float64."""
    wide = down.double()
    energy = 0.0
    for rows, part in zip(torch.split(delta.flatten(1), _ROWS), torch.split(up, _ROWS), strict=True):
        energy += float(torch.addmm(rows.double(), part.double(), wide, alpha=-1).square().sum())
    return energy
