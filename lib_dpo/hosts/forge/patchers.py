"""Forge's patchers: adding patches, merging them now, hashing what comes of it; by whatever names and signatures a fork has."""

from __future__ import annotations

import inspect
import re
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError, HostError
from lib_dpo.hosts.checksums import all_finite, digest
from lib_dpo.hosts.forge.modules import fork_name, memory_module
from lib_dpo.hosts.forge.patches import HostPatches, quantised, stored_dtype
from lib_dpo.progress import Steps

PARTS = ("unet", "te")  # of a model: what can be baked into
_UNREAD = re.compile(r"clip_l\.(transformer\.)?text_projection")


@dataclass(frozen=True)
class Patchers:
    """The two patchers that the host starts each generation from. Equal when they are the same objects."""

    unet: Any
    clip: Any  # with its tokenizer around the patcher; None where a model comes without


def patcher_of(holder: Any) -> Any:
    """The ModelPatcher: the UNet's is one itself, the text encoder's lies in its CLIP object."""
    return getattr(holder, "patcher", holder)


def parameters_of(patcher: Any) -> dict[str, Tensor]:
    """The parameters that a patcher patches, by the host's names: as they are now, merged or not."""
    return dict(patcher.model.named_parameters())


def clip_parameters(clip: Any) -> dict[str, Tensor]:
    """The same of the text encoders."""
    return {} if clip is None else parameters_of(clip.patcher)


def storage_of(unet: Any) -> str:
    """Forge and Neo tell; else the dtype that most of the UNet is stored in."""
    told = getattr(unet.model, "storage_dtype", None)
    if told is None:
        counts: dict[torch.dtype, int] = {}
        for parameter in parameters_of(unet).values():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
        told = max(counts, key=lambda dtype: counts[dtype])
    return str(told).removeprefix("torch.")


def add_patches(patcher: Any, patches: Mapping[str, Any], strength: float, filename: str) -> set[str]:
    """`add_patches` of whatever fork; the names that it took.

    Args:
        filename: must tell the content: Forge compares names and strengths only, to see whether weights are up to date.

    Raises:
        HostError: quantised weights, and no patches that are added in the forward pass.
    """
    accepts = inspect.signature(patcher.add_patches).parameters
    parameters = parameters_of(patcher)
    online = {name for name in patches if quantised(parameters[name])}
    if online and "online_mode" not in accepts:
        dtype = stored_dtype(parameters[min(online)])
        raise HostError(
            f"the model's weights are stored as {dtype}, into which changes this small vanish, and {fork_name()[0]} cannot add "
            "them while it generates; load the checkpoint as fp16, or save a baked checkpoint file instead"
        )
    accepted: set[str] = set()
    for names, mode in ((patches.keys() - online, {}), (online, {"online_mode": True})):
        arguments = {"patches": {name: patches[name] for name in patches if name in names}, "strength_patch": strength, **mode}
        if "filename" in accepts:
            arguments["filename"] = filename
        if names:
            accepted |= set(patcher.add_patches(**arguments))
    return accepted


def keep_uuid(base: Any, patched: Any, applied: str) -> None:
    """Let reForge and Neo see that equal patches are equal, where others clone the base anew for each picture."""
    own = getattr(base, "patches_uuid", None)
    if isinstance(own, uuid.UUID):
        patched.patches_uuid = uuid.uuid5(own, applied)


def carries(patcher: Any, patches: Mapping[str, Any], filename: str) -> bool:
    """Whether a patcher has these patches among its own: by their name where the host keeps it, else by identity."""
    layers = getattr(patcher, "lora_patches", None)
    if layers is not None:
        return any(key[0] == filename for key in layers)
    name, patch = next(iter(patches.items()))
    return any(entry[1] is patch for entry in patcher.patches.get(name, ()))


def patched_clones(clean: Patchers, patches: HostPatches, strength: float, filename: str) -> tuple[Patchers, list[str]]:
    """Patched clones, and the names that the host refused."""
    taken: set[str] = set()
    unet, clip = clean.unet, clean.clip
    if patches.unet:
        unet = clean.unet.clone()
        taken |= add_patches(unet, patches.unet, strength, filename)
    if patches.clip:
        clip = clean.clip.clone()
        taken |= add_patches(clip.patcher, patches.clip, strength, filename)
    return Patchers(unet, clip), [name for name in (*patches.unet, *patches.clip) if name not in taken]


def load_now(patchers: Patchers) -> None:
    """Let the host merge these patchers' weights now, and take out what others merged."""
    load: Callable[..., None] = memory_module().load_models_gpu
    with torch.inference_mode():  # as in a generation: the host makes new parameters
        for patcher in (patchers.clip and patchers.clip.patcher, patchers.unet):
            if patcher is None:
                continue
            load([patcher])
            if hasattr(patcher, "lowvram_patch_counter") and patcher.lowvram_patch_counter():
                load([patcher], force_patch_weights=True)  # reForge and Neo leave swapped layers to the forward pass


def merge_anew(patchers: Patchers) -> None:
    """Let Forge put all originals back and merge these patchers' patches again, whatever it takes to be merged.

    It looks at names of patches alone, and notes them when all are merged: one that is broken off leaves weights that it
    takes for those from before (backend/patcher/lora.py, LoraLoader.refresh). Other forks put their originals back at once.
    """
    for patcher in (patchers.clip and patchers.clip.patcher, patchers.unet):
        loader = getattr(patcher, "lora_loader", None)
        if loader is not None:
            loader.loaded_hash = ""  # that of no list; `force_refresh` is not in every version, and would not try again
            loader.refresh(patcher.lora_patches, patcher.offload_device)


def left_half_merged(patchers: Patchers) -> bool:
    """Whether Forge says that nothing is merged and keeps originals all the same: somebody's merge was broken off."""
    loaders = [getattr(patcher_of(holder), "lora_loader", None) for holder in (patchers.unet, patchers.clip)]
    return any(loader is not None and loader.loaded_hash == "[]" and loader.backup for loader in loaders)


def fingerprint_of(
    patchers: Patchers, steps: Steps, of: Callable[[Mapping[str, Tensor]], str] = digest, parts: Collection[str] = PARTS
) -> dict[str, str]:
    """SHA-256, or another function, of the weights as these patchers make them.

    Args:
        parts: of these alone; `weights_of` tells what they are.
    """
    load_now(patchers)
    found = {}
    for part in parts:
        weights = weights_of(patchers, part)
        found[part] = of(weights)
        steps.advance(sum(tensor.numel() for tensor in weights.values()), part)
    return found


def weights_of(patchers: Patchers, part: str) -> dict[str, Tensor]:
    """The weights of the UNet ("unet") or of the text encoders ("te"), by the host's names.

    Without CLIP-L's projection: no checkpoint has one and nothing reads it, so that Forge and Neo leave it as their memory
    happened to be.
    """
    parameters = parameters_of(patchers.unet) if part == "unet" else clip_parameters(patchers.clip)
    return {name: parameter.data for name, parameter in parameters.items() if not _UNREAD.match(name)}


def check_finite(patchers: Patchers, patches: HostPatches, strength: float) -> None:
    """Raises BadTensorError where the sum left the range of the stored dtype."""
    parameters = {**parameters_of(patchers.unet), **clip_parameters(patchers.clip)}
    for name in (*patches.unet, *patches.clip):
        if not quantised(parameters[name]) and not all_finite(parameters[name]):
            dtype = str(parameters[name].dtype).removeprefix("torch.")
            raise BadTensorError(
                f"{patches.keys[name]} would hold NaN or Inf as {dtype} after adding {strength:g} x the offset; use a smaller "
                "strength"
            )
