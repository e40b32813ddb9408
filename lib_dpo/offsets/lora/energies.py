"""Where a LoRA changes a model: the energy of its change by block, from the file alone."""

from __future__ import annotations

import math

from torch import Tensor

from lib_dpo.families.blocks import block_labels, block_of
from lib_dpo.offsets.lora.file import LoraFile
from lib_dpo.offsets.lora.offset import read_change, read_factors


def energy_by_block(lora: LoraFile) -> dict[str, float]:
    """||change||^2 by block at strength 1, in the order of the model; without biases and layers bound to a model's weights.

    Of pairs it is taken from the factors: ||B A||^2 = <B^T B, A A^T>. Two modules that change one weight count each by itself.

    Raises:
        BadTensorError: NaN or Inf, by key.
    """
    found = dict.fromkeys(block_labels(lora.architecture), 0.0)
    for layer in lora.layers:
        block = block_of(lora.architecture, layer.module.key)
        if layer.form is None or layer.form.bound or block not in found:
            continue
        if layer.form.name == "LoRA":
            up, down, scale = read_factors(lora.checkpoint, layer.parts, lora.settings)
            found[block] += scale**2 * _product(up.float(), down.flatten(1).float())
        else:
            change = read_change(lora, layer)
            found[block] += change.scale**2 * float(change.values.float().square().sum())
    return {block: energy for block, energy in found.items() if energy and math.isfinite(energy)}


def _product(up: Tensor, down: Tensor) -> float:
    return max(0.0, float(((up.T @ up).double() * (down @ down.T).double()).sum()))
