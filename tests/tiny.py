"""Tiny models with all real keys, written in the layouts that files come in, and the command line called in process."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lib_dpo.cli.main import main
from lib_dpo.errors import DpoError
from lib_dpo.families.arch import ARCHITECTURES, TextEncoder
from lib_dpo.families.keymap import UNET, VAE, vae_to_diffusers
from lib_dpo.families.shapes import Sizes, checkpoint_shapes, unet_name_pairs
from lib_dpo.families.synthetic import base_tensor, offset_tensor

Tensors = dict[str, torch.Tensor]
SHORT_FORM = 24
FAULTS = int(os.environ.get("DPO_FAULTS", SHORT_FORM))  # how often each kind of fault happens; `make faults` sets it
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

WIDTH = 8  # of the UNet's first level: no matrix of sd1 or sdxl is wider than 4 * WIDTH on its short side
LARGEST_RANK = 4 * WIDTH
_TEXT = {"sdxl": (8, 16), "koala": (8, 16)}  # others: one encoder


def sizes(arch: str, *, in_channels: int = 4, width: int = WIDTH) -> Sizes:
    return Sizes(width, _TEXT.get(arch, (16,)), in_channels=in_channels, vocabulary=16, size_embedding=4, vae=4)


@lru_cache(maxsize=16)
def _weights(arch: str, seed: int, *, in_channels: int, width: int) -> Tensors:
    shapes = checkpoint_shapes(arch, sizes(arch, in_channels=in_channels, width=width))
    return {key: base_tensor(key, shape, seed=seed) for key, shape in shapes.items()}


def exact_base(arch: str = "sd1", *, seed: int = 0, in_channels: int = 4, width: int = WIDTH) -> Tensors:
    """A whole checkpoint by canonical keys, float32 with values that float16 does not hold."""
    return dict(_weights(arch, seed, in_channels=in_channels, width=width))


def base(arch: str = "sd1", *, seed: int = 0, in_channels: int = 4, width: int = WIDTH) -> Tensors:
    """The same rounded to float16, in float32: all copies of it hold equal numbers, whatever their dtype."""
    return rounded(exact_base(arch, seed=seed, in_channels=in_channels, width=width), torch.float16)


def tuned(arch: str = "sd1", *, rms: float = 1e-4, seed: int = 0) -> Tensors:
    """What tuning made of the base: every UNet tensor changed in float32, the rest as in `base`."""
    exact = exact_base(arch, seed=seed)
    return {
        key: exact[key] + offset_tensor(key, exact[key].shape, seed=seed, rms=rms) if key.startswith(UNET) else tensor
        for key, tensor in base(arch, seed=seed).items()
    }


def rounded(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Tensors:
    return {key: tensor.to(dtype).float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def only_unet(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(UNET)}


# ---- layouts ----


def save(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A .safetensors file, its floating-point tensors in one dtype. Written by the library, not by us."""
    path.parent.mkdir(parents=True, exist_ok=True)
    converted = {
        key: (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous().clone()
        for key, tensor in tensors.items()
    }
    save_file(converted, path, metadata=dict(metadata or {"format": "pt"}))
    return path


def in_diffusers(arch: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The UNet of canonical tensors under the names of diffusers."""
    names = unet_name_pairs(arch)
    return {names[key]: tensor for key, tensor in tensors.items() if key in names}


def save_folder(
    path: Path, arch: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None, *, shards: int = 1
) -> Path:
    """A diffusers folder: UNet, text encoders and VAE."""
    _save_sharded(path / "unet", in_diffusers(arch, tensors), dtype, shards)
    for encoder in ARCHITECTURES[arch].text_encoders:
        save(path / encoder.folder / "model.safetensors", in_transformers(encoder, tensors), dtype)
    vae = {vae_to_diffusers(key): tensor for key, tensor in tensors.items() if key.startswith(VAE)}
    flat = {str(key): t.flatten(1) if ".attentions." in str(key) and t.ndim > 1 else t for key, t in vae.items()}
    save(path / "vae" / "diffusion_pytorch_model.safetensors", flat, dtype)
    return path


def _save_sharded(folder: Path, tensors: Tensors, dtype: torch.dtype | None, shards: int) -> None:
    stem, keys = "diffusion_pytorch_model", list(tensors)
    if shards == 1:
        save(folder / f"{stem}.safetensors", tensors, dtype)
        return
    weight_map = {}
    for n in range(shards):
        name = f"{stem}-{n + 1:05d}-of-{shards:05d}.safetensors"
        save(folder / name, {key: tensors[key] for key in keys[n::shards]}, dtype)
        weight_map |= dict.fromkeys(keys[n::shards], name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_OPEN_CLIP = {"ln_final.": "final_layer_norm.", "token_embedding.": "embeddings.token_embedding."}


def in_transformers(encoder: TextEncoder, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """One text encoder under the names of transformers, which splits open_clip's q, k, v and transposes its projection."""
    own = {key[len(encoder.prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(encoder.prefix)}
    if encoder.naming == "hf":
        return {"text_model." + key: tensor for key, tensor in own.items() if not key.endswith("position_ids")}
    found: Tensors = {}
    for key, tensor in own.items():
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)", key)
        if layer:
            number, part, kind = layer[1], layer[2].rstrip("._"), layer[3]
            head = f"text_model.encoder.layers.{number}."
            if part == "attn.in_proj":
                rows = zip("qkv", tensor.chunk(3), strict=True)
                found |= {f"{head}self_attn.{letter}_proj.{kind}": piece for letter, piece in rows}
            else:
                found[f"{head}{_LAYER.get(part, part.replace('attn.', 'self_attn.'))}.{kind}"] = tensor
        elif key == "positional_embedding":
            found["text_model.embeddings.position_embedding.weight"] = tensor
        elif key == "text_projection":
            found["text_projection.weight"] = tensor.T
        else:
            known = next((new + key[len(old) :] for old, new in _OPEN_CLIP.items() if key.startswith(old)), None)
            if known:
                found["text_model." + known] = tensor
    return found


# ---- the command line ----


def run(*args: object) -> int:
    """One command in this process; argparse leaves by SystemExit."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)


def run_openly(*args: object) -> int:
    """The same, but what nobody foresaw comes out as it is."""
    try:
        return run(*args, "--debug")
    except DpoError:
        return 2


def figures(path: Path, *args: object) -> dict[str, Any]:
    """The figures of a command that must succeed, from its --json."""
    assert run(*args, "--json", path) == 0
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """JSON as the standard has it, without NaN and Infinity."""

    def refuse(text: str) -> Any:
        raise AssertionError(f"{text} is no JSON")

    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder, hidden files too, with its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
