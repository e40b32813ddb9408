"""Prompts that A1111 has encoded and keeps: thrown away, or told apart, when a text encoder changes under them.

The host keeps the last conds by prompt, settings, checkpoint and extra networks (`cached_params` in processing.py of
1.10.1); nothing there says which weights the text encoder had.
"""

from __future__ import annotations

from typing import Any

import torch

_KEY = "dpo_offset"  # no extra network has that name: the host skips it, but its caches are keyed by it too


def renew(model: Any) -> None:
    """Throw away prompts encoded with other weights, and encode the empty one again, as the host does after loading."""
    from modules import devices, sd_models

    clear()
    if hasattr(model, "cond_stage_model_empty_prompt"):
        with torch.inference_mode(False), torch.no_grad(), devices.autocast():
            model.cond_stage_model_empty_prompt = sd_models.get_empty_cond(model)


def clear() -> None:
    """In place: a generation that is set up already holds the same lists."""
    from modules import processing

    first, second = processing.StableDiffusionProcessing, processing.StableDiffusionProcessingTxt2Img
    for cache in (first.cached_c, first.cached_uc, second.cached_hr_c, second.cached_hr_uc):
        cache[:] = [None, None]


def mark(p: Any, extra_network_data: dict[str, Any], marks: list[str]) -> None:
    """Let the cond caches tell prompts encoded with our changes from others; theirs are keyed by these dictionaries.

    Those of the hires pass are marked from the first pass on: the host may encode its prompts then already.
    """
    from modules import extra_networks

    for data in (extra_network_data, getattr(p, "extra_network_data", None), getattr(p, "hr_extra_network_data", None)):
        if isinstance(data, dict):
            data.pop(_KEY, None)
            if marks:
                data[_KEY] = [extra_networks.ExtraNetworkParams(items=list(marks))]
