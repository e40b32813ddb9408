"""The standalone host behind what the contract tests ask of a host: a real diffusers pipeline of tiny models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from harness import Tensors

from lib_dpo.hosts import inplace
from lib_dpo.hosts.standalone import StandaloneLive
from lib_dpo.offsets.patch import Patch


class Standalone:
    """One model at a time, no LoRAs in prompts."""

    dtype = torch.float16
    merges_in_float32 = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._monkeypatch, self._folder, self._chosen = monkeypatch, folder, ""
        self.live = StandaloneLive(tokenizer(folder / "tokenizer"), "cpu", self.dtype)

    def add(self, name: str, tensors: Tensors) -> None:
        tiny.save(self._folder / f"{name}.safetensors", tensors, self.dtype)

    def load(self, name: str) -> None:
        self._chosen = name
        self.live.load(self._folder / f"{name}.safetensors")

    def load_beside(self, name: str) -> None:
        if name == "other":
            pytest.skip("the standalone host keeps one model in memory")
        self.load(name)

    def reload(self) -> None:
        self.load(self._chosen)

    def switch_vae(self) -> None:
        vae = self.live.pipeline.vae
        for parameter in vae.parameters():
            parameter.data.mul_(0.5)

    def weights(self) -> Tensors:
        weights, generation = self.live._weights, self.live._generation
        assert weights is not None
        originals = generation[1].originals if generation else {}
        return {key: (originals[key][0] if key in originals else tensor).clone() for key, tensor in weights.tensors.items()}

    def generate(
        self,
        patch: Patch | None = None,
        strength: float = 1.0,
        *,
        loras: Sequence[tuple[Path, float]] = (),
        hires: bool = False,
    ) -> Tensors:
        if loras:
            pytest.skip("the standalone host has no LoRAs in prompts")
        for _ in range(2 if hires else 1):
            self.live.on_batch(None, patch, strength)
            self.live.on_sampling(None, patch, strength)
        weights = self.live._weights
        assert weights is not None
        own = dict(self.live.pipeline.unet.named_parameters())
        assert own["conv_in.weight"].data_ptr() == weights.tensors["model.diffusion_model.input_blocks.0.0.weight"].data_ptr()
        return {key: tensor.clone() for key, tensor in weights.tensors.items()}

    def disturb(self, key: str) -> None:
        weights = self.live._weights
        assert weights is not None
        weights.tensors[key].add_(1)

    def starve(self) -> None:
        self._monkeypatch.setattr(inplace, "available_memory", lambda: 0)


def tokenizer(folder: Path) -> Path:
    """CLIP's files with an alphabet of a few letters: prompts become numbers below 16, as the tiny models know them."""
    letters = ["a", "b", "c", "a</w>", "b</w>", "c</w>", "!", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>") | {"bos_token": "<|startoftext|>"}
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
