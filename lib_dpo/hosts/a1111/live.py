"""The live model of AUTOMATIC1111's WebUI 1.10: edited in place, and one network of ours beside a prompt's LoRAs.

What the host does, and why each step is there: sd_models.py, processing.py and extensions-builtin/Lora of 1.10.1. State is
kept on the model object: it survives Reload UI, which starts this class anew, and the host may hold several models.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib_dpo.errors import HostError, NoModelError
from lib_dpo.families.keymap import UNET
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.hosts import checksums, inplace
from lib_dpo.hosts.a1111 import builtin_lora, conds
from lib_dpo.hosts.a1111.builtin_lora import LiveTensor, live_tensors
from lib_dpo.hosts.base import Baked, Check, LoadedModel
from lib_dpo.hosts.chosen import chosen_in_settings, kept_model
from lib_dpo.offsets.lora.unplaced import unplaced_lines
from lib_dpo.offsets.patch import Patch, fitted
from lib_dpo.progress import Progress

_log = logging.getLogger(__name__)

_RECORD, _PLACES, _BUILT = "_dpo_bake", "_dpo_places", "_dpo_network"  # attributes of the model
_HELD = "_dpo_held"  # another: what its 8 bits were found to hold
_TEXT_ENCODERS = ("cond_stage_model.", "conditioner.")
_RELOAD = (
    "choose another checkpoint and then this one again (where the settings keep several checkpoints in memory: restart the "
    "WebUI)"
)
_CHECKS = (
    ("modules.sd_models", "model_data.sd_model", "the loaded checkpoint cannot be found: no bake, no status"),
    ("modules.sd_models", "get_empty_cond", "offsets for the text encoder cannot be baked"),
    ("modules.sd_models", "checkpoint_aliases", "after a refiner the tab works on the refiner's checkpoint"),
    ("modules.sd_unet", "current_unet", "no bake: a TensorRT UNet, which ignores it, would not be noticed"),
    ("modules.processing", "StableDiffusionProcessing.cached_c", "offsets for the text encoder cannot be baked"),
    ("modules.processing", "StableDiffusionProcessingTxt2Img.cached_hr_c", "offsets for the text encoder cannot be baked"),
    ("modules.extra_networks", "ExtraNetworkParams", "no offsets while generating"),
    ("networks", "loaded_networks", "no offsets while generating; the built-in Lora extension is switched off"),
    ("networks", "network_restore_weights_from_backup", "no bake after a prompt with LoRAs"),
    ("networks", "network_reset_cached_weight", "no bake after a prompt with LoRAs"),
    ("networks", "network.Network", "no offsets while generating"),
    ("networks", "network_lora.NetworkModuleLora", "no offsets while generating"),
    ("networks", "network_full.NetworkModuleFull", "no offsets while generating"),
    ("networks", "extra_network_lora.errors", "no offsets while generating"),
    ("networks", "load_network", "what the host makes of an extracted LoRA cannot be said"),
)


class A1111Live:
    """Implements `LiveModel` for A1111. Weights are edited where they lie; no module is ever moved."""

    refiner = "a refiner of another architecture, such as SDXL's, draws without it"
    _editing = threading.Lock()  # of all instances: Reload UI makes a new one while an edit that began before it goes on

    def loaded(self) -> LoadedModel | None:
        model = _model()
        if model is None:
            return None
        info = model.sd_checkpoint_info
        dtype = next(model.model.parameters()).dtype
        token = f"{id(model):x} {info.filename} {_version(model)}"
        return LoadedModel(info.name_for_extra, Path(info.filename), str(dtype).removeprefix("torch."), token)

    def chosen(self) -> Path | None:
        return chosen_in_settings(_model())

    def ready(self) -> None:
        if self.chosen() is not None:
            from modules import sd_models

            sd_models.reload_model_weights()

    # ---- bake and undo ----

    def bake(self, patch: Patch, strength: float, on_progress: Progress | None = None) -> Baked:
        model = _needed_model()
        _refuse_other_unet()
        with self._editing:
            live = live_tensors(model)
            earlier = self._intact(model, live)
            slots = _slots(live)
            plan = inplace.plan_edit(patch, slots, model.sd_checkpoint_info.name_for_extra)
            inplace.check_memory(_to_keep(plan, earlier))
            touches_text = patch.changes_text_encoder() or (earlier is not None and earlier.text_encoder)
            with torch.inference_mode():
                builtin_lora.rebase(model)
            record = inplace.bake(
                plan,
                patch,
                strength,
                slots,
                earlier=earlier,
                finish=lambda: conds.renew(model) if touches_text else None,
                file=model.sd_checkpoint_info.filename,
                on_progress=on_progress,
            )
            setattr(model, _RECORD, record)
            setattr(model, _PLACES, {key: live[key] for key in record.marks.keys})
        return record.baked

    def unbake(self, on_progress: Progress | None = None) -> bool:
        model = _model()
        if model is None:
            return False
        with self._editing:
            live = live_tensors(model)
            record = self._intact(model, live)
            if record is None:
                return False
            with torch.inference_mode():
                builtin_lora.rebase(model)
            try:
                inplace.undo(record, _slots(live), on_progress)
            except inplace.PartlyUndoneError:
                setattr(model, _RECORD, replace(record, undoing=_version(model)))
                raise
            _forget(model, record)
            if record.text_encoder:
                conds.renew(model)
        return True

    def baked(self) -> Baked | None:
        return self._baked_in(_model())

    def baked_next(self) -> Baked | None:
        from modules import sd_models

        chosen = self.chosen()
        return self._baked_in(kept_model(sd_models.model_data.loaded_sd_models, chosen) if chosen else _model())

    def _baked_in(self, model: Any | None) -> Baked | None:
        record = _record(model)
        if record is None:
            return None
        if not self._editing.acquire(blocking=False):  # half of the weights are new: what was true before still stands
            return record.baked
        try:
            record = _record(model)
            if record is None:
                return None
            if _verdict(model, record, getattr(model, _PLACES)) != "gone":  # finding them all by name takes four times as long
                return record.baked
            _forget(model, record)
            return None
        finally:
            self._editing.release()

    def bake_bytes(self, patch: Patch) -> int:
        model = _needed_model()
        return inplace.plan_edit(patch, _slots(live_tensors(model)), model.sd_checkpoint_info.name_for_extra).nbytes

    def fingerprint(self) -> Mapping[str, str]:
        clean = {key: place.clean() for key, place in live_tensors(_needed_model()).items()}
        return {
            "unet": checksums.digest({key: tensor for key, tensor in clean.items() if key.startswith(UNET)}),
            "te": checksums.digest({key: tensor for key, tensor in clean.items() if key.startswith(_TEXT_ENCODERS)}),
        }

    def unet(self) -> nn.Module:
        _refuse_other_unet()
        module: nn.Module = _needed_model().model.diffusion_model
        return module

    def matched_keys(self, lora: Path) -> tuple[int, int]:
        _needed_model()  # its loader would load one
        modules = builtin_lora.matched_modules(_networks(), lora)
        with open_checkpoint(lora) as checkpoint:
            keys = list(checkpoint.infos)
        return sum(key.partition(".")[0] in modules for key in keys), len(keys)

    # ---- one generation ----

    def needs_networks(self, p: Any, patch: Patch) -> bool:
        return True

    def on_networks(self, p: Any, patch: Patch | None, strength: float, extra_network_data: dict[str, Any]) -> None:
        model = _model()
        if model is None:
            return
        if not getattr(p, "is_hr_pass", False):
            self.left_out()  # of a picture that was broken off: nobody asked
        built = None
        if patch is not None and strength:
            built = self._built(model, patch)
            _check_8_bits(model, patch, strength)
        marks = [built.patch_id, repr(strength)] if built and built.text_encoder else []
        baked, record = self.baked(), _record(model)
        if baked is not None and record is not None and record.text_encoder:
            marks += ["baked", baked.patch_id, repr(baked.strength)]
        conds.mark(p, extra_network_data, marks)
        networks = builtin_lora.extension()
        if built is not None:
            builtin_lora.append(networks, built, strength)
            if built.not_applied:
                p.comment(
                    f"DPO offset: {len(built.not_applied)} of its tensors cannot be applied while generating "
                    f"({built.not_applied[0]}, …); bake it to apply all"
                )
            for line in unplaced_lines(patch.offset.unmatched if patch else ()):  # not by a bake either
                p.comment(f"DPO offset: {line}")
        elif networks is not None:
            builtin_lora.remove(networks)
        if patch is None and hasattr(model, _BUILT):
            delattr(model, _BUILT)

    def on_batch(self, p: Any, patch: Patch | None, strength: float) -> None:
        """Where `on_networks` was left out, take out what the last picture left in the list; else that did it all."""
        networks = builtin_lora.extension()
        if networks is not None and getattr(p, "disable_extra_networks", False):
            builtin_lora.remove(networks)

    def on_sampling(self, p: Any, patch: Patch | None, strength: float) -> None:
        """Nothing: `on_networks` did it all."""

    def left_out(self) -> str:
        model, networks = _model(), builtin_lora.extension()
        failed = builtin_lora.take_errors(networks) if networks is not None else 0
        if not failed or model is None:
            return ""
        with torch.inference_mode():
            builtin_lora.rebase(model)  # the extension takes these layers for done: the next picture would have them so too
        return (
            f"it could not be added to {failed} of the model's layers, and this picture holds only a part of it. Most often "
            "the graphics card has run out of memory: make the picture smaller, close other programs, or bake the offset"
        )

    def checks(self) -> Sequence[Check]:
        checks = []
        for module, path, lost in _CHECKS:
            ok = _has(sys.modules.get(module), path)
            checks.append(Check(f"{module}.{path}", ok, "found" if ok else f"not found: {lost}"))
        return checks

    # ---- inside ----

    def _intact(self, model: Any, live: Mapping[str, LiveTensor]) -> inplace.Record | None:
        """The record of a bake that is there in whole; one that a reload took away is forgotten.

        Raises:
            HostError: some of the baked weights were changed since, so that undo would mix two models.
        """
        record = _record(model)
        verdict = _verdict(model, record, live) if record else "gone"
        if record and verdict == "mixed" and record.undoing is None:
            raise HostError(
                f"some of the weights into which {record.baked.offset} was baked were changed by something else since; to get "
                f"a clean model, {_RELOAD}"
            )
        if record and verdict == "gone":
            _forget(model, record)
            return None
        return record

    def _built(self, model: Any, patch: Patch) -> builtin_lora.Built:
        """The patch as a network for this model; the last one is kept, so that another strength costs nothing here."""
        networks = _networks()
        built: builtin_lora.Built | None = getattr(model, _BUILT, None)
        if built is None or built.patch_id != patch.id:
            live = live_tensors(model)
            inplace.plan_edit(patch, _slots(live), model.sd_checkpoint_info.name_for_extra)
            built = builtin_lora.build(networks, patch, live)
            setattr(model, _BUILT, built)
        return built


def _model() -> Any | None:
    """The loaded model; never loads one (`shared.sd_model` would), and None for one that was thrown away."""
    from modules import sd_models

    model = sd_models.model_data.sd_model
    first = next(model.model.parameters(), None) if hasattr(model, "model") else None
    return None if first is None or first.is_meta else model


def _needed_model() -> Any:
    model = _model()
    if model is None:
        raise NoModelError("no checkpoint is loaded yet; choose one, or wait until it is loaded")
    return model


def _record(model: Any) -> inplace.Record | None:
    record: inplace.Record | None = getattr(model, _RECORD, None)
    return record


def _networks() -> Any:
    networks = builtin_lora.extension()
    if networks is None:
        raise HostError(
            "the built-in Lora extension is switched off, and offsets are applied through it; switch it on, or bake"
        )
    return networks


def _refuse_other_unet() -> None:
    from modules import sd_unet

    if sd_unet.current_unet is not None:
        raise HostError("another UNet (TensorRT) draws in the place of the model's own; set 'SD Unet' to None to bake into it")


def _version(model: nn.Module) -> int:
    """Rises when a file is read into the model in place: counted by torch on a tensor that LoRAs and offsets leave alone."""
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embedding.weight", "positional_embedding")):
            return 0 if parameter.is_inference() else parameter._version
    return 0


def _slots(live: Mapping[str, LiveTensor]) -> dict[str, inplace.Slot]:
    """Live tensors with the float16 copies that the host computes from when it stores them in 8 bits."""
    slots = {}
    for key, place in live.items():
        copy = getattr(place.module, "fp16_" + place.name, None)
        slots[key] = inplace.Slot(key, place.tensor, () if copy is None else (copy,))
    return slots


def _check_8_bits(model: Any, patch: Patch, strength: float) -> None:
    """Refuse what the extension would lose in a model that is stored in 8 bits (networks.py:465-475 of 1.10.1).

    It adds each network to the exact copies of the weights anew, where the host keeps some, so that the last one alone is
    left; else to the weights themselves. It rounds to 8 bits either way.

    Raises:
        HostError: what to do instead.
    """
    from modules import shared

    if next(model.model.parameters()).element_size() > 1 or shared.opts.lora_functional:  # the latter leaves weights alone
        return
    live = live_tensors(model)
    slots = _slots(live)
    changed = [key for key in patch.changed_keys() if key in slots and slots[key].tensor.element_size() == 1]
    others = builtin_lora.others_in(_networks(), [live[key].module for key in changed if slots[key].copies])
    if others:
        raise HostError(
            "this model is stored in 8 bits with FP16 copies for LoRAs, and of several LoRAs the WebUI adds the last one alone "
            f"there: {patch.name} would take the place of {', '.join(others)}. Bake {patch.name} instead, or take the LoRA out "
            "of the prompt"
        )
    held = (patch.id, strength, model.sd_checkpoint_info.filename)
    if getattr(model, _HELD, None) == held:
        return
    kept = wanted = 0.0
    for key in (key for key in changed if not slots[key].copies):
        clean = live[key].clean().detach()
        change = strength * fitted(patch.delta(key), tuple(clean.shape), key, patch.name, "the live model").to(clean.device)
        moved = (clean.float() + change).to(clean.dtype).float() - clean.float()
        wanted += float(change.square().sum(dtype=torch.float64))
        kept += float(moved.mul_(change).sum(dtype=torch.float64))
    inplace.check_share(kept, wanted, patch.name)
    setattr(model, _HELD, held)


def _to_keep(plan: inplace.Plan, earlier: inplace.Record | None) -> int:
    """Bytes of main memory that a bake takes: originals, and what the earlier bake made of them until all went well."""
    own = earlier.originals if earlier else {}
    return sum(slot.nbytes for slot in plan.slots if slot.key not in own) + (earlier.baked.bytes_kept if earlier else 0)


def _verdict(model: Any, record: inplace.Record, live: Mapping[str, LiveTensor]) -> str:
    if record.file != model.sd_checkpoint_info.filename:  # read into the same tensors: maybe what was saved from this bake
        return "gone"
    if record.undoing is not None:
        return "mixed" if record.undoing == _version(model) else "gone"

    def versions(key: str) -> Iterator[torch.Tensor]:
        return live[key].versions()

    return record.marks.compare(versions)


def _forget(model: Any, record: inplace.Record) -> None:
    """Free the originals of a bake that is not in the weights any more; nothing where that was done already."""
    for name in (_RECORD, _PLACES):
        vars(model).pop(name, None)
    if record.text_encoder:
        conds.clear()


def _has(module: Any, path: str) -> bool:
    missing = object()
    found = reduce(lambda found, name: getattr(found, name, missing), path.split("."), module)
    return module is not None and found is not missing
