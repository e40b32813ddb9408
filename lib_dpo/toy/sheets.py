"""The pictures of a study: a labelled grid, as `compare` draws its own, and galleries of those that the change alters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lib_dpo.pictures.drawing import draw_grid
from lib_dpo.pictures.plan import Cell, Plan, Variant, strength_variants
from lib_dpo.toy.gallery import Group, Item, gallery
from lib_dpo.toy.generate import GUIDANCE, STEPS
from lib_dpo.toy.pictures import SIZE, caption
from lib_dpo.toy.series import SHOWN_SEEDS, Drawn, Series, shown, subjects
from lib_dpo.toy.study import FULL

_ZOOM = 2  # 64 pixels are too small beside the labels
_FRAME = 4  # pixels
_RIGHT, _WRONG = "#15803d", "#ffffff"
_LORA_ROWS = 8
_TOY = (
    "Toy pictures, of prompts that no training showed. Framed in green: the judge, a program, finds everything that the prompt "
    "names."
)
_NOTE = (
    "Toy pictures. Framed in green: the judge finds everything that the prompt names. Prompts that no training showed, and "
    "seeds, were fixed before any picture was seen."
)


def strength_sheet(series: Series, *, model: str, offset: str) -> bytes:
    """PNG: a row per prompt and seed, a column per strength of the full change."""
    variants = strength_variants(series.strengths)
    return _sheet(dict(zip(variants, series.strengths.values(), strict=True)), model, offset)


def turned_sheet(series: Series) -> bytes:
    """PNG: all pictures that became right from strength 0 to 1, and all that became wrong, before and after."""
    base, full = series.strengths[0.0], series.strengths[FULL]
    right, wrong = np.flatnonzero(full.scores > base.scores), np.flatnonzero(full.scores < base.scores)
    columns = {"strength 0": base, "strength 1": full}
    n = len(base.scores)
    stayed = n - len(right) - len(wrong)
    return gallery(
        f"What became of {n} pictures from strength 0 to 1",
        f"{_TOY} The other {stayed} stayed right or stayed wrong.",
        [
            Group(f"Became right: {len(right)}", _items(right, columns)),
            Group(f"Became wrong: {len(wrong)}", _items(wrong, columns)),
        ],
    )


def lora_sheet(series: Series) -> bytes:
    """PNG: pictures that the full change alters: without DPO, with LoRAs by rank, and with the full change, at strength 1."""
    base, full = series.strengths[0.0], series.strengths[FULL]
    columns = {"without DPO": base, **{f"rank {rank}": drawn for rank, drawn in series.loras.items()}, "full change": full}
    altered = np.abs(base.pictures.astype(float) - full.pictures).mean(axis=(1, 2, 3))
    most = np.sort(np.argsort(-altered, kind="stable")[:_LORA_ROWS])
    heading = f"The {len(most)} of {len(altered)} pictures whose pixels the full change altered most"
    return gallery("What LoRAs make of pictures that the full change alters", _TOY, [Group(heading, _items(most, columns))])


def _items(places: NDArray[np.intp], columns: Mapping[str, Drawn]) -> list[Item]:
    pairs = subjects(len(next(iter(columns.values())).scores))
    return [
        Item(
            caption(pairs[n][0]),
            pairs[n][1],
            [(name, _framed(drawn.pictures[n], bool(drawn.scores[n]))) for name, drawn in columns.items()],
        )
        for n in places
    ]


def _sheet(columns: Mapping[Variant, Drawn], model: str, offset: str) -> bytes:
    prompts = list(dict.fromkeys(caption(scene) for scene, _ in shown()))
    side = _ZOOM * SIZE + 2 * _FRAME
    plan = Plan(prompts, SHOWN_SEEDS, tuple(columns), width=side, height=side)
    images = {
        Cell(prompt, seed, variant): _framed(picture, bool(score))
        for variant, drawn in columns.items()
        for (prompt, seed), picture, score in zip(plan.rows, drawn.pictures, drawn.scores, strict=False)  # the first ones
    }
    settings = {"Steps": STEPS, "Sampler": "DDIM", "CFG scale": GUIDANCE, "Size": f"{SIZE}x{SIZE}"}
    return draw_grid(plan, images, model=model, offset=offset, settings=settings, note=_NOTE).png()


def _framed(picture: NDArray[np.uint8], right: bool) -> Image.Image:
    image = Image.fromarray(picture)
    large = image.resize((_ZOOM * image.width, _ZOOM * image.height), Image.Resampling.NEAREST)
    return ImageOps.expand(large, _FRAME, fill=_RIGHT if right else _WRONG)
