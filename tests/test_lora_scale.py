"""What a LoRA pair is multiplied by: alpha in the file, PEFT's settings where they belong to it, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_dpo.cli.text import inspect_text
from lib_dpo.errors import BadFileError, MismatchError
from lib_dpo.families.shapes import unet_diffusers_shapes
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.files.small import MOST
from lib_dpo.offsets.lora.aliases import find_module
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.lora.scale import _HARMLESS_STARTS, _REFUSED, PeftSettings
from lib_dpo.offsets.patch import open_patch
from lib_dpo.operations.inspect import inspect
from lib_dpo.operations.resize import resize
from lib_dpo.settings import RankPolicy
from tests.lora_files import TO_Q, TO_Q_DOTTED, TO_Q_KEY, configured, kohya, pair, peft, pipeline_of, product, saved, tiny_unet

PEFT_NAME = "base_model.model." + TO_Q_DOTTED


def delta(path: Path, key: str = TO_Q_KEY) -> torch.Tensor:
    with open_offset(path) as offset:
        return offset.read(key, torch.float64)


def resized(path: Path, output: Path, rank: int = 4) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(path) as checkpoint:
        resize(checkpoint, output, RankPolicy(rank=rank), precision="fp32")
    return output


# ---- whose settings ----


@pytest.mark.parametrize("rank", [4, 2])
def test_a_resized_peft_file_beside_the_old_config_is_scaled_once(tmp_path: Path, rank: int) -> None:
    up, down = pair(rank=4)
    configured(tmp_path / "a", {"r": 4, "lora_alpha": 16})
    source = saved(tmp_path / "a" / "adapter_model.safetensors", peft(PEFT_NAME, up, down))
    torch.testing.assert_close(delta(source), product(up, down, 4.0))
    U, S, Vh = torch.linalg.svd(product(up, down, 4.0), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    configured(tmp_path / "b", {"r": 4, "lora_alpha": 16})
    output = resized(source, tmp_path / "b" / "adapter_model.safetensors", rank)
    torch.testing.assert_close(delta(output), best, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("file", "tensors"),
    [
        ("mine.safetensors", kohya(TO_Q, *pair())),
        ("adapter_model.safetensors", kohya(TO_Q, *pair())),
        ("mine.safetensors", peft(PEFT_NAME, *pair())),
        ("mine.safetensors", peft("unet." + TO_Q_DOTTED, *pair())),
    ],
)
def test_a_config_of_another_file_scales_nothing_and_inspect_says_so(tmp_path: Path, file: str, tensors: Any) -> None:
    configured(tmp_path, {"r": 4, "lora_alpha": 64})
    path = saved(tmp_path / file, tensors)
    torch.testing.assert_close(delta(path), product(*pair()))
    words = inspect_text(inspect(path))
    assert "scale 1 (nothing says another)" in words
    assert "adapter_config.json beside it is not taken for its own" in words


def test_alpha_in_the_file_comes_before_the_config_beside_it(tmp_path: Path) -> None:
    configured(tmp_path, {"r": 8, "lora_alpha": 64})
    path = saved(
        tmp_path / "adapter_model.safetensors", peft(TO_Q_DOTTED, *pair()) | {f"{TO_Q_DOTTED}.alpha": torch.tensor(2.0)}
    )
    torch.testing.assert_close(delta(path), product(*pair(), 0.5))
    assert "scale 0.5 (alpha in the file)" in inspect_text(inspect(path))


def test_a_config_with_another_rank_is_refused(tmp_path: Path) -> None:
    configured(tmp_path, {"r": 8, "lora_alpha": 16})
    path = saved(tmp_path / "adapter_model.safetensors", peft(PEFT_NAME, *pair(rank=4)))
    with pytest.raises(MismatchError, match=r"has rank 4, but its adapter_config.json says 8; it belongs to another LoRA"):
        open_offset(path)
    found = inspect(path)
    assert any("belongs to another LoRA" in note for note in found.notes)


def test_a_config_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    path = saved(tmp_path / "adapter_model.safetensors", peft(PEFT_NAME, *pair()))
    ids = []
    for alpha in (4, 8):
        configured(tmp_path, {"r": 4, "lora_alpha": alpha, "revision": "x" * alpha})
        torch.testing.assert_close(delta(path), product(*pair(), alpha / 4))
        patch = open_patch(path)
        ids.append(patch.id)
        patch.close()
    assert ids[0] != ids[1]


def test_metadata_of_one_component_says_nothing_of_the_other(tmp_path: Path) -> None:
    te, te_key = (
        "text_model.encoder.layers.0.mlp.fc1",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    )
    settings = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {}}
    tensors = peft("unet." + TO_Q_DOTTED, *pair()) | peft("text_encoder." + te, *pair(64, 16))
    path = saved(tmp_path / "l.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})
    torch.testing.assert_close(delta(path), product(*pair(), 2.0))
    torch.testing.assert_close(delta(path, te_key), product(*pair(64, 16)))
    assert "scale 2 (lora_adapter_metadata in its metadata); 1 (nothing says another)" in inspect_text(inspect(path))


def test_a_resized_file_by_kohyas_names_carries_its_alpha(tmp_path: Path) -> None:
    path = resized(saved(tmp_path / "l.safetensors", kohya(TO_Q, *pair())), tmp_path / "r.safetensors", 2)
    with open_checkpoint(path) as checkpoint:
        assert float(checkpoint.read(f"{TO_Q}.alpha")) == 2.0
    assert "scale 1 (alpha in the file)" in inspect_text(inspect(path))


@pytest.mark.newest
def test_a_resized_file_of_diffusers_is_read_alike_by_diffusers(tmp_path: Path) -> None:
    unet = tiny_unet()
    up, down = pair()
    settings = {"unet.r": 4, "unet.lora_alpha": 8}
    source = saved(
        tmp_path / "l.safetensors", peft("unet." + TO_Q_DOTTED, up, down), {"lora_adapter_metadata": json.dumps(settings)}
    )
    output = resized(source, tmp_path / "r.safetensors", 2)
    before = unet.state_dict()[f"{TO_Q_DOTTED}.weight"].clone()
    pipeline = pipeline_of(unet)
    pipeline.load_lora_weights(tmp_path, weight_name="r.safetensors")
    pipeline.fuse_lora(components=["unet"])
    change = unet.state_dict()[f"{TO_Q_DOTTED}.base_layer.weight"] - before
    torch.testing.assert_close(delta(output).float(), change, atol=1e-5, rtol=1e-4)


# ---- PEFT's own rules ----


PATTERNS = [
    {"attn1.to_q": 8, "to_q": 3},
    {"to_q": 3, "attn1.to_q": 8},
    {r"^down_blocks\.0\..*to_q": 5, "to_q": 3},
    {r"^attentions\.0\..*to_q": 5, "to_k": 2},
    {r"down_blocks\.[12]\..*(to_q|to_k)": 6},
    {"o_q": 7, "attn2.to_.": 9},
    {"transformer_blocks.0": 7, r"mid_block.*": 1},
    {r"(down|up)_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+\.attn\d+\.to_[qk]": 5, r".*(attn2|attn1)?\.to_q": 3},
]


@pytest.mark.newest
@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")
@pytest.mark.parametrize("alphas", PATTERNS)
@pytest.mark.parametrize("ranks", [{}, {"attn2.to_k": 2, r"up_blocks\.\d\..*": 3}])
def test_patterns_mean_what_they_mean_to_peft(tmp_path: Path, alphas: dict[str, int], ranks: dict[str, int]) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer

    targets = ["to_q", "to_k"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, alpha_pattern=alphas, rank_pattern=ranks, init_lora_weights=False,
        use_rslora=bool(ranks),
    )  # fmt: skip
    model: Any = get_peft_model(tiny_unet(), config)
    model.save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(tiny_unet(), str(tmp_path))  # PEFT writes patterns in the order of the alphabet
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    with open_offset(tmp_path / "adapter_model.safetensors") as offset:
        assert len(layers) == len(offset.shapes) == 64
        for name, layer in layers.items():
            module = find_module("sd1", name)
            assert module is not None
            wanted = layer.double().get_delta_weight("default")
            torch.testing.assert_close(offset.read(module.key, torch.float64), wanted, atol=1e-9, rtol=1e-6)


@pytest.mark.newest
def test_what_a_config_leaves_out_is_what_peft_takes(tmp_path: Path) -> None:
    from peft import LoraConfig

    ours = LoraConfig()
    configured(tmp_path, {})
    path = saved(tmp_path / "adapter_model.safetensors", peft(PEFT_NAME, *pair(rank=ours.r)))
    torch.testing.assert_close(delta(path), product(*pair(rank=ours.r), ours.lora_alpha / ours.r))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, True) for name in _REFUSED),
        ("modules_to_save", ["conv_in"]),
        ("bias", "lora_only"),
        ("peft_type", "LOHA"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
    ],
)
def test_a_setting_that_makes_it_more_than_a_lora_is_refused_by_name(tmp_path: Path, setting: str, value: Any) -> None:
    configured(tmp_path, {"r": 4, "lora_alpha": 4, setting: value})
    path = saved(tmp_path / "adapter_model.safetensors", peft(PEFT_NAME, *pair()))
    with pytest.raises(MismatchError, match=setting):
        open_offset(path)


@pytest.mark.parametrize(
    "config",
    [{"bias": "none", "use_dora": False, "fan_in_fan_out": True}, *({"init_lora_weights": x} for x in _HARMLESS_STARTS)],
)
def test_settings_that_change_nothing_are_accepted(tmp_path: Path, config: dict[str, Any]) -> None:
    """fan_in_fan_out too: PEFT itself takes it back for linear layers and knows none for convolutions."""
    configured(tmp_path, {"r": 4, "lora_alpha": 4, "peft_type": "LORA", "modules_to_save": None} | config)
    path = saved(tmp_path / "adapter_model.safetensors", peft(PEFT_NAME, *pair()))
    torch.testing.assert_close(delta(path), product(*pair()))


@pytest.mark.newest
def test_every_setting_of_peft_is_looked_at_or_known_to_change_nothing() -> None:
    from peft import LoraConfig

    applied = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias", "init_lora_weights"}
    applied |= {"use_dora"}
    # which modules were trained and how, and what goes with settings that are refused
    idle = {
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
        "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_config",
        "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
        "runtime_config", "ensure_weight_tying",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= applied | idle | set(_REFUSED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "no JSON object"),
        ('{"r": "four"}', "r in its adapter_config.json"),
        ('{"r": 4, "lora_alpha": true}', "lora_alpha"),
        ('{"r": 4, "alpha_pattern": ["to_q"]}', "alpha_pattern"),
        ('{"r": 4, "alpha_pattern": {"to_(q": 1}}', "no regular expression"),
        ('{"r": 4, "alpha_pattern": {"(.*_?)+z": 1}}', "hours to match"),
        ('{"r": 4, "rank_pattern": {".*.*.*.*z": 1}}', "hours to match"),
        ('{"r": 4, "rank_pattern": {"' + ".?" * 40 + "z" * 40 + '": 1}}', "hours to match"),
        ('{"r": 4, "rank_pattern": {"' + "(t|t)" * 40 + 'z": 1}}', "hours to match"),
        ('{"r": 4, "rank_pattern": {"' + ".*" * 900 + '": 1}}', "hours to match"),
        ('{"r": 4, "rank_pattern": {"x{99999999999}": 1}}', "no regular expression"),
        pytest.param('{"r": 4, "title": "' + "x" * MOST + '"}', "more than 8 MB", id="large"),
        pytest.param(json.dumps({"r": 4, "alpha_pattern": {f"to_{n}": 1 for n in range(10_001)}}), "alpha_pattern", id="many"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    path = saved(tmp_path / "adapter_model.safetensors", peft(PEFT_NAME, *pair()))
    with pytest.raises(BadFileError, match=message):
        open_offset(path)


def test_a_pattern_for_each_layer_takes_no_time() -> None:
    """As PEFT and diffusers write them where ranks differ; `re` compiled each again and again: a minute for SDXL."""
    names = [key.removesuffix(".weight") for key in unet_diffusers_shapes("sdxl") if key.endswith(".weight")]
    ranks = {name: 4 + number for number, name in enumerate(names)}
    settings = PeftSettings("file", "adapter_config.json", {"r": 2, "rank_pattern": ranks})
    began = time.thread_time()
    assert [settings.scale(name, ranks[name]).value for name in names] == [8 / rank for rank in ranks.values()]
    assert time.thread_time() - began < 20


def test_a_lokr_whose_scale_is_in_metadata_is_not_copied_without_it(tmp_path: Path) -> None:
    """diffusers may keep a LoRA of the UNet and a LoKr of the text encoder in one file."""
    up, down = pair()
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    lokr = {f"{name}.lokr_w1": (2, 2), f"{name}.lokr_w2_a": (24, 3), f"{name}.lokr_w2_b": (3, 24)}
    settings = {
        "unet.r": 4, "unet.lora_alpha": 8, "unet.peft_type": "LORA",
        "text_encoder.r": 3, "text_encoder.alpha": 6, "text_encoder.peft_type": "LOKR",
    }  # fmt: skip
    tensors = {**peft("unet." + TO_Q_DOTTED, up, down), **{key: torch.ones(shape) for key, shape in lokr.items()}}
    path = saved(tmp_path / "both.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})
    with open_checkpoint(path) as lora, pytest.raises(MismatchError, match="whose scale is in its PEFT settings"):
        resize(lora, tmp_path / "smaller.safetensors", RankPolicy(rank=2))
    assert not (tmp_path / "smaller.safetensors").exists()
