"""A LoRA read as an offset: factors, their scale, and the dense deltas that are made from them when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError
from lib_dpo.families.arch import Architecture, Shape
from lib_dpo.families.model import Model
from lib_dpo.files.checkpoint import Checkpoint, open_checkpoint
from lib_dpo.maths.delta import Product, Term, Whole
from lib_dpo.offsets.lora.file import LoraFile, LoraLayer, read_lora
from lib_dpo.offsets.lora.keys import is_lora
from lib_dpo.offsets.lora.scale import PeftSettings, pair_scale
from lib_dpo.offsets.offset import Offset, dense_offset


def read_factors(
    checkpoint: Checkpoint, parts: Mapping[str, str], settings: PeftSettings | None
) -> tuple[Tensor, Tensor, float]:
    """One module's up (out, rank), down (rank, in, kh, kw) or (rank, in), and its scale alpha / rank.

    In the stored dtype, but float8 as float16, which holds all numbers of every kind of it: few operations take float8.
    A `mid` factor (CP decomposition) is multiplied into `down`, in float32.

    Args:
        parts: file keys by part, as `group_keys` gives them and `check_module` has found good.
        settings: of the file, as `read_settings` gives them.

    Raises:
        BadTensorError: NaN or Inf, by key.
    """
    for part in parts.keys() & {"up", "down", "mid", "alpha"}:
        if not bool(torch.isfinite(checkpoint.read(parts[part]).float()).all()):
            raise BadTensorError(
                f"{checkpoint.path.name}: {parts[part]} holds NaN or Inf, expected finite numbers; the file is damaged, "
                "get it again"
            )
    up, down = (_without_float8(checkpoint.read(parts[side])) for side in ("up", "down"))
    up = up.flatten(1)
    if "mid" in parts:
        mid = checkpoint.read(parts["mid"]).float()  # (rank, rank, kh, kw)
        down = torch.einsum("abhw,bi->aihw", mid, down.float().flatten(1))
    return up, down, pair_scale(checkpoint, settings, parts, down.shape[0]).value


def _without_float8(factor: Tensor) -> Tensor:
    return factor.half() if factor.element_size() == 1 else factor


def truncated_factors(lora: LoraFile, layer: LoraLayer, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Factors and scale of a layer in the orientation of its canonical weight, the strongest `rank` components only.

    alpha / rank, and so the scale, stays. Files of ours hold the components in falling order; others are brought into it
    from their factors alone (float32 then).

    Args:
        rank: None, or at least the layer's own: all of them.
    """
    up, down, scale = read_factors(lora.checkpoint, layer.parts, lora.settings)
    if rank is not None and rank < down.shape[0]:
        if lora.checkpoint.metadata.get("dpo.kind") != "lora":
            from lib_dpo.maths.lowrank import recompress

            U, S, Vh = recompress(up, down.flatten(1))
            root = S.sqrt()
            up, down = (U * root).float(), (root[:, None] * Vh).float().reshape(-1, *down.shape[1:])
        up, down = up[:, :rank], down[:rank]
    return (down.T, up.T, scale) if layer.module.transposed else (up, down, scale)


def read_difference(lora: LoraFile, layer: LoraLayer) -> Tensor:
    """The whole difference of a layer that has one in place of factors, in the orientation of its canonical weight."""
    difference = lora.checkpoint.read(layer.parts["diff"])
    return difference.T if layer.module.transposed else difference


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

    def terms(key: str) -> list[Term]:
        if key in biases:
            return [Whole(lora.checkpoint.read(biases[key]))]
        found: list[Term] = []
        for layer in by_key[key]:
            first_row = (layer.module.part or 0) * (shapes[key][0] // 3)
            if "diff" in layer.parts:
                found.append(Whole(read_difference(lora, layer), first_row))
            if "up" in layer.parts:
                up, down, scale = truncated_factors(lora, layer, rank)
                found.append(Product(up, down.flatten(1), scale, first_row))
        return found

    return Offset(
        checkpoint=lora.checkpoint,
        architecture=lora.architecture,
        kind="lora",
        shapes=shapes,
        terms=terms,
        unmatched=lora.unmatched,
        twins=lora.twins,
    )


def open_offset(path: str | Path, expected: Architecture | None = None) -> Offset:
    """Open a LoRA or a dense offset file as an offset; the caller closes it (or uses it in a `with`).

    Args:
        expected: as in `read_lora`.

    Raises:
        MismatchError: the file is neither.
    """
    checkpoint, lora = open_lora(path, expected)
    try:
        return lora_offset(lora) if lora else dense_offset(Model(checkpoint, expected="a LoRA or an offset file"))
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
    if layers[0].module.transposed:
        return (*rest, rows)
    return (3 * rows if layers[0].module.part is not None else rows, *rest)


def _delta_shapes(lora: LoraFile, layer: LoraLayer) -> Iterator[Shape]:
    """The shapes of a layer's own rows, by each of its parts that says so."""
    shapes = {part: lora.checkpoint.infos[key].shape for part, key in layer.parts.items()}
    if "up" in shapes:
        yield (shapes["up"][0], shapes["down"][1], *shapes.get("mid", shapes["down"])[2:])
    if "diff" in shapes:
        yield shapes["diff"]
