"""A host without a WebUI: folders of tiny files, a live model that is a dict of tensors, and a pipeline that draws squares."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lib_dpo.errors import Cancelled, HostError, NoModelError
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import open_model
from lib_dpo.hosts.base import Baked, Check, FileEntry, LoadedModel, Picture, Request
from lib_dpo.offsets.lora.keys import group_keys
from lib_dpo.offsets.lora.offset import open_lora
from lib_dpo.offsets.patch import Patch
from lib_dpo.progress import Progress


class FakeUnet(torch.nn.Module):
    """Predicts the noisy images, and what weights and offset add to them."""

    added = 0.0

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy + self.added


class FakeLive:
    """Weights by canonical key, float32."""

    refiner = "the refiner draws without it"
    lost = ""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.later: Path | None = None  # chosen, and loaded for the next picture
        self.weights: dict[str, torch.Tensor] = {}
        self._originals: dict[str, torch.Tensor] = {}
        self._baked: Baked | None = None
        self._unet = FakeUnet()
        self.kept: Baked | None = None  # what is baked into the one that is chosen, as it was kept in memory
        self.adds_by_networks = False  # what it is asked to add to a picture

    def load(self, path: Path) -> None:
        with open_model(path) as model:
            self.weights = {key: model.read(key).float().clone() for key in list(model.keys())}
        self.path, self.later, self._baked, self._originals = path, None, None, {}

    def loaded(self) -> LoadedModel | None:
        return self.path and LoadedModel(self.path.stem, self.path, "float32", str(self.path))

    def chosen(self) -> Path | None:
        return self.later

    def ready(self) -> None:
        if self.later:
            self.load(self.later)
            self._baked, self.kept = self.kept, None

    def bake(self, patch: Patch, strength: float, on_progress: Progress | None = None) -> Baked:
        if self.path is None:
            raise NoModelError("no checkpoint is loaded")
        self.unbake()
        keys = patch.changed_keys()
        changed = {}
        for n, key in enumerate(keys, 1):
            changed[key] = self.weights[key] + strength * patch.delta(key).reshape(self.weights[key].shape)
            if on_progress:
                on_progress(n, len(keys), key)
        self._originals = {key: self.weights[key] for key in keys}
        self.weights.update(changed)
        self._baked = Baked(
            patch.id,
            patch.name,
            strength,
            str(patch.blocks),
            patch.rank,
            len(keys),
            patch.offset.unmatched,
            self.bake_bytes(patch),
            file=patch.checkpoint.path,
        )
        return self._baked

    def unbake(self, on_progress: Progress | None = None) -> bool:
        was = self._baked is not None
        self.weights.update(self._originals)
        self._originals, self._baked = {}, None
        return was

    def baked(self) -> Baked | None:
        return self._baked

    def baked_next(self) -> Baked | None:
        return self.kept if self.later else self._baked

    def bake_bytes(self, patch: Patch) -> int:
        return sum(4 * self.weights[key].numel() for key in patch.changed_keys() if key in self.weights)

    def fingerprint(self) -> Mapping[str, str]:
        digests = {"unet": hashlib.sha256(), "te": hashlib.sha256()}
        for key in sorted(self.weights):
            digests["unet" if key.startswith(UNET) else "te"].update(key.encode() + self.weights[key].numpy().tobytes())
        return {name: digest.hexdigest() for name, digest in digests.items()}

    def unet(self) -> FakeUnet:
        return self._unet

    def matched_keys(self, lora: Path) -> tuple[int, int]:
        checkpoint, file = open_lora(lora)
        with checkpoint:
            assert file is not None
            return sum(len(group.parts) for group in group_keys(checkpoint.infos)[0]), len(checkpoint.infos)

    def needs_networks(self, p: Any, patch: Patch) -> bool:
        return self.adds_by_networks

    def on_networks(self, p: Any, patch: Patch | None, strength: float, extra_network_data: dict[str, Any]) -> None:
        p.calls.append(("networks", patch and patch.name, strength))

    def on_batch(self, p: Any, patch: Patch | None, strength: float) -> None:
        p.calls.append(("batch", patch and patch.name, strength))

    def on_sampling(self, p: Any, patch: Patch | None, strength: float) -> None:
        p.calls.append(("sampling", patch and patch.name, strength))

    def left_out(self) -> str:
        return self.lost

    def checks(self) -> Sequence[Check]:
        return (Check("weights", True, "the live weights were found"),)


class FakeJob:
    """Counts what it is told; stops where `host.interrupted` is set."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def progress(self, done: int, total: int, key: str) -> None:
        self._host.told.append((done, total, key))
        self.check()

    def cells(self, count: int) -> None:
        self._host.told.append((0, count, "cells"))

    def check(self) -> None:
        if self._host.interrupted:
            raise Cancelled("stopped by Interrupt; nothing was left behind")


class FakeHost:
    """A host over three folders: checkpoints, Lora, DPO."""

    name = "fake"
    version = "1.0"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.live = FakeLive()
        self.told: list[tuple[int, int, str]] = []
        self.aborted: list[str] = []
        self.refreshed = 0
        self.interrupted = False
        self.paths_allowed = False
        self.no_pictures = ""  # why the page can be given none
        self.auth: dict[str, str] = {}
        self.lock = threading.Lock()
        for path in (self.lora_dir, self.checkpoint_dir, self.reference_dir):
            path.mkdir(parents=True, exist_ok=True)

    @property
    def lora_dir(self) -> Path:
        return self.folder / "Lora"

    @property
    def checkpoint_dir(self) -> Path:
        return self.folder / "Stable-diffusion"

    @property
    def reference_dir(self) -> Path:
        return self.folder / "DPO"

    @property
    def output_dir(self) -> Path:
        return self.folder / "outputs"

    @property
    def cache_dir(self) -> Path:
        return self.folder / "cache"

    def checkpoints(self) -> list[FileEntry]:
        return [FileEntry(path.name, path) for path in sorted(self.checkpoint_dir.glob("*.safetensors"))]

    def loras(self) -> list[FileEntry]:
        return [FileEntry(path.stem, path) for path in sorted(self.lora_dir.glob("*.safetensors"))]

    def refresh(self) -> None:
        self.refreshed += 1

    def may_use_paths(self) -> bool:
        return self.paths_allowed

    @contextmanager
    def job(self, title: str, task_id: str | None = None) -> Iterator[FakeJob]:
        with self.lock:
            self.interrupted = False
            yield FakeJob(self)

    def interrupt(self) -> None:
        self.interrupted = True

    def samplers(self) -> list[str]:
        return ["Euler a", "DPM++ 2M"]

    def generate(self, request: Request, patch: Patch | None, strength: float) -> Picture:
        if request.prompt == "fail":
            raise HostError("the pipeline failed")
        key = f"{UNET}input_blocks.0.0.bias"
        shade = float(self.live.weights[key].double().mean()) if self.live.weights else 0.0
        added = float(patch.delta(key).double().mean()) * strength if patch and strength and key in patch.offset.shapes else 0.0
        self.live.unet().added = 1e4 * (shade + added)
        for step in range(request.steps):
            self.live.unet()(torch.full((1, 4, 8, 8), float(step)))
        level = int(128 + 1e4 * (shade + added) + request.seed) % 256
        image = Image.new("RGB", (request.width, request.height), (level, 255 - level, 128))
        return Picture(
            image, f"{request.prompt}\nSteps: {request.steps}, Seed: {request.seed}, Size: {image.width}x{image.height}"
        )

    def check_pictures(self) -> None:
        if self.no_pictures:
            raise HostError(self.no_pictures)

    def abort(self, p: Any, message: str) -> None:
        self.aborted.append(message)

    def self_test(self) -> Sequence[Check]:
        return (*self.live.checks(), Check("X/Y/Z plot", False, "the X/Y/Z plot script was not found"))

    def api_auth(self) -> Mapping[str, str]:
        return self.auth
