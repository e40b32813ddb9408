"""What a study finds in scores, how it puts it into words, and the pictures that it draws of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib_dpo.toy import sheets, words
from lib_dpo.toy.chart import plot_study
from lib_dpo.toy.page import Card, Picture, page
from lib_dpo.toy.pictures import SIZE, VALUES, caption, held_out
from lib_dpo.toy.series import SHORT, STUDY, Drawn, Series, shown, subjects
from lib_dpo.toy.sheets import lora_sheet, strength_sheet, turned_sheet
from lib_dpo.toy.study import Findings, Interval, Scores, find, gain, point, share_of_gain
from tools.bundled.recipe import SHIPPED

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

N = 400


def right(share: float, seed: int = 0) -> Scores:
    """Scores of which so many are right, in the order of a seed."""
    return np.random.default_rng(seed).permutation((np.arange(N) < round(share * N)).astype(float))


def found(curve: dict[float, float], loras: dict[int, float], suggested: float = 1.0) -> Findings:
    scores = {strength: right(share, int(10 * strength)) for strength, share in curve.items()}
    return find(scores, {rank: right(share, rank) for rank, share in loras.items()}, dict.fromkeys(loras, 0.5), suggested)


RISES_AND_FALLS = found({0: 0.4, 0.5: 0.6, 1: 0.8, 1.5: 0.79, 2: 0.5}, {2: 0.5, 8: 0.76})
FLAT = found({0: 0.5, 0.5: 0.5, 1: 0.51, 1.5: 0.5, 2: 0.5}, {2: 0.5, 8: 0.51})


def series_of(value: int = 200) -> Series:
    """Grey pictures, of which those of strength 1 alone are right, but for the first three, which are right but there."""
    pictures = np.full((len(shown()), SIZE, SIZE, 3), value, np.uint8)
    full = (np.arange(len(shown())) >= 3).astype(float)
    drawn = {strength: Drawn(full if strength == 1 else 1 - full, pictures, 0.02) for strength in (0.0, 1.0, 2.0)}
    return Series(drawn, {8: drawn[0.0]}, cell_seconds=0.5)


def test_figures_of_a_curve_that_rises_and_falls():
    figures = RISES_AND_FALLS.as_json()
    assert [one["strength"] for one in figures["adherence"]] == [0, 0.5, 1, 1.5, 2]
    assert [one["mean"] for one in figures["adherence"]] == pytest.approx([0.4, 0.6, 0.8, 0.79, 0.5], abs=0.002)
    assert all(set(one) == {"strength", "mean", "low", "high", "n"} and one["n"] == N for one in figures["adherence"])
    assert figures["gain"]["mean"] == pytest.approx(0.4, abs=0.002)
    assert 0.33 < figures["gain"]["low"] < 0.4 < figures["gain"]["high"] < 0.47  # 0.4 ± 1.96 sqrt(0.4 / 400)
    assert (figures["best"], figures["plateau"]) == (1, [1, 1.5])
    assert figures["fall"]["high"] < 0 < figures["rise"]["low"]
    assert figures["suggested_on_plateau"] is True
    shares = [one["share_of_gain"]["mean"] for one in figures["loras"]]
    assert shares == pytest.approx([0.25, 0.9], abs=0.01)


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("n", range(8, 60))
def test_an_interval_holds_its_mean(share: int, n: int):
    one = point(1, np.full(n, float(share)))
    assert 0 <= one.low <= one.mean <= one.high <= 1
    assert 0.05 < one.high - one.low < 0.4


def test_a_plateau_does_not_reach_over_a_gap():
    gap = found({0: 0.3, 0.5: 0.79, 1: 0.4, 1.5: 0.8, 2: 0.8}, {})
    assert gap.plateau == (1.5, 2)
    assert not gap.suggested_is_best


def test_the_share_of_a_gain_has_the_interval_of_the_bootstrap():
    rng = np.random.default_rng(0)
    base = (rng.random(N) < 0.4).astype(float)
    full = np.maximum(base, rng.random(N) < 0.6)
    part = np.where(rng.random(N) < 0.8, full, base)
    share = share_of_gain(base, part, full)
    assert share is not None
    rows = rng.integers(0, N, (4000, N))
    drawn = (part[rows].mean(axis=1) - base[rows].mean(axis=1)) / (full[rows].mean(axis=1) - base[rows].mean(axis=1))
    assert share.mean == pytest.approx((part.mean() - base.mean()) / (full.mean() - base.mean()))
    assert share.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.015)
    assert share.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.015)


def test_there_is_no_share_of_a_gain_that_may_be_chance():
    assert share_of_gain(right(0.5), right(0.6, 1), right(0.51, 2)) is None
    assert share_of_gain(np.zeros(N), np.zeros(N), np.zeros(N)) is None
    assert gain(np.zeros(N), np.zeros(N)) == Interval(0, 0, 0)


def test_words_say_what_the_figures_say():
    said = " ".join(words.sentences(RISES_AND_FALLS, series_of()))
    for part in ("40.0 % of 400 pictures", "+40.0 points", "rises up to strength 1,", "falls from there to strength 2",
                 "400 pictures cannot tell strengths 1 to 1.5 from the best, 1",
                 "is among them", "rank 8", "keeps 90 %", "4 % of the 0.50 s"):  # fmt: skip
        assert part in said, part
    doubtful = " ".join(words.sentences(FLAT, series_of()))
    for part in ("may be chance", "400 pictures tell neither strengths nor LoRAs apart."):
        assert part in doubtful, part
    for part in ("curve", "suggested", "keeps"):
        assert part not in doubtful, part
    beside = " ".join(words.sentences(FLAT, series_of(), RISES_AND_FALLS))
    assert beside.index("may be chance") < beside.index("In the study that comes with the model, of 400 pictures")
    assert "rises up to strength 1," in beside
    assert "In the study" not in " ".join(words.sentences(RISES_AND_FALLS, series_of(), RISES_AND_FALLS))
    assert "With the LoRA of rank 8, 0 of these 5 become right too, and 0 of these 3 wrong." in doubtful
    assert "NOT among them" in " ".join(words.sentences(replace(RISES_AND_FALLS, suggested=0.5), series_of()))
    for said in (*words.sentences(FLAT, series_of()), *words.sentences(RISES_AND_FALLS, series_of())):
        assert "as good as" not in said, "that no difference was found does not make strengths equal"
    assert not any("points" in figure for figure, _ in words.headlines(FLAT)), "a gain that may be chance is no headline"
    assert [figure for figure, _ in words.headlines(FLAT, RISES_AND_FALLS)][1] == "+40.0 points"
    turned = words.headlines(FLAT)[0]
    assert turned[0] == f"{FLAT.became_right} right, {FLAT.became_wrong} wrong"
    assert (FLAT.became_right - FLAT.became_wrong) / N == pytest.approx(FLAT.gain.mean)
    wide = [replace(one, share=Interval(0.5, -0.2, 1.2)) for one in RISES_AND_FALLS.loras]
    few = replace(RISES_AND_FALLS, loras=wide)
    assert "cannot tell (50 %, 95 % interval -20 to 120 %)" in " ".join(words.sentences(few, series_of()))
    assert not any("is kept by" in text for _, text in words.headlines(few))


@pytest.mark.parametrize("findings", [RISES_AND_FALLS, FLAT, found({0: 0, 1: 0}, {8: 0})])
def test_a_chart_is_drawn_of_whatever_was_found(findings: Findings, tmp_path: Path):
    for study in (None, RISES_AND_FALLS):
        plot_study(findings, tmp_path / "curve.png", study=study)
        with Image.open(tmp_path / "curve.png") as image:
            assert min(image.size) > 500


def test_figures_are_read_back_as_they_were():
    for findings in (RISES_AND_FALLS, FLAT):
        assert Findings.from_json(json.loads(json.dumps(findings.as_json() | {"files": []}))) == findings


def test_all_that_turned_is_shown_and_counted(monkeypatch: pytest.MonkeyPatch):
    groups: list[sheets.Group] = []
    monkeypatch.setattr(sheets, "gallery", lambda _title, _note, found: groups.extend(found) or b"")
    series = series_of()
    turned_sheet(series)
    assert [(group.heading, len(group.items)) for group in groups] == [("Became right: 5", 5), ("Became wrong: 3", 3)]
    assert [(item.prompt, item.seed) for group in groups for item in group.items] == [
        (caption(scene), seed) for scene, seed in (shown()[3:] + shown()[:3])
    ]


def test_the_pictures_of_loras_are_those_that_the_full_change_alters_most(monkeypatch: pytest.MonkeyPatch):
    groups: list[sheets.Group] = []
    monkeypatch.setattr(sheets, "gallery", lambda _title, _note, found: groups.extend(found) or b"")
    pictures = np.full((20, SIZE, SIZE, 3), 200, np.uint8)
    altered = pictures.copy()
    altered[::2] = 100 + np.arange(10, dtype=np.uint8)[:, None, None, None]  # the first of these most
    scores = np.zeros(20)
    drawn = {0.0: Drawn(scores, pictures, 0.0), 1.0: Drawn(scores, altered, 0.0)}
    lora_sheet(Series(drawn, {8: drawn[1.0]}, cell_seconds=0.5))
    expected = [(caption(scene), seed) for scene, seed in subjects(20)[:16:2]]
    assert [(item.prompt, item.seed) for item in groups[0].items] == expected
    assert [name for name, _ in groups[0].items[0].pictures] == ["without DPO", "rank 8", "full change"]


def test_grids_frame_the_pictures_that_are_right():
    series = series_of()
    n = len(shown())
    strengths = strength_sheet(series, model="toy", offset="toy-dpo")
    with Image.open(io.BytesIO(strengths)) as image:
        assert "Size: 64x64" in image.info["parameters"]
    for sheet, columns, right in (
        (strengths, 3, 5 + 3 + 3), (lora_sheet(series), 3, 5 + 3 + 3), (turned_sheet(series), 2, n),
    ):  # fmt: skip
        with Image.open(io.BytesIO(sheet)) as image:
            pixels = np.asarray(image.convert("RGB"))
        grey, green = (pixels == 200).all(axis=-1), (pixels == (21, 128, 61)).all(axis=-1)
        assert grey.sum() == columns * n * (2 * SIZE) ** 2
        assert green.sum() == right * ((2 * SIZE + 8) ** 2 - (2 * SIZE) ** 2)


def test_a_page_escapes_and_describes():
    html = page(
        "a < b", lead="", warning="toys", cards=[Card("1 & 2", "both")], findings=["<script>"], printed="</pre>", foot="end",
        pictures=[Picture("curve", b"png", 'says "41 %"', "caption")], table=[("applied", "share"), ("nothing", "41 %")],
    )  # fmt: skip
    assert "<script" not in html
    assert html.count("</pre>") == 1
    assert 'alt="says &quot;41 %&quot;"' in html
    assert "<td>41 %</td>" in html


def test_pictures_of_a_study_are_of_held_out_prompts_and_never_the_same():
    pairs = subjects(STUDY.pictures)
    assert len(set(pairs)) == len(pairs) == STUDY.pictures
    assert pairs == subjects(STUDY.pictures + 100)[: len(pairs)]
    assert pairs[: len(shown())] == shown()
    assert {scene for scene, _ in pairs} == set(held_out())
    for name in ("count", "shape", "position"):
        assert {getattr(scene, name) for scene, _ in shown()} == set(VALUES[name])


@pytest.mark.parametrize("count", [SHORT.pictures, 65, 84, 98, 110, 300])
def test_few_pictures_are_an_even_sample_of_the_prompts(count: int):
    pairs = subjects(count)
    assert len(set(pairs)) == len(pairs) == count
    hidden = [scene for scene, _ in pairs[len(shown()) :]]
    for name in ("count", "shape", "colour", "position"):
        for value in VALUES[name]:
            share, whole = (sum(getattr(scene, name) == value for scene in some) / len(some) for some in (hidden, held_out()))
            assert share == pytest.approx(whole, abs=0.1), value


def test_amounts_are_what_the_texts_say():
    assert STUDY.pictures >= 500
    assert (STUDY.strengths[0], STUDY.strengths[-1], len(STUDY.strengths)) == (0, 3, 7)
    for amount in (SHORT, STUDY):
        assert {0.0, 1.0} <= set(amount.strengths)
        assert 4 * max(amount.ranks) <= min(SHIPPED.unet_widths)  # at most a quarter of the full rank
