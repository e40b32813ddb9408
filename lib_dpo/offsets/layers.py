"""Which layers a LoRA of a pair consists of, by profile, and how each is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lib_dpo.families.keymap import LoraModule, component_of, lora_modules
from lib_dpo.offsets.offset import Pair


@dataclass(frozen=True)
class Layer:
    """One module to write and how: a pair of factors, a norm (`w_norm` + `b_norm`), or dense (`diff` + `diff_b`).

    `exact`: a matrix that is written whole in one way or another, and its bias.
    """

    module: LoraModule
    shape: tuple[int, ...]  # of the module's own rows of the weight
    kind: Literal["pair", "norm", "dense", "exact"]
    required: bool = False  # write it even when it is zero: CLIP-G attention is all of q, k, v, out or none

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in * kh * kw)."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def keys(self) -> tuple[str, ...]:
        """Canonical keys that the layer carries: the weight, and its bias unless it is a pair."""
        return (self.module.key,) if self.kind == "pair" else (self.module.key, self.module.bias)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_wide_convolution(self) -> bool:
        """A convolution with a kernel beyond 1x1: what `conv_rank` is for, as in kohya's scripts."""
        return math.prod(self.shape[2:]) > 1


def plan_layers(pair: Pair, profile: str, components: Sequence[str]) -> list[Layer]:
    """The layers that a profile covers, in file order.

    portable: pairs only. webui: UNet norms as well. full: layers whose bias changed in full, with the bias; never for
    open_clip attention, which hosts take as pairs only. Text encoder norms and embeddings never: hosts reject them.
    exact: all of these, with the biases of all layers that have one.
    """
    layers = []
    groups = _changed_attention(pair, components)
    present = set(pair.keys)
    for key in pair.keys:
        component = component_of(pair.architecture, key)
        if component not in components:
            continue
        shape = pair.base.shape(key)
        modules = lora_modules(pair.architecture, key)
        for module in modules:
            own = (shape[0] // len(modules), *shape[1:])
            if len(shape) == 1:
                if profile != "portable" and component == "unet" and module.bias in present:
                    layers.append(Layer(module, own, "norm"))
            elif profile == "exact" and module.part is None and module.bias in present:
                layers.append(Layer(module, own, "exact", required=key in groups))
            elif profile == "full" and key not in groups and module.bias in present and _changed(pair, module.bias):
                layers.append(Layer(module, own, "dense"))
            else:
                layers.append(Layer(module, own, "pair", required=key in groups))
    return layers


def _changed_attention(pair: Pair, components: Sequence[str]) -> set[str]:
    """Attention weights of open_clip layers in which any of q, k, v, out changed."""
    groups: set[str] = set()
    for encoder in pair.architecture.text_encoders:
        if encoder.naming != "open_clip" or encoder.block.lower() not in components:
            continue
        for n in range(encoder.layers):
            attention = f"{encoder.prefix}transformer.resblocks.{n}.attn."
            group = [key for key in (attention + "in_proj_weight", attention + "out_proj.weight") if key in pair.keys]
            if any(_changed(pair, key) for key in group):
                groups.update(group)
    return groups


def _changed(pair: Pair, key: str) -> bool:
    return bool(pair.delta(key).any())
