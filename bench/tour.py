"""Every command on the full-size pair, one after the other: seconds, memory, and whether what it wrote holds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.command import process_start, run_command
from bench.measure import busy, copy_seconds
from lib_dpo.families.shapes import unet_name_pairs

_SMALLER = 4  # times, by `resize`
_OTHERS = 2  # busy processes


@dataclass(frozen=True)
class Stop:
    """One command of the tour."""

    title: str
    seconds: float  # process start and the hashes of its files included
    peak: int  # bytes of anonymous memory over a process that has only imported the engine
    written: int  # bytes
    copying: float  # seconds to copy the base's file to the disk, just before
    busy: float | None  # seconds beside as many busy processes as `_OTHERS`; None where that was not asked for
    found: str  # what its figures say, or what its file was checked for


def tour(
    arch: str, base: Path, tuned: Path, rank: int, device: torch.device, folder: Path, *, beside_others: bool = False
) -> Iterator[Stop]:
    """Each command as it ends, in the order in which they need each other's files; these are deleted at the end.

    Args:
        beside_others: run each a second time, beside two processes that keep a core busy each.

    Raises:
        DpoError: a command failed; its own words.
    """
    _, on_cpu = process_start(torch.device("cpu"))
    _, on_device = process_start(device)
    with tempfile.TemporaryDirectory(dir=folder, prefix="dpo-tour-", ignore_cleanup_errors=True) as name:
        place = Path(name).resolve()
        lora, smaller, offset, baked = (place / f"{each}.safetensors" for each in ("lora", "smaller", "offset", "baked"))
        report, picture = place / "report.json", place / "diff.png"

        def stop(title: str, find: Callable[[Any], str], output: Path | None, *command: object) -> Stop:
            arguments = [*map(str, command), "--json", str(report), "--overwrite"]
            copying = copy_seconds(base, place)
            seconds, peak = run_fresh(arguments)
            slow = None
            if beside_others:
                with busy(_OTHERS):
                    slow, _ = run_fresh(arguments)
            said = json.loads(report.read_text(encoding="utf-8"))
            return Stop(title, seconds, peak, output.stat().st_size if output else 0, copying, slow, find(said))

        def run_fresh(arguments: list[str]) -> tuple[float, int]:
            with tempfile.TemporaryDirectory(dir=place) as cache:
                return run_command(arguments, on_device if "--device" in arguments else on_cpu, Path(cache))

        pair = ("--base", base.resolve(), "--tuned", tuned.resolve())
        bake = ("bake", "--target", base.resolve(), "-o", baked, "--offset")
        where = ("--device", str(device))
        fewer = max(1, rank // _SMALLER)
        yield stop("`inspect`, the base", _kind, None, "inspect", base.resolve())
        yield stop("`diff --plot`", _verdict, picture, "diff", *pair, "--plot", picture, *where)
        yield stop(f"`extract --rank {rank}`", _kept, lora, "extract", *pair, "-o", lora, "--rank", rank, *where)
        yield stop("`verify`", _kept, None, "verify", "--lora", lora, *pair)
        yield stop(f"`resize --rank {fewer}`", _kept_of_lora, smaller, "resize", "--lora", lora, "-o", smaller, "--rank", fewer)
        yield stop("`bake` of the LoRA", lambda _: _untouched(arch, base, baked), baked, *bake, lora)
        baked.unlink()
        yield stop("`offset`", lambda _: "", offset, "offset", *pair, "-o", offset)
        yield stop("`bake` of the offset", lambda _: _restored(arch, base, tuned, baked), baked, *bake, offset)
        yield stop("`compat`, of that", _inside, None, "compat", "--target", baked, *pair)


def _restored(arch: str, base: Path, tuned: Path, baked: Path) -> str:
    """How many of the UNet's weights are the tuned file's, bit for bit, once these are rounded to the base's dtype."""
    same = total = 0
    with safe_open(baked, "pt") as ours, safe_open(tuned, "pt") as wanted:
        for key, name in unet_name_pairs(arch).items():
            found = ours.get_tensor(key)
            same += int((found == wanted.get_tensor(name).to(found.dtype).reshape(found.shape)).sum())
            total += found.numel()
    return f"{same:,} of {total:,} weights of the UNet as in the tuned file; {_untouched(arch, base, baked)}"


def _untouched(arch: str, base: Path, baked: Path) -> str:
    """How much beside the UNet is the base's, bit for bit."""
    unet = unet_name_pairs(arch)
    with safe_open(baked, "pt") as ours, safe_open(base, "pt") as before:
        others = [key for key in before.keys() if key not in unet]  # noqa: SIM118  # a safe_open has keys(), but cannot be iterated over
        same = sum(torch.equal(ours.get_tensor(key), before.get_tensor(key)) for key in others)
    return f"{same} of {len(others)} other tensors as they were"


def _kind(said: Any) -> str:
    return f"{said['architecture']} {said['kind']}, {said['tensors']:,} tensors"


def _verdict(said: Any) -> str:
    return str(said["verdict"]["level"])


def _kept(said: Any) -> str:
    return f"energy kept {100 * said['energy_kept']:.2f} %"


def _kept_of_lora(said: Any) -> str:
    return f"{100 * said['energy_kept_of_lora']:.2f} % of the LoRA's energy"


def _inside(said: Any) -> str:
    return f"strength inside {said['strength_inside']:.4f} ± {said['strength_inside_error']:.1g}"
