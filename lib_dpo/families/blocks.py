"""Blocks of a UNet, by the names that block-weight tools use (IN00 to OUT11), and weights by block and by kind of layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lib_dpo.errors import SettingError, did_you_mean
from lib_dpo.families.arch import Architecture
from lib_dpo.families.keymap import UNET, component_of
from lib_dpo.families.layer_kinds import KINDS, kind_of


def block_of(arch: Architecture, key: str) -> str | None:
    """Block label of a canonical key: IN00.., MID, OUT00.., TIME, OUT, TE1, TE2, VAE; None outside of all."""
    if not key.startswith(UNET):
        component = component_of(arch, key)
        return component.upper() if component else None
    head, number = key[len(UNET) :].split(".", 2)[:2]
    if head == "input_blocks":
        return f"IN{int(number):02d}"
    if head == "output_blocks":
        return f"OUT{int(number):02d}"
    return {"middle_block": "MID", "time_embed": "TIME", "label_emb": "TIME", "out": "OUT"}.get(head)


def block_labels(arch: Architecture) -> tuple[str, ...]:
    """All block labels of an architecture in the order of the forward pass."""
    count = (arch.resnets + 1) * arch.levels
    return (
        *(encoder.block for encoder in arch.text_encoders),
        "TIME",
        *(f"IN{n:02d}" for n in range(count)),
        "MID",
        *(f"OUT{n:02d}" for n in range(count)),
        "OUT",
    )


@dataclass(frozen=True)
class BlockWeights:
    """Weights from text such as `IN00=0.5,MID=0,CONV=0`: a tensor's is that of its block times that of its kind of layer.

    What is not named has weight 1. Blocks: a group name (IN, OUT, TE, UNET, ALL) sets all its blocks; the more exact name wins,
    whatever the order. `OUT` is the group of OUT00.. together with the output layer itself. Kinds of layer: those of
    `layer_kinds.KINDS`; ATTN is both of attention.
    """

    weights: tuple[tuple[str, float], ...] = ()

    def of(self, arch: Architecture, key: str) -> float:
        """The weight of a canonical key."""
        return self.block(block_of(arch, key)) * self.kind(KINDS[kind_of(key)]) if self.weights else 1.0

    def block(self, label: str | None) -> float:
        """The weight of a block label or a group of blocks, for layers of all kinds."""
        return self._first(_names_for(label or ""))

    def kind(self, name: str) -> float:
        """The weight of a kind of layer by its name in block weights, in all blocks."""
        return self._first((name, *([_ATTENTION] if name.startswith(_ATTENTION) else [])))

    def _first(self, names: Iterable[str]) -> float:
        named = dict(self.weights)
        return next((named[name] for name in names if name in named), 1.0)

    def __str__(self) -> str:
        return ",".join(f"{name}={weight:.10g}" for name, weight in self.weights)


EVERYWHERE = BlockWeights()
_ATTENTION = "ATTN"
_KIND_NAMES = (_ATTENTION, *KINDS.values())


def _names_for(block: str) -> Iterable[str]:
    """From the most exact name of a block to the widest."""
    yield block
    group = re.sub(r"\d+$", "", block)
    if group != block:
        yield group
    if group != "TE":
        yield "UNET"
    yield "ALL"


def parse_blocks(text: str) -> BlockWeights:
    """Read `NAME=WEIGHT,NAME=WEIGHT`. Raises SettingError naming the part that cannot be read, or a name given twice."""
    weights: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, weight = _block_weight(part)
        if name in weights:
            raise SettingError(f"block weights {text!r} give {name} twice; expected each name once")
        weights[name] = weight
    return BlockWeights(tuple(weights.items()))


def _block_weight(part: str) -> tuple[str, float]:
    form = rf"(IN\d\d|OUT\d\d|TE[12]|IN|OUT|MID|TIME|TE|UNET|ALL|{'|'.join(_KIND_NAMES)})\s*=\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)"
    match = re.fullmatch(form, part, re.IGNORECASE)
    try:
        weight = float(match[2]) if match else math.nan
    except ValueError:  # such as 1.2.3
        weight = math.nan
    if not match or not math.isfinite(weight):
        raise SettingError(
            f"block weight {part!r} cannot be read; expected NAME=NUMBER with a name such as IN00, MID, OUT11, "
            f"TIME, TE1, a group IN, OUT, TE, UNET, ALL or a kind of layer {', '.join(_KIND_NAMES)}"
            f"{_block_meant(part.partition('=')[0])}"
        )
    return match[1].upper(), weight


def _block_meant(typed: str) -> str:
    name = re.sub(r"^(IN|OUT)(\d)$", r"\g<1>0\2", typed.strip().upper())  # IN4 is IN04
    return did_you_mean(name, _BLOCK_NAMES) if typed.strip().upper() not in _BLOCK_NAMES else ""


_BLOCK_NAMES = (
    *(f"{side}{number:02d}" for side in ("IN", "OUT") for number in range(12)),
    *("MID", "TIME", "TE1", "TE2", "IN", "OUT", "TE", "UNET", "ALL"),
    *_KIND_NAMES,
)


def check_blocks(blocks: BlockWeights, arch: Architecture) -> None:
    """Refuse a block that the architecture does not have. Raises SettingError naming it."""
    labels = block_labels(arch)
    known = {*_KIND_NAMES, *(name for label in labels for name in _names_for(label))}
    for name, _ in blocks.weights:
        if name not in known:
            raise SettingError(
                f"{arch.title} has no block {name}; expected one of {', '.join(labels)} or IN, OUT, TE, UNET, ALL"
            )
