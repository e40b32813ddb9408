"""Figures as people read them: Markdown tables, and the goals with what was reached."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.command import CommandFigures
from bench.contest import Score
from bench.floors import Rates
from bench.tour import Stop

# What the project wants to reach (issue 2), on two CPU cores; the last on a GPU.
_TIMES_FASTER = {"sd1": 15.0, "sdxl": 30.0}
_OF_OPTIMUM = 0.999
_COMMAND_RATIO = 2.5
_COMMAND_PEAK = 1.5e9
_DEVICE_RATIO = 3.0

_CONTEST_HEAD = (
    "| contestant | layers | time | ratio | energy kept | share of the optimum | peak memory |",
    "|---|--:|--:|--:|--:|--:|--:|",
)


@dataclass(frozen=True)
class Goal:
    """One goal and what was reached."""

    text: str
    reached: float
    limit: float
    at_least: bool = False
    unit: str = "×"

    @property
    def met(self) -> bool:
        return self.reached >= self.limit if self.at_least else self.reached <= self.limit

    def __str__(self) -> str:
        scale, unit = (100.0, " %") if self.unit == "%" else (1.0, self.unit)
        sign, digits = "≥" if self.at_least else "≤", 5 if self.unit == "%" else 3
        figures = f"{scale * self.reached:.{digits}g}{unit} (goal {sign} {scale * self.limit:g}{unit})"
        return f"- {'met' if self.met else '**missed**'}: {self.text}: {figures}"

    def as_json(self) -> dict[str, Any]:
        return {"goal": self.text, "reached": self.reached, "limit": self.limit, "at_least": self.at_least, "met": self.met}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"processor": _processor(), "cores": cores, "threads": torch.get_num_threads(), "system": platform.system()}
    facts |= {"python": platform.python_version(), "torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        facts["device"] = f"{device} ({torch.cuda.get_device_name(device)})"
    return facts


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def contest_goals(arch: str, scores: Sequence[Score]) -> list[Goal]:
    """Goals of the factorisation."""
    by_name = {score.contestant.name: score for score in scores if not score.failed}
    ours, goals = by_name["randomized"], []
    if "full_matrix" in by_name:
        times = by_name["full_matrix"].seconds / ours.seconds
        goals.append(Goal("ours, randomized, is faster than the full-matrix SVD", times, _TIMES_FASTER[arch], at_least=True))
    goals.append(Goal("ours, randomized, keeps of the optimum", ours.of_optimum, _OF_OPTIMUM, at_least=True, unit="%"))
    if "svd_lowrank" in by_name:
        theirs, tuned = by_name["svd_lowrank"], by_name["tuned"]
        goals.append(Goal("time of ours, tuned, to that of svd_lowrank", tuned.seconds / theirs.seconds, 1.0))
        gain = tuned.of_optimum / theirs.of_optimum
        goals.append(Goal("energy of ours, tuned, to that of svd_lowrank", gain, 1.0, at_least=True, unit="%"))
    return goals


def command_goals(arch: str, figures: CommandFigures) -> list[Goal]:
    """Goals of the whole command."""
    goals = [Goal("peak anonymous memory over the imports, GB", figures.peak / 1e9, _COMMAND_PEAK / 1e9, unit="")]
    if arch == "sdxl":
        if figures.device_ratio is not None:
            goals.append(Goal("command to bringing both files to the GPU", figures.device_ratio, _DEVICE_RATIO))
        else:
            goals.append(Goal("command to reading both files and the operations", figures.ratio, _COMMAND_RATIO))
    return goals


def contest_table(rank: int, layers: int, scores: Sequence[Score]) -> str:
    """All contestants, and how to read the table."""
    reference = next(score.seconds for score in scores if score.contestant.name == "randomized")
    rows = [_contest_row(score, layers, reference) for score in scores]
    failed = [f"- {score.contestant.title} failed at {score.failed}" for score in scores if score.failed]
    samples = {score.contestant.samples for score in scores if score.contestant.samples}
    note = (
        f"Rank {rank}. Time of the factorisation alone, on offsets in memory; peak memory is the largest of a few layers of "
        "one shape, above the offsets themselves; ours works on as many at once as there are cores. * Sampled"
        + f": {' or '.join(map(str, sorted(samples)))} of each shape"
        + ", its time and energies counted for all of that shape, its share of the optimum to that of the same layers."
    )
    return "\n".join([*_CONTEST_HEAD, *rows, "", note, *failed])


def _contest_row(score: Score, layers: int, reference: float) -> str:
    title = score.contestant.title
    if score.failed:
        return f"| {title} | {score.layers} | failed | | | | |"
    sampled = "" if score.layers == layers else " *"
    return (
        f"| {title} | {score.layers}{sampled} | {_seconds(score.seconds)} | {score.seconds / reference:.2f} "
        f"| {100 * score.energy_kept:.2f} % | {100 * score.of_optimum:.3f} % | {score.peak / 1e6:,.0f} MB |"
    )


def command_table(rank: int, figures: CommandFigures) -> str:
    """The command beside what it cannot do without."""
    rows = [
        (f"`lib_dpo extract --rank {rank}`, process start included, hashing left out", _seconds(figures.wall)),
        ("of it: process start and imports", _seconds(figures.start)),
        ("reading both files once", _seconds(figures.read)),
        (f"{figures.operations / 1e12:.3g} TFLOP at the measured {figures.rate / 1e9:.4g} GFLOP/s",
         _seconds(figures.operations / figures.rate)),
        ("ratio to the sum of these two", f"{figures.ratio:.2f}"),
        ("peak anonymous memory over the imports", f"{figures.peak / 1e6:,.0f} MB"),
        ("file written", f"{figures.file_bytes / 1e6:,.1f} MB"),
        ("energy kept, as the command reports it", f"{100 * figures.energy_kept:.2f} %"),
    ]  # fmt: skip
    if figures.to_device and figures.device_ratio:
        rows.append(("bringing both files to the GPU", _seconds(figures.to_device)))
        rows.append(("ratio to that, process start left out", f"{figures.device_ratio:.2f}"))
    return "\n".join(["| whole command | |", "|---|--:|", *(f"| {name} | {value} |" for name, value in rows)])


def tour_table(stops: Sequence[Stop]) -> str:
    """Every command in turn."""
    rows = [
        f"| {one.title} | {_seconds(one.seconds)} | {one.seconds / one.copying:.1f} "
        f"| {'' if one.busy is None else f'{one.busy / one.seconds:.1f}'} | {one.peak / 1e6:,.0f} MB "
        f"| {f'{one.written / 1e6:,.1f} MB' if one.written else ''} | {one.found} |"
        for one in stops
    ]
    head = (
        "| every command, process start and hashes included | time | times copying | beside two busy / quiet | peak memory "
        "| written | what came of it |",
        "|---|--:|--:|--:|--:|--:|---|",
    )
    note = (
        "Times copying: to the time in which the base's file is copied and on the disk, measured just before. Beside two busy: "
        "the time beside two processes that keep a core busy each, to the one alone; only with `--busy`. *Save as checkpoint* "
        "in the tab does what `bake` does."
    )
    return "\n".join([*head, *rows, "", note])


def floors_table(stops: Sequence[Stop], rates: Rates) -> str:
    """Every command beside its floors: bytes over bandwidth, operations over rate."""
    rows = [
        f"| {one.title} | {one.needs.bandwidth(rates):.2f} s | {one.needs.arithmetic(rates):.2f} s "
        f"| {one.needs.floor(rates):.3g} s | {_seconds(one.seconds)} | {one.seconds / one.needs.floor(rates):.2f} |"
        for one in stops
    ]
    head = ("| beside its floors | bytes | operations | floor | time | ratio |", "|---|--:|--:|--:|--:|--:|")
    note = (
        f"Bytes: each that it must read or write once, at {rates.reading / 1e9:.2f} GB/s read and "
        f"{rates.writing / 1e9:.2f} GB/s written to the disk. Operations: SHA-256 at {rates.hashing / 1e9:.2f} GB/s for each "
        f"core, products and eigenvalues at {rates.multiplying / 1e9:.4g} GFLOP/s for all. Floor: both, after the "
        f"{rates.start:.2f} s in which a process starts and imports the engine."
    )
    return "\n".join([*head, *rows, "", note])


def machine_line(facts: Mapping[str, Any]) -> str:
    """The same for people."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def contest_json(score: Score) -> dict[str, Any]:
    """One row, with the seconds of each shape."""
    if score.failed:
        return {"name": score.contestant.name, "title": score.contestant.title, "failed": score.failed}
    return {
        "name": score.contestant.name,
        "title": score.contestant.title,
        "blocks": score.contestant.blocks,
        "layers": score.layers,
        "samples_per_shape": score.contestant.samples,
        "seconds": score.seconds,
        "energy_kept": score.energy_kept,
        "optimum": score.optimum / score.offset,
        "of_optimum": score.of_optimum,
        "peak_bytes": score.peak,
        "seconds_by_shape": {"x".join(map(str, shape)): seconds for shape, seconds in score.by_shape.items()},
    }


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"
