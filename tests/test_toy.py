"""The pictures that a program draws, what the captions say, and the judge that reads them back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lib_dpo.toy.judge import adherence, read
from lib_dpo.toy.pictures import PROPERTIES, SIZE, Pictures, Scene, all_scenes, caption, draw, held_out

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
