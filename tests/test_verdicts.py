"""Verdicts say what the files say of themselves: what a model predicts, what was baked into it, that it is its own base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import open_model
from lib_dpo.families.synthetic import offset_tensor
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


# ---- sentences that would claim too much ----


def moved(rms: float, seed: int = 7) -> dict[str, torch.Tensor]:
    """Another finetune of the base: its UNet, moved by chance."""
    base = tiny.base()
    return {
        key: tensor + offset_tensor(key, tensor.shape, seed=seed, rms=rms) if key.startswith(UNET) else tensor
        for key, tensor in base.items()
    }


def test_a_wrong_base_does_not_put_dpo_into_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Offset and drift are both what the finetune changed, so the strength comes out as 1 in a model without DPO."""
    clean, tuned = checkpoint(tmp_path / "clean.safetensors"), checkpoint(tmp_path / "tuned.safetensors", tuned=True)
    for rms, verdict in ((0.06, "Wrong base: "), (0.006, "Doubtful base: ")):
        finetune = tiny.save(tmp_path / "finetune.safetensors", moved(rms))
        text, figures = printed(capsys, tmp_path, "compat", "--target", clean, "--base", finetune, "--tuned", tuned)
        assert figures["strength_inside"] == pytest.approx(1, abs=0.05)
        assert (figures["verdict"]["level"], figures["suggested_strength"]) == ("other", 0.5)
        assert text.startswith(verdict)
    near = tiny.save(tmp_path / "near.safetensors", moved(0.003))
    text, _ = printed(capsys, tmp_path, "compat", "--target", clean, "--base", near, "--tuned", tuned)
    assert "That holds if DPO started from near, and not from a model before it." in text


def test_a_doubt_about_the_pair_is_in_the_figures_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, tuned = checkpoint(tmp_path / "base.safetensors"), checkpoint(tmp_path / "sd-dpo.safetensors", tuned=True)
    other = checkpoint(tmp_path / "other.safetensors")
    text, figures = printed(capsys, tmp_path, "compat", "--target", other, "--base", tuned, "--tuned", base)
    assert text.startswith("The order looks swapped")
    assert (figures["verdict"]["level"], figures["suggested_strength"]) == ("other", 0.5)


def test_dpo_is_a_word_of_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, tuned = checkpoint(tmp_path / "endpoint_mix.safetensors"), checkpoint(tmp_path / "tuned.safetensors", tuned=True)
    _, figures = printed(capsys, tmp_path, "diff", "--base", base, "--tuned", tuned)
    assert figures["verdict"]["text"].startswith("Right base")


def test_files_too_coarse_to_tell_whether_dpo_is_inside_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exact, change = tiny.exact_base(), tiny.tuned(rms=1e-4)
    base = tiny.save(tmp_path / "base.safetensors", exact, torch.bfloat16)
    paths = [tiny.save(tmp_path / f"{name}.safetensors", change) for name in ("tuned", "copy")]
    text, figures = printed(capsys, tmp_path, "compat", "--target", paths[1], "--base", base, "--tuned", paths[0])
    assert figures["strength_inside"] + 3 * figures["strength_inside_error"] > 1
    assert "its weights cannot tell whether DPO is in it" in text
    assert figures["suggested_strength"] == 0.5


def test_a_distilled_target_of_a_plain_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, tuned = checkpoint(tmp_path / "base.safetensors"), unet(tmp_path / "dpo.safetensors")
    turbo = tiny.save(tmp_path / "sd_turbo.safetensors", moved(0.003))
    text, figures = printed(capsys, tmp_path, "compat", "--target", turbo, "--base", base, "--tuned", tuned)
    assert text.startswith("sd_turbo is of another kind than the pair: distilled for few steps")
    assert (figures["verdict"]["level"], figures["suggested_strength"]) == ("other", 0.5)
    own = tiny.save(tmp_path / "turbo-dpo.safetensors", tiny.only_unet(tiny.tuned()))
    text, _ = printed(capsys, tmp_path, "compat", "--target", turbo, "--base", base, "--tuned", own)
    assert not text.startswith("sd_turbo is of another kind")


def test_equal_unets_are_no_right_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Though the text encoders differ by their rounding: the figures are not all zero."""
    exact = tiny.exact_base()
    one = tiny.save(tmp_path / "one.safetensors", exact | tiny.only_unet(tiny.base()))
    other = tiny.save(tmp_path / "other.safetensors", tiny.base())
    _, figures = printed(capsys, tmp_path, "diff", "--base", one, "--tuned", other)
    assert figures["verdict"]["level"] == "doubtful"
    assert figures["verdict"]["text"] == "No offset: the UNets of one and other are equal, so there is nothing to extract."


def test_which_text_encoders_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = checkpoint(tmp_path / "base.safetensors", "sdxl")
    tuned = tiny.tuned("sdxl")

    def verdict(without: str) -> str:
        rest = {key: tensor for key, tensor in tuned.items() if not key.startswith(without)}
        path = tiny.save(tmp_path / "tuned.safetensors", rest)
        found: str = printed(capsys, tmp_path, "diff", "--base", base, "--tuned", path)[1]["verdict"]["text"]
        return found

    assert verdict("-").endswith(", and the text encoders agree.")
    assert verdict("conditioner.embedders.1").endswith(", and te1 of the text encoders agrees; te2 is in one file only.")
    half = "conditioner.embedders.0.transformer.text_model.encoder.layers.1"
    assert verdict(half).endswith(", and the text encoders agree as far as both files hold them.")
    assert verdict("conditioner.").endswith(", and only UNets were compared.")


def test_a_file_that_keeps_less_than_nothing_says_what_is_known_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, tuned = checkpoint(tmp_path / "base.safetensors"), tiny.save(tmp_path / "tuned.safetensors", tiny.tuned(rms=1e-3))
    lora = tmp_path / "lora.safetensors"
    assert tiny.run("extract", "--base", base, "--tuned", tuned, "-o", lora, "--rank", 8, "--no-card") == 0

    def below_zero(path: Path, *, swapped: bool = False, other: Path = tuned) -> str:
        pair = (other, base) if swapped else (base, other)
        out, figures = printed(capsys, tmp_path, "verify", "--lora", path, "--base", pair[0], "--tuned", pair[1])
        assert figures["energy_kept"] < 0
        return next(line for line in out.splitlines() if line.startswith("below zero"))

    four = {key: 4 * tensor if key.endswith(".alpha") else tensor for key, tensor in load_file(lora).items()}
    strong = tiny.save(tmp_path / "strong.safetensors", four)
    assert "at strength 0.25 it would keep" in below_zero(strong)
    assert below_zero(strong).endswith("so its scale (alpha) is 4 times what this change needs")
    assert "so base and tuned are swapped, or the file holds the opposite" in below_zero(lora, swapped=True)
    strange = tiny.save(tmp_path / "strange.safetensors", moved(1e-3))
    assert below_zero(lora, other=strange).endswith("most likely it belongs to another pair")


def test_a_resized_fp8_lora_agrees_with_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its figure is a product of two shares, each with the rounding of its own step."""
    base, tuned = checkpoint(tmp_path / "base.safetensors"), tiny.save(tmp_path / "tuned.safetensors", tiny.tuned(rms=1e-3))
    eight, four = tmp_path / "eight.safetensors", tmp_path / "four.safetensors"
    pair = ("--base", base, "--tuned", tuned)
    assert tiny.run("extract", *pair, "-o", eight, "--rank", 8, "--precision", "fp8") == 0
    assert tiny.run("resize", "--lora", eight, "-o", four, "--rank", 4, "--precision", "fp8") == 0
    out, figures = printed(capsys, tmp_path, "verify", "--lora", four, *pair)
    assert ": agrees" in out
    assert figures["energy_kept"] == pytest.approx(figures["energy_kept_claimed"], abs=2e-3)
