"""What the library wants of a WebUI, in its own words. A1111, the Forge family and the fakes of the tests implement it.

A `Host` is what WebUIs have in common (a1111_family.py); its `LiveModel` what tells them apart (a1111/, forge/, standalone.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lib_dpo.offsets.patch import Patch
from lib_dpo.progress import Progress

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class FileEntry:
    """A file in one of the host's lists: the name that people and the API use for it, and where it lies."""

    name: str
    path: Path


@dataclass(frozen=True)
class LoadedModel:
    """The checkpoint that the host has loaded. `token` changes whenever its weights are swapped for others."""

    name: str
    path: Path
    storage: str  # dtype of the UNet's weights: "float16", "float8_e4m3fn", "nf4", "gguf", ...
    token: str
    online: bool = False  # offsets are added in every step, for the stored numbers are too coarse to take them up


@dataclass(frozen=True)
class Baked:
    """An offset that is in the live weights."""

    patch_id: str
    offset: str
    strength: float
    blocks: str
    rank: int | None
    tensors: int  # that hold other values than without it; of a patched model, those whose patch is not all 0
    not_applied: tuple[str, ...]  # keys of the offset that this host or model has no place for
    bytes_kept: int  # memory that undo keeps occupied
    online: bool = False  # added in every forward pass, because the stored weights are quantised
    file: Path | None = None  # of the offset
    twins: tuple[str, ...] = ()  # keys of the offset that say again what others say: they count once

    def as_json(self) -> dict[str, Any]:
        return {
            "offset": self.offset,
            "strength": self.strength,
            "blocks": self.blocks,
            "rank": self.rank,
            "tensors": self.tensors,
            "not_applied": list(self.not_applied),
            "twins": list(self.twins),
            "bytes_kept": self.bytes_kept,
            "online": self.online,
        }


@dataclass(frozen=True)
class Check:
    """One line of `self_test`: a hook or version, whether it was found, and what is lost without it."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True)
class Request:
    """One picture to make with the host's own pipeline."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    cfg_scale: float = 7.0
    sampler: str = ""  # empty: the host's first
    width: int = 512
    height: int = 512


@dataclass(frozen=True)
class Picture:
    """What a request gave: the picture and the host's infotext."""

    image: Image
    infotext: str


class Job(Protocol):
    """One piece of long work inside the host: its lock is held, its progress bar runs."""

    def progress(self, done: int, total: int, key: str) -> None:
        """Show a share with ETA. Raises Cancelled when the user pressed Interrupt."""

    def cells(self, count: int) -> None:
        """Say how many pictures will be made; the host's sampler then moves the bar."""

    def check(self) -> None:
        """Raises Cancelled when the user pressed Interrupt."""


class LiveModel(Protocol):
    """The model in a host's memory: what is baked into it, and what one generation adds to it.

    All but the three `on_…` methods and `left_out` are called with the host's lock held, inside `Host.job`; those are called
    by the host itself during a generation, which holds the lock then.
    """

    refiner: str  # what becomes of an offset when a refiner takes over, for people; empty where it stays

    def loaded(self) -> LoadedModel | None:
        """The loaded checkpoint; never loads one. Needs no lock."""

    def chosen(self) -> Path | None:
        """The checkpoint that is chosen, where the host loads it only for the next picture; None where it is the loaded one."""

    def ready(self) -> None:
        """Load the chosen checkpoint where the host would only do so for the next picture; inside `Host.job`."""

    # ---- bake and undo ----
    def bake(self, patch: Patch, strength: float, on_progress: Progress | None = None) -> Baked:
        """Add strength x patch to the live weights, from clean ones; an earlier bake is undone first.

        Raises:
            MismatchError: other architecture or shapes. NoModelError: nothing loaded.
            HostError: quantised storage without online patches, or too little memory for undo.
            BadTensorError: NaN or Inf. The model is as before after any error.
        """

    def unbake(self, on_progress: Progress | None = None) -> bool:
        """Put the originals back, bit for bit; False when nothing is baked.

        Raises:
            HostError: somebody else changed the weights since: what to do is in the message.
        """

    def baked(self) -> Baked | None:
        """What is in the live weights now, checked against the weights themselves; forgets what a reload took away.

        Needs no lock, costs milliseconds.
        """

    def baked_next(self) -> Baked | None:
        """What is in the weights that the next picture is drawn with: `baked` where they are loaded.

        A checkpoint that is yet to be loaded is clean, unless the host kept it in memory. Needs no lock.
        """

    def bake_bytes(self, patch: Patch) -> int:
        """Memory that baking this will keep occupied until Undo."""

    def fingerprint(self) -> Mapping[str, str]:
        """SHA-256 of the live weights, {"unet": hex, "te": hex}, without what a prompt's LoRAs merged into them."""

    def unet(self) -> torch.nn.Module:
        """The module that the host asks for predictions, the noisy images first among its arguments: to be listened to.

        Raises:
            NoModelError: nothing loaded.
        """

    def matched_keys(self, lora: Path) -> tuple[int, int]:
        """How many tensors of a LoRA file this host's own loader matches to the loaded model, and how many it has."""

    # ---- one generation: called by the always-on script with the host's `p`; patch None: nothing to apply ----
    def needs_networks(self, p: Any, patch: Patch) -> bool:
        """Whether a part of it is added in `on_networks`, which a host skips where `p.disable_extra_networks` is set."""

    def on_networks(self, p: Any, patch: Patch | None, strength: float, extra_network_data: dict[str, Any]) -> None:
        """In `after_extra_networks_activate`. May be called several times for one batch, in the hires pass too."""

    def on_batch(self, p: Any, patch: Patch | None, strength: float) -> None:
        """In `process_batch`, before the text encoder runs."""

    def on_sampling(self, p: Any, patch: Patch | None, strength: float) -> None:
        """In `process_before_every_sampling`; may be called several times before one sampling."""

    def left_out(self) -> str:
        """After a picture: that a part of the patch was not in it after all, for people; empty where all was."""

    def checks(self) -> Sequence[Check]:
        """Which of the host's hooks that this class needs were found."""


class Host(Protocol):
    """One WebUI: its files, its queue and progress bar, its pipeline, and its live model."""

    name: str  # "AUTOMATIC1111", "Forge", "reForge", "Forge Classic", "Forge Neo"
    version: str

    @property
    def live(self) -> LiveModel: ...

    # ---- files ----
    @property
    def lora_dir(self) -> Path: ...
    @property
    def checkpoint_dir(self) -> Path: ...
    @property
    def reference_dir(self) -> Path:
        """Where DPO references and offset files are looked for beside the other two (a setting; models/DPO)."""

    @property
    def output_dir(self) -> Path:
        """Where the host keeps the pictures that it makes; it need not exist yet."""

    @property
    def cache_dir(self) -> Path:
        """Where what may be lost is kept between runs, beside the host's own caches; may not be there yet."""

    def checkpoints(self) -> list[FileEntry]: ...
    def loras(self) -> list[FileEntry]: ...
    def refresh(self) -> None:
        """Make the host list its checkpoints and LoRAs again, after files were written."""

    def may_use_paths(self) -> bool:
        """Whether raw paths may be given in the place of names: a local WebUI whose user allowed it in the settings."""

    # ---- work ----
    def job(self, title: str, task_id: str | None = None) -> AbstractContextManager[Job]:
        """Take the host's lock and run its progress bar under `task_id` (the page's), or one of its own."""

    def interrupt(self) -> None:
        """Ask what runs now to stop, as the host's own Interrupt button does. Needs no lock."""

    def samplers(self) -> list[str]: ...
    def generate(self, request: Request, patch: Patch | None, strength: float) -> Picture:
        """Make one picture with the host's own pipeline, the patch applied as the always-on script would; inside a job."""

    def check_pictures(self) -> None:
        """Make ready to show pictures on the page. Raises HostError: why none could be shown, and what to do."""

    def abort(self, p: Any, message: str) -> None:
        """Stop a generation and show why: an exception in a script's hook would only be printed."""

    # ---- the rest ----
    def self_test(self) -> Sequence[Check]: ...
    def api_auth(self) -> Mapping[str, str]:
        """User -> password of --api-auth; empty without it."""


@dataclass
class Silent:
    """A `Job` without a host: for tests and the command line."""

    cancelled: bool = field(default=False)

    def progress(self, done: int, total: int, key: str) -> None:
        self.check()

    def cells(self, count: int) -> None:
        self.check()

    def check(self) -> None:
        from lib_dpo.errors import Cancelled

        if self.cancelled:
            raise Cancelled("stopped")
