"""What the README says of the bundled model: adherence of base, reference and LoRAs on held-out prompts, and the curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib_dpo.compat import compat
from lib_dpo.dense import write_offset
from lib_dpo.extract import extract
from lib_dpo.lora import open_offset
from lib_dpo.model import open_model
from lib_dpo.offset import open_pair
from lib_dpo.settings import ExtractSettings, RankPolicy
from lib_dpo.toy.bundled import BASE, REFERENCE, Networks, load
from lib_dpo.toy.study import Scores, gain, plateau, point, scores_at

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
RANKS = (4, 8)


def measure(
    folder: Path,
    work: Path,
    *,
    count: int,
    strengths: Sequence[float] = STRENGTHS,
    ranks: Sequence[int] = RANKS,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Generate `count` pictures of held-out prompts at every strength of the exact offset, and with LoRAs of some ranks."""
    networks = load(folder)
    offset_path = work / "offset.safetensors"
    loras = {rank: work / f"rank{rank}.safetensors" for rank in ranks}
    with open_model(folder / BASE) as base, open_model(folder / REFERENCE) as tuned:
        pair = open_pair(base, tuned)
        write_offset(pair, offset_path, overwrite=True)
        settings = {rank: ExtractSettings(RankPolicy(rank=rank), device="cpu") for rank in ranks}
        kept = {rank: extract(pair, loras[rank], settings[rank], overwrite=True).tally.total.energy_kept for rank in ranks}
        suggested = compat(base, pair).suggested_strength
    scores = {strength: _scores(networks, offset_path, strength, count) for strength in strengths}
    points = [point(strength, found) for strength, found in scores.items()]
    for one in points:
        say(f"strength {one.strength:g}: {one.mean:.3f} [{one.low:.3f}, {one.high:.3f}], {one.n} pictures")
    full = gain(scores[0.0], scores[1.0])
    say(f"gain at 1: {full[0]:.3f} [{full[1]:.3f}, {full[2]:.3f}]")
    say(f"plateau {plateau(points)}, suggested strength {suggested:g}")
    found = []
    for rank in ranks:
        part = gain(scores[0.0], _scores(networks, loras[rank], 1.0, count))
        share = part[0] / full[0] if full[0] else 0.0
        say(f"LoRA rank {rank}: energy kept {kept[rank]:.3f}, gain {part[0]:.3f} [{part[1]:.3f}, {part[2]:.3f}], {share:.0%}")
        found.append({"rank": rank, "energy_kept": kept[rank], "gain": part, "share_of_gain": share})
    return {
        "adherence": [one.as_json() for one in points],
        "gain": full,
        "plateau": plateau(points),
        "suggested": suggested,
        "loras": found,
    }


def _scores(networks: Networks, path: Path, strength: float, count: int) -> Scores:
    checkpoint, offset = open_offset(path)
    with checkpoint:
        return scores_at(networks, offset, strength, count)
