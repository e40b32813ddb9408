"""A strict fake of the few names of A1111 1.10.1 that lib_dpo uses: misspelt ones raise AttributeError.

The model is a real module tree with all real keys. The Lora extension is our own small version that behaves as the real
one was seen to: backups of every patched layer, kept for good; merged weights that stay merged until the next forward pass;
one list of networks, told apart by name and strength.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lib_dpo.families.keymap import VAE
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.hosts import inplace
from lib_dpo.hosts.a1111.live import A1111Live
from lib_dpo.offsets.lora.file import read_lora
from lib_dpo.offsets.patch import Patch

Tensors = Mapping[str, torch.Tensor]
PATCHED = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)
NetworkWeights = namedtuple("NetworkWeights", ["network_key", "sd_key", "w", "sd_module"])


# ---- the model ----


def module_of(path: str, own: Tensors) -> nn.Module:
    """The module of the type that ldm, transformers and open_clip have at this path."""
    weight = own.get("weight")
    if "in_proj_weight" in own:
        return nn.MultiheadAttention(own["in_proj_weight"].shape[1], 1)
    if weight is None:
        return nn.Module()
    if path.endswith(("token_embedding", "position_embedding")):
        return nn.Embedding(*weight.shape)
    if weight.ndim == 1:
        is_group = re.search(r"(in_layers|out_layers|diffusion_model\.out)\.0$|\.norm$|norm_out$|first_stage.*norm", path)
        return nn.GroupNorm(1, len(weight)) if is_group else nn.LayerNorm(len(weight))
    bias = "bias" in own
    if weight.ndim == 2:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    return nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=bias)


def build(tensors: Tensors) -> nn.Module:
    """A module tree with these keys; text encoders and token embeddings are wrapped, as the host's hijack does."""
    own: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        own.setdefault(path, {})[name] = tensor
    root = nn.Module()
    for path in sorted(own, key=lambda path: path.count(".")):
        put(root, path, module_of(path, own[path]))
    for path, entries in own.items():
        module = root.get_submodule(path)
        for name, tensor in entries.items():
            if name not in module._parameters and name != "position_ids" and path:
                module.register_parameter(name, nn.Parameter(tensor.clone()))
    for path in [p for p in own if p.endswith("token_embedding")] + wrapped_encoders(tensors):
        wrapper = nn.Module()
        wrapper.add_module("wrapped", root.get_submodule(path))
        put(root, path, wrapper)
    if hasattr(root, "conditioner"):
        root.cond_stage_model = root.conditioner
    return root


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Set a module at a path, shorter paths first; one that stands there already keeps its children."""
    if not path:
        return
    *parts, last = path.split(".")
    parent = root
    for part in parts:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    if last not in parent._modules or isinstance(module, nn.Linear) or hasattr(module, "wrapped"):
        parent._modules[last] = module


def wrapped_encoders(tensors: Tensors) -> list[str]:
    if any(key.startswith("conditioner.") for key in tensors):
        numbers = {key.split(".")[2] for key in tensors if key.startswith("conditioner.")}
        return [f"conditioner.embedders.{n}" for n in sorted(numbers)]
    return ["cond_stage_model"]


def canonical(name: str) -> str:
    return name.replace(".wrapped", "")


# ---- the Lora extension ----


class Network:
    def __init__(self, name: str, network_on_disk: Any) -> None:
        self.name, self.network_on_disk = name, network_on_disk
        self.te_multiplier = self.unet_multiplier = 1.0
        self.dyn_dim = None
        self.modules: dict[str, Any] = {}
        self.bundle_embeddings: dict[str, Any] = {}
        self.mentioned_name = None


class NetworkModule:
    def __init__(self, net: Network, weights: Any) -> None:
        self.network, self.w = net, weights.w
        self.network_key, self.sd_key, self.sd_module = weights.network_key, weights.sd_key, weights.sd_module

    def multiplier(self) -> float:
        return self.network.te_multiplier if "transformer" in self.sd_key[:20] else self.network.unet_multiplier

    def calc_updown(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.delta()
        if weight.numel() == target.numel():
            weight = weight.reshape(target.shape)
        scale = self.w["scale"].item() if "scale" in self.w else 1.0
        return weight * scale * self.multiplier(), None if bias is None else bias * self.multiplier()

    def delta(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError


class NetworkModuleLora(NetworkModule):
    def __init__(self, net: Network, weights: Any) -> None:
        super().__init__(net, weights)
        assert isinstance(weights.sd_module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))
        torch.rand(1)  # as making a layer does
        if "alpha" in self.w and "scale" not in self.w:
            self.w["scale"] = self.w["alpha"] / self.w["lora_down.weight"].shape[0]

    def delta(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        up, down = self.w["lora_up.weight"].float(), self.w["lora_down.weight"].float()
        return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:]), None


class NetworkModuleFull(NetworkModule):
    def delta(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.w["diff"], self.w.get("diff_b")


def restore(module: nn.Module) -> None:
    weight = getattr(module, "network_weights_backup", None)
    bias = getattr(module, "network_bias_backup", None)
    if weight is None and bias is None:
        return
    if isinstance(module, nn.MultiheadAttention):
        module.in_proj_weight.copy_(weight[0])
        module.out_proj.weight.copy_(weight[1])
        module.out_proj.bias.copy_(bias)
        return
    module.weight.copy_(weight)  # type: ignore[operator,union-attr]
    if bias is not None:
        module.bias.copy_(bias)  # type: ignore[operator,union-attr]


def reset(module: nn.Module) -> None:
    module.network_current_names = ()
    module.network_weights_backup = module.network_bias_backup = None


def back_up(module: nn.Module) -> None:
    if getattr(module, "network_weights_backup", None) is not None:
        return
    assert getattr(module, "network_current_names", ()) == (), "no backup and weights that are not clean"
    if isinstance(module, nn.MultiheadAttention):
        module.network_weights_backup = (module.in_proj_weight.detach().clone(), module.out_proj.weight.detach().clone())
        module.network_bias_backup = module.out_proj.bias.detach().clone()
        return
    module.network_weights_backup = module.weight.detach().clone()  # type: ignore[operator,union-attr]
    bias = module.bias
    module.network_bias_backup = None if bias is None else bias.detach().clone()  # type: ignore[operator,union-attr]


def apply_weights(networks: Any, module: nn.Module) -> None:
    """What happens to a patched layer that is about to run."""
    layer = getattr(module, "network_layer_name", None)
    if layer is None:
        return
    wanted = tuple((n.name, n.te_multiplier, n.unet_multiplier, n.dyn_dim) for n in networks.loaded_networks)
    if wanted:
        back_up(module)
    if getattr(module, "network_current_names", ()) == wanted:
        return
    restore(module)
    for network in networks.loaded_networks:
        try:
            add_network(module, layer, network)
        except RuntimeError:  # logged for debugging; the layer counts as done (networks.py:481-483, 512-514 and 542)
            errors = networks.extra_network_lora.errors
            errors[network.name] = errors.get(network.name, 0) + 1
    module.network_current_names = wanted


def add_network(module: nn.Module, layer: str, network: Network) -> None:
    if isinstance(module, nn.MultiheadAttention):
        parts = [network.modules.get(f"{layer}_{name}_proj") for name in ("q", "k", "v", "out")]
        if all(part is not None for part in parts):
            q, k, v, out = parts
            square = module.out_proj.weight
            module.in_proj_weight += torch.vstack([part.calc_updown(square)[0] for part in (q, k, v)])
            change, bias = out.calc_updown(square)
            module.out_proj.weight += change
            if bias is not None:
                module.out_proj.bias += bias
    elif layer in network.modules:
        add_to_layer(module, network.modules[layer])


def add_to_layer(module: Any, part: NetworkModule) -> None:
    exact = getattr(module, "fp16_weight", None)
    weight = module.weight if exact is None else exact
    change, bias = part.calc_updown(weight)
    if weight.ndim == 4 and weight.shape[1] == 9:
        change = nn.functional.pad(change, (0, 0, 0, 0, 0, 5))
    module.weight.copy_((weight.to(change.dtype) + change).to(module.weight.dtype))
    if bias is not None:
        own = module.bias if exact is None else module.fp16_bias
        module.bias.copy_((own.to(bias.dtype) + bias).to(module.bias.dtype))


# ---- the host ----


class A1111:
    """The fake and what the contract tests ask of it."""

    merges_in_float32 = True

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        *,
        lora: bool = True,
        fp8: bool = False,
        cached: bool = True,
        manual_cast: bool = False,
    ) -> None:
        self.monkeypatch, self.folder, self.fp8, self.cached = monkeypatch, folder, fp8, cached
        self.manual_cast = manual_cast  # Apple, Intel XPU, GTX 16xx
        self.dtype = torch.float8_e4m3fn if fp8 else torch.float16
        self.files: dict[str, dict[str, torch.Tensor]] = {}
        self.modules = self._install(lora)
        self.live = A1111Live()
        self.comments: list[str] = []
        self.empty_prompts = 0

    def _install(self, lora: bool) -> SimpleNamespace:
        """Put the fake modules where lib_dpo imports them."""

        def module(name: str, **names: Any) -> ModuleType:
            made = ModuleType(name)
            for key, value in names.items():
                setattr(made, key, value)
            self.monkeypatch.setitem(sys.modules, name, made)
            return made

        processing = SimpleNamespace(cached_c=[None, None], cached_uc=[None, None])
        txt2img = SimpleNamespace(cached_hr_c=[None, None], cached_hr_uc=[None, None])
        data = SimpleNamespace(sd_model=None, loaded_sd_models=[])
        own = {
            "sd_models": module(
                "modules.sd_models",
                model_data=data,
                get_empty_cond=self._empty_cond,
                checkpoint_aliases={},
                reload_model_weights=self._reload_model_weights,
            ),
            "sd_unet": module("modules.sd_unet", current_unet=None),
            "shared": module("modules.shared", opts=SimpleNamespace(sd_model_checkpoint=None, lora_functional=False)),
            "devices": module("modules.devices", autocast=contextlib.nullcontext),
            "extra_networks": module("modules.extra_networks", ExtraNetworkParams=SimpleNamespace),
            "processing": module(
                "modules.processing",
                StableDiffusionProcessing=processing,
                StableDiffusionProcessingTxt2Img=txt2img,
            ),
        }
        module("modules", **own)
        self.monkeypatch.delitem(sys.modules, "networks", raising=False)
        if lora:
            own["networks"] = module(
                "networks",
                network=module("network", Network=Network, NetworkWeights=NetworkWeights),
                network_lora=module("network_lora", NetworkModuleLora=NetworkModuleLora),
                network_full=module("network_full", NetworkModuleFull=NetworkModuleFull),
                loaded_networks=[],
                extra_network_lora=SimpleNamespace(errors={}),
                network_restore_weights_from_backup=restore,
                network_reset_cached_weight=reset,
                load_network=self._load_network,
            )
        return SimpleNamespace(**own)

    @property
    def model(self) -> Any:
        return self.modules.sd_models.model_data.sd_model

    def _empty_cond(self, model: Any) -> torch.Tensor:
        """As the host: no networks, then the text encoder runs."""
        if hasattr(self.modules, "networks"):
            self.modules.networks.loaded_networks.clear()
        assert not torch.is_inference_mode_enabled()
        self._run(text_encoder=True, unet=False)
        self.empty_prompts += 1
        first = next(tensor for key, tensor in self.weights().items() if key.endswith("layers.0.mlp.fc1.weight"))
        return first.clone()

    # ---- checkpoints ----

    def add(self, name: str, tensors: Tensors) -> None:
        path = self.folder / f"{name}.safetensors"
        path.touch()
        self.files[name] = {key: tensor.clone() for key, tensor in tensors.items()}
        self.modules.sd_models.checkpoint_aliases[name] = self._info(name)

    def _info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name_for_extra=name, filename=str(self.folder / f"{name}.safetensors"))

    def load(self, name: str) -> None:
        self.modules.shared.opts.sd_model_checkpoint = name
        self._load(name)

    def _load(self, name: str) -> None:
        data = self.modules.sd_models.model_data
        kept = [model for model in data.loaded_sd_models if model.sd_checkpoint_info.name_for_extra == name]
        if kept:
            data.sd_model = kept[0]
            return
        if data.sd_model is None:
            self._new(name)
            return
        self._read(data.sd_model, name)
        self._loaded_callback(data.sd_model)

    def load_beside(self, name: str) -> None:
        self.modules.shared.opts.sd_model_checkpoint = name
        self._new(name)

    def refine(self, name: str, *, keep: bool) -> None:
        """What a refiner (sd_samplers_common.py:196), a hires checkpoint (processing.py:1360) and an API request that
        overrides the checkpoint (processing.py:855) leave: another model is live, and the setting is as it was.

        Args:
            keep: the other model as well, as `sd_checkpoints_limit` of 2 or more does.
        """
        if keep:
            self._new(name)
        else:
            self._load(name)

    def _reload_model_weights(self) -> None:
        """Each picture begins with it (processing.py:830)."""
        name = self.modules.shared.opts.sd_model_checkpoint
        if name is not None and self.model.sd_checkpoint_info.name_for_extra != name:
            self._load(name)

    def reload(self) -> None:
        self._read(self.model, self.model.sd_checkpoint_info.name_for_extra)
        self._loaded_callback(self.model)

    def throw_away(self) -> None:
        self.model.to("meta")

    def _new(self, name: str) -> None:
        model: Any = build(self.files[name])
        data = self.modules.sd_models.model_data
        data.loaded_sd_models.append(model)
        data.sd_model = model
        self._read(model, name)
        self._loaded_callback(model)
        with torch.no_grad():
            model.cond_stage_model_empty_prompt = self._empty_cond(model)

    def _read(self, model: Any, name: str) -> None:
        """Into the same Parameter objects, which drops what the Lora extension keeps."""
        tensors = self.files[name]
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, PATCHED):
                    reset(module)
            for parameter in model.parameters():
                if self.fp8:
                    parameter.data = parameter.data.half()
            for key, parameter in model.named_parameters():
                parameter.copy_(tensors[canonical(key)])
        vae, model.first_stage_model = model.first_stage_model, None
        model.half()
        if self.fp8:
            self._to_fp8(model)
        model.first_stage_model = vae
        model.sd_checkpoint_info = self._info(name)

    def _to_fp8(self, model: Any) -> None:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                if self.cached:
                    module.fp16_weight = module.weight.data.clone()
                if self.cached and module.bias is not None:
                    module.fp16_bias = module.bias.data.clone()
                module.to(torch.float8_e4m3fn)

    def _loaded_callback(self, model: Any) -> None:
        """The Lora extension names the layers, again and again."""
        mapping = {}
        wrapped = [p for p, m in model.named_modules() if hasattr(m, "wrapped") and not p.endswith("token_embedding")]
        numbered = len(wrapped) > 1 or any(path.startswith("conditioner") for path in wrapped)
        for number, path in enumerate(wrapped):
            for name, module in model.get_submodule(path).wrapped.named_modules():
                mapping[(f"{number}_" if numbered else "") + name.replace(".", "_")] = module
        for name, module in model.model.named_modules():
            mapping[name.replace(".", "_")] = module
        for name, module in mapping.items():
            module.network_layer_name = name
        model.network_layer_mapping = mapping

    def switch_vae(self) -> None:
        with torch.no_grad():
            for parameter in self.model.first_stage_model.parameters():
                parameter.mul_(0.5)
        self._loaded_callback(self.model)

    # ---- generation ----

    def _load_network(self, name: str, network_on_disk: Any) -> Network:
        """Reads LoRA pairs and differences; a lone bias fails, as it does there."""
        network = Network(name, network_on_disk)
        with open_checkpoint(network_on_disk.filename) as checkpoint:
            for layer in read_lora(checkpoint).layers:
                names = {"up": "lora_up.weight", "down": "lora_down.weight"}
                w = {names.get(part, part): checkpoint.read(key) for part, key in layer.parts.items()}
                sd_key, sd_module = self._find(layer.module.key, layer.module.part)
                if sd_module is None:
                    continue
                entry = NetworkWeights(next(iter(layer.parts.values())), sd_key, w, sd_module)
                assert "lora_up.weight" in w or "diff" in w, "no module type accepts it"
                network.modules[sd_key] = (NetworkModuleLora if "lora_up.weight" in w else NetworkModuleFull)(network, entry)
        return network

    def _find(self, key: str, part: int | None) -> tuple[str, Any]:
        for name, module in self.model.named_modules():
            path = canonical(name)
            if part is None and f"{path}.weight" == key:
                return module.network_layer_name, module
            if part is not None and f"{path}.in_proj_weight" == key:
                return f"{module.network_layer_name}_{'qkv'[part]}_proj", module
        return "", None

    def generate(
        self,
        patch: Patch | None = None,
        strength: float = 1.0,
        *,
        loras: Sequence[tuple[Path, float]] = (),
        hires: bool = False,
        disable_extra_networks: bool = False,
    ) -> Tensors:
        self._reload_model_weights()
        p = SimpleNamespace(extra_network_data={}, comment=self.comments.append, disable_extra_networks=disable_extra_networks)
        if hires:
            p.hr_extra_network_data = {}
        self.p = p
        passes = [p.extra_network_data] + ([p.hr_extra_network_data] if hires else [])
        for number, data in enumerate(passes):
            p.is_hr_pass = number > 0
            if not disable_extra_networks:  # processing.py:959 and 1435: the list stays as the last picture left it
                self._activate(p, data, loras, patch, strength)
            self.live.on_batch(p, patch, strength)
            self.live.on_sampling(p, patch, strength)
            self._run()
        return {canonical(key): tensor.detach().clone() for key, tensor in self.model.named_parameters()}

    def _activate(self, p: Any, data: Any, loras: Sequence[tuple[Path, float]], patch: Patch | None, strength: float) -> None:
        if hasattr(self.modules, "networks"):
            self.modules.networks.loaded_networks.clear()
            self.modules.networks.extra_network_lora.errors.clear()  # extra_networks_lora.py:17, before the hires pass too
        for path, weight in loras:
            network = self._load_network(path.stem, SimpleNamespace(filename=str(path)))
            network.te_multiplier = network.unet_multiplier = weight
            self.modules.networks.loaded_networks.append(network)
        self.live.on_networks(p, patch, strength, data)

    def _run(self, *, text_encoder: bool = True, unet: bool = True) -> None:
        if not hasattr(self.modules, "networks"):
            return
        with torch.no_grad():
            for name, module in self.model.named_modules():
                inside_attention = name.endswith("attn.out_proj")  # its forward is never called
                wanted = unet if name.startswith("model.") else text_encoder
                if isinstance(module, PATCHED) and wanted and not name.startswith(VAE) and not inside_attention:
                    with self._cast(module):
                        apply_weights(self.modules.networks, module)

    @contextlib.contextmanager
    def _cast(self, module: nn.Module) -> Iterator[None]:
        """Attention layers run in float32 under manual_cast (modules/devices.py:139-165): backups of then stay so."""
        if not (self.manual_cast and isinstance(module, nn.MultiheadAttention)):
            yield
            return
        module.float()
        yield
        module.to(self.dtype)

    def weights(self) -> Tensors:
        found = {}
        for name, module in self.model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                kept = getattr(module, "network_weights_backup" if own == "weight" else "network_bias_backup", None)
                if isinstance(module, nn.MultiheadAttention):
                    kept = module.network_weights_backup[0] if getattr(module, "network_weights_backup", None) else None
                    kept = kept if own == "in_proj_weight" else None
                found[canonical(f"{name}.{own}")] = (parameter if kept is None else kept).detach().clone()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention) and getattr(module, "network_weights_backup", None):
                found[canonical(f"{name}.out_proj.weight")] = module.network_weights_backup[1].clone()
                found[canonical(f"{name}.out_proj.bias")] = module.network_bias_backup.clone()
        return found

    def disturb(self, key: str) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if canonical(name) == key:
                    parameter.add_(1)

    def starve(self) -> None:
        self.monkeypatch.setattr(inplace, "available_memory", lambda: 0)
