"""Kinds of models on which an offset does not do what it does on a plain one: distilled, v-prediction, inpainting, Pony…

Told by what is in the file where that tells it, else by names: those of the file and in its metadata, word by word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lib_dpo.families.model import Model
from lib_dpo.offsets.prediction import prediction_of

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of ponyDiffusionV6XL: pony, Diffusion, V, XL
_NAMES = ("modelspec.title", "ss_output_name", "ss_sd_model_name")  # metadata that hold names of models
_GUIDED = re.compile(r"(^|\.)time_embed(ding)?\.cond_proj\.")  # the guidance embedding of an LCM
_DISTILLED = ("turbo", "lightning", "lcm", "dmd")
_HYPER = re.compile(r"hyper[-_ ]?sd|hyper.*\d+[-_ ]?steps?", re.IGNORECASE)  # alone, a word of many other names
_FAR = {"pony": "Pony", "illustrious": "Illustrious", "noobai": "NoobAI", "noob": "NoobAI"}


@dataclass(frozen=True)
class Breed:
    """`kind` is distilled, v-prediction, inpainting, or far from the base; what tells it, and what that means for an offset."""

    kind: str
    because: str
    advice: str

    @property
    def text(self) -> str:
        return f"{self.because}: {self.advice}"


def breeds_of(model: Model) -> tuple[Breed, ...]:
    """What a model is beside its architecture; nothing for a plain one. Reads the header and what lies beside the file."""
    return tuple(_found(model))


def _found(model: Model) -> Iterator[Breed]:
    names = [model.name, *(model.checkpoint.metadata.get(name, "") for name in _NAMES)]
    words = {word.casefold() for name in names for word in _WORD.findall(name)}
    guided = any(_GUIDED.search(key) for key in model.checkpoint.infos)
    named = next((word for word in _DISTILLED if word in words), "hyper" if any(map(_HYPER.search, names)) else "")
    if guided or named:
        yield Breed(
            "distilled",
            "it holds the guidance embedding of a model that is distilled for few steps"
            if guided
            else f"distilled for few steps, says the word {named} in its name",
            "an offset of a plain pair may do less or something else there; keep its own steps and CFG scale, start at "
            "strength 0.5 and compare",
        )
    if prediction_of(model).effective in ("v", "edm-v"):
        yield Breed("v-prediction", "it predicts v", "take the offset of a pair that predicts v too, not that of an eps model")
    if model.recognised.in_channels == 9:
        yield Breed(
            "inpainting",
            "an inpainting model",
            "offsets of a plain pair fit it, and leave the channels of mask and masked picture as they are",
        )
    if far := next((name for word, name in _FAR.items() if word in words), ""):
        yield Breed(
            "far from the base",
            f"a {far} model, says its name",
            "trained so far from its base that an offset does less there and may do something else; try strengths 0.3 to 1 and "
            "compare",
        )
