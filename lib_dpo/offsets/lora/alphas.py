"""The alphas of a LoRA that is written: such that every program multiplies its pairs by the same numbers.

A pair counts alpha / rank times. diffusers takes the commonest alpha of a file for all layers, and other alphas by the names of
their layers; for attention layers in kohya's naming, and for all of text encoders, it looks under names that nothing has
(seen in 0.42 with PEFT 0.21: `get_peft_kwargs` in utils/peft_utils.py gets `…attn1.processor.to_q_lora.down.weight`). Where
such a layer's alpha is not the commonest, its pair would count several times too much or too little there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

_READ_AS_THE_COMMONEST = re.compile(r"attn|^(lora|lycoris)_te|^text_encoder")


def alphas_for_all(wanted: Mapping[str, float]) -> dict[str, float]:
    """Alphas by module: those wanted where every program reads them, else one for all, the smallest above 0.

    With the smallest, products of the factors come out larger rather than smaller than what they stand for: hosts multiply
    in fp16, whose small numbers are coarse. The factors have to carry what the alpha does not: see `Factors.rounded`.

    Args:
        wanted: alphas by the module's name as it is in the file; kohya's, since PEFT's files have none.
    """
    fixed = {alpha for name, alpha in wanted.items() if _READ_AS_THE_COMMONEST.search(name)}
    counts = Counter(wanted.values()).most_common(2)
    is_commonest = len(counts) < 2 or counts[0][1] > counts[1][1]
    if not fixed or (len(fixed) == 1 and is_commonest and counts[0][0] in fixed):
        return dict(wanted)
    one = min((alpha for alpha in wanted.values() if alpha > 0), default=1.0)
    return dict.fromkeys(wanted, one)
