"""What a LoRA will weigh and keep, said before it is written, against LoRAs that were; and figures kept between runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from lib_dpo.errors import SettingError
from lib_dpo.families.blocks import parse_blocks
from lib_dpo.families.model import open_model
from lib_dpo.maths.ranks import Ranking, Spectrum
from lib_dpo.offsets.offset import Pair, open_pair
from lib_dpo.offsets.patch import open_patch
from lib_dpo.operations.bake import bake
from lib_dpo.operations.diff import diff, report_on
from lib_dpo.operations.extract import extract
from lib_dpo.operations.outlook import store as store_module
from lib_dpo.operations.outlook.figures import Figures, measure_figures
from lib_dpo.operations.outlook.sizes import Sizes
from lib_dpo.operations.outlook.store import FigureStore
from lib_dpo.operations.outlook.survival import survival
from lib_dpo.operations.write_offset import write_offset
from lib_dpo.settings import ExtractSettings, RankPolicy

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

BASE, TUNED = "ab" * 32, "cd" * 32


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(f"outlook-{request.param}")
    tiny.save(folder / "base.safetensors", tiny.base(request.param), torch.float16)
    tiny.save(folder / "tuned.safetensors", tiny.tuned(request.param, rms=1e-3))
    with open_model(folder / "base.safetensors") as base, open_model(folder / "tuned.safetensors") as tuned:
        yield open_pair(base, tuned)


@pytest.fixture(scope="module")
def figures(pair: Pair) -> Figures:
    return measure_figures(pair, device="cpu")


@pytest.mark.parametrize(
    ("policy", "profile", "precision"),
    [
        (RankPolicy(rank=4), "portable", "fp16"),
        (RankPolicy(rank=2, conv_rank=6), "webui", "bf16"),
        (RankPolicy(energy=0.6), "full", "fp16"),
        (RankPolicy(size_mb=1.0), "portable", "fp32"),
        (RankPolicy(rank=8), "webui", "fp8"),
        (RankPolicy(size_mb=0.8), "webui", "fp8"),
    ],
)
def test_the_file_is_as_foreseen(
    pair: Pair, figures: Figures, tmp_path: Path, policy: RankPolicy, profile: str, precision: str
) -> None:
    said = Sizes(figures, profile=profile, precision=precision).foresee(policy)
    settings = ExtractSettings(policy, method="exact", profile=profile, precision=precision, device="cpu")
    # the front ends put both hashes into the metadata
    source = {"dpo.base_sha256": BASE, "dpo.tuned_sha256": TUNED}
    found = extract(pair, tmp_path / "lora.safetensors", settings, source=lambda: source)
    assert said.file_bytes == pytest.approx(found.file_bytes, rel=0.01)
    assert said.energy_kept == pytest.approx(found.tally.total.energy_kept, abs=0.005)
    assert dict(said.ranks) == {name: rank for name, rank in found.ranks.items() if rank}


def test_an_exact_lora_is_as_foreseen(pair: Pair, figures: Figures, tmp_path: Path) -> None:
    said = Sizes(figures).exact()
    found = extract(pair, tmp_path / "exact.safetensors", ExtractSettings(form="exact", device="cpu"))
    assert said.file_bytes == pytest.approx(found.file_bytes, rel=0.01)
    assert said.energy_kept == pytest.approx(found.tally.total.energy_kept, abs=0.005)


def test_an_exact_lora_has_no_norms_of_text_encoders(tmp_path: Path) -> None:
    base, tuned = tiny.base(), tiny.tuned(rms=1e-3)
    for key in base:  # all of the encoder, its norms and embeddings too
        if key.startswith("cond_stage_model.") and tuned[key].is_floating_point():
            tuned[key] = base[key] + 0.05
    paths = [tiny.save(tmp_path / f"{name}.safetensors", of) for name, of in (("base", base), ("tuned", tuned))]
    with open_model(paths[0]) as one, open_model(paths[1]) as other:
        pair = open_pair(one, other)
        said = Sizes(measure_figures(pair, device="cpu")).exact()
        found = extract(pair, tmp_path / "exact.safetensors", ExtractSettings(form="exact", device="cpu"))
    assert said.energy_kept < 0.97
    assert said.energy_kept == pytest.approx(found.tally.total.energy_kept, abs=0.005)


def test_curves_rise_from_one_component_to_all_that_a_lora_holds(figures: Figures) -> None:
    sizes = Sizes(figures)
    ends = []
    for way in ("rank", "size", "energy"):
        curve = sizes.curve(way)  # type: ignore[arg-type]  # of the ways there are
        assert len(curve) > 5
        for before, after in pairwise(curve):
            assert before.file_bytes <= after.file_bytes
            assert before.energy_kept <= after.energy_kept + 1e-9
        ends.append((curve[-1].file_bytes, curve[-1].energy_kept))
    assert all(end == pytest.approx(ends[0]) for end in ends)
    assert sizes.foresee(RankPolicy(rank=sizes.largest_rank)).file_bytes == ends[0][0]
    assert sizes.foresee(RankPolicy(energy=1.0)).file_bytes == ends[0][0]


def test_impossible_wishes_are_refused_as_the_extraction_does(figures: Figures) -> None:
    with pytest.raises(SettingError, match="larger than every layer"):
        Sizes(figures).foresee(RankPolicy(rank=5000))
    with pytest.raises(SettingError, match="holds no layer"):
        Sizes(figures).foresee(RankPolicy(size_mb=0.001))


def test_a_ranking_passes_over_what_does_not_fit() -> None:
    rows = {"a": Spectrum(np.array([9.0, 8.0]), 10, 5, 2), "b": Spectrum(np.array([7.0, 1.0]), 3, 0, 2)}
    ranking = Ranking(rows, weighted=True)
    assert ranking.within(14) == {"a": 0, "b": 2}
    assert ranking.within(18) == {"a": 1, "b": 1}
    assert ranking.within(0) == {"a": 0, "b": 0}
    assert ranking.steps(9)[-1] == {"a": 2, "b": 2}
    assert Ranking({}, weighted=True).steps(3) == []


# ---- kept between runs ----


def test_figures_come_back_as_they_were(pair: Pair, figures: Figures, tmp_path: Path) -> None:
    store = FigureStore(tmp_path / "cache")
    assert store.load(BASE, TUNED) is None
    assert store.save(BASE, TUNED, figures) == ""
    again = store.load(BASE, TUNED)
    assert again is not None
    assert report_on(pair, again).as_json() == diff(pair, spectra=True, device="cpu").as_json()
    for profile in ("portable", "webui", "full"):
        wish = RankPolicy(size_mb=4.0)
        assert Sizes(again, profile=profile).foresee(wish) == Sizes(figures, profile=profile).foresee(wish)
    assert store.load(TUNED, BASE) is None


def test_a_damaged_file_counts_as_none_and_is_made_again(figures: Figures, tmp_path: Path) -> None:
    store = FigureStore(tmp_path)
    store.save(BASE, TUNED, figures)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-9] ^= 1  # one bit of one number
    for damaged in (b"", b"no figures", good[: len(good) // 2], bytes(flipped), good[:200] + b"x" * 50 + good[250:]):
        path.write_bytes(damaged)
        assert store.load(BASE, TUNED) is None
    assert store.save(BASE, TUNED, figures) == ""
    assert store.load(BASE, TUNED) is not None


def test_a_file_of_another_format_is_not_looked_at(figures: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FigureStore(tmp_path)
    store.save(BASE, TUNED, figures)
    monkeypatch.setattr(store_module, "FORMAT", store_module.FORMAT + 1)
    assert store.load(BASE, TUNED) is None


def test_a_folder_that_cannot_be_written_is_said(figures: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    said = FigureStore(tmp_path / "taken").save(BASE, TUNED, figures)
    assert "taken" in said
    assert str(tmp_path) not in said, "no folders of the server"
    assert FigureStore(tmp_path / "taken").load(BASE, TUNED) is None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = FigureStore(tmp_path / "full").save(BASE, TUNED, figures)
    assert "No space left on device" in said
    assert not (tmp_path / "full").exists(), "nothing is left behind"


def test_the_least_used_figures_go(figures: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MOST_FILES", 2)
    store = FigureStore(tmp_path)
    for age, name in ((300, "a"), (200, "b")):
        store.save(name, TUNED, figures)
        path = store._path(name, TUNED)
        then = path.stat().st_mtime - age
        os.utime(path, (then, then))
    assert store.load("a", TUNED) is not None  # which makes it the newer one
    store.save("c", TUNED, figures)
    assert [store.load(name, TUNED) is not None for name in "abc"] == [True, False, True]


# ---- what survives rounding ----


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
@pytest.mark.parametrize("kind", ["lora", "dense", "exact"])
@pytest.mark.parametrize(
    ("dtype", "strength", "blocks"),
    [(torch.float16, 1.0, ""), (torch.float16, 0.2, "IN=0.5,CONV=0"), (torch.bfloat16, 1.0, "")],
)
def test_what_survives_rounding_is_foreseen(
    pair: Pair, tmp_path: Path, kind: str, dtype: torch.dtype, strength: float, blocks: str
) -> None:
    offset = tmp_path / "offset.safetensors"
    if kind == "dense":
        write_offset(pair, offset)
    else:
        settings = ExtractSettings(form="exact") if kind == "exact" else ExtractSettings(RankPolicy(rank=4))
        extract(pair, offset, settings)
    path = tiny.save(tmp_path / "target.safetensors", tiny.base(pair.architecture.name), dtype)
    patch = open_patch(offset, blocks=parse_blocks(blocks))
    with open_model(path) as target:
        foreseen = survival(target, patch, strength, dtype)
        report = bake(target, patch.offset, tmp_path / "baked.safetensors", strength=strength, blocks=patch.blocks)
    assert foreseen == pytest.approx(1 - report.rounding_loss, abs=0.02)
    assert 0 < report.rounding_loss < 0.9
    with open_model(path) as target:
        assert survival(target, patch, 0.0, dtype) is None
