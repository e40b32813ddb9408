"""No WebUI: a host over a folder of models, with a diffusers pipeline as the live model.

What a generation adds is edited into the weights as a bake is, and stays there until another one is asked for: pictures
at one strength pay for it once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lib_dpo import __version__
from lib_dpo.errors import Cancelled, HostError, NoModelError, SettingError
from lib_dpo.families.arch import Architecture
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import open_model
from lib_dpo.files.hashes import user_cache
from lib_dpo.hosts import checksums, inplace, prompts
from lib_dpo.hosts.base import Baked, Check, FileEntry, LoadedModel, Picture, Request
from lib_dpo.hosts.picture_folder import check_picture_folder, pictures_check
from lib_dpo.hosts.pipeline import Weights, check_whole, open_pipeline
from lib_dpo.maths.devices import memory_in_words, resolve_device
from lib_dpo.offsets.lora.offset import open_lora
from lib_dpo.offsets.patch import Patch
from lib_dpo.progress import Progress
from lib_dpo.settings import one_of

SAMPLERS: Mapping[str, str] = {  # as the WebUIs name them -> diffusers' scheduler
    "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
    "DDIM": "DDIMScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
_SUFFIXES = (".safetensors", ".ckpt")


class StandaloneLive:
    """Implements `LiveModel` over diffusers. `load` chooses the checkpoint."""

    refiner = ""  # there are none

    def __init__(self, tokenizer: Path, device: str = "auto", dtype: torch.dtype | None = None) -> None:
        self._tokenizer, self._device = tokenizer, resolve_device(device)
        self._dtype = dtype or (torch.float16 if self._device.type == "cuda" else torch.float32)
        self._path: Path | None = None
        self._architecture: Architecture | None = None
        self._weights: Weights | None = None
        self._bake: inplace.Record | None = None
        self._generation: tuple[tuple[str, float], inplace.Record] | None = None  # what the last picture added

    def load(self, path: Path) -> None:
        """Open a whole checkpoint; the one that is open is let go first, where the new one can be one. As `open_pipeline`."""
        with open_model(path) as model:
            check_whole(model)
            self._path = self._weights = self._bake = self._generation = None
            with memory_in_words(f"opening {path.name}", "close other programs, or choose a smaller model"):
                weights = open_pipeline(model, self._tokenizer, dtype=self._dtype, device=str(self._device))
            architecture = model.architecture
        self._path, self._weights, self._architecture = path, weights, architecture  # here: the file was as it is all the time

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline. Raises NoModelError."""
        return self._open().pipeline

    def loaded(self) -> LoadedModel | None:
        if self._path is None or self._weights is None:
            return None
        dtype = str(self._weights.pipeline.unet.dtype).removeprefix("torch.")
        return LoadedModel(self._path.stem, self._path, dtype, f"{self._path} {id(self._weights):x}")

    def chosen(self) -> Path | None:
        return None

    def ready(self) -> None:
        """Nothing: what is chosen is loaded at once."""

    # ---- bake and undo ----

    def bake(self, patch: Patch, strength: float, on_progress: Progress | None = None) -> Baked:
        slots = self._clean_slots()
        plan = inplace.plan_edit(patch, slots, self._name())
        self._check_intact(slots)
        inplace.check_memory(plan.nbytes)
        self._bake = inplace.bake(plan, patch, strength, slots, earlier=self._bake, on_progress=on_progress)
        return self._bake.baked

    def unbake(self, on_progress: Progress | None = None) -> bool:
        if self._weights is None or self._bake is None:
            return False
        slots = self._clean_slots()
        self._check_intact(slots)
        try:
            inplace.undo(self._bake, slots, on_progress)
        except inplace.PartlyUndoneError:
            self._bake = replace(self._bake, undoing=0)
            raise
        self._bake = None
        return True

    def baked(self) -> Baked | None:
        return self._bake.baked if self._bake else None

    def baked_next(self) -> Baked | None:
        return self.baked()

    def bake_bytes(self, patch: Patch) -> int:
        return inplace.plan_edit(patch, self._slots(), self._name()).nbytes

    def fingerprint(self) -> Mapping[str, str]:
        tensors = {key: slot.tensor for key, slot in self._clean_slots().items()}
        parts = {"unet": True, "te": False}
        return {
            name: checksums.digest({key: tensor for key, tensor in tensors.items() if key.startswith(UNET) == is_unet})
            for name, is_unet in parts.items()
        }

    def unet(self) -> torch.nn.Module:
        module: torch.nn.Module = self.pipeline.unet
        return module

    def matched_keys(self, lora: Path) -> tuple[int, int]:
        checkpoint, file = open_lora(lora, self._architecture)
        with checkpoint:
            fits = file is not None and file.architecture is self._architecture
            return sum(len(layer.parts) for layer in file.layers) if file and fits else 0, len(checkpoint.infos)

    # ---- one generation ----

    def apply(self, patch: Patch | None, strength: float) -> None:
        """Have the weights that the next picture is to be made with: clean or baked, plus strength x patch."""
        if patch is None or not strength:
            self._clean_slots()
            return
        wanted = (patch.id, strength)
        if self._generation and self._generation[0] == wanted:
            return
        slots = self._slots()
        plan = inplace.plan_edit(patch, slots, self._name())
        earlier = self._generation[1] if self._generation else None
        self._generation = (wanted, inplace.bake(plan, patch, strength, slots, earlier=earlier))

    def needs_networks(self, p: Any, patch: Patch) -> bool:
        return False

    def on_networks(self, p: Any, patch: Patch | None, strength: float, extra_network_data: dict[str, Any]) -> None:
        """There are no extra networks here."""

    def on_batch(self, p: Any, patch: Patch | None, strength: float) -> None:
        self.apply(patch, strength)

    def on_sampling(self, p: Any, patch: Patch | None, strength: float) -> None:
        self.apply(patch, strength)

    def left_out(self) -> str:
        return ""

    def checks(self) -> Sequence[Check]:
        return (
            Check("diffusers", self._weights is not None, "a pipeline is open" if self._weights else "no checkpoint is open"),
        )

    # ---- inside ----

    def _open(self) -> Weights:
        if self._weights is None:
            raise NoModelError("no checkpoint is loaded yet; choose one")
        return self._weights

    def _name(self) -> str:
        return self._path.stem if self._path else "the model"

    def _slots(self) -> dict[str, inplace.Slot]:
        return {key: inplace.Slot(key, tensor) for key, tensor in self._open().tensors.items()}

    def _check_intact(self, slots: Mapping[str, inplace.Slot]) -> None:
        if self._bake and self._bake.undoing is None and self._bake.marks.compare(lambda key: (slots[key].tensor,)) != "edited":
            raise HostError("the weights were changed by something else since the bake; load the checkpoint again")

    def _clean_slots(self) -> dict[str, inplace.Slot]:
        """The live tensors without what the last picture added."""
        slots = self._slots()
        if self._generation:
            record = self._generation[1]
            self._generation = (("", 0.0), record)  # nothing wants what is there until all of it is undone
            inplace.undo(record, slots)
            self._generation = None
        return slots


class Standalone:
    """Implements `Host` over a folder with Stable-diffusion, Lora and DPO in it, as the WebUIs have them."""

    name = "standalone"
    version = __version__

    def __init__(self, models: Path, tokenizer: Path, *, device: str = "auto", allow_paths: bool = True) -> None:
        self._models, self._allow_paths = models, allow_paths
        self.live = StandaloneLive(tokenizer, device)
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def lora_dir(self) -> Path:
        return self._models / "Lora"

    @property
    def checkpoint_dir(self) -> Path:
        return self._models / "Stable-diffusion"

    @property
    def reference_dir(self) -> Path:
        return self._models / "DPO"

    @property
    def output_dir(self) -> Path:
        return self._models / "outputs"

    @property
    def cache_dir(self) -> Path:
        try:
            return user_cache("figures")
        except RuntimeError:  # this user has no home
            return self._models / "cache"

    def checkpoints(self) -> list[FileEntry]:
        return [FileEntry(path.relative_to(self.checkpoint_dir).as_posix(), path) for path in _files(self.checkpoint_dir)]

    def loras(self) -> list[FileEntry]:
        return [FileEntry(path.stem, path) for path in _files(self.lora_dir)]

    def refresh(self) -> None:
        """Nothing: the lists are read anew each time."""

    def may_use_paths(self) -> bool:
        return self._allow_paths

    @contextmanager
    def job(self, title: str, task_id: str | None = None) -> Iterator[_Job]:
        with self._lock:
            self._stop.clear()
            yield _Job(title, self._stop)

    def interrupt(self) -> None:
        self._stop.set()

    def samplers(self) -> list[str]:
        return list(SAMPLERS)

    def generate(self, request: Request, patch: Patch | None, strength: float) -> Picture:
        import diffusers

        pipeline = self.live.pipeline
        sampler = request.sampler or next(iter(SAMPLERS))
        if sampler not in SAMPLERS:
            raise SettingError(f"sampler {sampler!r} is unknown; expected one of {one_of(sampler, list(SAMPLERS))}")
        scheduler = getattr(diffusers, SAMPLERS[sampler])
        if not isinstance(pipeline.scheduler, scheduler):
            # diffusers' DDIM clips by default what Stable Diffusion's must not; the others ignore both settings
            pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
        self.live.apply(patch, strength)

        def check(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if self._stop.is_set():
                raise Cancelled("stopped; nothing was left behind")
            return tensors

        generator = torch.Generator().manual_seed(request.seed)  # on the CPU: the same noise on every device
        size = f"a picture of {request.width}x{request.height}"
        with memory_in_words(size, "make it smaller, or close other programs"), torch.inference_mode():
            found = pipeline(
                **prompts.arguments(pipeline, request.prompt, request.negative),
                num_inference_steps=request.steps,
                guidance_scale=request.cfg_scale,
                width=request.width,
                height=request.height,
                generator=generator,
                callback_on_step_end=check,
            )
        return Picture(found.images[0], self._infotext(request, sampler, patch, strength))

    def _infotext(self, request: Request, sampler: str, patch: Patch | None, strength: float) -> str:
        model = self.live.loaded()
        words = [request.prompt]
        if request.negative:
            words.append(f"Negative prompt: {request.negative}")
        entries = {
            "Steps": request.steps, "Sampler": sampler, "CFG scale": request.cfg_scale, "Seed": request.seed,
            "Size": f"{request.width}x{request.height}", "Model": model.name if model else "",
        }  # fmt: skip
        if patch:
            entries |= {"DPO offset": patch.name, "DPO strength": strength}
        return "\n".join([*words, ", ".join(f"{name}: {value}" for name, value in entries.items())])

    def check_pictures(self) -> None:
        check_picture_folder()

    def abort(self, p: Any, message: str) -> None:
        raise HostError(message)

    def self_test(self) -> Sequence[Check]:
        return (*self.live.checks(), pictures_check(self))

    def api_auth(self) -> Mapping[str, str]:
        return {}


class _Job:
    """A job without a bar of the host's: the page shows `jobs`."""

    def __init__(self, title: str, stop: threading.Event) -> None:
        self._title, self._stop, self._began = title, stop, time.monotonic()

    def progress(self, done: int, total: int, key: str) -> None:
        self.check()

    def cells(self, count: int) -> None:
        self.check()

    def check(self) -> None:
        if self._stop.is_set():
            raise Cancelled(f"{self._title}: stopped; nothing was left behind")


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
