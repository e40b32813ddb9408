"""Deltas of layers as matrices on a device, and their factors, with what to do when the device cannot."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError, NoMemoryError
from lib_dpo.maths.devices import is_out_of_memory, release
from lib_dpo.maths.fp8 import refitted_up
from lib_dpo.maths.lowrank import Factors, factorise, residual_energy_, resolve_method, seed_for, singular_values
from lib_dpo.maths.precision import narrowed
from lib_dpo.offsets.layers import Layer
from lib_dpo.offsets.offset import Pair
from lib_dpo.operations.measure import Row, measure
from lib_dpo.settings import Method

logger = logging.getLogger(__name__)


class Decomposer:
    """Loads and factorises layers of a pair on one device. Counts the methods that ran and the fallbacks taken.

    May be used from several threads at once.
    """

    def __init__(self, pair: Pair, device: torch.device, *, method: Method, seed: int) -> None:
        self._pair, self.device, self._method, self._seed = pair, device, method, seed
        self._counting = threading.Lock()
        self.methods: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()

    def load(self, layer: Layer, out: Tensor | None = None) -> tuple[Tensor, Row]:
        """The layer's delta as a float32 matrix (out, in * kh * kw), and its figures; on the CPU where the device fails.

        Args:
            out: memory for the delta, as in `Pair.weight`.
        """
        key, part = layer.module.key, layer.module.part
        try:
            delta, row = measure(self._pair, key, device=self.device, part=part, out=out)
        except RuntimeError as error:
            self._fall_back(error, key, self.device)
            return self._load_on_cpu(layer)
        return delta.reshape(layer.matrix), row

    def _load_on_cpu(self, layer: Layer) -> tuple[Tensor, Row]:
        delta, row = measure(self._pair, layer.module.key, part=layer.module.part)
        return delta.reshape(layer.matrix), row

    def factorise(self, deltas: Sequence[Tensor], rank: int, names: Sequence[str]) -> list[Factors]:
        """Factors of equal-sized deltas as one batch; what fails is done alone, then on the CPU, then in float64.

        Args:
            names: one per delta; seeds follow from them.

        Raises:
            BadTensorError: no way worked.
            NoMemoryError: nor had the machine memory for the last.
        """
        seeds = [seed_for(self._seed, name) for name in names]
        method = resolve_method(min(deltas[0].shape), max(deltas[0].shape), rank, self._method)
        if len(deltas) > 1 and len({delta.device for delta in deltas}) == 1:  # one may be on the CPU, out of memory
            try:
                batch = factorise(torch.stack(list(deltas)), rank, method=method, seeds=seeds)
            except RuntimeError as error:
                self._fall_back(error, names[0], deltas[0].device)
            else:
                self._count(method, len(deltas))
                return [Factors(*parts) for parts in zip(*batch, strict=True)]
        rows = zip(deltas, names, seeds, strict=True)
        return [self._one(delta, name, seed, rank, method) for delta, name, seed in rows]

    def _one(self, delta: Tensor, name: str, seed: int, rank: int, method: Method) -> Factors:
        attempts: list[tuple[torch.device, torch.dtype, Method]] = [(delta.device, torch.float32, method)]
        if delta.device.type != "cpu":
            attempts.append((torch.device("cpu"), torch.float32, method))
        attempts.append((torch.device("cpu"), torch.float64, "exact"))
        last: RuntimeError | None = None
        for device, dtype, how in attempts:
            try:
                factors = factorise(delta.to(device, dtype), rank, method=how, seeds=(seed,))
            except RuntimeError as error:
                self._fall_back(error, name, device)
                last = error
            else:
                self._count(how, 1)
                return Factors(*(part.float() for part in factors))
        if last and is_out_of_memory(last):
            raise NoMemoryError(f"{name}: the machine is out of memory; close other programs, or choose a lower rank") from last
        raise BadTensorError(
            f"{self._pair.file_names[1]}: the offset of {name} could not be decomposed, not even on the CPU in float64; "
            "inspect both files, and get them again if they are damaged"
        ) from last

    def _count(self, method: Method, layers: int) -> None:
        with self._counting:
            self.methods[method] += layers

    def singular_values(self, delta: Tensor, name: str) -> Tensor:
        """The exact spectrum, float64 on the CPU; computed there in float64 where the device fails."""
        try:
            return singular_values(delta)
        except RuntimeError as error:
            self._fall_back(error, name, delta.device)
            return singular_values(delta.cpu().double())

    def round_(
        self, layer: Layer, delta: Tensor, factors: Factors, dtype: torch.dtype, alpha: float
    ) -> tuple[Tensor, Tensor, float]:
        """`Factors.rounded`, and ||delta - alpha / rank up down||^2; in fp8 with `up` fitted to the rounded `down`.

        Overwrites `delta`. Out of memory: done on the CPU.
        """
        if dtype.itemsize == 1 and delta.device.type == "mps":  # has no float8
            delta, factors = delta.cpu(), Factors(*(part.cpu() for part in factors))
        least = int(layer.required or dtype.itemsize == 1)  # alphas of fp8 files are written before, and want a pair
        try:
            up, down, scale = _best_rounded(delta, factors, dtype, alpha, least)
            return up, down, residual_energy_(delta, up, down, scale)
        except RuntimeError as error:
            self._fall_back(error, layer.module.key, delta.device)
        delta, _ = self._load_on_cpu(layer)  # again: the one on the device may be half overwritten
        up, down, scale = _best_rounded(delta, Factors(*(part.cpu() for part in factors)), dtype, alpha, least)
        return up, down, residual_energy_(delta, up, down, scale)

    def _fall_back(self, error: RuntimeError, name: str, device: torch.device) -> None:
        """Count an error that another way may avoid; raise any other.

        On the CPU that is only what the maths itself raises. A GPU's solvers fail in many words and no class of their own:
        "cusolver error: ...", "requires compiling PyTorch with MAGMA", "not supported on MPS". There it is every error.

        Args:
            device: where it happened.
        """
        if is_out_of_memory(error):
            reason = "out of memory"
        elif device.type != "cpu" or isinstance(error, (torch.linalg.LinAlgError, NotImplementedError)):  # type: ignore[attr-defined]  # not in its stubs
            reason = "decomposition failed"
        else:
            raise error
        logger.info("%s at %s (%s); trying another way", reason, name, error)
        with self._counting:
            self.fallbacks[reason] += 1
        release(self.device)


def _best_rounded(
    delta: Tensor, factors: Factors, dtype: torch.dtype, alpha: float, least: int
) -> tuple[Tensor, Tensor, float]:
    up, down, scale = factors.rounded(dtype, alpha, least=least)
    if dtype.itemsize == 1 and bool((down.float() != 0).any(1).all()):
        # rows that rounding made alike
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # not in its stubs
            fitted = refitted_up(delta, down, scale)
            if float(fitted.norm()) < 2 * float(up.float().norm()):  # not where they are nearly so
                up = narrowed(fitted, dtype)
    return up, down, scale
