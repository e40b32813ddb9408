"""The built-in Lora extension of A1111 (extensions-builtin/Lora in 1.10.1): its backups, and networks in its list.

Once any LoRA was used it keeps a copy of every patched layer's weight and bias on the layer, and leaves the last prompt's
LoRAs merged into the live weights until the next forward pass. What counts as a clean weight is therefore its backup,
where there is one. It adds whatever stands in `networks.loaded_networks` to each layer that is about to run.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_dpo.errors import HostError
from lib_dpo.families.arch import Shape
from lib_dpo.offsets.patch import Patch, Row, fitted

_log = logging.getLogger(__name__)

_NAME = "dpo-offset:"  # of our networks; the extension tells networks apart by name and strength alone
_LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)  # whose forward it patches, with MultiheadAttention
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")  # it applies all four or none
_PADDING = 5  # input channels of inpainting models beyond 4


@dataclass(frozen=True)
class LiveTensor:
    """A parameter of the live model: the module that owns it, and the one on which the extension backs it up."""

    key: str
    module: nn.Module
    name: str
    holder: nn.Module

    @property
    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.module, self.name)
        return found

    def versions(self) -> Iterator[Tensor]:
        """The live tensor, and then its backup if there is one: the last is the clean value.

        In this order, and lazily: the extension makes a backup before it changes the tensor.
        """
        yield self.tensor
        backup = getattr(self.holder, "network_bias_backup" if self.name == "bias" else "network_weights_backup", None)
        if isinstance(backup, tuple):  # MultiheadAttention: its in_proj and its out_proj
            backup = {"in_proj_weight": backup[0], "weight": backup[1]}.get(self.name)
        if backup is not None and self.name != "in_proj_bias":
            yield backup

    def clean(self) -> Tensor:
        *_, last = self.versions()
        return last


def live_tensors(model: nn.Module) -> dict[str, LiveTensor]:
    """All parameters by canonical key: the live name without the `.wrapped` of hijacked modules, each once."""
    found: dict[str, LiveTensor] = {}
    seen: set[int] = set()
    holders: dict[int, nn.Module] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            holders[id(module.out_proj)] = module
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                key = f"{prefix}.{name}".replace(".wrapped", "")
                found[key] = LiveTensor(key, module, name, holders.get(id(module), module))
    return found


def extension() -> Any | None:
    """Its module `networks`, which other extensions reach through sys.modules only; None where it is switched off."""
    return sys.modules.get("networks")


def rebase(model: nn.Module) -> None:
    """Take merged LoRAs out of the weights and drop the backups: it makes new ones from the weights it finds next."""
    for module in model.modules():
        backups = (getattr(module, "network_weights_backup", None), getattr(module, "network_bias_backup", None))
        if backups != (None, None):
            networks = extension()
            if networks is None:
                raise HostError(
                    "LoRAs were merged into the model by an extension that is gone now; choose another checkpoint and then "
                    "this one again, or restart the WebUI"
                )
            networks.network_restore_weights_from_backup(module)
            networks.network_reset_cached_weight(module)


# ---- a network of ours ----


@dataclass(frozen=True)
class _OnDisk:
    """What the extension and others ask of the file behind a network; ours has no hash, so that none is written down."""

    name: str
    filename: str
    alias: str = ""
    hash: str = ""
    shorthash: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def read_hash(self) -> None: ...

    def get_alias(self) -> str:
        return self.name


@dataclass(frozen=True)
class Built:
    """A patch as a network of the extension, and the keys that it has no way to change."""

    patch_id: str
    network: Any
    not_applied: tuple[str, ...]
    text_encoder: bool


def build(networks: Any, patch: Patch, live: Mapping[str, LiveTensor]) -> Built:
    """Make a network of a patch whose keys and shapes were found to fit the live model (inplace.plan_edit)."""
    network = networks.network.Network(_NAME + patch.id, _OnDisk(patch.name, str(patch.checkpoint.path)))
    network.mentioned_name = patch.name
    not_applied = []
    with torch.random.fork_rng(devices=[]):  # its modules draw random weights before they get ours
        for row in patch.rows():
            modules = _modules(networks, network, patch, row, live)
            network.modules.update(modules)
            if not modules:
                not_applied.append(row.key)
        _complete_attention(networks, network, live)
    return Built(patch.id, network, tuple(not_applied), patch.changes_text_encoder())


def append(networks: Any, built: Built, strength: float) -> None:
    """Put the network into the list of those that are applied, in the place of any other of ours."""
    remove(networks)
    if not isinstance(networks.extra_network_lora.errors, _Errors):
        networks.extra_network_lora.errors = _Errors(networks.extra_network_lora.errors)
    built.network.te_multiplier = built.network.unet_multiplier = strength
    networks.loaded_networks.append(built.network)


def remove(networks: Any) -> None:
    """Take ours out of the list of networks that are applied."""
    networks.loaded_networks[:] = [network for network in networks.loaded_networks if not network.name.startswith(_NAME)]


class _Errors(dict[str, int]):
    """The extension's count of layers that it could not change, by network. It clears it before the hires pass: not ours.

    It takes such a layer for done, and tells of them where the prompt has LoRAs alone (networks.py:481-483 and 542).
    """

    def clear(self) -> None:
        for name in [name for name in self if not name.startswith(_NAME)]:
            del self[name]


def take_errors(networks: Any) -> int:
    """How many layers our network could not change since this was asked the last time."""
    errors = networks.extra_network_lora.errors
    return sum(errors.pop(name) for name in list(errors) if name.startswith(_NAME))


def others_in(networks: Any, modules: Collection[nn.Module]) -> list[str]:
    """Names of the networks of others that change any of these modules."""
    layers = {getattr(module, "network_layer_name", None) for module in modules}
    names = [network.name for network in networks.loaded_networks if layers & network.modules.keys()]
    return [name for name in names if not name.startswith(_NAME)]


def _modules(networks: Any, network: Any, patch: Patch, row: Row, live: Mapping[str, LiveTensor]) -> dict[str, Any]:
    """The network's modules for one row, by layer name; empty where the extension cannot change that tensor."""
    place = live.get(row.key)
    layer = getattr(place.module, "network_layer_name", None) if place else None
    if place is None or layer is None:
        return {}
    if place.name == "in_proj_weight":
        rows = [row] if row.part is not None or row.diff is None else [Row(row.key, diff=part) for part in row.diff.chunk(3)]
        names = [f"{layer}_{_PROJECTIONS[(row.part or 0) + n]}" for n in range(len(rows))]
        return {name: _module(networks, network, name, place, _entries(one)) for name, one in zip(names, rows, strict=True)}
    shape = tuple(place.tensor.shape)
    offset_shape = patch.offset.shapes.get(row.key, shape)
    if place.name != "weight" or not isinstance(place.module, _LAYERS) or (_is_padded(shape) and _is_padded(offset_shape)):
        return {}
    if math.prod(offset_shape) != math.prod(shape) and not _is_padded(shape):  # instruct-pix2pix
        diff = fitted(patch.delta(row.key), shape, row.key, patch.name, "the live model")
        return {layer: _module(networks, network, layer, place, _entries(Row(row.key, diff=diff, bias=row.bias)))}
    if row.up is None and row.diff is None:  # the bias alone
        small = (shape[0], shape[1] - _PADDING, *shape[2:]) if _is_padded(shape) else shape
        row = Row(row.key, diff=torch.zeros(1).expand(small), bias=row.bias)
    return {layer: _module(networks, network, layer, place, _entries(row))}


def _is_padded(shape: Shape) -> bool:
    """Whether it is the first convolution of an inpainting model: the extension pads every difference by five channels."""
    return len(shape) == 4 and shape[1] == 4 + _PADDING


def _entries(row: Row) -> dict[str, Tensor]:
    """The entries of a LoRA file that say what a row says."""
    if row.up is None or row.down is None:
        assert row.diff is not None, "a bias alone got a weight that changes nothing"
        return {"diff": row.diff} if row.bias is None else {"diff": row.diff, "diff_b": row.bias}
    if row.bias is None:
        return {"lora_up.weight": row.up, "lora_down.weight": row.down, "scale": torch.tensor(row.scale)}
    matrix = row.scale * (row.up.float() @ row.down.float().flatten(1))  # beside a pair it would ignore the bias
    return {"diff": matrix.reshape(row.up.shape[0], *row.down.shape[1:]), "diff_b": row.bias}


def _module(networks: Any, network: Any, layer: str, place: LiveTensor, weights: Mapping[str, Tensor]) -> Any:
    entry = networks.network.NetworkWeights(network_key=layer, sd_key=layer, w=dict(weights), sd_module=place.module)
    if "diff" in weights:
        return networks.network_full.NetworkModuleFull(network, entry)
    return networks.network_lora.NetworkModuleLora(network, entry)


def _complete_attention(networks: Any, network: Any, live: Mapping[str, LiveTensor]) -> None:
    """Nothing for those of q, k, v and out that do not change, in attention layers of which some do."""
    for place in live.values():
        if place.name != "in_proj_weight":
            continue
        names = [f"{place.module.network_layer_name}_{letter}" for letter in _PROJECTIONS]
        absent = [name for name in names if name not in network.modules]
        if len(absent) < len(names):
            width = place.tensor.shape[1]
            nothing = {"diff": torch.zeros(1).expand(width, width)}
            network.modules.update({name: _module(networks, network, name, place, nothing) for name in absent})


# ---- what it makes of a file ----


def matched_modules(networks: Any, lora: Path) -> set[str]:
    """Names of modules in a LoRA file, up to the first dot, that its own loader matches to the loaded model.

    It reads a file it cannot make sense of not at all: then none.
    """
    try:
        network = networks.load_network(lora.stem, _OnDisk(lora.stem, str(lora)))
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        _log.warning("the Lora extension rejects %s: %s", lora, error)
        return set()
    return {str(module.network_key).partition(".")[0] for module in network.modules.values()}
