"""The live model of Forge, reForge, Forge Classic and Forge Neo: bakes and per-generation patches by their own patchers.

Nothing is ever written to a weight here. A patched clone of the patcher takes the place of the pristine one, and the host
merges and restores by its own backups: the same way as its LoRAs, so that both live together.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lib_dpo.errors import Cancelled, HostError
from lib_dpo.families.keymap import UNET
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.hosts.base import Baked, Check, LoadedModel
from lib_dpo.hosts.checksums import checksum
from lib_dpo.hosts.chosen import kept_model
from lib_dpo.hosts.forge.checks import checks
from lib_dpo.hosts.forge.modules import (
    chosen_engine,
    chosen_file,
    clear_conds,
    kept_engines,
    live_engine,
    load_chosen,
    loaded_engine,
    lora_module,
)
from lib_dpo.hosts.forge.patchers import (
    Patchers,
    add_patches,
    carries,
    check_finite,
    fingerprint_of,
    keep_uuid,
    left_half_merged,
    load_now,
    merge_anew,
    parameters_of,
    patched_clones,
    patcher_of,
    storage_of,
    weights_of,
)
from lib_dpo.hosts.forge.patches import HostPatches, patch_bytes, quantised
from lib_dpo.hosts.forge.reading import is_online, name_of, read_patch
from lib_dpo.hosts.inplace import check_memory
from lib_dpo.offsets.lora.keys import group_keys
from lib_dpo.offsets.patch import Patch
from lib_dpo.progress import Progress, Steps

_STATE = "dpo_offset_state"  # our attribute on the host's model object: it goes when the model goes
_STALE = "dpo-offset:stale"  # a list of LoRAs that no prompt gives: makes the built-in Lora start from our patchers
_OTHERS = (
    "the model was changed by something else since the bake: another extension's patches lie on top; to get the clean model, "
    "choose another checkpoint and then this one again"
)
_PATCHES_KEPT, _BYTES_KEPT = 2, 2 << 30  # host forms of patches, kept for changes of strength alone


@dataclass(frozen=True)
class _Bake:
    baked: Baked
    clean: Patchers
    patched: Patchers
    patches: HostPatches
    before: Mapping[str, str]  # checksums of the clean weights, of the parts that were baked into

    def carried_by(self, objects: Any) -> bool:
        """Whether patchers that others made of ours still hold all of it."""
        pairs = ((objects.unet, self.patches.unet), (objects.clip, self.patches.clip))
        return all(
            carries(patcher_of(holder), patches, _bake_name(self.baked.patch_id)) for holder, patches in pairs if patches
        )


@dataclass(frozen=True)
class _Reused:
    """A patched clone that is used again while its base, the patch and the strength stay: then nothing is merged anew."""

    base: Any
    applied: tuple[str, float]
    patched: Any


@dataclass
class _State:
    """What we know of one loaded model."""

    unet: weakref.ref[torch.nn.Module]
    storage: str
    online: bool
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    bake: _Bake | None = None
    patches: dict[str, tuple[HostPatches, int]] = field(default_factory=dict)
    reused: dict[str, _Reused] = field(default_factory=dict)


class ForgeLive:
    """`LiveModel` for Forge and its forks; what differs between them is asked of the live objects."""

    refiner = "the refiner, which is loaded anew, draws without it"

    def __init__(self) -> None:
        self._in_conds: str | None = None  # the text encoder patch that cached conds were made with; None: unknown
        self._seen: list[weakref.ref[Any]] = []  # models with our patches

    def loaded(self) -> LoadedModel | None:
        engine = live_engine()
        if engine is None:
            return None
        state = _state(engine)
        path = Path(engine.sd_checkpoint_info.filename)
        return LoadedModel(name_of(engine), path, state.storage, state.token, state.online)

    def chosen(self) -> Path | None:
        return chosen_file()

    def ready(self) -> None:
        if chosen_file() is not None:
            load_chosen()

    # ---- bake and undo ----

    def bake(self, patch: Patch, strength: float, on_progress: Progress | None = None) -> Baked:
        engine = chosen_engine()
        self._let_go_of_others(engine)
        self._remember(engine)
        state, original = _state(engine), engine.forge_objects_original
        earlier = state.bake if self.baked() else None
        before = Patchers(original.unet, original.clip)
        if earlier and before != earlier.patched:
            raise HostError(_OTHERS)
        clean = earlier.clean if earlier else before
        check_memory(self.bake_bytes(patch) - (earlier.baked.bytes_kept if earlier else 0))
        sums = dict(earlier.before) if earlier else {}
        unknown = _parts(patch) - sums.keys()
        to_read = sum(torch.Size(patch.offset.shapes[key]).numel() for key in patch.changed_keys())
        steps = Steps(to_read + _numel(clean, unknown), on_progress)
        patches = read_patch(engine, patch, steps, on_demand=not is_online(engine))
        try:
            if left_half_merged(clean):
                merge_anew(clean)
            if unknown:
                sums |= fingerprint_of(clean, steps, checksum, unknown)
            patched, refused = patched_clones(clean, patches, float(strength), _bake_name(patch.id))
            _install(engine, patched)
            load_now(patched)
            check_finite(patched, patches, strength)
            patch.checkpoint.check_unchanged()
        except BaseException:
            _install(engine, before)
            state.bake = earlier  # whoever looked meanwhile found other patchers, and forgot it
            merge_anew(before)
            load_now(before)
            raise
        baked = self._record(patch, float(strength), patches, refused, clean)
        state.bake = _Bake(baked, clean, patched, patches, sums)
        return baked

    def _record(self, patch: Patch, strength: float, patches: HostPatches, refused: Sequence[str], clean: Patchers) -> Baked:
        not_applied = tuple(dict.fromkeys((*patches.not_applied, *(patches.keys[name] for name in refused))))
        return Baked(
            patch_id=patch.id,
            offset=patch.name,
            strength=strength,
            blocks=str(patch.blocks),
            rank=patch.rank,
            tensors=len({patches.keys[name] for name in {*patches.unet, *patches.clip} - patches.empty} - set(not_applied)),
            not_applied=not_applied,
            bytes_kept=self.bake_bytes(patch),
            online=any(quantised(parameter) for name, parameter in parameters_of(clean.unet).items() if name in patches.unet),
            file=patch.checkpoint.path,
            twins=patch.offset.twins,
        )

    def unbake(self, on_progress: Progress | None = None) -> bool:
        engine = live_engine()
        if engine is None or self.baked() is None:
            return False
        state, original = _state(engine), engine.forge_objects_original
        record = state.bake
        assert record is not None, "baked() says so"
        if Patchers(original.unet, original.clip) != record.patched:
            raise HostError(_OTHERS)
        _install(engine, record.clean)
        state.bake = None
        parts = record.before.keys()
        steps = Steps(_numel(record.clean, parts), _uncancelled(on_progress))
        if fingerprint_of(record.clean, steps, checksum, parts) != record.before:
            raise HostError(
                "the bake was taken out, but weights that it left alone were changed by something else meanwhile; to get the "
                "clean model, choose another checkpoint and then this one again"
            )
        return True

    def baked(self) -> Baked | None:
        return self._baked_in(live_engine())

    def baked_next(self) -> Baked | None:
        chosen = chosen_file()
        return self._baked_in(kept_model(kept_engines() or (), chosen) if chosen else live_engine())

    def _baked_in(self, engine: Any | None) -> Baked | None:
        state = _state(engine) if engine is not None else None
        if engine is None or state is None or state.bake is None:
            return None
        original, record = engine.forge_objects_original, state.bake
        if Patchers(original.unet, original.clip) == record.patched or record.carried_by(original):
            return record.baked
        state.bake = None  # somebody put other patchers there
        return None

    def bake_bytes(self, patch: Patch) -> int:
        engine, changed = live_engine(), set(patch.changed_keys())
        item = 2
        if engine is not None:
            stored = next(iter(parameters_of(engine.forge_objects_original.unet).values()))
            item = 0 if quantised(stored) else stored.element_size()
        in_memory = patch_bytes(patch, on_demand=engine is not None and not is_online(engine))
        return in_memory + item * sum(torch.Size(patch.offset.shapes[key]).numel() for key in changed)

    def fingerprint(self) -> Mapping[str, str]:
        original = loaded_engine().forge_objects_original
        return fingerprint_of(Patchers(original.unet, original.clip), Steps(0, None))

    def unet(self) -> torch.nn.Module:
        module: torch.nn.Module = loaded_engine().forge_objects_original.unet.model.diffusion_model
        return module

    def matched_keys(self, lora: Path) -> tuple[int, int]:
        original, host = loaded_engine().forge_objects_original, lora_module()
        names = dict(host.model_lora_keys_unet(original.unet.model, {}))
        if original.clip is not None:
            names |= host.model_lora_keys_clip(original.clip.cond_stage_model, {})
        with open_checkpoint(lora) as checkpoint:
            tensors = {key: checkpoint.read(key) for key in checkpoint.infos}
            loaded = host.load_lora(tensors, names)
            if isinstance(loaded, tuple):
                return len(tensors) - len(loaded[1]), len(tensors)
            # reForge tells what it took, not what was left
            taken = {name for name, target in names.items() if {target, _bias_of(target)} & loaded.keys()}
            return sum(len(group.parts) for group in group_keys(tensors)[0] if group.module in taken), len(tensors)

    # ---- one generation ----

    def needs_networks(self, p: Any, patch: Patch) -> bool:
        return bool(getattr(p, "enable_hr", False)) and patch.changes_text_encoder()

    def on_networks(self, p: Any, patch: Patch | None, strength: float, extra_network_data: dict[str, Any]) -> None:
        """The hires pass makes conds of its own from patchers that were reset, and calls no other hook before it does."""
        if getattr(p, "is_hr_pass", False):
            self._patch_clip(p, patch, strength)

    def on_batch(self, p: Any, patch: Patch | None, strength: float) -> None:
        self._let_go_of_others(p.sd_model)
        if patch is None:  # switched off: its tensors may be gigabytes
            state = _state(p.sd_model)
            state.reused.clear()
            state.patches.clear()
        in_conds = self._patch_clip(p, patch, strength)
        if in_conds != self._in_conds:
            clear_conds(p)
            self._in_conds = in_conds

    def on_sampling(self, p: Any, patch: Patch | None, strength: float) -> None:
        if patch is not None and strength and patch.changed_keys():
            objects = p.sd_model.forge_objects
            objects.unet = self._patched(p.sd_model, "unet", patch, float(strength))

    def _patch_clip(self, p: Any, patch: Patch | None, strength: float) -> str:
        """Patch the text encoder of this generation; what is in it then, "" for nothing."""
        if patch is None or not strength or not patch.changes_text_encoder():
            return ""
        objects = p.sd_model.forge_objects
        if objects.clip is not None:
            objects.clip = self._patched(p.sd_model, "clip", patch, float(strength))
        return f"{patch.id} {float(strength)!r}"

    def _patched(self, engine: Any, which: str, patch: Patch, strength: float) -> Any:
        """The generation's unet or clip with the patch; the same object again where nothing changed since."""
        state = _state(engine)
        base, last = getattr(engine.forge_objects, which), state.reused.get(which)
        if last is not None and base is last.patched:  # Forge calls twice before the hires pass
            base = last.base
        if last is None or last.base is not base or last.applied != (patch.id, strength):
            self._remember(engine)
            patches = _prepared(engine, patch, Steps(0, None))
            last = _Reused(base, (patch.id, strength), _patched_clone(base, getattr(patches, which), patch, strength))
            state.reused[which] = last
        return last.patched

    def _remember(self, engine: Any) -> None:
        if not any(seen() is engine for seen in self._seen):
            self._seen.append(weakref.ref(engine))

    def _let_go_of_others(self, engine: Any) -> None:
        """Take our patches out of models that were unloaded: reForge keeps their shells, and so the copies of weights.

        Under the host's lock only: while a kept model is taken up again it is for a moment in no list.
        """
        loaded = kept_engines()
        if loaded is None:
            return
        loaded.append(engine)
        for other in [seen() for seen in self._seen]:
            if other is not None and not any(other is one for one in loaded):
                _forget(other)
        self._seen = [seen for seen in self._seen if any(seen() is one for one in loaded)]

    def left_out(self) -> str:
        return ""  # what cannot be merged ends the generation

    def checks(self) -> Sequence[Check]:
        return checks()


# ---- our record, on the host's model object ----


def _state(engine: Any) -> _State:
    """Our record of a model, made where there is none for the weights that it has now."""
    patcher = engine.forge_objects_original.unet
    state: _State | None = getattr(engine, _STATE, None)
    if state is None or state.unet() is not patcher.model:
        state = _State(weakref.ref(patcher.model), storage_of(patcher), is_online(engine))
        setattr(engine, _STATE, state)
    return state


def _forget(engine: Any) -> None:
    """Leave nothing of ours with a model that is out of use, nor the copies of its weights."""
    state: _State | None = vars(engine).pop(_STATE, None)
    for objects in (engine.forge_objects_original, engine.forge_objects, engine.forge_objects_after_applying_lora):
        if state is not None and state.bake is not None:
            objects.unet, objects.clip = state.bake.clean.unet, state.bake.clean.clip
        for patcher in (objects.unet, patcher_of(objects.clip)):
            getattr(patcher, "backup", {}).clear()


def _uncancelled(on_progress: Progress | None) -> Progress | None:
    """The same for what cannot be stopped half way."""
    if on_progress is None:
        return None

    def tell(done: int, total: int, key: str) -> None:
        with suppress(Cancelled):
            on_progress(done, total, key)

    return tell


def _bake_name(patch_id: str) -> str:
    return f"dpo-bake:{patch_id}"  # never that of a generation: Forge replaces patches of one name and strength


def _prepared(engine: Any, patch: Patch, steps: Steps) -> HostPatches:
    """The patch of a generation in the host's form, read once for all strengths."""
    state = _state(engine)
    kept = state.patches.pop(patch.id, None)
    if kept is None:
        kept = read_patch(engine, patch, steps), patch_bytes(patch)
    while state.patches and (
        len(state.patches) >= _PATCHES_KEPT or kept[1] + sum(size for _, size in state.patches.values()) > _BYTES_KEPT
    ):
        state.patches.pop(next(iter(state.patches)))
    state.patches[patch.id] = kept
    return kept[0]


def _patched_clone(base: Any, patches: Mapping[str, Any], patch: Patch, strength: float) -> Any:
    """A unet or clip with the patch; the base itself where the patch has nothing for it."""
    if not patches:
        return base
    clone = base.clone()
    add_patches(patcher_of(clone), patches, strength, f"dpo-offset:{patch.id}")
    keep_uuid(patcher_of(base), patcher_of(clone), f"{patch.id} {strength!r}")
    return clone


def _parts(patch: Patch) -> set[str]:
    """What a bake of this touches: undo looks at no more, for what it does not touch others may change."""
    keys = patch.changed_keys()
    parts = {"unet"} if any(key.startswith(UNET) for key in keys) else set()
    return parts | ({"te"} if patch.changes_text_encoder() else set())


def _numel(patchers: Patchers, parts: Iterable[str]) -> int:
    return sum(tensor.numel() for part in parts for tensor in weights_of(patchers, part).values())


def _install(engine: Any, patchers: Patchers) -> None:
    """Make the next generation, with whatever LoRAs in its prompt, start from these patchers."""
    for objects in (engine.forge_objects_original, engine.forge_objects, engine.forge_objects_after_applying_lora):
        objects.unet, objects.clip = patchers.unet, patchers.clip
    engine.current_lora_hash = _STALE
    _state(engine).reused.clear()
    clear_conds()


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"
