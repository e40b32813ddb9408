"""The page Inspect: what comes first, the pictures of a LoRA and of a fit, and plain answers on kinds of models."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import webui_files
from safetensors.torch import load_file

import lib_dpo
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.blocks import block_of
from lib_dpo.families.model import open_model
from lib_dpo.offsets import file_kinds
from lib_dpo.offsets.breeds import breeds_of
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.prediction import prediction_of
from lib_dpo.pictures.bars import block_columns, rank_columns, strength_line
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import inspect, parts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return webui_files.with_offsets(tmp_path_factory.mktemp("inspect"))


@pytest.fixture
def session(files: Path, tmp_path: Path) -> Session:
    return webui_files.open_session(files, tmp_path / "models")


# ---- what is this file? ----


def test_origin_comes_first_and_the_question_is_the_heading(session: Session):
    html = inspect.what_is(session, None, "dpo")
    assert "What is dpo.safetensors?" in html
    names = re.findall(r"<dt>(.*?)</dt>", html.split("<details")[0])
    assert names[:3] == ["Base", "DPO reference", "Keeps"]
    assert "<dd>base</dd>" in html
    assert "Its card" in names
    assert "Where it changes the model" in html


@pytest.mark.parametrize("form", ["low-rank", "exact"])
def test_energy_by_block_is_that_of_the_dense_change(form: str, tmp_path: Path):
    base = tiny.save(tmp_path / "base.safetensors", tiny.base())
    tuned = tiny.save(tmp_path / "tuned.safetensors", tiny.tuned(rms=1e-3))
    ranks = {"energy": 0.6} if form == "low-rank" else {}
    lora = tmp_path / "l.safetensors"
    lib_dpo.extract(base, tuned, lora, form=form, **ranks)  # type: ignore[arg-type]  # mypy cannot tell which keyword is which
    dense: dict[str, float] = Counter()
    with open_offset(lora) as offset:
        for key in offset.shapes:
            if key.endswith(".weight"):  # biases are not counted
                dense[block_of(ARCHITECTURES["sd1"], key) or ""] += float(offset.read(key).double().square().sum())
    total = sum(dense.values())
    found = lib_dpo.inspect(lora)
    assert found.block_shares == pytest.approx({name: value / total for name, value in dense.items() if value}, rel=1e-4)
    assert found.as_json()["energy_by_block"] == found.block_shares
    downs = [tensor for key, tensor in load_file(lora).items() if key.endswith("lora_down.weight")]
    assert found.rank_counts == Counter(tensor.shape[0] for tensor in downs)
    assert bool(downs) == (form == "low-rank")


# ---- does it fit my model? ----


def test_the_fit_shows_the_strength_inside_and_both_sizes_by_block(session: Session):
    html = inspect.does_it_fit(session, None, "other.safetensors", parts.LOADED, "dpo-sd1")
    assert "Does it fit your model?" in html
    assert html.index("DPO in it already") < html.index("Strength to start with")
    assert 'dpo-key-1">the offset' in html
    assert "IN00, your model:" in html


def test_the_size_of_the_offset_by_block(tmp_path: Path):
    base = tiny.save(tmp_path / "base.safetensors", tiny.base())
    tuned = tiny.save(tmp_path / "tuned.safetensors", tiny.tuned(rms=1e-3))
    other = tiny.save(tmp_path / "other.safetensors", tiny.base(seed=5))
    report = lib_dpo.compat(other, base, tuned)
    one, two = load_file(base), load_file(tuned)
    middle = [key for key in one if key.startswith("model.diffusion_model.middle_block.")]
    energies = [sum(float(tensor.double().square().sum()) for tensor in each) for each in (
        [two[key] - one[key] for key in middle], [one[key] for key in middle],
    )]  # fmt: skip
    assert report.blocks["MID"].relative_offset == pytest.approx((energies[0] / energies[1]) ** 0.5, rel=1e-4)
    assert report.as_json()["blocks"]["MID"]["offset"] == report.blocks["MID"].relative_offset
    assert not report.itself
    assert lib_dpo.compat(base, base, tuned).itself


# ---- drawings ----


def _boxes(html: str) -> list[tuple[float, float, float, float]]:
    found = re.findall(r'<rect [^>]*x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', html)
    return [tuple(float(value) for value in row) for row in found]  # type: ignore[misc]  # four numbers, by the pattern


def test_columns_stand_on_the_ground_as_high_as_their_share():
    html = block_columns({"IN00": (0.02, 0.01), "IN01": (0.04, 0.0), "MID": (0.01, 0.03)}, ["a", "b"], "sizes & more")
    boxes = _boxes(html)
    assert all(y + height == pytest.approx(100, abs=0.02) for _, y, _, height in boxes)
    heights = [height for *_, height in boxes]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 0.5, 2, 0, 0.5, 1.5], abs=0.01)
    lefts = [x for x, *_ in boxes]
    assert lefts == sorted(lefts)
    assert max(x + width for x, _, width, _ in boxes) <= 100
    assert re.findall(r'dpo-tick-x"[^>]*>(.*?)<', html) == ["IN", "MID"]
    assert "4 %" in re.findall(r'dpo-tick-y"[^>]*>(.*?)<', html)
    assert "sizes &amp; more" in html
    assert _boxes(block_columns({"MID": (0.0,)}, ["a"], ""))[0][3] == 0


def test_ranks_are_counted_and_neighbours_put_together_where_there_are_many():
    assert len(_boxes(rank_columns({4: 3, 9: 1}, ""))) == 2
    html = rank_columns(dict.fromkeys(range(1, 101), 2), "")
    titles = re.findall(r"<title>rank (.*?): (\d+) layers</title>", html)
    assert len(titles) <= 16
    assert sum(int(count) for _, count in titles) == 200
    assert (titles[0][0], titles[-1][0]) == ("1-7", "99-100")


@pytest.mark.parametrize(("value", "error"), [(0.5, 0.1), (0.0, 0.0), (-3.0, 0.5), (2.0, 4.0)])
def test_a_strength_lies_between_its_marks(value: float, error: float):
    html = strength_line(value, error, "inside")
    ticks = {text: float(x) for x, text in re.findall(r'dpo-tick-x" style="left:(.*?)%">(.*?)<', html)}
    middle = float(re.findall(r'style="left:([\d.]+)%;bottom', html)[0])
    left, right = map(float, re.findall(r'dpo-curve" d="M(.*?) 50H(.*?)M', html)[0])
    assert 0 <= left <= middle <= right <= 100
    assert middle == pytest.approx(ticks["0"] + value * (ticks["1"] - ticks["0"]), abs=0.02)
    assert right - left == pytest.approx(2 * error * (ticks["1"] - ticks["0"]), abs=0.15)


# ---- kinds of models ----


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sd_xl_turbo_1.0", ["distilled"]),
        ("dreamshaperXL_lightningDPMSDE", ["distilled"]),
        ("Hyper-SD15", ["distilled"]),
        ("hyperrealism_v3", []),
        ("hyperRealism_v30", []),
        ("Hyper-SDXL-8steps", ["distilled"]),
        ("realvis_hyper_4step", ["distilled"]),
        ("tdd_dmd2_sdxl", ["distilled"]),
        ("turbocharged", []),
        ("ponyDiffusionV6XL_v6StartWithThisOne", ["far from the base"]),
        ("Illustrious-XL-v0.1", ["far from the base"]),
        ("noobaiXL_v1", ["far from the base"]),
        ("v1-5-pruned-emaonly", []),
        ("dreamshaper_8", []),
    ],
)
def test_names_tell_distilled_and_far_models(name: str, kinds: list[str], tmp_path: Path):
    with open_model(tiny.save(tmp_path / f"{name}.safetensors", tiny.base())) as model:
        assert [breed.kind for breed in breeds_of(model)] == kinds


def test_a_folder_tells_by_its_whole_name(tmp_path: Path):
    folder = tiny.save_folder(tmp_path / "dreamshaper-7.0-lcm", "sd1", tiny.base())
    (tmp_path / "dreamshaper-7.yaml").write_text('model: {params: {parameterization: "v"}}', encoding="utf-8")
    for place in (folder, folder / "unet" / "diffusion_pytorch_model.safetensors"):
        with open_model(place) as model:
            assert [breed.kind for breed in breeds_of(model)] == ["distilled"]
            assert prediction_of(model).effective in ("eps", ""), "of another file"


def test_files_tell_the_rest(tmp_path: Path, session: Session):
    def kinds(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> list[Any]:
        with open_model(tiny.save(tmp_path / "m.safetensors", tensors, metadata=metadata)) as model:
            return [breed.kind for breed in breeds_of(model)]

    assert kinds(tiny.base(in_channels=9)) == ["inpainting"]
    assert kinds(tiny.base("sdxl") | {"v_pred": torch.zeros(0)}) == ["v-prediction"]
    guided = {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(32, 16)}
    assert kinds(tiny.base() | guided) == ["distilled"]
    assert kinds(tiny.base(), {"modelspec.title": "My Pony mix"}) == ["far from the base"]


def test_the_answers_are_on_the_page_and_on_the_command_line(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tiny.save(session.host.checkpoint_dir / "sd-turbo-inpainting.safetensors", tiny.base(in_channels=9))
    html = inspect.what_is(session, None, path.name)
    assert "Will an offset do the same on it?" in html
    assert "Distilled for few steps, says the word turbo in its name: an offset of a plain pair may do less" in html
    assert "An inpainting model: offsets of a plain pair fit it" in html
    figures = tiny.figures(tmp_path / "f.json", "inspect", path)
    assert [breed["kind"] for breed in figures["breeds"]] == ["distilled", "inpainting"]
    assert "for offsets: an inpainting model: offsets of a plain pair fit it" in capsys.readouterr().out
    assert "Will an offset do the same" not in inspect.what_is(session, None, "base.safetensors")


def test_a_model_that_holds_the_bases_unet_fits(session: Session):
    found = SimpleNamespace(level="base", itself=False)
    assert inspect.fit_mood(found) == "good"  # type: ignore[arg-type]  # all that it reads
    found.itself = True
    assert inspect.fit_mood(found) == "doubt"  # type: ignore[arg-type]  # all that it reads


# ---- kinds in the list ----


def test_the_list_says_what_each_file_is_and_takes_names_without_that(session: Session):
    tiny.save(session.host.lora_dir / "broken.safetensors", {"a": torch.zeros(2)})
    for _ in range(200):  # the rest of a list is read in the background
        choices = set(inspect.everything(session))
        if "xl · LoRA, SDXL" in choices:
            break
        time.sleep(0.05)
    assert {"dpo · LoRA, SD 1.x", "xl · LoRA, SDXL", "exact.safetensors · offset, SD 1.x", "broken · not a model"} <= choices
    for choice in ("dpo · LoRA, SD 1.x", "dpo"):
        assert "It is a LoRA" in inspect.what_is(session, None, choice)
    for name in ("a · b", "my · LoRAs", "x · LoRA of mine"):
        assert file_kinds.plain_name(name) == name
        assert file_kinds.plain_name(f"{name} · UNet, SD 1.x with one resnet a level") == name


def test_a_list_waits_no_longer_than_it_was_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [(f"{n}", tmp_path / f"{n}.safetensors") for n in range(20)]
    for _, path in files:
        path.touch()
    looked: list[str] = []

    def slow(path: Path) -> str:
        looked.append(threading.current_thread().name)
        time.sleep(0.1)
        return "UNet"

    monkeypatch.setattr(file_kinds, "_known", {})
    monkeypatch.setattr(file_kinds, "_read", slow)
    here = threading.current_thread().name
    file_kinds.labelled(files, seconds=0.25)
    assert 1 <= looked.count(here) <= 3
    for _ in range(200):
        if not file_kinds._reading.locked():
            break
        time.sleep(0.05)
    assert file_kinds.labelled(files, seconds=0)[-1] == "19 · UNet"


def test_an_offset_that_others_made_is_not_called_a_unet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It has the names and shapes of a UNet, and no metadata; its norms tell."""
    monkeypatch.setattr(file_kinds, "_known", {})
    base, tuned = tiny.only_unet(tiny.base()), tiny.only_unet(tiny.tuned(rms=1e-3))
    change = {key: tuned[key] - base[key] for key in base}
    for names in (change, tiny.in_diffusers("sd1", change)):
        path = tiny.save(tmp_path / f"{len(file_kinds._known)}.safetensors", names, torch.float16)
        assert file_kinds.labelled([("published", path)], seconds=9) == ["published · offset, SD 1.x"]
    weights = tiny.save(tmp_path / "weights.safetensors", tiny.in_diffusers("sd1", tuned), torch.float16)
    assert file_kinds.labelled([("weights", weights)], seconds=9) == ["weights · UNet, SD 1.x"]


@pytest.mark.newest
def test_of_two_hundred_files_the_rest_is_read_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = tiny.save(tmp_path / "0.safetensors", tiny.only_unet(tiny.base("sdxl")), torch.float16)
    files = [(f"{n}", tmp_path / f"{n}.safetensors") for n in range(200)]
    for _, path in files[1:]:
        path.hardlink_to(one)
    monkeypatch.setattr(file_kinds, "_known", {})
    first = file_kinds.labelled(files)
    assert first[0] == "0 · UNet, SDXL"
    assert first[-1] == "199"
    for _ in range(1200):  # read on in the background
        if file_kinds.labelled(files, seconds=0)[-1] == "199 · UNet, SDXL" and not file_kinds._reading.locked():
            break
        time.sleep(0.05)
    monkeypatch.setattr(file_kinds, "read_header", None)  # nothing is opened again
    assert all(label.endswith("UNet, SDXL") for label in file_kinds.labelled(files))
    one.unlink()
    assert file_kinds.labelled(files)[0] == "0"
