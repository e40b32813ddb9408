"""What AUTOMATIC1111's WebUI and the Forge family have in common: lists of files, queue, progress bar, pipeline, options.

Names are those of AUTOMATIC1111 1.10; the forks kept them. Imported inside a running WebUI only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from modules import call_queue, paths, processing, progress, scripts, sd_models, sd_samplers, shared

from lib_dpo.errors import Cancelled, HostError
from lib_dpo.hosts.base import Check, FileEntry, LiveModel, Picture, Request
from lib_dpo.hosts.picture_folder import check_picture_folder, pictures_check
from lib_dpo.offsets.patch import Patch

REFERENCE_DIR, ALLOW_PATHS = "dpo_reference_dir", "dpo_allow_paths"  # our entries in the host's settings
_PARTS = 1000  # steps of the host's bar for one job


class WebUI:
    """The host that this process is. `live` is what tells A1111 and the Forge family apart."""

    def __init__(self, name: str, version: str, live: LiveModel) -> None:
        self.name, self.version, self.live = name, version, live

    # ---- files ----

    @property
    def lora_dir(self) -> Path:
        return _folder(("lora_dir", "lora_dirs"), Path(paths.models_path) / "Lora")

    @property
    def checkpoint_dir(self) -> Path:
        return _folder(("ckpt_dir", "ckpt_dirs"), Path(sd_models.model_path))

    @property
    def reference_dir(self) -> Path:
        chosen = str(getattr(shared.opts, REFERENCE_DIR, "") or "").strip()
        return Path(chosen) if chosen else Path(paths.models_path) / "DPO"

    @property
    def output_dir(self) -> Path:
        from modules import paths_internal

        return Path(getattr(paths_internal, "default_output_dir", None) or Path(paths_internal.data_path) / "outputs")

    @property
    def cache_dir(self) -> Path:
        folder = os.environ.get("SD_WEBUI_CACHE_DIR") or Path(paths.data_path) / "cache"  # as modules/cache.py has it
        return Path(folder) / "dpo"

    def checkpoints(self) -> list[FileEntry]:
        entries = [FileEntry(info.name, Path(info.filename)) for info in list(sd_models.checkpoints_list.values())]
        return sorted(entries, key=lambda entry: entry.name.casefold())

    def loras(self) -> list[FileEntry]:
        networks = sys.modules.get("networks")
        found = dict(getattr(networks, "available_networks", {}))
        if not found:  # the built-in extension is switched off, or has not listed anything yet
            files = self.lora_dir.rglob("*.safetensors") if self.lora_dir.is_dir() else ()
            return sorted((FileEntry(file.stem, file) for file in files), key=lambda entry: entry.name.casefold())
        entries = [FileEntry(name, Path(network.filename)) for name, network in found.items()]
        return sorted(entries, key=lambda entry: entry.name.casefold())

    def refresh(self) -> None:
        sd_models.list_models()
        networks = sys.modules.get("networks")
        if networks is not None:
            networks.list_available_networks()
            forget = getattr(getattr(networks, "load_lora_state_dict", None), "cache_clear", None)
            if forget:  # Forge keeps the last files by name
                forget()

    def may_use_paths(self) -> bool:
        options = shared.cmd_opts
        closed = getattr(options, "webui_is_non_local", True) or getattr(options, "hide_ui_dir_config", False)
        return bool(getattr(shared.opts, ALLOW_PATHS, False)) and not closed

    # ---- work ----

    @contextmanager
    def job(self, title: str, task_id: str | None = None) -> Iterator[_Job]:
        task = task_id or progress.create_task_id("dpo")
        progress.add_task_to_queue(task)
        try:
            with call_queue.queue_lock:
                shared.state.begin(job=task)
                progress.start_task(task)
                try:
                    yield _Job(title)
                finally:
                    progress.finish_task(task)
                    shared.state.end()
                    shared.total_tqdm.clear()  # an interrupted grid leaves the console's total half full
                    shared.state.interrupted = shared.state.skipped = shared.state.stopping_generation = False
        finally:
            progress.pending_tasks.pop(task, None)

    def interrupt(self) -> None:
        shared.state.interrupt()

    def samplers(self) -> list[str]:
        return [sampler.name for sampler in sd_samplers.samplers]

    def generate(self, request: Request, patch: Patch | None, strength: float) -> Picture:
        chosen = self.live.chosen()
        if chosen is not None:  # the list of checkpoints on the page can be used during a job, and would count at once
            raise HostError(
                f"the checkpoint {chosen.stem} was chosen while pictures were being made with another one; start again, or "
                "choose the first one again before you do"
            )
        p = processing.StableDiffusionProcessingTxt2Img(
            sd_model=shared.sd_model,
            prompt=request.prompt,
            negative_prompt=request.negative,
            seed=request.seed,
            steps=request.steps,
            cfg_scale=request.cfg_scale,
            sampler_name=request.sampler or self.samplers()[0],
            width=request.width,
            height=request.height,
            do_not_save_samples=True,
            do_not_save_grid=True,
        )
        with closing(p):
            apply = _Apply(self.live, patch, strength)
            p.scripts = _only(apply)
            p.script_args = ()
            processed = processing.process_images(p)
        if apply.error:
            raise apply.error
        state = shared.state  # a skipped sampler returns what it has, and only the next picture clears the flag
        if state.interrupted or state.skipped or state.stopping_generation:
            raise Cancelled("stopped by Interrupt; nothing was left behind")
        if not processed.images:
            raise HostError(f"{self.name} made no picture: {processed.comments or 'see its console'}")
        if patch is not None and strength and (left_out := self.live.left_out()):
            raise HostError(f"{patch.name}: {left_out}")
        return Picture(processed.images[0], processed.infotexts[0] if processed.infotexts else "")

    def check_pictures(self) -> None:
        check_picture_folder(str(getattr(shared.opts, "temp_dir", "") or ""), "Settings, Directory for temporary images")

    def abort(self, p: Any, message: str) -> None:
        p.comment(message)
        shared.state.interrupted = True

    # ---- the rest ----

    def self_test(self) -> Sequence[Check]:
        found = xyz_module() is not None
        text = "the X/Y/Z plot script was found" if found else "the X/Y/Z plot script was not found: its [DPO] axes are missing"
        return (*self.live.checks(), Check("X/Y/Z plot", found, text), pictures_check(self))

    def api_auth(self) -> Mapping[str, str]:
        pairs = (getattr(shared.cmd_opts, "api_auth", None) or "").split(",")
        return {user.strip(): password for user, colon, password in (pair.partition(":") for pair in pairs) if colon}


class _Job:
    """The host's bar and its Interrupt button; see `base.Job`."""

    def __init__(self, title: str) -> None:
        self._title = title
        shared.state.textinfo = f"{title}…"

    def progress(self, done: int, total: int, key: str) -> None:
        self.check()
        share = done / total if total else 1.0
        state = shared.state
        state.job_count, state.job_no, state.sampling_steps, state.sampling_step = 1, 0, _PARTS, int(share * _PARTS)
        state.textinfo = self._title  # the host adds share and ETA

    def cells(self, count: int) -> None:
        shared.state.job_count = count

    def check(self) -> None:
        state = shared.state
        if state.interrupted or state.skipped or state.stopping_generation:
            raise Cancelled(f"{self._title}: stopped by Interrupt; nothing was left behind")


class _Apply(scripts.Script):  # type: ignore[misc]  # the host has no types
    """The hooks of one generation of ours, as the always-on script has them for everybody's."""

    filename = __file__
    alwayson = True
    args_from = args_to = 0

    def __init__(self, live: LiveModel, patch: Patch | None, strength: float) -> None:
        self._live, self._patch, self._strength = live, patch, strength
        self.error: Exception | None = None

    def title(self) -> str:
        return "DPO offset, compare"

    def after_extra_networks_activate(self, p: Any, *args: Any, **kwargs: Any) -> None:
        with self._stopping():
            self._live.on_networks(p, self._patch, self._strength, kwargs["extra_network_data"])

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        with self._stopping():
            self._live.on_batch(p, self._patch, self._strength)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        with self._stopping():
            self._live.on_sampling(p, self._patch, self._strength)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """No picture instead of one without the offset: the host would print an exception and go on without us."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  raised when the host is done
            self.error = self.error or error
            shared.state.interrupted = True


def _only(script: scripts.Script) -> scripts.ScriptRunner:
    """A runner with one script, so that other extensions do not change what is compared."""
    runner = scripts.ScriptRunner()
    runner.scripts = runner.alwayson_scripts = [script]
    return runner


def host_version() -> str:
    """What the host calls its version in infotexts."""
    return str(processing.program_version() or "unknown")


def xyz_module() -> ModuleType | None:
    """The X/Y/Z plot script as the host has loaded it: importing it again would give another, dead copy."""
    for data in scripts.scripts_data:
        if Path(data.path).name in ("xyz_grid.py", "xy_grid.py") and hasattr(data.module, "axis_options"):
            module: ModuleType = data.module
            return module
    return None


def _folder(options: tuple[str, ...], default: Path) -> Path:
    for name in options:
        chosen = getattr(shared.cmd_opts, name, None)
        if isinstance(chosen, (list, tuple)):  # Forge Neo takes several; files are written to the first
            chosen = next(iter(chosen), None)
        if chosen:
            return Path(chosen)
    return default
