"""Extraction, against float64 by hand, LyCORIS and diffusers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_dpo.cli.text import extract_text
from lib_dpo.errors import Cancelled, NothingToDoError, SettingError
from lib_dpo.families.arch import ARCHITECTURES, TextEncoder
from lib_dpo.families.keymap import UNET, lora_modules, unet_to_diffusers
from lib_dpo.families.model import open_model
from lib_dpo.families.shapes import checkpoint_shapes, small, unet_diffusers_config
from lib_dpo.families.synthetic import small_pair
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.maths.ranks import break_even_rank
from lib_dpo.offsets.layers import plan_layers
from lib_dpo.offsets.lora.file import read_lora
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import Pair, open_pair
from lib_dpo.operations import decompose
from lib_dpo.operations.extract import ExtractReport, extract
from lib_dpo.operations.resize import resize
from lib_dpo.operations.verdict import right_base
from lib_dpo.operations.verify import verify
from lib_dpo.settings import ExtractSettings, RankPolicy

Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small_pair(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small_pair(tmp_path_factory.mktemp("sdxl"), "sdxl")


def run(files: Files, output: Path, **settings: Any) -> ExtractReport:
    policy = {name: settings.pop(name) for name in ("rank", "energy", "size_mb", "conv_rank") if name in settings}
    on_progress = settings.pop("on_progress", None)
    with open_model(files[0]) as base, open_model(files[1]) as tuned:
        wanted = ExtractSettings(RankPolicy(**policy), device="cpu", **settings)
        return extract(open_pair(base, tuned), output, wanted, on_progress=on_progress)


def changed_text_encoders(files: Files, folder: Path, keys: list[str], size: float = 0.01) -> Files:
    """A tuned whole checkpoint: the pair's base with the tuned UNet's values left out and the given keys changed."""
    tensors = load_file(files[0])
    generator = torch.Generator().manual_seed(1)
    for key in tensors:
        if key in keys or (key.startswith(UNET) and tensors[key].ndim > 1):
            noise = torch.randn(tensors[key].shape, generator=generator) * (size if key in keys else 1e-3)
            tensors[key] = (tensors[key].float() + noise).half()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "tuned.safetensors")
    return files[0], folder / "tuned.safetensors"


def test_energy_kept_is_that_of_float64_by_hand_from_the_file_alone(sd1: Files, tmp_path: Path) -> None:
    report = run(sd1, tmp_path / "l.safetensors", rank=6)
    base, tuned, lora = load_file(sd1[0]), load_file(sd1[1]), load_file(tmp_path / "l.safetensors")
    missed = total = 0.0
    for key in base:
        name = unet_to_diffusers(ARCHITECTURES["sd1"], key)
        if name is None:
            continue
        delta = tuned[name].double() - base[key].double()
        total += float(delta.square().sum())
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{module}.lora_up.weight" in lora:
            up, down = (lora[f"{module}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
            delta = delta.flatten(1) - up @ down * (float(lora[f"{module}.alpha"]) / up.shape[1])
        missed += float(delta.square().sum())
    assert report.tally.total.energy_kept == pytest.approx(1 - missed / total, abs=2e-6)


@pytest.mark.parametrize("method", ["exact", "randomized", "auto"])
def test_every_method_comes_to_999_thousandths_of_the_optimum(sd1: Files, tmp_path: Path, method: str) -> None:
    report = run(sd1, tmp_path / "l.safetensors", rank=4, method=method)
    optimum = 0.0
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        pair = open_pair(base, tuned)
        for layer in plan_layers(pair, "portable", ("unet",)):
            delta = pair.delta(layer.module.key).reshape(layer.matrix).double()
            optimum += float(torch.linalg.svdvals(delta)[: min(4, break_even_rank(*layer.matrix))].square().sum())
    kept = report.tally.total.offset - report.tally.total.residual
    assert 0.999 * optimum <= kept <= optimum * (1 + 1e-6)


def test_the_report_the_metadata_and_verify_agree(sdxl: Files, tmp_path: Path) -> None:
    report = run(sdxl, tmp_path / "l.safetensors", rank=4)
    with open_offset(tmp_path / "l.safetensors") as offset, open_model(sdxl[0]) as base, open_model(sdxl[1]) as tuned:
        found = verify(offset, open_pair(base, tuned))
        assert float(offset.checkpoint.metadata["dpo.energy_kept"]) == report.tally.total.energy_kept
        assert json.loads(offset.checkpoint.metadata["dpo.energy_kept_by_block"]) == report.as_json()["energy_kept_by_block"]
        assert offset.checkpoint.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
        digest = hashlib.sha256(b"".join(bytes(offset.checkpoint.raw(key)) for key in offset.checkpoint.infos)).hexdigest()
        assert offset.checkpoint.metadata["sshs_model_hash"] == digest
        content = (tmp_path / "l.safetensors").read_bytes()
        assert offset.checkpoint.metadata["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
        assert len(content) > 0x110000
    assert found.tally.total.energy_kept == pytest.approx(report.tally.total.energy_kept, abs=1e-7)
    for block, row in report.tally.blocks.items():
        assert found.tally.blocks[block].energy_kept == pytest.approx(row.energy_kept, abs=1e-6), block
    assert not found.unmatched


def test_at_full_rank_in_fp32_nothing_is_missed_but_norms_and_biases(
    sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_dpo.operations.rank_plan.break_even_rank", min)
    report = run(sd1, tmp_path / "l.safetensors", rank=128, precision="fp32", method="exact")
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        pair = open_pair(base, tuned)
        uncovered = sum(float(pair.delta(key).double().square().sum()) for key in pair.keys if len(base.shape(key)) == 1)
    assert report.tally.total.residual == pytest.approx(uncovered, rel=1e-3)


def test_profiles_hold_what_they_promise(sd1: Files, tmp_path: Path) -> None:
    keys: dict[str, set[str]] = {}
    kept: dict[str, float] = {}
    for profile in ("portable", "webui", "full"):
        report = run(sd1, tmp_path / f"{profile}.safetensors", rank=4, profile=profile)
        keys[profile] = set(load_file(tmp_path / f"{profile}.safetensors"))
        kept[profile] = report.tally.total.energy_kept
    suffixes = {profile: {key.split(".", 1)[1] for key in names} for profile, names in keys.items()}
    pairs = {"alpha", "lora_down.weight", "lora_up.weight"}
    norms = {"w_norm", "b_norm"}
    assert suffixes == {"portable": pairs, "webui": pairs | norms, "full": pairs | norms | {"diff", "diff_b"}}
    assert kept["portable"] < kept["webui"] < kept["full"]
    for names in keys.values():
        modules = {key.split(".", 1)[0] for key in names}
        for module in modules:  # nothing that A1111 or Forge reject: no lone halves, no bias beside a pair
            parts = {key.split(".", 1)[1] for key in names if key.split(".", 1)[0] == module}
            assert parts in (pairs, norms, {"diff", "diff_b"}), module
    assert "lora_unet_out_0.w_norm" in keys["webui"]
    assert not any("conv_norm_out" in key for key in keys["full"])


def test_conv_rank_counts_for_3x3_convolutions_only(sd1: Files, tmp_path: Path) -> None:
    run(sd1, tmp_path / "l.safetensors", rank=6, conv_rank=2)
    for key, tensor in load_file(tmp_path / "l.safetensors").items():
        if key.endswith("lora_down.weight"):
            wide = tensor.ndim == 4 and tensor.shape[-1] > 1
            assert tensor.shape[0] == (2 if wide else 6), key
            up = load_file(tmp_path / "l.safetensors")[key.replace("down", "up")] if wide else None
            assert up is None or up.shape[2:] == (1, 1)


@pytest.mark.parametrize("ranks", [{"rank": 64}, {"rank": 8, "conv_rank": 48}])
def test_no_pair_is_larger_than_its_layer_and_the_report_counts_those_kept_smaller(
    sd1: Files, tmp_path: Path, ranks: dict[str, int]
) -> None:
    report = run(sd1, tmp_path / "l.safetensors", **ranks)
    lora, capped = load_file(tmp_path / "l.safetensors"), 0
    for key, down in lora.items():
        if not key.endswith("lora_down.weight"):
            continue
        (rank, in_), out = down.flatten(1).shape, len(lora[key.replace("down.weight", "up.weight")])
        asked = ranks.get("conv_rank", ranks["rank"]) if down[0, 0].numel() > 1 else ranks["rank"]
        assert rank == min(asked, out * in_ // (out + in_)), key
        capped += rank < asked
    assert capped > 0
    assert report.as_json()["capped_layers"] == capped
    assert f"\n{capped} of {report.layers} layers at a lower rank than asked for" in extract_text(report)
    assert "lower rank" not in extract_text(run(sd1, tmp_path / "s.safetensors", size_mb=1))


def test_the_energy_policy_reaches_its_energy_in_a_smaller_file_than_one_rank_for_all(sd1: Files, tmp_path: Path) -> None:
    same_rank = run(sd1, tmp_path / "r.safetensors", rank=8)
    wanted = same_rank.tally.total.energy_kept
    report = run(sd1, tmp_path / "e.safetensors", energy=wanted)
    assert wanted - 1e-4 <= report.tally.total.energy_kept < wanted + 0.01
    assert report.file_bytes < same_rank.file_bytes


def test_an_energy_out_of_reach_says_what_was_reached(sd1: Files, tmp_path: Path) -> None:
    report = run(sd1, tmp_path / "e.safetensors", energy=0.9999)
    assert report.tally.total.energy_kept < 0.9999
    assert report.as_json()["energy_wanted"] == 0.9999


def test_the_size_policy_counts_what_must_be_written(sdxl: Files, tmp_path: Path) -> None:
    files = changed_text_encoders(sdxl, tmp_path / "in", [TE2 + "out_proj.weight"])
    report = run(files, tmp_path / "l.safetensors", size_mb=0.3)
    assert report.file_bytes <= 0.3e6


@pytest.mark.parametrize("size_mb", [0.4, 1.0, 2.5])
def test_the_size_policy_keeps_its_size_and_uses_it(sd1: Files, tmp_path: Path, size_mb: float) -> None:
    report = run(sd1, tmp_path / "s.safetensors", size_mb=size_mb)
    assert 0.9 * size_mb * 1e6 <= report.file_bytes <= size_mb * 1e6
    assert run(sd1, tmp_path / "t.safetensors", size_mb=1.5 * size_mb).tally.total.energy_kept > report.tally.total.energy_kept


def test_the_same_seed_writes_the_same_file_and_another_seed_another(sd1: Files, tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        run(sd1, tmp_path / name / "l.safetensors", rank=4, seed=seed, method="randomized")
        contents.append((tmp_path / name / "l.safetensors").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_the_number_of_cores_does_not_change_the_file(sd1: Files, tmp_path: Path, method: str) -> None:
    before, contents = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            (tmp_path / str(threads)).mkdir()
            torch.set_num_threads(threads)
            run(sd1, tmp_path / str(threads) / "l.safetensors", rank=4, method=method)
            assert torch.get_num_threads() == threads
            contents.append((tmp_path / str(threads) / "l.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert contents[0] == contents[1]


def test_batches_write_the_same_weights(sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(sd1, tmp_path / "one.safetensors", rank=4)
    monkeypatch.setattr("lib_dpo.operations.forms.batch_size", lambda device, numel: 5)
    run(sd1, tmp_path / "five.safetensors", rank=4)
    one, five = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "five.safetensors")
    assert one.keys() == five.keys()
    for key in one:
        if key.endswith("lora_up.weight"):
            down = key.replace("lora_up", "lora_down")
            first, second = (t[key].float().flatten(1) @ t[down].float().flatten(1) for t in (one, five))
            torch.testing.assert_close(first, second, atol=2e-6, rtol=1e-2)


def test_cancelling_at_any_tensor_leaves_nothing_behind(sd1: Files, tmp_path: Path) -> None:
    for stop in (1, 100, 282):
        count = 0

        def cancel(done: int, total: int, key: str) -> None:
            nonlocal count
            count += 1
            assert done <= total
            if count == stop:  # noqa: B023  called within the same turn of the loop
                raise Cancelled

        with pytest.raises(Cancelled):
            run(sd1, tmp_path / "out" / "l.safetensors", rank=2, on_progress=cancel)
        assert list(tmp_path.iterdir()) == []


# ---- fallbacks ----


def failing(error: BaseException, *, when: Callable[..., bool]) -> Callable[..., Any]:
    real = decompose.factorise

    def factorise(A: torch.Tensor, rank: int, **options: Any) -> Any:
        if when(A, options):
            raise error
        return real(A, rank, **options)

    return factorise


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("MPS backend out of memory"), "out of memory"),
        (torch.linalg.LinAlgError("did not converge"), "decomposition failed"),  # type: ignore[attr-defined]
        (NotImplementedError("aten::linalg_eigh on MPS"), "decomposition failed"),
    ],
)
def test_a_decomposition_that_fails_is_done_in_float64_and_counted(
    sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str
) -> None:
    fine = run(sd1, tmp_path / "fine.safetensors", rank=4)
    fails = failing(error, when=lambda A, options: A.dtype == torch.float32 and A.shape[-1] == 36)
    monkeypatch.setattr(decompose, "factorise", fails)
    report = run(sd1, tmp_path / "l.safetensors", rank=4)
    assert report.fallbacks == {reason: 1}  # conv_in is the only layer with 36 columns
    assert report.tally.total.energy_kept == pytest.approx(fine.tally.total.energy_kept, abs=1e-4)


def test_memory_that_runs_out_after_the_decomposition_costs_one_layer_a_second_reading(
    sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = decompose.residual_energy_, []

    def residual_energy_(A: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scale: float) -> float:
        found = real(A, up, down, scale)  # which overwrites A
        calls.append(A)
        if len(calls) == 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return found

    for name in ("fine", "short"):
        (tmp_path / name).mkdir()
    run(sd1, tmp_path / "fine" / "l.safetensors", rank=4)
    monkeypatch.setattr(decompose, "residual_energy_", residual_energy_)
    report = run(sd1, tmp_path / "short" / "l.safetensors", rank=4)
    assert report.fallbacks == {"out of memory": 1}
    assert len(calls) == report.layers + 1
    assert (tmp_path / "short" / "l.safetensors").read_bytes() == (tmp_path / "fine" / "l.safetensors").read_bytes()


def test_a_batch_that_does_not_fit_is_done_one_by_one(sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(decompose, "factorise", failing(error, when=lambda A, options: A.ndim == 3))
    monkeypatch.setattr("lib_dpo.operations.forms.batch_size", lambda device, numel: 4)
    report = run(sd1, tmp_path / "l.safetensors", rank=4)
    assert report.fallbacks["out of memory"] > 10
    assert report.layers == 282


def test_a_batch_with_one_delta_on_another_device_is_done_one_by_one(sd1: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    real = decompose.factorise

    def factorise(A: torch.Tensor, rank: int, **options: Any) -> Any:
        assert A.ndim == 2
        found = real(torch.zeros_like(A, device="cpu") if A.is_meta else A, rank, **options)
        return decompose.Factors(*(part.to(A.device) for part in found))

    monkeypatch.setattr(decompose, "factorise", factorise)
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        pair = open_pair(base, tuned)
        decomposer = decompose.Decomposer(pair, torch.device("cpu"), method="exact", seed=0)
        here = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        first, second = decomposer.factorise([here, here.to("meta")], 2, ["a", "b"])
        assert torch.equal(first.up, decomposer.factorise([here], 2, ["a"])[0].up)
        assert second.up.device.type == "meta"


def test_other_errors_are_not_swallowed(sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = failing(RuntimeError("a bug"), when=lambda A, options: True)
    monkeypatch.setattr(decompose, "factorise", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        run(sd1, tmp_path / "l.safetensors", rank=4)
    assert list(tmp_path.iterdir()) == []


# ---- text encoders ----

TE2 = "conditioner.embedders.1.model.transformer.resblocks.3.attn."


def test_clip_g_attention_is_written_whole_or_not_at_all(sdxl: Files, tmp_path: Path) -> None:
    files = changed_text_encoders(sdxl, tmp_path / "in", [TE2 + "out_proj.weight"])
    report = run(files, tmp_path / "l.safetensors", rank=2)
    written = {key.split(".")[0] for key in load_file(tmp_path / "l.safetensors") if key.startswith("lora_te")}
    layer = "lora_te2_text_model_encoder_layers_3_self_attn_"
    assert written == {f"{layer}{part}_proj" for part in ("q", "k", "v", "out")}
    assert report.components == ("unet", "te2")
    assert report.verdict.level != "fits"


@pytest.mark.parametrize("policy", [{"energy": 0.5}, {"size_mb": 0.5}])
def test_resizing_keeps_clip_g_attention_whole(sdxl: Files, tmp_path: Path, policy: dict[str, float]) -> None:
    keys = [TE2 + "out_proj.weight", TE2.replace(".3.", ".4.") + "in_proj_weight"]
    run(changed_text_encoders(sdxl, tmp_path / "in", keys), tmp_path / "l.safetensors", rank=4)
    with open_checkpoint(tmp_path / "l.safetensors") as lora:
        report = resize(lora, tmp_path / "r.safetensors", RankPolicy(**policy))  # type: ignore[arg-type]  # of either policy
    before, after = load_file(tmp_path / "l.safetensors"), load_file(tmp_path / "r.safetensors")
    assert {key for key in after if "te2" in key} == {key for key in before if "te2" in key}
    assert sum("lora_up" in key for key in after if "te2" in key) == 8
    assert len(after) < len(before)
    if "energy" in policy:
        assert 0.5 - 1e-4 <= report.energy_kept < 0.51
    else:
        assert 0.45e6 < report.file_bytes <= 0.5e6


def test_fused_attention_is_split_into_its_three_parts(sdxl: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_dpo.operations.rank_plan.break_even_rank", min)
    files = changed_text_encoders(sdxl, tmp_path / "in", [TE2 + "in_proj_weight"])
    run(files, tmp_path / "l.safetensors", rank=64, precision="fp32", method="exact")
    lora, base, tuned = load_file(tmp_path / "l.safetensors"), load_file(files[0]), load_file(files[1])
    delta = tuned[TE2 + "in_proj_weight"].float() - base[TE2 + "in_proj_weight"].float()
    for part, rows in zip("qkv", delta.chunk(3), strict=True):
        name = f"lora_te2_text_model_encoder_layers_3_self_attn_{part}_proj"
        product = lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
        torch.testing.assert_close(product, rows, atol=1e-6, rtol=0)
    with open_offset(tmp_path / "l.safetensors") as offset:
        torch.testing.assert_close(offset.read(TE2 + "in_proj_weight"), delta, atol=1e-6, rtol=0)


def test_a_text_encoder_that_differs_by_rounding_only_is_not_extracted(sd1: Files, tmp_path: Path) -> None:
    whole = load_file(sd1[0])
    generator = torch.Generator().manual_seed(5)
    tuned = {}
    for key, tensor in whole.items():  # as if the fp16 file had been rounded from this fp32 one
        jitter = (torch.rand(tensor.shape, generator=generator) - 0.5) if tensor.is_floating_point() else 0
        step = 2.0 ** (torch.frexp(tensor.float())[1].float() - 11) if tensor.is_floating_point() else 0
        tuned[key] = tensor.float() + jitter * step if tensor.is_floating_point() else tensor
        if key.startswith(UNET):
            tuned[key] = tuned[key] + torch.randn(tensor.shape, generator=generator) * 1e-4
    save_file(tuned, tmp_path / "tuned.safetensors")
    report = run((sd1[0], tmp_path / "tuned.safetensors"), tmp_path / "l.safetensors", rank=2)
    assert report.components == ("unet",)
    assert report.verdict.level == "fits"
    assert "agree" in report.verdict.text


# ---- refusals ----


def test_equal_models_are_refused(sd1: Files, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(sd1[0].read_bytes())
    with pytest.raises(NothingToDoError, match="nothing to extract"):
        run((sd1[0], copy), tmp_path / "out" / "l.safetensors", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_change_that_the_profile_does_not_carry_is_refused(sd1: Files, tmp_path: Path) -> None:
    tensors = load_file(sd1[0])
    tensors[UNET + "out.0.weight"] += 0.5
    save_file(tensors, tmp_path / "tuned.safetensors")
    files = (sd1[0], tmp_path / "tuned.safetensors")
    with pytest.raises(NothingToDoError, match="the profile webui or full"):
        run(files, tmp_path / "l.safetensors", rank=2)
    assert run(files, tmp_path / "l.safetensors", rank=2, profile="webui").layers == 1


def test_a_norm_that_overflows_is_refused(sd1: Files, tmp_path: Path) -> None:
    tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in load_file(sd1[0]).items()}
    tensors[UNET + "out.0.weight"] += 1e6
    save_file(tensors, tmp_path / "tuned.safetensors")
    with pytest.raises(SettingError, match="lora_unet_out_0 does not fit into fp16"):
        run((sd1[0], tmp_path / "tuned.safetensors"), tmp_path / "l.safetensors", rank=2, profile="webui")


@pytest.mark.parametrize(("policy", "text"), [({"rank": 129}, "at most 128"), ({"size_mb": 0.001}, "at least")])
def test_ranks_and_sizes_out_of_reach_are_refused(sd1: Files, tmp_path: Path, policy: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        run(sd1, tmp_path / "l.safetensors", **policy)


# ---- independent sources ----


@pytest.mark.newest
@pytest.mark.parametrize(
    ("arch", "policy"),
    [
        ("sd1", {"rank": 4}),
        ("sd1", {"rank": 4, "conv_rank": 2}),
        ("sd1", {"energy": 0.5}),
        ("sd1", {"resized": 0.7}),
        ("sd1", {"energy": 0.5, "precision": "fp8"}),
        ("sdxl", {"rank": 4, "precision": "fp8"}),
        ("sdxl", {"energy": 0.5}),
    ],
    ids=str,
)
def test_diffusers_loads_every_key_of_a_portable_file_and_fuses_the_same_weights(
    arch: str, policy: dict[str, Any], tmp_path: Path, sd1: Files, sdxl: Files
) -> None:
    import diffusers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    files = sd1 if arch == "sd1" else sdxl
    share = policy.get("resized")
    run(files, tmp_path / "l.safetensors", **{"precision": "fp32", **({"rank": 4} if share else policy)})
    if share:
        with open_checkpoint(tmp_path / "l.safetensors") as lora:
            resize(lora, tmp_path / "smaller.safetensors", RankPolicy(energy=share))
        (tmp_path / "smaller.safetensors").replace(tmp_path / "l.safetensors")
    unet = diffusers.UNet2DConditionModel(**{k: v for k, v in unet_diffusers_config(arch, small(arch)).items() if k[0] != "_"})
    tuned = load_file(files[1])
    unet.load_state_dict({key: torch.zeros_like(value) for key, value in tuned.items()})
    mixin: Any = StableDiffusionLoraLoaderMixin if arch == "sd1" else StableDiffusionXLLoraLoaderMixin
    state, alphas = mixin.lora_state_dict(load_file(tmp_path / "l.safetensors"), unet_config=unet.config)[:2]
    mixin.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    unet.fuse_lora()
    with open_offset(tmp_path / "l.safetensors") as offset:
        fused = {key.replace(".base_layer", ""): value for key, value in unet.state_dict().items() if ".lora_" not in key}
        names = {unet_to_diffusers(ARCHITECTURES[arch], key): key for key in offset.shapes}
        assert names.keys() <= fused.keys()
        for name, value in fused.items():
            expected = offset.read(names[name]).reshape(value.shape) if name in names else torch.zeros_like(value)
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)
        assert len(names) == sum(len(shape) > 1 for shape in offset.shapes.values())
        ranks = {
            len(tensor)
            for key, tensor in load_file(tmp_path / "l.safetensors").items()
            if key.endswith("to_k.lora_down.weight")
        }
        assert (len(ranks) > 1) == ("rank" not in policy)  # else this would not show that each layer's own scale is read


def small_text_encoder(encoder: TextEncoder, width: int, layers: int) -> torch.nn.Module:
    """One of transformers, as diffusers expects it for an architecture."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=64,
    )
    return (CLIPTextModelWithProjection if encoder.folder == "text_encoder_2" else CLIPTextModel)(config)


@pytest.mark.newest
@pytest.mark.parametrize("policy", [{"rank": 4}, {"energy": 0.6}], ids=str)
@pytest.mark.parametrize("arch", ["sd2", "sdxl"])
def test_a_pipeline_of_diffusers_takes_every_key_of_a_portable_file_with_text_encoders(
    arch: str, policy: dict[str, Any], tmp_path: Path, sdxl: Files
) -> None:
    import diffusers
    from peft.tuners.lora import LoraLayer

    architecture = ARCHITECTURES[arch]
    base = sdxl if arch == "sdxl" else small_pair(tmp_path / "pair", arch)
    # diffusers leaves the last layer of SD 2's text encoder out, which nothing uses
    layers = {encoder.folder: encoder.layers - (arch == "sd2") for encoder in architecture.text_encoders}
    left_out = (UNET, "cond_stage_model.model.transformer.resblocks.23.")
    keys = [key for key in checkpoint_shapes(arch) if not key.startswith(left_out) and lora_modules(architecture, key)]
    run(changed_text_encoders(base, tmp_path / "in", keys), tmp_path / "l.safetensors", precision="fp32", **policy)

    config = {key: value for key, value in unet_diffusers_config(arch, small(arch)).items() if key[0] != "_"}
    models: dict[str, Any] = {"unet": diffusers.UNet2DConditionModel(**config)}
    for encoder, width in zip(architecture.text_encoders, small(arch).text, strict=True):
        models[encoder.folder] = small_text_encoder(encoder, width, layers[encoder.folder])
    kind = diffusers.StableDiffusionXLPipeline if arch == "sdxl" else diffusers.StableDiffusionPipeline
    others = dict.fromkeys(name for name in kind._get_signature_keys(kind)[0] if name not in models)
    kind(**models, **others).load_lora_weights(tmp_path / "l.safetensors")

    written = load_file(tmp_path / "l.safetensors")
    loaded = 0
    for name, model in models.items():
        prefix = next((encoder.kohya for encoder in architecture.text_encoders if encoder.folder == name), "lora_unet")
        modules = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
        assert len(modules) == sum(key.startswith(prefix + "_") for key in written) / 3
        loaded += len(modules)
        if name == "unet":  # its values: the test above
            continue
        for path, module in modules.items():
            ours = f"{prefix}_text_model_{path.removeprefix('text_model.').replace('.', '_')}"
            up, down = written[ours + ".lora_up.weight"], written[ours + ".lora_down.weight"]
            scale = float(written[ours + ".alpha"]) / up.shape[1]
            torch.testing.assert_close(module.get_delta_weight("default_0"), scale * (up @ down), atol=1e-6, rtol=1e-4)
    assert 3 * loaded == len(written)


@pytest.mark.newest
def test_lycoris_extracts_the_same_approximation(sd1: Files) -> None:
    from lycoris.utils import extract_conv, extract_linear

    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        pair = open_pair(base, tuned)
        for inner in ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.0.in_layers.2"):
            key = f"{UNET}{inner}.weight"
            delta = pair.delta(key)
            theirs = extract_conv if delta.ndim == 4 else extract_linear
            (down, up, _), mode = theirs(delta, "fixed", 6)
            assert mode == "low rank"
            ours = decompose.factorise(delta.flatten(1), 6, method="exact")
            product = up.flatten(1) @ down.flatten(1)
            torch.testing.assert_close(ours.up @ ours.down, product, atol=2e-7, rtol=1e-3)


def test_no_stray_keys_and_every_key_is_read_back(sdxl: Files, tmp_path: Path) -> None:
    run(sdxl, tmp_path / "l.safetensors", rank=2, profile="full")
    with safe_open(tmp_path / "l.safetensors", framework="pt") as file:
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118  safe_open is no dict
        assert all(isinstance(value, str) for value in file.metadata().values())
    with open_offset(tmp_path / "l.safetensors") as offset:
        lora = read_lora(offset.checkpoint)
        assert not lora.unmatched
        assert sum(len(layer.parts) for layer in lora.layers) == len(offset.checkpoint.infos)


def test_the_order_of_the_files_is_doubted_when_it_looks_swapped(sd1: Files) -> None:
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        from lib_dpo.operations.diff import diff

        swapped: Pair = open_pair(tuned, base)
        report = diff(swapped)
        assert report.verdict.level == "doubtful"
        assert "swapped" in report.verdict.text
        assert right_base(open_pair(base, tuned), report.tally).level == "fits"
