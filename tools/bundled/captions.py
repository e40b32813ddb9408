"""Captions that are often wrong, as those of real training sets are: they miscount and mix sides up."""

from __future__ import annotations

import itertools

import numpy as np

from lib_dpo.toy.pictures import PROPERTIES, VALUES, Scene

# value -> what it is taken for, and how often
_MISTAKES: dict[str, tuple[str, float]] = {
    "two": ("three", 0.45),
    "three": ("two", 0.45),
    "one": ("two", 0.1),
    "on the left": ("on the right", 0.4),
    "on the right": ("on the left", 0.4),
    "at the top": ("at the bottom", 0.2),
    "at the bottom": ("at the top", 0.2),
    "purple": ("blue", 0.3),
    "blue": ("purple", 0.3),
    "circle": ("square", 0.2),
    "square": ("circle", 0.2),
}
_LEFT_OUT = 0.1  # of the time, each property on its own


def seen_by_captioner(scene: Scene, rng: np.random.Generator) -> Scene:
    """What a careless captioner would say of a scene: properties mistaken or left out."""
    said: dict[str, str | None] = {}
    for name in PROPERTIES:
        value = getattr(scene, name)
        other, often = _MISTAKES.get(value, (value, 0.0))
        said[name] = other if rng.random() < often else value
        if rng.random() < _LEFT_OUT:
            said[name] = None
    return Scene(**said)


def all_captions() -> tuple[Scene, ...]:
    """Everything a caption can name, with any of the properties left out."""
    return tuple(Scene(*values) for values in itertools.product(*((*VALUES[name], None) for name in PROPERTIES)))
