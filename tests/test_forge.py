"""Forge, Classic, reForge and Neo beyond the contract (test_hosts.py): when they merge, what they cache, what they are."""

from __future__ import annotations

import gc
import math
import shutil
import sys
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes_forge
import pytest
import tiny
import torch
from fakes_forge import FORKS_HERE, LATE, FakeForge

from lib_dpo.errors import BadFileError, BadTensorError, HostError, NoModelError
from lib_dpo.families.blocks import parse_blocks
from lib_dpo.families.keymap import UNET
from lib_dpo.hosts.forge import live as live_module
from lib_dpo.hosts.forge import modules, patches
from lib_dpo.hosts.forge.live import ForgeLive
from lib_dpo.hosts.forge.on_demand import OnDemand
from lib_dpo.offsets.patch import Patch, open_patch

if not FORKS_HERE:  # on AUTOMATIC1111's versions: the sets of Forge and the newest run this file
    pytest.skip("no fork of Forge ships these versions", allow_module_level=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with norms, a dense offset file, and one LoRA with a text encoder part."""
    folder = tmp_path_factory.mktemp("forge")
    pair = [tiny.save(folder / "base.safetensors", tiny.base()), tiny.save(folder / "tuned.safetensors", tiny.tuned(rms=1e-2))]
    of = ("--base", pair[0], "--tuned", pair[1])
    assert tiny.run("extract", *of, "-o", folder / "sd1.safetensors", "--rank", 4, "--profile", "webui") == 0
    assert tiny.run("offset", *of, "-o", folder / "dense.safetensors") == 0
    assert tiny.run("extract", *of, "-o", folder / "exact.safetensors", "--form", "exact") == 0
    generator = torch.Generator().manual_seed(1)
    unet = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    te = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {}
    for name, width in ((unet, 32), (te, 16)):
        tensors[f"{name}.lora_up.weight"] = torch.randn((width, 2), generator=generator)
        tensors[f"{name}.lora_down.weight"] = torch.randn((2, width), generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    tiny.save(folder / "te.safetensors", tensors)
    return folder


@pytest.fixture(params=FORKS_HERE)
def host(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeForge:
    fake = FakeForge(request.param, tmp_path).install(monkeypatch)
    fake.load(fake.checkpoint("a", 0))
    return fake


@pytest.fixture
def forge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeForge:
    fake = FakeForge("forge", tmp_path).install(monkeypatch)
    fake.load(fake.checkpoint("a", 0))
    return fake


@pytest.fixture
def live() -> ForgeLive:
    return ForgeLive()


def patch_of(files: Path, name: str = "sd1", **options: Any) -> Patch:
    return open_patch(files / f"{name}.safetensors", **options)


def expected(host: FakeForge, patch: Patch, strength: float) -> dict[str, torch.Tensor]:
    """The UNet as a sum in float32, rounded once."""
    tensors = {key: tensor.to(host.dtype) for key, tensor in tiny.base(host.arch).items() if key.startswith(UNET)}
    for key in patch.changed_keys():
        if key in tensors:
            tensors[key] = (tensors[key].float() + strength * patch.delta(key)).to(host.dtype)
    return {key.removeprefix("model."): tensor for key, tensor in tensors.items()}


def weights(host: FakeForge) -> dict[str, torch.Tensor]:
    model = host.data.sd_model.forge_objects_original.unet.model
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def off_by(host: FakeForge, tensors: dict[str, torch.Tensor]) -> float:
    """The largest difference; one unit of float16 is 1e-3 for weights from 1 to 2, which are the largest."""
    found = weights(host)
    return max(float((found[key].float() - tensor.float()).abs().max()) for key, tensor in tensors.items())


# ---- generations ----


def test_all_passes_of_hires_get_the_patch_once(host: FakeForge, live: ForgeLive, files: Path):
    patch = patch_of(files, "te")
    _, first, _, second = host.picture(live, patch, 0.5, hires=True)
    assert torch.equal(first, second)
    conds, _, hires_conds, _ = host.picture(live, patch, 0.5, hires=True)
    assert torch.equal(conds, hires_conds)
    base = host.picture(live, hires=True)
    assert torch.equal(base[1], base[3])
    assert not torch.equal(base[1], first)
    assert not torch.equal(base[0], conds)


def test_only_a_text_encoder_in_the_hires_pass_needs_the_hook_of_networks(live: ForgeLive, files: Path):
    for name, enable_hr, needed in (("te", True, True), ("te", False, False), ("sd1", True, False)):
        assert live.needs_networks(SimpleNamespace(enable_hr=enable_hr), patch_of(files, name)) is needed


def test_equal_generations_merge_once(host: FakeForge, live: ForgeLive, files: Path):
    patch = patch_of(files)
    host.picture(live, patch, 0.5)
    merges = host.merges()
    for _ in range(3):
        host.picture(live, patch, 0.5, hires=True)
    assert host.merges() == merges
    host.picture(live, patch, 0.6)
    assert host.merges() == merges + 1


def test_a_change_of_strength_reads_nothing(host: FakeForge, live: ForgeLive, files: Path):
    patch = patch_of(files)
    first = host.picture(live, patch, 0.5)
    patch.close()
    assert not torch.equal(host.picture(live, patch, 0.6), first)


def test_other_contents_at_equal_strength_are_applied(host: FakeForge, live: ForgeLive, files: Path):
    whole = host.picture(live, patch_of(files), 0.5)
    assert not torch.equal(host.picture(live, patch_of(files, rank=1), 0.5), whole)
    assert not torch.equal(host.picture(live, patch_of(files, blocks=parse_blocks("OUT=0")), 0.5), whole)
    assert torch.equal(host.picture(live, patch_of(files), 0.5), whole)


def test_the_text_encoder_is_never_taken_from_the_cache_of_another_patch(host: FakeForge, live: ForgeLive, files: Path):
    patch, base = patch_of(files, "te"), host.picture(live)[0]
    conds = host.picture(live, patch, 1.0)[0]
    assert not torch.equal(conds, base)
    assert not torch.equal(host.picture(live, patch, 0.5)[0], conds)
    assert torch.equal(host.picture(live, patch, 1.0)[0], conds)
    assert torch.equal(host.picture(live, patch_of(files), 1.0)[0], base)  # changes the UNet only
    host.load(host.checkpoint("a", 0))  # the same file again, in a new model: the host's cache knows no difference
    assert torch.equal(host.picture(ForgeLive(), patch, 1.0)[0], conds)
    assert torch.equal(host.picture(ForgeLive())[0], base)


def test_conds_stay_cached_while_nothing_changes(host: FakeForge, live: ForgeLive, files: Path):
    host.picture(live)
    cached = host.Processing.cached_c[1]
    for patch, strength in ((None, 0.0), (patch_of(files), 1.0), (patch_of(files, "te"), 0.0)):
        host.picture(live, patch, strength)
        assert host.Processing.cached_c[1] is cached
    host.picture(live, patch_of(files, "te"), 1.0)
    assert host.Processing.cached_c[1] is not cached


# ---- bake and undo ----


def test_looking_at_the_weights_changes_no_picture(host: FakeForge, live: ForgeLive, files: Path):
    patch, loras = patch_of(files), [(files / "te.safetensors", 0.6)]
    picture = host.picture(live, patch, 0.5, loras=loras)
    live.fingerprint()
    assert torch.equal(host.picture(live, patch, 0.5, loras=loras), picture)


def test_the_same_patch_can_be_baked_and_added(host: FakeForge, live: ForgeLive, files: Path):
    patch = patch_of(files, "dense")
    live.bake(patch, 0.5)
    host.picture(live, patch, 0.5)
    assert off_by(host, expected(host, patch, 1.0)) < 1e-3


def test_a_checkpoint_has_the_same_fingerprint_whenever_it_is_loaded(host: FakeForge, live: ForgeLive):
    """Forge and Neo leave a weight that no checkpoint has as their memory happened to be, and cast two at the first picture."""
    first, other = live.fingerprint(), host.checkpoint("b", 1)
    host.picture(live)
    assert live.fingerprint() == first
    host.load(other)
    assert live.fingerprint() != first
    host.load(host.folder / "a.safetensors")
    assert live.fingerprint() == first


@pytest.mark.parametrize("name", ["sd1", "te"])
def test_a_bake_before_the_models_first_picture_can_be_undone(host: FakeForge, live: ForgeLive, files: Path, name: str):
    """Forge and Neo turn the embeddings of the text encoder from float16 into float32 when they first encode a prompt."""
    model = host.data.sd_model.forge_objects_original.clip.patcher.model
    dtypes, prints = {parameter.dtype for parameter in model.parameters()}, live.fingerprint()
    live.bake(patch_of(files, name), 0.5)
    host.picture(live)
    turned = {parameter.dtype for parameter in model.parameters()} != dtypes
    assert turned == (host.fork in LATE)
    live.bake(patch_of(files, name), 1.0)
    assert live.unbake()
    assert live.fingerprint() == prints


def test_a_change_of_strength_or_part_keeps_what_undo_compares_with(host: FakeForge, live: ForgeLive, files: Path):
    """Each bake looks at what it touches; undo at all that was touched since."""
    prints = live.fingerprint()
    for name in ("sd1", "te", "dense", "sd1"):
        live.bake(patch_of(files, name), 0.5)
    with torch.inference_mode():
        name = "clip_l.transformer.text_model.final_layer_norm.bias"
        host.data.sd_model.forge_objects_original.clip.patcher.model.get_parameter(name).add_(1)
    with pytest.raises(HostError, match="changed by something else"):
        live.unbake()
    assert live.fingerprint()["unet"] == prints["unet"]


def test_undo_leaves_others_what_it_did_not_touch(host: FakeForge, live: ForgeLive, files: Path):
    live.bake(patch_of(files), 0.5)
    with torch.inference_mode():
        name = "clip_l.transformer.text_model.final_layer_norm.bias"
        host.data.sd_model.forge_objects_original.clip.patcher.model.get_parameter(name).add_(1)
    assert live.unbake()


def test_a_new_model_is_clean_and_the_old_one_is_let_go(host: FakeForge, live: ForgeLive, files: Path):
    patch, token = patch_of(files), live.loaded().token
    live.bake(patch, 0.5)
    host.picture(live, patch, 0.5)
    old = weakref.ref(host.data.sd_model.forge_objects_original.unet.model)
    assert live.loaded().token == token
    host.load(host.folder / "a.safetensors")
    assert live.loaded().token != token
    assert live.baked() is None
    assert not live.unbake()
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("baked", [True, False])
def test_a_shell_that_stays_keeps_no_copies_of_weights(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baked: bool
):
    host, live = FakeForge("reforge", tmp_path).install(monkeypatch), ForgeLive()
    shell = host.load(host.checkpoint("a", 0))  # reForge never lets go of it
    if baked:
        live.bake(patch_of(files), 0.5)
    else:
        host.picture(live, patch_of(files), 0.5)
    copies = shell.forge_objects_original.unet.backup
    assert copies
    host.load(host.checkpoint("b", 1))
    host.picture(live)
    assert not copies
    assert not shell.forge_objects_original.unet.patches


def test_forge_bakes_what_is_chosen(forge: FakeForge, live: ForgeLive, files: Path):
    forge.choose(forge.checkpoint("b", 1))
    assert live.loaded().name == "a"
    live.bake(patch_of(files), 0.5)
    assert live.loaded().name == "b"
    assert live.baked() is not None


@pytest.mark.parametrize("keep", [False, True])
def test_after_a_refiner_the_checkpoint_that_draws_is_loaded_before_work(
    host: FakeForge, live: ForgeLive, files: Path, keep: bool
):
    if host.fork in LATE:
        pytest.skip("the refiner gives the checkpoint back by itself, and it is loaded for the next picture")
    baked = live.bake(patch_of(files), 0.5)
    host.refine(host.checkpoint("b", 1), keep=keep)
    assert (live.loaded().name, live.chosen()) == ("b", host.folder / "a.safetensors")
    assert live.baked() is None
    assert live.baked_next() == (baked if keep else None)
    live.ready()
    assert (live.loaded().name, live.chosen()) == ("a", None)
    assert live.baked() == live.baked_next() == (baked if keep else None)
    assert live.unbake() is keep


def test_before_the_first_load(host: FakeForge, live: ForgeLive, files: Path):
    host.data.sd_model = fakes_forge.FakeInitialModel() if host.fork in LATE else None
    assert live.loaded() is None
    assert live.baked() is None
    assert live.baked_next() is None
    assert live.chosen() is None
    assert not live.unbake()
    assert live.bake_bytes(patch_of(files)) > 0
    for call in (
        lambda: live.bake(patch_of(files), 1.0),
        live.fingerprint,
        lambda: live.matched_keys(files / "sd1.safetensors"),
    ):
        with pytest.raises(NoModelError, match="make a picture"):
            call()


# ---- what goes wrong ----


def test_keys_that_the_model_lacks_are_reported(host: FakeForge, live: ForgeLive, files: Path, tmp_path: Path):
    name = "lora_te_text_model_encoder_layers_11_mlp_fc1"
    tensors = {f"{name}.lora_up.weight": torch.ones(64, 1), f"{name}.lora_down.weight": torch.ones(1, 16)}
    unet = "lora_unet_mid_block_attentions_0_proj_in"
    tensors |= {f"{unet}.lora_up.weight": torch.ones(32, 1), f"{unet}.lora_down.weight": torch.ones(1, 32, 1, 1)}
    tensors["something.else.diff"] = torch.ones(1)
    file = tiny.save(tmp_path / "odd.safetensors", tensors)
    clip = host.data.sd_model.forge_objects_original.clip.patcher.model
    del clip.clip_l.transformer.text_model.encoder.layers._modules["11"]
    baked = live.bake(open_patch(file), 1.0)
    assert baked.tensors == 1
    assert baked.not_applied == (
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight",
        "something.else.diff",
    )


def test_undo_notices_that_others_wrote_to_the_weights(host: FakeForge, live: ForgeLive, files: Path):
    live.bake(patch_of(files, blocks=parse_blocks("OUT=0")), 0.5)
    with torch.inference_mode():
        host.data.sd_model.forge_objects_original.unet.model.get_parameter("diffusion_model.out.2.bias").add_(1)
    with pytest.raises(HostError, match="changed by something else"):
        live.unbake()
    assert live.baked() is None


def test_a_bake_is_kept_in_mind_when_the_status_is_asked_for_while_another_fails(
    host: FakeForge, live: ForgeLive, files: Path, monkeypatch: pytest.MonkeyPatch
):
    """The tab asks without the host's lock, and Reload UI makes a new live model meanwhile."""
    clean, first = weights(host), live.bake(patch_of(files), 0.5)

    def fail(*_: Any) -> None:
        ForgeLive().baked()
        raise BadTensorError("a tensor holds NaN")

    with monkeypatch.context() as patched:
        patched.setattr(live_module, "check_finite", fail)
        with pytest.raises(BadTensorError):
            live.bake(patch_of(files, "dense"), 1.0)
    assert live.baked() == first
    assert live.unbake()
    host.picture(live)
    assert all(map(torch.equal, weights(host).values(), clean.values()))


def test_patches_of_others_on_top_of_a_bake_are_left_alone(host: FakeForge, live: ForgeLive, files: Path):
    live.bake(patch_of(files), 0.5)
    original = host.data.sd_model.forge_objects_original
    ours = original.unet
    original.unet = ours.clone()
    assert live.baked() is not None
    for call in (live.unbake, lambda: live.bake(patch_of(files), 1.0)):
        with pytest.raises(HostError, match="changed by something else"):
            call()
    original.unet = ours
    assert live.unbake()
    live.bake(patch_of(files), 0.5)
    original.unet = host.patcher(original.unet.model)  # theirs alone
    assert live.baked() is None


def test_a_bake_that_breaks_off_while_the_host_merges_leaves_nothing(
    host: FakeForge, live: ForgeLive, files: Path, monkeypatch: pytest.MonkeyPatch
):
    patch, earlier = patch_of(files, "dense"), patch_of(files, "te")
    before, picture = weights(host), host.picture(live)
    break_off(host, live, patch, monkeypatch)
    assert live.baked() is None
    assert all(map(torch.equal, weights(host).values(), before.values()))
    assert torch.equal(host.picture(live), picture)
    baked = live.bake(earlier, 0.5)
    with_bake, picture = weights(host), host.picture(live)
    break_off(host, live, patch, monkeypatch)
    assert live.baked() == baked
    assert torch.equal(host.picture(live), picture)
    assert all(map(torch.equal, weights(host).values(), with_bake.values()))
    assert live.unbake()
    host.picture(live)
    assert all(map(torch.equal, weights(host).values(), before.values()))


def test_a_bake_starts_from_the_originals_after_somebodys_merge_broke_off(
    host: FakeForge, live: ForgeLive, files: Path, monkeypatch: pytest.MonkeyPatch
):
    """Forge says then that nothing is merged, and draws the next picture with half of it; a bake must not keep that."""
    prints, before, patch = live.fingerprint(), weights(host), patch_of(files, "dense")
    with monkeypatch.context() as patched:
        patched.setattr(fakes_forge, "merged", merged_but_one())
        with pytest.raises(RuntimeError, match="out of memory"):
            host.picture(live, patch, 1.0)
    live.bake(patch, 0.5)
    assert off_by(host, expected(host, patch, 0.5)) <= 1e-3
    assert live.unbake()
    assert all(map(torch.equal, weights(host).values(), before.values()))
    assert live.fingerprint() == prints


def break_off(host: FakeForge, live: ForgeLive, patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bake a patch, for which the memory is too small after a few tensors."""
    with monkeypatch.context() as patched:
        patched.setattr(fakes_forge, "merged", merged_but_one())
        with pytest.raises(RuntimeError, match="out of memory"):
            live.bake(patch, 1.0)


def merged_but_one() -> Callable[..., torch.Tensor]:
    """`merged`, which fails at the fourth tensor."""
    real, calls = fakes_forge.merged, list[int]()

    def merged(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("CUDA out of memory")
        return real(*args, **options)

    return merged


# ---- quantised models ----


@pytest.mark.parametrize("fork", FORKS_HERE)
def test_quantised_weights_are_patched_while_generating_or_refused(
    fork: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    host, live = FakeForge(fork, tmp_path, dtype=torch.float8_e4m3fn).install(monkeypatch), ForgeLive()
    host.load(host.checkpoint("a", 0))
    patch, before, base = patch_of(files), live.fingerprint(), host.picture(live)
    assert (live.loaded().storage, live.loaded().online) == ("float8_e4m3fn", True)
    if fork not in ("forge", "neo"):
        for call in (lambda: live.bake(patch, 1.0), lambda: host.picture(live, patch, 1.0)):
            with pytest.raises(HostError, match="stored as float8_e4m3fn, into which changes this small vanish"):
                call()
        assert torch.equal(host.picture(live), base)
        return
    assert not torch.equal(host.picture(live, patch, 0.01), base)
    assert torch.equal(host.picture(live), base)
    baked = live.bake(patch, 0.01)
    assert baked.online
    patcher = host.data.sd_model.forge_objects_original.unet
    if fork == "forge":
        assert {key[3] for key in patcher.lora_patches} == {True}
    else:
        assert patcher.online.keys() == patcher.patches.keys()
    assert live.fingerprint() == before
    assert live.unbake()
    assert torch.equal(host.picture(live), base)


class Comfys(torch.Tensor):
    """A weight in one of ComfyUI's formats: it says the dtype it is computed in (comfy_kitchen/tensor/base.py:163-183)."""

    _is_param = True
    _qdata: torch.Tensor

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> Comfys:
        self: Comfys = torch.Tensor._make_subclass(cls, weight)
        self._qdata = weight.to(torch.float8_e4m3fn)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


@pytest.mark.parametrize("fork", [fork for fork in FORKS_HERE if fork.startswith("neo")])
def test_weights_in_comfyuis_formats_are_never_merged_into(
    fork: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their own set_weight would round the sum to 8 bits, which costs more than the change is."""
    host, live = FakeForge(fork, tmp_path).install(monkeypatch), ForgeLive()
    model = host.load(host.checkpoint("a", 0)).forge_objects_original.unet.model
    base = host.picture(live)
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    parent = model.get_submodule(name.rpartition(".")[0])
    parent._parameters["weight"] = Comfys(parent.weight.detach())
    patch = patch_of(files)
    assert [key for key, parameter in model.named_parameters() if patches.quantised(parameter)] == [name]
    if fork == "neo-comfy":
        with pytest.raises(HostError, match="stored as float8_e4m3fn, into which changes this small vanish"):
            live.bake(patch, 0.5)
        return
    stored = model.get_parameter(name)
    assert live.bake(patch, 0.5).online
    patcher = host.data.sd_model.forge_objects_original.unet
    assert patcher.online.keys() == {name}
    assert patcher.patches.keys() > {name}
    assert model.get_parameter(name) is stored
    assert not torch.equal(host.picture(live), base)
    assert live.unbake()
    assert torch.equal(host.picture(live), base)


# ---- names ----


def test_sdxl_text_encoders_are_found_by_their_thirds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host, live = FakeForge("forge", tmp_path, arch="sdxl").install(monkeypatch), ForgeLive()
    engine = host.load(host.checkpoint("xl", 0))
    tensors = {}
    for letter in "qk":
        name = f"lora_te2_text_model_encoder_layers_3_self_attn_{letter}_proj"
        tensors |= {f"{name}.lora_up.weight": torch.ones(16, 1), f"{name}.lora_down.weight": torch.ones(1, 16)}
    patch = open_patch(tiny.save(tmp_path / "te2.safetensors", tensors))
    baked = live.bake(patch, 0.5)
    assert (baked.tensors, baked.not_applied) == (1, ())
    before = tiny.in_transformers(patch.architecture.text_encoders[1], tiny.base("sdxl"))
    for letter, added in (("q", 0.5), ("k", 0.5), ("v", 0.0)):
        name = f"text_model.encoder.layers.3.self_attn.{letter}_proj.weight"
        parameter = engine.forge_objects_original.clip.patcher.model.get_parameter("clip_g.transformer." + name)
        torch.testing.assert_close(parameter.float(), before[name] + added, atol=1e-3, rtol=1e-3)


def test_matched_keys_are_counted_by_the_hosts_own_loader(host: FakeForge, live: ForgeLive, files: Path, tmp_path: Path):
    matched, total = live.matched_keys(files / "sd1.safetensors")
    assert matched == total > 500
    stray = {
        "lora_unet_no_such_layer.lora_up.weight": torch.ones(1, 1),
        "lora_unet_no_such_layer.lora_down.weight": torch.ones(1, 1),
    }
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    stray |= {f"{name}.lora_up.weight": torch.ones(64, 1), f"{name}.lora_down.weight": torch.ones(1, 16)}
    assert live.matched_keys(tiny.save(tmp_path / "stray.safetensors", stray)) == (2, 4)


def test_the_fork_is_told_by_its_modules(host: FakeForge, live: ForgeLive):
    names = {
        "forge": ("Forge", "forge 1.0"), "classic": ("Forge Classic", "classic 1.0"), "reforge": ("reForge", "reforge 1.0"),
        "neo": ("Forge Neo", "2.26"), "neo-comfy": ("Forge Neo", "2.29"),
    }  # fmt: skip
    assert modules.fork_name() == names[host.fork]
    found = {check.name: check for check in live.checks()}
    assert found["quantised models"].text.startswith("patched" if host.fork in ("forge", "neo") else "refused")
    assert all(check.ok for check in found.values())
    assert found["WebUI"].text == " ".join(names[host.fork])


def test_what_is_missing_is_said(host: FakeForge, live: ForgeLive, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(sys.modules["modules.scripts"].ScriptRunner, "process_before_every_sampling")
    monkeypatch.delattr(modules.lora_module(), "load_lora")
    lost = {check.name: check.text for check in live.checks() if not check.ok}
    assert lost["sampling hook"].startswith("not found: offsets cannot be added to a generation")
    assert lost["LoRA loader"].startswith("not found: neither")


def test_not_a_fork(monkeypatch: pytest.MonkeyPatch):
    assert not modules.is_forge()


# ---- deltas that are made when the host merges ----


def test_a_bake_reads_its_deltas_when_the_host_merges(
    host: FakeForge, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bakes_alike(host, files / "exact.safetensors", "", files, tmp_path, monkeypatch)


def test_block_weights_of_an_offset_file_are_applied_when_the_host_merges(
    forge: FakeForge, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bakes_alike(forge, files / "dense.safetensors", "mid=0.5, out=2", files, tmp_path, monkeypatch)


def bakes_alike(
    host: FakeForge, offset: Path, blocks: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bake, merge with another LoRA and undo, once with all deltas in memory and once on demand: equal to the bit."""
    clean, found, kept = weights(host), [], []
    for small in (1 << 60, 0):  # all in memory, and all on demand
        monkeypatch.setattr(patches, "_SMALL", small)
        file = Path(shutil.copy(offset, tmp_path / "offset.safetensors"))
        live = ForgeLive()
        with closing(open_patch(file, blocks=parse_blocks(blocks))) as patch:
            live.bake(patch, 0.7)
            assert off_by(host, expected(host, patch, 0.7)) <= 1e-3
        shutil.copy(files / "te.safetensors", tmp_path / "other.safetensors")
        (tmp_path / "other.safetensors").replace(file)  # as a person does who extracts again
        gc.collect()
        record = live_module._state(host.data.sd_model).bake
        assert record is not None
        kept.append(sum(isinstance(value[1][0], OnDemand) for value in record.patches.unet.values() if value[0] == "diff"))
        with_other = host.picture(live, patch_of(files, "te"), 0.5)  # the host takes its weights out and merges both
        host.picture(live)
        found.append((weights(host), with_other))
        assert live.unbake()
        host.picture(live)
        assert all(map(torch.equal, weights(host).values(), clean.values()))
    assert kept == [0, len(record.patches.unet)]
    assert all(map(torch.equal, found[0][0].values(), found[1][0].values()))
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_what_is_read_on_demand_takes_no_memory(host: FakeForge, live: ForgeLive, files: Path):
    originals = {
        key: math.prod(shape) * host.dtype.itemsize
        for key, shape in patch_of(files, "exact").offset.shapes.items()
        if UNET in key
    }
    for patch in (patch_of(files, "exact"), patch_of(files, "dense"), patch_of(files, "dense", blocks=parse_blocks("mid=0.5"))):
        rest = live.bake_bytes(patch) - sum(originals[key] for key in patch.changed_keys())
        biases = sum(patch.checkpoint.infos[key].nbytes for key in patch.checkpoint.infos if key.endswith("diff_b"))
        norms = 4 * sum(
            math.prod(patch.offset.shapes[key]) for key in patch.changed_keys() if len(patch.offset.shapes[key]) == 1
        )
        assert 0 <= rest <= biases + norms


def test_a_file_that_was_replaced_is_not_baked(forge: FakeForge, live: ForgeLive, files: Path, tmp_path: Path):
    file = Path(shutil.copy(files / "exact.safetensors", tmp_path / "offset.safetensors"))
    before = weights(forge)
    patch = open_patch(file)
    shutil.copy(files / "te.safetensors", tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(file)
    with pytest.raises(BadFileError, match="was replaced while"):
        live.bake(patch, 1.0)
    assert live.baked() is None
    assert all(map(torch.equal, weights(forge).values(), before.values()))


def test_a_tensor_on_demand_is_made_for_each_computation():
    whole, made = torch.arange(6.0).reshape(2, 3), []
    tensor = OnDemand((2, 3), lambda: (made.append(1), whole)[1])
    assert (tensor.shape, tensor.dtype, tensor.device.type, made) == ((2, 3), torch.float32, "cpu", [])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            sums = torch.ones(2, 3)
            sums += 0.5 * tensor
            assert torch.equal(sums, 1 + 0.5 * whole)
            results = (
                tensor.to(torch.float16),
                tensor.to("cpu", copy=True),
                torch.cat([tensor, tensor]),
                tensor.flatten(),
                sums,
            )
            assert {type(result) for result in results} == {torch.Tensor}
            assert torch.equal(torch.empty(2, 3).copy_(tensor), whole)
    assert len(made) == 2 * 7
