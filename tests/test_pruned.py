"""Pruned UNets are models of their own: recognised, named, and used like whole ones; incomplete files are refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET, unet_from_diffusers
from lib_dpo.families.pruning import blocks_of
from lib_dpo.families.shapes import checkpoint_shapes
from lib_dpo.offsets.lora.offset import open_lora

pytestmark = pytest.mark.newest
SD = {"block_out_channels": [8, 16, 32, 32], "cross_attention_dim": 16, "norm_num_groups": 4, "attention_head_dim": 2}
SD |= {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "layers_per_block": 1}
SD |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
TINY = {"block_out_channels": [8, 16, 32], "down_block_types": ["CrossAttnDownBlock2D"] * 3, "mid_block_type": None}
TINY = SD | TINY | {"up_block_types": ["CrossAttnUpBlock2D"] * 3}
XL = {
    "block_out_channels": [8, 16, 32], "cross_attention_dim": 24, "norm_num_groups": 4, "attention_head_dim": [1, 2, 4],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40,
}  # fmt: skip
KOALA = XL | {"layers_per_block": 1}
# As in the models' own unet/config.json, narrower: segmind/SSD-1B and Segmind-Vega, etri-vilab/koala-700m and -1b, and
# src/unet_config* in github.com/Nota-NetsPresso/BK-SDM, which segmind/small-sd and tiny-sd follow.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "SSD-1B": ("sdxl", XL | {
        "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    }),
    "Segmind Vega": ("sdxl", XL | {
        "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    }),
    "KOALA-700M": ("koala", KOALA | {"mid_block_type": None, "transformer_layers_per_block": [1, 2, 5]}),
    "KOALA-1B": ("koala", KOALA | {"transformer_layers_per_block": [1, 2, 6]}),
    "BK-SDM base": ("sd1-small", SD),
    "BK-SDM small (small-sd)": ("sd1-small", SD | {"mid_block_type": None}),
    "BK-SDM tiny (tiny-sd)": ("sd1-tiny", TINY),
    "BK-SDM v2 base": ("sd2-small", SD | {"use_linear_projection": True}),
    "BK-SDM v2 small": ("sd2-small", SD | {"use_linear_projection": True, "mid_block_type": None}),
    "BK-SDM v2 tiny": ("sd2-tiny", TINY | {"use_linear_projection": True}),
}  # fmt: skip
each_model = pytest.mark.parametrize("name", CONFIGS)


@cache
def built(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the UNet that diffusers builds."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config({"sample_size": 8, **CONFIGS[name][1]})
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def weights(name: str, *, tuned: bool = False) -> tiny.Tensors:
    """Of 0.03 rms, norms around 1; tuned by an offset of 1 % everywhere."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for key, shape in built(name).items():
        weight = 0.03 * torch.randn(shape, generator=generator) + (1 if "norm" in key and key.endswith("weight") else 0)
        change = 3e-4 * torch.randn(shape, generator=generator)
        found[key] = weight + change if tuned else weight
    return found


def in_ldm(arch: str, tensors: tiny.Tensors) -> tiny.Tensors:
    return {str(unet_from_diffusers(ARCHITECTURES[arch], key)): tensor for key, tensor in tensors.items()}


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert tiny.run(*args) == 2
    return capsys.readouterr().err


@each_model
def test_every_key_has_its_place_and_the_model_its_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arch, _ = CONFIGS[name]
    own = {key for key in checkpoint_shapes(arch) if key.startswith(UNET)}
    canonical = in_ldm(arch, weights(name))
    assert canonical.keys() <= own
    for file, tensors in (("diffusers", weights(name)), ("ldm", canonical)):
        path = tiny.save(tmp_path / f"{file}.safetensors", tensors)
        figures = tiny.figures(tmp_path / "r.json", "inspect", path)
        assert (figures["architecture"], figures["left_out"]) == (arch, [])
        assert f"it is {name}, a UNet of " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SSD-1B", "KOALA-700M", "BK-SDM small (small-sd)", "BK-SDM tiny (tiny-sd)"])
def test_a_pair_of_pruned_models_is_used_like_any(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arch, _ = CONFIGS[name]
    before, after = weights(name), weights(name, tuned=True)
    base, tuned = tiny.save(tmp_path / "base.safetensors", in_ldm(arch, before)), tiny.save(tmp_path / "t.safetensors", after)
    pair, report = ("--base", base, "--tuned", tuned), tmp_path / "r.json"
    diff = tiny.figures(report, "diff", *pair)
    assert diff["verdict"]["level"] == "fits"
    assert diff["unet"].startswith(name)
    assert diff["parameters"] == sum(tensor.numel() for tensor in before.values())
    lora, offset, baked = (tmp_path / f"{file}.safetensors" for file in ("lora", "offset", "baked"))
    assert tiny.figures(report, "extract", *pair, "-o", lora, "--rank", 4)["left_out"] == []
    written = tiny.figures(report, "offset", *pair, "-o", offset)
    assert written["energy_kept"] == pytest.approx(1)
    assert load_file(offset).keys() == before.keys()
    assert tiny.figures(report, "verify", *pair, "--lora", offset)["energy_kept"] == pytest.approx(1)
    checkpoint, opened = open_lora(lora, ARCHITECTURES[arch])
    with checkpoint:
        assert opened is not None
        assert (opened.architecture.name, opened.unmatched) == (arch, ())
    result = tiny.figures(report, "bake", "--target", tuned, "--offset", offset, "-o", baked, "--strength", -1)
    assert result["not_applied"] == []
    for key, tensor in load_file(baked).items():
        assert torch.allclose(tensor, before[key], atol=1e-6), key
    assert tiny.figures(report, "compat", "--target", tuned, *pair)["strength_inside"] == pytest.approx(1, abs=1e-3)


def test_a_whole_sdxl_offset_on_ssd(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pair = [tiny.save(tmp_path / f"{file}.safetensors", tiny.only_unet(tensors)) for file, tensors in
            (("base", tiny.base("sdxl")), ("tuned", tiny.tuned("sdxl")))]  # fmt: skip
    both, report = ("--base", pair[0], "--tuned", pair[1]), tmp_path / "r.json"
    offset, baked = tmp_path / "o.safetensors", tmp_path / "baked.safetensors"
    assert tiny.run("offset", *both, "-o", offset) == 0
    names = {str(unet_from_diffusers(ARCHITECTURES["sdxl"], key)) for key in built("SSD-1B")}
    kept = {key: tensor for key, tensor in tiny.only_unet(tiny.base("sdxl")).items() if key in names}
    target = tiny.save(tmp_path / "ssd.safetensors", kept)
    found = tiny.figures(report, "bake", "--target", target, "--offset", offset, "-o", baked)
    assert len(found["not_applied"]) == 1680 - 944
    assert "736 keys are not understood or have no place here, first model.diffusion_model." in capsys.readouterr().out
    fit = tiny.figures(report, "compat", "--target", target, *both)
    assert (fit["verdict"]["level"], len(fit["no_place"])) == ("other", 736)
    assert (
        "ssd is SSD-1B, a UNet of SDXL with blocks left out: 736 of the offset's 1680 tensors have no place"
        in capsys.readouterr().out
    )
    line = refusal(capsys, "diff", "--base", pair[0], "--tuned", target)
    assert "base.safetensors holds a whole UNet of SDXL but ssd.safetensors holds SSD-1B" in line
    assert "get the file again" not in line
    del kept[next(key for key in kept if "output_blocks.2.1.transformer_blocks.3.attn1.to_q" in key)]
    torn = tiny.save(tmp_path / "torn.safetensors", kept)
    assert "expected a complete UNet, found a UNet of SDXL that lacks 737 of 1680" in refusal(
        capsys, "bake", "--target", torn, "--offset", offset, "-o", tmp_path / "x.safetensors"
    )
    assert "torn.safetensors lacks 737 of the 1680" in refusal(capsys, "diff", "--base", pair[0], "--tuned", torn)


def test_no_pictures_are_promised_of_a_pruned_model(tmp_path: Path):
    from lib_dpo.errors import MismatchError
    from lib_dpo.families.model import open_model
    from lib_dpo.hosts.pipeline import check_whole

    path = tiny.save(tmp_path / "small.safetensors", weights("BK-SDM base"))
    with open_model(path) as model, pytest.raises(MismatchError, match=r"holds BK-SDM base, a UNet of SD 1\.x with one resnet"):
        check_whole(model)


OWN = {arch: sorted(key for key in checkpoint_shapes(arch) if key.startswith(UNET)) for arch in ("sd1", "sdxl", "koala")}


@settings(max_examples=100)
@given(data=st.data(), arch=st.sampled_from(sorted(OWN)))
def test_a_unet_with_any_tensor_missing_is_no_model(data: st.DataObject, arch: str):
    gone = set(data.draw(st.lists(st.sampled_from(OWN[arch]), min_size=1, max_size=9)))
    found = blocks_of(ARCHITECTURES[arch], [key for key in OWN[arch] if key not in gone])
    assert not found.is_model
    assert (len(found.lacking), found.count) == (len(gone), len(OWN[arch]))


def test_a_pair_of_equally_incomplete_files_is_doubtful(tmp_path: Path):
    gone = f"{UNET}input_blocks.1.0.in_layers.2.weight"
    pair = []
    for file, tensors in (("b", tiny.base()), ("t", tiny.tuned())):
        del tensors[gone]
        pair.append(tiny.save(tmp_path / f"{file}.safetensors", tensors))
    verdict = tiny.figures(tmp_path / "r.json", "diff", "--base", pair[0], "--tuned", pair[1])["verdict"]
    assert verdict["level"] == "doubtful"
    assert "both hold a UNet of SD 1.x that lacks 1 of 686 tensors, first " + gone in verdict["text"]


def test_weights_of_an_adapter_within_a_unet_are_left_out_and_named(tmp_path: Path):
    key = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.processor.to_k_ip.weight"
    base = tiny.save(tmp_path / "b.safetensors", tiny.base())
    tuned = tiny.save(tmp_path / "t.safetensors", {**tiny.tuned(), key: torch.ones(2, 2)})
    found = tiny.figures(tmp_path / "r.json", "diff", "--base", base, "--tuned", tuned)
    assert [row["keys"] for row in found["left_out"] if row["kind"] == "unet"] == [[key]]
    assert found["verdict"]["level"] == "doubtful"
