"""A LoRA file, every key of it matched to a weight, counted as a copy of another, left out by name, or refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lib_dpo.errors import BadTensorError, MismatchError
from lib_dpo.families.arch import ARCHITECTURES, Architecture
from lib_dpo.families.keymap import LoraModule
from lib_dpo.families.shapes import checkpoint_shapes
from lib_dpo.files.checkpoint import Checkpoint
from lib_dpo.files.header import is_float
from lib_dpo.offsets.lora.aliases import find_module
from lib_dpo.offsets.lora.decompositions import Form, form_name, form_of
from lib_dpo.offsets.lora.keys import Group, check_decomposition, check_unknown_parts, group_keys
from lib_dpo.offsets.lora.scale import PeftSettings, Scale, form_scale, has_scale, read_settings

_ONE_ENCODER = ("lora_te_", "lora_te.")  # sd-scripts numbers the encoders of SDXL; loaders read these for it too


@dataclass(frozen=True)
class LoraLayer:
    """One module of a LoRA file: file keys by part, and what they make up; None of a bias alone."""

    module: LoraModule
    parts: Mapping[str, str]
    form: Form | None


@dataclass(frozen=True)
class LoraFile:
    """An open LoRA file with every module matched to a canonical weight."""

    checkpoint: Checkpoint
    architecture: Architecture
    layers: tuple[LoraLayer, ...]
    unmatched: tuple[str, ...]
    settings: PeftSettings | None = None
    twins: tuple[str, ...] = ()  # keys that say again what others said
    candidates: tuple[Architecture, ...] = ()  # all that names and shapes fit, where nothing told them apart

    def largest_rank(self) -> int:
        """The largest rank of its pairs; 0 without any."""
        return max((layer.form.rank or 0 for layer in self.layers if layer.form and layer.form.name == "LoRA"), default=0)

    def scales(self) -> list[Scale]:
        """What each of its pairs, and of what else has a rank, is multiplied by, and whence. Raises as `PeftSettings.scale`."""
        return [
            form_scale(self.checkpoint, self.settings, layer.parts, layer.form.rank)
            for layer in self.layers
            if layer.form and layer.form.rank
        ]


def read_lora(checkpoint: Checkpoint, expected: Architecture | None = None) -> LoraFile:
    """Match the modules of a LoRA file to an architecture.

    Args:
        expected: what it is wanted for; decides where the names of its modules fit several architectures.

    Raises:
        MismatchError: a decomposition that is not read, parts that are not understood, an unknown architecture, pairs with one
            half missing, a weight named twice with different numbers, settings of another LoRA.
        BadTensorError: parts of a module that do not fit together.
    """
    found = read_modules(checkpoint, expected)
    if not found.architectures:
        raise MismatchError(
            f"{checkpoint.path.name}: none of its {len(found.modules)} modules belongs to a supported architecture "
            f"({', '.join(row.title for row in ARCHITECTURES.values())})"
        )
    unknown, layers = list(found.unknown), []
    for row in found.modules:
        parts = dict(row.parts)
        if row.module is None:
            unknown.extend(parts.values())
            continue
        if "diff_b" in parts and not _has_bias(row.module):
            unknown.append(parts.pop("diff_b"))
        if parts.keys() == {"alpha"}:
            unknown.append(parts.pop("alpha"))
        if parts:
            layers.append(LoraLayer(row.module, parts, row.form))
    lora = LoraFile(
        checkpoint,
        found.architectures[0],
        tuple(layers),
        tuple(unknown),
        found.settings,
        found.twins,
        () if found.is_sure else found.architectures,
    )
    if found.settings is not None:
        lora.scales()  # settings of another LoRA are found here, before anything is made of the file
    return lora


@dataclass(frozen=True)
class FileModule:
    """One module as a file names it: `module` is None where no supported architecture has one of that name."""

    name: str
    module: LoraModule | None
    parts: Mapping[str, str]
    form: Form | None


@dataclass(frozen=True)
class FileModules:
    """The modules of a LoRA file of any family, the likeliest architectures, and the keys that belong to no module."""

    modules: tuple[FileModule, ...]
    architectures: tuple[Architecture, ...]
    is_sure: bool
    unknown: tuple[str, ...]
    twins: tuple[str, ...]
    settings: PeftSettings | None


def read_modules(checkpoint: Checkpoint, expected: Architecture | None = None) -> FileModules:
    """Sort the keys of a LoRA file by module, of an unknown family too. Raises as `read_lora`, but for the architecture."""
    file = checkpoint.path.name
    check_decomposition(checkpoint.infos, file)
    groups, unknown = group_keys(checkpoint.infos)
    settings = read_settings(checkpoint, groups)
    architectures, is_sure = _recognise(groups, checkpoint, expected)

    def find(name: str) -> LoraModule | None:
        return find_module(architectures[0].name, name) if architectures else None

    def is_known(name: str) -> bool:
        own = name.removesuffix("_lora").replace(".processor.", ".")  # `attn1.processor.to_q_lora` is to_q's, in old files
        return find(name) is not None or find(own) is not None

    names = {group.module for group in groups}
    telling = [key for key in unknown if is_float(checkpoint.infos[key].dtype) or "alpha" in key.rpartition(".")[2]]
    check_unknown_parts(telling, lambda name: name in names or is_known(name), file)
    check_unknown_parts([key for group in groups if find(group.module) is None for key in group.parts.values()], is_known, file)
    same: dict[LoraModule | str, list[Group]] = {}
    for group in groups:
        same.setdefault(find(group.module) or group.module, []).append(group)
    twins: list[str] = []
    modules = []
    for identity, own in same.items():
        module = identity if isinstance(identity, LoraModule) else None
        modules.append(FileModule(own[0].module, module, *_merged(checkpoint, own, settings, twins)))
    return FileModules(tuple(modules), architectures, is_sure, tuple(unknown), tuple(twins), settings)


def _has_bias(module: LoraModule) -> bool:
    """Whether one bias lies beside the whole weight: not for a third of a fused layer, a projection, an embedding."""
    return module.part is None and module.key.endswith(".weight") and "embedding" not in module.key


# ---- one module ----


def _merged(
    checkpoint: Checkpoint, groups: Sequence[Group], settings: PeftSettings | None, twins: list[str]
) -> tuple[dict[str, str], Form | None]:
    """The parts of one module from all its spellings, and their form. Parts that come twice with the same numbers count once.

    WebUIs, ComfyUI and diffusers take one of two spellings too, each another one: what differs has no meaning.

    Args:
        twins: gets the keys that were not needed.

    Raises:
        MismatchError: the same part twice with different numbers, a pair with one half missing.
        BadTensorError: parts that do not fit together.
    """
    parts: dict[str, str] = {}
    for group in groups:
        for part, key in group.parts.items():
            if part not in parts:
                parts[part] = key
            elif _equal(checkpoint, parts[part], key):
                twins.append(key)
            else:
                raise _differ(checkpoint, parts[part], key)
    form = _check_module(checkpoint, parts, groups[0].module)
    whole = [group for group in groups if has_scale(group.parts)]
    if len(whole) > 1 and form is not None:
        scales = {form_scale(checkpoint, settings, group.parts, form.rank).value for group in whole}
        if len(scales) > 1:
            one, other = (next(key for part, key in group.parts.items() if part != "alpha") for group in whole[:2])
            raise _differ(checkpoint, one, other, " in their scale")
    return parts, form


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    first, second = checkpoint.read(one), checkpoint.read(other)
    return first.numel() == second.numel() and torch.equal(first.double().flatten(), second.double().flatten())


def _differ(checkpoint: Checkpoint, one: str, other: str, how: str = "") -> MismatchError:
    return MismatchError(
        f"{checkpoint.path.name}: {one} and {other} name the same weight but differ{how}; programs take the one or the other: "
        "expected each weight once, remove one of them"
    )


def _check_module(checkpoint: Checkpoint, parts: Mapping[str, str], name: str) -> Form | None:
    """What a module's parts make up, from the header alone. Refuses those that do not make up a delta.

    Raises:
        MismatchError: as `form_name`.
        BadTensorError: a part that is no floating-point tensor, or whose shape fits neither its kind nor the other parts.
    """
    file = checkpoint.path.name
    form_name(parts, f"{file}: {name}")
    shapes = {part: checkpoint.infos[key].shape for part, key in parts.items()}
    for part, key in parts.items():
        info = checkpoint.infos[key]
        is_number = is_float(info.dtype) or (part == "alpha" and info.dtype != "C64")  # some tools write alpha as an integer
        is_steps = part == "lokr_w2" and info.dtype == "I8" and math.prod(shapes.get("lokr_w1", ())) == 1
        if not (is_number or is_steps):
            raise BadTensorError(f"{file}: {key} is stored as {info.dtype}, expected floating-point numbers; get it again")
        dimensions, numel = len(info.shape), math.prod(info.shape)
        fits = {"alpha": numel == 1, "mid": dimensions == 4, "diff_b": dimensions == 1}
        fits |= dict.fromkeys(("diff", "dora_scale", "magnitude"), dimensions > 0)
        if not (fits.get(part, dimensions > 1) and numel):
            raise BadTensorError(f"{file}: {key} has the shape {list(info.shape)}, which no {part} has; get the file again")
    return form_of(parts, shapes, f"{file}: {name}")


# ---- the architecture ----


def _recognise(
    groups: Sequence[Group], checkpoint: Checkpoint, expected: Architecture | None
) -> tuple[tuple[Architecture, ...], bool]:
    """The architectures whose modules fit most, the likeliest first, and whether anything but a guess put it first.

    None for a file of another family. Names come first; then shapes, metadata, what is wanted, and the commoner one.
    """
    rows = sorted(ARCHITECTURES.values(), key=lambda row: not _is_likely(row, expected))  # stable
    fits: dict[str, list[Group]] = {}
    for row in rows:
        if _is_likely(row, expected) or len(max(fits.values(), key=len)) < len(groups):
            fits[row.name] = [group for group in groups if find_module(row.name, group.module)]
    most = max(map(len, fits.values()))
    if not most:
        return (), False
    tied = [ARCHITECTURES[name] for name, own in fits.items() if len(own) == most]
    tied = [row for row in tied if _is_likely(row, expected)] or tied
    tied = _by_proj_in(tied, groups, checkpoint)
    widths = {row.name: sum(_has_real_size(row, group, checkpoint) for group in fits[row.name]) for row in tied}
    tied = [row for row in tied if widths[row.name] == max(widths.values())]
    version = checkpoint.metadata.get("ss_base_model_version", "")
    if checkpoint.metadata.get("ss_v2") == "True":
        version = "sd_v2"
    told = [row for row in tied if version and version.startswith(row.ss_base_model_version)]
    if not told and any(group.module.startswith(_ONE_ENCODER) for group in groups):
        tied = [row for row in tied if len(row.text_encoders) == 1] or tied
    if len(tied) == 1:
        return tuple(tied), True
    if expected in (told or tied):
        return (expected, *(row for row in tied if row is not expected)), True
    return tuple(dict.fromkeys([*told, *tied])), bool(told)


def _is_likely(row: Architecture, expected: Architecture | None) -> bool:
    """Whether a file may be of it without more reason: the names in a pruned UNet are some of those in a whole one."""
    return row.resnets == 2 or row is expected


def _by_proj_in(tied: list[Architecture], groups: Iterable[Group], checkpoint: Checkpoint) -> list[Architecture]:
    """SD 1 and 2 share their names and differ in proj_in: a convolution there, a linear layer here."""
    downs = [group.parts["down"] for group in groups if group.module.endswith("proj_in") and "down" in group.parts]
    dimensions = {len(checkpoint.infos[key].shape) for key in downs}
    if len(dimensions) != 1:
        return tied
    other = "sd1" if dimensions == {2} else "sd2"
    return [row for row in tied if not row.name.startswith(other)] or tied


def _has_real_size(arch: Architecture, group: Group, checkpoint: Checkpoint) -> bool:
    """Whether a module is as large as in the published models: cross-attention sees 768, 1024, 2048 or 1280 columns."""
    module = find_module(arch.name, group.module)
    assert module is not None, "only modules of the architecture are measured"
    shape = checkpoint_shapes(arch.name)[module.key]
    size = (shape[0] // (3 if module.part is not None else 1), math.prod(shape[1:]))
    return _size(group, checkpoint) == (size[::-1] if module.transposed else size)


def _size(group: Group, checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Rows and columns of what a module changes."""
    try:
        form = _check_module(checkpoint, group.parts, group.module)
    except (BadTensorError, MismatchError):  # one that another spelling completes, or that is refused in its turn
        return None
    return (form.shape[0], math.prod(form.shape[1:])) if form else None
