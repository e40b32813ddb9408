"""The contract of live models: bake, undo and generation, the same for every host, against strict fakes.

Each on the versions that it ships, the newest set on most.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from fakes_a1111 import A1111
from fakes_forge import FORKS_HERE
from fakes_forge import Harness as Fork
from fakes_standalone import Standalone
from harness import Harness, Tensors
from tiny import FAULTS, TORCH

from lib_dpo.errors import BadFileError, BadTensorError, Cancelled, HostError, MismatchError, NoModelError, SettingError
from lib_dpo.families.blocks import parse_blocks
from lib_dpo.families.keymap import UNET, VAE
from lib_dpo.hosts import inplace
from lib_dpo.hosts.checksums import all_finite, checksum, digest
from lib_dpo.hosts.forge.patchers import memory_module
from lib_dpo.maths.delta import Term, Whole
from lib_dpo.offsets.patch import Patch, open_patch

HOSTS: dict[str, Callable[..., Harness]] = {fork: partial(Fork, fork) for fork in FORKS_HERE}
if not (2, 2) <= TORCH < (2, 5):  # those are the versions of Forge alone
    HOSTS["a1111"] = A1111
if importlib.util.find_spec("diffusers"):
    HOSTS["standalone"] = Standalone
QKV = "conditioner.embedders.1.model.transformer.resblocks.0.attn."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of SD 1.5, its LoRA (with norms), its dense offset, and LoRAs that somebody else made."""
    folder = tmp_path_factory.mktemp("hosts")
    for arch in ("sd1", "sdxl"):
        pair = [tiny.save(folder / f"{arch}_base.safetensors", tiny.base(arch))]
        pair.append(tiny.save(folder / f"{arch}_tuned.safetensors", tiny.tuned(arch, rms=1e-3)))
        of = ("--base", pair[0], "--tuned", pair[1])
        assert tiny.run("extract", *of, "-o", folder / f"{arch}_lora.safetensors", "--rank", 8, "--profile", "webui") == 0
        assert tiny.run("offset", *of, "-o", folder / f"{arch}_dense.safetensors") == 0
        half = tiny.save(folder / f"{arch}_tuned_fp16.safetensors", tiny.tuned(arch, rms=1e-3), torch.float16)
        assert tiny.run("offset", "--base", pair[0], "--tuned", half, "-o", folder / f"{arch}_dense_fp16.safetensors") == 0
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tiny.save(
        folder / "prompt_lora.safetensors", pair_of(unet, 8, 8) | pair_of("lora_te_text_model_encoder_layers_0_mlp_fc1", 64, 16)
    )
    tiny.save(folder / "te_lora.safetensors", pair_of("lora_te_text_model_encoder_layers_1_mlp_fc1", 64, 16))
    clip_g = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    tiny.save(folder / "clip_g_lora.safetensors", pair_of(clip_g, 16, 16))
    silent = pair_of(unet, 8, 8) | {f"{unet}.alpha": torch.tensor(0.0)}
    tiny.save(folder / "silent_lora.safetensors", silent)
    tiny.save(folder / "projection_lora.safetensors", pair_of("lora_te2_text_projection", 16, 16))
    return folder


def pair_of(name: str, rows: int, columns: int, rank: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    up, down = (torch.randn(shape, generator=generator) * 0.05 for shape in ((rows, rank), (rank, columns)))
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(float(rank))}


@pytest.fixture(params=HOSTS)
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Harness]:
    def start(arch: str = "sd1", **options: bool) -> Harness:
        host = HOSTS[request.param](monkeypatch, tmp_path, **options)
        host.add("base", tiny.base(arch))
        host.load("base")
        return host

    return start


def opened(files: Path, name: str, blocks: str = "", rank: int | None = None) -> Patch:
    return open_patch(files / f"{name}.safetensors", blocks=parse_blocks(blocks), rank=rank)


def check_sum(found: Tensors, before: Tensors, patch: Patch, strength: float, *, roundings: int = 1) -> None:
    """found = before + strength x patch, rounded; all other tensors bit for bit.

    Args:
        roundings: 2 or more where `before` is a sum that was rounded itself, and not on the way to `found`.
    """
    changed = set(patch.changed_keys())
    assert changed <= before.keys()
    for key, tensor in before.items():
        if key not in changed:
            assert torch.equal(found[key], tensor), key
            continue
        exact = tensor.double() + strength * patch.delta(key).double().reshape(tensor.shape)
        half_step = torch.finfo(tensor.dtype).eps / 2
        largest = exact.abs() if roundings == 1 else torch.maximum(exact.abs(), tensor.double().abs())
        bound = roundings * (largest * half_step + 2**-25) * 1.01  # 2^-25: half of the smallest float16
        assert bool(((found[key].double() - exact).abs() <= bound).all()), key


def check_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


# ---- bake and undo ----


@pytest.mark.parametrize(
    ("name", "strength", "blocks", "rank"),
    [
        ("sd1_lora", 1.0, "", None),
        ("sd1_lora", -0.7, "IN=0.5,MID=0", None),
        ("sd1_lora", 2.5, "", 3),
        ("sd1_dense", 0.3, "OUT=-1,TIME=0", None),
        ("te_lora", 1.0, "", None),
    ],
)
def test_a_bake_is_the_sum_and_undo_is_bit_equal(start, files: Path, name, strength, blocks, rank):
    host = start()
    before, prints = host.weights(), host.live.fingerprint()
    patch = opened(files, name, blocks, rank)
    baked = host.live.bake(patch, strength)
    check_sum(host.weights(), before, patch, strength)
    check_sum(host.generate(), before, patch, strength)
    assert host.live.baked() == baked
    assert (baked.patch_id, baked.strength, baked.blocks, baked.rank) == (patch.id, strength, str(patch.blocks), rank)
    assert baked.tensors == len(patch.changed_keys())
    assert baked.bytes_kept == host.live.bake_bytes(patch) > 0
    changed = "te" if name == "te_lora" else "unet"
    assert {part for part, value in host.live.fingerprint().items() if value != prints[part]} == {changed}
    assert host.live.unbake() is True
    assert host.live.baked() is None
    check_equal(host.weights(), before)
    check_equal(host.generate(), before)
    assert host.live.fingerprint() == prints
    assert host.live.unbake() is False


def test_originals_that_come_back_damaged_are_noticed(start, files: Path, monkeypatch: pytest.MonkeyPatch):
    host = start()
    if isinstance(host, Fork):
        pytest.skip("copies nothing back; test_forge.py changes what its checksum is over")
    host.live.bake(opened(files, "sd1_lora"), 1.0)
    real = inplace.Slot.write

    def damaged(slot: inplace.Slot, values: inplace.Values) -> None:
        real(
            slot,
            (torch.where(torch.arange(values[0].numel()).view(values[0].shape) == 3, values[0] + 1, values[0]), *values[1:]),
        )

    monkeypatch.setattr(inplace.Slot, "write", damaged)
    with pytest.raises(HostError, match="is not the one from before the bake"):
        host.live.unbake()


@pytest.mark.parametrize("arch", ["sd1", "sdxl"])
def test_the_dense_offset_at_strength_1_makes_the_tuned_model(start, files: Path, arch: str):
    host = start(arch)
    host.live.bake(opened(files, f"{arch}_dense_fp16"), 1.0)  # its differences are exact, those of float32 weights are not
    tuned = tiny.tuned(arch, rms=1e-3)
    check_equal(
        host.weights(), {key: tensor if key.startswith(VAE) else tuned[key].half() for key, tensor in host.weights().items()}
    )


def test_a_second_bake_replaces_the_first(start, files: Path):
    host = start()
    before, lora, dense = host.weights(), opened(files, "sd1_lora", "IN=0"), opened(files, "sd1_dense", "OUT=0")
    host.live.bake(lora, 1.0)
    host.live.bake(dense, 0.5)
    check_sum(host.weights(), before, dense, 0.5)
    host.live.bake(lora, 0.25)
    check_sum(host.weights(), before, lora, 0.25)
    host.live.unbake()
    check_equal(host.weights(), before)


def failing(patch: Patch, error: BaseException | None, at: int | None = None) -> Patch:
    """The patch, of which one tensor cannot be read, or holds NaN: the one in the middle, or the number `at`."""
    keys, read = patch.changed_keys(), patch.offset.terms
    bad = keys[len(keys) // 2 if at is None else at]

    def terms(key: str) -> Sequence[Term]:
        if key != bad:
            return read(key)
        if error:
            raise error
        return [Whole(torch.full(patch.offset.shapes[key], float("nan")))]

    return replace(patch, offset=replace(patch.offset, terms=terms))


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("error", "strength", "expected"),
    [
        (None, 1.0, BadTensorError),
        (OSError("disk"), 1.0, OSError),
        (KeyboardInterrupt(), 1.0, KeyboardInterrupt),
        (MemoryError(), 1.0, MemoryError),
        ("overflow", 1e9, BadTensorError),
        ("cancelled", 1.0, Cancelled),
    ],
)
def test_any_exception_leaves_the_model_as_it_was(start, files: Path, error, strength, expected, earlier: bool):
    host = start()
    patch = opened(files, "sd1_dense")
    if earlier:
        host.live.bake(opened(files, "sd1_lora"), 0.5)
    before, baked = host.weights(), host.live.baked()
    calls = []

    def on_progress(done: int, total: int, key: str) -> None:
        calls.append(done)
        if error == "cancelled" and done > total / 2:
            raise Cancelled("stopped")

    with pytest.raises(expected):
        host.live.bake(patch if isinstance(error, str) else failing(patch, error), strength, on_progress)
    check_equal(host.weights(), before)
    check_equal(host.generate(), before)
    assert host.live.baked() == baked
    assert error == "overflow" or len(calls) > 100
    if earlier:
        assert host.live.unbake()
        check_equal(host.weights(), {key: t if key.startswith(VAE) else t.half() for key, t in vae_and(host).items()})


def test_an_error_at_any_tensor_leaves_the_model_as_it_was(start, files: Path):
    """`make faults` goes through all of them."""
    host, patch = start(), opened(files, "sd1_dense")
    before, count = host.weights(), len(patch.changed_keys())
    for at in (0, count - 1, *some_of(count)):
        with pytest.raises(OSError, match="disk"):
            host.live.bake(failing(patch, OSError("disk"), at), 1.0)
        check_equal(host.weights(), before)
        assert host.live.baked() is None


@pytest.mark.parametrize("lasting", [False, True])
def test_an_undo_that_fails_at_any_tensor_puts_all_back_at_once_or_the_next_time(
    start, files: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
):
    """`make faults` goes through all of them."""
    host, patch = start(), opened(files, "sd1_lora")
    if isinstance(host, Fork):
        pytest.skip("writes to no weight; the next test is its own")
    before, prints, count = host.weights(), host.live.fingerprint(), len(patch.changed_keys())
    for at in {0, count - 1, *some_of(count)}:
        host.live.bake(patch, 1.0)
        with monkeypatch.context() as patched:
            patched.setattr(inplace.Slot, "write", failing_write(at, times=2 if lasting else 1))
            if lasting:
                with pytest.raises(HostError, match="a part of sd1_lora is still in the model; undo again"):
                    host.live.unbake()
                assert host.live.baked() is not None
            else:
                assert host.live.unbake()
        assert host.live.unbake() is lasting
        check_equal(host.weights(), before)
        assert host.live.baked() is None
    assert host.live.fingerprint() == prints


def test_an_undo_that_fails_twice_puts_back_what_it_can(start, files: Path, monkeypatch: pytest.MonkeyPatch):
    host, patch = start(), opened(files, "sd1_lora")
    if isinstance(host, Fork):
        pytest.skip("writes to no weight")
    before = host.weights()
    host.live.bake(patch, 1.0)
    refused: list[str] = []
    real = inplace.Slot.write

    def write(slot: inplace.Slot, values: inplace.Values) -> None:
        if slot.key in refused or len(refused) < 2:
            refused.append(slot.key)
            raise RuntimeError("CUDA error: unspecified launch failure")
        real(slot, values)

    with monkeypatch.context() as patched:
        patched.setattr(inplace.Slot, "write", write)
        with pytest.raises(HostError, match="undo again"):
            host.live.unbake()
    changed = {key for key, tensor in host.weights().items() if not torch.equal(tensor, before[key])}
    assert 1 <= len(changed) <= len(set(refused)) == 2
    host.add("other", tiny.base(seed=3))
    for name in ("other", "base"):  # as the message says; nobody looks at the tab meanwhile
        host.load(name)
    assert host.live.baked() is None
    assert not host.live.unbake()
    check_equal(host.weights(), before)


def failing_write(at: int, *, times: int) -> Callable[[inplace.Slot, inplace.Values], None]:
    """`Slot.write`, which the tensor number `at` refuses so many times, once half of it is written."""
    real, keys, refused = inplace.Slot.write, dict[str, int](), list[str]()

    def write(slot: inplace.Slot, values: inplace.Values) -> None:
        if keys.setdefault(slot.key, len(keys)) == at and len(refused) < times:
            refused.append(slot.key)
            half = values[0].numel() // 2
            slot.tensor.reshape(-1)[:half] = values[0].reshape(-1)[:half]
            raise RuntimeError("CUDA error: unspecified launch failure")
        real(slot, values)

    return write


def test_an_undo_whose_host_fails_leaves_the_clean_model(start, files: Path, monkeypatch: pytest.MonkeyPatch):
    """In the forks, which merge and restore by themselves; and whatever a page that was closed meanwhile raises."""
    host, patch = start(), opened(files, "sd1_lora")
    before = host.weights()
    for fails in ("load", "progress"):
        host.live.bake(patch, 1.0)
        with monkeypatch.context() as patched, suppress(RuntimeError):
            if fails == "load" and isinstance(host, Fork):
                patched.setattr(memory_module(), "load_models_gpu", refuse)
            host.live.unbake(refuse)
        host.live.unbake()
        check_equal(host.weights(), before)
        check_equal(host.generate(), before)
        assert host.live.baked() is None


def refuse(*args: object, **options: object) -> None:
    raise RuntimeError("broken off")


def some_of(count: int) -> Sequence[int]:
    """Numbers of tensors: all of them in `make faults`, else four."""
    return range(count) if count // 3 < FAULTS else random.Random(FAULTS).sample(range(count), 4)


@pytest.mark.parametrize("harm", ["cut short", "written to"])
def test_a_file_that_changes_during_a_bake_leaves_the_model_as_it_was(start, files: Path, tmp_path: Path, harm: str):
    host = start()
    path = tmp_path / "copy.safetensors"
    path.write_bytes((files / "sd1_dense.safetensors").read_bytes())
    before, patch = host.weights(), open_patch(path)

    def change(done: int, total: int, key: str) -> None:
        if done > total / 2:
            os.truncate(path, 1000) if harm == "cut short" else os.utime(path, (1, 1))

    with pytest.raises(BadFileError, match="was changed while it was being read"):
        host.live.bake(patch, 1.0, change)
    check_equal(host.weights(), before)
    check_equal(host.generate(), before)
    assert host.live.baked() is None


def vae_and(host: Harness) -> Tensors:
    """The base checkpoint in the tensors that the live model has."""
    base = tiny.base()
    return {key: base[key] for key in host.weights()}


def test_what_does_not_fit_is_refused_untouched(start, files: Path, tmp_path: Path):
    host = start()
    before = host.weights()
    with pytest.raises(MismatchError, match=r"an offset for SDXL but base is SD 1\.x"):
        host.live.bake(opened(files, "sdxl_lora"), 1.0)
    wide = tiny.save(
        tmp_path / "wide.safetensors", pair_of("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 64, 64)
    )
    with pytest.raises(MismatchError, match="middle_block"):
        host.live.bake(open_patch(wide), 1.0)
    with pytest.raises(MismatchError, match="an offset for SDXL"):
        host.generate(opened(files, "sdxl_lora"))
    with pytest.raises(SettingError, match="changes nothing"):
        host.live.bake(opened(files, "sd1_lora", "ALL=0"), 1.0)
    check_equal(host.weights(), before)
    check_equal(host.generate(), before)
    assert host.live.baked() is None


def test_an_inpainting_model_keeps_its_extra_channels(start, files: Path):
    host = start()
    host.add("inpainting", tiny.base(in_channels=9))
    host.load_beside("inpainting")
    before = host.weights()
    for patch in (opened(files, "sd1_dense"), opened(files, "sd1_lora")):
        host.live.bake(patch, 1.0)
        check_conv_in(host.weights(), before, patch)
        host.live.unbake()
        check_conv_in(host.generate(patch), before, patch)
        check_equal(host.generate(), before)


def check_conv_in(found: Tensors, before: Tensors, patch: Patch) -> None:
    key = UNET + "input_blocks.0.0.weight"
    assert torch.equal(found[key][:, 4:], before[key][:, 4:])
    change = found[key][:, :4].float() - before[key][:, :4].float()
    torch.testing.assert_close(change, patch.delta(key), atol=1e-3, rtol=0)  # float16 steps of weights up to 1
    assert bool(change.any())


def test_too_little_memory_is_refused_untouched(start, files: Path):
    host = start()
    before = host.weights()
    host.starve()
    with pytest.raises(HostError, match="memory is free"):
        host.live.bake(opened(files, "sd1_lora"), 1.0)
    check_equal(host.weights(), before)
    assert host.live.baked() is None


def test_without_a_model_it_says_so(start, files: Path, monkeypatch, tmp_path: Path, request):
    host = HOSTS[request.node.callspec.params["start"]](monkeypatch, tmp_path)
    assert host.live.loaded() is None
    assert host.live.baked() is None
    assert host.live.unbake() is False
    with pytest.raises(NoModelError, match="no checkpoint is loaded"):
        host.live.bake(opened(files, "sd1_lora"), 1.0)
    with pytest.raises(NoModelError):
        host.live.fingerprint()
    with pytest.raises(NoModelError):
        host.live.unet()


# ---- the host goes on living ----


def test_reloading_the_checkpoint_forgets_the_bake(start, files: Path):
    host = start()
    before = host.weights()
    host.live.bake(opened(files, "sd1_lora"), 1.0)
    token = host.live.loaded().token
    host.reload()
    assert host.live.loaded().token != token
    assert host.live.baked() is None
    assert host.live.unbake() is False
    check_equal(host.weights(), before)


def test_another_checkpoint_in_place_is_never_mixed_with_the_first(start, files: Path):
    host = start()
    host.live.bake(opened(files, "sd1_lora"), 1.0)
    token = host.live.loaded().token
    host.add("other", tiny.base(seed=5))
    host.load("other")
    before = host.weights()
    assert host.live.loaded().name == "other"
    assert host.live.loaded().token != token
    assert host.live.unbake() is False
    check_equal(host.weights(), before)
    patch = opened(files, "sd1_lora")
    host.live.bake(patch, 0.5)
    check_sum(host.weights(), before, patch, 0.5)


def test_the_checkpoint_saved_from_a_bake_is_clean(start, files: Path):
    """Its weights are those of the bake, bit for bit: only the file tells them apart."""
    host = start()
    host.live.bake(opened(files, "sd1_dense_fp16"), 1.0)
    saved = host.weights()
    host.add("saved", {**tiny.base(), **saved})  # the standalone host knows no VAE in its weights
    host.load("saved")
    assert host.live.baked() is None
    assert host.live.unbake() is False
    check_equal(host.weights(), saved)
    host.live.bake(opened(files, "sd1_lora"), 0.5)
    assert host.live.unbake()
    check_equal(host.weights(), saved)


def test_undo_cannot_be_stopped_half_way(start, files: Path):
    host = start()
    before = host.weights()
    host.live.bake(opened(files, "sd1_lora"), 1.0)

    def stop(done: int, total: int, key: str) -> None:
        raise Cancelled("stopped")

    assert host.live.unbake(stop) is True
    assert host.live.baked() is None
    check_equal(host.weights(), before)


def test_another_vae_keeps_the_bake(start, files: Path):
    host = start()
    before = {key: t for key, t in host.weights().items() if not key.startswith(VAE)}
    baked = host.live.bake(opened(files, "sd1_lora"), 1.0)
    host.switch_vae()
    assert host.live.baked() == baked
    assert host.live.unbake()
    check_equal({key: t for key, t in host.weights().items() if not key.startswith(VAE)}, before)


def test_two_models_in_memory_have_a_bake_each(start, files: Path):
    host = start()
    lora, dense = opened(files, "sd1_lora"), opened(files, "sd1_dense")
    before = host.weights()
    first = host.live.bake(lora, 1.0)
    host.add("other", tiny.base(seed=5))
    host.load_beside("other")
    other = host.weights()
    assert host.live.baked() is None
    second = host.live.bake(dense, -0.5)
    check_sum(host.weights(), other, dense, -0.5)
    host.load("base")
    assert host.live.baked() == first
    check_sum(host.weights(), before, lora, 1.0)
    assert host.live.unbake()
    check_equal(host.weights(), before)
    host.load("other")
    assert host.live.baked() == second
    assert host.live.unbake()
    check_equal(host.weights(), other)


def test_weights_that_somebody_else_changed_are_not_mixed(start, files: Path):
    host = start()
    patch = opened(files, "sd1_lora")
    host.live.bake(patch, 1.0)
    host.disturb(patch.changed_keys()[7])
    before = host.weights()
    for action in (host.live.unbake, lambda: host.live.bake(patch, 0.5)):
        with pytest.raises(HostError, match="changed by something else"):
            action()
    check_equal(host.weights(), before)
    host.reload()
    assert host.live.baked() is None
    check_equal(host.weights(), {key: t if key.startswith(VAE) else t.half() for key, t in vae_and(host).items()})


def test_the_prompts_loras_before_during_and_after_a_bake(start, files: Path):
    host = start()
    patch, loras = opened(files, "sd1_lora"), [(files / "prompt_lora.safetensors", 0.8)]
    lora = opened(files, "prompt_lora")
    before, prints = host.weights(), host.live.fingerprint()
    check_sum(host.generate(loras=loras), before, lora, 0.8)  # stays merged
    assert host.live.fingerprint() == prints
    baked = host.live.bake(patch, 1.0)
    with_bake = host.weights()
    check_sum(with_bake, before, patch, 1.0)
    check_sum(host.generate(loras=loras), with_bake, lora, 0.8, roundings=2)  # Forge rounds the sum of both once
    assert host.live.baked() == baked
    check_equal(host.generate(), with_bake)
    host.generate(loras=loras)
    assert host.live.unbake()
    check_equal(host.weights(), before)
    check_sum(host.generate(loras=loras), before, lora, 0.8)
    check_equal(host.generate(), before)
    assert host.live.fingerprint() == prints


# ---- generation ----


@pytest.mark.parametrize(
    ("name", "strength", "blocks", "rank"),
    [
        ("sd1_lora", 1.0, "", None),
        ("sd1_lora", -1.5, "IN=0.5,MID=0,OUT11=2", None),
        ("sd1_lora", 0.5, "", 3),
        ("sd1_dense", 0.7, "TIME=-1", None),
        ("te_lora", 1.0, "", None),
    ],
)
def test_a_generation_draws_with_the_sum(start, files: Path, name, strength, blocks, rank):
    host = start()
    before = host.weights()
    patch = opened(files, name, blocks, rank)
    check_sum(host.generate(patch, strength), before, patch, strength)
    check_sum(host.generate(patch, strength, hires=True), before, patch, strength)
    check_equal(host.weights(), before)
    check_sum(host.generate(patch, strength / 2), before, patch, strength / 2)
    check_equal(host.generate(), before)
    assert host.live.baked() is None


def test_strength_0_and_no_offset_change_no_bit(start, files: Path):
    host = start()
    before = host.weights()
    patch = opened(files, "sd1_lora")
    for options in ((None, 1.0), (patch, 0.0), (opened(files, "sd1_lora", "ALL=0"), 1.0)):
        if options[0] is None or not options[1]:
            check_equal(host.generate(*options), before)
        host.generate(patch, 1.0)
        check_equal(host.generate(None), before)
        host.generate(patch, 1.0)
        check_equal(host.generate(patch, 0.0), before)


def test_offsets_and_the_prompts_loras_add_up(start, files: Path):
    host = start()
    patch, loras = opened(files, "sd1_lora"), [(files / "prompt_lora.safetensors", 0.5)]
    before = host.weights()
    with_lora = host.generate(loras=loras)
    check_sum(host.generate(patch, 1.0, loras=loras), with_lora, patch, 1.0, roundings=3)
    check_equal(host.generate(loras=loras), with_lora)
    check_equal(host.generate(), before)


def test_a_generation_on_top_of_a_bake(start, files: Path):
    host = start()
    dense, lora = opened(files, "sd1_dense"), opened(files, "sd1_lora")
    baked = host.live.bake(dense, 0.5)
    with_bake = host.weights()
    check_sum(host.generate(lora, -0.5), with_bake, lora, -0.5, roundings=2)
    assert host.live.baked() == baked
    check_equal(host.generate(), with_bake)


@pytest.mark.parametrize("name", ["sdxl_lora", "sdxl_dense", "clip_g_lora"])
def test_sdxl_with_both_its_text_encoders(start, files: Path, name: str):
    host = start("sdxl")
    before = host.weights()
    patch = opened(files, name)
    check_sum(host.generate(patch, 0.5), before, patch, 0.5)
    check_equal(host.generate(), before)
    host.live.bake(patch, 0.5)
    check_sum(host.weights(), before, patch, 0.5)
    host.live.unbake()
    check_equal(host.weights(), before)


def test_clip_gs_projection_is_baked_the_right_way_round(start, files: Path):
    """open_clip keeps it as (in, out), Forge and most LoRAs as a linear layer. A1111's networks cannot change it at all."""
    host = start("sdxl")
    before, patch = host.weights(), opened(files, "projection_lora")
    assert host.live.bake(patch, 0.5).tensors == 1
    check_sum(host.weights(), before, patch, 0.5)
    host.live.unbake()
    check_equal(host.weights(), before)


def test_a_bake_that_changes_nothing_counts_nothing(start, files: Path):
    host = start()
    before = host.weights()
    baked = host.live.bake(opened(files, "silent_lora"), 1.0)
    assert baked.tensors == 0
    check_equal(host.weights(), before)
    host.live.unbake()
    check_equal(host.weights(), before)


def test_the_module_that_predicts_holds_the_unets_weights(start, files: Path):
    host = start()
    unets = [tensor for key, tensor in host.weights().items() if key.startswith(UNET)]
    held = list(host.live.unet().parameters())
    assert sum(each.numel() for each in held) == sum(each.numel() for each in unets)


def test_what_the_hosts_own_loader_matches(start, files: Path):
    host = start()
    matched, total = host.live.matched_keys(files / "sd1_lora.safetensors")
    assert matched == total > 500
    assert host.live.matched_keys(files / "clip_g_lora.safetensors")[0] == 0


def test_every_hook_is_found(start):
    checks = start().live.checks()
    assert checks
    assert all(check.ok for check in checks), [check for check in checks if not check.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (8192,), (70, 133), (4, 4, 3, 3)])
def test_a_checksum_notices_a_single_bit(dtype: torch.dtype, shape: tuple[int, ...]):
    tensors = {"a": torch.zeros(2), "b": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)}
    before = checksum(tensors)
    assert checksum({key: tensor.clone() for key, tensor in reversed(tensors.items())}) == before
    for place in {0, tensors["b"].numel() // 2, tensors["b"].numel() - 1}:
        changed = tensors["b"].clone()
        bits = changed.view(-1).view(torch.int16 if dtype != torch.float32 else torch.int32)
        bits[place] ^= 1
        assert checksum(tensors | {"b": changed}) != before
    other_names = {"a": tensors["b"], "b": tensors["a"]}
    assert checksum(other_names) != before


def test_a_checksum_is_of_the_values_and_not_of_how_they_lie():
    whole = torch.arange(100.0)
    part = whole[1:65].reshape(1, 4, 4, 4)
    assert checksum({"a": part}) == checksum({"a": part.clone()})
    assert checksum({"a": part.to(memory_format=torch.channels_last)}) == checksum({"a": part.clone()})


@pytest.mark.parametrize("of", [checksum, digest])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_weights_are_of_values_and_not_of_dtypes(of: Callable[..., str], stored: torch.dtype):
    values = torch.randn((70, 133), generator=torch.Generator().manual_seed(0)).to(stored)
    values[0, :3] = torch.tensor([-0.0, 6e-8, 3e4])
    wider = values.double().float()
    assert of({"a": values}) == of({"a": wider})
    assert of({"a": wider}) == of({"a": wider.to(stored)})
    wider[69, 132] = torch.nextafter(wider[69, 132], torch.tensor(9.0))
    assert of({"a": values}) != of({"a": wider})
    assert of({"a": torch.zeros(4, dtype=torch.int8)}) != of({"a": torch.zeros(4)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_found(bad: float):
    tensor = torch.full((300,), 60000.0).half()
    assert all_finite(tensor)
    assert all_finite(torch.full((300,), 3e38))  # their sum is not
    tensor[7] = bad
    assert not all_finite(tensor)
