"""A LoRA read as an offset: factors, their scale, and the dense deltas that are made from them when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError
from lib_dpo.families.arch import Architecture, Shape
from lib_dpo.families.model import Model
from lib_dpo.families.shapes import checkpoint_shapes
from lib_dpo.files.checkpoint import Checkpoint, open_checkpoint
from lib_dpo.maths.delta import Product, Term, Whole, total
from lib_dpo.offsets.lora.decompositions import LENGTHS, Form, dense_change, scaled_to_lengths
from lib_dpo.offsets.lora.file import LoraFile, LoraLayer, read_lora
from lib_dpo.offsets.lora.keys import is_lora
from lib_dpo.offsets.lora.scale import PeftSettings, form_scale
from lib_dpo.offsets.offset import Offset, dense_offset

_APART = ("diff_b", *LENGTHS)  # parts beside factors and alpha


def read_factors(
    checkpoint: Checkpoint, parts: Mapping[str, str], settings: PeftSettings | None
) -> tuple[Tensor, Tensor, float]:
    """One module's up (out, rank), down (rank, in, kh, kw) or (rank, in), and its scale alpha / rank.

    In the stored dtype, but float8 as float16, or as float32 where it is all exponent: few operations take float8.
    A `mid` factor (CP decomposition) is multiplied into `down`, in float32.

    Args:
        parts: file keys by part, as `group_keys` gives them and `check_module` has found good.
        settings: of the file, as `read_settings` gives them.

    Raises:
        BadTensorError: NaN or Inf, by key.
    """
    for part in parts.keys() & {"up", "down", "mid", "alpha"}:
        _finite(checkpoint, parts[part])
    up, down = (_without_float8(checkpoint.read(parts[side])) for side in ("up", "down"))
    up, rank = up.flatten(1), down.shape[0]  # that of `down` counts, also where a core has more rows than columns
    if "mid" in parts:
        mid = checkpoint.read(parts["mid"]).float()  # (rank, rank, kh, kw)
        down = torch.einsum("abhw,bi->aihw", mid, down.float().flatten(1))
    return up, down, form_scale(checkpoint, settings, parts, rank).value


def _without_float8(factor: Tensor) -> Tensor:
    if factor.element_size() > 1:
        return factor
    return factor.float() if "e8m0" in str(factor.dtype) else factor.half()  # which holds all numbers of the other kinds


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


def read_decomposed(
    checkpoint: Checkpoint, parts: Mapping[str, str], form: Form, settings: PeftSettings | None, weight: Tensor | None = None
) -> Whole:
    """What a LoHa, LoKr or GLoRA adds, with its scale, without DoRA; as `dense_change`.

    Args:
        parts, form: of one module, as `read_modules` gives them. settings: of the file.

    Raises:
        BadTensorError: NaN or Inf, by key.
    """
    factors = {part: _finite(checkpoint, key) for part, key in parts.items() if part not in _APART}
    return dense_change(form, factors, form_scale(checkpoint, settings, parts, form.rank).value, weight)


def read_change(lora: LoraFile, layer: LoraLayer, weight: Tensor | None = None) -> Whole:
    """What a layer adds to its weight, in one piece, and in the orientation of its canonical weight.

    float64, but for a whole difference and a LoKr of a number and a matrix, which come as they are stored.

    Args:
        layer: of any form; one without a form has no change.
        weight: the layer's rows of the canonical weight that it is added to. DoRA and GLoRA need it.

    Raises:
        BadTensorError: NaN or Inf, by key; lengths of another weight.
    """
    form = layer.form
    assert form is not None, "a bias alone changes no weight"
    own = weight.T if weight is not None and layer.module.transposed else weight
    if form.name == "LoRA":
        up, down, scale = read_factors(lora.checkpoint, layer.parts, lora.settings)
        change = Whole(total([Product(up, down.flatten(1), scale)], form.shape, torch.float64))
    elif form.name == "a whole difference":
        change = Whole(lora.checkpoint.read(layer.parts["diff"]))
    else:
        change = read_decomposed(lora.checkpoint, layer.parts, form, lora.settings, own)
    part = next((part for part in LENGTHS if part in layer.parts), None)
    if part is not None:
        assert own is not None, "DoRA is asked for with its weight"
        key = layer.parts[part]
        dense = total([change], form.shape, torch.float64)
        change = Whole(
            scaled_to_lengths(own, dense, part, _finite(lora.checkpoint, key), f"{lora.checkpoint.path.name}: {key}")
        )
    return replace(change, values=change.values.T) if layer.module.transposed else change


def lora_offset(lora: LoraFile, rank: int | None = None) -> Offset:
    """A LoRA as an offset: deltas are made when they are read, up @ down * alpha / rank, or what else its parts make up.

    Args:
        rank: keep the strongest components of each pair only, as in `truncated_factors`. Not for one that is bound to a model.
    """
    by_key: dict[str, list[LoraLayer]] = {}
    biases: dict[str, str] = {}
    for layer in lora.layers:
        if layer.form is not None:
            by_key.setdefault(layer.module.key, []).append(layer)
        if "diff_b" in layer.parts:
            biases[layer.module.bias] = layer.parts["diff_b"]
    shapes: dict[str, Shape] = {key: _common_shape(lora, layers) for key, layers in by_key.items()}
    shapes |= {key: lora.checkpoint.infos[name].shape for key, name in biases.items()}
    bound = {key: form.bound for key, layers in by_key.items() for layer in layers if (form := layer.form) and form.bound}

    def terms(key: str, weight: Tensor | None = None) -> list[Term]:
        if key in biases:
            return [Whole(lora.checkpoint.read(biases[key]))]
        found: list[Term] = []
        for layer in by_key[key]:
            rows = shapes[key][0] // (1 if layer.module.part is None else 3)
            first_row = (layer.module.part or 0) * rows
            if layer.form and layer.form.name == "LoRA" and not layer.form.bound:
                up, down, scale = truncated_factors(lora, layer, rank)
                found.append(Product(up, down.flatten(1), scale, first_row))
            else:
                own = None if weight is None else weight[first_row : first_row + rows]
                found.append(replace(read_change(lora, layer, own), first_row=first_row))
        return found

    return Offset(
        checkpoint=lora.checkpoint,
        architecture=lora.architecture,
        kind="lora",
        shapes=shapes,
        terms=terms,
        unmatched=lora.unmatched,
        twins=lora.twins,
        bound=bound,
        terms_on=terms,
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


def _finite(checkpoint: Checkpoint, key: str) -> Tensor:
    """The tensor of a key as it is stored. Raises BadTensorError for NaN or Inf in it."""
    tensor = checkpoint.read(key)
    if not bool(torch.isfinite(tensor.float()).all()):
        raise BadTensorError(
            f"{checkpoint.path.name}: {key} holds NaN or Inf, expected finite numbers; the file is damaged, get it again"
        )
    return tensor


def _common_shape(lora: LoraFile, layers: list[LoraLayer]) -> Shape:
    """The shape of the weight that these layers change together.

    Raises:
        BadTensorError: they have different sizes.
    """
    shapes = [layer.form.shape for layer in layers if layer.form]
    sizes = {(shape[0], math.prod(shape)) for shape in shapes}
    if len(sizes) > 1:
        raise BadTensorError(
            f"{lora.checkpoint.path.name}: {' and '.join(dict.fromkeys(layer.module.name for layer in layers))} change one "
            f"weight but have the sizes {' and '.join(str(list(shape)) for shape in shapes)}; get the file again"
        )
    module = layers[0].module
    rows, *rest = shapes[0]
    if module.transposed:
        return (*rest, rows)
    kernel = checkpoint_shapes(lora.architecture.name)[module.key][2:]
    if len(rest) == 1 and math.prod(kernel) > 1 and rest[0] % math.prod(kernel) == 0:  # a convolution's columns in a row
        rest = [rest[0] // math.prod(kernel), *kernel]
    return (3 * rows if module.part is not None else rows, *rest)
