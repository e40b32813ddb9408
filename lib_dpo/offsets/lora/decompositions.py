"""What the parts of one module of a LoRA file make up: a pair, LoHa, LoKr, GLoRA or a whole difference, with or without DoRA.

LoHa is the element-wise product of two products, LoKr the Kronecker product of two matrices, each whole or a product of its
own; a product of a convolution may have a core between its factors (Tucker, CP). GLoRA multiplies the weight too, W A + B. DoRA
sets the length of each row or column of the weight plus any of these. Of the last two, the change depends on the weight.

The trainers define them: KohakuBlueleaf/LyCORIS (modules/loha.py, lokr.py, glora.py, functional/general.py), huggingface/peft
(tuners/loha/layer.py, tuners/lokr/layer.py, tuners/lora/dora.py). WebUIs and ComfyUI read LoHa and LoKr alike. They differ in:

- GLoRA: AUTOMATIC1111 1.10 reads the layout before LyCORIS 2 alone, and leaves alpha out; ComfyUI and Forge tell both apart.
- DoRA by rows: ComfyUI and Forge divide by the length of the weight without the change, AUTOMATIC1111 by that of its columns;
  here, as in the trainers, by the length of what is scaled. DoRA by columns is the same everywhere.
- Strength: of DoRA, all of them add strength times the difference between scaled weight and weight, and so it is here. LyCORIS
  itself scales the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError, MismatchError
from lib_dpo.families.arch import Shape
from lib_dpo.maths.delta import Whole

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_FORMS: Mapping[str, tuple[str, ...]] = {
    "LoRA": ("up", "down", "mid"),
    "LoHa": LOHA,
    "LoKr": LOKR,
    "GLoRA": ("a1", "a2", "b1", "b2"),
    "a whole difference": ("diff",),
}
_LOKR_SIDES = ("lokr_w1", "lokr_w2")
_RIVALS = {"up": "a pair", "down": "a pair", "mid": "a pair", "diff": "a whole difference"}
_ROWS = 256  # of a LoHa, multiplied at once
LENGTHS = ("dora_scale", "magnitude")  # of kohya's and LyCORIS's files; of PEFT's, which are those of rows


@dataclass(frozen=True)
class Form:
    """What a module's parts make up, from their shapes alone.

    `shape` is (out, in), (out, in, kh, kw) or (out, in * kh * kw). `rank` is what alpha is divided by: None where alpha has no
    meaning, of a whole difference and of a LoKr of two whole matrices. `bound` is DoRA or GLoRA where the change depends on the
    weight that it is added to, else "".
    """

    name: str
    shape: Shape
    rank: int | None
    bound: str


def form_name(parts: Mapping[str, str], name: str) -> str | None:
    """Which form the parts of a module are of; None for one that has an alpha or a bias alone.

    Args:
        parts: file keys by part.
        name: of file and module, for messages.

    Raises:
        MismatchError: a part without those that belong to it, or two forms in one module.
    """
    found = [form for form, own in _FORMS.items() if parts.keys() & set(own)]
    lengths = [part for part in LENGTHS if part in parts]
    _check_rivals(parts, [[part for part in _FORMS[form] if part in parts][:1] for form in found], name)
    if lengths and (not found or found[0] == "a whole difference"):
        raise MismatchError(
            f"{name} has {parts[lengths[0]]} (DoRA) without a pair, LoHa or LoKr that it belongs to; the file is incomplete, "
            "get it again"
        )
    if not found:
        return None
    for part, needed in _needs(found[0], parts):
        if needed not in parts:
            has = f"only its {part} factor" if found[0] == "LoRA" else f"{parts[part]} but no {_word(needed)}"
            raise MismatchError(f"{name} has {has}; the file is incomplete, get it again")
    return found[0]


def form_of(parts: Mapping[str, str], shapes: Mapping[str, Shape], name: str) -> Form | None:
    """The form of a module and what it changes, from shapes alone; None for one that has an alpha or a bias alone.

    Args:
        parts: file keys by part. shapes: by part; a matrix at least of each factor.
        name: of file and module, for messages.

    Raises:
        MismatchError: as `form_name`.
        BadTensorError: parts whose shapes do not fit together, by key.
    """
    form = form_name(parts, name)
    if form is None:
        return None
    shape, rank = _LAYOUTS[form](_Parts(parts, shapes, name))
    lengths = [part for part in LENGTHS if part in parts]
    for part in lengths:
        _by_rows(part, shapes[part], shape, f"{name}: {parts[part]}")
    return Form(form, shape, rank, "DoRA" if lengths else "GLoRA" if form == "GLoRA" else "")


def dense_change(form: Form, tensors: Mapping[str, Tensor], scale: float, weight: Tensor | None = None) -> Whole:
    """scale times what LoHa, LoKr or GLoRA parts make up, float64; a LoKr of a number and a matrix as it is stored.

    float64, though float32 is near enough for pictures: a bake rounds the exact sum once, and finds its doubtful values by it.

    Args:
        tensors: by part, in their stored dtypes.
        weight: that GLoRA is for, of any float dtype.
    """
    if form.name == "LoHa":
        return _hadamard(tensors, scale)
    if form.name == "LoKr":
        return _kronecker(tensors, scale)
    assert form.name == "GLoRA", "pairs and differences need no making"
    assert weight is not None, "GLoRA is asked for with its weight"
    return Whole(_of_weight(tensors, weight.double().reshape(form.shape)).mul_(scale))


def scaled_to_lengths(weight: Tensor, change: Tensor, part: str, lengths: Tensor, name: str) -> Tensor:
    """What DoRA adds to a weight: the weight plus the change, each row or column scaled to its length, less the weight.

    Args:
        weight: (out, in) or (out, in, kh, kw), of any float dtype. change: as many values.
        part: `dora_scale` or `magnitude`. lengths: that part.
        name: of the file and the key of the lengths, for messages.

    Returns:
        float64, in the shape of the weight.

    Raises:
        BadTensorError: as many lengths as the weight has neither rows nor columns.
    """
    before = weight.double()
    sums = before + change.double().reshape(before.shape)
    by_rows = _by_rows(part, tuple(lengths.shape), tuple(before.shape), name)
    axis, others = (0, list(range(1, before.ndim))) if by_rows else (1, [0, *range(2, before.ndim)])
    if lengths.numel() != before.shape[axis]:
        raise BadTensorError(
            f"{name} has {lengths.numel()} lengths for a weight of {list(before.shape)}; expected {before.shape[axis]}: the "
            "file was made for another model"
        )
    own = torch.linalg.vector_norm(sums, dim=others, keepdim=True)
    tall = [1] * before.ndim
    tall[axis] = -1
    return sums.mul_(torch.where(own == 0, own, lengths.double().reshape(tall) / own)).sub_(before)


# ---- which parts belong together ----


def _check_rivals(parts: Mapping[str, str], forms: Sequence[Sequence[str]], name: str) -> None:
    """Refuse parts that say the same thing in two ways. Raises MismatchError.

    Args:
        forms: of each form that is there its first part.
    """
    rivals = [[part for first in forms for part in first], [part for part in LENGTHS if part in parts]]
    rivals += [[part for part in (side, f"{side}_a", f"{side}_b") if part in parts] for side in _LOKR_SIDES if side in parts]
    for own in rivals:
        if len(own) > 1:
            one, other = (f"{_RIVALS.get(part, 'a decomposition')} ({parts[part]})" for part in own[:2])
            raise MismatchError(f"{name} has {one} and {other}; programs take the one or the other: expected one of them")


def _needs(form: str, parts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """A part that is there, with one that it cannot be without."""
    there = next(part for part in _FORMS[form] if part in parts)
    if form == "LoRA":
        yield from ((there, "up"), (there, "down"))
    elif form == "LoHa":
        cores = [part for part in LOHA[4:] if part in parts]
        yield from ((there, part) for part in LOHA[:4])
        yield from ((core, part) for core in cores for part in LOHA[4:])
    elif form == "GLoRA":
        yield from ((there, part) for part in _FORMS[form])
    elif form == "LoKr":
        for side, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2")):
            factors = (f"{side}_a", f"{side}_b")
            in_factors = [part for part in (*factors, core) if part in parts]
            yield from ((part, factor) for part in in_factors for factor in factors)
            if not in_factors:
                yield there, side


def _word(part: str) -> str:
    return f"{part}.weight" if part in _FORMS["GLoRA"] else part


# ---- shapes ----


class _Parts:
    """The parts of one module by name, and the words for what is wrong with them."""

    def __init__(self, keys: Mapping[str, str], shapes: Mapping[str, Shape], name: str) -> None:
        self.keys, self.shapes, self.name = keys, shapes, name

    def unfit(self, part: str, expected: str) -> BadTensorError:
        return BadTensorError(
            f"{self.name}: {self.keys[part]} has the shape {list(self.shapes[part])}, expected {expected}; the file is "
            "damaged, get it again"
        )

    def product(self, a: str, b: str, t: str = "") -> tuple[Shape, int]:
        """The shape of a @ b, or with the core t between them, and its rank, that of b. Raises BadTensorError."""
        left, right = self.shapes[a], self.shapes[b]
        if t not in self.shapes:
            if len(left) < 2 or math.prod(left[2:]) != 1:
                raise self.unfit(a, "rows by rank")
            if len(right) < 2 or right[0] != left[1]:
                raise self.unfit(b, f"{left[1]} rows, the columns of {self.keys[a]}")
            return (left[0], *right[1:]), right[0]
        core = self.shapes[t]
        if len(core) != 4:
            raise self.unfit(t, "a core of four dimensions")
        for part, rows in ((a, core[0]), (b, core[1])):
            if len(self.shapes[part]) != 2 or self.shapes[part][0] != rows:
                raise self.unfit(part, f"{rows} rows, as the core {self.keys[t]} has")
        return (left[1], right[1], *core[2:]), right[0]


def _lora(parts: _Parts) -> tuple[Shape, int]:
    up, down = parts.shapes["up"], parts.shapes["down"]
    inner = parts.shapes["mid"][:2] if "mid" in parts.keys else (down[0], down[0])
    if (math.prod(up[1:]), down[0]) != inner or ("mid" in parts.keys and math.prod(down[2:]) != 1):
        raise BadTensorError(
            f"{parts.name} has {math.prod(up[1:])} columns up but {down[0]} rows down; both must equal its rank: the file is "
            "damaged, get it again"
        )
    return (up[0], down[1], *parts.shapes.get("mid", down)[2:]), down[0]


def _loha(parts: _Parts) -> tuple[Shape, int]:
    shape, rank = parts.product("hada_w1_a", "hada_w1_b", "hada_t1")
    other, _ = parts.product("hada_w2_a", "hada_w2_b", "hada_t2")
    if (other[0], math.prod(other)) != (shape[0], math.prod(shape)):
        raise parts.unfit("hada_w2_b", f"that it makes {list(shape)} with {parts.keys['hada_w2_a']}, as w1 does")
    return shape, rank


def _lokr(parts: _Parts) -> tuple[Shape, int | None]:
    sides: list[tuple[Shape, int | None]] = []
    for side, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2")):
        if side in parts.keys:
            if len(parts.shapes[side]) not in ((2,) if side == "lokr_w1" else (2, 4)):
                raise parts.unfit(side, "a matrix" if side == "lokr_w1" else "a matrix or the weight of a convolution")
            sides.append((parts.shapes[side], None))
        else:
            sides.append(parts.product(f"{side}_a", f"{side}_b", core))
    (one, first), (other, second) = sides
    if len(one) != 2:
        raise parts.unfit("lokr_w1_b", "a matrix")
    return (one[0] * other[0], one[1] * other[1], *other[2:]), second or first


def _glora(parts: _Parts) -> tuple[Shape, int]:
    a1, a2, b1, b2 = (parts.shapes[part] for part in ("a1", "a2", "b1", "b2"))
    new, old = a1[1] == a2[0] == b1[1] == b2[0], a1[0] == a2[1] == b1[0] == b2[1]
    if new and old and a1[0] == a1[1]:
        raise parts.unfit("a1", "a rank below the size of the layer: LyCORIS had two orders, which cannot be told apart here")
    if not new and not old:
        raise parts.unfit("a2", f"one rank in all four, and {[a1[1], a1[0]]} here, the other way round than {parts.keys['a1']}")
    is_old = _is_old(a1, a2, b1, b2)
    shape, rank = parts.product("b2", "b1") if is_old else parts.product("b1", "b2")
    size, columns = (a1[1], math.prod(shape[1:])) if is_old else (a1[0], shape[1])
    for part in ("a1", "a2"):
        if math.prod(parts.shapes[part]) != rank * columns or columns != size:
            raise parts.unfit(part, f"{rank} by {columns}, as b1 and b2 have")
    return shape, rank


def _is_old(a1: Shape, a2: Shape, b1: Shape, b2: Shape) -> bool:
    """Whether the order is that before LyCORIS 2, W a2 a1 + b2 b1. Where both fit, the rank is the smaller size."""
    new, old = a1[1] == a2[0] == b1[1] == b2[0], a1[0] == a2[1] == b1[0] == b2[1]
    return old and (not new or a1[0] < a1[1])


_LAYOUTS: Mapping[str, Callable[[_Parts], tuple[Shape, int | None]]] = {
    "LoRA": _lora,
    "LoHa": _loha,
    "LoKr": _lokr,
    "GLoRA": _glora,
    "a whole difference": lambda parts: (parts.shapes["diff"], None),
}


def _by_rows(part: str, lengths: Shape, shape: Shape, name: str) -> bool:
    """Whether lengths are those of rows: PEFT's always, (out, 1, …) of others; (1, in, …) are those of columns.

    Raises:
        BadTensorError: they are neither.
    """
    rows, several = shape[0], [length for length in lengths if length != 1]
    if part == "magnitude" and (several or [1]) == [rows]:
        return True
    if part == "dora_scale" and len(lengths) > 1:
        if lengths[0] == rows and math.prod(lengths[1:]) == 1:
            return True
        if lengths[0] == 1 and math.prod(lengths[2:]) == 1:
            return False
    wanted = f"[{rows}]" if part == "magnitude" else f"[{rows}, 1] for rows or [1, columns] for columns"
    raise BadTensorError(f"{name} has the shape {list(lengths)}, expected {wanted}; the file is damaged, get it again")


# ---- numbers ----


def _product(tensors: Mapping[str, Tensor], a: str, b: str, t: str = "") -> Tensor:
    """a @ b, or with the core t between them, float64: (out, in, kh, kw), or (out, the columns of b)."""
    left, right = tensors[a].double(), tensors[b].double()
    if t in tensors:
        return torch.einsum("abhw,ao,bi->oihw", tensors[t].double(), left, right)
    return (left.flatten(1) @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])


def _hadamard(tensors: Mapping[str, Tensor], scale: float) -> Whole:
    first = _product(tensors, "hada_w1_a", "hada_w1_b", "hada_t1")
    if "hada_t2" in tensors:
        second = _product(tensors, "hada_w2_a", "hada_w2_b", "hada_t2")
        return Whole(first.mul_(second.reshape(first.shape)).mul_(scale))
    left, right = (tensors[part].double().flatten(1) for part in ("hada_w2_a", "hada_w2_b"))
    for rows, own in zip(torch.split(first.flatten(1), _ROWS), torch.split(left, _ROWS), strict=True):
        rows.mul_(own @ right).mul_(scale)  # no second matrix, which takes 240 MB in the largest layers of SDXL
    return Whole(first)


def _kronecker(tensors: Mapping[str, Tensor], scale: float) -> Whole:
    first = tensors["lokr_w1"] if "lokr_w1" in tensors else _product(tensors, "lokr_w1_a", "lokr_w1_b")
    second = tensors["lokr_w2"] if "lokr_w2" in tensors else _product(tensors, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    if first.numel() == 1:
        return Whole(second, scale=float(first) * scale)
    first = first.double().reshape(*first.shape, *[1] * (second.ndim - 2))
    return Whole(torch.kron(first, second.double().contiguous()).mul_(scale))


def _of_weight(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """GLoRA's W A + B; W float64 in the shape of the form."""
    shapes = [tuple(tensors[part].shape) for part in ("a1", "a2", "b1", "b2")]
    a1, a2, b1, b2 = (tensors[part].double().flatten(1) for part in ("a1", "a2", "b1", "b2"))
    if _is_old(*shapes):
        return (weight.flatten(1) @ a2 @ a1).add_(b2 @ b1).reshape(weight.shape)
    return torch.einsum("oi...,ij->oj...", weight, a1 @ a2).add_((b1 @ b2).reshape(weight.shape))
