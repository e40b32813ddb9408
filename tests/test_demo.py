"""The demo on a model of the trainer's smoke run, whose pictures are noise: its files, its figures and its manners."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny

from lib_dpo.errors import Cancelled
from lib_dpo.toy import demo as demo_module
from lib_dpo.toy.demo import demo
from lib_dpo.toy.series import SHORT, Amount
from tools.bundled.note import note
from tools.bundled.recipe import SMOKE

pytestmark = pytest.mark.newest
STRENGTHS = [0, 0.5, 1, 1.5, 2]


class Told(NamedTuple):
    folder: Path
    figures: dict[str, Any]


@pytest.fixture(scope="module")
def told(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    parent = tmp_path_factory.mktemp("demo")
    folder = parent / "new" / "demo"
    arguments = ("--model", smoke / "model", "-o", folder, "--pictures", 8)
    return Told(folder, tiny.figures(parent / "figures.json", "demo", *arguments))


def test_demo_writes_what_it_says_and_nothing_else(told: Told):
    files = sorted(path.name for path in told.folder.iterdir())
    assert files == [Path(file).name for file in told.figures["files"]]
    assert all(Path(file).is_file() for file in told.figures["files"])
    assert {"report.html", "adherence.png", "turned.png", "strengths.png", "loras.png", "diff.png"} <= set(files)
    assert [path.name for path in told.folder.parent.iterdir()] == ["demo"]


def test_figures_have_the_form_that_others_rely_on(told: Told):
    figures = told.figures
    assert [one["strength"] for one in figures["adherence"]] == STRENGTHS
    for one in figures["adherence"]:
        assert set(one) == {"strength", "mean", "low", "high", "n"}
        assert one["n"] == 8
        assert 0 <= one["low"] <= one["mean"] <= one["high"] <= 1
    assert set(figures["gain"]) == {"mean", "low", "high"}
    assert len(figures["plateau"]) == 2
    assert figures["suggested"] == 1
    assert figures["gain"]["mean"] == pytest.approx((figures["became_right"] - figures["became_wrong"]) / 8)
    assert [one["rank"] for one in figures["loras"]] == list(SHORT.ranks)
    assert 0 < figures["switching"]["switch_seconds"] < 60


def test_every_step_agrees_with_the_others(told: Told):
    figures = told.figures
    for one, lora in zip(figures["extract"], figures["loras"], strict=True):
        assert Path(one["output"]) == told.folder / f"dpo_rank{one['rank']}.safetensors"
        assert one["energy_kept"] == pytest.approx(one["energy_kept_verified"], abs=1e-6) == lora["energy_kept"]
    kept = [one["energy_kept"] for one in figures["extract"]]
    assert kept == sorted(kept)
    assert figures["equals_tuned"] == 1
    assert figures["compat_baked"]["strength_inside"] == pytest.approx(1, abs=1e-3)


def test_the_report_loads_nothing_and_describes_its_pictures(told: Told):
    text = (told.folder / "report.html").read_text(encoding="utf-8")
    words = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//\w|@import|url\(|<script|<link", words)
    pictures = [dict(attributes) for tag, attributes in _tags(text) if tag == "img"]
    assert len(pictures) == 5
    for picture in pictures:
        assert (picture["src"] or "").startswith("data:image/png;base64,iVBOR")
        assert len(picture["alt"] or "") > 40
    assert "toy pictures" in words
    assert str(told.folder.parent) not in words


def _tags(text: str) -> list[tuple[str, list[tuple[str, str | None]]]]:
    found: list[tuple[str, list[tuple[str, str | None]]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, attrs))

    Reader().feed(text)
    return found


def test_the_note_beside_the_model_tells_the_same_figures(told: Told):
    text = note(SMOKE, {}, told.figures)
    first = told.figures["adherence"][0]
    assert f"| 0 | {100 * first['mean']:.1f} % |" in text
    assert f"Share of {first['n']} pictures" in text
    assert f"`compat` suggests {told.figures['suggested']:g}." in text
    sure = {**told.figures["loras"][-1], "share_of_gain": {"mean": 0.9, "low": 0.8, "high": 1.0}}
    assert "90.0 % of the gain, 95 % interval 80.0 % to 100.0 %." in note(SMOKE, {}, {**told.figures, "loras": [sure]})


def test_an_existing_demo_is_kept(told: Told, smoke: Path, capsys: pytest.CaptureFixture[str]):
    before = tiny.snapshot(told.folder)
    assert tiny.run("demo", "--model", smoke / "model", "-o", told.folder) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert tiny.snapshot(told.folder) == before


def test_cancelling_leaves_what_was_there(told: Told, smoke: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    before = tiny.snapshot(told.folder)
    monkeypatch.setattr(demo_module, "draw_series", interrupted)
    assert tiny.run("demo", "--model", smoke / "model", "-o", told.folder, "--overwrite") == 130
    assert tiny.snapshot(told.folder) == before


def test_progress_may_cancel_and_nothing_is_left(smoke: Path, tmp_path: Path):
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if done:
            raise Cancelled("stopped")

    amount = Amount(pictures=8, strengths=(0.0, 1.0), ranks=(2,))
    with pytest.raises(Cancelled):
        demo(tmp_path / "demo", model=smoke / "model", amount=amount, say=lambda _: None, on_progress=stop)
    assert calls == [(0, 24), (8, 24)]
    assert list(tmp_path.iterdir()) == []


def test_demo_refuses_in_a_sentence(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    folder = tmp_path / "demo"
    assert tiny.run("demo", "--model", tmp_path, "-o", folder) == 2
    assert "python -m tools.train_bundled_model" in capsys.readouterr().err
    assert tiny.run("demo", "--model", smoke / "model", "-o", folder, "--pictures", 7) == 2
    assert "at least 8" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert tiny.run("demo", "--model", smoke / "model", "-o", folder) == 2
    assert "-m pip install diffusers transformers accelerate" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
