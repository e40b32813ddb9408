"""Files that are no model are told by name, wherever a model or an offset is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET, VAE

HALF = torch.float16
Some = dict[str, torch.Tensor]


def zeros(*keys: str, shape: tuple[int, ...] = (2, 2)) -> Some:
    return {key: torch.zeros(shape) for key in keys}


def part(prefix: str, *, bare: bool) -> Some:
    own = {key: tensor for key, tensor in tiny.base().items() if key.startswith(prefix)}
    return {key.removeprefix(prefix) if bare else key: tensor for key, tensor in own.items()}


def without_unet() -> Some:
    return {key: tensor for key, tensor in tiny.base().items() if not key.startswith(UNET)}


def ema_alone() -> Some:
    copies = {"model_ema." + key[len("model.") :].replace(".", ""): t for key, t in tiny.only_unet(tiny.base()).items()}
    return {**copies, **without_unet()}


CLIP = "cond_stage_model.transformer.text_model."
FILES: dict[str, tuple[str, Some]] = {
    "lora": ("a LoRA", zeros("lora_unet_x.lora_up.weight", "lora_unet_x.lora_down.weight", "lora_unet_x.alpha")),
    "lora of flux": ("a LoRA", zeros(*(f"transformer.single_transformer_blocks.0.attn.to_q.lora_{x}.weight" for x in "AB"))),
    "loha": ("a LoRA", zeros("lycoris_x.hada_w1_a", "lycoris_x.hada_w1_b", "lycoris_x.hada_w2_a", "lycoris_x.hada_w2_b")),
    "vae": ("a VAE alone", part(VAE, bare=True)),
    "vae of a checkpoint": ("a VAE alone", part(VAE, bare=False)),
    "vae of diffusers": ("a VAE alone", zeros("decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.conv_in.weight")),
    "text encoder": ("a text encoder alone", tiny.in_transformers(ARCHITECTURES["sd1"].text_encoders[0], tiny.base())),
    "text encoder of a checkpoint": ("a text encoder alone", part(CLIP, bare=False)),
    "no unet": ("a text encoder and a VAE without a UNet", without_unet()),
    "t5": ("a T5 text encoder", zeros("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight")),
    "embedding": ("an embedding (textual inversion)", zeros("emb_params", shape=(4, 768))),
    "embedding of sdxl": ("an embedding (textual inversion)", {**zeros("clip_l"), **zeros("clip_g")}),
    "embedding of diffusers": ("an embedding (textual inversion)", zeros("<cat-toy>", shape=(768,))),
    "upscaler": ("an upscaler", zeros("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight")),
    "swin": ("an upscaler", zeros("conv_first.weight", "layers.0.residual_group.blocks.0.norm1.weight")),
    "controlnet": ("a ControlNet", zeros("input_hint_block.0.weight", "zero_convs.0.0.weight", "input_blocks.0.0.weight")),
    "controlnet of diffusers": ("a ControlNet", zeros("controlnet_cond_embedding.conv_in.weight")),
    "ip-adapter": ("an IP-adapter", zeros("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")),
    "motion": ("an AnimateDiff motion module", zeros("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight")),
    "clip vision": ("an image encoder (CLIP vision)", zeros("vision_model.post_layernorm.weight")),
    "optimizer": ("the state of an optimizer, without the model", zeros("state.0.exp_avg", "state.0.exp_avg_sq")),
    "ema alone": ("an EMA copy of a UNet (model_ema.*) without the plain weights", ema_alone()),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    tuned = tiny.in_diffusers("sd1", tiny.only_unet(tiny.tuned()))
    return tiny.save(folder / "b.safetensors", tiny.base(), HALF), tiny.save(folder / "t.safetensors", tuned)


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert tiny.run(*args) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


@pytest.mark.parametrize("name", FILES)
def test_no_model_is_named_where_a_model_is_asked_for(
    name: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    what, tensors = FILES[name]
    path = tiny.save(tmp_path / "odd.safetensors", tensors, HALF)
    for args in (
        ("diff", "--base", path, "--tuned", pair[1]),
        ("extract", "--base", pair[0], "--tuned", path, "-o", tmp_path / "o.safetensors"),
        ("compat", "--target", path, "--base", pair[0], "--tuned", pair[1]),
    ):
        line = refusal(capsys, *args)
        if "supported" not in line:  # families that we name
            assert f"odd.safetensors: is {what}, expected a model; " in line
            assert "choose " in line


@pytest.mark.parametrize("name", [name for name, (what, _) in FILES.items() if what != "a LoRA"])
def test_no_offset_is_named_where_an_offset_is_asked_for(
    name: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tiny.save(tmp_path / "odd.safetensors", FILES[name][1], HALF)
    line = refusal(capsys, "bake", "--target", pair[0], "--offset", path, "-o", tmp_path / "o.safetensors")
    assert "supported" in line or f"is {FILES[name][0]}, expected a LoRA or an offset file; choose a LoRA" in line


@pytest.mark.parametrize("name", [name for name, (what, _) in FILES.items() if what != "a LoRA"])
def test_inspect_says_what_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    what, tensors = FILES[name]
    path = tiny.save(tmp_path / "odd.safetensors", tensors, HALF)
    figures = tiny.figures(tmp_path / "report.json", "inspect", path)
    assert f"odd.safetensors: {what}\n" in capsys.readouterr().out
    assert figures["kind"] != "unknown"
    assert figures["architecture"] is None


def test_nothing_that_is_known_is_said_with_its_first_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tiny.save(tmp_path / "odd.safetensors", zeros("a.b", "c.d"))
    assert "no UNet found among its 2 tensors (a.b, c.d); expected" in refusal(capsys, "diff", "--base", path, "--tuned", path)


PICKLES: dict[str, Any] = {
    "an embedding (textual inversion)": {"string_to_param": {"*": torch.zeros(2, 768)}, "name": "x"},
    "a hypernetwork": {768: (zeros("linear.0.weight"), zeros("linear.0.weight")), "step": 1, "layer_structure": [1, 2, 1]},
    "an upscaler": {"params_ema": zeros("conv_first.weight")},
    "the state of an optimizer, without the model": {"state": {0: zeros("exp_avg")}, "param_groups": [{"lr": 1.0}]},
    "an IP-adapter": {"image_proj": zeros("proj.weight"), "ip_adapter": zeros("1.to_k_ip.weight")},
}


@pytest.mark.newest
@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_hold_no_state_dict_are_named(
    what: str, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "odd.pt"
    torch.save(PICKLES[what], path)
    assert f"odd.pt: is {what}, expected the tensors of a model" in refusal(capsys, "diff", "--base", path, "--tuned", pair[1])
