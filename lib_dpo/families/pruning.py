"""UNets that lack tensors of their architecture: whole blocks left out on purpose, or an incomplete file.

Models are pruned by whole parts, and then trained on: the last transformer blocks of a level (SSD-1B and Vega, arXiv
2401.02677), and the middle block or all of it but its first resnet. Anything else that is missing was lost.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

from lib_dpo.families.arch import Architecture
from lib_dpo.families.shapes import checkpoint_shapes

_UNET = "model.diffusion_model."
_BLOCK = re.compile(r"(.+\.transformer_blocks\.)(\d+)\.")
_MIDDLE = re.compile(r"model\.diffusion_model\.middle_block\.(\d)\.")
_MIDDLES = {(): "whole", (1, 2): "first resnet", (0, 1, 2): "none"}

# Architecture, what is there of the middle block, transformer blocks on the way down and up. From the models' own
# config.json and the list in ComfyUI's comfy/model_detection.py.
_NAMES: Mapping[tuple[str, str, tuple[int, ...]], str] = {
    ("sdxl", "first resnet", (2, 2, 4, 4, 4, 4, 10, 2, 1, 1)): "SSD-1B",
    ("sdxl", "first resnet", (1, 1, 2, 2, 2, 2, 2, 1, 1, 1)): "Segmind Vega",
    ("koala", "none", (2, 5, 5, 5, 2, 2)): "KOALA-700M",
    ("koala", "whole", (2, 6, 6, 6, 2, 2)): "KOALA-1B",
    ("sd1-small", "whole", (1,) * 9): "BK-SDM base",
    ("sd1-small", "none", (1,) * 9): "BK-SDM small (small-sd)",
    ("sd1-tiny", "whole", (1,) * 9): "BK-SDM tiny (tiny-sd)",
    ("sd2-small", "whole", (1,) * 9): "BK-SDM v2 base",
    ("sd2-small", "none", (1,) * 9): "BK-SDM v2 small",
    ("sd2-tiny", "whole", (1,) * 9): "BK-SDM v2 tiny",
}


@dataclass(frozen=True)
class Blocks:
    """Which tensors of its architecture's UNet a file lacks, and whether that is a model or a damaged file."""

    architecture: Architecture
    lacking: tuple[str, ...]  # canonical keys
    count: int  # of the architecture's own
    is_model: bool  # nothing is lacking, or whole blocks only
    name: str  # of the pruned model, where it is a known one

    @property
    def pruned(self) -> bool:
        """Whether blocks were left out."""
        return self.is_model and (bool(self.lacking) or self.architecture.resnets != 2)

    @property
    def text(self) -> str:
        """What it is, in a few words after "is" or "it is"."""
        title = f"a UNet of {self.architecture.title}"
        if not self.is_model:
            return f"{title} that lacks {len(self.lacking)} of {self.count} tensors, first {self.lacking[0]}"
        if not self.pruned:
            return f"a whole UNet of {self.architecture.title}"
        if self.lacking:
            title += f"{' and' if self.architecture.resnets != 2 else ' with'} blocks left out"
        return f"{self.name}, {title}" if self.name else title


def blocks_of(arch: Architecture, keys: Collection[str]) -> Blocks:
    """What a UNet with these canonical keys is; keys that the architecture does not have do not count."""
    own = _own(arch.name)
    lacking = sorted(own - set(keys))
    is_model = not lacking or _whole_blocks(own, set(lacking))
    name = _NAMES.get((arch.name, _middle(lacking), _depths(arch, keys)), "") if is_model else ""
    return Blocks(arch, tuple(lacking), len(own), is_model, name)


def belongs(arch: Architecture, key: str) -> bool:
    """Whether a canonical key is one of the architecture's UNet, in whatever depth."""
    return key in _own(arch.name) or _BLOCK.sub(r"\g<1>0.", key) in _own(arch.name)


@cache
def _own(arch_name: str) -> frozenset[str]:
    return frozenset(key for key in checkpoint_shapes(arch_name) if key.startswith(_UNET))


def _whole_blocks(own: Collection[str], lacking: set[str]) -> bool:
    """Whether what lacks is the ends of stacks of transformer blocks and parts of the middle, each of them whole."""
    middle = {int(found[1]) for key in lacking if (found := _MIDDLE.match(key))}
    if tuple(sorted(middle)) not in _MIDDLES and not _only_transformer_blocks(lacking, "middle_block."):
        return False
    first: dict[str, int] = {}  # stack -> the first of its blocks that lacks
    for key in lacking:
        block = _BLOCK.match(key)
        if block:
            first[block[1]] = min(int(block[2]), first.get(block[1], int(block[2])))
        elif not _MIDDLE.match(key):
            return False
    if any(number == 0 and not _MIDDLE.match(stack) for stack, number in first.items()):
        return False
    gone = _MIDDLES.get(tuple(sorted(middle)), "") in ("first resnet", "none")
    wanted = {key for key in own if _is_gone(key, first) or (gone and _in_middle(key, middle))}
    return wanted == lacking


def _only_transformer_blocks(lacking: Collection[str], where: str) -> bool:
    return all(_BLOCK.match(key) for key in lacking if where in key)


def _is_gone(key: str, first: Mapping[str, int]) -> bool:
    block = _BLOCK.match(key)
    return bool(block) and int(block[2]) >= first.get(block[1], 1 << 30)  # type: ignore[index]


def _in_middle(key: str, parts: Collection[int]) -> bool:
    found = _MIDDLE.match(key)
    return bool(found) and int(found[1]) in parts  # type: ignore[index]


def _middle(lacking: Collection[str]) -> str:
    parts = {int(found[1]) for key in lacking if not _BLOCK.match(key) and (found := _MIDDLE.match(key))}
    return _MIDDLES.get(tuple(sorted(parts)), "")


def _depths(arch: Architecture, keys: Collection[str]) -> tuple[int, ...]:
    """How many transformer blocks each level's parts have, in the order of the forward pass, without the middle."""
    depth: dict[str, int] = {}
    for key in keys:
        block = _BLOCK.match(key)
        if block and not _MIDDLE.match(key):
            depth[block[1]] = max(depth.get(block[1], 0), int(block[2]) + 1)
    return tuple(depth[stack] for stack in sorted(depth, key=_order))


def _order(stack: str) -> tuple[bool, int]:
    """input_blocks before output_blocks, each by its number."""
    side, number = stack[len(_UNET) :].split(".")[:2]
    return side != "input_blocks", int(number)
