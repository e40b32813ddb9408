"""What only A1111 does: cond caches, the Lora extension's list, 8-bit storage, other UNets; against the strict fake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fakes_a1111
import pytest
import tiny
import torch
from fakes_a1111 import A1111

from lib_dpo.errors import Cancelled, HostError, NoModelError
from lib_dpo.hosts.a1111.live import A1111Live
from lib_dpo.maths.delta import Whole
from lib_dpo.offsets.patch import Patch, open_patch
from lib_dpo.webui.tab.bake.page import _baked_html

TE_KEY = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> A1111:
    return started(A1111(monkeypatch, tmp_path))


def started(host: A1111, arch: str = "sd1") -> A1111:
    host.add("base", tiny.base(arch))
    host.load("base")
    return host


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Patch:
    return lora_patch(
        tmp_path_factory.mktemp("unet"), "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 32, 32
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Patch:
    return lora_patch(tmp_path_factory.mktemp("text"), "lora_te_text_model_encoder_layers_1_mlp_fc1", 64, 16)


def lora_patch(folder: Path, name: str, rows: int, columns: int, size: float = 0.05) -> Patch:
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(shape, generator=generator) * size for shape in ((rows, 2), (2, columns)))
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
    return open_patch(tiny.save(folder / f"{name}.safetensors", tensors))


def dense_patch(folder: Path, keys: list[str], size: float = 0.01) -> Patch:
    """A dense offset file of a whole UNet that changes these keys of the checkpoint only."""
    base = tiny.base()
    tensors = {key: torch.zeros_like(t) for key, t in base.items() if t.is_floating_point() and key.startswith("model.")}
    tensors |= {key: torch.full_like(base[key], size) for key in keys}
    return open_patch(tiny.save(folder / "dense.safetensors", tensors))


def test_what_of_a_file_no_model_has_a_place_for_is_said_while_generating(host: A1111, tmp_path: Path):
    up, down = torch.ones(32, 2) * 0.05, torch.ones(2, 32) * 0.05
    names = ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "lora_te_text_model_encoder_layers_40_mlp_fc1")
    tensors = {f"{name}.lora_{end}.weight": tensor for name in names for end, tensor in (("up", up), ("down", down))}
    host.generate(open_patch(tiny.save(tmp_path / "odd.safetensors", tensors)), 1.0)
    (comment,) = host.comments
    assert comment.startswith("DPO offset: the text encoder's part is missing or incomplete: 2 keys")
    assert "layers_40" in comment


# ---- prompts that the host has encoded ----


def fill_caches(host: A1111) -> list[list[object]]:
    first, second = host.modules.processing.StableDiffusionProcessing, host.modules.processing.StableDiffusionProcessingTxt2Img
    caches = [first.cached_c, first.cached_uc, second.cached_hr_c, second.cached_hr_uc]
    for cache in caches:
        cache[:] = ["key", "cond"]
    return caches


def test_a_changed_text_encoder_throws_encoded_prompts_away(host: A1111, unet: Patch, text: Patch):
    caches = fill_caches(host)
    empty = host.model.cond_stage_model_empty_prompt
    host.live.bake(unet, 1.0)
    assert caches == [["key", "cond"]] * 4
    assert host.model.cond_stage_model_empty_prompt is empty
    host.live.bake(text, 1.0)
    assert caches == [[None, None]] * 4
    host.live.bake(unet, 1.0)  # takes the change of the text encoder back
    assert host.empty_prompts == 3
    fill_caches(host)
    host.live.bake(text, 1.0)
    fill_caches(host)
    host.live.unbake()
    assert caches == [[None, None]] * 4
    assert not host.model.cond_stage_model_empty_prompt.is_inference()
    host.live.bake(text, 1.0)
    fill_caches(host)
    host.reload()
    assert host.live.baked() is None
    assert caches == [[None, None]] * 4


def test_encoded_prompts_are_told_apart_by_what_changes_the_text_encoder(host: A1111, unet: Patch, text: Patch):
    def key(patch: Patch | None, strength: float = 1.0) -> list[list[str]]:
        host.generate(patch, strength, hires=True)
        data = (host.p.extra_network_data, host.p.hr_extra_network_data)
        return [entry.items for one in data for entry in one.get("dpo_offset", [])]

    assert key(None) == key(unet) == key(text, 0.0) == []
    keys = [key(text), key(text, 0.5)]
    host.live.bake(text, 0.25)
    keys += [key(None), key(text), key(unet)]
    assert keys[2] == keys[4]
    assert len({str(k) for k in keys}) == 4
    assert all(len(k) == 2 and k[0] == k[1] for k in keys)  # of both passes


def test_the_hires_prompts_are_marked_before_their_pass(host: A1111, text: Patch):
    p = SimpleNamespace(extra_network_data={}, hr_extra_network_data={}, comment=host.comments.append)
    host.live.on_networks(p, text, 1.0, p.extra_network_data)
    assert p.hr_extra_network_data.keys() == {"dpo_offset"}
    host.live.on_networks(p, None, 1.0, p.extra_network_data)
    assert p.extra_network_data == p.hr_extra_network_data == {}


# ---- the list of networks ----


def test_the_network_is_kept_for_another_strength_and_dropped_with_the_patch(host: A1111, unet: Patch, text: Patch):
    networks = host.modules.networks.loaded_networks
    state = torch.get_rng_state()
    host.generate(unet, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    (network,) = networks
    host.generate(unet, 0.5)
    host.generate(unet, 0.0)
    host.generate(unet, 0.5)
    assert networks == [network]
    assert (network.te_multiplier, network.unet_multiplier) == (0.5, 0.5)
    assert (network.network_on_disk.shorthash, network.bundle_embeddings) == ("", {})
    host.live.on_networks(host.p, unet, 0.7, {})  # again within one batch
    assert networks == [network]
    host.generate(text, 1.0)
    assert networks != [network]
    assert len(networks) == 1
    host.generate(None)
    assert networks == []
    assert not hasattr(host.model, "_dpo_network")


def test_a_picture_without_extra_networks_has_no_offset_of_the_last_one(host: A1111, unet: Patch, tmp_path: Path):
    """The host leaves the prompt's LoRAs in its list then; those are its own."""
    before, lora = host.weights(), tmp_path / "lora.safetensors"
    tiny.save(lora, {f"{TO_Q}.lora_up.weight": torch.ones(32, 1), f"{TO_Q}.lora_down.weight": torch.ones(1, 32) * 0.1})
    host.generate(unet, 1.0)
    found = host.generate(None, disable_extra_networks=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in found.items())
    with_lora = host.generate(None, loras=[(lora, 1.0)])
    host.generate(unet, 1.0, loras=[(lora, 1.0)])
    found = host.generate(None, disable_extra_networks=True)
    assert all(torch.equal(tensor, with_lora[key]) for key, tensor in found.items())
    assert host.live.needs_networks(host.p, unet)


def test_what_cannot_be_applied_while_generating_is_said(host: A1111, tmp_path: Path):
    embedding = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    norm = "model.diffusion_model.out.0.bias"
    patch = dense_patch(tmp_path, [norm])
    before = host.weights()
    found = host.generate(patch, 1.0)
    assert torch.allclose(found[norm], before[norm] + 0.01, atol=1e-3)
    assert host.comments == []
    offset = patch.offset
    offset.shapes[embedding] = tuple(before[embedding].shape)  # type: ignore[index]
    terms = offset.terms
    object.__setattr__(offset, "terms", lambda key: [Whole(torch.ones(16, 16))] if key == embedding else terms(key))
    object.__setattr__(patch, "id", "other")
    assert torch.equal(host.generate(patch, 1.0)[embedding], before[embedding])
    assert "1 of its tensors cannot be applied" in host.comments[0]
    host.live.bake(patch, 1.0)
    assert torch.equal(host.weights()[embedding], before[embedding] + 1)
    host.live.unbake()
    assert torch.equal(host.weights()[embedding], before[embedding])


def test_a_bake_counts_the_tensors_whose_values_changed(host: A1111, tmp_path: Path):
    norms = ["model.diffusion_model.out.0.bias", "model.diffusion_model.out.0.weight"]
    before = host.weights()
    for number, keys in enumerate([norms, norms[:1], []]):
        (tmp_path / str(number)).mkdir()
        baked = host.live.bake(dense_patch(tmp_path / str(number), keys), 1.0)
        after = host.weights()
        assert baked.tensors == len(keys) == sum(not torch.equal(after[key], before[key]) for key in before)
    assert "No value of the model changed" in _baked_html(baked)
    assert "unet.up.weight" in _baked_html(replace(baked, twins=("unet.up.weight",)))
    host.live.unbake()


def test_without_the_lora_extension_a_bake_works_and_a_generation_says_why_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unet: Patch
):
    host = started(A1111(monkeypatch, tmp_path, lora=False))
    before = host.weights()
    assert host.live.bake(unet, 1.0)
    assert host.live.unbake()
    host.generate(None)
    host.generate(unet, 0.0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in host.weights().items())
    with pytest.raises(HostError, match="Lora extension is switched off"):
        host.generate(unet, 1.0)
    with pytest.raises(HostError, match="Lora extension is switched off"):
        host.live.matched_keys(tmp_path / "any")
    missing = [check for check in host.live.checks() if not check.ok]
    assert {check.name.split(".")[0] for check in missing} == {"networks"}
    assert all("not found: " in check.text for check in missing)


@pytest.mark.parametrize("hires", [False, True])
def test_layers_that_the_extension_fails_to_change_are_told_and_tried_again(
    host: A1111, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hires: bool
):
    """It says nothing of them without a LoRA in the prompt, and takes them for done."""
    keys = [f"model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_{letter}.weight" for letter in "qkv"]
    patch = dense_patch(tmp_path, keys)
    whole = host.generate(patch, 1.0)
    assert host.live.left_out() == ""
    before = host.generate()
    real, failed = fakes_a1111.NetworkModuleFull.delta, list[str]()

    def delta(module: fakes_a1111.NetworkModuleFull) -> tuple[torch.Tensor, torch.Tensor | None]:
        if module.sd_key.endswith("attn1_to_k") and "middle_block" in module.sd_key and not failed:
            failed.append(module.sd_key)
            raise RuntimeError("CUDA out of memory")
        return real(module)

    monkeypatch.setattr(fakes_a1111.NetworkModuleFull, "delta", delta)
    part = host.generate(patch, 1.0, hires=hires)
    assert [key for key in before if not torch.equal(part[key], before[key])] == [keys[0], keys[2]]
    assert "could not be added to 1 of the model's layers" in host.live.left_out()
    assert host.live.left_out() == ""
    assert same(host.generate(patch, 1.0, hires=hires), whole)
    assert host.live.left_out() == ""
    failed.clear()
    host.generate()
    assert not same(host.generate(patch, 1.0), whole)  # broken off: nobody asked
    assert same(host.generate(patch, 1.0), whole)
    assert host.live.left_out() == ""
    assert same(host.generate(), before)


def test_a_file_that_the_loader_rejects_matches_nothing(host: A1111, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    bias_alone = {"lora_unet_conv_in.diff_b": torch.zeros(8), "lora_unet_conv_out.diff": torch.zeros(4, 8, 3, 3)}
    file = tiny.save(tmp_path / "alone.safetensors", bias_alone)
    assert host.live.matched_keys(file) == (0, 2)
    assert "rejects" in caplog.text


# ---- the model ----


def test_it_is_told_by_its_file_and_storage(host: A1111):
    loaded = host.live.loaded()
    assert loaded is not None
    assert (loaded.name, loaded.path, loaded.storage) == ("base", host.folder / "base.safetensors", "float16")
    host.switch_vae()
    assert host.live.loaded() == loaded


@pytest.mark.parametrize("keep", [False, True])
def test_after_a_refiner_the_checkpoint_that_draws_is_loaded_before_work(host: A1111, unet: Patch, keep: bool):
    host.add("refiner", tiny.base(seed=3))
    host.refine("refiner", keep=keep)
    refiner = host.live.loaded()
    assert refiner is not None
    assert (refiner.name, host.live.chosen()) == ("refiner", host.folder / "base.safetensors")
    host.live.ready()
    model = host.live.loaded()
    assert model is not None
    assert (model.name, host.live.chosen()) == ("base", None)
    baked = host.live.bake(unet, 1.0)
    with_bake = host.weights()
    assert all(torch.equal(tensor, with_bake[key]) for key, tensor in host.generate().items())
    assert host.live.baked() == baked


@pytest.mark.parametrize("keep", [False, True])
def test_a_bake_in_a_model_that_was_kept_draws_the_next_picture(host: A1111, unet: Patch, keep: bool):
    baked = host.live.bake(unet, 1.0)
    host.add("refiner", tiny.base(seed=3))
    host.refine("refiner", keep=keep)
    assert host.live.baked() is None
    assert host.live.baked_next() == (baked if keep else None)
    host.live.ready()
    assert host.live.baked() == host.live.baked_next() == (baked if keep else None)
    assert host.live.unbake() is keep


def test_a_checkpoint_that_is_in_no_list_any_more_is_not_waited_for(host: A1111):
    for name in (None, "gone"):
        host.modules.shared.opts.sd_model_checkpoint = name
        assert host.live.chosen() is None


def test_a_model_that_was_thrown_away_is_none(host: A1111, unet: Patch):
    host.live.bake(unet, 1.0)
    host.throw_away()
    assert host.live.loaded() is None
    assert host.live.baked() is None
    assert host.live.unbake() is False
    with pytest.raises(NoModelError):
        host.live.bake_bytes(unet)


def test_a_tensorrt_unet_is_refused(host: A1111, unet: Patch):
    host.modules.sd_unet.current_unet = object()
    with pytest.raises(HostError, match="SD Unet"):
        host.live.bake(unet, 1.0)


def test_a_bake_under_a_poll_of_the_status(host: A1111, unet: Patch, text: Patch):
    first = host.live.bake(unet, 1.0)
    seen = []
    host.live.bake(text, 1.0, lambda done, total, key: seen.append(host.live.baked()))
    assert seen == [first]


@pytest.mark.parametrize("edit", ["bake", "undo"])
def test_a_bake_is_kept_in_mind_when_the_ui_is_reloaded_during_an_edit(host: A1111, unet: Patch, text: Patch, edit: str):
    """Reload UI runs scripts/dpo.py again, and so makes a new live model, while the job that holds the lock goes on."""
    clean = host.weights()
    first = host.live.bake(unet, 1.0)
    reloaded, seen = A1111Live(), []

    def look(done: int, total: int, key: str) -> None:
        seen.append(reloaded.baked())
        if edit == "bake" and done > total / 2:
            raise Cancelled("stopped")

    if edit == "bake":
        with pytest.raises(Cancelled):
            host.live.bake(text, 1.0, look)
        assert reloaded.baked() == first
        assert reloaded.unbake()
    else:
        assert host.live.unbake(look)
    assert {id(baked) for baked in seen} == {id(first)}
    assert reloaded.baked() is None
    assert all(torch.equal(tensor, clean[key]) for key, tensor in host.weights().items())


def test_weights_in_channels_last_and_made_in_inference_mode(host: A1111, tmp_path: Path):
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    host.model.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for module in host.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.clone()))
    before = host.weights()
    assert not before[key].is_contiguous()
    patch = dense_patch(tmp_path, [key])
    with torch.inference_mode():
        baked = host.live.bake(patch, 1.0)
    assert host.live.baked() == baked
    assert torch.allclose(host.weights()[key], before[key] + 0.01, atol=1e-3)
    assert host.live.loaded() is not None
    host.live.unbake()
    assert all(torch.equal(tensor, before[k]) for k, tensor in host.weights().items())


@pytest.mark.parametrize("attention_alone", [False, True])
def test_a_bake_into_attention_is_known_and_undone_after_a_lora_whose_backup_is_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attention_alone: bool
):
    host = started(A1111(monkeypatch, tmp_path, manual_cast=True), "sdxl")
    base = tiny.base("sdxl")
    attention = {key for key in base if key.endswith("attn.in_proj_weight")}
    linear = set() if attention_alone else {key for key in base if key.endswith("middle_block.1.proj_in.weight")}
    tensors = {
        key: torch.full_like(t, 0.01 * (key in attention | linear))
        for key, t in base.items()
        if t.is_floating_point() and (key.startswith("model.") or "embedders.1." in key)
    }
    patch = open_patch(tiny.save(tmp_path / "dense.safetensors", tensors))
    lora = tiny.save(tmp_path / "lora.safetensors", {
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(16, 1) * 0.05,
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(1, 16) * 0.05,
    })  # fmt: skip
    before = host.weights()
    baked = host.live.bake(patch, 1.0)
    assert host.live.baked() == baked
    host.generate(loras=[(lora, 1.0)])
    assert {tensor.dtype for key, tensor in host.weights().items() if key in attention} == {torch.float32}
    assert host.live.baked() == baked
    assert host.live.unbake()
    assert all(torch.equal(tensor, before[key]) for key, tensor in host.weights().items())


# ---- 8-bit storage ----


def caches(host: A1111) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{kind}": getattr(module, kind).clone()
        for name, module in host.model.named_modules()
        for kind in ("fp16_weight", "fp16_bias")
        if hasattr(module, kind)
    }


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[key].float(), expected[key].float()) for key in expected)


TO_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TO_Q_KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize("size", [0.02, 0.5])  # far below the steps of 8 bits, and above
def test_fp8_weights_and_their_exact_copies_are_baked_and_restored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: float
):
    host = started(A1111(monkeypatch, tmp_path, fp8=True))
    loaded = host.live.loaded()
    assert loaded is not None
    assert loaded.storage == "float8_e4m3fn"
    before, exact = host.weights(), caches(host)
    patch = lora_patch(tmp_path, TO_Q, 32, 32, size=size)
    baked = host.live.bake(patch, 1.0)
    assert host.live.baked() == baked
    assert baked.bytes_kept == 32 * 32 * 3
    copy = TO_Q_KEY.replace(".weight", ".fp16_weight")
    wanted = exact[copy].float() + patch.delta(TO_Q_KEY)
    torch.testing.assert_close(host.weights()[TO_Q_KEY].float(), wanted, rtol=2**-4, atol=2**-10)  # steps of 3 bits
    torch.testing.assert_close(caches(host)[copy].float(), wanted, rtol=2**-11, atol=2**-25)
    assert host.live.unbake()
    assert same(host.weights(), before)
    assert same(caches(host), exact)


def test_a_change_that_fp8_rounds_away_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    host = started(A1111(monkeypatch, tmp_path, fp8=True, cached=False))
    before = host.weights()
    with pytest.raises(HostError, match=r"round \d+% of the change .* away; switch FP8 storage off") as caught:
        host.live.bake(lora_patch(tmp_path, TO_Q, 32, 32, size=0.01), 1.0)
    assert "generating" not in str(caught.value)  # rounds it away as well
    assert same(host.weights(), before)
    assert host.live.baked() is None
    assert host.live.bake(lora_patch(tmp_path, TO_Q, 32, 32, size=0.5), 1.0)
    assert host.live.unbake()
    assert same(host.weights(), before)


def test_a_change_that_fp8_rounds_away_is_refused_while_generating_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    host = started(A1111(monkeypatch, tmp_path, fp8=True, cached=False))
    before = host.generate()
    small = lora_patch(tmp_path, TO_Q, 32, 32, size=0.01)
    for _ in range(2):
        with pytest.raises(HostError, match=r"round 100% of the change .* let it keep FP16 copies"):
            host.generate(small, 1.0)
    assert same(host.generate(), before)
    assert not same(host.generate(small, 300.0), before)  # large enough
    large = lora_patch(tmp_path, TO_Q, 32, 32, size=0.5)
    for _ in range(2):
        assert not same(host.generate(large, 1.0), before)
    with pytest.raises(HostError, match=r"round \d+% of the change"):  # of the backup, not of what is merged
        host.generate(large, 1e-3)
    host.modules.shared.opts.lora_functional = True  # adds to what layers make, and not to their weights
    host.live.on_networks(host.p, lora_patch(tmp_path, TO_Q, 32, 32, size=0.01), 1.0, {})


def test_an_offset_never_takes_the_place_of_the_prompts_loras_in_fp8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    host = started(A1111(monkeypatch, tmp_path, fp8=True, cached=True))
    (tmp_path / "prompt").mkdir()
    other = lora_patch(tmp_path / "prompt", TO_Q, 32, 32, size=0.4).checkpoint.path
    elsewhere = lora_patch(tmp_path / "prompt", TO_Q.replace("to_q", "to_k"), 32, 32, size=0.4).checkpoint.path
    patch = lora_patch(tmp_path, TO_Q, 32, 32, size=0.5)
    before, alone = host.generate(), host.generate(loras=[(other, 1.0)])
    with pytest.raises(HostError, match=f"would take the place of {other.stem}. Bake {patch.name} instead"):
        host.generate(patch, 1.0, loras=[(other, 1.0)])
    assert same(host.generate(loras=[(other, 1.0)]), alone)
    assert not same(host.generate(patch, 1.0, loras=[(elsewhere, 1.0)]), before)
    assert host.live.bake(patch, 1.0)  # as it says: a bake edits the exact copies
    both = host.generate(loras=[(other, 1.0)])
    change = both[TO_Q_KEY].float() - before[TO_Q_KEY].float()
    wanted = patch.delta(TO_Q_KEY) + (alone[TO_Q_KEY].float() - before[TO_Q_KEY].float())
    assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.99
