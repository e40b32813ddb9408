"""Pictures from the bundled model, many at once: deterministic DDIM with guidance. The networks are diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib_dpo.toy.pictures import Pictures

STEPS = 20
GUIDANCE = 3.0
LATENTS = (4, 8, 8)  # channels, rows, columns: pictures are eight times as large
_SCHEDULE = (0.00085, 0.012, 1000)  # SD 1.5's: first and last beta, linear in their roots


def alphas_cumprod() -> Tensor:
    """SD 1.5's noise schedule, (1000,): the share of the picture's variance left at every time."""
    first, last, times = _SCHEDULE
    betas = torch.linspace(first**0.5, last**0.5, times, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


@torch.no_grad()
def sample(
    unet: Any,
    context: Tensor,
    empty: Tensor,
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents for a batch of embedded prompts by DDIM with eta 0 (arXiv 2010.02502, eq. 12).

    Args:
        context: (n, tokens, width), one row a picture; `empty`: (1, tokens, width), the embedded empty prompt.
        seeds: one a picture; a picture depends on its own prompt and seed alone, up to rounding.

    Returns:
        (n, *LATENTS), in the scale of the denoiser.
    """
    drawn = [torch.randn(LATENTS, generator=torch.Generator().manual_seed(seed)) for seed in seeds]  # alike on every device
    x = torch.stack(drawn).to(context.device)
    both = torch.cat([empty.expand(len(context), -1, -1), context])
    alphas = alphas_cumprod()
    times = [round(t) for t in np.linspace(len(alphas) - 1, 0, steps + 1)[:-1]]
    for n, t in enumerate(times):
        a = float(alphas[t])
        a_next = float(alphas[times[n + 1]]) if n + 1 < steps else 1.0
        free, led = unet(x.repeat(2, 1, 1, 1), t, both).sample.chunk(2)
        eps = free + guidance * (led - free)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps
        if on_step:
            on_step(n + 1, steps)
    return x


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Pictures:
    """Latents in the scale of the denoiser as pictures."""
    images = vae.decode(latents / vae.config.scaling_factor).sample
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pictures: Pictures = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pictures
