"""Comparisons: plans and lists as people type them, the order of work, the labelled grid, and the figures' verdicts."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageFont

from lib_dpo.errors import Cancelled, SettingError
from lib_dpo.hosts.base import Silent
from lib_dpo.pictures import lettering
from lib_dpo.pictures import plan as planning
from lib_dpo.pictures.drawing import Grid, difference_map, draw_grid, where_most
from lib_dpo.pictures.effects import CAVEAT, effects, fallen_apart, pixels, structure
from lib_dpo.pictures.plan import (
    MAX_PICTURES,
    UNTOUCHED,
    Cell,
    Plan,
    Variant,
    parse_seeds,
    parse_strengths,
    run,
    strength_variants,
)

LONG = "masterpiece, best quality, " * 60 + "x" * 400


@dataclass
class Recording(Silent):
    """A job that counts, and is cancelled after so many checks."""

    counts: list[int] = field(default_factory=list)
    checks_left: int | None = None

    def cells(self, count: int) -> None:
        self.counts.append(count)

    def check(self) -> None:
        if self.checks_left is not None:
            self.checks_left -= 1
            self.cancelled = self.checks_left < 0
        super().check()


def plan_of(strengths: str = "0.5, 1", prompts: int = 2, seeds: int = 2, size: tuple[int, int] = (64, 64)) -> Plan:
    names = [f"prompt {i}" for i in range(prompts)]
    return Plan(names, range(seeds), strength_variants(parse_strengths(strengths)), *size)


def colour(cell: Cell) -> tuple[int, int, int]:
    """A colour that no other cell of a plan has."""
    return (int(40 + 60 * (cell.variant.value or 0)), 30 + 50 * cell.seed, 20 + 10 * len(cell.prompt) + ord(cell.prompt[-1]))


def flat(cell: Cell, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour(cell))


def photo(shift: float = 0.0, size: int = 64, seed: int = 0) -> np.ndarray:
    """Soft shapes with some texture, about as rough as a photo."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(9 * x + 5 * y + phase) for phase in rng.uniform(0, 6, 3)]
    values = 128 + 60 * np.stack(waves, axis=-1) + rng.normal(0, 4, (size, size, 3))
    return np.clip(values + shift, 0, 255)


def picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().astype(np.uint8))


def report(shifts: dict[float, Any], rows: int = 2) -> Any:
    """The effects of strengths, of which each adds so many grey levels, or is the pixels themselves."""
    plan = Plan(["a"], range(rows), strength_variants(shifts))

    def make(cell: Cell) -> Image.Image:
        change = shifts.get(cell.variant.value, 0.0)
        return picture(change if isinstance(change, np.ndarray) else photo(change, seed=cell.seed))

    return effects(plan, run(plan, make, Silent()))


# ---- lists as people type them ----


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.5, 1, 1.5", (0.5, 1, 1.5)),
        (" 1 ,\n.5;2., ", (1, 0.5, 2)),
        ("0-2 (+0.5)", (0, 0.5, 1, 1.5, 2)),
        ("0-2(0.5)", (0, 0.5, 1, 1.5, 2)),
        ("0-2 (+0.75)", (0, 0.75, 1.5)),
        ("0-2 [5]", (0, 0.5, 1, 1.5, 2)),
        ("0 – 0.4 (+0.1)", (0, 0.1, 0.2, 0.3, 0.4)),
        ("2-0 (-1)", (2, 1, 0)),
        ("2-0", (2, 1, 0)),
        ("-1-1", (-1, 0, 1)),
        ("-1 - -0.5 [2]", (-1, -0.5)),
        ("1e-3, 1-1", (0.001, 1)),
        ("0-1 [4]", (0, 0.3333333333, 0.6666666667, 1)),
    ],
)
def test_strengths_are_parsed(text: str, values: tuple[float, ...]):
    assert parse_strengths(text) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5, 1x", "'1x' is neither a number nor a range"),
        ("nan", "'nan' is neither"),
        ("", "nothing is given"),
        (" , ", "nothing is given"),
        ("0-2 (-0.5)", r"'0-2 \(-0.5\)': the step leads away from the end; write \(\+0.5\)"),
        ("0-2 (0)", "must not be 0"),
        ("0-2 [1]", "count in brackets must be 2 to 400"),
        ("0-2 [999999999]", "count in brackets"),
        ("0-1e300 (+1e-300)", "more than 400 values"),
        ("0-399, 0-9", "with '0-9' they are more than 400"),
    ],
)
def test_strengths_are_refused_by_part(text: str, message: str):
    with pytest.raises(SettingError, match=message):
        parse_strengths(text)


def test_seeds_are_parsed_and_random_ones_drawn_once():
    assert parse_seeds("1,2, 100-103") == (1, 2, 100, 101, 102, 103)
    assert parse_seeds("0-10 (+5)") == (0, 5, 10)
    drawn = parse_seeds("-1, 7, -1", random.Random(3))
    assert drawn == parse_seeds("-1, 7, -1", random.Random(3))
    assert drawn[1] == 7
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**32 for seed in drawn)


@pytest.mark.parametrize(
    ("text", "message"),
    [("1.5", "1.5 is not a whole number"), ("-2", "-2 is out of range"), ("9e99", "out of range"), ("a", "'a' is neither")],
)
def test_seeds_are_refused_by_part(text: str, message: str):
    with pytest.raises(SettingError, match=f"seeds: .*{message}"):
        parse_seeds(text)


@given(st.lists(st.floats(-100, 100, allow_nan=False), min_size=1, max_size=20))
def test_printed_strengths_are_read_back(values: list[float]):
    assert parse_strengths(", ".join(map(repr, values))) == tuple(values)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 100))
def test_ranges_stay_between_their_ends_in_even_steps(first: int, last: int, hundredths: int):
    step = hundredths / 100
    values = parse_strengths(f"{first}-{last} ({step})") if abs(last - first) / step < MAX_PICTURES else (float(first),)
    assert values[0] == first
    assert all(min(first, last) <= value <= max(first, last) for value in values)
    np.testing.assert_allclose(np.abs(np.diff(values)), step, atol=1e-9)  # one rounding of a double each


@given(st.text(alphabet="0123456789.,-+()[]eE \n;–x", max_size=40))
def test_any_text_is_parsed_or_refused(text: str):
    for parse in (parse_strengths, parse_seeds):
        try:
            values = parse(text)
        except SettingError:
            continue
        assert 0 < len(values) <= MAX_PICTURES


# ---- plans ----


def test_the_untouched_model_comes_first_and_duplicates_go():
    plan = Plan([" a ", "b", "a", " "], [2, 1, 2], strength_variants([1, 0.5, 0, 1, -0.0]))
    assert plan.prompts == ("a", "b")
    assert plan.seeds == (2, 1)
    assert [variant.label for variant in plan.variants] == ["untouched", "strength 1", "strength 0.5"]
    assert [variant.value for variant in plan.variants] == [None, 1.0, 0.5]


def test_variants_may_hold_anything():
    plan = Plan(["a"], [1], [Variant("rank 8", {"rank": 8})])
    assert plan.cells[1].variant.value == {"rank": 8}
    assert len(set(plan.cells)) == 2


def test_a_column_is_finished_before_the_next_begins():
    order = [(cell.variant.label, cell.prompt, cell.seed) for cell in plan_of("1", prompts=2, seeds=2).cells]
    rows = [("prompt 0", 0), ("prompt 0", 1), ("prompt 1", 0), ("prompt 1", 1)]
    assert order == [(label, *row) for label in ("untouched", "strength 1") for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["  "]}, "no prompt to compare"),
        ({"seeds": []}, "no seed to compare"),
        ({"variants": strength_variants([0])}, "nothing to compare the untouched model with"),
        ({"width": 0}, "0x512 cannot be made"),
        ({"seeds": range(201)}, "1 prompt × 201 seeds × 2 columns are 402 pictures; .* Use at most 200 seeds"),
        (
            {"seeds": range(3), "variants": strength_variants(n / 20 for n in range(200))},
            "at most 400 are made. Use at most 133 columns",
        ),
        ({"seeds": range(10), "width": 4096, "height": 4096}, "336 megapixels; at most 200 .* Use at most 5 seeds, or make"),
        ({"width": 20000, "height": 20000}, "Use fewer prompts, seeds and columns, or make smaller"),
        ({"seeds": range(200), "width": 64, "height": 256}, "is 51,200 pixels long; .* fewer prompts or seeds"),
    ],
)
def test_plans_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(SettingError, match=message):
        Plan(**{"prompts": ["a"], "seeds": [1], "variants": strength_variants([1]), **arguments})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_strengths_must_be_finite(bad: float):
    with pytest.raises(SettingError, match="not a finite number"):
        strength_variants([1, bad])


# ---- making the pictures ----


def test_all_cells_are_made_in_order():
    plan, job, made = plan_of(), Recording(), []

    def make(cell: Cell) -> Image.Image:
        made.append(cell)
        return flat(cell)

    images = run(plan, make, job)
    assert tuple(made) == plan.cells == tuple(images)
    assert job.counts == [12]


@pytest.mark.parametrize(("checks", "expected"), [(0, 0), (1, 1), (3, 3)])
def test_cancel_stops_after_the_picture_at_work(checks: int, expected: int):
    made = []
    with pytest.raises(Cancelled):
        run(plan_of(), lambda cell: made.append(cell) or flat(cell), Recording(checks_left=checks))
    assert len(made) == expected


def test_rows_may_differ_in_size_but_not_their_pictures():
    plan = plan_of("1", prompts=1, seeds=2)
    images = run(plan, lambda cell: flat(cell, (64, 64 + 32 * cell.seed)), Silent())
    drawn = draw_grid(plan, images, model="m", offset="o")
    assert all(drawn.boxes[cell][3] - drawn.boxes[cell][1] == image.height for cell, image in images.items())
    with pytest.raises(SettingError, match="strength 1, seed 0: the picture is 96x64, but 64x64 untouched"):
        run(plan, lambda cell: flat(cell, (96 if cell.variant.value else 64, 64)), Silent())


def test_pictures_larger_than_planned_are_refused_after_the_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "MAX_MEGAPIXELS", 0.1)
    made = []
    with pytest.raises(SettingError, match="megapixels"):
        run(plan_of(), lambda cell: made.append(cell) or flat(cell, (128, 128)), Silent())
    assert len(made) == 1


# ---- the grid ----


def ink(drawn: Grid, box: tuple[int, int, int, int]) -> int:
    """How many pixels of a part of the grid are not paper."""
    part = np.asarray(drawn.image.crop(box))
    return int((part != 255).any(axis=-1).sum())


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (200, 96), (96, 200), (512, 512)])
def test_cells_land_where_they_should_and_labels_around_them(size: tuple[int, int]):
    plan = plan_of(size=size)
    drawn = draw_grid(plan, run(plan, lambda cell: flat(cell, size), Silent()), model="model", offset="offset")
    assert list(drawn.boxes) == [Cell(*row, variant) for row in plan.rows for variant in plan.variants]
    for cell, (left, top, right, bottom) in drawn.boxes.items():
        assert (right - left, bottom - top) == size
        for at in ((left, top), (right - 1, bottom - 1), ((left + right) // 2, (top + bottom) // 2)):
            assert drawn.image.getpixel(at) == colour(cell)
        for at in ((left - 1, top), (right, top), (left, top - 1), (left, bottom)):
            assert drawn.image.getpixel(at) == (255, 255, 255)
    first, last = (drawn.boxes[Cell(*plan.rows[i], plan.variants[i])] for i in (0, -1))
    assert ink(drawn, (first[0], 0, last[2], first[1])) > 50, "columns are labelled"
    for prompt, seed in plan.rows:
        left, top, _, bottom = drawn.boxes[Cell(prompt, seed, UNTOUCHED)]
        assert ink(drawn, (0, top, left, bottom)) > 20, "rows are labelled"
    assert ink(drawn, (0, last[3] + 1, drawn.image.width, drawn.image.height)) > 50, "there is a footer"
    width, height = drawn.image.size
    for edge in ((0, 0, 8, height), (width - 8, 0, width, height), (0, 0, width, 8), (0, height - 8, width, height)):
        assert ink(drawn, edge) == 0, "nothing runs out of the picture"


@pytest.mark.parametrize("text", [LONG, "花火" * 200, "🦊 עברית\x00\u200b\n\ttab", "ж" * 300, "word"], ids=str.__len__)
@pytest.mark.parametrize("size", [16, 64, 256])
def test_any_text_stays_within_its_place(text: str, size: int):
    plan = Plan([text, "b"], [2**63 - 1, 3], [Variant(text, 1), Variant("x" * 50, 2)], size, size)
    images = run(plan, lambda cell: Image.new("RGB", (size, size), "black"), Silent())
    drawn = draw_grid(plan, images, model=text, offset=text, settings={"Negative prompt": text}, note=text)
    blank = drawn.image.copy()
    for box in drawn.boxes.values():
        assert np.asarray(drawn.image.crop(box)).max() == 0, "no label lies on a picture"
        blank.paste("white", box)
    width, height = drawn.image.size
    bounds = ImageChops.invert(blank).getbbox()
    assert bounds is not None
    assert min(bounds[:2]) >= 6
    assert bounds[2] <= width - 6
    assert bounds[3] <= height - 6
    columns = [drawn.boxes[Cell(*plan.rows[0], variant)] for variant in plan.variants]
    for one, other in pairwise(columns):
        middle, top = (one[2] + other[0]) // 2, columns[0][1]
        assert ink(drawn, (middle, top - 9, middle + 1, top)) == 0, "labels of columns do not touch"


def test_labels_grow_with_the_pictures():
    heights = []
    for size in (64, 256, 1024):
        plan = plan_of("1", prompts=1, seeds=1, size=(size, size))
        drawn = draw_grid(plan, run(plan, lambda cell, s=size: flat(cell, (s, s)), Silent()), model="m", offset="o")
        heights.append(next(iter(drawn.boxes.values()))[1])
    assert heights[0] < heights[1] < heights[2]


@pytest.mark.parametrize("font", ["default", "bitmap"])
def test_it_is_drawn_without_the_fonts_of_matplotlib(font: str, monkeypatch: pytest.MonkeyPatch):
    default, truetype = ImageFont.load_default, ImageFont.truetype

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, str):
            raise OSError("cannot open resource")
        return truetype(file, *args, **kwargs)  # Pillow's own font, out of memory

    def old(*args: Any) -> Any:
        if args:
            raise TypeError("load_default() takes 0 positional arguments")
        return getattr(ImageFont, "load_default_imagefont", default)()

    monkeypatch.setattr(lettering.ImageFont, "truetype", refuse)
    if font == "bitmap":  # Pillow before 10.1
        monkeypatch.setattr(lettering.ImageFont, "load_default", old)
    for cached in (lettering.typeface, lettering._font_file):
        cached.cache_clear()
    try:
        plan = Plan(["花火 and a fox", LONG], [1], strength_variants([1]), 64, 64)
        drawn = draw_grid(plan, run(plan, flat, Silent()), model="模型", offset="o")
        left, top, _, bottom = drawn.boxes[plan.cells[0]]
        assert ink(drawn, (0, top, left, bottom)) > 20
        assert difference_map(flat(plan.cells[0]), flat(plan.cells[2])).width >= 64
    finally:
        for cached in (lettering.typeface, lettering._font_file):
            cached.cache_clear()


def test_lines_break_between_words_and_end_in_an_ellipsis():
    face = lettering.typeface(16)
    lines = lettering.wrap("one two three  four five six seven eight nine ten", face, 90, 3)
    assert len(lines) == 3
    assert all(face.width(line) <= 90 for line in lines)
    assert " ".join(lines).startswith("one two three four")
    assert lines[-1].endswith("…")
    assert lines[-1][:-1].split()[-1] in "four five six seven eight", "a whole word before the ellipsis"
    assert lettering.wrap("short", face, 90, 3) == ["short"]
    assert "".join(lettering.wrap("w" * 40, face, 90, 9)) == "w" * 40


def test_the_png_says_how_it_was_made():
    plan = Plan(["a fox, red", "a cat"], [5, 6], strength_variants([1]))
    images = run(plan, flat, Silent())
    settings = {"Steps": 20, "Sampler": "Euler a", "Negative prompt": "ugly,\nbad"}
    drawn = draw_grid(plan, images, model="m: x", offset="dpo", settings=settings)
    with Image.open(io.BytesIO(drawn.png())) as read:
        text = read.info["parameters"]
        assert read.size == drawn.image.size
    assert text == drawn.infotext
    assert text.splitlines() == [
        "a fox, red",
        "Negative prompt: ugly, bad",
        'Steps: 20, Sampler: Euler a, Seed: 5, Size: 512x512, Model: "m: x", Script: DPO compare, Compare offset: dpo, '
        'Compare columns: "untouched, strength 1", Compare seeds: "5, 6", Compare prompts: "a fox, red\\na cat"',
    ]


# ---- differences ----


def test_equal_pictures_have_a_black_map():
    image = picture(photo())
    values = np.asarray(difference_map(image, image))
    assert values[:64, 28:92].max() <= 4  # the map's darkest colour; the map is centred above a wider bar


def test_the_map_is_bright_where_pictures_differ_and_tells_its_scale():
    before = picture(photo(size=256))
    after = before.copy()
    after.paste((255, 255, 255), (64, 64, 128, 128))
    values = np.asarray(difference_map(before, after)).astype(int)
    assert values[:64].max() <= 4
    assert values[70:120, 70:120].sum(axis=-1).min() > 200
    assert values.shape[0] > 256 + 20, "a bar and words below"
    weak = np.asarray(difference_map(before, after, scale=255)).astype(int)
    strong = np.asarray(difference_map(before, after, scale=8)).astype(int)
    assert strong[96, 96].sum() > weak[96, 96].sum()
    with pytest.raises(SettingError, match="256x256 and 128x128 cannot be compared"):
        difference_map(before, before.resize((128, 128)))


@pytest.mark.parametrize(("left", "right"), [(0, 24), (30, 60), (200, 256), (100, 140)])
def test_the_place_where_pictures_differ_most_lies_in_what_changed(left: int, right: int):
    before = picture(photo(size=256))
    after = before.copy()
    after.paste((255, 255, 255), (left, 64, right, 128))
    after.paste((0, 0, 0), (170, 0, 172, 40))  # a thin line elsewhere is less
    assert left < 256 * where_most(before, after) < right
    assert where_most(before, before) == 0.5
    with pytest.raises(SettingError, match="256x256 and 128x128 cannot be compared"):
        where_most(before, before.resize((128, 128)))


def test_structure_is_one_for_equal_pictures_and_falls_with_noise():
    before = photo().astype(np.float32)
    noise = np.random.default_rng(1).normal(0, 20, before.shape).astype(np.float32)
    assert structure(before, before) == pytest.approx(1, abs=1e-6)
    assert structure(before, before + 5) > structure(before, before + noise)
    assert structure(before[:5, :6], before[:5, :6]) == pytest.approx(1, abs=1e-6), "smaller than a window"


def test_structure_is_wang_s_formula():
    x, y = photo(size=8).astype(np.float32), photo(size=8, seed=1).astype(np.float32)
    a, b = ((p.astype(np.float64) @ [0.299, 0.587, 0.114]).ravel() for p in (x, y))
    cov = np.cov(a, b, bias=True)
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * a.mean() * b.mean() + c1) * (2 * cov[0, 1] + c2)
    expected /= (a.mean() ** 2 + b.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)
    assert structure(x, y) == pytest.approx(expected, rel=1e-4)  # float32 brightness


def test_transparent_pictures_lie_on_white():
    assert pixels(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).min() == 255
    assert pixels(Image.new("L", (4, 4), 7)).shape == (4, 4, 3)


# ---- figures and verdicts ----


def test_figures_are_means_with_their_range():
    plan = Plan(["a"], [0, 1], strength_variants([1]))
    images = run(plan, lambda cell: picture(photo(20 * cell.seed if cell.variant.value else 0)), Silent())
    (effect,) = effects(plan, images).effects
    assert (effect.least, effect.most) == (0, pytest.approx(20, abs=0.5))  # some pixels are clipped at 255
    assert effect.difference == pytest.approx(10, abs=0.5)
    assert effect.level == "strong"
    figures = effects(plan, images).as_json()["effects"][0]
    assert figures["variant"] == "strength 1"
    assert figures["difference"]["mean"] == effect.difference


@pytest.mark.parametrize(("shift", "level"), [(0.0, "none"), (0.6, "none"), (4.0, "subtle"), (20.0, "strong")])
def test_levels(shift: float, level: str):
    assert report({1.0: shift, 2.0: shift}).effects[0].level == level


def test_an_even_effect_gets_a_start_with_the_caveat():
    found = report({0.5: 5.0, 1.0: 10.0, 1.5: 15.0})
    assert found.text == "The effect grows steadily up to 1.5; start with 1."
    assert found.suggested == Variant("strength 1")
    assert found.caveat == CAVEAT
    assert "more seeds" in report({0.5: 5.0, 1.0: 10.0}, rows=1).caveat


def test_no_effect_gets_the_reasons():
    found = report({0.5: 0.0, 1.0: 0.6})
    assert found.text.startswith("No visible effect at any strength. Three usual reasons")
    assert found.suggested is None
    assert "equal to the last bit" in report({0.5: 0.0, 1.0: 0.0}).text


NOISE = np.random.default_rng(0).uniform(0, 255, (64, 64, 3))


@pytest.mark.parametrize(
    ("shifts", "text"),
    [
        ({0.5: 3.0, 1.0: 6.0, 2.0: NOISE}, "up to 1; the pictures fall apart from 2 on; start with 1."),
        ({1.0: NOISE, 2.0: NOISE}, "fall apart from strength 1 on; try lower ones, such as 0.25."),
        ({0.5: 2.0, 1.0: 4.0, 1.5: 40.0}, "jumps between 1 and 1.5; start with 1, where it is subtle."),
        ({0.5: 0.5, 1.0: 30.0}, "jumps between 0.5 and 1; compare strengths between the two."),
        ({0.5: 20.0, 1.0: 5.0}, "does not grow steadily"),
        ({0.5: 8.0, 1.0: 16.0, 2.0: 15.0}, "In these pictures the effect grows up to 1 and no further; start with 1."),
        ({1.0: 20.0}, "The effect of strength 1 is strong; compare it with others, such as 0.5."),
        ({1.0: 4.0}, "The effect of strength 1 is subtle; compare it with others, such as 2."),
        ({0.5: 8.0, 1.0: 9.0, 1.5: 17.0}, "The effect grows up to 1.5; start with 1."),
        ({-1.0: 20.0, -2.0: 30.0}, "largest with strength -2 (30.0 grey levels on average) and smallest with strength -1"),
        ({0.5: 0.2, 1.0: 0.5, 2.0: NOISE}, "No visible effect up to strength 1; the pictures fall apart from 2 on"),
        ({-2.0: 30.0, 0.5: 0.2}, "up to strength 0.5. With strength -2, the opposite of DPO, the effect is strong."),
    ],
)
def test_verdicts(shifts: dict[float, Any], text: str):
    assert text in report(shifts).text


def test_other_variants_are_ranked():
    plan = Plan(["a"], [0], [Variant("rank 8", "8"), Variant("rank 64", "64")])
    found = effects(plan, run(plan, lambda cell: picture(photo(float(cell.variant.value or 0))), Silent()))
    assert found.text.startswith("The change is largest with rank 64")
    assert found.suggested is None


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (np.zeros((64, 64, 3)), "one flat colour"),
        (NOISE, "noise"),
        (np.where(photo() > 128, 255.0, 0.0), "burnt out"),
        (photo(30), ""),
        (np.clip(128 + 1.2 * (photo() - 128), 0, 255), ""),
    ],
)
def test_pictures_that_fall_apart_are_found(after: np.ndarray, reason: str):
    before = photo().astype(np.float32)
    assert fallen_apart(before, after.astype(np.float32)) == reason
    assert fallen_apart(after.astype(np.float32), after.astype(np.float32)) == "", "as the untouched one is"
