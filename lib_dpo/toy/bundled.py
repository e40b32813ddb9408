"""The bundled model: where its files lie, its networks as diffusers and transformers build them, and pictures from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib_dpo.errors import BadFileError
from lib_dpo.families.model import open_model
from lib_dpo.hosts.pipeline import open_pipeline
from lib_dpo.maths.threads import side_by_side
from lib_dpo.offsets.offset import Offset
from lib_dpo.settings import BUNDLED_BASE, BUNDLED_MODEL
from lib_dpo.toy.generate import GUIDANCE, STEPS, decode, sample
from lib_dpo.toy.pictures import Pictures, Scene, caption

FOLDER = BUNDLED_MODEL
BASE = BUNDLED_BASE
REFERENCE = "toy-shapes-dpo/unet/diffusion_pytorch_model.safetensors"
MEASURED = "study.json"  # what the study found on these files
CLIP = "clip"  # folder of the tokenizer and of the text encoder's configuration
_TOKENS = 77
BATCH = 20  # pictures at once: how many these are changes the last bit of some pixels

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Networks:
    """The base, ready to generate. Weights are float32; only `set_unet` changes them."""

    pipeline: Any  # of diffusers
    live: Mapping[str, Tensor]  # canonical key -> the pipeline's own tensor
    base: Mapping[str, Tensor]  # canonical key -> the UNet's weight as in the file

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as the UNet takes them, (n, 77, width)."""
        found = self.pipeline.tokenizer(
            list(prompts), padding="max_length", max_length=_TOKENS, truncation=True, return_tensors="pt"
        )
        hidden: Tensor = self.pipeline.text_encoder(input_ids=found.input_ids).last_hidden_state
        return hidden

    @torch.no_grad()
    def set_unet(self, offset: Offset | None = None, strength: float = 1.0) -> None:
        """Give the UNet the base's weights plus `strength` times the offset; always from the base, so nothing adds up."""
        for key, weight in self.base.items():
            live = self.live[key]
            live.copy_(weight.reshape(live.shape))
            if offset is not None and key in offset.shapes:
                live.add_(offset.read(key).reshape(live.shape), alpha=strength)


def load(folder: Path = FOLDER) -> Networks:
    """Open the bundled base.

    Raises:
        BadFileError: the model's files are not there.
        MissingExtraError: diffusers or transformers is not installed.
    """
    check_there(folder)
    with open_model(folder / BASE) as model:
        weights = open_pipeline(model, folder / CLIP)
        base = {key: model.read(key).float() for key in model.keys("unet")}
    return Networks(weights.pipeline, weights.tensors, base)


def check_there(folder: Path) -> None:
    """Refuse a folder that lacks a file of the bundled model. Raises BadFileError."""
    lacking = [name for name in (BASE, REFERENCE, f"{CLIP}/vocab.json", f"{CLIP}/merges.txt") if not (folder / name).is_file()]
    if lacking:
        raise BadFileError(
            f"{folder}: lacks {', '.join(lacking)} of the bundled model; get the whole repository, or make the model in about "
            f"two hours: python -m tools.train_bundled_model --work build/bundled --out {folder}"
        )


def generate(
    networks: Networks,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    *,
    part: slice = slice(None),
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    on_progress: OnProgress | None = None,
) -> Pictures:
    """One picture for every scene's caption and its seed, in batches, as many at once as torch has threads.

    A batch on one thread is robust: its small steps wait for one another on two threads, for very long where a core is busy
    with something else.

    Args:
        part: which of the pictures; the same as of all, to the last bit, where it begins and ends with a batch.
        on_progress: called with the pictures that are done and all of them; may raise to stop.
    """
    context, empty = networks.embed([caption(scene) for scene in scenes])[part], networks.embed([""])
    seeds = seeds[part]

    def draw(batch: slice) -> Pictures:
        latents = sample(networks.pipeline.unet, context[batch], empty, seeds[batch], steps=steps, guidance=guidance)
        return decode(networks.pipeline.vae, latents)

    parts: list[Pictures] = []
    batches = [slice(start, start + BATCH) for start in range(0, len(seeds), BATCH)]
    with side_by_side(draw, batches, torch.device("cpu")) as drawn:
        for pictures in drawn:
            parts.append(pictures)
            if on_progress:
                on_progress(sum(map(len, parts)), len(seeds))
    return np.concatenate(parts)
