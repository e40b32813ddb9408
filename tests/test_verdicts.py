"""Verdicts say what the files say of themselves: what a model predicts, what was baked into it, that it is its own base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lib_dpo.families.model import open_model
from lib_dpo.offsets.prediction import Prediction, prediction_of

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

HALF = torch.float16
V_YAML = 'model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: "v"\n'
EPS_YAML = V_YAML.replace('"v"', '"eps"')
MARK = {"v_pred": torch.tensor([])}
ZERO = {**MARK, "ztsnr": torch.tensor([])}


def checkpoint(path: Path, arch: str = "sd1", *, tuned: bool = False, yaml: str = "", **more: Any) -> Path:
    tensors = tiny.tuned(arch) if tuned else tiny.base(arch)
    tiny.save(path, {**tensors, **more.get("keys", {})}, metadata=more.get("metadata"))
    if yaml:
        path.with_suffix(".yaml").write_text(yaml, encoding="utf-8")
    return path


def unet(path: Path, arch: str = "sd1") -> Path:
    return tiny.save(path, tiny.in_diffusers(arch, tiny.only_unet(tiny.tuned(arch))))


def read(path: Path) -> Prediction:
    with open_model(path) as model:
        return prediction_of(model)


def printed(capsys: pytest.CaptureFixture[str], folder: Path, *args: object) -> tuple[str, Mapping[str, Any]]:
    capsys.readouterr()
    figures = tiny.figures(folder / "report.json", *args)
    return capsys.readouterr().out, figures


# ---- marks ----


def test_marks_in_keys_yaml_and_metadata(tmp_path: Path):
    plain = read(checkpoint(tmp_path / "plain.safetensors"))
    assert (plain.kind, plain.assumed, plain.effective) == ("", "eps", "eps")
    keyed = read(checkpoint(tmp_path / "keyed.safetensors", keys=ZERO))
    assert (keyed.kind, keyed.mark, keyed.zero_snr) == ("v", "its key v_pred", "its key ztsnr")
    beside = read(checkpoint(tmp_path / "beside.safetensors", yaml=V_YAML))
    assert (beside.kind, beside.mark) == ("v", "beside.yaml beside it")
    flow = checkpoint(tmp_path / "flow.safetensors", yaml="model: {params: {parameterization: v}}")
    assert read(flow).kind == "v"
    flow.with_suffix(".yaml").write_text('model:\n  params:  # parameterization: "v"\n', encoding="utf-8")
    assert read(flow).kind == ""
    spec = {"modelspec.prediction_type": "v"}
    assert read(checkpoint(tmp_path / "spec.safetensors", metadata=spec)).mark == "modelspec.prediction_type"
    kohya = read(
        checkpoint(tmp_path / "k.safetensors", metadata={"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"})
    )
    assert (kohya.kind, kohya.zero_snr) == ("v", "ss_zero_terminal_snr")
    both = read(checkpoint(tmp_path / "both.safetensors", keys=MARK, yaml=EPS_YAML))
    assert (both.kind, both.against) == ("eps", "its key v_pred")


def test_without_marks_sd2_and_a_unet_alone_are_not_known(tmp_path: Path):
    assert read(checkpoint(tmp_path / "sd2.safetensors", "sd2")).effective == ""
    assert read(unet(tmp_path / "unet.safetensors")).effective == ""
    spec = {"modelspec.architecture": "stable-diffusion-v2-768-v"}
    assert read(checkpoint(tmp_path / "v.safetensors", "sd2", metadata=spec)).kind == "v"


@pytest.mark.parametrize("inner", ["", "unet", "unet/diffusion_pytorch_model.safetensors"])
def test_the_scheduler_of_a_folder_counts(inner: str, tmp_path: Path):
    folder = tiny.save_folder(tmp_path / "model", "sd1", tiny.base())
    (folder / "scheduler").mkdir()
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings), encoding="utf-8")
    found = read(folder / inner)
    assert (found.kind, found.mark, found.zero_snr) == ("v", "its scheduler_config.json", "its scheduler_config.json")
    (folder / "scheduler" / "scheduler_config.json").write_text("[" * 9, encoding="utf-8")
    assert read(folder / inner).kind == ""


# ---- right base ----


def test_a_pair_of_different_predictions_is_not_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = checkpoint(tmp_path / "base.safetensors", keys=ZERO)
    eps = checkpoint(tmp_path / "eps.safetensors", tuned=True)
    text, figures = printed(capsys, tmp_path, "diff", "--base", base, "--tuned", eps)
    assert figures["verdict"]["level"] == "doubtful"
    assert "base predicts v (its key v_pred)" in figures["verdict"]["text"]
    assert "eps predicts eps (nothing says otherwise)" in figures["verdict"]["text"]
    assert figures["prediction"]["base"]["zero_terminal_snr"] == "its key ztsnr"
    assert "the tuned file predicts eps (nothing says otherwise)" in text
    sure = checkpoint(tmp_path / "sure.safetensors", tuned=True, yaml=EPS_YAML)
    assert printed(capsys, tmp_path, "diff", "--base", base, "--tuned", sure)[1]["verdict"]["level"] == "wrong"
    v = checkpoint(tmp_path / "v.safetensors", tuned=True, keys=MARK)
    text, figures = printed(capsys, tmp_path, "diff", "--base", base, "--tuned", v)
    assert figures["verdict"]["level"] == "doubtful"
    assert "Only base is marked as one with zero terminal SNR" in figures["verdict"]["text"]
    alone = unet(tmp_path / "unet.safetensors")
    assert printed(capsys, tmp_path, "diff", "--base", base, "--tuned", alone)[1]["verdict"]["level"] == "fits"


def test_sd2_of_768_and_of_512(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = checkpoint(tmp_path / "v2-1_768.safetensors", "sd2", yaml=V_YAML)
    tuned = checkpoint(tmp_path / "tuned.safetensors", "sd2", tuned=True, yaml=EPS_YAML)
    _, figures = printed(capsys, tmp_path, "diff", "--base", base, "--tuned", tuned)
    assert figures["verdict"]["level"] == "wrong"
    assert "v2-1_768 predicts v (v2-1_768.yaml beside it)" in figures["verdict"]["text"]
    tuned.with_suffix(".yaml").unlink()
    assert printed(capsys, tmp_path, "diff", "--base", base, "--tuned", tuned)[1]["verdict"]["level"] == "fits"


# ---- does it fit ----


def test_an_eps_pair_does_not_fit_a_v_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, tuned = checkpoint(tmp_path / "base.safetensors"), unet(tmp_path / "dpo.safetensors")
    target = tiny.save(tmp_path / "noob.safetensors", {**tiny.base(seed=1), **MARK})
    pair = ("--base", base, "--tuned", tuned)
    text, figures = printed(capsys, tmp_path, "compat", "--target", target, *pair)
    assert figures["verdict"]["level"] == "other"
    assert text.startswith(
        "The offset was not made for it: noob predicts v (its key v_pred), but base of the pair predicts eps"
    )
    assert figures["prediction"]["target"]["kind"] == "v"
    same = tiny.save(tmp_path / "eps.safetensors", tiny.base(seed=1))
    assert printed(capsys, tmp_path, "compat", "--target", same, *pair)[1]["verdict"]["level"] == "weaker"


def test_a_target_that_was_given_as_the_base_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, tuned = checkpoint(tmp_path / "base.safetensors"), unet(tmp_path / "dpo.safetensors")
    text, figures = printed(capsys, tmp_path, "compat", "--target", base, "--base", base, "--tuned", tuned)
    assert figures["verdict"]["level"] == "base"
    assert "so it was compared with itself" in text
    copy = checkpoint(tmp_path / "copy.safetensors")
    text, _ = printed(capsys, tmp_path, "compat", "--target", copy, "--base", base, "--tuned", tuned)
    assert "copy holds the same UNet as the base: the offset fits exactly" in text


# ---- our own bakes ----


def test_a_bake_of_our_own_is_no_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, tuned = checkpoint(tmp_path / "base.safetensors"), unet(tmp_path / "dpo.safetensors")
    assert tiny.run("offset", "--base", base, "--tuned", tuned, "-o", tmp_path / "dpo_offset.safetensors") == 0
    baked = tmp_path / "baked.safetensors"
    offset = ("--offset", tmp_path / "dpo_offset.safetensors", "--strength", 0.8)
    assert tiny.run("bake", "--target", base, *offset, "-o", baked) == 0
    _, figures = printed(capsys, tmp_path, "diff", "--base", base, "--tuned", baked)
    assert figures["verdict"]["level"] == "doubtful"
    assert figures["verdict"]["text"].startswith("No new reference: baked has dpo_offset × 0.8 baked in by this tool")
    text, _ = printed(capsys, tmp_path, "compat", "--target", base, "--base", base, "--tuned", baked)
    assert text.startswith("No new reference: baked has dpo_offset × 0.8 baked in")
