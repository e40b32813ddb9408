"""What a file is: checkpoint, UNet, offset or LoRA; architecture, layout, dtypes, metadata, hashes, peculiarities."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lib_dpo.errors import MismatchError
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.model import Model
from lib_dpo.files.checkpoint import Checkpoint, open_checkpoint
from lib_dpo.files.foreign import foreign_kind
from lib_dpo.offsets.breeds import Breed, breeds_of
from lib_dpo.offsets.coverage import LeftOut, contents, ema_text
from lib_dpo.offsets.lora.card import Card, read_card
from lib_dpo.offsets.lora.energies import energy_by_block
from lib_dpo.offsets.lora.file import LoraFile, read_lora
from lib_dpo.offsets.lora.keys import is_lora
from lib_dpo.offsets.lora.scale import ADAPTER_CONFIG, ADAPTER_METADATA, Scale, unused_config
from lib_dpo.offsets.lora.unplaced import twin_lines, unplaced_lines
from lib_dpo.offsets.offset import blocks_in, is_offset_file
from lib_dpo.offsets.prediction import prediction_of
from lib_dpo.offsets.recipe import Ingredient, baked_in
from lib_dpo.operations.resize_metadata import energy_claimed

_TITLES = {
    "checkpoint": "a whole checkpoint",
    "unet": "a UNet alone",
    "offset": "a dense offset file",
    "lora": "a LoRA",
    "unknown": "unknown",
}


@dataclass(frozen=True)
class Inspection:
    """The answer to "what is this file?"."""

    path: Path
    kind: str
    architecture: str | None
    layout: str
    tensors: int
    parameters: int
    file_bytes: int
    dtypes: dict[str, int]
    components: tuple[str, ...]
    ranks: tuple[int, int] | None
    contents: dict[str, int]  # tensors by component
    left_out: tuple[LeftOut, ...]  # all others
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]
    what: str  # what an unknown file is, where its keys tell
    baked_in: tuple[Ingredient, ...]  # as its metadata says, the last one first
    metadata: dict[str, str]
    sha256: str
    data_sha256: str | None  # of a LoRA's data alone: what WebUIs write into infotexts
    candidates: tuple[str, ...] = ()  # architectures that a LoRA fits alike; `architecture` is None then
    scales: tuple[Scale, ...] = ()  # of a LoRA's pairs: each value and source once
    twins: tuple[str, ...] = ()  # keys of a LoRA that say again what others say
    energy_kept: float | None = None  # share of the change it was made from, as its metadata says
    rank_counts: dict[int, int] = field(default_factory=dict)  # layers of a LoRA by their rank, rising
    block_shares: dict[str, float] = field(default_factory=dict)  # of a LoRA's change by block: energies that add up to 1
    breeds: tuple[Breed, ...] = ()  # what a model is beside its architecture, and what that means for an offset
    card: Card | None = None  # what lies beside a LoRA for the lists of WebUIs

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "architecture": self.architecture,
            "layout": self.layout,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "dtypes": self.dtypes,
            "components": list(self.components),
            "architectures_possible": list(self.candidates),
            "ranks": {"min": self.ranks[0], "max": self.ranks[1]} if self.ranks else None,
            "contents": self.contents,
            "left_out": [row.as_json() for row in self.left_out],
            "scales": [{"value": scale.value, "from": scale.source} for scale in self.scales],
            "twins": list(self.twins),
            "rank_counts": {str(rank): count for rank, count in self.rank_counts.items()},
            "energy_by_block": self.block_shares,
            "energy_kept_of_change": self.energy_kept,
            "breeds": [asdict(breed) for breed in self.breeds],
            "card": self.card and self.card.as_json(),
            "unmatched": list(self.unmatched),
            "notes": list(self.notes),
            "baked_in": [asdict(ingredient) for ingredient in self.baked_in],
            "metadata": self.metadata,
            "sha256": self.sha256,
            "autov2": self.sha256[:10].upper(),
            "data_sha256": self.data_sha256,
        }

    @property
    def beside(self) -> str:
        """What lies beside the components and is no weight, for people; weights among it are in the notes."""
        return ", ".join(row.text for row in self.left_out if not row.kind.weights)

    @property
    def title(self) -> str:
        """The kind in words."""
        return self.what or _TITLES[self.kind]

    @property
    def family(self) -> str:
        """The architecture in words, or all that it may be; "" for an unknown one."""
        names = [self.architecture] if self.architecture else self.candidates
        return " or ".join(ARCHITECTURES[name].title for name in names)

    @property
    def scale_text(self) -> str:
        """What pairs are multiplied by and whence; "" without pairs."""
        return "; ".join(_scale_words(self.scales, source) for source in dict.fromkeys(scale.source for scale in self.scales))

    def unplaced(self) -> list[str]:
        """A sentence for each part of a model whose keys in a LoRA are not understood; a model's are told by `notes`."""
        return [] if self.left_out else unplaced_lines(self.unmatched)


def inspect(path: str | Path) -> Inspection:
    """Look at a file. A readable file of an unknown model is described as far as it goes, not refused.

    Raises:
        BadFileError, UnsafeFileError: it cannot be read.
    """
    with open_checkpoint(path) as checkpoint:
        if is_lora(checkpoint.infos):
            return _inspect_lora(checkpoint)
        try:
            return _inspect_model(checkpoint)
        except MismatchError as error:
            found = foreign_kind({key: info.shape for key, info in checkpoint.infos.items()})
            kind, what = (found.name, found.title) if found else ("unknown", "")
            return _describe(checkpoint, kind=kind, architecture=None, layout="unknown", notes=(str(error),), what=what)


def _inspect_lora(checkpoint: Checkpoint) -> Inspection:
    data = hashlib.sha256()
    for key in checkpoint.infos:
        data.update(checkpoint.raw(key))
    try:
        lora = read_lora(checkpoint)
    except MismatchError as error:
        return _describe(checkpoint, kind="lora", architecture=None, layout=_lora_layout(checkpoint), notes=(str(error),))
    ranks = [layer.form.rank or 0 for layer in lora.layers if layer.form and layer.form.name == "LoRA"]
    energies = energy_by_block(lora)
    found = _describe(
        checkpoint,
        kind="lora",
        architecture=None if lora.candidates else lora.architecture.name,
        layout=_lora_layout(checkpoint),
        components=tuple(sorted({"te" if "_te" in layer.module.name else "unet" for layer in lora.layers})),
        ranks=(min(ranks), max(ranks)) if ranks else None,
        unmatched=lora.unmatched,
        notes=tuple(_lora_notes(lora)),
        data_sha256=data.hexdigest(),
        candidates=tuple(row.name for row in lora.candidates),
        scales=tuple(sorted(set(lora.scales()), key=lambda scale: (scale.source, scale.value))),
        twins=lora.twins,
    )
    return replace(
        found,
        rank_counts=dict(sorted(Counter(ranks).items())),
        block_shares={block: energy / sum(energies.values()) for block, energy in energies.items()},
    )


def _lora_notes(lora: LoraFile) -> Iterator[str]:
    if lora.candidates:
        yield "its names and shapes fit all of these; where it is used decides"
    biases = sum("diff_b" in layer.parts for layer in lora.layers)
    if biases:
        yield f"{biases} layers carry biases (diff_b or b_norm): not every loader takes them"
    forms = Counter(layer.form.name for layer in lora.layers if layer.form and layer.form.name in ("LoHa", "LoKr", "GLoRA"))
    if forms:
        yield ", ".join(f"{count} {'layer is' if count == 1 else 'layers are'} {form}" for form, count in sorted(forms.items()))
    if forms["LoKr"]:
        yield "programs that read LoKr: AUTOMATIC1111, the Forge family, ComfyUI; diffusers refuses the file"
    bound = sorted({layer.form.bound for layer in lora.layers if layer.form and layer.form.bound})
    if bound:
        yield f"what {' and '.join(bound)} adds depends on the weights of the model: only a bake into a checkpoint can use it"
    yield from twin_lines(lora.twins)
    if any(scale.source == "none" for scale in lora.scales()) and unused_config(lora.checkpoint, lora.settings):
        yield f"{ADAPTER_CONFIG} beside it is not taken for its own: that goes with adapter_model.safetensors and PEFT's names"


def _scale_words(scales: Iterable[Scale], source: str) -> str:
    values = [scale.value for scale in scales if scale.source == source]
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    words = low if low == high else f"{low} to {high}"
    whence = {
        "alpha": "alpha in the file",
        "metadata": f"{ADAPTER_METADATA} in its metadata",
        "adapter_config.json": f"{ADAPTER_CONFIG} beside it",
        "none": "nothing says another",
    }
    return f"{words} ({whence[source]})"


def _lora_layout(checkpoint: Checkpoint) -> str:
    return "kohya" if any(key.startswith("lora_") for key in checkpoint.infos) else "peft"


def _inspect_model(checkpoint: Checkpoint) -> Inspection:
    model = Model(checkpoint)
    components = model.components()
    kind = "offset" if is_offset_file(model) else "unet" if components == ("unet",) else "checkpoint"
    found = contents(model)
    odd = [row for row in found.beside if row.kind.weights]
    ema = ema_text(model)
    described = _describe(
        checkpoint,
        kind=kind,
        architecture=model.architecture.name,
        layout=model.recognised.layout,
        components=components,
        counts={name: len(keys) for name, keys in found.components.items()},
        left_out=found.beside,
        unmatched=tuple(key for row in odd for key in row.keys),
        notes=(
            *model.recognised.notes,
            *_structure(model, kind),
            *_predicts(model, kind),
            *([ema] if ema else []),
            *(f"it holds {row.text}" for row in odd),
        ),
    )
    return described if kind == "offset" else replace(described, breeds=breeds_of(model))


def _structure(model: Model, kind: str) -> tuple[str, ...]:
    """Where the UNet is not whole: which blocks were left out, or that the file is incomplete."""
    blocks = blocks_in(model)
    if kind == "offset" or (blocks.is_model and not blocks.pruned):
        return ()
    return (f"it is {blocks.text}" + ("" if blocks.is_model else ": get the file again, or do not use it"),)


def _predicts(model: Model, kind: str) -> tuple[str, ...]:
    """What the model predicts, where something says it or nothing tells it."""
    found = prediction_of(model)
    return () if kind == "offset" or (not found.kind and found.assumed) else (f"it predicts {found.text}",)


def _describe(
    checkpoint: Checkpoint,
    *,
    kind: str,
    architecture: str | None,
    layout: str,
    components: tuple[str, ...] = (),
    ranks: tuple[int, int] | None = None,
    counts: dict[str, int] | None = None,
    left_out: tuple[LeftOut, ...] = (),
    unmatched: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    data_sha256: str | None = None,
    what: str = "",
    candidates: tuple[str, ...] = (),
    scales: tuple[Scale, ...] = (),
    twins: tuple[str, ...] = (),
) -> Inspection:
    infos = checkpoint.infos.values()
    return Inspection(
        path=checkpoint.path,
        kind=kind,
        architecture=architecture,
        layout=layout,
        tensors=len(checkpoint.infos),
        parameters=sum(math.prod(info.shape) for info in infos),
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        dtypes=dict(Counter(info.dtype for info in infos)),
        components=components,
        ranks=ranks,
        contents=counts or {},
        left_out=left_out,
        unmatched=unmatched,
        notes=notes,
        what=what,
        baked_in=baked_in(checkpoint.metadata),
        metadata=dict(checkpoint.metadata),
        sha256=checkpoint.sha256(),
        data_sha256=data_sha256,
        candidates=candidates,
        scales=scales,
        twins=twins,
        energy_kept=energy_claimed(checkpoint.metadata),
        card=read_card(checkpoint.path) if kind == "lora" else None,
    )
