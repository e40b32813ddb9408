"""Offset files, baking and resizing, against float64 by hand and bit for bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_dpo.cli.text import bake_text, inspect_text
from lib_dpo.errors import BadTensorError, Cancelled, MismatchError, NothingToDoError, OutputError, SettingError
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.blocks import EVERYWHERE, BlockWeights, parse_blocks
from lib_dpo.families.keymap import UNET, unet_to_diffusers
from lib_dpo.families.model import open_model
from lib_dpo.families.synthetic import small_pair
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.files.writer import SafetensorsWriter
from lib_dpo.maths.precision import round_once
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import open_pair
from lib_dpo.offsets.patch import open_patch
from lib_dpo.offsets.recipe import baked_in
from lib_dpo.operations.bake import BakeReport, bake
from lib_dpo.operations.diff import diff
from lib_dpo.operations.extract import extract
from lib_dpo.operations.inspect import inspect
from lib_dpo.operations.resize import resize
from lib_dpo.operations.write_offset import write_offset
from lib_dpo.settings import ExtractSettings, RankPolicy

Files = tuple[Path, Path]
SD1 = ARCHITECTURES["sd1"]
_ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())
_RECIPES = st.fixed_dictionaries(
    {"type": st.just("dpo-offset"), "multiplier": st.integers(-3, 3) | st.floats(-2, 2) | _ANYTHING},
    optional={"primary_model_hash": st.sampled_from(["a", "b"]) | _ANYTHING, "offset": _ANYTHING, "blocks": _ANYTHING},
).map(json.dumps)
_HISTORIES = st.dictionaries(
    st.sampled_from(["a", "b"]), _ANYTHING | st.fixed_dictionaries({"sd_merge_recipe": _RECIPES | _ANYTHING})
).map(json.dumps)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small_pair(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="module")
def lora(sd1: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "dpo.safetensors"
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        extract(open_pair(base, tuned), path, ExtractSettings(RankPolicy(rank=6), profile="webui", device="cpu"))
    return path


@pytest.fixture(scope="module")
def offset_file(sd1: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offset") / "offset.safetensors"
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        write_offset(open_pair(base, tuned), path)
    return path


def run(target: Path, offset: Path, output: Path, blocks: BlockWeights = EVERYWHERE, **options: Any) -> BakeReport:
    with open_offset(offset) as change, open_model(target) as model:
        return bake(model, change, output, blocks=blocks, **options)


def by_canonical_key(path: Path) -> dict[str, torch.Tensor]:
    """UNet tensors of a diffusers file under canonical keys."""
    tensors = load_file(path)
    with open_model(path) as model:
        return {key: tensors[source.keys[0]] for key, source in model.sources.items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# ---- offset files ----


def test_the_offset_file_is_tuned_minus_base_under_the_published_names(sd1: Files, offset_file: Path) -> None:
    base, tuned, offset = load_file(sd1[0]), load_file(sd1[1]), load_file(offset_file)
    assert offset.keys() == tuned.keys()
    for key, weight in base.items():
        name = unet_to_diffusers(SD1, key)
        if name is not None:
            assert offset[name].dtype == torch.float32
            assert torch.equal(offset[name], tuned[name] - weight.float())
    with open_checkpoint(offset_file) as checkpoint:
        assert checkpoint.metadata["dpo.kind"] == "offset"


def test_a_published_offset_file_without_metadata_is_told_from_a_model(sd1: Files, offset_file: Path, tmp_path: Path) -> None:
    save_file(load_file(offset_file), tmp_path / "plain.safetensors")
    with open_offset(tmp_path / "plain.safetensors") as offset:
        assert offset.kind == "dense"
    with pytest.raises(MismatchError, match="weights of a model"):
        open_offset(sd1[1])


# ---- baking ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_pairs_own_offset_restores_the_tuned_weights(sd1: Files, tmp_path: Path, dtype: torch.dtype) -> None:
    base = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in load_file(sd1[0]).items()}
    tuned = {key: tensor.to(dtype) for key, tensor in load_file(sd1[1]).items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    with open_model(tmp_path / "base.safetensors") as one, open_model(tmp_path / "tuned.safetensors") as other:
        write_offset(open_pair(one, other), tmp_path / "offset.safetensors")
    run(tmp_path / "base.safetensors", tmp_path / "offset.safetensors", tmp_path / "baked.safetensors")
    baked = load_file(tmp_path / "baked.safetensors")
    inexact = total = 0
    for key, tensor in by_canonical_key(tmp_path / "tuned.safetensors").items():
        # a float32 offset holds the difference of two float32 numbers exactly unless they are far apart in size
        difference = tensor.double() - base[key].double()
        exact = difference == difference.float().double()
        assert torch.equal(baked[key][exact], tensor[exact]), key
        torch.testing.assert_close(baked[key], tensor, rtol=0, atol=float(difference.abs().max()) * 2**-24)
        inexact, total = inexact + int((baked[key] != tensor).sum()), total + tensor.numel()
    assert inexact == 0 if dtype != torch.float32 else inexact < 1e-3 * total
    for key in base.keys() - {key for key in base if key.startswith(UNET)}:
        assert bits(baked[key]) == bits(base[key]), key


def test_weights_with_no_offset_keep_their_bits_even_a_negative_zero(sd1: Files, offset_file: Path, tmp_path: Path) -> None:
    tensors, offset = load_file(sd1[0]), load_file(offset_file)
    key = UNET + "input_blocks.0.0.bias"
    tensors[key][:4] = -0.0
    offset["conv_in.bias"][:4] = 0.0
    save_file(tensors, tmp_path / "target.safetensors")
    save_file(offset, tmp_path / "offset.safetensors")
    run(tmp_path / "target.safetensors", tmp_path / "offset.safetensors", tmp_path / "b.safetensors")
    assert bits(load_file(tmp_path / "b.safetensors")[key][:4]) == bits(tensors[key][:4])


@pytest.mark.parametrize("strength", [1.0, 0.35, -0.7, 2.0])
def test_baking_a_lora_is_the_float64_formula_rounded_once(sd1: Files, lora: Path, tmp_path: Path, strength: float) -> None:
    run(sd1[0], lora, tmp_path / "baked.safetensors", strength=strength)
    base, baked, factors = load_file(sd1[0]), load_file(tmp_path / "baked.safetensors"), load_file(lora)
    changed = 0
    for key, weight in base.items():
        name = unet_to_diffusers(SD1, key)
        if name is None or not name.endswith(".weight"):
            continue
        stem = "out.0" if name == "conv_norm_out.weight" else name.removesuffix(".weight")
        module = "lora_unet_" + stem.replace(".", "_")
        if f"{module}.lora_up.weight" in factors:
            up, down = (factors[f"{module}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
            delta = (up @ down * (float(factors[f"{module}.alpha"]) / up.shape[1])).reshape(weight.shape)
        else:
            delta = factors[f"{module}.w_norm"].double()
        exact = weight.double() + strength * delta
        # numpy rounds float64 to float16 once; torch goes by float32 and rounds twice
        assert np.array_equal(baked[key].numpy(), exact.numpy().astype(np.float16)), key
        changed += 1
    assert changed == 282 + 109


def test_everything_else_stays_byte_for_byte(sd1: Files, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(sd1[0]) | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.randn(32, 4, 3, 3),
        "v_pred": torch.tensor([]),
        "ztsnr": torch.tensor([]),
    }
    metadata = {"modelspec.title": "my merge", "note": '{"a": 1}', "sshs_model_hash": "stale", "sd_merge_models": "{}"}
    save_file(tensors, tmp_path / "target.safetensors", metadata=metadata)
    (tmp_path / "target.yaml").write_text("model: {}\n")
    run(tmp_path / "target.safetensors", lora, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        found = file.metadata()
    baked = load_file(tmp_path / "out.safetensors")
    assert baked.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert baked[key].dtype == tensor.dtype
        if not key.startswith(UNET):
            assert bits(baked[key]) == bits(tensor), key
    assert found["modelspec.title"] == "my merge"
    assert found["note"] == '{"a": 1}'
    assert "sshs_model_hash" not in found
    assert json.loads(found["sd_merge_recipe"])["type"] == "dpo-offset"
    assert (tmp_path / "out.yaml").read_text() == "model: {}\n"


def test_an_other_sidecar_is_removed_only_as_told_and_said_so(sd1: Files, lora: Path, tmp_path: Path) -> None:
    sidecar = tmp_path / "b.yaml"
    sidecar.write_text("mine\n")
    with pytest.raises(OutputError, match=r"b\.yaml: exists already"):
        run(sd1[0], lora, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["b.yaml"]
    report = run(sd1[0], lora, tmp_path / "b.safetensors", overwrite=True)
    assert not sidecar.exists()
    assert report.as_json()["sidecar"] == "removed"
    assert f"removed {sidecar}" in bake_text(report)


def test_what_became_of_the_sidecar_is_reported(sd1: Files, lora: Path, tmp_path: Path) -> None:
    target, output, sidecar = tmp_path / "target.safetensors", tmp_path / "b.safetensors", tmp_path / "b.yaml"
    target.write_bytes(sd1[0].read_bytes())
    assert run(target, lora, output).sidecar == "none"
    target.with_suffix(".yaml").write_bytes(b"model: \xff\n")  # copied as it is, whatever its letters
    for before, fate in ((None, "copied"), (b"model: \xff\n", "kept"), (b"other\n", "replaced")):
        if before is not None:
            sidecar.write_bytes(before)
        report = run(target, lora, output, overwrite=True)
        assert (report.sidecar, sidecar.read_bytes()) == (fate, b"model: \xff\n")
        assert (str(sidecar) in bake_text(report)) == (fate != "kept")


@pytest.mark.parametrize("of_target", [True, False])
def test_an_error_before_the_end_leaves_the_sidecar_and_the_output_as_they_were(
    sd1: Files, lora: Path, tmp_path: Path, of_target: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, output = tmp_path / "target.safetensors", tmp_path / "b.safetensors"
    target.write_bytes(sd1[0].read_bytes())
    if of_target:
        target.with_suffix(".yaml").write_text("model: {}\n")
    output.write_text("mine")
    output.with_suffix(".yaml").write_text("mine too")
    before = tiny.snapshot(tmp_path)
    replace = os.replace

    def fail(source: Path, place: Path) -> None:
        if place == output:
            raise OSError(28, "No space left on device")
        replace(source, place)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="disk is full"):
        run(target, lora, output, overwrite=True)
    assert tiny.snapshot(tmp_path) == before


def test_the_sidecar_is_there_when_the_output_gets_its_name(
    sd1: Files, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, output = tmp_path / "target.safetensors", tmp_path / "b.safetensors"
    target.write_bytes(sd1[0].read_bytes())
    target.with_suffix(".yaml").write_text("model: {}\n")
    finish = SafetensorsWriter.finish

    def watched(self: SafetensorsWriter, *args: Any, **options: Any) -> None:
        assert output.with_suffix(".yaml").is_file()
        assert not output.exists()
        finish(self, *args, **options)

    monkeypatch.setattr(SafetensorsWriter, "finish", watched)
    assert run(target, lora, output).sidecar == "copied"


def test_the_merge_history_grows_by_both_files(sd1: Files, lora: Path, tmp_path: Path) -> None:
    hashes = {"hashes": lambda: ("a" * 64, "b" * 64)}
    run(sd1[0], lora, tmp_path / "one.safetensors", **hashes)
    run(tmp_path / "one.safetensors", lora, tmp_path / "two.safetensors", hashes=lambda: ("c" * 64, "b" * 64))
    with open_checkpoint(tmp_path / "two.safetensors") as checkpoint:
        models = json.loads(checkpoint.metadata["sd_merge_models"])
    assert models.keys() == {"a" * 64, "b" * 64, "c" * 64}
    assert models["c" * 64]["sd_merge_recipe"] is not None


def test_a_second_bake_says_what_was_there_and_such_a_base_is_doubted(sd1: Files, lora: Path, tmp_path: Path) -> None:
    assert "already" not in bake_text(run(sd1[0], lora, tmp_path / "one.safetensors", strength=0.5))
    assert f"had {lora.stem} × 0.5 baked in already" in bake_text(
        run(tmp_path / "one.safetensors", lora, tmp_path / "two.safetensors")
    )
    with open_model(tmp_path / "one.safetensors") as base, open_model(sd1[1]) as tuned:
        verdict = diff(open_pair(base, tuned)).verdict
    assert verdict.level == "doubtful"
    assert f"one has {lora.stem} × 0.5 baked in" in verdict.text


def test_a_file_tells_every_bake_in_it(sd1: Files, lora: Path, tmp_path: Path) -> None:
    assert inspect(sd1[0]).baked_in == ()
    run(sd1[0], lora, tmp_path / "one.safetensors", strength=0.8, hashes=lambda: ("a" * 64, "b" * 64))
    blocks = parse_blocks("IN=0.5")
    run(tmp_path / "one.safetensors", lora, tmp_path / "two.safetensors", blocks=blocks, hashes=lambda: ("c" * 64, "b" * 64))
    found = inspect(tmp_path / "two.safetensors")
    assert [str(ingredient) for ingredient in found.baked_in] == [f"{lora.stem} × 1 (IN=0.5)", f"{lora.stem} × 0.8"]
    assert f"baked in, says its metadata: {lora.stem} × 0.8" in inspect_text(found)
    told = {"offset": lora.stem, "strength": 0.8, "blocks": "", "rank": None, "kind": "lora"}
    assert found.as_json()["baked_in"][1] == told


def test_the_recipe_says_all_that_it_takes_to_bake_again(sd1: Files, lora: Path, offset_file: Path, tmp_path: Path) -> None:
    patch = open_patch(lora, rank=2, blocks=parse_blocks("MID=0"))
    with open_model(sd1[0]) as target, patch.checkpoint:
        bake(target, patch.offset, tmp_path / "cut.safetensors", strength=0.3, blocks=patch.blocks, rank=patch.rank)
    (found,) = inspect(tmp_path / "cut.safetensors").baked_in
    assert (found.rank, found.kind, str(found)) == (2, "lora", f"{lora.stem} × 0.3 (rank 2; MID=0)")
    run(sd1[0], offset_file, tmp_path / "dense.safetensors")
    (found,) = inspect(tmp_path / "dense.safetensors").baked_in
    assert (found.rank, found.kind) == (None, "dense")


@pytest.mark.parametrize("rank", ["true", "0", "-1", "1.5", '"4"', "[]", "null", "1" + 99 * "0"])
def test_a_rank_that_cannot_be_is_not_told(rank: str) -> None:
    recipe = f'{{"type": "dpo-offset", "offset": "dpo", "multiplier": 1, "rank": {rank}}}'
    (found,) = baked_in({"sd_merge_recipe": recipe})
    assert (str(found), found.rank) == ("dpo × 1", None)


@given(_RECIPES | st.text(), _HISTORIES | st.text())
def test_whatever_another_tool_wrote_as_a_recipe_gives_short_lines(recipe: str, history: str) -> None:
    found = baked_in({"sd_merge_recipe": recipe, "sd_merge_models": history})
    assert len(found) <= 3
    for ingredient in found:
        line = str(ingredient)
        assert line.isprintable()
        assert len(line) < 250
        assert abs(ingredient.strength) < 1e7


@pytest.mark.parametrize(
    "multiplier", ["1" + 400 * "0", "1" + 5000 * "0", "NaN", "Infinity", "true", "null", '"1"', "[]"], ids=lambda text: text[:9]
)
def test_a_strength_that_cannot_be_is_not_told(multiplier: str) -> None:
    assert baked_in({"sd_merge_recipe": f'{{"type": "dpo-offset", "offset": "dpo", "multiplier": {multiplier}}}'}) == ()


def test_names_in_a_recipe_are_one_printable_line() -> None:
    recipe = json.dumps({"type": "dpo-offset", "multiplier": 1, "offset": "a\n\ud800b" + 300 * "c", "blocks": None})
    (found,) = baked_in({"sd_merge_recipe": recipe})
    assert found.offset.startswith("a ")
    assert len(found.offset) == 100
    assert str(found).encode("utf-8").decode() == f"{found.offset} × 1"


def test_a_recipe_that_names_itself_is_told_once_more_and_ends() -> None:
    recipe = json.dumps({"type": "dpo-offset", "multiplier": 1, "offset": "dpo", "primary_model_hash": "a"})
    history = json.dumps({"a": {"sd_merge_recipe": recipe}})
    assert len(baked_in({"sd_merge_recipe": recipe, "sd_merge_models": history})) == 2


def test_block_weights_scale_their_blocks(sd1: Files, offset_file: Path, tmp_path: Path) -> None:
    blocks = parse_blocks("IN=0,IN04=2,MID=0.5,OUT=0")
    run(sd1[0], offset_file, tmp_path / "b.safetensors", strength=2.0, blocks=blocks, precision="fp32")
    base, baked = load_file(sd1[0]), load_file(tmp_path / "b.safetensors")
    for key, offset in by_canonical_key(offset_file).items():
        weight = 2.0 * blocks.of(SD1, key)
        assert torch.equal(baked[key], (base[key].double() + weight * offset.double()).float()), key


def only(lora: Path, path: Path, *, alpha: float, modules: int = 3) -> Path:
    """A LoRA of which some modules keep their alpha and all others get this one."""
    tensors = load_file(lora)
    for key in sorted(key for key in tensors if key.endswith(".alpha"))[modules:]:
        tensors[key] = torch.tensor(alpha, dtype=tensors[key].dtype)
    save_file({key: tensor for key, tensor in tensors.items() if "_norm" not in key}, path)
    return path


@pytest.mark.parametrize(
    ("alpha", "options", "why"),
    [
        (0.0, {}, "its changes are all 0"),
        (6.0, {"strength": 0.0}, "at strength 0 changes nothing of base.safetensors: its changes are all 0"),
        (6.0, {"strength": 1e-9}, "each change is too small for its number format; choose a larger strength"),
        (6.0, {"blocks": parse_blocks("ALL=0")}, "its changes are all 0"),
        (0.0, {"precision": "bf16"}, "its changes are all 0"),
    ],
)
def test_a_bake_that_changes_no_value_is_refused_with_the_reason(
    sd1: Files, lora: Path, tmp_path: Path, alpha: float, options: dict[str, Any], why: str
) -> None:
    (tmp_path / "out").mkdir()
    offset = only(lora, tmp_path / "l.safetensors", alpha=alpha, modules=0)
    with pytest.raises(NothingToDoError, match=why):
        run(sd1[0], offset, tmp_path / "out" / "b.safetensors", **options)
    assert list((tmp_path / "out").iterdir()) == []


def test_tensors_are_counted_that_hold_other_values_afterwards(sd1: Files, lora: Path, tmp_path: Path) -> None:
    report = run(sd1[0], only(lora, tmp_path / "l.safetensors", alpha=0.0), tmp_path / "b.safetensors")
    base, baked = load_file(sd1[0]), load_file(tmp_path / "b.safetensors")
    assert report.changed == sum(bits(baked[key]) != bits(base[key]) for key in base) == 3
    assert report.kept == len(base) - 3
    assert "\n3 tensors changed at strength 1, " in bake_text(report)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_precision_converts_the_model_and_nothing_else(sd1: Files, lora: Path, tmp_path: Path, precision: str) -> None:
    run(sd1[0], lora, tmp_path / "b.safetensors", precision=precision)
    base, baked = load_file(sd1[0]), load_file(tmp_path / "b.safetensors")
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    for key, tensor in base.items():
        is_model = tensor.is_floating_point() and "." in key
        assert baked[key].dtype == (wanted if is_model else tensor.dtype), key


def test_an_inpainting_model_keeps_its_extra_channels(sd1: Files, offset_file: Path, tmp_path: Path) -> None:
    tensors = load_file(sd1[0])
    key = UNET + "input_blocks.0.0.weight"
    plain = tensors[key]
    tensors[key] = torch.cat((plain, torch.randn(plain.shape[0], 5, 3, 3).half()), dim=1)
    save_file(tensors, tmp_path / "inpaint.safetensors")
    run(tmp_path / "inpaint.safetensors", offset_file, tmp_path / "b.safetensors")
    baked = load_file(tmp_path / "b.safetensors")[key]
    offset = load_file(offset_file)["conv_in.weight"]
    assert torch.equal(baked[:, 4:], tensors[key][:, 4:])
    assert torch.equal(baked[:, :4], (plain.double() + offset.double()).half())


def test_a_unet_only_target_in_diffusers_naming_is_baked_too(sd1: Files, lora: Path, tmp_path: Path) -> None:
    run(sd1[1], lora, tmp_path / "b.safetensors", strength=-1.0)
    tuned, baked = load_file(sd1[1]), load_file(tmp_path / "b.safetensors")
    assert tuned.keys() == baked.keys()
    assert not torch.equal(tuned["conv_in.weight"], baked["conv_in.weight"])
    assert torch.equal(tuned["conv_in.bias"], baked["conv_in.bias"])


def test_a_result_that_overflows_is_refused_by_key(sd1: Files, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(BadTensorError, match=r"model\.diffusion_model\."):
        run(sd1[0], lora, tmp_path / "out" / "b.safetensors", strength=1e12)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="needs float8")
def test_a_weight_beyond_float8_is_refused_rather_than_cut(sd1: Files, lora: Path, tmp_path: Path) -> None:
    """Newer torch cuts it to 448 without a word."""
    tensors = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(sd1[0]).items()}
    save_file(tensors, tmp_path / "fp8.safetensors")
    with pytest.raises(BadTensorError, match="use a smaller strength"):
        run(tmp_path / "fp8.safetensors", lora, tmp_path / "out" / "b.safetensors", strength=1e7)
    assert not (tmp_path / "out").exists()


def test_a_cancelled_bake_leaves_nothing(sd1: Files, lora: Path, tmp_path: Path) -> None:
    def cancel(done: int, total: int, key: str) -> None:
        if done > total // 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(sd1[0], lora, tmp_path / "out" / "b.safetensors", on_progress=cancel)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_rounding_once_where_torch_rounds_twice(dtype: torch.dtype, bits: int) -> None:
    """Just above the middle of two neighbours: float32 makes it the middle itself, and ties to even go down."""
    tie = 1 + 2.0**-bits
    values = torch.tensor([tie + 2.0**-40, tie - 2.0**-40, tie, -tie - 2.0**-40, 0.0, -0.0, 1e-30], dtype=torch.float64)
    up, down = 1 + 2.0 ** (1 - bits), 1.0
    expected = [up, down, down, -up, 0.0, -0.0, float(torch.tensor(1e-30).to(dtype))]
    found = round_once(values, dtype)
    assert found.tolist() == expected
    assert torch.signbit(found[5])
    assert values[:1].to(dtype).item() == down  # torch, for comparison


def test_rounding_once_agrees_with_numpy_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-9, 6, (100_000,), generator=generator).double()
    values = torch.randn(100_000, generator=generator, dtype=torch.float64) * scale
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(np.float16)
    assert np.array_equal(round_once(values, torch.float16).numpy(), expected)


# ---- resizing ----


def resized(lora: Path, output: Path, **policy: Any) -> Any:
    with open_checkpoint(lora) as checkpoint:
        return resize(checkpoint, output, RankPolicy(**policy))


def deltas(path: Path) -> dict[str, torch.Tensor]:
    with open_offset(path) as offset:
        return {key: offset.read(key, torch.float64) for key in offset.shapes}


def test_resizing_is_the_truncated_svd_of_the_delta(lora: Path, tmp_path: Path) -> None:
    report = resized(lora, tmp_path / "r.safetensors", rank=2)
    before, after = deltas(lora), deltas(tmp_path / "r.safetensors")
    kept = total = 0.0
    for key, delta in before.items():
        if delta.ndim < 2:
            assert torch.equal(after[key], delta), key
            own = float(delta.square().sum())  # copied as it is: part of what the LoRA changes, and all of it kept
            kept, total = kept + own, total + own
            continue
        U, S, Vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
        best = ((U[:, :2] * S[:2]) @ Vh[:2]).reshape(delta.shape)
        torch.testing.assert_close(after[key], best, atol=2e-3 * float(S[0]), rtol=0)
        kept, total = kept + float(S[:2].square().sum()), total + float(S.square().sum())
    assert report.energy_kept == pytest.approx(kept / total, rel=1e-6)


def test_resizing_to_the_same_rank_changes_nothing_but_rounding(lora: Path, tmp_path: Path) -> None:
    report = resized(lora, tmp_path / "r.safetensors", rank=6)
    assert report.energy_kept == pytest.approx(1.0)
    before, after = deltas(lora), deltas(tmp_path / "r.safetensors")
    for key, delta in before.items():
        torch.testing.assert_close(after[key], delta, atol=2e-3 * float(delta.abs().max()), rtol=0)


def test_alpha_over_rank_stays_and_foreign_loras_are_sorted_first(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(64, 8, generator=generator), torch.randn(8, 48, generator=generator)
    down *= torch.tensor([0.01, 5, 0.1, 2, 0.01, 1, 3, 0.2])[:, None]  # the strongest components are not the first
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = {".lora_up.weight": up, ".lora_down.weight": down, ".alpha": torch.tensor(2.0)}
    save_file({name + part: tensor for part, tensor in parts.items()}, tmp_path / "l.safetensors")
    resized(tmp_path / "l.safetensors", tmp_path / "r.safetensors", rank=4)
    found = load_file(tmp_path / "r.safetensors")
    assert float(found[name + ".alpha"]) == pytest.approx(2.0 / 8 * 4)
    U, S, Vh = torch.linalg.svd(up.double() @ down.double())
    best = (U[:, :4] * S[:4]) @ Vh[:4] * (2.0 / 8)
    product = found[name + ".lora_up.weight"].double() @ found[name + ".lora_down.weight"].double() * 0.25
    torch.testing.assert_close(product, best, atol=1e-5, rtol=0)


def test_a_tucker_factor_is_multiplied_in(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    up, mid, down = (torch.randn(*s, generator=generator) for s in ((32, 4, 1, 1), (4, 4, 3, 3), (4, 32, 1, 1)))
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    parts = {".lora_up.weight": up, ".lora_mid.weight": mid, ".lora_down.weight": down, ".alpha": torch.tensor(4.0)}
    save_file({name + part: tensor for part, tensor in parts.items()}, tmp_path / "l.safetensors")
    expected = torch.einsum("oa,abhw,bi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    key = UNET + "input_blocks.1.0.in_layers.2.weight"
    torch.testing.assert_close(deltas(tmp_path / "l.safetensors")[key], expected.double(), atol=1e-4, rtol=0)
    resized(tmp_path / "l.safetensors", tmp_path / "r.safetensors", rank=4)
    assert "mid" not in " ".join(load_file(tmp_path / "r.safetensors"))
    torch.testing.assert_close(deltas(tmp_path / "r.safetensors")[key], expected.double(), atol=1e-4, rtol=0)


def test_sizes_and_energies(lora: Path, tmp_path: Path) -> None:
    report = resized(lora, tmp_path / "s.safetensors", size_mb=0.9)
    assert 0.8e6 <= report.file_bytes <= 0.9e6
    report = resized(lora, tmp_path / "e.safetensors", energy=0.7)
    assert 0.7 <= report.energy_kept < 0.72


def test_resizing_never_makes_larger(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="above the LoRA's own 6"):
        resized(lora, tmp_path / "r.safetensors", rank=7)
