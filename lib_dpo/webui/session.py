"""What people do in a WebUI, in one place for the tab, the API and the always-on script: the only stateful object.

Methods that take a `job` run inside `Jobs.run` or `Jobs.start`, which hold the host's lock.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lib_dpo.errors import DpoError, MismatchError, NoModelError, SettingError
from lib_dpo.families.arch import ARCHITECTURES, Architecture
from lib_dpo.families.blocks import parse_blocks
from lib_dpo.families.model import Model, open_model
from lib_dpo.files.atomic import check_output
from lib_dpo.files.checkpoint import PICKLES, sha256_in_background
from lib_dpo.hosts.base import Baked, Host, Job, LoadedModel, Request
from lib_dpo.offsets.offset import Pair, open_pair
from lib_dpo.offsets.patch import Patch, check_changes, open_patch
from lib_dpo.offsets.recipe import Ingredient, baked_in
from lib_dpo.settings import BUNDLED_BASE, BUNDLED_CFG, ExtractSettings, check, one_of, strength_to_bake
from lib_dpo.webui.blind import Blind
from lib_dpo.webui.figures import Key, KnownFigures, known_key
from lib_dpo.webui.jobs import Jobs
from lib_dpo.webui.library import Library
from lib_dpo.webui.references.picker import References
from lib_dpo.webui.results import Analysis, Extracted, Status

if TYPE_CHECKING:  # the maths is imported when it is needed: a WebUI starts without it
    from lib_dpo.operations.bake import BakeReport
    from lib_dpo.operations.compat import CompatReport
    from lib_dpo.operations.inspect import Inspection
    from lib_dpo.operations.write_offset import OffsetReport

logger = logging.getLogger(__name__)

_COMPATS_KEPT = 8  # verdicts on loaded models
_PATCHES_KEPT = 4  # open offsets: their files are mapped, which costs no memory of its own


@dataclass(frozen=True)
class _File:
    """What the header of a checkpoint says."""

    architecture: Architecture | None
    problem: str = ""  # why it is none of ours
    baked_in: tuple[Ingredient, ...] = ()


class Session:
    """One host and what was done with it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.library = Library(host)
        self.jobs = Jobs(host)
        self.blind = Blind(host, self.jobs, self.to_add, self.request)
        self.references = References(host, self.jobs, self.library)
        self.figures = KnownFigures(lambda: host.cache_dir)
        self._compats: dict[tuple[Any, ...], CompatReport] = {}
        self._patches: OrderedDict[tuple[Any, ...], Patch] = OrderedDict()
        self._files: dict[tuple[str, int], _File] = {}
        self._lock = threading.Lock()
        self.pace: float | None = None  # seconds per pixel and step of the pictures that were compared last

    @property
    def in_webui(self) -> bool:
        """Whether this is a WebUI, where people generate with prompts and scripts; else the tab alone."""
        return self.host.name != "standalone"

    # ---- what is there ----

    def status(self) -> Status:
        """Cheap enough to ask for all the time."""
        live = self.host.live
        model, chosen = live.loaded(), live.chosen()
        later = chosen.stem if chosen else ""
        if model is None:
            return Status(None, None, None, chosen=later)
        file = self._file(model.path)
        if file.problem:
            return Status(model, None, None, file.problem, later)
        return Status(model, file.architecture, live.baked(), chosen=later, in_file=file.baked_in)

    def loaded(self) -> LoadedModel:
        """The loaded checkpoint. Raises NoModelError."""
        model = self.host.live.loaded()
        if model is None:
            raise NoModelError("no checkpoint is loaded yet; choose one in the WebUI, make one picture, and try again")
        return model

    def patch(self, name: str, *, blocks: str = "", rank: int | None = None, bound: bool = False) -> Patch:
        """An offset by name, ready for the loaded model; kept open for the next time.

        Args:
            bound: as in `open_patch`, for the loaded model's file.

        Raises:
            NotFoundError: not in the lists. MismatchError: of another architecture than the loaded model.
            SettingError: blocks or a rank that make no sense. BadFileError: damaged.
        """
        path, model = self.library.offset(name), self.loaded()
        file = self._file(model.path)
        if file.architecture is None:
            raise MismatchError(file.problem)
        expected = file.architecture
        weights = parse_blocks(blocks.replace(";", ","))
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size, weights, rank, bound, expected.name)
        with self._lock:
            patch = self._patches.pop(key, None) or open_patch(path, expected, blocks=weights, rank=rank, bound=bound)
            if patch.architecture is not expected:
                raise MismatchError(
                    f"{name} is an offset for {patch.architecture.title} but {model.name} is {expected.title}; choose an "
                    "offset of the model's own family"
                )
            self._patches[key] = patch
            while len(self._patches) > _PATCHES_KEPT:
                self._patches.popitem(last=False)
        return patch

    def inspect(self, name: str) -> Inspection:
        """What a file of the lists is. Raises NotFoundError, BadFileError."""
        from lib_dpo.operations.inspect import inspect

        return inspect(self.library.any(name))

    # ---- looking before writing ----

    def analyse(self, job: Job, *, base: str, reference: str, spectra: bool = False) -> Analysis:
        """The verdict on a pair, and on the loaded model as a target where it is another one than the base.

        Args:
            spectra: what files of each size keep, too; remembered, so that a second look takes no time.
        """
        from lib_dpo.operations.diff import diff, report_on

        self.host.live.ready()
        with self._pair(base, reference) as pair:
            if not spectra:
                report = diff(pair, on_progress=job.progress)
                return Analysis(report, self._compat_of_loaded(job, pair, None), loaded=self._loaded_of(pair))
            key, figures, not_kept = self.figures.measure(pair, job.progress)
            compat = self._compat_of_loaded(job, pair, key)
            return Analysis(report_on(pair, figures), compat, key, not_kept, self._loaded_of(pair))

    def _loaded_of(self, pair: Pair) -> Literal["", "base", "reference"]:
        """Which of a pair is loaded."""
        model = self.host.live.loaded()
        path = model.path.resolve() if model else None
        return "base" if path == pair.base.path.resolve() else "reference" if path == pair.tuned.path.resolve() else ""

    def _compat_of_loaded(self, job: Job, pair: Pair, key: Key | None) -> CompatReport | None:
        """Whether a pair fits the loaded model; None where that is one of the two, or of another architecture.

        Args:
            key: of the pair, under which the answer is remembered as long as the loaded file stays as it is.
        """
        from lib_dpo.operations.compat import compat

        model = self.host.live.loaded()
        if model is None or model.path.resolve() in (pair.base.path.resolve(), pair.tuned.path.resolve()):
            return None
        if self._file(model.path).architecture is not pair.architecture:
            return None
        stat = model.path.stat()
        place = (key, pair.names, str(model.path), stat.st_mtime_ns, stat.st_size)
        if key and place in self._compats:
            return self._compats[place]
        with open_model(model.path) as target:
            found = compat(target, pair, on_progress=job.progress)
        self._compats = {**dict(list(self._compats.items())[1 - _COMPATS_KEPT :]), place: found}
        return found

    def pair_key(self, base: str, reference: str) -> Key | None:
        """By which the figures of a pair are known, where that can be told without reading the files.

        Raises:
            NotFoundError, NoModelError, BadFileError: one of the two cannot be opened.
        """
        return known_key(self.library.any(base) if base else self.loaded().path, self.library.reference(reference))

    def compat(self, job: Job, *, target: str, base: str, reference: str) -> CompatReport:
        """Whether the offset of a pair fits a checkpoint (empty: the loaded one)."""
        from lib_dpo.operations.compat import compat

        self.host.live.ready()
        with self._pair(base, reference) as pair, self._open_checkpoint(target) as model:
            self._check_base(target, base)
            return compat(model, pair, on_progress=job.progress)

    # ---- writing files ----

    def extract(
        self, job: Job, *, base: str, reference: str, name: str, settings: ExtractSettings, overwrite: bool = False
    ) -> Extracted:
        """Write a LoRA into the LoRA folder and let the host list it."""
        from lib_dpo.operations.extract import extract

        self.host.live.ready()
        output = self.library.new_lora(name)
        with self._pair(base, reference) as pair:
            source = self._checked(output, pair, overwrite)
            report = extract(pair, output, settings, overwrite=overwrite, source=source, on_progress=job.progress)
        return Extracted(output.stem, report, self._listed(output, report.architecture))

    def write_offset(
        self, job: Job, *, base: str, reference: str, name: str, precision: str = "fp32", overwrite: bool = False
    ) -> OffsetReport:
        """Write the dense offset file into the reference folder."""
        from lib_dpo.operations.write_offset import write_offset

        self.host.live.ready()
        output = self.library.new_offset(name)
        with self._pair(base, reference) as pair:
            source = self._checked(output, pair, overwrite)
            return write_offset(pair, output, precision=precision, overwrite=overwrite, source=source, on_progress=job.progress)

    def save(
        self, job: Job, *, name: str, offset: str, strength: float, blocks: str = "", rank: int | None = None,
        overwrite: bool = False,
    ) -> BakeReport:  # fmt: skip
        """Write the loaded checkpoint's file plus strength x offset as a new checkpoint: never from the live weights."""
        from lib_dpo.operations.bake import bake

        strength = strength_to_bake(strength)
        self.host.live.ready()
        output, patch = self.library.new_checkpoint(name), self.to_add(offset, blocks, rank, bound=True)
        with open_model(self.loaded().path) as target:
            check_output(output, overwrite=overwrite, inputs=(*target.checkpoint.files, *patch.checkpoint.files))
            hashes = [sha256_in_background(target.checkpoint), sha256_in_background(patch.checkpoint)]
            report = bake(
                target,
                patch.offset,
                output,
                strength=strength,
                blocks=patch.blocks,
                rank=patch.rank,
                overwrite=overwrite,
                hashes=lambda: (hashes[0](), hashes[1]()),
                on_progress=job.progress,
            )
        self.host.refresh()
        return report

    # ---- what pictures need ----

    @property
    def cfg_scale(self) -> float:
        """The CFG scale to begin with."""
        loaded = self.host.live.loaded()
        return BUNDLED_CFG if loaded and loaded.path.name == BUNDLED_BASE else Request("").cfg_scale

    def to_add(self, offset: str, blocks: str, rank: int | None, *, bound: bool = False) -> Patch:
        """As `patch`, of which the blocks leave something."""
        patch = self.patch(offset, blocks=blocks, rank=rank, bound=bound)
        check_changes(patch.offset, patch.blocks)
        return patch

    def survives(self, patch: Patch, strength: float) -> tuple[float | None, str]:
        """The share of strength x offset that the loaded model's numbers can hold, and their format.

        None where nothing is rounded, as in quantised models, to which it is added in every step, or nothing would change;
        and where the model's file is a pickle, all of which would have to be loaded.

        Raises:
            NoModelError, BadFileError, BadTensorError.
        """
        import torch

        from lib_dpo.operations.outlook.survival import survival

        model = self.loaded()
        dtype = getattr(torch, model.storage, None)
        if model.online or not isinstance(dtype, torch.dtype) or model.path.suffix.lower() in PICKLES:
            return None, model.storage
        with open_model(model.path) as target:
            return survival(target, patch, strength, dtype), model.storage

    def picture_size(self, width: int, height: int) -> tuple[int, int]:
        """Of the pictures to make; what the loaded model was made for in the place of 0."""
        from lib_dpo.hosts.pipeline import made_for

        if width and height:
            return width, height
        with open_model(self.loaded().path) as model:
            own = made_for(model)
        return width or own, height or own

    def request(
        self, negative: str = "", *, steps: int = 20, cfg_scale: float = 7.0, sampler: str = "", width: int = 0, height: int = 0
    ) -> Request:
        """Checked settings of the pictures to make, without prompt and seed. Raises SettingError, NoModelError."""
        width, height = self.picture_size(width, height)
        for field, value in (("steps", steps), ("cfg", cfg_scale), ("side", width), ("side", height)):
            check(field, value)
        if width % 8 or height % 8:
            raise SettingError(f"pictures of {width}x{height} cannot be made; both numbers must be multiples of 8")
        if sampler and sampler not in self.host.samplers():
            raise SettingError(f"sampler {sampler!r} is unknown; expected one of {one_of(sampler, self.host.samplers())}")
        return Request("", sendable(negative), 0, steps, cfg_scale, sampler, width, height)

    # ---- the live model ----

    def bake(self, job: Job, *, offset: str, strength: float, blocks: str = "", rank: int | None = None) -> Baked:
        """Add strength x offset to the loaded model until `unbake`.

        Raises:
            SettingError, NothingToDoError: a strength or blocks that make no sense or change nothing.
        """
        strength = strength_to_bake(strength)
        self.host.live.ready()
        return self.host.live.bake(self.to_add(offset, blocks, rank), strength, job.progress)

    def unbake(self, job: Job) -> bool:
        """Put the loaded model, or the one that draws next, back as it was, bit for bit; False where nothing was baked."""
        live = self.host.live
        if live.baked() is None and live.baked_next() is not None:  # in a model that was kept while a refiner drew
            live.ready()
        return live.unbake(job.progress)

    # ---- helpers ----

    @contextmanager
    def _pair(self, base: str, reference: str) -> Iterator[Pair]:
        tuned = self.library.reference(reference)
        with self._open_checkpoint(base) as model, open_model(tuned) as other:
            yield open_pair(model, other)

    @contextmanager
    def _open_checkpoint(self, name: str) -> Iterator[Model]:
        """The file of a checkpoint; without a name that of the loaded one: live weights may carry a prompt's LoRAs."""
        with open_model(self.library.any(name) if name else self.loaded().path) as model:
            yield model

    def _check_base(self, target: str, base: str) -> None:
        """Refuse to hold the loaded checkpoint against itself because no base was chosen. Raises SettingError."""
        if base:
            return
        loaded = self.loaded()
        if not target or self.library.any(target).resolve() == loaded.path.resolve():
            raise SettingError(
                f"{loaded.path.stem} is the model and, as long as none is chosen, the base of the pair too; choose as the base "
                "the checkpoint that DPO started from, such as SD 1.5 or SDXL 1.0"
            )

    def _checked(self, output: Path, pair: Pair, overwrite: bool) -> Any:
        """Refuse the output early, let go of it where it is open, and start hashing beside the work."""
        check_output(output, overwrite=overwrite, inputs=(*pair.base.checkpoint.files, *pair.tuned.checkpoint.files))
        with self._lock:  # Windows does not replace a file that is mapped
            for key in [key for key, patch in self._patches.items() if output in patch.checkpoint.files]:
                self._patches.pop(key).close()
        waiting = {
            "dpo.base_sha256": sha256_in_background(pair.base.checkpoint),
            "dpo.tuned_sha256": sha256_in_background(pair.tuned.checkpoint),
        }
        return lambda: {name: wait() for name, wait in waiting.items()}

    def _file(self, path: Path) -> _File:
        """What the header of a checkpoint says; remembered until the file changes."""
        try:
            key = (str(path), path.stat().st_mtime_ns)
            if key not in self._files:
                with open_model(path) as model:
                    self._files[key] = _File(model.architecture, baked_in=baked_in(model.checkpoint.metadata))
            return self._files[key]
        except DpoError as error:
            self._files[key] = _File(None, self.library.names_only(str(error)))
            return self._files[key]
        except OSError as error:
            return _File(None, f"{path.name}: cannot be read ({error.strerror}); it may have been moved: refresh the list")

    def _listed(self, output: Path, architecture: str) -> tuple[int, int] | None:
        """Let the host list a new LoRA; how much of it its loader knows. The file stands, whatever the host says."""
        try:
            self.host.refresh()
            return self.host.live.matched_keys(output) if self._fits_loaded(architecture) else None
        except Exception:
            logger.exception("%s was written, but the host did not take it up", output)
            return None

    def _fits_loaded(self, architecture: str) -> bool:
        model = self.host.live.loaded()
        return model is not None and self._file(model.path).architecture is ARCHITECTURES[architecture]


def sendable(text: str) -> str:
    """Text without lone surrogates, which neither PNG nor JSON can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
