"""The metadata of a resized LoRA: what is still true of the file it was made from, and what its new numbers make true."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lib_dpo.files.checkpoint import Checkpoint
from lib_dpo.offsets.lora.metadata import STALE_METADATA
from lib_dpo.offsets.lora.scale import ADAPTER_METADATA
from lib_dpo.settings import RankPolicy

_DYNAMIC = "Dynamic"  # kohya's word for ranks that differ
_ENERGY = "dpo.energy_kept"
# What no longer holds of a resized file.
_STALE = (
    *STALE_METADATA,
    ADAPTER_METADATA,
    _ENERGY,  # and its parts
    "dpo.rank_policy",
    "dpo.precision",
)
# Arguments of the training that say ranks, or how factors are kept: `mid` goes into `down`, the scale into alpha and factors.
_STALE_ARGUMENTS = (
    "conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "network_reg_dims",
    "use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "rs_lora",
)  # fmt: skip


@dataclass(frozen=True)
class NewPair:
    """A pair as it was written. A convolution has a kernel beyond 1x1."""

    rank: int
    alpha: float
    is_convolution: bool


def energy_claimed(metadata: Mapping[str, str]) -> float | None:
    """The share of the change that a file says it keeps; None where it says nothing that can be read."""
    try:
        claimed = float(metadata[_ENERGY])
    except (KeyError, ValueError):
        return None
    return claimed if math.isfinite(claimed) else None


def resized_metadata(lora: Checkpoint, policy: RankPolicy, title: str, kept: float, pairs: Sequence[NewPair]) -> dict[str, str]:
    """The LoRA's own without what no longer holds; it goes by its new name where it went by that of its file.

    Args:
        title: the new file's name. kept: share of the LoRA's energy.
        pairs: as written; none of them while only the length of the metadata is asked for.
    """
    metadata = {key: text for key, text in lora.metadata.items() if not key.startswith(_STALE)}
    if metadata.get("modelspec.title") == lora.name:
        metadata["modelspec.title"] = title
    linear = [pair for pair in pairs if not pair.is_convolution] or pairs
    claimed = energy_claimed(lora.metadata)
    if claimed is not None:
        metadata[_ENERGY] = json.dumps(claimed * kept)
    return metadata | {
        "ss_output_name": title,
        "ss_network_dim": _one(pair.rank for pair in linear),
        "ss_network_alpha": _one(pair.alpha for pair in linear),
        "ss_network_args": _arguments(lora.metadata.get("ss_network_args"), [pair for pair in pairs if pair.is_convolution]),
        "dpo.resized": f"{policy}, from {lora.name}, {kept:.6f} of its energy",
    }


def _one(values: Iterable[float]) -> str:
    """The value that all have, or the word for several."""
    distinct = {f"{value:g}" for value in values}
    return distinct.pop() if len(distinct) == 1 else _DYNAMIC


def _arguments(text: str | None, convolutions: Sequence[NewPair]) -> str:
    """How it was trained stays as it was; ranks and alphas of convolutions are those of the new file."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = {}
    kept = (
        {name: value for name, value in arguments.items() if name not in _STALE_ARGUMENTS}
        if isinstance(arguments, dict)
        else {}
    )
    if convolutions:
        kept["conv_dim"] = _one(pair.rank for pair in convolutions)
        kept["conv_alpha"] = _one(pair.alpha for pair in convolutions)
    return json.dumps(kept)
