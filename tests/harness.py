"""What the contract tests of hosts (test_hosts.py) want of a fake WebUI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from lib_dpo.hosts.base import LiveModel
from lib_dpo.offsets.patch import Patch

Tensors = Mapping[str, torch.Tensor]


class Harness(Protocol):
    """A fake WebUI with checkpoints to choose from, in the canonical keys of the library."""

    live: LiveModel
    dtype: torch.dtype  # in which it stores UNet and text encoders
    merges_in_float32: bool  # whether a generation's sums are rounded once, as a bake's are

    def add(self, name: str, tensors: Tensors) -> None:
        """Put a checkpoint into its list."""

    def load(self, name: str) -> None:
        """Choose a checkpoint; the model object in memory is used again where it fits."""

    def load_beside(self, name: str) -> None:
        """Choose a checkpoint while the loaded one stays in memory; `load` returns to it without reading the file."""

    def reload(self) -> None:
        """Read the chosen checkpoint's file again."""

    def switch_vae(self) -> None:
        """Choose another VAE, with all the callbacks that this brings."""

    def weights(self) -> Tensors:
        """Copies of what a prompt without LoRAs is drawn with; changes nothing."""

    def generate(
        self,
        patch: Patch | None = None,
        strength: float = 1.0,
        *,
        loras: Sequence[tuple[Path, float]] = (),
        hires: bool = False,
    ) -> Tensors:
        """Draw one picture, calling the live model's hooks as the script does; copies of the weights that drew it."""

    def disturb(self, key: str) -> None:
        """Another extension writes to one live tensor."""

    def starve(self) -> None:
        """From now on no memory is free."""
