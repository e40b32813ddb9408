"""The pictures that a program draws, what the captions say, and the judge that reads them back."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from lib_dpo.toy.judge import adherence, read
from lib_dpo.toy.pictures import PROPERTIES, SIZE, Pictures, Scene, all_scenes, caption, draw, held_out

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

SCENE = Scene("two", "red", "circle", "on the left")


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Scene], Pictures]:
    scenes = list(all_scenes()) * 2
    return scenes, draw(scenes, np.random.default_rng(3))


def test_judge_reads_what_was_drawn(drawn: tuple[list[Scene], Pictures]):
    scenes, pictures = drawn
    seen = read(pictures)
    for name in PROPERTIES:
        right = [getattr(one, name) == getattr(other, name) for one, other in zip(seen, scenes, strict=True)]
        assert np.mean(right) >= 0.99, name
    assert np.mean([one == other for one, other in zip(seen, scenes, strict=True)]) >= 0.99


def test_judge_bears_the_noise_of_a_decoder(drawn: tuple[list[Scene], Pictures]):
    scenes, pictures = drawn[0][::4], drawn[1][::4]
    noisy = pictures + np.random.default_rng(4).normal(0, 6, pictures.shape)
    seen = read(np.clip(noisy, 0, 255).astype(np.uint8))
    assert np.mean([one == other for one, other in zip(seen, scenes, strict=True)]) >= 0.99


def test_judge_sees_a_picture_as_it_is_and_not_as_its_caption():
    pictures = draw([SCENE, SCENE], np.random.default_rng(0))
    asked = [SCENE, replace(SCENE, count="three", colour="blue")]
    assert adherence(pictures, asked).tolist() == [[1.0, 1.0], [0.5, 0.0]]


def test_what_a_caption_does_not_name_does_not_count():
    pictures = draw([SCENE], np.random.default_rng(0))
    assert adherence(pictures, [Scene(colour="red")]).tolist() == [[1.0, 1.0]]
    assert adherence(pictures, [Scene(colour="red", position="at the top")]).tolist() == [[0.5, 0.0]]
    assert adherence(pictures, [Scene()]).tolist() == [[1.0, 1.0]]


def test_judge_names_nothing_that_it_does_not_know():
    paper = np.full((SIZE, SIZE, 3), 230, np.uint8)
    smudge, orange, many = paper.copy(), paper.copy(), paper.copy()
    smudge[20:24, 5:60] = (214, 45, 45)  # a line of a known colour
    orange[26:38, 26:38] = (0, 220, 220)  # a known shape of an unknown colour, in the middle
    for x, y in itertools.product((8, 24, 40, 56), repeat=2):
        many[y - 4 : y + 4, x - 4 : x + 4] = (30, 30, 34)
    noise = np.random.default_rng(0).integers(0, 256, paper.shape).astype(np.uint8)
    seen = read(np.stack([paper, smudge, orange, many, noise]))
    assert seen[0] == Scene()
    assert (seen[1].count, seen[1].colour, seen[1].shape) == ("one", "red", None)
    assert seen[2] == Scene("one", None, "square", None)
    assert seen[3] == Scene(None, "black", "square", None)
    assert seen[4].shape is None
    assert read(np.zeros((0, SIZE, SIZE, 3), np.uint8)) == []


def pillow_draws(kind: str, rng: np.random.Generator, *, blur: float = 0.5, noise: float = 6.0) -> np.ndarray:
    """A shape as Pillow draws it at eight times the size, slightly turned, made smaller, soft and noisy; uint8 (SIZE, SIZE, 3).

    `kind` is circle, triangle, cross, or the share of a square's half side that its corners' radius has, such as 0.3.
    """
    zoom = 8
    x, y = rng.uniform(20, SIZE - 20, 2) * zoom
    radius = rng.uniform(6.5, 11) * zoom
    sheet = Image.new("L", (SIZE * zoom, SIZE * zoom))
    pen = ImageDraw.Draw(sheet)
    if kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    elif kind == "triangle":
        pen.regular_polygon((x, y, 1.2 * radius), 3, fill=255)
    elif kind == "cross":
        arm = rng.uniform(0.28, 0.38) * radius
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
    else:
        side, left, top = (round(each) for each in (1.8 * radius, x - 0.9 * radius, y - 0.9 * radius))
        pen.rounded_rectangle((left, top, left + side, top + side), float(kind) * side / 2, fill=255)
    turned = sheet.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, center=(x, y))
    soft = turned.filter(ImageFilter.GaussianBlur(blur * zoom)).resize((SIZE, SIZE), Image.Resampling.BOX)
    cover = np.asarray(soft)[..., None] / 255.0
    picture = 230 + (np.array((45, 158, 70)) - 230) * cover + rng.normal(0, noise, (SIZE, SIZE, 3))
    return np.asarray(np.clip(np.rint(picture), 0, 255), dtype=np.uint8)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("circle", {"circle"}), ("triangle", {"triangle"}), ("cross", {"cross"}),
        ("0", {"square"}), ("0.15", {"square"}), ("0.3", {"square"}),
        ("0.45", {"square", None}), ("0.55", {None}), ("0.65", {None}), ("0.75", {None, "circle"}),
        ("0.85", {"circle"}), ("1", {"circle"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("blur", "noise"), [(0.0, 0.0), (0.5, 6.0)])
def test_judge_names_shapes_of_another_program_and_leaves_what_lies_between(
    kind: str, names: set[str | None], blur: float, noise: float
):
    rng = np.random.default_rng(7)
    seen = Counter(one.shape for one in read(np.stack([pillow_draws(kind, rng, blur=blur, noise=noise) for _ in range(25)])))
    assert sum(seen[name] for name in names) >= 24, seen  # at most one of 25 is left without a name
    assert seen.keys() <= names | {None}, "no shape is taken for another"


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (SCENE, "two red circles on the left"),
        (Scene("one", "black", "cross", "at the top"), "one black cross at the top"),
        (Scene("three", None, "cross"), "three crosses"),
        (Scene(None, "blue", None, "at the bottom"), "blue shapes at the bottom"),
        (Scene("one"), "one shape"),
    ],
)
def test_captions_are_plain_words(scene: Scene, text: str):
    assert caption(scene) == text


def test_drawing_repeats_with_its_seed_and_varies_without():
    first, again, other = (draw([SCENE], np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_fifth_of_the_scenes_is_held_out_and_every_pair_of_values_is_still_shown():
    hidden = held_out()
    assert hidden == held_out()
    assert len(hidden) == len(all_scenes()) // 5
    shown = set(all_scenes()) - set(hidden)
    for one, other in itertools.combinations(PROPERTIES, 2):
        pairs = {(getattr(scene, one), getattr(scene, other)) for scene in all_scenes()}
        assert {(getattr(scene, one), getattr(scene, other)) for scene in shown} == pairs


def test_the_app_names_the_words_that_the_toy_knows():
    from lib_dpo.settings import BUNDLED_CFG, BUNDLED_WORDS
    from lib_dpo.toy.generate import GUIDANCE
    from lib_dpo.toy.pictures import VALUES

    assert not [word for words in VALUES.values() for word in words if word not in BUNDLED_WORDS]
    assert BUNDLED_CFG == GUIDANCE
