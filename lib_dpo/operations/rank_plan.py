"""How many components each layer of a pair gets under each policy: one rank for all, an energy or a size to reach.

An energy is reached with the fewest bytes. A size is divided so that the file reproduces more of what tuned changed in the
model's predictions than one rank for all layers does in as many bytes: docs/ranks.md has what was tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lib_dpo.errors import SettingError
from lib_dpo.families.keymap import component_of
from lib_dpo.families.roles import role_weight
from lib_dpo.maths.fp8 import ROUNDING
from lib_dpo.maths.precision import dtype_of
from lib_dpo.maths.ranks import Energies, Ranking, Spectrum, break_even_rank
from lib_dpo.maths.threads import side_by_side
from lib_dpo.offsets.layers import Layer
from lib_dpo.offsets.lora.metadata import ENTRY_BYTES, METADATA_BYTES
from lib_dpo.offsets.offset import Pair
from lib_dpo.operations.decompose import Decomposer
from lib_dpo.operations.measure import measure
from lib_dpo.progress import Steps
from lib_dpo.settings import ExtractSettings, RankPolicy, size_meant


def plan_ranks(
    pair: Pair,
    layers: Sequence[Layer],
    components: Sequence[str],
    settings: ExtractSettings,
    decomposer: Decomposer,
    steps: Steps,
) -> dict[str, int]:
    """Ranks by the name of the LoRA module, for the layers that become pairs of factors; 0 for those left out.

    Args:
        components: whose offset counts, `unet` and the text encoders that changed.
        steps: advanced by every layer's numbers where spectra are computed, not where one rank is asked for.

    Raises:
        SettingError: a rank beyond every layer, or a size too small for any.
    """
    policy = settings.policy
    if policy.fixed:
        return fixed_ranks(layers, policy)
    item = dtype_of(settings.precision).itemsize
    spectra, pair_energy = _spectra(layers, item, decomposer, steps)
    if policy.energy is None:
        return ranks_for_size(layers, spectra, Ranking(spectra, weighted=True), item, policy.size_mb or 0.0)
    whole = sum(measure(pair, key)[1].offset for layer in layers if layer.kind != "pair" for key in layer.keys)
    rest = sum(measure(pair, key)[1].offset for key in left_out(pair, layers, components))
    return ranks_for_energy(Ranking(spectra, weighted=False), policy.energy, pair_energy, whole, rest, item)


def fixed_ranks(layers: Sequence[Layer], policy: RankPolicy) -> dict[str, int]:
    """The rank asked for, but in no layer one from which on its factors are larger than the layer itself."""
    pairs = [layer for layer in layers if layer.kind == "pair"]
    for name, value, own in (
        ("rank", policy.fixed or 1, pairs),
        ("conv_rank", policy.conv_rank or 1, [layer for layer in pairs if layer.is_wide_convolution]),
    ):
        largest = max((min(layer.matrix) for layer in own), default=value)
        if value > largest:
            raise SettingError(f"{name} {value} is larger than every layer; expected at most {largest} for this model")
    return {layer.module.name: min(asked_rank(policy, layer), break_even_rank(*layer.matrix)) for layer in pairs}


def asked_rank(policy: RankPolicy, layer: Layer) -> int:
    """The rank that a policy names for a layer; 0 where it names none."""
    return policy.conv_rank if policy.conv_rank and layer.is_wide_convolution else policy.fixed or 0


def _spectra(layers: Sequence[Layer], item: int, decomposer: Decomposer, steps: Steps) -> tuple[dict[str, Spectrum], float]:
    """The exact spectrum of every layer that becomes a pair, and the energy of their offsets together.

    Args:
        item: bytes of one number in the file.
    """
    spectra: dict[str, Spectrum] = {}
    energy = 0.0

    def squares(layer: Layer) -> tuple[Layer, float, Tensor]:
        if layer.kind != "pair":
            return layer, 0.0, torch.empty(0)
        delta, row = decomposer.load(layer)
        return layer, row.offset, decomposer.singular_values(delta, layer.module.name).square()

    with side_by_side(squares, layers, decomposer.device) as found:
        for layer, offset, values in found:
            if layer.kind == "pair":
                energy += offset
                spectra[layer.module.name] = spectrum_of(layer, values.numpy(), offset, item)
            steps.advance(layer.numel, layer.module.key)
    return spectra, energy


def spectrum_of(layer: Layer, energies: Energies, offset: float, item: int) -> Spectrum:
    """A layer as the allocation sees it.

    Args:
        energies: squared singular values, falling. offset: ||.||^2 of its whole change. item: bytes of one number.
    """
    weight = size_weight(layer.module.name, offset)
    return Spectrum(energies, item * sum(layer.matrix), entry_bytes(layer), break_even_rank(*layer.matrix), weight)


def size_weight(name: str, energy: float) -> float:
    """What a layer's energy is worth where a size is divided: its role's weight, over the root of all the layer's energy.

    The root lies between absolute energy, which leaves layers with a small change without any component, and shares of each
    layer's own. With it and the roles, a size kept .64, .80 and .93 of the function on the bundled model where one rank for
    all (2, 4 and 8) kept .51, .71 and .88 in as many bytes, and absolute energy .23, .47 and .77.

    Args:
        name: of the LoRA module.
        energy: of the layer's whole change, ||.||^2.
    """
    return role_weight(name) / math.sqrt(energy) if energy else 0.0


def ranks_for_energy(ranking: Ranking, share: float, pairs: float, whole: float, rest: float, item: int) -> dict[str, int]:
    """The ranks that keep a share of the whole change.

    Args:
        pairs, whole, rest: ||.||^2 of what becomes pairs, of what is written whole, and of what no layer carries.
        item: bytes of one number in the file.
    """
    rounding = ROUNDING if item == 1 else 0.0
    return ranking.reaching((share * (pairs + whole + rest) - whole) * (1 + rounding))


def ranks_for_size(
    layers: Sequence[Layer], spectra: Mapping[str, Spectrum], ranking: Ranking, item: int, size: float
) -> dict[str, int]:
    """As much weighted energy as fits into `size` MB, with everything else that the file holds. Raises SettingError."""
    whole = [layer for layer in layers if layer.kind != "pair"]
    required = [layer for layer in layers if layer.required]  # written with one component at least
    overhead = METADATA_BYTES + sum(max(item, 2) * (layer.numel + layer.shape[0]) + entry_bytes(layer) for layer in whole)
    overhead += sum(spectra[layer.module.name].bytes_per_rank + entry_bytes(layer) for layer in required)
    ranks = ranking.within(int(size * 1e6) - overhead)
    if not any(ranks.values()):
        least = overhead + min(row.bytes_per_rank + row.fixed_bytes for row in spectra.values())
        raise SettingError(
            f"size {size:g} MB holds no layer of this model; expected at least {least / 1e6:.2g} MB"
            + size_meant(size, least / 1e6)
        )
    return ranks


def entry_bytes(layer: Layer) -> int:
    """What the names, shapes and offsets of a layer take in the header of the file."""
    return 3 * (ENTRY_BYTES + len(layer.module.name))


def left_out(pair: Pair, layers: Sequence[Layer], components: Sequence[str]) -> Iterator[str]:
    """Tensors of the offset that no layer carries: biases, text encoder norms and embeddings, by profile."""
    carried = {key for layer in layers for key in layer.keys}
    return (key for key in pair.keys if key not in carried and component_of(pair.architecture, key) in components)
