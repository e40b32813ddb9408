"""Every tensor of a file is in the figures or named as left out: which, and what those left out are.

One partition serves all commands. The parts of a file are its components (UNet, text encoders, VAE) and the kinds of
tensors beside them; together they are all of its keys, each once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lib_dpo.errors import NothingToDoError
from lib_dpo.families.keymap import component_of
from lib_dpo.families.model import Model
from lib_dpo.files.header import is_float, torch_dtype
from lib_dpo.offsets.offset import POSITIONS, Pair

_NAMED = 3  # keys of one kind that a sentence names; JSON has all


@dataclass(frozen=True)
class Kind:
    """A sort of tensors that no figure counts. `words` follow a number: "4 constants of the noise schedule"."""

    name: str
    words: str
    weights: bool = False  # they are weights of the model: without them a difference is not told in full


_GUIDANCE = Kind("guidance", "tensors of the guidance embedding of an LCM, in no offset", weights=True)
_UNET_REST = Kind("unet", "tensors of the UNet that are in no map of this architecture, and in no offset", weights=True)
_TEXT_REST = Kind("text_encoder", "tensors of a text encoder under names that are unknown here", weights=True)
_ONE_SIDED = Kind("one_sided", "tensors of a text encoder that the other file lacks", weights=True)
_TWICE = Kind("twice", "tensors that the file holds under two names; the other one is read", weights=True)
_UNKNOWN = Kind("unknown", "tensors under names that are unknown here", weights=True)
_VAE = Kind("vae", "tensors of the VAE, which is never part of an offset")
_INTEGERS = Kind("not_floating", "tensors that hold no floating-point numbers")

# By a part of the key as it is in the file; the first match counts.
_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"(^|\.)time_embed(ding)?\.cond_proj\.", _GUIDANCE),
    (r"^(model_)?ema\.|^unet_ema\.", Kind("ema", "tensors of an EMA copy, which is not read: WebUIs use the plain weights")),
    (POSITIONS, Kind("positions", "numbers of positions, which are no weights")),
    (r"^(v_pred|ztsnr|edm_mean|edm_std|edm_vpred\..*)$", Kind("mark", "marks of what the model predicts")),
    (
        r"^(model\.)?(betas|alphas_cumprod(_prev)?|(sqrt|log|posterior)_\w+|lvlb_weights|logvar|scale_factor|denoiser\..*)$",
        Kind("schedule", "constants of the noise schedule"),
    ),
    (r"(^|\.)(logit_scale|text_projection(\.weight)?)$", Kind("text_projection", "tensors of CLIP that pictures do not use")),
    (r"(^|\.)(vision_model|visual)\.", Kind("image_encoder", "tensors of an image encoder, which is not compared")),
    (r"^safety_checker\.", Kind("safety_checker", "tensors of a safety checker, which is not compared")),
    (r"^vae\.|^first_stage_model\.", _VAE),
    (r"^(optimizer|lr_scheduler|callbacks?|loss)\b|exp_avg|global_step$", Kind("training", "tensors of a training's state")),
    (r"lora_(up|down|A|B)\b|\.lora\.(up|down)\.", Kind("lora", "tensors of a LoRA, which is not applied", weights=True)),
    (r"^(cond_stage_model|conditioner|text_encoders?(_2)?|clip_[lg])\.", _TEXT_REST),
)  # fmt: skip


@dataclass(frozen=True)
class LeftOut:
    """The tensors of one kind that no figure counts, by their names in the file."""

    kind: Kind
    keys: tuple[str, ...]
    holder: str = ""  # of a pair: "base", "tuned" or "both"
    same: bool | None = None  # of weights that both hold: whether they are equal

    @property
    def text(self) -> str:
        """How many and of what kind; weights by name."""
        number = f"{len(self.keys)} {self.kind.words}"
        if len(self.keys) == 1:
            number = re.sub(r"^(1 \w+)s\b", r"\1", number)
        if not self.kind.weights:
            return number
        named = ", ".join(self.keys[:_NAMED]) + (", …" if len(self.keys) > _NAMED else "")
        equal = {True: "; equal in both", False: "; they differ"}
        return f"{number} ({named}{equal.get(self.same, '') if self.same is not None else ''})"

    @property
    def hides_a_change(self) -> bool:
        """Whether the difference of the two UNets is larger than what the figures tell."""
        return self.kind in (_GUIDANCE, _UNET_REST) and self.same is not True

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        found: dict[str, Any] = {"kind": self.kind.name, "meaning": self.kind.words, "count": len(self.keys)}
        if self.holder:
            found |= {"file": self.holder, "equal": self.same}
        return found | {"keys": list(self.keys)}


@dataclass(frozen=True)
class Contents:
    """All tensors of one file, by their names in it: those of the components, and those beside them."""

    components: Mapping[str, tuple[str, ...]]
    beside: tuple[LeftOut, ...]


def contents(model: Model) -> Contents:
    """The partition of one file: `unet`, `te1`, `te2`, `vae`, and the kinds of what is none of these."""
    components: dict[str, list[str]] = {}
    rest: dict[Kind, list[str]] = {}
    canonical = _read_as(model)
    for key, info in model.checkpoint.infos.items():
        component = component_of(model.architecture, canonical[key]) if key in canonical else None
        if component is None or not is_float(info.dtype) or re.search(POSITIONS, key):
            rest.setdefault(_kind(model, key, mapped=component is not None), []).append(key)
        else:
            components.setdefault(component, []).append(key)
    return Contents(
        {name: tuple(keys) for name, keys in components.items()},
        tuple(LeftOut(kind, tuple(keys)) for kind, keys in rest.items()),
    )


def left_out(pair: Pair) -> tuple[LeftOut, ...]:
    """What of the two files is in no figure of the pair: weights first. With `pair.keys` it makes up both files."""
    base = _beside(pair.base, pair.keys, lambda component: _of_one_file(component, pair.tuned))
    tuned = _beside(pair.tuned, pair.keys, lambda component: _of_one_file(component, pair.base))
    rows = []
    for kind in dict.fromkeys((*base, *tuned)):
        ours, theirs = base.get(kind, ()), tuned.get(kind, ())
        if set(ours) == set(theirs):
            rows.append(LeftOut(kind, ours, "both", _equal(pair, ours) if kind.weights else None))
            continue
        rows += [LeftOut(kind, keys, holder) for keys, holder in ((ours, "base"), (theirs, "tuned")) if keys]
    return tuple(sorted(rows, key=lambda row: not row.kind.weights))


def left_out_of_unets(pair: Pair, target: Model, keys: Sequence[str]) -> tuple[LeftOut, ...]:
    """The same where only UNets are compared, those of a pair and of a target; the holder of its tensors is `target`."""

    def kind(component: str) -> Kind:
        if component == "unet":
            return _UNET_REST
        return Kind(component, f"tensors of the text encoder {component}, which is not compared here")

    rows = [
        LeftOut(*row, holder)
        for model, holder in ((target, "target"), (pair.base, "base"), (pair.tuned, "tuned"))
        for row in _beside(model, keys, kind).items()
    ]
    return tuple(sorted(rows, key=lambda row: not row.kind.weights))


def left_out_lines(rows: Sequence[LeftOut], names: Mapping[str, str]) -> list[str]:
    """The same for people: a line for weights of each kind, then one per file for the rest.

    Args:
        names: what the holders `base` and `tuned` are called.
    """
    called = {**names, "both": "both files", "": "the file"}
    lines = [f"left out: {called[row.holder]} {_have(row)} {row.text}" for row in rows if row.kind.weights]
    for holder in dict.fromkeys(row.holder for row in rows if not row.kind.weights):
        texts = [row.text for row in rows if row.holder == holder and not row.kind.weights]
        lines.append(f"not in the figures, of {called[holder]}: {', '.join(texts)}")
    return lines


def change_left_out(rows: Iterable[LeftOut], names: Mapping[str, str]) -> str:
    """What of the UNets' difference the figures do not tell, as a part of a sentence; empty where they tell all."""
    called = {**names, "both": "both files"}
    return " and ".join(f"{called[row.holder]} {_have(row)} {row.text}" for row in rows if row.hides_a_change)


def ema_text(model: Model) -> str:
    """How the EMA copy in a file stands to the weights beside it; empty where there is none."""
    copies = _ema_copies(model)
    if not copies:
        return ""
    checkpoint = model.checkpoint
    differ = next((key for key, copy in copies.items() if not _same(model.read(key), checkpoint.read(copy))), None)
    relation = "it differs from them" if differ else "it is equal to them"
    if len(copies) < len(model.keys("unet")):
        relation = f"it has {len(copies)} of their {len(model.keys('unet'))} tensors, and " + relation
    return f"an EMA copy of the UNet lies beside the plain weights; {relation}, and it is not read: WebUIs use the plain ones"


def ema_differences(pair: Pair) -> str:
    """A sentence on the EMA copies of two files whose plain weights are equal; empty where neither has one."""
    copies = [_ema_copies(model) for model in (pair.base, pair.tuned)]
    if not any(copies):
        return ""
    read = "The plain weights were compared, as WebUIs use them"
    if not all(copies):
        alone = pair.file_names[0 if copies[0] else 1]
        return f"{read}; {alone} alone has an EMA copy beside them, which was not compared"
    shared = [key for key in copies[0] if key in copies[1]]
    files = pair.base.checkpoint, pair.tuned.checkpoint
    equal = all(_same(files[0].read(copies[0][key]), files[1].read(copies[1][key])) for key in shared)
    return f"{read}; the EMA copies beside them " + ("are equal too" if equal else "differ")


def nothing_changed(pair: Pair, what: str, then: str) -> NothingToDoError:
    """The error for files whose figures are all zero, with what of them the figures do not tell.

    Args:
        what: that is the same in both. then: what follows from that.
    """
    message = f"{' and '.join(pair.file_names)} hold the same {what}: {then}"
    hidden = change_left_out(left_out(pair), dict(zip(("base", "tuned"), pair.file_names, strict=True)))
    ema = ema_differences(pair)
    return NothingToDoError(message + (f"; but {hidden}" if hidden else "") + (f". {ema}" if ema else ""))


# ---- helpers ----


def _have(row: LeftOut) -> str:
    return "have" if row.holder == "both" else "has"


def _read_as(model: Model) -> dict[str, str]:
    """File key -> canonical key, of all that are read."""
    return {name: key for key, source in model.sources.items() for name in source.keys}


def _kind(model: Model, key: str, *, mapped: bool) -> Kind:
    if key in model.twice:
        return _TWICE
    if mapped and not re.search(POSITIONS, key):
        return _INTEGERS
    for pattern, kind in _KINDS:
        if re.search(pattern, key):
            return kind
    return _UNET_REST if key.startswith(model.recognised.unet_prefix) and _is_unet(model) else _UNKNOWN


def _is_unet(model: Model) -> bool:
    """Whether what begins with the UNet's prefix is of the UNet: without a prefix, where the file holds nothing else."""
    return bool(model.recognised.unet_prefix) or model.components() == ("unet",)


def _beside(model: Model, compared_keys: Iterable[str], kind_of: Callable[[str], Kind]) -> dict[Kind, tuple[str, ...]]:
    """What of one file is not in the figures of these canonical keys; `kind_of` names that of a component."""
    compared = {name for key in compared_keys if key in model.sources for name in model.sources[key].keys}
    found = contents(model)
    rest = {row.kind: row.keys for row in found.beside}
    for component, keys in found.components.items():
        kind = _VAE if component == "vae" else kind_of(component)
        alone = tuple(key for key in keys if key not in compared)
        if alone:
            rest[kind] = rest.get(kind, ()) + alone
    return rest


def _of_one_file(component: str, other: Model) -> Kind:
    if component in other.components():
        return _ONE_SIDED if component != "unet" else _UNET_REST
    return Kind(component, f"tensors of the text encoder {component}, which the other file does not hold")


def _equal(pair: Pair, keys: Iterable[str]) -> bool:
    """Whether tensors are equal under the same names in both files."""
    base, tuned = pair.base.checkpoint, pair.tuned.checkpoint
    for key in keys:
        one, other = base.infos[key], tuned.infos[key]
        if (one.dtype, one.shape) == (other.dtype, other.shape):
            if base.raw(key) != tuned.raw(key):
                return False
        elif torch_dtype(one.dtype) is None or torch_dtype(other.dtype) is None or not _same(base.read(key), tuned.read(key)):
            return False
    return True


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, whatever their dtypes."""
    if one.dtype != other.dtype or one.element_size() == 1:  # float8 cannot be compared
        one, other = one.double(), other.double()
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def _ema_copies(model: Model) -> dict[str, str]:
    """Canonical UNet key -> key of its EMA copy: ldm's LitEma drops the dots of the name."""
    infos = model.checkpoint.infos
    names = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in model.keys("unet")}
    return {key: name for key, name in names.items() if name in infos and is_float(infos[name].dtype)}
