"""Reads count, colour, shape and position off a picture: what was drawn, by rules, without any model.

The paper is the median colour. What differs from it falls into connected pieces; each piece's colour is compared with
the palette, and its outline, as seen from its middle, with that of every shape. What lies between two shapes, such as a
square with round corners, has no name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lib_dpo.toy.pictures import COLOURS, COUNTS, POSITIONS, PROPERTIES, SHAPES, SIZE, Pictures, Scene, coverage

_CONTRAST = 60.0  # grey levels: pictures without any such difference are empty
_SPECK = 20  # pixels: smaller pieces do not count
_OFF_PALETTE = 75.0  # distance in RGB from which a colour has no name
_ANGLES = 72  # of the rays from a piece's middle to its outline
_TILT = 2  # of these: a shape may be turned by as much, either way, which is 10 degrees
_STEP = 0.25  # pixels between two looks along a ray
# How far an outline may lie from a shape's, at most: times what lies between it and the next shape, and between the two
# shapes. A cross with fat arms is still a cross to people, and nothing else; a square with round corners is disputed.
_CLEAR = {"circle": 0.5, "square": 0.5, "triangle": 0.7, "cross": 0.7}
_MIDDLE = 6.0  # pixels: a group nearer to the middle is nowhere
_ROUNDS = 4 * SIZE  # enough for a piece as winding as fits

Gray = NDArray[np.float64]


@dataclass(frozen=True)
class _Piece:
    """A connected piece of a picture."""

    x: float
    y: float
    colour: str | None
    shape: str | None


def read(pictures: Pictures) -> list[Scene]:
    """What every picture shows. None where pieces disagree, or where a property is none of the known ones."""
    if not len(pictures):
        return []
    images = pictures.astype(np.float64)
    paper = np.median(images.reshape(len(images), -1, 3), axis=1)
    contrast = np.abs(images - paper[:, None, None, :]).max(axis=-1)
    peak = np.percentile(contrast.reshape(len(images), -1), 98, axis=1)
    cover = contrast / np.maximum(peak, _CONTRAST)[:, None, None]
    labels = _label(cover > 0.5)
    return [_read_one(*parts) for parts in zip(images, cover, labels, strict=True)]


def adherence(pictures: Pictures, scenes: Sequence[Scene]) -> NDArray[np.float64]:
    """How many of the properties that the captions name the pictures show: (n, 2), share of them and 1.0 if all."""
    shares = []
    for seen, said in zip(read(pictures), scenes, strict=True):
        right = [getattr(seen, name) == getattr(said, name) for name in PROPERTIES if getattr(said, name)]
        shares.append((sum(right) / len(right), float(all(right))) if right else (1.0, 1.0))
    return np.array(shares).reshape(-1, 2)


def _label(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Connected pieces of every picture, (n, SIZE, SIZE): equal positive numbers; 0 is paper.

    Every pixel takes the largest number among itself and its four neighbours until nothing changes.
    """
    numbers = np.arange(1, mask[0].size + 1).reshape(mask.shape[1:])
    labels = np.pad(np.where(mask, numbers, 0), ((0, 0), (1, 1), (1, 1)))
    inner = labels[:, 1:-1, 1:-1]
    for _ in range(_ROUNDS):
        spread = inner.copy()
        for shifted in (labels[:, :-2, 1:-1], labels[:, 2:, 1:-1], labels[:, 1:-1, :-2], labels[:, 1:-1, 2:]):
            np.maximum(spread, shifted, out=spread)
        spread[~mask] = 0
        if np.array_equal(spread, inner):
            break
        inner[:] = spread
    return inner


def _read_one(image: Gray, cover: Gray, labels: NDArray[np.intp]) -> Scene:
    numbers, sizes = np.unique(labels[labels > 0], return_counts=True)
    pieces = [_piece(image, cover, labels == number) for number in numbers[sizes >= _SPECK]]
    return Scene(
        count=COUNTS[len(pieces) - 1] if 0 < len(pieces) <= len(COUNTS) else None,
        colour=_agreed([piece.colour for piece in pieces]),
        shape=_agreed([piece.shape for piece in pieces]),
        position=_position(pieces),
    )


def _agreed(names: Sequence[str | None]) -> str | None:
    return names[0] if len(set(names)) == 1 else None


def _piece(image: Gray, cover: Gray, mask: NDArray[np.bool_]) -> _Piece:
    rows, columns = np.nonzero(mask)
    inside = mask & (cover > 0.85)
    colour = image[inside if inside.any() else mask].mean(axis=0)
    box = np.s_[max(rows.min() - 1, 0) : rows.max() + 2, max(columns.min() - 1, 0) : columns.max() + 2]
    near = _grown(mask)[box]
    return _Piece(columns.mean() + 0.5, rows.mean() + 0.5, _colour(colour), _shape(np.clip(cover[box], 0, 1) * near))


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The piece and the pixels around it, which hold its soft edge."""
    padded = np.pad(mask, 1)
    return padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _colour(rgb: NDArray[np.float64]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(other))) for name, other in COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < _OFF_PALETTE else None


def _shape(piece: Gray) -> str | None:
    """The shape whose outline is clearly the nearest.

    A square with corners of half its half side is still a square, one of four fifths is a circle, and between them lies
    what people would argue about.
    """
    outline = _outline(piece)
    distances = {name: _apart(outline, other) for name, other in _outlines().items()}
    nearest = min(distances, key=distances.__getitem__)
    others = [distance for name, distance in distances.items() if name != nearest]
    apart = [_apart(_outlines()[nearest], other) for name, other in _outlines().items() if name != nearest]
    return nearest if distances[nearest] < _CLEAR[nearest] * min(*others, *apart) else None


@cache
def _outlines() -> dict[str, Gray]:
    return {name: _outline(coverage(name, SIZE / 2, SIZE / 2, 9.0)) for name in SHAPES}


def _apart(outline: Gray, other: Gray) -> float:
    """Root mean square of the differences, in mean radii, in the tilt in which the two are most alike."""
    turned = [np.roll(other, n) for n in range(-_TILT, _TILT + 1)]
    return float(np.sqrt(np.square(outline - turned).mean(axis=1).min()))


def _outline(piece: Gray) -> Gray:
    """How far the edge is from the middle of a piece's coverage, (_ANGLES,), over the mean: alike at every size.

    The edge is where the coverage first falls to one half, between pixels too: a soft edge lies where a sharp one would.
    """
    piece = np.pad(piece, 1)  # so that every ray ends on paper
    v, u = np.mgrid[: piece.shape[0], : piece.shape[1]]
    middle = np.array([(piece * v).sum(), (piece * u).sum()]) / piece.sum()
    angles = 2 * np.pi * np.arange(_ANGLES) / _ANGLES
    steps = _STEP * np.arange(int(np.hypot(*piece.shape) / _STEP) + 2)
    rays = middle[:, None, None] + np.array([np.sin(angles), np.cos(angles)])[:, :, None] * steps
    seen = _between(piece, *rays)
    ends = np.argmax(seen < 0.5, axis=1)
    edges = np.zeros(_ANGLES)  # where the middle is not covered, nothing is to be seen from it
    for n in np.flatnonzero(ends):
        inside, outside = seen[n, ends[n] - 1], seen[n, ends[n]]
        edges[n] = steps[ends[n]] - _STEP * (0.5 - outside) / (inside - outside)
    return np.asarray(edges / max(edges.mean(), _STEP))


def _between(piece: Gray, y: Gray, x: Gray) -> Gray:
    """Coverage at places between the pixels' middles, linear along both axes; beyond the piece that of its border."""
    y, x = (np.clip(place, 0, size - 1.001) for place, size in zip((y, x), piece.shape, strict=True))
    top, left = y.astype(int), x.astype(int)
    down, right = y - top, x - left
    upper = piece[top, left] * (1 - right) + piece[top, left + 1] * right
    lower = piece[top + 1, left] * (1 - right) + piece[top + 1, left + 1] * right
    return np.asarray(upper * (1 - down) + lower * down)


def _position(pieces: Sequence[_Piece]) -> str | None:
    if not pieces:
        return None
    middle = np.mean([(piece.x, piece.y) for piece in pieces], axis=0) - SIZE / 2
    reach = {name: float(middle @ np.array(direction)) for name, direction in POSITIONS.items()}
    farthest = max(reach, key=reach.__getitem__)
    return farthest if reach[farthest] >= _MIDDLE else None
