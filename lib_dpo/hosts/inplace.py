"""Live weights edited in place: all is checked and copied before it is touched, any exception puts everything back.

Undo copies the originals back, so it is bit-equal; a checksum over them, taken before the edit, proves it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lib_dpo.errors import BadTensorError, Cancelled, HostError, MismatchError, SettingError
from lib_dpo.families.arch import recognise
from lib_dpo.families.keymap import UNET
from lib_dpo.hosts.base import Baked
from lib_dpo.hosts.checksums import all_finite, checksum
from lib_dpo.hosts.marks import Marker, Marks
from lib_dpo.offsets.patch import Patch, fitted
from lib_dpo.progress import Progress, Steps

logger = logging.getLogger(__name__)

Values = tuple[Tensor, ...]

_ROOM = 256 << 20  # for what adding up one tensor takes, and for others
_SMALLEST_SHARE = 0.5  # of the change that 8-bit storage must take up


@dataclass(frozen=True)
class Slot:
    """A live tensor, and the more exact copies of it that its host computes from (fp8 storage with cached fp16)."""

    key: str
    tensor: Tensor
    copies: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> Values:
        return (self.tensor, *self.copies)

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def read(self) -> Values:
        """Real copies in main memory."""
        return tuple(_copy(tensor.detach()) for tensor in self.tensors)

    def differs(self, values: Values) -> bool:
        """Whether any value is another one than in what `read` gave; 0 and -0 are one value."""
        pairs = zip(self.tensors, values, strict=True)
        return any(not torch.equal(_comparable(each.detach()), _comparable(value.to(each.device))) for each, value in pairs)

    def write(self, values: Values) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)


def _comparable(tensor: Tensor) -> Tensor:
    """torch compares no float8."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _copy(tensor: Tensor) -> Tensor:
    """A copy in main memory that numpy provides: it asks Linux for huge pages, torch does not.

    Memory in pages of 4 kB takes longer to get than to fill.
    """
    memory = torch.from_numpy(np.empty(tensor.numel() * tensor.element_size(), np.uint8))
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@dataclass(frozen=True)
class Plan:
    """The live tensors that an offset changes, and its keys that have no place in the live model."""

    slots: tuple[Slot, ...]
    not_applied: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)


@dataclass(frozen=True)
class Record:
    """A bake that is in live weights: what undo needs, and how to tell that it is still there."""

    baked: Baked
    originals: Mapping[str, Values]
    marks: Marks
    text_encoder: bool
    checksum: str  # of the originals, before anything was written
    file: str = ""  # the checkpoint whose weights were edited: one saved from the bake has the same weights
    undoing: int | None = None  # not all weights are originals again; how often a file had been read into the model then


class PartlyUndoneError(HostError):
    """Some weights are the originals again, and others could not be written to."""


# ---- before ----


def plan_edit(patch: Patch, slots: Mapping[str, Slot], name: str) -> Plan:
    """Match an offset to live tensors; everything that can be known before the first write.

    Args:
        slots: the whole model by canonical key.
        name: the model, for messages.

    Raises:
        MismatchError: another architecture, a UNet tensor missing, or shapes that do not fit.
        HostError: weights stored as integers. SettingError: nothing would change.
    """
    shapes = {key: tuple(slot.tensor.shape) for key, slot in slots.items()}
    architecture = recognise(shapes, name=name).architecture
    if architecture is not patch.architecture:
        raise MismatchError(
            f"{patch.name} is an offset for {patch.architecture.title} but {name} is {architecture.title}; "
            "they must be of one architecture"
        )
    chosen, missing = [], []
    for key in patch.changed_keys():
        slot = slots.get(key)
        if slot is None and key.startswith(UNET):
            raise MismatchError(f"{name} lacks the UNet tensor {key}, which {patch.name} changes; expected a complete UNet")
        if slot is None:
            missing.append(key)
            continue
        if not slot.tensor.is_floating_point():
            raise HostError(f"{name} holds {key} as {slot.tensor.dtype}; load it in a floating-point format to bake into it")
        fitted(torch.empty(patch.offset.shapes[key], device="meta"), shapes[key], key, patch.name, name)
        chosen.append(slot)
    if not chosen:
        raise SettingError(f"{patch.name} changes nothing with these block weights ({patch.blocks}); set some above 0")
    return Plan(tuple(chosen), (*missing, *patch.offset.unmatched))


def check_memory(needed: int) -> None:
    """Refuse an edit whose originals do not fit. Raises HostError saying what to do; says nothing without psutil."""
    free = available_memory()
    if free is not None and free < needed + _ROOM:
        raise HostError(
            f"to be undone, this bake must keep {needed / 1e9:.1f} GB of original weights, but only {free / 1e9:.1f} GB of "
            "memory is free; undo an earlier bake, close other programs, bake fewer blocks, or save a baked checkpoint instead"
        )


def available_memory() -> int | None:
    """Bytes of main memory that programs can still have; None where that cannot be found out."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


# ---- the edit ----


class Saved:
    """What live tensors held before an edit."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Slot, Values]] = {}

    def keep(self, slot: Slot) -> Values:
        """Copy what a slot holds now, unless that was done before."""
        if slot.key not in self._values:
            self._values[slot.key] = (slot, slot.read())
        return self._values[slot.key][1]

    def restore(self) -> None:
        """Raises HostError where a weight cannot be written to."""
        try:
            _write_all(self._values.values())
        except Exception as error:
            raise HostError(
                f"weights could not be put back ({error}), so the model is not as it was; choose another checkpoint and then "
                "this one again"
            ) from error


def _write_all(values: Iterable[tuple[Slot, Values]], written: Callable[[Slot], None] = lambda slot: None) -> None:
    """Write values into slots, all of them whatever happens on the way; what failed is tried once more.

    Raises what fails the second time too; else, when all is written, an interrupt that came meanwhile.
    """
    last: BaseException | None = None
    failed = []
    for slot, value in values:
        try:
            slot.write(value)
            written(slot)
        except Exception:
            logger.warning("%s: is written once more", slot.key, exc_info=True)
            failed.append((slot, value))
        except BaseException as error:  # noqa: BLE001  raised in the end
            last = error
            failed.append((slot, value))
    for slot, value in failed:
        try:
            slot.write(value)
        except Exception as error:  # noqa: BLE001  raised in the end, when all others are written
            last = error
    if last:
        raise last


@contextmanager
def all_or_nothing() -> Iterator[Saved]:
    """What is kept in the yielded `Saved` is put back when an exception leaves the block."""
    saved = Saved()
    try:
        yield saved
    except BaseException:
        saved.restore()
        raise


def bake(
    plan: Plan,
    patch: Patch,
    strength: float,
    slots: Mapping[str, Slot],
    *,
    earlier: Record | None = None,
    finish: Callable[[], None] = lambda: None,
    file: str = "",
    on_progress: Progress | None = None,
) -> Record:
    """Write original + strength x delta into every planned slot, summed in float32 and rounded once.

    Args:
        slots: the whole model, for the tensors of the earlier bake.
        earlier: a bake that is in these weights, undone first; any exception brings it back.
        finish: what the host must still do; an exception there undoes the edit too.
        file: the checkpoint that the weights are of, where the host reads others into the same tensors.

    Raises:
        BadTensorError: NaN or Inf, in the offset or in the sum. HostError: 8-bit weights that cannot hold the change.
    """
    originals: dict[str, Values] = {}
    adder = _Adder(strength, patch.name)
    steps = Steps(sum(slot.tensor.numel() for slot in plan.slots), on_progress)
    changed, before = 0, ""
    with torch.inference_mode(), all_or_nothing() as saved:
        for key, values in (earlier.originals if earlier else {}).items():
            saved.keep(slots[key])
            slots[key].write(values)
        before = _checksum(slots, [slot.key for slot in plan.slots])
        for slot in plan.slots:
            kept = saved.keep(slot)
            originals[slot.key] = earlier.originals.get(slot.key, kept) if earlier else kept
            delta = fitted(patch.delta(slot.key), tuple(slot.tensor.shape), slot.key, patch.name, "the live model")
            adder.add(slot, delta)
            changed += slot.differs(originals[slot.key])
            steps.advance(slot.tensor.numel(), slot.key)
        adder.check_loss()
        patch.checkpoint.check_unchanged()
        finish()
    baked = Baked(
        patch_id=patch.id,
        offset=patch.name,
        strength=strength,
        blocks=str(patch.blocks),
        rank=patch.rank,
        tensors=changed,
        not_applied=plan.not_applied,
        twins=patch.offset.twins,
        bytes_kept=plan.nbytes,
        file=patch.checkpoint.path,
    )
    text_encoder = any(not slot.key.startswith(UNET) for slot in plan.slots)
    return Record(baked, originals, adder.marker.marks(), text_encoder, before, file)


def undo(record: Record, slots: Mapping[str, Slot], on_progress: Progress | None = None) -> None:
    """Copy the originals back. It cannot be stopped half way: what `on_progress` raises comes too late.

    Raises:
        PartlyUndoneError: a weight could not be written to; undo again. Who holds the record has to know, for `undoing`.
        HostError: what stands in the model then is not what stood there before the bake.
    """
    steps = Steps(sum(values[0].numel() for values in record.originals.values()), on_progress)

    def written(slot: Slot) -> None:
        with suppress(Cancelled):
            steps.advance(slot.tensor.numel(), slot.key)

    with torch.inference_mode():
        try:
            _write_all(((slots[key], values) for key, values in record.originals.items()), written)
        except Exception as error:
            raise PartlyUndoneError(
                f"not every weight could be put back ({error}), so a part of {record.baked.offset} is still in the model; "
                "undo again, or choose another checkpoint and then this one again"
            ) from error
        if _checksum(slots, record.originals) != record.checksum:
            raise HostError(
                "the original weights were copied back, but a checksum over them is not the one from before the bake: "
                "something changed them meanwhile; choose another checkpoint and then this one again to get the clean model"
            )


def _checksum(slots: Mapping[str, Slot], keys: Iterable[str]) -> str:
    """Of what the model holds at these keys."""
    return checksum({f"{key} {n}": tensor for key in keys for n, tensor in enumerate(slots[key].tensors)}, stored=True)


@dataclass
class _Adder:
    """The arithmetic of one bake: what it counts, and the marks it takes."""

    strength: float
    name: str  # of the offset, for messages
    marker: Marker = field(default_factory=Marker)
    wanted: float = 0.0  # sum of squares of the change to 8-bit tensors
    kept: float = 0.0  # the same of what their values moved by, along the change

    def add(self, slot: Slot, delta: Tensor) -> None:
        """Add strength x delta to a slot. Raises BadTensorError for NaN or Inf."""
        live = slot.tensor.detach()
        before = self.marker.before(live)
        delta = delta.to(live.device)
        if live.dtype == torch.float32 and not slot.copies:  # no copy of a large tensor: fresh memory takes longer than adding
            live.add_(delta, alpha=self.strength)
            self._check_finite(slot.key, live)
        else:
            self._add_rounded(slot, live, delta)
        self.marker.after(slot.key, live, before)

    def _add_rounded(self, slot: Slot, live: Tensor, delta: Tensor) -> None:
        most_exact = slot.copies[0] if slot.copies else live
        stored = live.float() if live.element_size() == 1 else None
        exact = most_exact.to(live.device, torch.float32, copy=True).add_(delta, alpha=self.strength)
        for tensor in slot.tensors:
            rounded = exact.to(tensor.dtype)
            self._check_finite(slot.key, rounded)
            tensor.copy_(rounded)
        if stored is not None:
            change = delta * self.strength
            self.wanted += float(change.square().sum(dtype=torch.float64))
            self.kept += float((live.float() - stored).mul_(change).sum(dtype=torch.float64))

    def check_loss(self) -> None:
        """Refuse a bake that 8-bit storage rounds away, as it does with small changes where it keeps no exact copy.

        Rounding an exact sum moves some values by a whole step and most not at all, which on average is the change.

        Raises:
            HostError: with the share that is lost.
        """
        check_share(self.kept, self.wanted, self.name)

    def _check_finite(self, key: str, tensor: Tensor) -> None:
        if not all_finite(tensor):
            raise BadTensorError(
                f"{key} would hold NaN or Inf as {tensor.dtype} after adding {self.strength:g} x {self.name}; "
                "use a smaller strength"
            )


def check_share(kept: float, wanted: float, name: str) -> None:
    """Refuse a change of which 8-bit weights keep too little.

    Args:
        kept: sum of change x movement of the values; wanted: sum of change².

    Raises:
        HostError: with the share that is lost.
    """
    if kept < _SMALLEST_SHARE * wanted:
        lost = f"{1 - kept / wanted:.0%}"
        raise HostError(
            f"this model is stored in 8 bits, which round {lost} of the change by {name} away; switch FP8 storage off in the "
            "settings, or let it keep FP16 copies for LoRAs there, and load the model again"
        )


# ---- what is there ----
