"""The labelled grids of a study, drawn as `compare` draws its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lib_dpo.grid import UNTOUCHED, Cell, Plan, Variant, strength_variants
from lib_dpo.pictures import draw_grid
from lib_dpo.toy.generate import GUIDANCE, STEPS
from lib_dpo.toy.pictures import SIZE, caption
from lib_dpo.toy.series import SHOWN_SEEDS, Drawn, Series, shown
from lib_dpo.toy.study import FULL

_ZOOM = 2  # 64 pixels are too small beside the labels
_FRAME = 4  # pixels
_RIGHT, _WRONG = "#15803d", "#ffffff"
_NOTE = (
    "Toy pictures. Framed in green: the judge finds everything that the prompt names. Prompts that no training showed, and "
    "seeds, were fixed before any picture was seen."
)


def strength_sheet(series: Series, *, model: str, offset: str) -> bytes:
    """PNG: a row per prompt and seed, a column per strength of the full change."""
    variants = strength_variants(series.strengths)
    return _sheet(dict(zip(variants, series.strengths.values(), strict=True)), model, offset)


def lora_sheet(series: Series, *, model: str, offset: str) -> bytes:
    """PNG: the same rows without DPO, with LoRAs by rank, and with the full change, all at strength 1."""
    untouched, full = series.strengths[0.0], series.strengths[FULL]
    loras = {Variant(f"LoRA rank {rank}"): drawn for rank, drawn in series.loras.items()}
    return _sheet({UNTOUCHED: untouched, **loras, Variant("full change"): full}, model, offset)


def _sheet(columns: Mapping[Variant, Drawn], model: str, offset: str) -> bytes:
    prompts = list(dict.fromkeys(caption(scene) for scene, _ in shown()))
    side = _ZOOM * SIZE + 2 * _FRAME
    plan = Plan(prompts, SHOWN_SEEDS, tuple(columns), width=side, height=side)
    images = {
        Cell(prompt, seed, variant): _framed(picture, bool(score))
        for variant, drawn in columns.items()
        for (prompt, seed), picture, score in zip(plan.rows, drawn.shown, drawn.scores, strict=False)  # the first ones
    }
    settings = {"Steps": STEPS, "Sampler": "DDIM", "CFG scale": GUIDANCE, "Size": f"{SIZE}x{SIZE}"}
    return draw_grid(plan, images, model=model, offset=offset, settings=settings, note=_NOTE).png()


def _framed(picture: NDArray[np.uint8], right: bool) -> Image.Image:
    image = Image.fromarray(picture)
    large = image.resize((_ZOOM * image.width, _ZOOM * image.height), Image.Resampling.NEAREST)
    return ImageOps.expand(large, _FRAME, fill=_RIGHT if right else _WRONG)
