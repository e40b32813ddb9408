"""Strict stand-ins for Forge, Classic, reForge and Neo around a real small torch module: what is misspelt fails.

Only what the four do with patchers is here, in our own words and no longer than it must be: when they merge, when they
restore, what they compare to find out, and in which order a generation calls the hooks.
"""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, Protocol

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import FAULTS, SHORT_FORM, TORCH

from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET, lora_modules, text_encoder_from_hf
from lib_dpo.hosts import inplace
from lib_dpo.hosts.forge.live import ForgeLive
from lib_dpo.offsets.lora.aliases import lora_aliases

FORKS = ("forge", "classic", "reforge", "neo", "neo-comfy")  # the last: Neo since its patcher is ComfyUI's own
if FAULTS > SHORT_FORM:
    FORKS_HERE = FORKS
elif TORCH < (2, 2):  # AUTOMATIC1111's
    FORKS_HERE = ()
elif TORCH < (2, 5):  # what these three ship
    FORKS_HERE = ("forge", "classic", "reforge")
else:
    FORKS_HERE = ("forge", "neo", "neo-comfy")
LATE = ("forge", "neo", "neo-comfy")  # load a checkpoint for the next picture only
_MOST_UNMATCHED = 0.5  # of a LoRA's keys: Neo leaves a file with more of them out


def module_of(tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A tree of modules with these parameters."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, torch.nn.Module())
            node = node.get_submodule(parent)
        node.register_parameter(leaf, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    return root


def set_parameter(root: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, torch.nn.Parameter(tensor, requires_grad=False))


def merged(weight: torch.Tensor, patches: Iterable[Any], *, adapters: bool = False) -> torch.Tensor:
    """The sum in float32, rounded once. Other patches than those that all forks take are refused.

    Args:
        adapters: pairs come as objects of the host's loader, and raw tuples of them are refused.
    """
    total = weight.float().clone()
    for strength, patch in patches:
        if not isinstance(patch, Adapter) and patch[0] == "lora" and adapters:
            raise ValueError("the type 'lora' is not recognized")
        if isinstance(patch, Adapter) or patch[0] == "lora":
            up, down, alpha, mid = patch.weights if isinstance(patch, Adapter) else patch[1]
            assert mid is None
            pair = up.float().flatten(1) @ down.float().flatten(1)
            total += strength * alpha / down.shape[0] * pair.reshape(total.shape)
        else:
            assert patch[0] == "diff", patch[0]
            assert patch[1][0].shape == total.shape
            total += strength * patch[1][0].float()
    return total.to(weight.dtype)


class Adapter:
    """What the `load_lora` of reForge and Neo makes of a pair."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, alpha: float) -> None:
        self.weights = (up, down, alpha, None)


class LoraLoader:
    """Forge: one to a module, shared by all patchers of it; compares names and strengths, never contents."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.backup: dict[str, torch.Tensor] = {}
        self.online: dict[str, list[Any]] = {}
        self.loaded_hash = "[]"
        self.merges = 0

    def refresh(self, lora_patches: dict[Any, Any], offload_device: torch.device, force_refresh: bool = False) -> None:
        """What is merged is noted at the end alone: an exception leaves half (backend/patcher/lora.py:355 and 446)."""
        wanted = str(list(lora_patches))
        if wanted == self.loaded_hash and not force_refresh:
            return
        for name, tensor in self.backup.items():
            set_parameter(self.model, name, tensor)
        self.backup, self.online = {}, {}
        self.merges += bool(lora_patches)
        together: dict[str, list[Any]] = {}
        for (_, _, _, online), patches in lora_patches.items():
            for name, entries in patches.items():
                (self.online if online else together).setdefault(name, []).extend(entry[:2] for entry in entries)
        for name, entries in together.items():
            weight = self.model.get_parameter(name)
            self.backup[name] = weight.detach()
            set_parameter(self.model, name, merged(weight, entries))
        self.loaded_hash = wanted


class ForgePatcher:
    """Forge's ModelPatcher."""

    adapters = False

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.lora_patches: dict[Any, dict[str, list[Any]]] = {}
        if not hasattr(model, "lora_loader"):
            model.lora_loader = LoraLoader(model)  # type: ignore[assignment]
        self.lora_loader: LoraLoader = model.lora_loader  # type: ignore[assignment]
        self.offload_device = torch.device("cpu")

    def clone(self) -> ForgePatcher:
        other = type(self)(self.model)
        other.lora_patches = self.lora_patches.copy()
        return other

    def add_patches(
        self,
        *,
        filename: str,
        patches: dict[str, Any],
        strength_patch: float = 1.0,
        strength_model: float = 1.0,
        online_mode: bool = False,
    ) -> set[str]:
        names = {name for name, _ in self.model.named_parameters()}
        self.lora_patches[(filename, strength_patch, strength_model, online_mode)] = {
            name: [[strength_patch, patch, strength_model, None, None]] for name, patch in patches.items() if name in names
        }
        return names & patches.keys()

    def merge(self) -> None:
        self.lora_loader.refresh(self.lora_patches, self.offload_device)

    def unmerge(self) -> None:
        """Forge leaves weights as they are."""

    def break_off(self) -> None:
        """After an exception too."""

    @property
    def merges(self) -> int:
        return self.lora_loader.merges


class ComfyPatcher:
    """The ModelPatcher of Classic; backups belong to each clone, and what is loaded is compared by identity."""

    adapters = False

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.patches: dict[str, list[Any]] = {}
        self.backup: dict[str, torch.Tensor] = {}
        if not hasattr(model, "merges"):
            model.merges, model.pristine = 0, {}  # type: ignore[assignment]

    def clone(self) -> Any:
        other = type(self)(self.model)
        other.patches = {name: list(entries) for name, entries in self.patches.items()}
        return other

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> list[str]:
        names = self.model.state_dict().keys() & patches.keys()
        for name in names:
            self.patches.setdefault(name, []).append((strength_patch, patches[name], strength_model))
        return list(names)

    def merge(self) -> None:
        self.model.merges += bool(self.patches)  # type: ignore[operator]
        for name, entries in self.patches.items():
            if name in self.online:
                continue
            weight = self.model.get_parameter(name)
            self.backup.setdefault(name, self._kept(weight.detach()))
            self.model.pristine.setdefault(name, weight.detach())  # type: ignore[operator,union-attr]
            set_parameter(self.model, name, merged(weight, [entry[:2] for entry in entries], adapters=self.adapters))

    def unmerge(self) -> None:
        self._put_back()
        self.backup.clear()
        self.model.pristine = {}  # type: ignore[assignment]

    def break_off(self) -> None:
        """The originals are put back after an exception.

        Classic: LoadedModel.model_load calls unpatch_model. reForge and Neo (backend/patcher/base.py:828-832): detach.
        """
        ComfyPatcher.unmerge(self)

    @property
    def online(self) -> dict[str, list[Any]]:
        """What is added in each forward pass."""
        return {}

    def _kept(self, weight: torch.Tensor) -> Any:
        return weight

    def _put_back(self) -> None:
        for name, tensor in self.backup.items():
            set_parameter(self.model, name, tensor)

    @property
    def merges(self) -> int:
        return int(self.model.merges)  # type: ignore[arg-type]


class UuidPatcher(ComfyPatcher):
    """reForge: backups are shared by clones, and what is merged is compared by uuid."""

    adapters = True

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.patches_uuid = uuid.uuid4()
        if not hasattr(model, "merged_uuid"):
            model.merged_uuid = None  # type: ignore[assignment]

    def clone(self) -> Any:
        other = super().clone()
        other.patches_uuid, other.backup = self.patches_uuid, self.backup
        return other

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> list[str]:
        self.patches_uuid = uuid.uuid4()
        return super().add_patches(patches, strength_patch, strength_model)

    def lowvram_patch_counter(self) -> int:
        return 0

    def merge(self) -> None:
        if self.model.merged_uuid != self.patches_uuid:
            super().unmerge()
            super().merge()
            self.model.merged_uuid = self.patches_uuid  # type: ignore[assignment]

    def unmerge(self) -> None:
        """Weights stay merged until another uuid is loaded."""

    def break_off(self) -> None:
        super().break_off()
        self.model.merged_uuid = None  # type: ignore[assignment]


class NeoComfyPatcher(UuidPatcher):
    """Neo since its patcher is ComfyUI's: patches of five parts; a copy in `backup` is a named tuple."""

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> list[str]:
        return self._add(patches, (strength_patch,), (strength_model, None, None))

    def _add(self, patches: dict[str, Any], before: tuple[Any, ...], after: tuple[Any, ...]) -> list[str]:
        self.patches_uuid = uuid.uuid4()
        names = self.model.state_dict().keys() & patches.keys()
        for name in names:
            self.patches.setdefault(name, []).append((*before, patches[name], *after))
        return list(names)

    def _kept(self, weight: torch.Tensor) -> Any:
        return Kept(weight, False)

    def _put_back(self) -> None:
        for name, kept in self.backup.items():
            set_parameter(self.model, name, kept.weight)  # type: ignore[attr-defined]


class NeoPatcher(NeoComfyPatcher):
    """Neo 2.26: the same with Forge's names and online patches in keywords; patches of six parts."""

    @property
    def online(self) -> dict[str, list[Any]]:
        """A weight with one such patch is merged with none (backend/patcher/base.py:204-207 and 630)."""
        return {name: [entry[:2] for entry in entries] for name, entries in self.patches.items() if any(e[-1] for e in entries)}

    def add_patches(  # type: ignore[override]
        self,
        patches: dict[str, Any],
        strength_patch: float = 1.0,
        strength_model: float = 1.0,
        *,
        filename: str | None = None,
        online_mode: bool | None = None,
    ) -> list[str]:
        assert filename
        return self._add(patches, (strength_patch,), (strength_model, None, None, online_mode))


class Kept(NamedTuple):
    """An original in the backup of Neo and ComfyUI."""

    weight: torch.Tensor
    inplace_update: bool


class Clip:
    """The host's CLIP object: a patcher and what belongs to it."""

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self.cond_stage_model = patcher.model

    def clone(self) -> Clip:
        return Clip(self.patcher.clone())


class Objects:
    """ForgeObjects."""

    def __init__(self, unet: Any, clip: Clip | None) -> None:
        self.unet, self.clip = unet, clip

    def shallow_copy(self) -> Objects:
        return Objects(self.unet, self.clip)


class Engine:
    """The model object."""

    def __init__(self, **names: Any) -> None:
        vars(self).update(names)


class FakeInitialModel:
    """What Forge has before the first generation: true, and without anything."""


class Live(Protocol):
    def on_networks(self, p: Any, patch: Any, strength: float, extra_network_data: dict[str, Any]) -> None: ...
    def on_batch(self, p: Any, patch: Any, strength: float) -> None: ...
    def on_sampling(self, p: Any, patch: Any, strength: float) -> None: ...


class FakeForge:
    """One fork with its checkpoints. `picture` makes a generation as that fork does and returns what it depends on."""

    def __init__(self, fork: str, folder: Path, *, arch: str = "sd1", dtype: torch.dtype = torch.float16) -> None:
        self.fork, self.folder, self.arch, self.dtype = fork, folder, arch, dtype
        patchers = (ForgePatcher, ComfyPatcher, UuidPatcher, NeoPatcher, NeoComfyPatcher)
        self.patcher: Any = dict(zip(FORKS, patchers, strict=True))[fork]
        self.loaded: list[Any] = []  # patchers
        self.loads = 0
        self.data = SimpleNamespace(sd_model=FakeInitialModel() if fork in LATE else None)
        if fork in LATE:
            self.data.forge_loading_parameters = {}
            self.data.forge_hash = ""
        else:
            self.data.loaded_sd_models = []
        self.opts, self.aliases = SimpleNamespace(sd_model_checkpoint=None), dict[str, SimpleNamespace]()
        self.Processing = type("StableDiffusionProcessing", (), {"cached_c": [None, None], "cached_uc": [None, None]})
        hires = {"cached_hr_c": [None, None], "cached_hr_uc": [None, None]}
        self.ProcessingTxt2Img = type("StableDiffusionProcessingTxt2Img", (self.Processing,), hires)

    # ---- modules ----

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeForge:
        """Put this fork's modules where imports find them, and no other fork's."""
        lora = _module("lora", load_lora=self.load_lora, **self._key_maps())
        memory = _module("memory", load_models_gpu=self.load_models_gpu)
        sd_models = _module("sd_models", model_data=self.data)
        runner = type("ScriptRunner", (), {"process_before_every_sampling": None})
        modules = {
            "modules": _module("modules"),
            "modules.sd_models": sd_models,
            "modules.processing": _module(
                "p", StableDiffusionProcessing=self.Processing, StableDiffusionProcessingTxt2Img=self.ProcessingTxt2Img
            ),
            "modules.scripts": _module("scripts", ScriptRunner=runner),
            "modules_forge": _module("modules_forge"),
            "modules_forge.forge_version": _module("forge_version", **self._version()),
        }
        if self.fork in LATE:
            sd_models.forge_model_reload = self.forge_model_reload  # type: ignore[attr-defined]
        else:
            modules["modules.shared"] = _module("shared", opts=self.opts)
            vars(sd_models).update(checkpoint_aliases=self.aliases, reload_model_weights=self.reload_model_weights)
        if self.fork == "neo-comfy":
            modules |= {"comfy": _module("comfy"), "comfy.lora": lora, "comfy.model_management": memory}
        elif self.fork in LATE:
            base = _module("base", ModelPatcher=self.patcher)
            modules |= {"backend": _module("backend"), "backend.patcher": _module("patcher"), "backend.patcher.base": base}
            modules |= {"backend.patcher.lora": lora, "backend.memory_management": memory}
        else:
            modules |= {"ldm_patched": _module("ldm_patched"), "ldm_patched.modules": _module("m")}
            modules |= {"ldm_patched.modules.lora": lora, "ldm_patched.modules.model_management": memory}
            if self.fork == "reforge":
                modules["ldm_patched.modules.weight_adapter"] = _module("weight_adapter")
        for name in list(sys.modules):
            if name.split(".")[0] in ("modules", "modules_forge", "backend", "ldm_patched", "comfy"):
                monkeypatch.delitem(sys.modules, name)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return self

    def _version(self) -> dict[str, str]:
        named = {"neo": "2.26", "neo-comfy": "2.29"}.get(self.fork)
        return {"version": "neo", "release": named} if named else {"version": f"{self.fork} 1.0"}

    def load_lora(self, state_dict: dict[str, torch.Tensor], key_map: dict[str, str]) -> Any:
        found: dict[str, Any] = {}
        used = set()
        for name, target in key_map.items():
            up, down, alpha = (state_dict.get(f"{name}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            if up is not None and down is not None:
                scale = down.shape[0] if alpha is None else alpha.item()
                adapter = self.patcher.adapters
                found[target] = Adapter(up, down, scale) if adapter else ("lora", (up, down, scale, None))
                used |= {f"{name}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
            for suffix, kind in (("diff", ""), ("w_norm", ""), ("diff_b", "bias"), ("b_norm", "bias")):
                if f"{name}.{suffix}" in state_dict:
                    key = target.removesuffix("weight") + kind if kind else target
                    found[key] = ("diff", (state_dict[f"{name}.{suffix}"],))
                    used.add(f"{name}.{suffix}")
        return found if self.fork == "reforge" else (found, {key: t for key, t in state_dict.items() if key not in used})

    def _key_maps(self) -> dict[str, Any]:
        arch = ARCHITECTURES[self.arch]

        def unet(model: torch.nn.Module, key_map: dict[str, str]) -> dict[str, str]:
            for name, _ in model.named_parameters():
                for module in lora_modules(arch, "model." + name):
                    key_map |= dict.fromkeys(lora_aliases(arch, module), name)
            return key_map

        def clip(model: torch.nn.Module, key_map: dict[str, str]) -> dict[str, str]:
            for name, _ in model.named_parameters():
                if ".encoder.layers." in name and name.endswith(".weight") and "norm" not in name:
                    prefix = {"clip_l": "lora_te_", "clip_g": "lora_te2_"}[name.split(".")[0]]
                    key_map[prefix + name.split(".transformer.")[1].removesuffix(".weight").replace(".", "_")] = name
            return key_map

        return {"model_lora_keys_unet": unet, "model_lora_keys_clip": clip}

    # ---- models ----

    def checkpoint(self, name: str, seed: int) -> Path:
        return tiny.save(self.folder / f"{name}.safetensors", tiny.base(self.arch, seed=seed))

    def load(self, path: Path) -> Any:
        """A new model object of a file; the old one is let go."""
        self.opts.sd_model_checkpoint = str(path)
        self.aliases[str(path)] = SimpleNamespace(filename=str(path))
        for patcher in self.loaded:  # all models are unloaded first
            patcher.unmerge()
        self.loaded.clear()
        tensors = load_file(path)
        unet = {key.removeprefix("model."): tensor.to(self.dtype) for key, tensor in tensors.items() if key.startswith(UNET)}
        roots = ("clip_l", "clip_g") if self.arch == "sdxl" else ("clip_l",)
        clip = {
            f"{root}.transformer.{key}": tensor.half()
            for root, encoder in zip(roots, ARCHITECTURES[self.arch].text_encoders, strict=True)
            for key, tensor in tiny.in_transformers(encoder, tensors).items()
        }
        if self.fork in LATE:  # for what is in no checkpoint: whatever lies in memory
            self.loads += 1
            clip["clip_l.transformer.text_projection.weight"] = torch.full((2, 2), self.loads).half()
        module = module_of(unet)
        if self.fork in LATE:
            module.storage_dtype = self.dtype  # type: ignore[assignment]
        objects = Objects(self.patcher(module), Clip(self.patcher(module_of(clip))))
        engine = Engine(
            forge_objects=objects,
            forge_objects_original=objects.shallow_copy(),
            forge_objects_after_applying_lora=objects.shallow_copy(),
            current_lora_hash="[]",
            sd_checkpoint_info=SimpleNamespace(filename=str(path)),
        )
        self.data.sd_model = engine
        if self.fork in LATE:
            self.data.forge_loading_parameters = {"checkpoint": str(path)}
            self.data.forge_hash = str(self.data.forge_loading_parameters)
        return engine

    def choose(self, path: Path) -> None:
        """Forge and Neo load it for the next picture only, the others at once."""
        if self.fork in LATE:
            self.data.forge_loading_parameters = {"checkpoint": str(path)}
        else:
            self.load(path)

    def forge_model_reload(self) -> tuple[Any, bool]:
        if str(self.data.forge_loading_parameters) == self.data.forge_hash:
            return self.data.sd_model, False
        return self.load(Path(self.data.forge_loading_parameters["checkpoint"])), True

    def refine(self, path: Path, *, keep: bool) -> None:
        """What a refiner leaves in reForge and Classic (processing.py:907 of reForge): the setting is as it was.

        Args:
            keep: the model before it as well, as reForge's `sd_checkpoints_limit` does.
        """
        chosen, before = self.opts.sd_model_checkpoint, self.data.sd_model
        self.data.loaded_sd_models = [self.load(path), *([before] if keep else [])]
        self.opts.sd_model_checkpoint = chosen

    def reload_model_weights(self) -> None:
        """Each picture of reForge and Classic begins with it (sd_models.py:1089 of reForge)."""
        wanted = self.opts.sd_model_checkpoint
        kept = [model for model in self.data.loaded_sd_models if model.sd_checkpoint_info.filename == wanted]
        if kept:
            self.take_back(kept[0])
        elif self.data.sd_model.sd_checkpoint_info.filename != wanted:
            self.load(Path(wanted))

    def take_back(self, engine: Any) -> None:
        """Return to a model that was kept, as reForge does: nothing is loaded."""
        self.data.sd_model = engine
        self.opts.sd_model_checkpoint = engine.sd_checkpoint_info.filename
        if self.fork in LATE:
            self.data.forge_loading_parameters = {"checkpoint": engine.sd_checkpoint_info.filename}
            self.data.forge_hash = str(self.data.forge_loading_parameters)

    def load_models_gpu(self, models: list[Any], memory_required: float = 0) -> None:
        """A patcher that is loaded already is left alone; else all others of its module leave first."""
        for patcher in models:
            if any(other is patcher for other in self.loaded):
                continue
            for other in [other for other in self.loaded if other.model is patcher.model]:
                other.unmerge()
                self.loaded.remove(other)
            try:
                patcher.merge()
            except BaseException:
                patcher.break_off()
                raise
            self.loaded.append(patcher)

    def merges(self) -> int:
        return int(self.data.sd_model.forge_objects_original.unet.merges)

    # ---- one generation ----

    def picture(
        self,
        live: Live,
        patch: Any = None,
        strength: float = 0.0,
        *,
        loras: Iterable[tuple[Path, float]] = (),
        prompt: str = "a cat",
        hires: bool = False,
    ) -> torch.Tensor:
        """What the generation saw: conds, and weights at each sampling."""
        if self.fork in LATE:
            self.forge_model_reload()
        engine, loras = self.data.sd_model, list(loras)
        p = self.ProcessingTxt2Img()
        p.sd_model, p.is_hr_pass = engine, False
        engine.forge_objects = engine.forge_objects_original.shallow_copy()
        self._activate(live, p, patch, strength, loras)
        engine.forge_objects = engine.forge_objects_after_applying_lora.shallow_copy()
        live.on_batch(p, patch, strength)
        clip = self._conds(p.cached_c, (prompt, loras))
        seen = [_sum(clip)]
        engine.forge_objects = engine.forge_objects_after_applying_lora.shallow_copy()
        live.on_sampling(p, patch, strength)
        unet, extra = self._sample()
        seen.append(_sum(unet) + extra)
        if hires:
            p.is_hr_pass = True
            self._activate(live, p, patch, strength, loras)
            clip = self._conds(p.cached_hr_c, (prompt + " in detail", loras))
            seen.append(_sum(clip))
            if self.fork == "forge":  # on objects of the first pass
                live.on_sampling(p, patch, strength)
            engine.forge_objects = engine.forge_objects_after_applying_lora.shallow_copy()
            live.on_sampling(p, patch, strength)
            unet, extra = self._sample()
            seen.append(_sum(unet) + extra)
        self.drawn_with = unet, clip
        return torch.stack(seen)

    def _activate(self, live: Live, p: Any, patch: Any, strength: float, loras: list[tuple[Path, float]]) -> None:
        """The built-in Lora: nothing happens while its list of files and strengths stays."""
        engine, wanted = self.data.sd_model, str([[str(path), strength] for path, strength in loras])
        if engine.current_lora_hash != wanted:
            engine.current_lora_hash = wanted
            original = engine.forge_objects_original
            engine.forge_objects.unet, engine.forge_objects.clip = original.unet, original.clip
            for path, multiplier in loras:
                engine.forge_objects.unet = self._with_lora("unet", engine.forge_objects.unet, path, multiplier)
                clip = engine.forge_objects.clip.clone()
                clip.patcher = self._with_lora("clip", clip.patcher, path, multiplier)
                engine.forge_objects.clip = clip
            engine.forge_objects_after_applying_lora = engine.forge_objects.shallow_copy()
        live.on_networks(p, patch, strength, {})

    def _is_taken(self, path: Path) -> bool:
        """Neo leaves out a LoRA of which it knows too few keys, with no more than a line on its console."""
        if not self.fork.startswith("neo"):
            return True
        objects, maps = self.data.sd_model.forge_objects_original, self._key_maps()
        names = maps["model_lora_keys_unet"](objects.unet.model, {}) | maps["model_lora_keys_clip"](
            objects.clip.patcher.model, {}
        )
        tensors = load_file(path)
        return len(self.load_lora(tensors, names)[1]) <= _MOST_UNMATCHED * len(tensors)

    def _with_lora(self, which: str, base: Any, path: Path, strength: float) -> Any:
        if not self._is_taken(path):
            return base
        found = self.load_lora(load_file(path), self._key_maps()[f"model_lora_keys_{which}"](base.model, {}))
        named = {"filename": str(path)} if self.fork in ("forge", "neo") else {}
        patcher = base.clone()
        patcher.add_patches(patches=found if self.fork == "reforge" else found[0], strength_patch=strength, **named)
        return patcher

    def _conds(self, cache: list[Any], key: tuple[Any, ...]) -> dict[str, torch.Tensor]:
        """What the text encoder made, here its weights; the cache's key is what the hosts' is."""
        key = (*key, str(self.data.sd_model.sd_checkpoint_info.filename))
        if cache[0] != key:
            patcher = self.data.sd_model.forge_objects.clip.patcher
            self.load_models_gpu([patcher])
            if self.fork in LATE:  # they encode with these two tables in float32, whatever was loaded
                for name, parameter in patcher.model.named_parameters():
                    if ".embeddings." in name:
                        parameter.data = parameter.data.float()
            read = weights_of(patcher)
            read.pop("clip_l.transformer.text_projection.weight", None)  # nothing reads it
            cache[:] = key, read
        return cache[1]  # type: ignore[no-any-return]

    def _sample(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The weights, and a number that online patches have a part in."""
        unet = self.data.sd_model.forge_objects.unet
        self.load_models_gpu([unet])
        online = unet.lora_loader.online if isinstance(unet, ForgePatcher) else unet.online
        return weights_of(unet), _sum(
            {name: merged(torch.zeros(shape_of(unet, name)), online[name], adapters=unet.adapters) for name in online}
        )


def shape_of(patcher: Any, name: str) -> torch.Size:
    return patcher.model.get_parameter(name).shape  # type: ignore[no-any-return]


def weights_of(patcher: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in patcher.model.named_parameters()}


def _sum(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A number that every value has a part in."""
    total = torch.zeros((), dtype=torch.float64)
    for number, tensor in enumerate(tensors.values()):
        total += (tensor.double() * torch.arange(1, tensor.numel() + 1).reshape(tensor.shape)).sum() / (number + 1)
    return total


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


# ---- what the contract tests ask of a fork ----


class Harness:
    """A fork behind the `Harness` of the contract tests: its checkpoints and weights by canonical keys."""

    dtype = torch.float16
    merges_in_float32 = True

    def __init__(self, fork: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch = monkeypatch
        self.fake = FakeForge(fork, folder).install(monkeypatch)
        self.live = ForgeLive()
        self.kept: dict[str, Any] = {}
        self.chosen = ""

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.fake.arch = "sdxl" if any(key.startswith("conditioner.") for key in tensors) else "sd1"
        tiny.save(self.fake.folder / f"{name}.safetensors", tensors)

    def load(self, name: str) -> None:
        self.chosen = name
        if name in self.kept:
            self.fake.take_back(self.kept[name])
        else:
            self.reload()

    def load_beside(self, name: str) -> None:
        self.kept[self.chosen] = self.fake.data.sd_model
        if hasattr(self.fake.data, "loaded_sd_models"):
            self.fake.data.loaded_sd_models += self.kept.values()
        self.load(name)
        self.kept[name] = self.fake.data.sd_model
        if hasattr(self.fake.data, "loaded_sd_models"):
            self.fake.data.loaded_sd_models.append(self.kept[name])

    def reload(self) -> None:
        self.fake.load(self.fake.folder / f"{self.chosen}.safetensors")

    def switch_vae(self) -> None:
        """No fork touches UNet or text encoder for that, nor their patchers."""

    def weights(self) -> dict[str, torch.Tensor]:
        original = self.fake.data.sd_model.forge_objects_original
        return self._canonical(_as_patched(original.unet), _as_patched(original.clip.patcher))

    def generate(
        self, patch: Any = None, strength: float = 1.0, *, loras: Iterable[tuple[Path, float]] = (), hires: bool = False
    ) -> dict[str, torch.Tensor]:
        self.fake.picture(self.live, patch, strength, loras=loras, hires=hires)
        return self._canonical(*self.fake.drawn_with)

    def disturb(self, key: str) -> None:
        """The way of these hosts: another extension puts a patched clone of its own over what is there."""
        original, name = self.fake.data.sd_model.forge_objects_original, key.removeprefix("model.")
        theirs = original.unet.clone()
        added = ("diff", (torch.ones(theirs.model.get_parameter(name).shape),))
        named = {"filename": "theirs"} if self.fake.fork in ("forge", "neo") else {}
        theirs.add_patches(patches={name: added}, **named)
        original.unet = theirs

    def starve(self) -> None:
        self.monkeypatch.setattr(inplace, "available_memory", lambda: 0)

    def _canonical(self, unet: Mapping[str, torch.Tensor], clip: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {"model." + name: tensor for name, tensor in unet.items()}
        for root, encoder in zip(("clip_l", "clip_g"), ARCHITECTURES[self.fake.arch].text_encoders, strict=False):
            head = f"{root}.transformer."
            own = {name.removeprefix(head): tensor for name, tensor in clip.items() if name.startswith(head)}
            for name, tensor in own.items():
                third = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name)
                if encoder.naming == "open_clip" and third:
                    thirds = [own[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                    tensors[f"{encoder.prefix}transformer.resblocks.{third[1]}.attn.in_proj_{third[2]}"] = torch.cat(thirds)
                elif name == "text_projection.weight" and encoder.naming == "hf":
                    continue
                elif name == "text_projection.weight":
                    tensors[encoder.prefix + "text_projection"] = tensor.T
                elif encoder.naming == "hf" or not re.search(r"\.[kv]_proj\.", name):
                    tensors[str(text_encoder_from_hf(encoder, name))] = tensor
        return tensors


def _as_patched(patcher: Any) -> dict[str, torch.Tensor]:
    """The weights as this patcher would merge them, from the backups where others are merged; changes nothing."""
    backup = patcher.lora_loader.backup if isinstance(patcher, ForgePatcher) else patcher.model.pristine
    if isinstance(patcher, ForgePatcher):
        patches: dict[str, list[Any]] = {}
        for layer in patcher.lora_patches.values():
            for name, entries in layer.items():
                patches.setdefault(name, []).extend(entries)
    else:
        patches = patcher.patches
    found = {}
    for name, parameter in patcher.model.named_parameters():
        weight = backup.get(name, parameter).detach()
        if name in patches:
            found[name] = merged(weight, [entry[:2] for entry in patches[name]], adapters=patcher.adapters)
        else:
            found[name] = weight.clone()
    return found
