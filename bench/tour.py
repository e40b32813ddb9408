"""Every command on the full-size pair, one after the other: seconds, memory, and whether what it wrote holds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.command import process_start, run_command
from bench.floors import Needs, of_extraction, of_products, of_recompression, of_spectra
from bench.measure import busy, copy_seconds
from lib_dpo.families.model import open_model
from lib_dpo.families.shapes import unet_name_pairs
from lib_dpo.files.header import tensor_nbytes
from lib_dpo.offsets.layers import Layer, plan_layers
from lib_dpo.offsets.offset import open_pair

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
    needs: Needs  # what it cannot do without


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

        def stop(title: str, find: Callable[[Any], str], output: Path | None, needs: Needs, *command: object) -> Stop:
            arguments = [*map(str, command), "--json", str(report), "--overwrite"]
            copying = copy_seconds(base, place)
            seconds, peak = run_fresh(arguments)
            slow = None
            if beside_others:
                with busy(_OTHERS):
                    slow, _ = run_fresh(arguments)
            said = json.loads(report.read_text(encoding="utf-8"))
            written = _size(output) if output else 0
            return Stop(title, seconds, peak, written, copying, slow, find(said), replace(needs, written=written))

        def run_fresh(arguments: list[str]) -> tuple[float, int]:
            with tempfile.TemporaryDirectory(dir=place) as cache:
                return run_command(arguments, on_device if "--device" in arguments else on_cpu, Path(cache))

        pair = ("--base", base.resolve(), "--tuned", tuned.resolve())
        bake = ("bake", "--target", base.resolve(), "-o", baked, "--offset")
        where = ("--device", str(device))
        fewer = max(1, rank // _SMALLER)
        layers, unets = _layers(base, tuned)
        unet, tuned_unet = unets
        products = of_products(layers, rank)
        yield stop("`inspect`, the base", _kind, None, _hashed(base), "inspect", base.resolve())
        needs = Needs(unet + tuned_unet, operations=of_spectra(layers))
        yield stop("`diff --plot`", _verdict, picture, needs, "diff", *pair, "--plot", picture, *where)
        needs = _hashed(base, tuned, operations=of_extraction(layers, rank))
        yield stop(f"`extract --rank {rank}`", _kept, lora, needs, "extract", *pair, "-o", lora, "--rank", rank, *where)
        needs = Needs(unet + tuned_unet + _size(lora), operations=products)
        yield stop("`verify`", _kept, None, needs, "verify", "--lora", lora, *pair)
        needs = Needs(_size(lora), operations=of_recompression(layers, rank))
        command: tuple[object, ...] = ("resize", "--lora", lora, "-o", smaller, "--rank", fewer)
        yield stop(f"`resize --rank {fewer}`", _kept_of_lora, smaller, needs, *command)
        needs = _hashed(base, lora, operations=products)
        yield stop("`bake` of the LoRA", lambda _: _untouched(arch, base, baked), baked, needs, *bake, lora)
        baked.unlink()
        yield stop("`offset`", lambda _: "", offset, _hashed(base, tuned), "offset", *pair, "-o", offset)
        needs = _hashed(base, offset)
        yield stop("`bake` of the offset", lambda _: _restored(arch, base, tuned, baked), baked, needs, *bake, offset)
        needs = Needs(2 * unet + tuned_unet)
        yield stop("`compat`, of that", _inside, None, needs, "compat", "--target", baked, *pair)


def _hashed(*files: Path, operations: float = 0.0) -> Needs:
    """Of a command that reads these files whole, and whose result names their SHA-256."""
    sizes = tuple(map(_size, files))
    return Needs(sum(sizes), hashed=sizes, operations=operations)


def _size(file: Path) -> int:
    """Bytes of a file."""
    return file.stat().st_size


def _layers(base: Path, tuned: Path) -> tuple[list[Layer], tuple[int, int]]:
    """All layers of the UNet, and the bytes of both UNets."""
    with open_model(base) as first, open_model(tuned) as second:
        pair = open_pair(first, second)
        unets = [sum(tensor_nbytes(model.dtype(key), model.shape(key)) for key in pair.keys) for model in (first, second)]
        return plan_layers(pair, "portable", ("unet",)), (unets[0], unets[1])


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
