"""The pictures of a study: the same prompts and seeds at every strength and with every LoRA, drawn and judged."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib_dpo.maths.processes import ALONE, Processes
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import Offset
from lib_dpo.toy.bundled import BATCH, Networks, generate
from lib_dpo.toy.judge import adherence
from lib_dpo.toy.pictures import Pictures, Scene, held_out
from lib_dpo.toy.study import FULL, Scores

SHOWN_SEEDS = (1, 2)
_SHOWN = (  # held out, with every count, shape and position among them
    Scene("three", "red", "cross", "on the left"),
    Scene("one", "yellow", "square", "on the right"),
    Scene("two", "green", "circle", "at the top"),
    Scene("one", "blue", "triangle", "at the bottom"),
)
_FIRST_SEED = 1000  # of the pictures that nobody is shown
_TIMED_CELLS = 3

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Amount:
    """How much is drawn."""

    pictures: int  # at every strength and with every LoRA; at least those of `shown()`
    strengths: tuple[float, ...]  # of the full change; 0 and 1 are among them
    ranks: tuple[int, ...]  # of the LoRAs, at strength 1; the last one is the main one


# The layers of the bundled model are 32 to 64 wide: rank 8 is a quarter of what the narrowest can have.
SHORT = Amount(pictures=40, strengths=(0.0, 0.5, 1.0, 1.5, 2.0), ranks=(2, 4, 8))
STUDY = Amount(pictures=500, strengths=tuple(n / 2 for n in range(7)), ranks=(1, 2, 4, 8))


@dataclass(frozen=True)
class Drawn:
    """The pictures of one strength or LoRA."""

    scores: Scores
    pictures: Pictures  # of `subjects`, in the same order
    switch_seconds: float  # what it took to give the UNet this strength


@dataclass(frozen=True)
class Series:
    """All pictures of a study."""

    strengths: Mapping[float, Drawn]
    loras: Mapping[int, Drawn]
    cell_seconds: float  # of one picture alone

    @property
    def switch_seconds(self) -> float:
        """What another strength costs in between, the file read anew."""
        return statistics.median(one.switch_seconds for one in (*self.strengths.values(), *self.loras.values()))


def shown() -> list[tuple[Scene, int]]:
    """What people are shown, each scene with every seed: fixed before anybody saw a picture of them."""
    return [(scene, seed) for scene in _SHOWN for seed in SHOWN_SEEDS]


def subjects(count: int) -> list[tuple[Scene, int]]:
    """What is drawn, prompt and seed: what people are shown, then held-out scenes.

    A study takes all of these in turn. Fewer pictures are spread over the whole list, which is in order of the counts: its
    first scenes are the easy ones.
    """
    scenes, first = held_out(), shown()
    rest = count - len(first)
    places = range(rest) if count >= STUDY.pictures else (n * len(scenes) // rest for n in range(rest))
    return first + [(scenes[place % len(scenes)], _FIRST_SEED + n) for n, place in enumerate(places)]


def draw_series(
    networks: Networks,
    offset: Path,
    loras: Mapping[int, Path],
    amount: Amount,
    *,
    processes: Processes = ALONE,
    on_progress: OnProgress | None = None,
) -> Series:
    """Draw and judge at every strength of an offset file, and with LoRAs by rank; leaves the networks as the base.

    Args:
        processes: of which each draws a share; the first one alone comes back.
        on_progress: called with the pictures that are done and all of them; may raise to stop.
    """
    wanted = [(offset, strength) for strength in amount.strengths] + [(loras[rank], FULL) for rank in amount.ranks]
    drawn: dict[tuple[int, int], Drawn] = {}  # by place in `wanted` and first picture

    def tell(done: int, _: int) -> None:
        done = processes.report(done + sum(len(one.scores) for one in drawn.values()))
        if on_progress:
            on_progress(done, len(wanted) * amount.pictures)

    tell(0, 0)
    for n, part in _share(len(wanted), amount.pictures, processes):
        drawn[n, part.start] = _draw(networks, *wanted[n], amount.pictures, part, tell)
    found = dict(processes.collect(list(drawn.items()), lambda: tell(0, 0)))
    whole = [_joined([found[key] for key in sorted(found) if key[0] == n]) for n in range(len(wanted))]
    networks.set_unet()
    split = len(amount.strengths)
    return Series(
        strengths=dict(zip(amount.strengths, whole[:split], strict=True)),
        loras=dict(zip(amount.ranks, whole[split:], strict=True)),
        cell_seconds=_cell_seconds(networks),
    )


def _share(wanted: int, pictures: int, processes: Processes) -> list[tuple[int, slice]]:
    """What this process draws: places in the list of what is wanted, and which pictures of it, in whole batches."""
    batches = [(n, start) for n in range(wanted) for start in range(0, pictures, BATCH)]
    starts: dict[int, list[int]] = {}
    for n, start in processes.share(batches):
        starts.setdefault(n, []).append(start)
    return [(n, slice(mine[0], min(mine[-1] + BATCH, pictures))) for n, mine in starts.items()]


def _draw(networks: Networks, path: Path, strength: float, pictures: int, part: slice, tell: OnProgress) -> Drawn:
    with open_offset(path) as offset:
        seconds = _switch(networks, offset, strength)
    pairs = subjects(pictures)
    scenes = [scene for scene, _ in pairs]
    made = generate(networks, scenes, [seed for _, seed in pairs], part=part, on_progress=tell)
    return Drawn(adherence(made, scenes[part])[:, 1], made, seconds)


def _joined(parts: Sequence[Drawn]) -> Drawn:
    """One of its parts, which several processes may have drawn."""
    scores, pictures = (np.concatenate(each) for each in zip(*((one.scores, one.pictures) for one in parts), strict=True))
    return Drawn(scores, pictures, parts[0].switch_seconds)


def _switch(networks: Networks, offset: Offset, strength: float) -> float:
    started = time.perf_counter()
    networks.set_unet(offset, strength)
    return time.perf_counter() - started


def _cell_seconds(networks: Networks) -> float:
    """Median time of a picture drawn alone, as a grid of WebUIs does."""
    times = []
    for scene, seed in shown()[:_TIMED_CELLS]:
        started = time.perf_counter()
        generate(networks, [scene], [seed])
        times.append(time.perf_counter() - started)
    return statistics.median(times)
