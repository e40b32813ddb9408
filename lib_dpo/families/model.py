"""A checkpoint seen through canonical keys: whatever layout the file has, the rest of the package sees ldm/sgm names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError
from lib_dpo.families.arch import Architecture, Recognised, Shape, TextEncoder, recognise
from lib_dpo.families.keymap import (
    QKV,
    UNET,
    VAE,
    component_of,
    swap_prefix,
    text_encoder_from_hf,
    unet_from_diffusers,
    unet_table,
    vae_from_diffusers,
)
from lib_dpo.files.checkpoint import Checkpoint, open_checkpoint
from lib_dpo.files.header import is_float, torch_dtype

# Other prefixes under which files carry a text encoder: spelled as the canonical keys are, or as transformers does.
_SAME_NAMING = dict.fromkeys(
    ("sd2", "sd2-small", "sd2-tiny"), ("conditioner.embedders.0.model.",)
)  # SD 2.1 in Stability's generative-models layout
_HF_NAMING = dict.fromkeys(
    ("sd1", "sd1-small", "sd1-tiny"), ("cond_stage_model.transformer.",)
)  # before transformers 4.0: without text_model.
_HF_QKV = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor lies in a file: several keys are joined along their first dimension."""

    keys: tuple[str, ...]
    transpose: bool = False


class Model:
    """A checkpoint with its architecture, read by canonical keys. Close it, or use it in a `with` statement."""

    def __init__(self, checkpoint: Checkpoint, *, expected: str = "a model") -> None:
        self.checkpoint = checkpoint
        shapes = {key: info.shape for key, info in checkpoint.infos.items()}
        self.recognised: Recognised = recognise(shapes, name=checkpoint.path.name, expected=expected)
        found = _Found()
        _find_sources(found, self.recognised, shapes)
        self.sources: Mapping[str, Source] = found.sources
        self.twice: frozenset[str] = frozenset(found.twice)  # keys of tensors that another key of the file stands for
        for source in self.sources.values():
            _check_parts(source, shapes, checkpoint.path.name)

    @property
    def architecture(self) -> Architecture:
        return self.recognised.architecture

    @property
    def name(self) -> str:
        """What people call the file."""
        return self.checkpoint.name

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def keys(self, component: str | None = None) -> list[str]:
        """Canonical keys of floating-point tensors in file order; of one component (`unet`, `te1`, `te2`, `vae`) or all."""
        return [
            key
            for key, source in self.sources.items()
            if is_float(self.checkpoint.infos[source.keys[0]].dtype)
            and (component is None or component_of(self.architecture, key) == component)
        ]

    def components(self) -> tuple[str, ...]:
        """Which components the file holds, in the order unet, te1, te2, vae."""
        held = {component_of(self.architecture, key) for key in self.sources}
        return tuple(name for name in ("unet", "te1", "te2", "vae") if name in held)

    def shape(self, key: str) -> Shape:
        source = self.sources[key]
        shapes = [self.checkpoint.infos[name].shape for name in source.keys]
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        return joined[::-1] if source.transpose else joined

    def dtype(self, key: str) -> str:
        """Stored dtype in safetensors' spelling, e.g. "F16"."""
        return self.checkpoint.infos[self.sources[key].keys[0]].dtype

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU in its stored dtype. It may be a view of the mapped file: never write to it.

        Raises:
            BadTensorError: this torch cannot represent the stored dtype.
        """
        source = self.sources[key]
        for name in source.keys:
            stored = self.checkpoint.infos[name].dtype
            if torch_dtype(stored) is None:
                raise BadTensorError(
                    f"{self.path.name}: tensor {name} is stored as {stored}, which torch {torch.__version__} cannot read; "
                    "use an fp16, bf16 or fp32 copy of the file, or a newer torch"
                )
        parts = [self.checkpoint.read(name) for name in source.keys]
        if len(parts) > 1:  # float8 cannot be joined by torch 2.1, and float16 holds all of it
            parts = [torch.cat([part.half() if part.element_size() == 1 else part for part in parts])]
        tensor = parts[0]
        return tensor.T if source.transpose else tensor

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.checkpoint.__exit__(kind, error, traceback)


def open_model(path: str | Path) -> Model:
    """Open a checkpoint, UNet file, diffusers folder or dense offset file.

    Raises:
        BadFileError, UnsafeFileError: it cannot be read.
        MismatchError: it is not one of the supported architectures.
    """
    checkpoint = open_checkpoint(path)
    try:
        return Model(checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _check_parts(source: Source, shapes: Mapping[str, Shape], name: str) -> None:
    """Refuse parts of one tensor that have different shapes, and a transposed one that is no matrix."""
    first, *rest = source.keys
    for key in rest:
        if shapes[key] != shapes[first]:
            raise BadTensorError(
                f"{name}: tensor {key} is {list(shapes[key])} but {first} is {list(shapes[first])}; expected one shape for "
                "q, k and v: get the file again"
            )
    if source.transpose and len(shapes[first]) != 2:
        raise BadTensorError(f"{name}: tensor {first} is {list(shapes[first])}, expected a matrix; get the file again")


@dataclass
class _Found:
    """Where canonical tensors lie, as found key by key; of two keys for one tensor the later is read."""

    sources: dict[str, Source] = field(default_factory=dict)
    twice: set[str] = field(default_factory=set)

    def add(self, canonical: str, source: Source) -> None:
        before = self.sources.get(canonical)
        if before:
            self.twice.update(before.keys)
        self.sources[canonical] = source


def _find_sources(found: _Found, recognised: Recognised, shapes: Mapping[str, Shape]) -> None:
    for key in shapes:
        canonical = _unet_key(recognised, key) or _vae_key(key)
        if canonical is not None:
            found.add(canonical, Source((key,)))
    for encoder in recognised.architecture.text_encoders:
        _find_text_encoder(found, recognised.architecture, encoder, shapes)


def _unet_key(recognised: Recognised, key: str) -> str | None:
    if not key.startswith(recognised.unet_prefix):
        return None
    inner = key[len(recognised.unet_prefix) :]
    arch = recognised.architecture
    if recognised.layout == "diffusers":
        return unet_from_diffusers(arch, inner)
    return UNET + inner if swap_prefix(inner, unet_table(arch.levels, arch.attention, arch.resnets)) else None


def _vae_key(key: str) -> str | None:
    if key.startswith(VAE):
        return key
    return vae_from_diffusers(key[len("vae.") :]) if key.startswith("vae.") else None


def _find_text_encoder(found: _Found, arch: Architecture, encoder: TextEncoder, shapes: Mapping[str, Shape]) -> None:
    fused: dict[str, dict[str, str]] = {}  # canonical in_proj key -> q/k/v letter -> file key
    for key in shapes:
        inner = _after_prefix(key, (encoder.prefix, *_SAME_NAMING.get(arch.name, ())))
        if inner is not None:
            # a linear layer's weight is the transpose of open_clip's bare matrix
            linear = inner == "text_projection.weight"
            canonical = encoder.prefix + ("text_projection" if linear else inner)
            found.add(canonical, Source((key,), transpose=linear))
            continue
        hf = _after_prefix(key, (encoder.folder + ".", *_HF_NAMING.get(arch.name, ())))
        if hf is None:
            continue
        if hf.startswith(("embeddings.", "encoder.", "final_layer_norm.")):  # transformers before 4.0
            hf = "text_model." + hf
        attention = _HF_QKV.fullmatch(hf) if encoder.naming == "open_clip" else None
        if attention:
            whole = f"{encoder.prefix}transformer.resblocks.{attention[1]}.attn.in_proj_{attention[3]}"
            parts = fused.setdefault(whole, {})
            found.twice.update({parts.get(attention[2], key)} - {key})
            parts[attention[2]] = key
        elif encoder.naming == "open_clip" and hf == "text_projection.weight":
            found.add(encoder.prefix + "text_projection", Source((key,), transpose=True))
        else:
            known = text_encoder_from_hf(encoder, hf)
            if known is not None:
                found.add(known, Source((key,)))
    for whole, parts in fused.items():
        if len(parts) == len(QKV):
            found.add(whole, Source(tuple(parts[q] for q in QKV)))


def _after_prefix(key: str, prefixes: Iterable[str]) -> str | None:
    return next((key[len(prefix) :] for prefix in prefixes if key.startswith(prefix)), None)
