"""The whole story on a small made-up pair, without a network: diff, extract, verify, bake, compat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib_dpo.analyse import diff
from lib_dpo.bake import bake
from lib_dpo.compat import compat
from lib_dpo.dense import write_offset
from lib_dpo.extract import extract
from lib_dpo.lora import open_offset
from lib_dpo.model import Model, open_model
from lib_dpo.offset import Pair, open_pair
from lib_dpo.plots import plot_diff
from lib_dpo.settings import ExtractSettings, RankPolicy
from lib_dpo.synthetic import small_pair
from lib_dpo.verify import verify
from lib_dpo.writer import check_output

_RANKS = (2, 8, 32)


def demo(folder: Path, *, overwrite: bool = False, say: Callable[[str], None]) -> dict[str, Any]:
    """Make a pair with the structure of SD 1.5 and a tenth of its widths, and take it through every step.

    Args:
        folder: where the pair, the LoRAs, the baked checkpoint and the picture go.
        say: called with each line of the story.

    Returns:
        The figures of every step.

    Raises:
        OutputError: files of an earlier demo are there and `overwrite` is off.
    """
    say("A base and its DPO tuning, made up here: the layout of SD 1.5, a tenth of its widths, random weights.")
    say("The numbers are real, but no picture can come of them; the point is the files and what is measured on them.\n")
    base_path, tuned_path = small_pair(folder / "tiny-dpo", "sd1", overwrite=overwrite)
    with open_model(base_path) as base, open_model(tuned_path) as tuned:
        pair = open_pair(base, tuned)
        check_output(folder / "diff.png", overwrite=overwrite)
        figures: dict[str, Any] = {"diff": _diff(pair, folder / "diff.png", say)}
        figures["extract"] = [_extract(pair, folder / f"dpo_rank{rank}.safetensors", rank, overwrite, say) for rank in _RANKS]
        figures["bake"] = _bake(pair, folder, overwrite, say)
    say(f"\nEverything is in {folder}: open diff.png, or try `python -m lib_dpo inspect` on any of the files.")
    return figures


def _diff(pair: Pair, picture: Path, say: Callable[[str], None]) -> dict[str, Any]:
    report = diff(pair, spectra=True, device="cpu")
    plot_diff(report, picture)
    say(f"1. diff: {report.verdict.text}")
    say(f"   Picture of where and how: {picture}\n")
    return report.as_json()


def _extract(pair: Pair, path: Path, rank: int, overwrite: bool, say: Callable[[str], None]) -> dict[str, Any]:
    if rank == _RANKS[0]:
        say("2. extract: the change as a LoRA, at three ranks. Energy kept is the share of the change that the file holds.")
    report = extract(pair, path, ExtractSettings(RankPolicy(rank=rank), device="cpu"), overwrite=overwrite)
    checkpoint, offset = open_offset(path)
    with checkpoint:
        again = verify(offset, pair).tally.total.energy_kept
    kept = report.tally.total.energy_kept
    say(f"   rank {rank:>2}: {path.name:<24} {report.file_bytes / 1e6:5.1f} MB, keeps {100 * kept:5.1f} %")
    say(f"            verify, from the file alone: {100 * again:.1f} %")
    return report.as_json()


def _bake(pair: Pair, folder: Path, overwrite: bool, say: Callable[[str], None]) -> dict[str, Any]:
    offset_path, baked_path = folder / "dpo_offset.safetensors", folder / "baked.safetensors"
    written = write_offset(pair, offset_path, overwrite=overwrite)
    say(f"\n3. offset: all of the change in one file, {offset_path.name} ({written.file_bytes / 1e6:.1f} MB).")
    checkpoint, offset = open_offset(offset_path)
    with checkpoint:
        report = bake(pair.base, offset, baked_path, overwrite=overwrite)
    with open_model(baked_path) as baked:
        exact = _equals_tuned(baked, pair)
        fit = compat(baked, pair)
    say(f"4. bake: base + 1.0 x offset = {baked_path.name}; {report.changed} tensors changed, {report.kept} copied as is.")
    say(f"   Equal to the tuned model, rounded to the base's fp16, in {100 * exact:.3f} % of the weights.")
    say(f"5. compat, asked about the baked file: {fit.text}")
    return {"offset": written.as_json(), "bake": report.as_json(), "equals_tuned": exact, "compat": fit.as_json()}


def _equals_tuned(baked: Model, pair: Pair) -> float:
    """Share of the UNet's weights that equal the tuned ones rounded once."""
    same = total = 0
    for key in pair.keys:
        weight = baked.read(key)
        same += int((weight == pair.tuned.read(key).reshape(weight.shape).to(weight.dtype)).sum())
        total += weight.numel()
    return same / total
