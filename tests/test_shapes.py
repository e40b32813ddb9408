"""The lists of tensors, held against lists of published files and against the models that diffusers builds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lib_dpo.errors import SettingError
from lib_dpo.families.arch import ARCHITECTURES, Shape
from lib_dpo.families.shapes import (
    REAL_SIZES,
    Sizes,
    checkpoint_dtype,
    checkpoint_shapes,
    small,
    unet_diffusers_config,
    unet_diffusers_shapes,
    unet_name_pairs,
)

KEYS = Path(__file__).parent / "keys"
UNET = "model.diffusion_model."
ARCHS = sorted(REAL_SIZES)

# unet/config.json of stabilityai/stable-diffusion-2-1 and stable-diffusion-xl-refiner-1.0, as far as it sets shapes
PUBLISHED_CONFIGS = {
    "sd2": {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl-refiner": {
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [6, 12, 24, 24],
        "transformer_layers_per_block": 4,
        "cross_attention_dim": 1280,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
}


def published(name: str) -> dict[str, tuple[str, Shape]]:
    """Key -> dtype and shape in a published file; `-` is the shape of a scalar."""
    rows = (line.split("\t") for line in (KEYS / f"{name}.tsv").read_text(encoding="utf-8").splitlines())
    return {key: (dtype, () if shape == "-" else tuple(map(int, shape.split("x")))) for key, dtype, shape in rows}


def parameters(shapes: dict[str, Shape]) -> int:
    return sum(map(math.prod, shapes.values()))


def diffusers_unet(config: dict[str, object]) -> dict[str, Shape]:
    """Key -> shape of the UNet that diffusers builds, without its weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("arch", "name"), [("sd1", "sd15_ldm"), ("sdxl", "sdxl_sgm")])
def test_checkpoints_equal_the_published_files(arch: str, name: str):
    ours = {key: (checkpoint_dtype(key), shape) for key, shape in checkpoint_shapes(arch).items()}
    assert ours == published(name)


@pytest.mark.parametrize(("arch", "name"), [("sd1", "sd15_unet_diffusers"), ("sdxl", "sdxl_unet_diffusers")])
def test_diffusers_unets_equal_the_published_files(arch: str, name: str):
    ours = {key: ("F32", shape) for key, shape in unet_diffusers_shapes(arch).items()}
    assert ours == published(name)


@pytest.mark.parametrize(("arch", "count"), [("sd1", 859_520_964), ("sdxl", 2_567_463_684)])
def test_parameter_counts_of_the_unet(arch: str, count: int):
    canonical = {key: shape for key, shape in checkpoint_shapes(arch).items() if key.startswith(UNET)}
    assert parameters(canonical) == parameters(unet_diffusers_shapes(arch)) == count


def test_refiner_reads_text_like_the_second_encoder_of_sdxl():
    refiner, sdxl = (ARCHITECTURES[arch].text_encoders[-1].prefix for arch in ("sdxl-refiner", "sdxl"))
    ours = {key[len(refiner) :]: shape for key, shape in checkpoint_shapes("sdxl-refiner").items() if refiner in key}
    real = {key[len(sdxl) :]: shape for key, (_, shape) in published("sdxl_sgm").items() if sdxl in key}
    assert ours == real


def test_sd2_reads_text_with_a_narrower_encoder_of_24_layers():
    narrower = {1280: 1024, 3 * 1280: 3 * 1024, 4 * 1280: 4 * 1024}
    wide = {key: shape for key, (_, shape) in published("sdxl_sgm").items() if key.startswith("conditioner.embedders.1.")}
    expected = {
        key.replace("conditioner.embedders.1.", "cond_stage_model."): tuple(narrower.get(n, n) for n in shape)
        for key, shape in wide.items()
        if not any(f".resblocks.{n}." in key for n in range(24, 32))
    }
    ours = {key: shape for key, shape in checkpoint_shapes("sd2").items() if key.startswith("cond_stage_model.")}
    assert ours == expected


@pytest.mark.newest
@pytest.mark.parametrize("arch", sorted(PUBLISHED_CONFIGS))
def test_diffusers_builds_these_unets_from_the_published_configuration(arch: str):
    assert unet_diffusers_shapes(arch) == diffusers_unet(PUBLISHED_CONFIGS[arch])


@pytest.mark.newest
@pytest.mark.parametrize("arch", ARCHS)
def test_diffusers_builds_these_unets_from_our_configuration(arch: str):
    for sizes in (None, small(arch)):
        assert unet_diffusers_shapes(arch, sizes) == diffusers_unet(unet_diffusers_config(arch, sizes))


@pytest.mark.newest
@pytest.mark.parametrize("arch", ARCHS)
def test_names_are_paired_as_in_the_converter_of_diffusers(arch: str):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    canonical = [key for key in checkpoint_shapes(arch) if key.startswith(UNET)]
    config = {"class_embed_type": None, "addition_embed_type": None, "num_class_embeds": None}
    numbered = {key: torch.tensor(number) for number, key in enumerate(canonical)}
    converted = convert_ldm_unet_checkpoint(numbered, config | unet_diffusers_config(arch))
    theirs = {canonical[int(number)]: key for key, number in converted.items()}
    assert unet_name_pairs(arch) == theirs


@pytest.mark.parametrize("arch", ARCHS)
def test_paired_tensors_have_the_same_shape(arch: str):
    sizes = small(arch)
    canonical, diffusers = checkpoint_shapes(arch, sizes), unet_diffusers_shapes(arch, sizes)
    pairs = unet_name_pairs(arch)
    assert set(pairs) == {key for key in canonical if key.startswith(UNET)}
    assert set(pairs.values()) == set(diffusers)
    assert all(canonical[ours] == diffusers[theirs] for ours, theirs in pairs.items())


@pytest.mark.parametrize("arch", ARCHS)
def test_widths_change_no_key(arch: str):
    shapes = checkpoint_shapes(arch, small(arch))
    assert list(shapes) == list(checkpoint_shapes(arch))
    assert {key: len(shape) for key, shape in shapes.items()} == {
        key: len(shape) for key, shape in checkpoint_shapes(arch).items()
    }
    assert parameters(shapes) < 30_000_000


def test_inpainting_differs_in_its_first_convolution():
    sizes = Sizes(channels=32, text=(48,), in_channels=9)
    shapes, plain = checkpoint_shapes("sd1", sizes), checkpoint_shapes("sd1", Sizes(channels=32, text=(48,)))
    assert {key for key in shapes if shapes[key] != plain[key]} == {UNET + "input_blocks.0.0.weight"}
    assert shapes[UNET + "input_blocks.0.0.weight"] == (32, 9, 3, 3)


@pytest.mark.parametrize("function", [checkpoint_shapes, unet_diffusers_shapes, unet_diffusers_config, small])
def test_unknown_architecture_is_refused(function):
    with pytest.raises(SettingError, match=r"architecture 'sd15' is not known; expected one of sd1, sd2, sdxl, "):
        function("sd15")
