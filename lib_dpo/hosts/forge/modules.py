"""Where each fork of Forge keeps what we need of it, and which fork this is: asked of the live modules, never of folders.

Nothing of a host is imported before a function is called, so that this file can be imported on every fork, and without any.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lib_dpo.errors import HostError, NoModelError
from lib_dpo.hosts.chosen import chosen_in_settings

# Forge and Neo; Classic and reForge; Neo since it vendors ComfyUI
_LORA = ("backend.patcher.lora", "ldm_patched.modules.lora", "comfy.lora")
_MEMORY = ("backend.memory_management", "ldm_patched.modules.model_management", "comfy.model_management")


def optional(name: str) -> ModuleType | None:
    """A module of the host, or None where this host has none of that name."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise


def lora_module() -> ModuleType:
    """The module with `load_lora` and the key maps. Raises HostError."""
    return _first(_LORA, "load_lora")


def memory_module() -> ModuleType:
    """The module with `load_models_gpu`. Raises HostError."""
    return _first(_MEMORY, "load_models_gpu")


def _first(names: tuple[str, ...], function: str) -> ModuleType:
    for name in names:
        module = optional(name)
        if module is not None and hasattr(module, function):
            return module
    raise HostError(
        f"this WebUI has no {function} in {' or '.join(names)}; update the extension, or use another version of Forge"
    )


def is_forge() -> bool:
    """Whether this process is Forge or a fork of it."""
    return optional("modules_forge") is not None


def fork_name() -> tuple[str, str]:
    """The fork's name as in `Host.name`, and what it says of its version."""
    told = optional("modules_forge.forge_version")
    version = str(getattr(told, "release", None) or getattr(told, "version", "of unknown version"))  # Neo's version is "neo"
    base = optional("backend.patcher.base")
    if base is not None:
        patches = inspect.signature(base.ModelPatcher.add_patches).parameters["patches"]
        return "Forge" if patches.kind is patches.KEYWORD_ONLY else "Forge Neo", version
    if optional("ldm_patched.modules.weight_adapter") is not None:
        return "reForge", version
    return ("Forge Classic" if optional("ldm_patched") is not None else "Forge Neo"), version


def live_engine() -> Any | None:
    """The model object with `forge_objects_original`; None before the first load. Never loads: `shared.sd_model` may."""
    model = import_module("modules.sd_models").model_data.sd_model
    return model if getattr(model, "forge_objects_original", None) is not None else None


def kept_engines() -> list[Any] | None:
    """The model objects that reForge and Classic have loaded; None on Forge and Neo, which have one and let go of others."""
    loaded = getattr(import_module("modules.sd_models").model_data, "loaded_sd_models", None)
    return None if loaded is None else list(loaded)


def loaded_engine() -> Any:
    """The same. Raises NoModelError before the first load."""
    engine = live_engine()
    if engine is None:
        raise NoModelError("no checkpoint is loaded yet; choose one and make a picture, then try again")
    return engine


def chosen_engine() -> Any:
    """The model object of the checkpoint that is chosen now: Forge and Neo load that one only for the next picture.

    Raises:
        NoModelError: nothing was loaded yet.
    """
    sd_models = import_module("modules.sd_models")
    engine = loaded_engine()
    if getattr(sd_models.model_data, "forge_loading_parameters", None):
        del engine  # two models do not fit
        sd_models.forge_model_reload()  # returns at once where the chosen one is loaded
    return loaded_engine()


def chosen_file() -> Path | None:
    """The checkpoint that is loaded for the next picture; None where it is loaded."""
    model_data = import_module("modules.sd_models").model_data
    if not hasattr(model_data, "forge_loading_parameters"):  # reForge and Classic
        return chosen_in_settings(live_engine())
    chosen = (getattr(model_data, "forge_loading_parameters", None) or {}).get("checkpoint_info")
    engine = live_engine()
    if chosen is None or (engine is not None and engine.sd_checkpoint_info.filename == chosen.filename):
        return None
    return Path(chosen.filename)


def load_chosen() -> None:
    """Load the chosen checkpoint now, as the next picture would."""
    sd_models = import_module("modules.sd_models")
    if hasattr(sd_models.model_data, "forge_loading_parameters"):
        sd_models.forge_model_reload()
    else:
        sd_models.reload_model_weights()


def cond_caches(p: Any = None) -> list[list[Any]]:
    """The host's lists of conditionings made from prompts: those of all generations, and of `p`."""
    processing = import_module("modules.processing")
    holders = [processing.StableDiffusionProcessing, processing.StableDiffusionProcessingTxt2Img, p]
    names = ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return [cache for cache in found if isinstance(cache, list)]


def clear_conds(p: Any = None) -> None:
    """Make the text encoder run again: the caches' keys know neither bakes nor patches (no fork's)."""
    for cache in cond_caches(p):
        cache[:] = [None] * len(cache)
