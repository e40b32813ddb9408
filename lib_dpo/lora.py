"""LoRA files: which module is which weight, reading one as an offset, and the metadata we write.

Understood: kohya names in both UNet spellings, PEFT and diffusers names; LoRA pairs for linear and convolution layers
(with a `mid` factor too), `.diff` + `.diff_b`, `.w_norm` + `.b_norm`. Other decompositions are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_dpo import __version__
from lib_dpo.arch import ARCHITECTURES, Architecture, Shape
from lib_dpo.checkpoint import Checkpoint, open_checkpoint
from lib_dpo.errors import BadFileError, BadTensorError, MismatchError
from lib_dpo.header import is_float
from lib_dpo.keymap import LoraModule, lora_aliases, lora_modules
from lib_dpo.model import Model
from lib_dpo.offset import Offset, dense_offset
from lib_dpo.shapes import checkpoint_shapes

# What a file costs beside its numbers: each header entry (70 to 95 bytes without the name), and our own metadata.
ENTRY_BYTES, METADATA_BYTES = 96, 1 << 13
# Metadata entries that describe the bytes of the file they were copied from.
STALE_METADATA = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")

# suffix of a key -> our name for the part
_SUFFIXES: Mapping[str, str] = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_B.weight": "up",
    "lora_A.weight": "down",
    "lora_B.default.weight": "up",
    "lora_A.default.weight": "down",
    "lora.up.weight": "up",
    "lora.down.weight": "down",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
_REFUSED = re.compile(
    r"\.(hada_w\d_[ab]|hada_t\d|lokr_w\d(_[ab])?|lokr_t2|oft_blocks|oft_diag|dora_scale|a1\.weight|on_input"
    r"|lora_magnitude_vector(\.\w+)*)$"
)
_OLD_PROCESSOR = re.compile(r"(.+)\.processor\.to_(q|k|v|out)_lora\.(up|down)\.weight")  # diffusers before 0.22
ADAPTER_METADATA = "lora_adapter_metadata"  # entry of diffusers' own files
_LORA_MARK = re.compile(r"\.(lora_(up|down|mid|A|B)\.|(\w+_)?lora\.(up|down)\.|w_norm$|b_norm$|diff$|diff_b$)")


@dataclass(frozen=True)
class LoraLayer:
    """One module of a LoRA file: file keys by part (`up`, `down`, `mid`, `alpha`, `diff`, `diff_b`)."""

    module: LoraModule
    parts: Mapping[str, str]


@dataclass(frozen=True)
class LoraFile:
    """An open LoRA file with every module matched to a canonical weight."""

    checkpoint: Checkpoint
    architecture: Architecture
    layers: tuple[LoraLayer, ...]
    unmatched: tuple[str, ...]

    def largest_rank(self) -> int:
        """The largest rank of its pairs; 0 without any."""
        downs = (layer.parts["down"] for layer in self.layers if "down" in layer.parts)
        return max((self.checkpoint.infos[key].shape[0] for key in downs), default=0)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether key names are those of a LoRA file."""
    return any(_LORA_MARK.search(key) or _REFUSED.search(key) for key in keys)


def read_factors(checkpoint: Checkpoint, parts: Mapping[str, str]) -> tuple[Tensor, Tensor, float]:
    """One module's up (out, rank), down (rank, in, kh, kw) or (rank, in), and its scale alpha / rank; stored dtype.

    A `mid` factor (CP decomposition) is multiplied into `down`, in float32.

    Args:
        parts: file keys by part, as `group_keys` gives them and `check_module` has found good.

    Raises:
        BadTensorError: NaN or Inf, by key.
    """
    for part in parts.keys() & {"up", "down", "mid", "alpha"}:
        if not bool(torch.isfinite(checkpoint.read(parts[part]).float()).all()):
            raise BadTensorError(
                f"{checkpoint.path.name}: {parts[part]} holds NaN or Inf, expected finite numbers; the file is damaged, "
                "get it again"
            )
    up = checkpoint.read(parts["up"]).flatten(1)
    down = checkpoint.read(parts["down"])
    if "mid" in parts:
        mid = checkpoint.read(parts["mid"]).float()  # (rank, rank, kh, kw)
        down = torch.einsum("abhw,bi->aihw", mid, down.float().flatten(1))
    return up, down, _scale(checkpoint, parts, down.shape[0])


def truncated_factors(lora: LoraFile, parts: Mapping[str, str], rank: int | None) -> tuple[Tensor, Tensor, float]:
    """The same as `read_factors` with the strongest `rank` components only; alpha / rank, and so the scale, stays.

    Files of ours hold the components in falling order; others are brought into it from their factors alone (float32 then).

    Args:
        rank: None, or at least the layer's own: all of them.
    """
    up, down, scale = read_factors(lora.checkpoint, parts)
    if rank is None or rank >= down.shape[0]:
        return up, down, scale
    if lora.checkpoint.metadata.get("dpo.kind") != "lora":
        from lib_dpo.lowrank import recompress

        U, S, Vh = recompress(up, down.flatten(1))
        root = S.sqrt()
        up, down = (U * root).float(), (root[:, None] * Vh).float().reshape(-1, *down.shape[1:])
    return up[:, :rank], down[:rank], scale


def _scale(checkpoint: Checkpoint, parts: Mapping[str, str], rank: int) -> float:
    """alpha / rank, from the module's own alpha, else from the settings that PEFT and diffusers keep beside the weights."""
    if "alpha" in parts:
        return float(checkpoint.read(parts["alpha"])) / rank
    config = _adapter_config(checkpoint.path, checkpoint.metadata.get(ADAPTER_METADATA, ""))
    module = parts["up"].rsplit(".lora_", 1)[0]
    component = module.split(".", 1)[0]

    def setting(name: str) -> Any:
        return config.get(f"{component}.{name}", config.get(name))

    own = (value for pattern, value in (setting("alpha_pattern") or {}).items() if module.endswith(pattern))
    alpha = next(own, setting("lora_alpha"))
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if setting("use_rslora") else rank)


@cache
def _adapter_config(path: Path, metadata: str) -> Mapping[str, Any]:
    """LoraConfig as JSON: diffusers puts it into the metadata, PEFT into adapter_config.json beside the file."""
    beside = path.with_name("adapter_config.json")
    try:
        config = json.loads(metadata or (beside.read_text(encoding="utf-8") if beside.is_file() else "{}"))
    except (OSError, ValueError) as error:
        raise BadFileError(f"{path.name}: its LoRA settings cannot be read ({error}); get the file again") from error
    return config if isinstance(config, dict) else {}


def check_decomposition(checkpoint: Checkpoint) -> None:
    """Refuse a file of another decomposition than LoRA. Raises MismatchError naming a key of it."""
    refused = next((key for key in checkpoint.infos if _REFUSED.search(key)), None)
    if refused:
        raise MismatchError(
            f"{checkpoint.path.name}: {refused} belongs to LoHa, LoKr, OFT, DoRA or IA3, which are not supported; expected LoRA"
        )


def check_module(checkpoint: Checkpoint, parts: Mapping[str, str], name: str) -> None:
    """Refuse a module whose parts do not make up a delta, from the header alone.

    Raises:
        MismatchError: one half of a pair is missing.
        BadTensorError: a part that is no floating-point tensor, or whose shape fits neither LoRA nor the other parts.
    """
    file = checkpoint.path.name
    if ("up" in parts) != ("down" in parts):
        there = "up" if "up" in parts else "down"
        raise MismatchError(f"{file}: {name} has only its {there} factor; the file is incomplete, get it again")
    for part, key in parts.items():
        info = checkpoint.infos[key]
        if not is_float(info.dtype) and (part != "alpha" or info.dtype == "C64"):  # some tools write alpha as an integer
            raise BadTensorError(f"{file}: {key} is stored as {info.dtype}, expected floating-point numbers; get it again")
        dimensions, numel = len(info.shape), math.prod(info.shape)
        fits = {"alpha": numel == 1, "mid": dimensions == 4, "diff": dimensions > 0, "diff_b": dimensions == 1}
        if not (fits.get(part, dimensions > 1) and numel):
            raise BadTensorError(f"{file}: {key} has the shape {list(info.shape)}, which no {part} has; get the file again")
    if "up" not in parts:
        return
    up, down = checkpoint.infos[parts["up"]].shape, checkpoint.infos[parts["down"]].shape
    inner = checkpoint.infos[parts["mid"]].shape[:2] if "mid" in parts else (down[0], down[0])
    if (math.prod(up[1:]), down[0]) != inner or ("mid" in parts and math.prod(down[2:]) != 1):
        raise BadTensorError(
            f"{file}: {name} has {math.prod(up[1:])} columns up but {down[0]} rows down; both must equal its rank: the file "
            "is damaged, get it again"
        )


def read_lora(checkpoint: Checkpoint, expected: Architecture | None = None) -> LoraFile:
    """Match the modules of a LoRA file to an architecture.

    Args:
        expected: what it is wanted for; decides where the names of its modules fit several architectures.

    Raises:
        MismatchError: a decomposition other than LoRA, an unknown architecture, or pairs with one half missing.
        BadTensorError: parts of a module that do not fit together.
    """
    check_decomposition(checkpoint)
    grouped, unknown = group_keys(checkpoint.infos)
    architecture = _recognise(grouped, checkpoint, expected)
    index = _alias_index(architecture.name)
    layers = []
    for module_name, parts in grouped.items():
        module = index.get(module_name)
        if module is None:
            unknown.extend(parts.values())
            continue
        check_module(checkpoint, parts, module_name)
        if module.part is not None and "diff_b" in parts:  # of a third of a fused layer: nobody writes it
            unknown.append(parts.pop("diff_b"))
        if parts.keys() != {"alpha"}:
            layers.append(LoraLayer(module, parts))
    return LoraFile(checkpoint, architecture, tuple(layers), tuple(unknown))


def lora_offset(lora: LoraFile, rank: int | None = None) -> Offset:
    """A LoRA as an offset: deltas are made when they are read, up @ down * alpha / rank.

    Args:
        rank: keep the strongest components of each layer only, as in `truncated_factors`.
    """
    by_key: dict[str, list[LoraLayer]] = {}
    biases: dict[str, str] = {}
    for layer in lora.layers:
        if "up" in layer.parts or "diff" in layer.parts:
            by_key.setdefault(layer.module.key, []).append(layer)
        if "diff_b" in layer.parts:
            biases[layer.module.bias] = layer.parts["diff_b"]
    shapes: dict[str, Shape] = {key: _common_shape(lora, layers) for key, layers in by_key.items()}
    shapes |= {key: lora.checkpoint.infos[name].shape for key, name in biases.items()}

    def read_delta(key: str, dtype: torch.dtype) -> Tensor:
        if key in biases:
            return lora.checkpoint.read(biases[key]).to(dtype)
        delta = torch.zeros(shapes[key], dtype=dtype)
        for layer in by_key[key]:
            part = layer.module.part
            rows = delta if part is None else delta.chunk(3)[part]
            if "diff" in layer.parts:
                rows.add_(lora.checkpoint.read(layer.parts["diff"]).to(dtype).reshape(rows.shape))
            if "up" in layer.parts:
                up, down, scale = truncated_factors(lora, layer.parts, rank)
                rows.add_((up.to(dtype) @ down.to(dtype).flatten(1)).reshape(rows.shape), alpha=scale)
        return delta

    return Offset(
        architecture=lora.architecture,
        name=lora.checkpoint.name,
        kind="lora",
        shapes=shapes,
        read_delta=read_delta,
        metadata=lora.checkpoint.metadata,
        unmatched=lora.unmatched,
    )


def open_offset(path: str | Path, expected: Architecture | None = None) -> tuple[Checkpoint, Offset]:
    """Open a LoRA or a dense offset file as an offset; the caller closes the checkpoint.

    Args:
        expected: as in `read_lora`.

    Raises:
        MismatchError: the file is neither.
    """
    checkpoint, lora = open_lora(path, expected)
    try:
        return checkpoint, lora_offset(lora) if lora else dense_offset(Model(checkpoint, expected="a LoRA or an offset file"))
    except BaseException:
        checkpoint.close()
        raise


def open_lora(path: str | Path, expected: Architecture | None = None) -> tuple[Checkpoint, LoraFile | None]:
    """Open a file and read it as a LoRA, where it is one; the caller closes the checkpoint. Raises as `read_lora`."""
    checkpoint = open_checkpoint(path)
    try:
        return checkpoint, read_lora(checkpoint, expected) if is_lora(checkpoint.infos) else None
    except BaseException:
        checkpoint.close()
        raise


@cache
def _alias_index(arch_name: str) -> Mapping[str, LoraModule]:
    """Every spelling of every module of an architecture -> the module."""
    arch = ARCHITECTURES[arch_name]
    index: dict[str, LoraModule] = {}
    for key in checkpoint_shapes(arch_name):
        for module in lora_modules(arch, key):
            for alias in lora_aliases(arch, module):
                index.setdefault(alias, module)
    return index


def group_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """File keys by module and part (`up`, `down`, `mid`, `alpha`, `diff`, `diff_b`), and keys with no known suffix."""
    grouped: dict[str, dict[str, str]] = {}
    unknown = []
    for key in keys:
        processor = _OLD_PROCESSOR.fullmatch(key)
        if processor:
            name = f"{processor[1]}.to_{processor[2]}" + (".0" if processor[2] == "out" else "")
            grouped.setdefault(name, {})[processor[3]] = key
            continue
        for suffix, part in _SUFFIXES.items():
            if key.endswith("." + suffix):
                grouped.setdefault(key[: -len(suffix) - 1], {})[part] = key
                break
        else:
            unknown.append(key)
    return grouped, unknown


def _recognise(grouped: Mapping[str, Mapping[str, str]], checkpoint: Checkpoint, expected: Architecture | None) -> Architecture:
    """The architecture whose module names match most. Ties: by shapes, what is wanted, metadata, the commoner one."""
    matches = {name: len(grouped.keys() & _alias_index(name).keys()) for name in ARCHITECTURES}
    most = max(matches.values())
    if not most:
        raise MismatchError(
            f"{checkpoint.path.name}: none of its {len(grouped)} modules belongs to a supported architecture "
            f"({', '.join(row.title for row in ARCHITECTURES.values())})"
        )
    tied = [ARCHITECTURES[name] for name, count in matches.items() if count == most]
    dimensions = {len(checkpoint.infos[p["down"]].shape) for m, p in grouped.items() if m.endswith("proj_in") and "down" in p}
    if len(dimensions) == 1:  # SD 1 and 2 share their names and differ in proj_in, a convolution or a linear layer
        other = "sd1" if dimensions == {2} else "sd2"
        tied = [row for row in tied if row.name != other] or tied
    if expected in tied:
        return expected
    version = checkpoint.metadata.get("ss_base_model_version", "")
    if checkpoint.metadata.get("ss_v2") == "True":
        version = "sd_v2"
    return next((row for row in tied if version and version.startswith(row.ss_base_model_version)), tied[0])


def _common_shape(lora: LoraFile, layers: list[LoraLayer]) -> Shape:
    """The shape of the weight that these layers change together.

    Raises:
        BadTensorError: they have different sizes.
    """
    shapes = [shape for layer in layers for shape in _delta_shapes(lora, layer)]
    sizes = {(shape[0], math.prod(shape)) for shape in shapes}
    if len(sizes) > 1:
        raise BadTensorError(
            f"{lora.checkpoint.path.name}: {' and '.join(dict.fromkeys(layer.module.name for layer in layers))} change one "
            f"weight but have the sizes {' and '.join(str(list(shape)) for shape in shapes)}; get the file again"
        )
    rows, *rest = shapes[0]
    return (3 * rows if layers[0].module.part is not None else rows, *rest)


def _delta_shapes(lora: LoraFile, layer: LoraLayer) -> Iterator[Shape]:
    """The shapes of a layer's own rows, by each of its parts that says so."""
    shapes = {part: lora.checkpoint.infos[key].shape for part, key in layer.parts.items()}
    if "up" in shapes:
        yield (shapes["up"][0], shapes["down"][1], *shapes.get("mid", shapes["down"])[2:])
    if "diff" in shapes:
        yield shapes["diff"]


def kohya_metadata(arch: Architecture, *, dim: str, alpha: str, conv_dim: str | None, title: str) -> dict[str, str]:
    """The entries that WebUIs read to show and to filter a LoRA: kohya's `ss_*` and Stability's `modelspec.*`."""
    arguments = {"conv_dim": conv_dim, "conv_alpha": conv_dim} if conv_dim else {}
    return {
        "ss_base_model_version": arch.ss_base_model_version,
        "ss_v2": str(arch.name == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
        **modelspec_metadata(arch, "lora", title),
        "dpo.version": __version__,
    }


def modelspec_metadata(arch: Architecture, kind: str, title: str) -> dict[str, str]:
    """Stability's `modelspec.*` entries of something that is added to a model of an architecture, such as a `lora`."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{arch.modelspec}/{kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
    }
