"""Figures and verdicts: what diff and compat say, against values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_dpo.errors import MismatchError, SettingError
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import open_model
from lib_dpo.families.shapes import checkpoint_shapes, small
from lib_dpo.families.synthetic import base_tensor, offset_tensor, small_pair
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import open_pair
from lib_dpo.operations.bake import bake
from lib_dpo.operations.compat import CompatReport, compat
from lib_dpo.operations.diff import KINDS, diff
from lib_dpo.operations.measure import rounding_energy
from lib_dpo.operations.write_offset import write_offset
from lib_dpo.pictures import plots
from lib_dpo.pictures.plots import plot_diff
from lib_dpo.settings import in_digits

Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small_pair(tmp_path_factory.mktemp("sd1"), "sd1")


# ---- noise floor ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_energy_is_what_rounding_really_does(dtype: torch.dtype) -> None:
    true = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)) * 0.03
    stored = true.to(dtype)
    real = float((stored.double() - true.double()).square().sum())
    assert rounding_energy(stored) == pytest.approx(real, rel=0.03)
    assert rounding_energy(stored.float()) == pytest.approx(real, rel=0.03)  # a wide copy of narrow numbers
    assert rounding_energy(true) < 1e-4 * real


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("kept_as", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_tensor_that_went_through_a_coarser_format_counts_as_that(name: str, kept_as: torch.dtype, small: bool) -> None:
    """As a merge in bfloat16, or an fp8 file, that somebody saved as half precision; a norm of few values too."""
    noise = torch.randn(640, 1 if small else 640, generator=torch.Generator().manual_seed(0))
    true = 1 + 0.2 * noise if small else 0.02 * noise
    stored = true.to(getattr(torch, name))
    real = float((stored.double() - true.double()).square().sum())
    assert rounding_energy(stored.to(kept_as)) == pytest.approx(real, rel=0.3)


def test_constants_do_not_tell_a_format() -> None:
    assert rounding_energy(torch.ones(640)) < 1e-10
    assert rounding_energy(torch.zeros(640)) < 1e-10


def test_the_noise_floor_is_the_share_of_noise_in_the_offset(sd1: Files) -> None:
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        report = diff(open_pair(base, tuned))
    noise = total = 0.0
    for key, shape in checkpoint_shapes("sd1", small("sd1")).items():
        if key.startswith(UNET):
            weight = base_tensor(key, shape).double()
            noise += float((weight - weight.half().double()).square().sum())
            total += float((weight + offset_tensor(key, shape).double() - weight.half().double()).square().sum())
    assert report.tally.total.offset == pytest.approx(total, rel=1e-5)
    assert report.tally.total.noise_floor == pytest.approx(noise / total, rel=0.05)


def test_zeros_and_subnormals_have_a_floor() -> None:
    assert rounding_energy(torch.zeros(10, dtype=torch.float16)) == pytest.approx(10 * 2.0**-48 / 12)
    assert math.isfinite(rounding_energy(torch.full((10,), 1e-7, dtype=torch.float16)))


# ---- diff ----


def test_the_figures_of_diff_are_those_of_float64(sd1: Files) -> None:
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        pair = open_pair(base, tuned)
        report = diff(pair)
        key = UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
        assert report.tally.blocks["MID"].numel == sum(base.read(k).numel() for k in pair.keys if "middle_block" in k)
        deltas = [
            tuned.read(k).double().reshape(base.shape(k)) - base.read(k).double() for k in pair.keys if "middle_block" in k
        ]
    energy = sum(float(delta.square().sum()) for delta in deltas)
    assert report.tally.blocks["MID"].offset == pytest.approx(energy, rel=1e-6)
    assert report.tally.blocks["MID"].largest == pytest.approx(max(float(delta.abs().max()) for delta in deltas))
    assert report.kinds["self-attention"]["MID"].offset > 0
    assert sum(row.offset for kind in KINDS for row in report.kinds[kind].values()) == pytest.approx(report.tally.total.offset)
    assert report.verdict.level == "fits"
    assert report.vae == "not in both files"
    assert key in pair.keys


@pytest.mark.parametrize("rank", [8, 64])  # 64 is more than most layers can use
def test_the_spectra_say_what_an_extraction_would_keep(sd1: Files, tmp_path: Path, rank: int) -> None:
    from lib_dpo.operations.extract import extract
    from lib_dpo.settings import ExtractSettings, RankPolicy

    def settings_of(rank: int) -> ExtractSettings:
        return ExtractSettings(RankPolicy(rank=rank), method="exact", device="cpu")

    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        pair = open_pair(base, tuned)
        report = diff(pair, spectra=True, device="cpu")
        extracted = extract(pair, tmp_path / "l.safetensors", settings_of(rank))
    assert report.spectra is not None
    row = report.spectra.ranks.index(rank)
    assert report.spectra.energy_at_rank[row] == pytest.approx(extracted.tally.total.energy_kept, abs=1e-4)
    numbers = sum(tensor.numel() for key, tensor in load_file(tmp_path / "l.safetensors").items() if not key.endswith("alpha"))
    assert report.spectra.size_mb_at_rank[row] == pytest.approx(2e-6 * numbers)
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:  # the next rank is one that no extraction takes
        with pytest.raises(SettingError, match="larger than every layer"):
            extract(open_pair(base, tuned), tmp_path / "m.safetensors", settings_of(2 * report.spectra.ranks[-1]))
        extract(open_pair(base, tuned), tmp_path / "m.safetensors", settings_of(report.spectra.ranks[-1]))
    sizes, energies = report.spectra.size_mb, report.spectra.energy_at_size
    assert sizes == sorted(sizes)
    assert energies == sorted(energies)
    thinned = report.as_json()["spectra"]["mean_spectrum"]
    assert thinned["component"][0] == thinned["value"][0] == 1
    assert thinned["component"][-1] == len(report.spectra.mean_spectrum)
    assert thinned["value"] == [report.spectra.mean_spectrum[n - 1] for n in thinned["component"]]
    assert len(thinned["component"]) < 65 < len(report.spectra.mean_spectrum)
    plot_diff(report, tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_picture_without_spectra(sd1: Files, tmp_path: Path) -> None:
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        plot_diff(diff(open_pair(base, tuned)), tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 10_000


def contrast(one: Any, other: Any) -> float:
    """Of two colours of matplotlib, from 1 to 21: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""
    from matplotlib.colors import to_rgb

    def luminance(colour: Any) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("dark", "page"), [(False, "white"), (True, "#0b0f19")])  # gradio's own dark page
def test_a_picture_is_of_the_colour_of_its_page_and_all_of_it_can_be_read(
    sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dark: bool, page: str
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    figures: list[Any] = []
    real = plots.write_figure
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: (figures.append(figure), real(figure, path)))
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        plot_diff(diff(open_pair(base, tuned), spectra=True), tmp_path / "d.png", dark=dark)
    (figure,) = figures
    paper = figure.get_facecolor()
    assert contrast(paper, page) < 1.2
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert len(texts) > 40
    assert [text.get_text() for text in texts if contrast(text.get_color(), paper) < 4.5] == []
    lines = [line for axes in figure.axes for line in axes.lines]
    assert len(lines) >= 3
    assert all(isinstance(line, Line2D) and contrast(line.get_color(), paper) >= 3 for line in lines)
    spots = [axes for axes in figure.axes if not axes.images and axes.lines]
    assert all(axes.get_facecolor() == paper for axes in spots)


def test_the_json_holds_the_heat_map(sd1: Files) -> None:
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        pair = open_pair(base, tuned)
        heat = diff(pair).as_json()["heat_map"]
        keys = [key for key in pair.keys if "middle_block" in key and ".attn1." in key]
        weights = torch.cat([base.read(key).double().flatten() for key in keys])
        deltas = torch.cat([tuned.read(key).double().flatten() for key in keys]) - weights
    assert list(heat) == list(KINDS)
    assert heat["self-attention"]["MID"] == pytest.approx(float(deltas.norm() / weights.norm()), rel=1e-5)
    assert heat["self-attention"].keys() == {"IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"} | {
        f"OUT{n:02d}" for n in range(3, 12)
    }
    assert heat["embedding"].keys() >= {"TIME", "IN01", "OUT11"}


# ---- compat ----


def judged(target: Path, files: Files) -> CompatReport:
    with open_model(target) as model, open_model(files[0]) as base, open_model(files[1]) as tuned:
        return compat(model, open_pair(base, tuned))


def finetuned(files: Files, path: Path, size: float, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(files[0])
    for key, tensor in tensors.items():
        if key.startswith(UNET):
            scale = size * float(tensor.float().square().mean().sqrt())
            tensors[key] = (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).half()
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("strength", [0.4, 1.0, -0.5])
def test_the_strength_inside_is_found_again(sd1: Files, tmp_path: Path, strength: float) -> None:
    finetune = finetuned(sd1, tmp_path / "finetune.safetensors", 0.01)
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        write_offset(open_pair(base, tuned), tmp_path / "o.safetensors")
    with open_offset(tmp_path / "o.safetensors") as offset, open_model(finetune) as target:
        bake(target, offset, tmp_path / "baked.safetensors", strength=strength, precision="fp32")
    before, after = judged(finetune, sd1), judged(tmp_path / "baked.safetensors", sd1)
    assert after.strength_inside - before.strength_inside == pytest.approx(strength, abs=0.01)
    assert abs(after.strength_inside - strength) < 4 * after.strength_error + 0.02
    assert after.level == ("contained" if strength > 0 else "fits")
    if strength == 0.4:
        assert after.suggested_strength == pytest.approx(0.6, abs=0.06)


def test_the_least_squares_figures_are_those_of_float64(sd1: Files, tmp_path: Path) -> None:
    finetune = finetuned(sd1, tmp_path / "f.safetensors", 0.05)
    report = judged(finetune, sd1)
    with open_model(finetune) as target, open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        keys = open_pair(base, tuned).keys
        weights = torch.cat([base.read(k).double().flatten() for k in keys])
        drift = torch.cat([target.read(k).double().flatten() for k in keys]) - weights
        offset = torch.cat([tuned.read(k).double().flatten() for k in keys]) - weights
    assert report.drift == pytest.approx(float(drift.norm() / weights.norm()), rel=1e-4)
    assert report.strength_inside == pytest.approx(float(drift @ offset / (offset @ offset)), abs=1e-4)
    assert report.cosine == pytest.approx(float(drift @ offset / (drift.norm() * offset.norm())), abs=1e-4)
    assert abs(report.strength_inside) < 4 * report.strength_error


def test_the_verdicts_on_the_base_a_near_and_a_far_finetune(sd1: Files, tmp_path: Path) -> None:
    assert judged(sd1[0], sd1).level == "base"
    near = judged(finetuned(sd1, tmp_path / "near.safetensors", 0.05), sd1)
    far = judged(finetuned(sd1, tmp_path / "far.safetensors", 0.6), sd1)
    assert (near.level, far.level) == ("fits", "weaker")
    assert far.suggested_strength < near.suggested_strength
    assert "Pony" in far.text


def test_a_model_is_not_said_to_be_without_dpo_where_its_weights_cannot_tell(
    sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = finetuned(sd1, tmp_path / "f.safetensors", 0.05)
    assert "without DPO in it" in judged(finetune, sd1).text
    monkeypatch.setattr("lib_dpo.operations.compat._jackknife", lambda tensors, total: 0.2)
    unsure = judged(finetune, sd1)
    assert unsure.level == "fits"
    assert "without DPO" not in unsure.text
    assert "its weights cannot tell whether DPO is in it" in unsure.text
    monkeypatch.undo()
    assert [in_digits(value) for value in (-0.004, 0.0, 0.126, -0.2)] == ["0.00", "0.00", "0.13", "-0.20"]


def test_another_architecture_is_refused(sd1: Files, tmp_path: Path) -> None:
    sd2 = small_pair(tmp_path / "sd2", "sd2")
    with pytest.raises(MismatchError, match=r"SD 2\.x but the pair is SD 1\.x"):
        judged(sd2[0], sd1)


def test_a_pair_that_differs_by_rounding_only_is_not_called_right(sd1: Files, tmp_path: Path) -> None:
    wide = {key: base_tensor(key, shape) for key, shape in checkpoint_shapes("sd1", small("sd1")).items()}
    save_file({key: tensor for key, tensor in wide.items() if key.startswith(UNET)}, tmp_path / "wide.safetensors")
    with open_model(sd1[0]) as base, open_model(tmp_path / "wide.safetensors") as tuned:
        report = diff(open_pair(base, tuned))
    assert report.verdict.level == "doubtful"
    assert "rounding" in report.verdict.text
    assert report.tally.total.noise_floor > 0.9


def test_the_rounding_of_a_coarse_base_is_not_taken_for_dpo(sd1: Files, tmp_path: Path) -> None:
    wide = {key: base_tensor(key, shape) for key, shape in checkpoint_shapes("sd1", small("sd1")).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    coarse = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in wide.items()}
    save_file(coarse, tmp_path / "coarse.safetensors")
    report = judged(tmp_path / "wide.safetensors", (tmp_path / "coarse.safetensors", sd1[1]))
    assert report.strength_inside > 0.2  # the same rounding is in drift and offset
    assert report.level != "contained"


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_fp8_files_are_compared(sd1: Files, tmp_path: Path) -> None:
    tensors = load_file(sd1[1])
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}, tmp_path / "fp8.safetensors")
    with open_model(sd1[0]) as base, open_model(tmp_path / "fp8.safetensors") as tuned:
        assert diff(open_pair(base, tuned)).tally.total.noise_floor > 0.5
