"""Keys that were not understood or found no place, in words: which part of a model goes without them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_PLACES = (
    (
        "text encoder",
        re.compile(
            r"(^|[._])(te\d?|text_encoders?|text_encoder_\d|text_model|text_projection|clip_[a-z]|self_attn|resblocks|t5xxl)([._]|$)"
            r"|cond_stage_model\.|conditioner\.|(^|\.)encoder\.layers\."
        ),
    ),
    ("VAE", re.compile(r"(^|[._])(vae|first_stage_model|quant_conv)([._]|$)")),
    (
        "UNet",
        re.compile(
            r"(^|[._])(unet|diffusion_model|(down|up)_blocks|mid_block|(input|output)_blocks|middle_block|time_embed(ding)?"
            r"|(label|add)_emb(edding)?|conv_(in|out|norm_out))([._]|$)"
        ),
    ),
)


def place_of(key: str) -> str:
    """The part of a model that a key names, by its look: "text encoder", "UNet", "VAE" or "" for none of them."""
    return next((place for place, pattern in _PLACES if pattern.search(key)), "")


def unplaced_lines(keys: Iterable[str]) -> list[str]:
    """One sentence for each part of a model with keys that were left out; none for no keys."""
    by_place: dict[str, list[str]] = {}
    for key in keys:
        by_place.setdefault(place_of(key), []).append(key)
    return [_sentence(place, found) for place, found in sorted(by_place.items(), reverse=True)]


def twin_lines(keys: Sequence[str]) -> list[str]:
    """That keys of a LoRA were counted once with others that name the same weight; none for no keys."""
    one = "1 key says again what another says, and counts"
    several = f"{len(keys):,} keys say again what others say, and count"
    return [f"{several} once, first {keys[0]}" if len(keys) > 1 else f"{one} once: {keys[0]}"] if keys else []


def _sentence(place: str, keys: list[str]) -> str:
    count = f"{len(keys):,} key{'s' if len(keys) > 1 else ''}"
    if not place:
        return f"left out: {count} of no part of a model that is known here, first {keys[0]}"
    are = "are not understood or have" if len(keys) > 1 else "is not understood or has"
    return f"the {place}'s part is missing or incomplete: {count} {are} no place here, first {keys[0]}"
