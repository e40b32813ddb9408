"""One alpha for all layers where programs would misread several."""

from __future__ import annotations

import pytest

from lib_dpo.offsets.lora.alphas import readable_alphas

TO_Q, TO_K = (f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{letter}" for letter in "qk")
CONV, CONV_IN, FF = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_conv_in", "lora_unet_mid_block_ff_net_2"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
TEXT_2 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, {}),
        ({TO_Q: 64, TO_K: 64, CONV_IN: 36}, None),  # the commonest is that of attention
        ({CONV: 3, CONV_IN: 2, FF: 5}, None),  # no attention at all
        ({TO_Q: 64, TO_K: 32, CONV: 64}, 32),
        ({TO_Q: 64, CONV: 16, FF: 16}, 16),  # the commonest is another
        ({TO_Q: 8, CONV: 4}, 4),  # a tie: which of the two is taken depends on their order
        ({TO_Q: 64, FF: 64, TEXT: 32}, None),  # each component by itself
        ({TO_Q: 64, TO_K: 1e-9, CONV: 64, FF: 64}, 64),  # an outlier does not decide for all
        ({TO_Q: 0.5, TO_K: -2, CONV: 0}, 0.5),  # never 0, which would silence all, nor negative
    ],
)
def test_alphas_are_those_wanted_or_one_for_all(wanted: dict[str, float], expected: float | None):
    assert readable_alphas(wanted) == (wanted if expected is None else dict.fromkeys(wanted, expected))


def test_only_the_component_that_would_be_misread_changes():
    unet = {TO_Q: 64.0, FF: 16.0, CONV: 16.0}  # with the text encoder 64 would be the commonest, in the UNet it is 16
    text = {TEXT: 64.0, TEXT.replace("fc1", "fc2"): 64.0, TEXT_2: 3.0}
    assert readable_alphas(unet | text) == dict.fromkeys(unet, 16.0) | text


def test_the_one_alpha_stays_above_what_the_strongest_layer_needs():
    wanted = {TO_Q: 64.0, TO_K: 2.0, CONV: 64.0}
    assert readable_alphas(wanted, {TO_Q: 5.0, TO_K: 0.1}) == dict.fromkeys(wanted, 8.0)  # a power of two
    assert readable_alphas(wanted, {TO_Q: 1.0}) == dict.fromkeys(wanted, 2.0)
    assert readable_alphas({TO_Q: 4.0, CONV: 4.0}, {TO_Q: 1.0}) == {TO_Q: 4.0, CONV: 4.0}
