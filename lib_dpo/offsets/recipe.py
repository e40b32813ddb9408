"""The record of a bake in a checkpoint's metadata: written when it is saved, read when somebody asks what is inside."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_dpo import __version__
from lib_dpo.errors import printable
from lib_dpo.files.header import MAX_HEADER_BYTES, read_header
from lib_dpo.offsets.lora.metadata import STALE_METADATA

_RECIPE, _MODELS = "sd_merge_recipe", "sd_merge_models"  # where the WebUI's own merger writes them (modules/extras.py there)
_TYPE = "dpo-offset"
_MOST, _LONGEST, _LARGEST = 20, 100, 1e6  # bakes told of one file, letters of a name, strength: files may say anything


@dataclass(frozen=True)
class Ingredient:
    """One offset that was baked into a file."""

    offset: str
    strength: float
    blocks: str = ""  # "" for all at 1
    rank: int | None = None  # to which a LoRA was cut
    kind: str = ""  # "lora" or "dense"; "" where an older version did not tell

    def __str__(self) -> str:
        return f"{self.offset} × {self.strength:g}{self._details}"

    @property
    def text(self) -> str:
        """The same for an infotext, from which `ingredient_of` reads it again."""
        return f"{self.offset} x {self.strength:.10g}{self._details}"

    @property
    def _details(self) -> str:
        found = "; ".join(filter(None, (f"rank {self.rank}" if self.rank else "", self.blocks)))
        return f" ({found})" if found else ""


def ingredient_of(text: str) -> Ingredient | None:
    """What an infotext tells of a bake, also one that an older version wrote; None where it cannot be read."""
    match = re.fullmatch(r"(.+) x ([-+]?[\d.]+(?:e[-+]?\d+)?)(?: \((?:rank (\d+))?(?:; )?([^()]*)\))?", text.strip())
    try:
        found = match and Ingredient(match[1], float(match[2]), match[4] or "", int(match[3] or 0) or None)
    except ValueError:
        return None
    return found if found and abs(found.strength) <= _LARGEST else None


def with_recipe(
    metadata: Mapping[str, str], added: Ingredient, *, models: tuple[str, str], hashes: tuple[str, str], name: str, half: bool
) -> dict[str, str]:
    """The target's metadata with the recipe of one more bake, in the form that the WebUI's merger writes.

    Args:
        models: names of the target and of the offset. hashes: SHA-256 of both, "" where it was not asked for.
        name: of the new checkpoint. half: whether it is written in fp16.
    """
    kept = {"format": "pt"} | {key: text for key, text in metadata.items() if key not in STALE_METADATA}
    recipe = {
        "type": _TYPE,
        "primary_model_hash": hashes[0],
        "secondary_model_hash": hashes[1],
        "tertiary_model_hash": None,
        "interp_method": "DPO offset",
        "multiplier": added.strength,
        "save_as_half": half,
        "custom_name": name,
        "blocks": added.blocks,
        "offset": added.offset,
        "offset_kind": added.kind,
        "rank": added.rank,
        "tool_version": __version__,
    }
    history = _object(kept.get(_MODELS))
    for sha256, model, own in zip(hashes, models, (kept.get(_RECIPE), None), strict=True):
        if sha256:
            history.setdefault(sha256, {"name": model, "legacy_hash": None, _RECIPE: own})
    return kept | {_RECIPE: json.dumps(recipe), _MODELS: json.dumps(history)}


def baked_in(metadata: Mapping[str, str]) -> tuple[Ingredient, ...]:
    """The offsets that were baked into a file one after the other, the last one first, as far as its metadata tells."""
    history, recipe = _object(metadata.get(_MODELS)), _object(metadata.get(_RECIPE))
    found: list[Ingredient] = []
    while recipe.get("type") == _TYPE and len(found) < _MOST:
        strength = recipe.get("multiplier")
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) <= _LARGEST:
            break
        found.append(
            Ingredient(
                _text(recipe.get("offset")) or "an offset",
                float(strength),
                _text(recipe.get("blocks")),
                _rank(recipe.get("rank")),
                _text(recipe.get("offset_kind")),
            )
        )
        entry = history.pop(str(recipe.get("primary_model_hash")), None)  # each once: a recipe may name itself
        recipe = _object(entry.get(_RECIPE)) if isinstance(entry, dict) else {}
    return tuple(found)


def is_bake(path: Path) -> bool:
    """Whether a .safetensors file says that this tool baked an offset into it; of most files little is read."""
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES or _TYPE.encode() not in file.read(length):
                return False
    except OSError:
        return False
    return bool(baked_in(read_header(path).metadata))


def _rank(value: object) -> int | None:
    """A rank out of a file; None for whatever else stands there, and where it was not cut."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST else None


def _text(value: object) -> str:
    """One short line out of a file; "" for whatever else stands there."""
    return printable(" ".join(value.split()))[:_LONGEST] if isinstance(value, str) else ""


def _object(text: object) -> dict[str, Any]:
    """A JSON object out of a file; {} for whatever else stands there."""
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):  # no JSON, or a number of thousands of digits
        return {}
    return found if isinstance(found, dict) else {}
