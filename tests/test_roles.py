"""What a layer's place in the network counts for: the same under every name that files give it."""

from __future__ import annotations

import pytest

from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET, lora_modules, unet_to_diffusers
from lib_dpo.families.roles import role_weight
from lib_dpo.families.shapes import checkpoint_shapes


@pytest.mark.parametrize("arch", ["sd1", "sd2", "sdxl"])
def test_a_layer_has_one_role_under_all_of_its_names(arch: str) -> None:
    found = {}
    for key, shape in checkpoint_shapes(arch).items():
        if key.startswith(UNET) and key.endswith(".weight") and len(shape) > 1:
            found[key] = role_weight(key)
            names = [module.name for module in lora_modules(ARCHITECTURES[arch], key)]
            names += ["lora_unet_" + key[len(UNET) : -len(".weight")].replace(".", "_")]
            names += ["unet." + (unet_to_diffusers(ARCHITECTURES[arch], key[: -len(".weight")]) or "")]
            assert {role_weight(name) for name in names} == {found[key]}, (key, names)
    ends = {key[len(UNET) :] for key, weight in found.items() if weight > 1}
    assert ends == {"input_blocks.0.0.weight", "out.2.weight"}
    assert set(found.values()) == {64.0, 1.0, 0.5, 0.25}


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("lora_unet_up_blocks_1_upsamplers_0_conv", 1.0),
        ("lora_unet_output_blocks_10_0_skip_connection", 1.0),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", 0.5),
        ("lora_unet_input_blocks_10_0_in_layers_2", 0.5),
        ("lora_unet_down_blocks_0_resnets_0_time_emb_proj", 0.25),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 0.5),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 0.5),
    ],
)
def test_roles(name: str, weight: float) -> None:
    assert role_weight(name) == weight
