"""Made-up pairs of base and tuned files, in the form in which the real ones are published, at any size.

The base is a whole checkpoint in half precision, the tuned file a UNet in float32 with the names of diffusers. As in
life the base was rounded once from the float32 weights that the tuning began with. Every tensor of the UNet changes;
the offset of a matrix has a flat spectrum, sigma_i ~ i^-0.3, as preference tuning leaves it: no rank fits it cheaply.

One tensor is held at a time. Each is drawn from a seed and its own key, so neither order nor choice changes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from lib_dpo.errors import OutputError
from lib_dpo.families.arch import Shape
from lib_dpo.families.shapes import (
    Sizes,
    checkpoint_dtype,
    checkpoint_shapes,
    small,
    unet_diffusers_config,
    unet_name_pairs,
)
from lib_dpo.files.atomic import write_text_atomic
from lib_dpo.files.header import tensor_nbytes, torch_dtype
from lib_dpo.files.writer import SafetensorsWriter
from lib_dpo.progress import Progress, Steps

_METADATA = {"format": "pt"}
_ROOM_ON_DISK = 64 << 20  # beside the tensors: headers, and what other programs write meanwhile


def make_pair(
    arch: str,
    folder: str | Path,
    *,
    seed: int = 0,
    sizes: Sizes | None = None,
    offset_rms: float = 1e-4,
    weight_rms: float = 0.03,
    spectrum_exponent: float = 0.3,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Write `base.safetensors` and `unet/diffusion_pytorch_model.safetensors` (with its config.json) into a folder.

    Args:
        sizes: the widths; None for the real ones (SD 1.5: 2.1 + 3.4 GB, SDXL: 6.9 + 10.3 GB).
        offset_rms, weight_rms: of each tensor's offset, and of the weights, which norms have around 1.
        spectrum_exponent: a in sigma_i ~ i^-a.

    Returns:
        The paths of the base and of the tuned file.

    Raises:
        OutputError: a file exists already, or the disk has no room for both.
    """
    folder = Path(folder)
    base_path, tuned_path = folder / "base.safetensors", folder / "unet" / "diffusion_pytorch_model.safetensors"
    shapes, diffusers_names = checkpoint_shapes(arch, sizes), unet_name_pairs(arch)
    base_bytes = sum(tensor_nbytes(checkpoint_dtype(key), shape) for key, shape in shapes.items())
    tuned_bytes = sum(tensor_nbytes("F32", shapes[key]) for key in diffusers_names)
    _check_disk(folder, base_bytes + tuned_bytes)
    steps = Steps(sum(map(math.prod, shapes.values())), on_progress)
    with (
        _writer(base_path, base_bytes, shapes, overwrite=overwrite) as base,
        _writer(tuned_path, tuned_bytes, diffusers_names, overwrite=overwrite) as tuned,
    ):
        for key in sorted(shapes, key=_larger_items_first):
            weight = base_tensor(key, shapes[key], seed=seed, rms=weight_rms)
            base.add(key, weight.to(torch_dtype(checkpoint_dtype(key))))
            if key in diffusers_names:
                weight += offset_tensor(key, shapes[key], seed=seed, rms=offset_rms, exponent=spectrum_exponent)
                tuned.add(diffusers_names[key], weight)
            steps.advance(math.prod(shapes[key]), key)
        base.finish(_METADATA)
        tuned.finish(_METADATA)
    write_text_atomic(tuned_path.with_name("config.json"), json.dumps(unet_diffusers_config(arch, sizes), indent=2))
    return base_path, tuned_path


def small_pair(
    folder: str | Path, arch: str = "sd1", *, seed: int = 0, offset_rms: float = 1e-4, overwrite: bool = False
) -> tuple[Path, Path]:
    """The same pair with all keys and about a tenth of the widths, for tests."""
    with _one_thread():  # on a busy machine two threads that wait for each other take four times as long
        return make_pair(arch, folder, seed=seed, sizes=small(arch), offset_rms=offset_rms, overwrite=overwrite)


def base_tensor(key: str, shape: Shape, *, seed: int = 0, rms: float = 0.03) -> torch.Tensor:
    """The base's tensor of a canonical key before rounding, float32 (position ids: int64)."""
    name = key.rsplit(".", 1)[-1]
    if checkpoint_dtype(key) == "F32":
        return _schedule(name)
    if name == "position_ids":
        return torch.arange(shape[-1]).reshape(shape)
    if not shape:
        return torch.tensor(math.log(100))  # CLIP's logit_scale, which training stops there
    noise = torch.randn(shape, generator=_generator(seed, "base", key)).mul_(rms)
    is_norm = len(shape) == 1 and name == "weight"
    return noise.add_(1) if is_norm else noise


def offset_tensor(key: str, shape: Shape, *, seed: int = 0, rms: float = 1e-4, exponent: float = 0.3) -> torch.Tensor:
    """The offset of a canonical key, float32: a matrix (out, in*kh*kw) with sigma_i ~ i^-exponent, else plain noise.

    Q diag(i^-exponent) G, with Q orthogonal on the short side and G Gaussian. G's own spectrum comes on top: it is
    level where the matrix is long, and near a square one the last sigmas fall to 0.
    """
    offset = torch.randn(shape, generator=_generator(seed, "offset", key))
    if len(shape) > 1:
        matrix = offset.flatten(1)  # (out, in*kh*kw)
        short = min(matrix.shape)
        spectrum = _spectrum(short, seed, exponent)
        offset = (spectrum @ matrix if matrix.shape[0] == short else matrix @ spectrum.T).reshape(shape)
    return offset.mul_(rms * math.sqrt(offset.numel()) / float(torch.linalg.vector_norm(offset)))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _larger_items_first(key: str) -> int:
    """Readers like each tensor to begin at a multiple of its item size."""
    return -tensor_nbytes(checkpoint_dtype(key), (1,))


@lru_cache(maxsize=32)
def _spectrum(size: int, seed: int, exponent: float) -> torch.Tensor:
    """Q diag(i^-exponent), the same for all matrices of a short side: QR takes longer than all the rest."""
    q: torch.Tensor = torch.linalg.qr(torch.randn(size, size, generator=_generator(seed, "orthogonal", str(size))))[0]
    return q * torch.arange(1, size + 1).pow(-exponent)


def _generator(seed: int, purpose: str, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {purpose} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _schedule(name: str) -> torch.Tensor:
    """The constants of Stable Diffusion's noise schedule ("scaled linear") that checkpoints carry."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    constants = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "sigmas": ((1 - alphas_cumprod) / alphas_cumprod).sqrt(),
    }
    return constants[name].float()


def _writer(path: Path, nbytes: int, keys: Mapping[str, object], *, overwrite: bool) -> SafetensorsWriter:
    return SafetensorsWriter(path, overwrite=overwrite, expected_bytes=nbytes, max_tensors=len(keys), max_metadata_bytes=4096)


def _check_disk(folder: Path, nbytes: int) -> None:
    """Each writer sees only its own file; this asks for both at once."""
    nearest = next(each for each in Path(os.path.abspath(folder), "x").parents if each.is_dir())
    free, needed = shutil.disk_usage(nearest).free, nbytes + _ROOM_ON_DISK
    if free < needed:
        raise OutputError(
            f"{folder}: the two files need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some space or "
            "choose another folder"
        )
