"""Which of the hooks that we need a fork of Forge has, in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from lib_dpo.errors import HostError
from lib_dpo.hosts.base import Check
from lib_dpo.hosts.forge.modules import cond_caches, fork_name, live_engine, lora_module, memory_module, optional


def checks() -> list[Check]:
    """One line for each hook: whether it was found, and what is lost without it."""
    name, version = fork_name()
    rows = [Check("WebUI", True, f"{name} {version}")]
    rows += [
        Check(hook, _found(test), "found" if _found(test) else f"not found: {lost}")
        for hook, test, lost in (
            ("sampling hook", _has_sampling_hook, "offsets cannot be added to a generation; baking works"),
            ("LoRA loader", lambda: bool(lora_module()), "neither baking nor adding a LoRA works; saving files works"),
            ("model loader", lambda: bool(memory_module()), "baking and Undo do not work; saving files works"),
            ("conditioning cache", lambda: bool(cond_caches()), "a text encoder part may be applied late; the UNet's is not"),
        )
    ]
    engine = live_engine()
    if engine is None:
        return [*rows, Check("patchers", True, "no checkpoint is loaded yet; looked at after the first picture")]
    accepts = inspect.signature(engine.forge_objects_original.unet.add_patches).parameters
    online = "online_mode" in accepts
    kept = hasattr(engine, "current_lora_hash")
    return [
        *rows,
        Check("patchers", {"patches", "strength_patch"} <= accepts.keys(), f"add_patches({', '.join(accepts)})"),
        Check("LoRA list", kept, "found" if kept else "not found: a bake starts with the next change of LoRAs in the prompt"),
        Check("quantised models", True, "patched while generating" if online else "refused by this WebUI: load them as fp16"),
    ]


def _found(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except HostError:
        return False


def _has_sampling_hook() -> bool:
    scripts = optional("modules.scripts")
    return hasattr(getattr(scripts, "ScriptRunner", None), "process_before_every_sampling")
