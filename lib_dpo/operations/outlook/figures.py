"""All that takes long about a pair, in one pass over both files: a row of every tensor, the spectrum of every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lib_dpo.maths.devices import resolve_device
from lib_dpo.maths.precision import full_precision
from lib_dpo.maths.ranks import Energies
from lib_dpo.maths.threads import Scratch, side_by_side
from lib_dpo.offsets.coverage import nothing_changed
from lib_dpo.offsets.layers import Layer, plan_layers
from lib_dpo.offsets.offset import Pair
from lib_dpo.operations.decompose import Decomposer
from lib_dpo.operations.measure import Row, Tally, measure
from lib_dpo.operations.verdict import changed_text_encoders
from lib_dpo.progress import Progress, Steps

PLANS = ("portable", "webui", "full", "exact")  # the profiles, and what an exact LoRA consists of


@dataclass(frozen=True)
class Spectra:
    """The squared singular values (falling, float64) of every layer that becomes a pair, by LoRA module.

    `plans` has the layers of each of PLANS, `changes` ||.||^2 of each module's whole change. A layer that did not change is in
    `plans` alone.
    """

    energies: Mapping[str, Energies]
    changes: Mapping[str, float]
    plans: Mapping[str, tuple[Layer, ...]]
    components: tuple[str, ...]  # what is extracted: `unet` and the text encoders that changed
    total: float  # ||.||^2 of all of that


@dataclass(frozen=True)
class Figures:
    """What was measured on a pair. `rows` by canonical key, in the pair's order; no spectra where none were asked for."""

    rows: Mapping[str, Row]
    vae: str
    spectra: Spectra | None = None


def measure_figures(pair: Pair, *, spectra: bool = True, device: str = "auto", on_progress: Progress | None = None) -> Figures:
    """Read both files once; with `spectra` all singular values of every layer too (a minute or two for SD 1.5 on a CPU).

    Raises:
        NothingToDoError: base and tuned are equal.
        BadTensorError: NaN or Inf, by key.
        SettingError: a device that is not there.
    """
    place = resolve_device(device)
    tally = Tally(pair.architecture)
    found: dict[str, Row] = {}
    steps = Steps(sum(math.prod(pair.base.shape(key)) for key in pair.keys) * (2 if spectra else 1), on_progress)
    with full_precision():
        scratch = Scratch(max(math.prod(pair.base.shape(key)) for key in pair.keys))
        with side_by_side(lambda key: measure(pair, key, out=scratch.memory)[1], pair.keys) as rows:
            for key, row in zip(pair.keys, rows, strict=True):
                found[key] = row
                tally.add(key, row)
                steps.advance(row.numel, key)
        if not tally.total.offset:
            both = "UNet and text encoders" if len(tally.components) > 1 else "UNet"
            raise nothing_changed(pair, both, "there is no offset")
        return Figures(found, _compare_vae(pair), _spectra(pair, tally, place, steps) if spectra else None)


def _spectra(pair: Pair, tally: Tally, device: torch.device, steps: Steps) -> Spectra:
    components = ("unet", *changed_text_encoders(tally))
    plans = {profile: tuple(plan_layers(pair, profile, components)) for profile in PLANS}
    layers = [layer for layer in plans["portable"] if layer.kind == "pair"]
    decomposer = Decomposer(pair, device, method="exact", seed=0)

    def squares(layer: Layer) -> tuple[float, NDArray[np.float64] | None]:
        delta, row = decomposer.load(layer)
        if not row.offset:
            return 0.0, None
        return row.offset, decomposer.singular_values(delta, layer.module.name).square().numpy()

    energies: dict[str, Energies] = {}
    changes: dict[str, float] = {}
    with side_by_side(squares, layers, device) as results:
        for layer, (change, values) in zip(layers, results, strict=True):
            if values is not None:
                energies[layer.module.name], changes[layer.module.name] = values, change
            steps.advance(layer.numel, layer.module.key)
    return Spectra(energies, changes, plans, components, tally.only(components).total.offset)


def _compare_vae(pair: Pair) -> str:
    """Information only: VAEs are never extracted."""
    theirs = set(pair.tuned.keys("vae"))
    shared = [key for key in pair.base.keys("vae") if key in theirs]
    if not shared:
        return "not in both files"
    same = all(torch.equal(pair.base.read(key).flatten().float(), pair.tuned.read(key).flatten().float()) for key in shared)
    if same and len(shared) < max(len(theirs), len(pair.base.keys("vae"))):
        return f"the same as far as both files hold it ({len(shared)} tensors)"
    return "the same" if same else "different (for information: a VAE is never part of an offset)"
