"""Pictures that a program draws: one to three shapes of one colour on light paper, in one part of the picture.

A `Scene` is what a picture shows or what a caption says of it; `caption` puts it into words and `draw` onto paper.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

SIZE = 64
COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (214, 45, 45),
        "yellow": (245, 196, 30),
        "green": (45, 158, 70),
        "blue": (45, 95, 205),
        "purple": (150, 60, 175),
        "black": (30, 30, 34),
    }
)
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("one", "two", "three")
POSITIONS: Mapping[str, tuple[int, int]] = MappingProxyType(  # direction from the middle of the picture: x right, y down
    {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
)
_PAPER = (222, 244)  # grey levels of the background
_JITTER = 12.0  # of a colour's channels, either way
_RADIUS = {1: (8.0, 11.0), 2: (7.5, 9.0), 3: (6.5, 7.5)}
_OFFSET = (13.0, 17.0)  # of the group from the middle of the picture
_SPREAD = {1: (0.0,), 2: (-13.0, 13.0), 3: (-20.5, 0.0, 20.5)}  # along the other axis
_SHIFT = {1: 5.0, 2: 2.0, 3: 1.5}  # of every shape, either way

Pictures = NDArray[np.uint8]  # (n, SIZE, SIZE, 3)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. None is a property that a caption does not name."""

    count: str | None = None
    colour: str | None = None
    shape: str | None = None
    position: str | None = None


PROPERTIES = tuple(field.name for field in fields(Scene))
VALUES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"count": COUNTS, "colour": tuple(COLOURS), "shape": SHAPES, "position": tuple(POSITIONS)}
)


def all_scenes() -> tuple[Scene, ...]:
    """Every scene with all four properties, always in the same order."""
    return tuple(Scene(*values) for values in itertools.product(*(VALUES[name] for name in PROPERTIES)))


def held_out() -> tuple[Scene, ...]:
    """A fifth of all scenes that no training ever shows or names. Every pair of values still occurs among the others."""
    scenes = all_scenes()
    order = np.random.Generator(np.random.PCG64(1)).permutation(len(scenes))
    return tuple(scenes[n] for n in sorted(order[: len(scenes) // 5]))


def caption(scene: Scene) -> str:
    """A scene in words, such as `two red circles on the left`; `shapes` where it names no shape."""
    noun = (scene.shape or "shape") if scene.count == "one" else _plural(scene.shape or "shape")
    return " ".join(word for word in (scene.count, scene.colour, noun, scene.position) if word)


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def draw(scenes: Sequence[Scene], rng: np.random.Generator) -> Pictures:
    """One picture of each scene (which must name all properties); sizes, places and tints vary with `rng`."""
    for scene in scenes:
        assert None not in astuple(scene), "only a scene that names everything can be drawn"
    return np.concatenate([_draw(scene, rng) for scene in scenes]) if scenes else np.zeros((0, SIZE, SIZE, 3), np.uint8)


def _draw(scene: Scene, rng: np.random.Generator) -> Pictures:
    count = COUNTS.index(scene.count or "") + 1
    radius = rng.uniform(*_RADIUS[count])
    cover = np.zeros((SIZE, SIZE))
    for x, y in _places(scene.position or "", count, rng):
        cover = np.maximum(cover, coverage(scene.shape or "", x, y, radius))
    paper = np.full(3, rng.uniform(*_PAPER))
    ink = np.array(COLOURS[scene.colour or ""]) + rng.uniform(-_JITTER, _JITTER, 3)
    picture = paper + (ink - paper) * cover[..., None]
    drawn: Pictures = np.clip(np.rint(picture), 0, 255).astype(np.uint8)[None]
    return drawn


def _places(position: str, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Centres (x, y) in pixels: side by side along one axis, away from the middle along the other."""
    direction = np.array(POSITIONS[position], float)
    along = direction[::-1]
    offset = rng.uniform(*_OFFSET)
    spread = np.array(_SPREAD[count])[:, None]
    shift = rng.uniform(-1, 1, (count, 2)) * _SHIFT[count]
    centres: NDArray[np.float64] = SIZE / 2 + offset * direction + spread * along + shift
    return centres


def coverage(shape: str, x: float, y: float, radius: float, size: int = SIZE) -> NDArray[np.float64]:
    """Share of every pixel, (size, size), that a shape around (x, y) covers; from its signed distance."""
    v, u = np.mgrid[0:size, 0:size] + 0.5
    u, v = u - x, v - y
    return np.clip(0.5 - _distance(shape, u, v, radius), 0.0, 1.0)


def _distance(shape: str, u: NDArray[np.float64], v: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Signed distance to the edge, negative inside; shapes of one radius look about equally large."""
    if shape == "circle":
        return np.asarray(np.hypot(u, v) - radius)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(u), np.abs(v)) - 0.9 * radius)
    if shape == "cross":
        wide, narrow = 1.05 * radius, 0.36 * radius
        bars = [np.maximum(np.abs(a) - wide, np.abs(b) - narrow) for a, b in ((u, v), (v, u))]
        return np.asarray(np.minimum(*bars))
    assert shape == "triangle", shape
    height, half = 1.8 * radius, 1.1 * radius
    slope = (half * (v + 0.5 * height) - height * np.abs(u)) / np.hypot(half, height)
    return np.asarray(np.maximum(-slope, v - 0.5 * height))
