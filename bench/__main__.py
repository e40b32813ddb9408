"""`make bench`: all contestants on the same full-size pair, then `extract`, then every command. Markdown on stdout."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.command import measure_command, process_start
from bench.contest import prepare
from bench.floors import measure_rates
from bench.table import (
    command_goals,
    command_table,
    contest_goals,
    contest_json,
    contest_table,
    floors_table,
    machine,
    machine_line,
    tour_table,
)
from bench.tour import tour
from lib_dpo.errors import DpoError, OutputError
from lib_dpo.families.arch import ARCHITECTURES as KNOWN
from lib_dpo.families.model import open_model
from lib_dpo.families.shapes import checkpoint_dtype, checkpoint_shapes, small, unet_name_pairs
from lib_dpo.families.synthetic import make_pair
from lib_dpo.files.atomic import write_text_atomic
from lib_dpo.files.header import tensor_nbytes
from lib_dpo.maths.devices import resolve_device
from lib_dpo.offsets.layers import Layer
from lib_dpo.offsets.offset import open_pair
from lib_dpo.settings import DEFAULT_RANK, check

ARCHITECTURES = ("sd1", "sdxl")
_SMALL_RANK = 8
_ROOM_FOR_LORAS = 8_000_000  # times the rank: that of SDXL, and a resized one
_BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks. Returns the exit code: 0 done, 2 refused, 130 cancelled."""
    try:
        args = _arguments(argv)
        figures, text = _run(args)
        if args.json:
            write_text_atomic(args.json, json.dumps(figures, indent=2) + "\n")
        if args.markdown:
            write_text_atomic(args.markdown, text)
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    except DpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all")
    parser.add_argument("--rank", type=int, help=f"default: {DEFAULT_RANK}, with --small {_SMALL_RANK}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--folder", type=Path, help="where the made-up files go: 14 GB for SD 1.5, 43 GB for SDXL")
    parser.add_argument("--keep", action="store_true", help="keep them in --folder, and take those of an earlier run")
    parser.add_argument("--small", action="store_true", help="a quick run with small widths, whose figures mean nothing")
    parser.add_argument("--tour-only", action="store_true", help="no contest: only every command in turn")
    parser.add_argument("--busy", action="store_true", help="every command in turn beside two busy processes too")
    parser.add_argument("--svd-lowrank-samples", type=int, metavar="N", help="layers of each shape (default: all)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to a file too")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write what is printed to a file too")
    args = parser.parse_args(argv)
    args.rank = args.rank if args.rank is not None else _SMALL_RANK if args.small else DEFAULT_RANK
    check("rank", args.rank)
    if args.keep and not args.folder:
        parser.error("--keep needs --folder")
    return args


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    device = resolve_device(args.device)
    facts = machine(device)
    folder = args.folder or Path(tempfile.gettempdir())
    _check_disk(args, folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [machine_line(facts)]
    print(parts[0], flush=True)
    figures: dict[str, Any] = {"machine": facts, "rank": args.rank, "small": args.small, "architectures": {}}
    for arch in args.arch:
        figures["architectures"][arch], text = _bench(arch, args, folder, device)
        parts.append(text)
    return figures, "\n\n".join(parts) + "\n"


def _bench(arch: str, args: argparse.Namespace, folder: Path, device: torch.device) -> tuple[dict[str, Any], str]:
    """All tables of one architecture, printed as they come."""
    title = KNOWN[arch].title + (" (small widths, the figures mean nothing)" if args.small else "")
    tables: list[str] = []

    def show(text: str) -> None:
        tables.append(text)
        print(f"\n{text}", flush=True)

    show(f"## {title}")
    begin = time.perf_counter()
    figures: dict[str, Any] = {}
    with _pair_files(arch, args, folder) as (base, tuned):
        seconds = {"making the pair": time.perf_counter() - begin}
        if not args.tour_only:
            figures, spent = _contest(arch, args, base, tuned, folder, device, show)
            seconds |= spent
        begin = time.perf_counter()
        rates = measure_rates([base, tuned], process_start(device)[0], folder, device)
        stops = list(tour(arch, base, tuned, args.rank, device, folder, beside_others=args.busy))
        seconds["tour"] = time.perf_counter() - begin
    floors = [stop.needs.floor(rates) for stop in stops]
    figures |= {"tour": [asdict(stop) for stop in stops], "rates": asdict(rates), "floors": floors, "seconds": seconds}
    show(tour_table(stops))
    show(floors_table(stops, rates))
    show("Took: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()) + ".")
    return figures, "\n\n".join(tables)


def _contest(
    arch: str,
    args: argparse.Namespace,
    base: Path,
    tuned: Path,
    folder: Path,
    device: torch.device,
    show: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, float]]:
    """The contest, and `extract` beside its lower bound: figures and seconds."""
    begin = time.perf_counter()
    with open_model(base) as first, open_model(tuned) as second:
        contest = prepare(open_pair(first, second), args.rank, device, _bar)
        scores = contest.run(svd_lowrank_samples=args.svd_lowrank_samples)
        show(contest_table(args.rank, len(contest.layers), scores))
        contested = time.perf_counter()
        command = measure_command(contest.pair, contest.layers, args.rank, device, folder)
    show(command_table(args.rank, command))
    goals = [*contest_goals(arch, scores), *command_goals(arch, command)]
    show("\n".join(map(str, goals)))
    figures = {
        "layers": len(contest.layers),
        "contest": [contest_json(score) for score in scores],
        "command": asdict(command) | {"ratio": command.ratio, "device_ratio": command.device_ratio},
        "goals": [goal.as_json() for goal in goals],
    }
    return figures, {"contest": contested - begin, "command": time.perf_counter() - contested}


@contextmanager
def _pair_files(arch: str, args: argparse.Namespace, folder: Path) -> Iterator[tuple[Path, Path]]:
    """A pair, deleted at the end unless it is to be kept."""
    name = f"{arch}-small" if args.small else arch
    place = folder / name if args.keep else Path(tempfile.mkdtemp(prefix=f"dpo-bench-{name}-", dir=folder))
    made = place / "base.safetensors", place / "unet" / "diffusion_pytorch_model.safetensors"
    try:
        if not all(path.exists() for path in made):
            with _bar_of_parameters(f"{arch}: making the pair") as tell:
                made = make_pair(arch, place, sizes=_sizes(arch, args), overwrite=True, on_progress=tell)
        yield made
    finally:
        if not args.keep:
            shutil.rmtree(place, ignore_errors=True)


def _sizes(arch: str, args: argparse.Namespace) -> Any:
    return small(arch) if args.small else None


def _check_disk(args: argparse.Namespace, folder: Path) -> None:
    """Before the first pair is made, whether there is room for the largest; for all of them if they are kept."""
    nearest = next(each for each in Path(os.path.abspath(folder), "x").parents if each.is_dir())
    pairs = [_pair_bytes(arch, args) for arch in args.arch]
    needed = (
        (sum(pairs) if args.keep else max(pairs)) + max(pairs) * 3 // 2 + _ROOM_FOR_LORAS * args.rank
    )  # the tour writes as much again, and copies the base
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise OutputError(
            f"{folder}: the benchmark needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some space, or name "
            "another folder with --folder"
        )


def _pair_bytes(arch: str, args: argparse.Namespace) -> int:
    shapes = checkpoint_shapes(arch, _sizes(arch, args))
    tuned = sum(4 * math.prod(shapes[key]) for key in unet_name_pairs(arch))
    return tuned + sum(tensor_nbytes(checkpoint_dtype(key), shape) for key, shape in shapes.items())


def _bar(layers: Iterable[Layer], title: str) -> Iterable[Layer]:
    """The layers, with a bar on stderr that counts parameters, on a terminal."""
    layers = list(layers)
    with _bar_of_parameters(title) as tell:
        done, total = 0, sum(layer.numel for layer in layers)
        for layer in layers:
            yield layer
            done += layer.numel
            tell(done, total, "")


@contextmanager
def _bar_of_parameters(title: str) -> Iterator[Any]:
    with tqdm(total=1, desc=title, disable=None, leave=False, bar_format=_BAR, file=sys.stderr) as bar:

        def tell(done: int, total: int, key: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell


if __name__ == "__main__":
    sys.exit(main())
