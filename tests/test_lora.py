"""LoRA files of others: PEFT and diffusers names, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_dpo.errors import BadTensorError, MismatchError
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET, lora_modules, unet_to_diffusers
from lib_dpo.families.shapes import checkpoint_shapes, small, unet_diffusers_config
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.offsets.lora.file import read_lora
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.operations.resize import resize
from lib_dpo.settings import RankPolicy

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KEY = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def pair(rank: int = 4, out: int = 32, in_: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"up": torch.randn(out, rank, generator=generator), "down": torch.randn(rank, in_, generator=generator)}


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (f"{NAME}.lora_up.weight", f"{NAME}.lora_down.weight"),
        (f"{NAME}.lora_B.weight", f"{NAME}.lora_A.weight"),
        *(
            (f"{prefix}.{part}.weight", f"{prefix}.{other}.weight")
            for prefix in (
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
                "base_model.model.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
                "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
                "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
            )
            for part, other in (("lora_B", "lora_A"), ("lora.up", "lora.down"))
        ),
    ],
)
def test_every_spelling_of_a_module_is_read(tmp_path: Path, up: str, down: str) -> None:
    factors = pair()
    with open_offset(saved(tmp_path / "l.safetensors", {up: factors["up"], down: factors["down"]})) as offset:
        assert list(offset.shapes) == [KEY]
        torch.testing.assert_close(offset.read(KEY), factors["up"] @ factors["down"])


@pytest.mark.newest
@pytest.mark.parametrize("arch", ["sd1", "sdxl"])
def test_what_diffusers_saves_is_read_completely(arch: str, tmp_path: Path) -> None:
    import diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    config = {key: value for key, value in unet_diffusers_config(arch, small(arch)).items() if key[0] != "_"}
    unet = diffusers.UNet2DConditionModel(**config)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "conv_in"]
    unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    pipeline: Any = diffusers.StableDiffusionPipeline if arch == "sd1" else diffusers.StableDiffusionXLPipeline
    state = get_peft_model_state_dict(unet)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=state, weight_name="l.safetensors")
    with open_offset(tmp_path / "l.safetensors") as offset:
        assert offset.architecture.name == arch
        assert not offset.unmatched
        tensors = load_file(tmp_path / "l.safetensors")
        assert len(offset.shapes) == len(tensors) // 2
        for key in offset.shapes:
            name = "unet." + str(unet_to_diffusers(ARCHITECTURES[arch], key)).removesuffix(".weight")
            up, down = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
            torch.testing.assert_close(offset.read(key).flatten(1), up.flatten(1) @ down.flatten(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_the_architecture_of_a_lora_is_recognised(arch: str, tmp_path: Path) -> None:
    shapes = checkpoint_shapes(arch, small(arch))
    tensors = {}
    for key, shape in shapes.items():
        for module in lora_modules(ARCHITECTURES[arch], key):
            if len(shape) > 1 and module.part is None:
                tensors[f"{module.name}.lora_down.weight"] = torch.zeros(2, *shape[1:])
                tensors[f"{module.name}.lora_up.weight"] = torch.zeros(shape[0], 2, *(1 for _ in shape[2:]))
    with open_checkpoint(saved(tmp_path / "l.safetensors", tensors)) as checkpoint:
        lora, wanted = read_lora(checkpoint), read_lora(checkpoint, ARCHITECTURES[arch])
    # with one resnet a level all names are in a whole UNet too, and only what it is wanted for tells
    family = {"sd1-small": "sd1", "sd2-small": "sd2", "koala": "sdxl"}.get(arch, arch)
    assert (lora.architecture.name, wanted.architecture.name) == (family, arch)
    assert not lora.unmatched
    assert not wanted.unmatched


def test_alpha_scales_the_product(tmp_path: Path) -> None:
    factors = pair(rank=4)
    tensors = {f"{NAME}.lora_{side}.weight": tensor for side, tensor in factors.items()} | {f"{NAME}.alpha": torch.tensor(1.0)}
    with open_offset(saved(tmp_path / "l.safetensors", tensors)) as offset:
        torch.testing.assert_close(offset.read(KEY), factors["up"] @ factors["down"] / 4)


def test_a_diff_counts_beside_a_pair_of_another_layer(tmp_path: Path) -> None:
    norm = "lora_unet_down_blocks_0_resnets_0_norm1"
    tensors = {f"{NAME}.diff": torch.full((32, 32), 0.5), f"{NAME}.diff_b": torch.ones(32)}
    tensors |= {f"{norm}.w_norm": torch.full((32,), 0.25), f"{norm}.b_norm": torch.full((32,), -1.0)}
    with open_offset(saved(tmp_path / "l.safetensors", tensors)) as offset:
        assert float(offset.read(KEY).mean()) == 0.5
        assert float(offset.read(KEY.replace("weight", "bias")).mean()) == 1
        assert float(offset.read(UNET + "input_blocks.1.0.in_layers.0.weight").mean()) == 0.25
        assert float(offset.read(UNET + "input_blocks.1.0.in_layers.0.bias").mean()) == -1


@pytest.mark.parametrize("suffix", ["hada_w3", "lokr_t1", "oft_blocks", "ia3_l", "bm.weight"])
def test_other_decompositions_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    tensors = {f"{NAME}.lora_{side}.weight": tensor for side, tensor in pair().items()}
    path = saved(tmp_path / "l.safetensors", tensors | {f"{NAME}.{suffix}": torch.ones(32)})
    with pytest.raises(MismatchError, match=suffix):
        open_offset(path)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "l.safetensors", {f"{NAME}.lora_up.weight": pair()["up"]})
    with pytest.raises(MismatchError, match="only its up factor"):
        open_offset(path)


def test_factors_of_different_ranks_are_refused(tmp_path: Path) -> None:
    tensors = {f"{NAME}.lora_up.weight": torch.zeros(32, 4), f"{NAME}.lora_down.weight": torch.zeros(3, 32)}
    with pytest.raises(BadTensorError, match=r"4 columns up but 3 rows"):
        open_offset(saved(tmp_path / "l.safetensors", tensors))


def test_a_lora_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{side}.weight": tensor for side, tensor in pair().items()}
    with pytest.raises(MismatchError, match="supported architecture"):
        open_offset(saved(tmp_path / "l.safetensors", tensors))


# ---- scales kept beside the weights, and ambiguous names ----


@pytest.mark.newest
@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_in_the_metadata_of_diffusers_counts(tmp_path: Path, rslora: bool) -> None:
    import diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    config = {key: value for key, value in unet_diffusers_config("sd1", small("sd1")).items() if key[0] != "_"}
    unet = diffusers.UNet2DConditionModel(**config)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False, use_rslora=rslora)
    unet.add_adapter(settings)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        weight_name="l.safetensors",
        unet_lora_adapter_metadata=settings.to_dict(),
    )
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    unet.fuse_lora()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.base_layer.weight"
    delta = unet.state_dict()[name] - before[name]
    with open_offset(tmp_path / "l.safetensors") as offset:
        torch.testing.assert_close(offset.read(KEY), delta, atol=1e-6, rtol=1e-4)
        resize(offset.checkpoint, tmp_path / "r.safetensors", RankPolicy(rank=4), precision="fp32")
    with open_offset(tmp_path / "r.safetensors") as offset:
        torch.testing.assert_close(offset.read(KEY), delta, atol=1e-6, rtol=1e-4)


def test_the_scale_in_the_config_beside_a_peft_file_counts(tmp_path: Path) -> None:
    factors, name = pair(rank=4), "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_B.weight": factors["up"], f"{name}.lora_A.weight": factors["down"]}
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2, "alpha_pattern": null}')
    with open_offset(saved(tmp_path / "adapter_model.safetensors", tensors)) as offset:
        torch.testing.assert_close(offset.read(KEY), factors["up"] @ factors["down"] / 2)


def test_the_processor_names_of_older_diffusers_are_read(tmp_path: Path) -> None:
    factors, name = pair(), "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    tensors = {f"{name}.up.weight": factors["up"], f"{name}.down.weight": factors["down"]}
    with open_offset(saved(tmp_path / "l.safetensors", tensors)) as offset:
        torch.testing.assert_close(offset.read(KEY), factors["up"] @ factors["down"])


def test_names_that_fit_several_architectures_go_by_metadata_or_by_what_is_wanted(tmp_path: Path) -> None:
    name = "lora_unet_middle_block_0_in_layers_2"
    tensors = {f"{name}.lora_up.weight": torch.zeros(8, 2, 1, 1), f"{name}.lora_down.weight": torch.zeros(2, 8, 3, 3)}
    save_file(tensors, tmp_path / "l.safetensors", metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    with open_checkpoint(tmp_path / "l.safetensors") as checkpoint:
        assert read_lora(checkpoint).architecture.name == "sdxl"
        assert read_lora(checkpoint, ARCHITECTURES["sd2"]).architecture.name == "sdxl"  # to be refused by whoever wants SD 2
    save_file(tensors, tmp_path / "l.safetensors")
    with open_checkpoint(tmp_path / "l.safetensors") as checkpoint:
        assert read_lora(checkpoint).architecture.name == "sd1"
