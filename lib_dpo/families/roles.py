"""How much a layer of a model matters for what the model predicts, by the place that it has in the network alone.

A change of a weight is not a change of the prediction. What a layer adds to the UNet's stream is in every later layer and in
the output; what goes through a softmax, a gate or another layer first arrives there damped; and everything goes through the
first and the last convolution, which are tiny. Measured on the bundled model, the change of the prediction per change of the
weights (squared, one layer changed at a time) is about 110 and 450 times the mean for the two ends, 0.7 to 4 where a branch
ends in the stream, 0.2 to 0.7 inside of branches, and 0.02 to 0.26 for queries, keys, values and what opens a gate.
"""

from __future__ import annotations

import re

# Names as files have them, dots as underscores: of ldm and sgm, and of diffusers. First match counts.
_ROLES: tuple[tuple[str, float], ...] = (
    # the two ends
    (r"input_blocks_0_0|(?:unet|diffusion_model)_out_2|conv_in|conv_out", 64.0),
    # where a branch, a shortcut or a change of resolution ends in the stream
    (r"out_layers_3|conv2|skip_connection|conv_shortcut|proj_out|\d_op|\d_conv", 1.0),
    # queries, keys, values, what opens a gate, and the step's shift of a ResNet block
    (r"attn[12]_to_[qkv]|ff_net_0_proj|emb_layers_1|time_emb_proj", 0.25),
)
_INSIDE = 0.5  # of a branch; and text encoders, which were not measured
_TESTS = tuple((re.compile(rf"(?:^|_)(?:{names})(?:_|$)"), weight) for names, weight in _ROLES)
_TEXT_ENCODER = re.compile(r"^(?:lora|lycoris)_te\d?_|text_model|text_encoder|cond_stage_model|conditioner")


def role_weight(name: str) -> float:
    """What a change of this layer's weights counts for the prediction beside one of another layer.

    Rounded to powers of two and drawn together towards 1, since they were measured on one small model: finer weights from
    that model itself do better on it, and might not on others.

    Args:
        name: a canonical key, or a LoRA module's name as any file has it.
    """
    plain = name.replace(".", "_")
    if _TEXT_ENCODER.search(plain):
        return _INSIDE
    return next((weight for test, weight in _TESTS if test.search(plain)), _INSIDE)
