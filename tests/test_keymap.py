"""Names, against the real key lists and against what diffusers makes of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_dpo.errors import SettingError
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.blocks import EVERYWHERE, block_labels, block_of, parse_blocks
from lib_dpo.families.keymap import (
    UNET,
    VAE,
    component_of,
    lora_modules,
    text_encoder_from_hf,
    text_encoder_to_hf,
    unet_from_diffusers,
    unet_to_diffusers,
    vae_from_diffusers,
    vae_to_diffusers,
)
from lib_dpo.families.layer_kinds import KINDS, kind_of
from lib_dpo.families.shapes import checkpoint_shapes, small, unet_diffusers_config, unet_name_pairs
from lib_dpo.offsets.lora.aliases import lora_aliases

KEYS = Path(__file__).parent / "keys"
ALL = sorted(ARCHITECTURES)


def real_keys(name: str) -> list[str]:
    with open(KEYS / f"{name}.tsv", newline="") as file:
        return [row[0] for row in csv.reader(file, delimiter="\t")]


@pytest.mark.parametrize(
    ("arch", "whole", "unet"), [("sd1", "sd15_ldm", "sd15_unet_diffusers"), ("sdxl", "sdxl_sgm", "sdxl_unet_diffusers")]
)
def test_the_unet_map_is_a_bijection_between_the_real_key_lists(arch: str, whole: str, unet: str) -> None:
    row = ARCHITECTURES[arch]
    ours = [key for key in real_keys(whole) if key.startswith(UNET)]
    theirs = [unet_to_diffusers(row, key) for key in ours]
    assert sorted(map(str, theirs)) == sorted(real_keys(unet))
    assert [unet_from_diffusers(row, str(key)) for key in theirs] == ours


@pytest.mark.parametrize("arch", ALL)
def test_the_unet_map_agrees_with_the_order_in_which_both_layouts_build_the_model(arch: str) -> None:
    row = ARCHITECTURES[arch]
    pairs = unet_name_pairs(arch)
    assert {key: unet_to_diffusers(row, key) for key in pairs} == pairs
    assert {name: unet_from_diffusers(row, name) for name in pairs.values()} == {n: k for k, n in pairs.items()}


@pytest.mark.parametrize("arch", ALL)
def test_every_key_belongs_to_a_component_and_a_block(arch: str) -> None:
    row = ARCHITECTURES[arch]
    labels = {*block_labels(row), "VAE"}
    for key in checkpoint_shapes(arch, small(arch)):
        if "." in key and not key.startswith("denoiser"):
            assert component_of(row, key) in ("unet", "te1", "te2", "vae"), key
            assert block_of(row, key) in labels, key


def test_blocks_of_well_known_keys() -> None:
    sd1 = ARCHITECTURES["sd1"]
    expected = {
        "input_blocks.0.0.weight": "IN00",
        "input_blocks.11.0.in_layers.2.weight": "IN11",
        "middle_block.1.proj_in.weight": "MID",
        "output_blocks.3.1.norm.bias": "OUT03",
        "out.2.weight": "OUT",
        "time_embed.0.weight": "TIME",
    }
    assert {key: block_of(sd1, UNET + key) for key in expected} == expected
    assert block_of(ARCHITECTURES["sdxl"], UNET + "label_emb.0.0.weight") == "TIME"
    assert block_of(ARCHITECTURES["sdxl"], "conditioner.embedders.1.model.ln_final.bias") == "TE2"
    assert block_of(sd1, "alphas_cumprod") is None


@pytest.mark.parametrize("arch", ALL)
def test_lora_names_are_unique_and_every_alias_finds_its_module(arch: str) -> None:
    row = ARCHITECTURES[arch]
    modules = [module for key in checkpoint_shapes(arch) for module in lora_modules(row, key)]
    owner: dict[str, Any] = {}
    for module in modules:
        for alias in lora_aliases(row, module):
            assert owner.setdefault(alias, module) == module, alias
    assert len({module.name for module in modules}) == len(modules)


def test_lora_names_as_kohya_writes_them() -> None:
    def name(arch: str, key: str) -> list[str]:
        return [module.name for module in lora_modules(ARCHITECTURES[arch], key)]

    assert name("sd1", UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight") == [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    ]
    assert name("sdxl", UNET + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight") == [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ]
    assert name("sd1", UNET + "out.0.weight") == ["lora_unet_out_0"]
    assert name("sd1", "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight") == [
        "lora_te_text_model_encoder_layers_3_mlp_fc1"
    ]
    assert name("sdxl", "conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj_weight") == [
        f"lora_te2_text_model_encoder_layers_7_self_attn_{q}_proj" for q in "qkv"
    ]
    assert name("sdxl", "conditioner.embedders.1.model.text_projection") == []
    assert name("sd1", "cond_stage_model.transformer.text_model.final_layer_norm.weight") == []


# ---- against diffusers ----


def numbered(arch: str, prefix: str) -> dict[str, torch.Tensor]:
    """A small checkpoint's tensors under a prefix, each holding its own number, so that a translation can be traced."""
    shapes = {key: shape for key, shape in checkpoint_shapes(arch, small(arch)).items() if key.startswith(prefix)}
    return {key: torch.full(shape, float(n)) for n, (key, shape) in enumerate(shapes.items())}


def traced(converted: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """diffusers key -> our key, by the numbers in the tensors."""
    keys = list(tensors)
    return {name: keys[int(tensor.flatten()[0])] for name, tensor in converted.items()}


@pytest.mark.newest
@pytest.mark.parametrize("arch", ALL)
def test_the_unet_map_is_that_of_diffusers(arch: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    row, tensors = ARCHITECTURES[arch], numbered(arch, UNET)
    converted = convert_ldm_unet_checkpoint(dict(tensors), unet_diffusers_config(arch, small(arch)))
    assert len(converted) == len(tensors)
    assert traced(converted, tensors) == {str(unet_to_diffusers(row, key)): key for key in tensors}


@pytest.mark.newest
def test_the_vae_map_is_that_of_diffusers() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    tensors = numbered("sd1", VAE)
    config = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    converted = convert_ldm_vae_checkpoint(dict(tensors), config)
    assert traced(converted, tensors) == {str(vae_to_diffusers(key)): key for key in tensors}
    assert {key: vae_from_diffusers(str(vae_to_diffusers(key))) for key in tensors} == {key: key for key in tensors}


def test_old_vae_attention_names_are_understood() -> None:
    key = "decoder.mid_block.attentions.0.query.weight"
    assert vae_from_diffusers(key) == "first_stage_model.decoder.mid.attn_1.q.weight"
    assert (
        vae_from_diffusers("decoder.mid_block.attentions.0.proj_attn.bias")
        == "first_stage_model.decoder.mid.attn_1.proj_out.bias"
    )


@pytest.mark.newest
@pytest.mark.parametrize(("arch", "number"), [("sd2", 0), ("sdxl", 1), ("sdxl-refiner", 0)])
def test_the_open_clip_map_is_that_of_diffusers(arch: str, number: int) -> None:
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    encoder = ARCHITECTURES[arch].text_encoders[number]
    tensors = numbered(arch, encoder.prefix)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=small(arch).text[number]))
    converted = convert_open_clip_checkpoint(model, dict(tensors), prefix=encoder.prefix)
    theirs = traced(converted, tensors)
    for name, key in theirs.items():
        if "q_proj" in name or "k_proj" in name or "v_proj" in name:
            assert ".attn.in_proj_" in key  # fused: lib_dpo.families.model joins it
        elif name == "text_projection.weight":
            assert key == encoder.prefix + "text_projection"
        else:
            assert text_encoder_from_hf(encoder, name) == key
            assert text_encoder_to_hf(encoder, key) == name


@pytest.mark.newest
@pytest.mark.parametrize("arch", ["sd1", "sdxl"])
def test_the_clip_map_is_that_of_diffusers(arch: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    encoder = ARCHITECTURES[arch].text_encoders[0]
    tensors = numbered(arch, encoder.prefix)
    prefix = encoder.prefix[: -len("text_model.")]
    for name, key in traced(convert_ldm_clip_checkpoint(dict(tensors), remove_prefix=prefix), tensors).items():
        # newer releases of transformers name the encoder's tensors without text_model.
        hf = name if name.startswith("text_model.") else "text_model." + name
        assert text_encoder_from_hf(encoder, hf) == key
        assert text_encoder_to_hf(encoder, key) == hf


# ---- block weights ----


def test_the_more_exact_name_wins() -> None:
    weights = parse_blocks("IN=0.5, IN00=2,OUT=0, TE=0.25, MID=-1")
    assert [weights.block(label) for label in ("IN00", "IN01", "MID", "OUT", "OUT11", "TE2", "TIME")] == [
        2,
        0.5,
        -1,
        0,
        0,
        0.25,
        1,
    ]
    assert parse_blocks("ALL=0,UNET=1,IN=0.5").block("IN07") == 0.5
    assert parse_blocks("ALL=0,UNET=1").block("TE1") == 0
    assert EVERYWHERE.block("IN05") == 1


def test_a_block_and_a_kind_of_layer_are_multiplied() -> None:
    weights = parse_blocks("IN=0.5,ATTN=0,ATTN2=2,norm=-1,CONV=0.25")
    in_attention = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."
    sd1 = ARCHITECTURES["sd1"]
    expected = {
        in_attention + "attn1.to_q.weight": 0,
        in_attention + "attn2.to_out.0.bias": 0.5 * 2,
        in_attention + "norm2.weight": -0.5,
        in_attention + "ff.net.0.proj.weight": 0.5,
        "model.diffusion_model.output_blocks.3.0.in_layers.2.weight": 0.25,
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": 0,
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": 1,
    }
    assert {key: weights.of(sd1, key) for key in expected} == expected


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_tensor_has_the_kind_of_layer_that_its_shape_tells(arch: str) -> None:
    shapes = checkpoint_shapes(arch)
    kinds = {key: kind_of(key) for key in shapes if component_of(ARCHITECTURES[arch], key) not in (None, "vae")}
    assert set(kinds.values()) == set(KINDS)
    for key, kind in kinds.items():
        if key.endswith(".weight"):
            assert (len(shapes[key]) == 1) == (kind == "norm"), key
        if kind == "convolution" and key.endswith(".weight"):
            assert len(shapes[key]) == 4, key
        if key.endswith(".bias"):
            assert kind == kinds.get(key[: -len("bias")] + "weight", kind), key


@pytest.mark.parametrize("text", ["IN00", "IN00=", "IN00=x", "IN0=1", "XX=1", "OUT=1;MID=0", "IN100=1", "=1", "MID=1e999x"])
def test_unreadable_block_weights_are_named(text: str) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        parse_blocks(text)


@given(
    st.dictionaries(
        st.sampled_from(["IN00", "OUT", "MID", "TE1", "TIME", "ALL", "ATTN", "ATTN2", "CONV"]),
        st.floats(-4, 4).map(lambda x: round(x, 3)),
    )
)
def test_block_weights_survive_a_round_trip(weights: dict[str, float]) -> None:
    text = ",".join(f"{name}={value}" for name, value in weights.items())
    assert parse_blocks(str(parse_blocks(text))) == parse_blocks(text)
