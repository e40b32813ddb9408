"""A patch read for the model that a Forge holds: whether it fits, and in which form the host is given it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib_dpo.errors import MismatchError, SettingError
from lib_dpo.families.arch import recognise
from lib_dpo.hosts.forge.modules import lora_module
from lib_dpo.hosts.forge.patchers import clip_parameters, parameters_of
from lib_dpo.hosts.forge.patches import HostModel, HostPatches, host_patches, quantised, shape_of
from lib_dpo.offsets.patch import Patch
from lib_dpo.progress import Steps


def read_patch(engine: Any, patch: Patch, steps: Steps, *, on_demand: bool = False) -> HostPatches:
    """The patch in the host's form; see `host_patches`."""
    _check_fits(engine, patch)
    original = engine.forge_objects_original
    model = HostModel(name_of(engine), parameters_of(original.unet), clip_parameters(original.clip))
    return host_patches(patch, model, lora_module().load_lora, steps, on_demand=on_demand)


def _check_fits(engine: Any, patch: Patch) -> None:
    """Raises MismatchError for another architecture, SettingError where nothing would change."""
    shapes = {key: shape_of(parameter) for key, parameter in parameters_of(engine.forge_objects_original.unet).items()}
    found = recognise(shapes, name=name_of(engine)).architecture
    if found is not patch.architecture:
        raise MismatchError(
            f"{patch.name} is an offset for {patch.architecture.title} but {name_of(engine)} is {found.title}; they must be of "
            "one architecture"
        )
    if not patch.changed_keys():
        raise SettingError(f"{patch.name} changes nothing with these block weights ({patch.blocks}); set some above 0")


def is_online(engine: Any) -> bool:
    """Whether the UNet is quantised, so that the host adds patches in each step of a picture, or this code refuses."""
    return any(quantised(parameter) for parameter in parameters_of(engine.forge_objects_original.unet).values())


def name_of(engine: Any) -> str:
    """What people call its checkpoint."""
    return Path(engine.sd_checkpoint_info.filename).stem
