"""The two forms of a LoRA: factors of chosen ranks, or the whole change of each layer, a byte for each weight.

A form turns layers into tensors by the names that go behind the module's, with what these numbers miss of the change.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lib_dpo.errors import SettingError
from lib_dpo.families.keymap import FIRST_CONVOLUTION
from lib_dpo.maths.devices import batch_size, is_out_of_memory, release
from lib_dpo.maths.fp8 import LARGEST_PRODUCT, Extent, factor_scale
from lib_dpo.maths.int8 import quantised
from lib_dpo.maths.lowrank import Factors, energy
from lib_dpo.maths.precision import dtype_of
from lib_dpo.maths.threads import AHEAD, Scratch, side_by_side
from lib_dpo.offsets.layers import Layer
from lib_dpo.offsets.lora.alphas import encoder_of, readable_alphas
from lib_dpo.offsets.offset import Pair
from lib_dpo.operations.decompose import Decomposer
from lib_dpo.operations.measure import Row, measure
from lib_dpo.operations.rank_plan import asked_rank, entry_bytes, plan_ranks
from lib_dpo.progress import Steps
from lib_dpo.settings import ExtractSettings

DOWN, UP = "lora_down.weight", "lora_up.weight"
_MOST_MISSED = 5e-4  # of what a layer's energy is without outliers, beyond which it is written in more bytes than int8's


@dataclass(frozen=True)
class Prepared:
    """A layer with its figures by key and the numbers to be written: none if it is left out. No figures: it is no matrix."""

    layer: Layer
    rows: Mapping[str, Row] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Form(ABC):
    """How the matrices of a plan are written. Norms and dense layers are written whole, in `whole_dtype`."""

    whole_dtype: torch.dtype
    ahead = AHEAD  # prepared batches per thread that may wait to be written
    advice = "choose the precision fp32"  # where a number does not fit

    def __init__(self, layers: Sequence[Layer], decomposer: Decomposer) -> None:
        self._layers, self._decomposer = layers, decomposer
        largest = max(layer.numel for layer in layers)
        self._scratch = Scratch(largest if decomposer.device.type == "cpu" else 0)
        self.used: dict[str, int] = {}  # ranks of the modules; 0 for those left out

    @property
    def expected_bytes(self) -> int:
        """What all tensors take together, with their entries in the header."""
        return sum(entry_bytes(layer) + self._layer_bytes(layer) for layer in self._layers)

    def _layer_bytes(self, layer: Layer) -> int:
        whole = self.whole_dtype.itemsize * (layer.numel + layer.shape[0])
        return whole if layer.kind in ("norm", "dense") else self._matrix_bytes(layer)

    def first(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that come before all layers, by their keys."""
        return iter(())

    def batches(self) -> Iterator[list[Layer]]:
        """Layers that are worked on together."""
        return _batches(self._layers, {}, self._decomposer.device)

    @abstractmethod
    def prepare(self, batch: Sequence[Layer]) -> list[Prepared]:
        """The tensors of a batch. Several of these calls run at once."""

    @abstractmethod
    def count(self, prepared: Prepared) -> None:
        """Note that a layer has been written."""

    @abstractmethod
    def dims(self, *, wide_convolutions: bool) -> tuple[str, str]:
        """Rank and alpha, in kohya's words, of linear layers or of 3x3 convolutions."""

    @abstractmethod
    def _matrix_bytes(self, layer: Layer) -> int: ...

    def _memory(self, batch: Sequence[Layer]) -> Tensor | None:
        return self._scratch.memory if len(batch) == 1 else None


class LowRank(Form):
    """Factors by SVD: `lora_up`, `lora_down` and an alpha."""

    def __init__(
        self,
        pair: Pair,
        layers: Sequence[Layer],
        components: Sequence[str],
        settings: ExtractSettings,
        decomposer: Decomposer,
        steps: Steps,
    ) -> None:
        super().__init__(layers, decomposer)
        self._settings, self._dtype = settings, dtype_of(settings.precision)
        self._is_fp8 = self._dtype.itemsize == 1
        # a difference in fp8 is one that hosts cannot add to a weight
        self.whole_dtype = torch.float16 if self._is_fp8 else self._dtype
        self._planned = plan_ranks(pair, layers, components, settings, decomposer, steps)
        self.used = dict.fromkeys(self._planned, 0)
        self.capped = self.exhausted = 0
        pairs = [layer for layer in layers if layer.kind == "pair"]
        ranks = {layer.module.name: self._rank(layer) for layer in pairs}
        extents = self._extents(steps) if self._is_fp8 else {}
        self._changed = {name for name, extent in extents.items() if extent.norm}
        least = {name: extents[name].norm * rank / LARGEST_PRODUCT for name, rank in ranks.items()} if extents else {}
        alphas = readable_alphas({name: rank * scale for name, rank, scale in _scaled(ranks, extents) if rank}, least)
        self._alphas = {name: alphas.get(name, 1.0) for name in ranks}

    def first(self) -> Iterator[tuple[str, Tensor]]:
        """All alphas of an fp8 file: they are float32, and so every tensor stays aligned."""
        for layer in self._layers if self._is_fp8 else ():
            name = layer.module.name
            if layer.kind == "pair" and (layer.required or (name in self._changed and self._rank(layer))):
                yield f"{name}.alpha", torch.tensor(self._alphas[name], dtype=torch.float32)

    def batches(self) -> Iterator[list[Layer]]:
        """In the order of the file; of an fp8 file with what has 2 bytes first."""
        layers = sorted(self._layers, key=lambda layer: layer.kind == "pair") if self._is_fp8 else self._layers
        return _batches(layers, self._planned, self._decomposer.device)

    def prepare(self, batch: Sequence[Layer]) -> list[Prepared]:
        """Factors as they will be written, and what these miss."""
        if batch[0].kind != "pair":
            return [Prepared(layer) for layer in batch]
        loaded = [(layer, *self._decomposer.load(layer, self._memory(batch))) for layer in batch]
        rank = self._rank(batch[0])
        work = [(layer, delta) for layer, delta, row in loaded if row.offset and rank]
        names = [layer.module.name for layer, _ in work]
        factors = iter(self._decomposer.factorise([delta for _, delta in work], rank, names) if work else ())
        return [
            self._rounded(layer, row, delta, next(factors) if row.offset and rank else None) for layer, delta, row in loaded
        ]

    def count(self, prepared: Prepared) -> None:
        layer, row = prepared.layer, prepared.rows[prepared.layer.module.key]
        rank = prepared.tensors[DOWN].shape[0]
        self.used[layer.module.name] = rank
        self.capped += self._planned[layer.module.name] < asked_rank(self._settings.policy, layer)
        self.exhausted += bool(row.offset) and rank < self._rank(layer)

    def dims(self, *, wide_convolutions: bool) -> tuple[str, str]:
        """The rank asked for, or the largest that there was of it; `Dynamic`, kohya's word, where none was asked for.

        The alpha is that of most layers that are written; as the rank where none of the kind is.
        """
        policy = self._settings.policy
        names = [each.module.name for each in self._layers if each.is_wide_convolution == wide_convolutions]
        asked = policy.conv_rank if wide_convolutions and policy.conv_rank else policy.fixed
        dim = str(max((self.used.get(name, 0) for name in names), default=0) or asked) if asked else "Dynamic"
        alphas = Counter(self._alphas[name] for name in names if self.used.get(name))
        return dim, f"{alphas.most_common(1)[0][0]:g}" if alphas else dim

    def _matrix_bytes(self, layer: Layer) -> int:
        return self._dtype.itemsize * self._planned[layer.module.name] * sum(layer.matrix)

    def _rank(self, layer: Layer) -> int:
        """The layer's rank; a required one gets at least one component."""
        return max(self._planned.get(layer.module.name, 0), int(layer.required))

    def _extents(self, steps: Steps) -> dict[str, Extent]:
        """How large each layer's change is, in one pass over both files."""
        extents = {}

        def extent(layer: Layer) -> Extent:
            norm = math.sqrt(self._decomposer.load(layer, self._memory([layer]))[1].offset) if layer.kind == "pair" else 0.0
            return Extent(norm, *layer.matrix)

        with side_by_side(extent, self._layers, self._decomposer.device) as found:
            for layer, each in zip(self._layers, found, strict=True):
                extents[layer.module.name] = each
                steps.advance(layer.numel, layer.module.key)
        return extents

    def _rounded(self, layer: Layer, row: Row, delta: Tensor, factors: Factors | None) -> Prepared:
        """Factors in the dtype of the file, and in `row` the energy of what they miss. Overwrites `delta`."""
        if factors is None and layer.required:
            out, in_ = layer.matrix
            factors = Factors(torch.zeros(out, 1), torch.zeros(1, in_), torch.zeros(1))
        rows = {layer.module.key: row}
        if factors is None:
            row.residual = row.offset
            return Prepared(layer, rows)
        alpha = self._alphas[layer.module.name]
        up, down, row.residual = self._decomposer.round_(layer, delta, factors, self._dtype, alpha)
        check_fits(layer, row.residual, self._settings.precision, self.advice)
        rank = up.shape[1]
        if not rank:
            return Prepared(layer, rows)
        # 2-byte alphas keep the file's tensors aligned, and fp16 holds every whole number up to 2048 exactly
        dtype = torch.float32 if self._dtype == torch.float32 else torch.float16
        kernel = layer.shape[2:]
        tensors = {} if self._is_fp8 else {"alpha": torch.tensor(alpha, dtype=dtype)}
        tensors[DOWN] = down.reshape(rank, layer.matrix[1] // math.prod(kernel), *kernel)
        tensors[UP] = up.reshape(layer.shape[0], rank, *(1 for _ in kernel))
        return Prepared(layer, rows, tensors)


class Exact(Form):
    """The whole change, as LyCORIS' LoKr: a 1x1 first factor in float32 times a second one in int8, in the weight's shape.

    Where int8 misses too much, because a few values are far larger than the others, it is a `diff` in fp16 or float32. The
    others count by their mean size (a normal distribution has pi/2 times the square of that as variance): where an outlier
    holds most of the energy, energy alone would let all the others go.
    So is the first convolution, always: hosts widen a `diff` for the nine channels of an inpainting model, and no LoKr.
    Stock loaders multiply the two factors in float32. Biases go beside as `diff_b`, which the Forge family and ComfyUI add and
    AUTOMATIC1111 passes over: about 0.03 % of the change.
    """

    whole_dtype = torch.float16
    ahead = 1  # they are whole layers
    advice = "write an offset file"

    def __init__(self, pair: Pair, layers: Sequence[Layer], decomposer: Decomposer) -> None:
        super().__init__(layers, decomposer)
        self._pair = pair
        self.wider = 0  # layers that int8 did not do for

    def prepare(self, batch: Sequence[Layer]) -> list[Prepared]:
        """The whole change of each layer, and of its bias."""
        if batch[0].kind in ("norm", "dense"):
            return [Prepared(layer) for layer in batch]
        return [self._whole(layer, batch) for layer in batch]

    def count(self, prepared: Prepared) -> None:
        self.wider += "diff" in prepared.tensors and not _is_first(prepared.layer)

    def dims(self, *, wide_convolutions: bool) -> tuple[str, str]:
        return "Dynamic", "Dynamic"

    def _matrix_bytes(self, layer: Layer) -> int:
        return layer.numel + 4 + 2 * layer.shape[0]

    def _whole(self, layer: Layer, batch: Sequence[Layer]) -> Prepared:
        delta, row = self._decomposer.load(layer, self._memory(batch))
        rows = {layer.module.key: row}
        bias, of_bias = measure(self._pair, layer.module.bias) if layer.kind == "exact" else (delta, None)
        # a bias needs its matrix, if one of zeros: AUTOMATIC1111 refuses a file with a module of a bias alone
        is_written = row.offset or layer.required or (of_bias and of_bias.offset)
        tensors = self._quantised(layer, delta, row) if is_written else {}
        if of_bias:
            rows[layer.module.bias] = of_bias
            if of_bias.offset:
                rounded = bias.to(self.whole_dtype)
                of_bias.residual = energy(bias - rounded.float())
                check_fits(layer, of_bias.residual, "fp16", self.advice)
                tensors["diff_b"] = rounded
        return Prepared(layer, rows, tensors)

    def _quantised(self, layer: Layer, delta: Tensor, row: Row) -> dict[str, Tensor]:
        """The tensors of a matrix; what they miss goes into its figures. On the CPU where the device's memory does not do."""
        try:
            return _nearest(layer, delta, row)
        except RuntimeError as error:
            if delta.device.type == "cpu" or not is_out_of_memory(error):
                raise
        release(delta.device)
        return _nearest(layer, delta.cpu(), row)


def _nearest(layer: Layer, delta: Tensor, row: Row) -> dict[str, Tensor]:
    """int8 values and their scale, or the whole change in as few bytes as hold it; takes the memory of delta once more."""
    most = _MOST_MISSED * min(row.offset, delta.numel() * math.pi / 2 * float(delta.abs().mean()) ** 2)
    if not _is_first(layer):
        values, scale = quantised(delta)
        row.residual = energy((values * scale).sub_(delta))
        if row.residual <= most:
            first = torch.tensor(scale, dtype=torch.float32).reshape(1, 1)
            return {"lokr_w1": first, "lokr_w2": values.reshape(layer.shape)}
        del values
    for dtype in (torch.float16, torch.float32):
        whole = delta.to(dtype, copy=True)  # float32 too: the memory of the delta is used again
        row.residual = energy(whole.to(torch.float32, copy=True).sub_(delta))
        if row.residual <= most:
            break
    check_fits(layer, row.residual, "float32", Exact.advice)
    return {"diff": whole.reshape(layer.shape)}


def _is_first(layer: Layer) -> bool:
    return layer.module.key == FIRST_CONVOLUTION


def check_fits(layer: Layer, residual: float, precision: str, advice: str) -> None:
    """Refuse numbers that a precision does not hold. Raises SettingError."""
    if not residual < float("inf"):  # NaN too
        raise SettingError(f"{layer.module.name} does not fit into {precision}; {advice}")


def _scaled(ranks: Mapping[str, int], extents: Mapping[str, Extent]) -> Iterator[tuple[str, int, float]]:
    """Modules, their ranks, and the scale of all modules of that UNet or text encoder: 1 where no extents are known."""
    of_component: dict[str, list[Extent]] = {}
    for name, extent in extents.items():
        of_component.setdefault(encoder_of(name), []).append(extent)
    scales = {component: factor_scale(own) for component, own in of_component.items()}
    for name, rank in ranks.items():
        yield name, rank, scales.get(encoder_of(name), 1.0)


def _batches(layers: Sequence[Layer], ranks: Mapping[str, int], device: torch.device) -> Iterator[list[Layer]]:
    """Layers of equal matrix and rank together, as many as the device takes at once; in file order on the CPU."""
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        size = batch_size(device, layer.numel) if layer.kind == "pair" else 1
        group = groups.setdefault((layer.matrix, ranks.get(layer.module.name, 0), layer.required, layer.kind), [])
        group.append(layer)
        if len(group) >= size:
            yield list(group)
            group.clear()
    yield from (group for group in groups.values() if group)
