"""The alphas of a LoRA that is written: such that every program multiplies its pairs by the same numbers.

A pair counts alpha / rank times. diffusers takes the commonest alpha of the UNet or of a text encoder for all its layers, and
other alphas by the names of their layers; for attention layers in kohya's naming, and for all of text encoders, it looks under
names that nothing has (seen in 0.42 with PEFT 0.21: `get_peft_kwargs` in utils/peft_utils.py gets
`...attn1.processor.to_q_lora.down.weight`). Where such a layer's alpha is not the commonest, its pair would count several
times too much or too little there.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

_TEXT_ENCODER = re.compile(r"(lora|lycoris)_te\d?(?=_)|text_encoder(_2)?(?=\.)")
_FARTHEST = 256  # times smaller than the commonest, below which an alpha does not become that of others


def readable_alphas(wanted: Mapping[str, float], least: Mapping[str, float] | None = None) -> dict[str, float]:
    """Alphas by module: those wanted where every program reads them, else one for all of that UNet or text encoder.

    The factors have to carry what the alpha does not: see `Factors.rounded`. The one alpha is the smallest above 0 that is no
    outlier, so that products of the factors come out larger rather than smaller than what they stand for: hosts multiply in
    fp16, whose small numbers are coarse. (A layer that turns out to have fewer components than planned is the exception.)

    Args:
        wanted: alphas by the module's name as it is in the file; kohya's, since PEFT's files have none.
        least: by module, below which its factors would hold larger numbers than they can; the one alpha stays above all.
    """
    least = least or {}
    components: dict[str, dict[str, float]] = {}
    for name, alpha in wanted.items():
        components.setdefault(encoder_of(name), {})[name] = alpha
    found: dict[str, float] = {}
    for place, alphas in components.items():
        floor = max((least.get(name, 0.0) for name in alphas), default=0.0)
        found |= _readable(alphas, place, 2.0 ** math.ceil(math.log2(floor)) if floor else 0.0)
    return {name: found[name] for name in wanted}


def encoder_of(module: str) -> str:
    """What the names of a text encoder's modules begin with; "" for the UNet's."""
    encoder = _TEXT_ENCODER.match(module)
    return encoder[0] if encoder else ""


def _readable(alphas: Mapping[str, float], encoder: str, floor: float) -> dict[str, float]:
    read_as_the_commonest = {alpha for name, alpha in alphas.items() if encoder or "attn" in name}
    counts = Counter(alphas.values()).most_common(2)
    commonest = counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else None
    if read_as_the_commonest <= {commonest}:
        return dict(alphas)
    positive = [alpha for alpha in alphas.values() if alpha > 0]
    middle = Counter(positive).most_common(1)[0][0] if positive else 1.0
    smallest = min((alpha for alpha in positive if alpha * _FARTHEST >= middle), default=1.0)
    return dict.fromkeys(alphas, max(smallest, floor))
