"""LoHa, LoKr, GLoRA and DoRA, against float64 by hand and against LyCORIS and PEFT, who define them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lora_files import TO_Q, TO_Q_DOTTED, TO_Q_KEY, configured, kohya, pair, saved
from safetensors.torch import load_file

from lib_dpo.errors import BadTensorError, DpoError, MismatchError, SettingError
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import open_model
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.maths.delta import total
from lib_dpo.offsets.lora.decompositions import Form, dense_change
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.patch import open_patch
from lib_dpo.operations.bake import bake
from lib_dpo.operations.inspect import inspect
from lib_dpo.operations.resize import resize
from lib_dpo.settings import RankPolicy

Tensors = dict[str, torch.Tensor]

CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
CONV_KEY = UNET + "input_blocks.1.0.in_layers.2.weight"
POINT = "lora_unet_down_blocks_0_attentions_0_proj_in"
POINT_KEY = UNET + "input_blocks.1.1.proj_in.weight"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
TE_KEY = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
LINEAR = (32, 32)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32."""
    tensors = {key: tensor.float() for key, tensor in tiny.base().items()} | LAYERS
    return tiny.save(tmp_path_factory.mktemp("target") / "target.safetensors", tensors)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * math.prod(shape)))


def named(module: str, parts: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


LAYERS = {TO_Q_KEY: randn(32, 32), CONV_KEY: randn(32, 32, 3, 3), POINT_KEY: randn(32, 32, 1, 1)}  # larger than in the rest


def read(path: Path, key: str) -> torch.Tensor:
    with open_offset(path) as offset:
        assert not offset.unmatched
        return offset.read(key, torch.float64)


def baked(target: Path, offset: Path, key: str, strength: float = 1.0) -> torch.Tensor:
    """What a bake adds to a weight of a float32 file, float64."""
    output = offset.with_name("baked.safetensors")
    with open_model(target) as model, open_offset(offset) as change:
        bake(model, change, output, strength=strength, overwrite=True)
    before, after = load_file(target), load_file(output)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {key}
    return after[key].double() - before[key].double()


# ---- by hand ----


def loha_parts(out: int, columns: int, rank: int = 3) -> Tensors:
    return {
        "hada_w1_a": randn(out, rank), "hada_w1_b": randn(rank, columns, seed=1),
        "hada_w2_a": randn(out, rank, seed=2), "hada_w2_b": randn(rank, columns, seed=3),
    }  # fmt: skip


def test_a_tall_loha_is_the_product_of_two_products() -> None:
    """It is made some rows at a time."""
    parts = loha_parts(600, 36)
    form = Form("LoHa", (600, 36), 3, "")
    one, other = (parts[f"hada_{side}_a"].double() @ parts[f"hada_{side}_b"].double() for side in ("w1", "w2"))
    torch.testing.assert_close(dense_change(form, parts, 0.3).values, one * other * 0.3)


def test_a_loha_is_the_product_of_two_products_value_by_value(tmp_path: Path) -> None:
    parts = loha_parts(*LINEAR)
    path = saved(tmp_path / "l.safetensors", named(TO_Q, parts | {"alpha": torch.tensor(2.0)}))
    own = {name: tensor.double() for name, tensor in parts.items()}
    wanted = torch.zeros(32, 32, dtype=torch.float64)
    for row in range(32):
        for column in range(32):
            first = float((own["hada_w1_a"][row] * own["hada_w1_b"][:, column]).sum())
            wanted[row, column] = first * float((own["hada_w2_a"][row] * own["hada_w2_b"][:, column]).sum()) * 2 / 3
    torch.testing.assert_close(read(path, TO_Q_KEY), wanted, atol=1e-12, rtol=1e-12)


def test_a_lokr_puts_the_second_matrix_in_place_of_each_number_of_the_first(tmp_path: Path) -> None:
    first, second = randn(4, 8), randn(8, 4, seed=1)
    tensors = named(TO_Q, {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(7.0)})
    change = read(saved(tmp_path / "l.safetensors", tensors), TO_Q_KEY)
    for row in range(4):
        for column in range(8):
            block = change[8 * row : 8 * row + 8, 4 * column : 4 * column + 4]
            torch.testing.assert_close(block, first[row, column].double() * second.double(), atol=0, rtol=1e-15)


@pytest.mark.parametrize("factored", ["w1", "w2", "both"])
def test_alpha_counts_in_a_lokr_that_has_factors(tmp_path: Path, factored: str) -> None:
    """By the rank of what is factored, of the second matrix where both are."""
    small, large, ranks = (4, 4), (8, 8), {"w1": 2, "w2": 3}
    parts: Tensors = {}
    whole = {}
    for side, (rows, columns) in (("w1", small), ("w2", large)):
        if factored in (side, "both"):
            a, b = randn(rows, ranks[side]), randn(ranks[side], columns, seed=1)
            parts |= {f"lokr_{side}_a": a, f"lokr_{side}_b": b}
            whole[side] = a.double() @ b.double()
        else:
            parts[f"lokr_{side}"] = randn(rows, columns, seed=2)
            whole[side] = parts[f"lokr_{side}"].double()
    path = saved(tmp_path / "l.safetensors", named(TO_Q, parts | {"alpha": torch.tensor(1.0)}))
    scale = 1 / ranks["w1" if factored == "w1" else "w2"]
    torch.testing.assert_close(read(path, TO_Q_KEY), torch.kron(whole["w1"], whole["w2"]) * scale, atol=1e-12, rtol=1e-12)


def test_convolutions_of_one_row_of_numbers_get_their_kernel_back(tmp_path: Path) -> None:
    parts = loha_parts(32, 32 * 9)
    with open_offset(saved(tmp_path / "l.safetensors", named(CONV, parts))) as offset:
        assert offset.shapes[CONV_KEY] == (32, 32, 3, 3)
        own = {name: tensor.double() for name, tensor in parts.items()}
        wanted = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        torch.testing.assert_close(offset.read(CONV_KEY, torch.float64), wanted.reshape(32, 32, 3, 3))


def test_whole_steps_with_one_number_are_exact(tmp_path: Path, target: Path) -> None:
    """What `lokr_w1` of one number and `lokr_w2` of whole steps stand for is added in one rounding, held as stored."""
    steps = torch.randint(-127, 128, (32, 32, 3, 3), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[1e-4 / 3]])
    path = saved(tmp_path / "l.safetensors", named(CONV, {"lokr_w1": scale, "lokr_w2": steps}))
    wanted = steps.double() * float(scale)
    assert torch.equal(read(path, CONV_KEY), wanted)
    with open_offset(path) as offset:
        (term,) = offset.terms(CONV_KEY)
        assert term.values.dtype == torch.int8  # type: ignore[union-attr]
    halves = {key: tensor.half() for key, tensor in load_file(target).items()}
    half = tiny.save(tmp_path / "half.safetensors", halves)
    for strength in (1.0, 0.5):
        with open_model(half) as model, open_offset(path) as change:
            bake(model, change, tmp_path / "b.safetensors", strength=strength, overwrite=True)
        exact = halves[CONV_KEY].double() + strength * wanted
        assert torch.equal(load_file(tmp_path / "b.safetensors")[CONV_KEY], torch.from_numpy(exact.numpy().astype("float16")))


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_dora_scales_rows_or_columns_to_their_lengths(tmp_path: Path, target: Path, by_rows: bool, strength: float) -> None:
    up, down = (0.1 * tensor for tensor in pair())
    weight = load_file(target)[TO_Q_KEY].double()
    lengths = randn(32, 1).abs() if by_rows else randn(1, 32).abs()
    path = saved(tmp_path / "l.safetensors", kohya(TO_Q, up, down, 2.0) | {f"{TO_Q}.dora_scale": lengths})
    merged = weight + (up.double() @ down.double()) / 2
    for own, length in zip(merged if by_rows else merged.T, lengths.flatten(), strict=True):
        own *= float(length) / math.sqrt(float((own * own).sum()))
    torch.testing.assert_close(baked(target, path, TO_Q_KEY, strength), strength * (merged - weight), atol=3e-7, rtol=1e-6)


@pytest.mark.parametrize("old", [True, False])
def test_both_orders_of_glora_change_the_weight_that_they_find(tmp_path: Path, target: Path, old: bool) -> None:
    wide, tall, left, right = randn(4, 32), randn(32, 4, seed=1), randn(32, 4, seed=2), randn(4, 32, seed=3)
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    parts = dict(zip((f"{name}.weight" for name in names), (0.1 * tall, 0.1 * wide, 0.1 * left, right), strict=True))
    path = saved(tmp_path / "l.safetensors", named(TO_Q, parts | {"alpha": torch.tensor(1.0)}))
    weight = load_file(target)[TO_Q_KEY].double()
    a, b = 0.01 * tall.double() @ wide.double(), 0.1 * left.double() @ right.double()
    torch.testing.assert_close(baked(target, path, TO_Q_KEY), (weight @ a + b) / 4, atol=2e-7, rtol=1e-6)


def test_a_glora_with_more_ranks_than_columns_is_told_by_all_four(tmp_path: Path, target: Path) -> None:
    """The first convolution has four input channels."""
    key = UNET + "input_blocks.0.0.weight"
    parts = {"a1": randn(4, 8, 1, 1), "a2": randn(8, 4, 1, 1), "b1": 0.1 * randn(8, 8, 1, 1), "b2": randn(8, 4, 3, 3)}
    path = saved(
        tmp_path / "l.safetensors", named("lora_unet_conv_in", {f"{name}.weight": part for name, part in parts.items()})
    )
    weight, own = load_file(target)[key].double(), {name: tensor.double().flatten(1) for name, tensor in parts.items()}
    wanted = torch.einsum("oihw,ij->ojhw", weight, own["a1"] @ own["a2"]) + (own["b1"] @ own["b2"]).reshape(weight.shape)
    torch.testing.assert_close(baked(target, path, key), wanted, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        f"lora_unet.{TO_Q_DOTTED}",
        f"unet.{TO_Q_DOTTED}",
        f"lycoris_{TO_Q_DOTTED.replace('.', '_')}",
        f"base_model.model.{TO_Q_DOTTED}",
    ],
)
def test_spellings_of_modules_count_for_every_form(tmp_path: Path, name: str) -> None:
    parts = loha_parts(*LINEAR) | {"alpha": torch.tensor(2.0)}
    kohya_style = read(saved(tmp_path / "k.safetensors", named(TO_Q, parts)), TO_Q_KEY)
    assert torch.equal(read(saved(tmp_path / "l.safetensors", named(name, parts)), TO_Q_KEY), kohya_style)


def test_a_loha_of_a_text_encoder_and_a_pair_of_the_unet_are_read_together(tmp_path: Path) -> None:
    tensors = named(TE, loha_parts(32, 32)) | kohya(TO_Q, *pair(), 4.0)
    path = saved(tmp_path / "l.safetensors", tensors)
    with open_offset(path) as offset:
        assert set(offset.shapes) == {TE_KEY, TO_Q_KEY}
    assert float(read(path, TE_KEY).abs().max()) > 0
    torch.testing.assert_close(read(path, TO_Q_KEY), pair()[0].double() @ pair()[1].double())


def test_a_third_of_a_fused_layer_and_a_transposed_one_get_their_own_rows(tmp_path: Path) -> None:
    """The k of an in_proj, DoRA by the length of its rows; and text_projection, which checkpoints hold the other way round."""
    k, projection = "lora_te2_text_model_encoder_layers_0_self_attn_k_proj", "lora_te2_text_projection"
    up, down, lengths = *pair(), randn(32, 1).abs()
    tensors = kohya(k, up, down) | {f"{k}.dora_scale": lengths}
    tensors |= named(projection, {"lokr_w1": randn(2, 4), "lokr_w2": randn(16, 4)})
    path = saved(tmp_path / "l.safetensors", tensors | kohya("lora_unet_label_emb_0_0", *pair()))
    with open_offset(path, ARCHITECTURES["sdxl"]) as offset:
        fused, transposed = (
            next(key for key in offset.shapes if key.endswith(end)) for end in ("in_proj_weight", "text_projection")
        )
        assert offset.bound == {fused: "DoRA"}
        assert offset.terms_on is not None
        weight = randn(96, 32).double()
        change = total(offset.terms_on(fused, weight), (96, 32), torch.float64)
        merged = weight[32:64] + up.double() @ down.double()
        wanted = lengths.double() * merged / merged.norm(dim=1, keepdim=True) - weight[32:64]
        torch.testing.assert_close(change[32:64], wanted)
        assert not bool(change[:32].any() or change[64:].any())
        assert offset.shapes[transposed] == (16, 32)
        whole = torch.kron(randn(2, 4).double(), randn(16, 4).double())
        torch.testing.assert_close(offset.read(transposed, torch.float64), whole.T)


# ---- where they can be used ----


def test_rows_for_live_models_hold_what_the_offset_holds(tmp_path: Path) -> None:
    tensors = named(TO_Q, loha_parts(*LINEAR)) | named(CONV, {"lokr_w1": randn(4, 4), "lokr_w2": randn(8, 8, 3, 3)})
    tensors |= named(POINT, {"lokr_w1": torch.full((1, 1), 0.5), "lokr_w2": torch.ones(32, 32, 1, 1, dtype=torch.int8)})
    patch = open_patch(saved(tmp_path / "l.safetensors", tensors))
    rows = {row.key: row for row in patch.rows()}
    assert set(rows) == {TO_Q_KEY, CONV_KEY, POINT_KEY} == set(patch.changed_keys())
    for key, row in rows.items():
        assert row.up is None
        assert row.diff is not None
        assert tuple(row.diff.shape) == patch.offset.shapes[key]
        assert torch.equal(row.diff, patch.delta(key))
    assert float(rows[POINT_KEY].diff.min()) == 0.5  # type: ignore[union-attr]
    with pytest.raises(SettingError, match="no pairs"):
        open_patch(tmp_path / "l.safetensors", rank=2)


@pytest.mark.parametrize("form", ["DoRA", "GLoRA"])
def test_what_depends_on_the_model_is_refused_where_there_is_none(tmp_path: Path, form: str) -> None:
    if form == "DoRA":
        tensors = kohya(TO_Q, *pair(), 4.0) | {f"{TO_Q}.dora_scale": torch.ones(32, 1)}
    else:
        shapes = {"a1": (32, 4), "a2": (4, 32), "b1": (32, 4), "b2": (4, 32)}
        tensors = {f"{TO_Q}.{part}.weight": randn(*shape) for part, shape in shapes.items()}
    path = saved(tmp_path / "l.safetensors", tensors)
    with pytest.raises(MismatchError, match=rf"{form}.*bake it into a checkpoint file"):
        open_patch(path)
    with open_offset(path) as offset, pytest.raises(MismatchError, match=form):
        offset.read(TO_Q_KEY)
    with open_checkpoint(path) as checkpoint, pytest.raises(MismatchError, match=rf"{TO_Q} is {form}"):
        resize(checkpoint, tmp_path / "r.safetensors", RankPolicy(rank=2))
    assert any(form in note for note in inspect(path).notes)


def test_verify_measures_a_lokr_and_refuses_a_dora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, change = tiny.base(), 1e-2 * torch.kron(randn(4, 4), randn(8, 8))
    base = {key: tensor.float() for key, tensor in base.items()} | LAYERS
    files = (
        tiny.save(tmp_path / "base.safetensors", base),
        tiny.save(tmp_path / "tuned.safetensors", base | {TO_Q_KEY: base[TO_Q_KEY] + change}),
    )
    lokr = saved(tmp_path / "l.safetensors", named(TO_Q, {"lokr_w1": 1e-2 * randn(4, 4), "lokr_w2": randn(8, 8)}))
    figures = tiny.figures(tmp_path / "v.json", "verify", "--lora", lokr, "--base", files[0], "--tuned", files[1])
    assert figures["energy_kept"] == pytest.approx(1, abs=1e-6)
    dora = saved(tmp_path / "d.safetensors", kohya(TO_Q, *pair()) | {f"{TO_Q}.dora_scale": torch.ones(32, 1)})
    capsys.readouterr()
    assert tiny.run("verify", "--lora", dora, "--base", files[0], "--tuned", files[1]) == 2
    assert "DoRA" in capsys.readouterr().err


def test_resize_cuts_pairs_and_copies_what_no_rank_can_cut(tmp_path: Path) -> None:
    others = named(TO_Q, loha_parts(*LINEAR) | {"alpha": torch.tensor(1.0)})
    others |= named(POINT, {"lokr_w1": torch.full((1, 1), 3.0), "lokr_w2": torch.ones(32, 32, dtype=torch.int8)})
    path = saved(tmp_path / "l.safetensors", others | kohya(TE, *pair(), 4.0))
    with open_checkpoint(path) as checkpoint:
        report = resize(checkpoint, tmp_path / "r.safetensors", RankPolicy(rank=2))
    resized = load_file(tmp_path / "r.safetensors")
    assert all(torch.equal(resized[key], tensor) for key, tensor in others.items())
    squares = {key: float(read(path, key).square().sum()) for key in (TO_Q_KEY, POINT_KEY, TE_KEY)}
    assert squares[POINT_KEY] == 9 * 32 * 32
    missed = float((read(path, TE_KEY) - read(tmp_path / "r.safetensors", TE_KEY)).square().sum())
    assert report.energy_kept == pytest.approx(1 - missed / sum(squares.values()), rel=1e-6)
    alone = saved(tmp_path / "a.safetensors", others)
    with open_checkpoint(alone) as checkpoint, pytest.raises(MismatchError, match="LoHa and LoKr, which no rank can cut"):
        resize(checkpoint, tmp_path / "s.safetensors", RankPolicy(rank=2))


def test_inspect_says_what_a_file_is_made_of(tmp_path: Path) -> None:
    tensors = named(TO_Q, loha_parts(*LINEAR) | {"alpha": torch.tensor(1.0)}) | kohya(TE, *pair(), 4.0)
    tensors |= named(POINT, {"lokr_w1": randn(1, 1), "lokr_w2": randn(32, 32)})
    found = inspect(saved(tmp_path / "l.safetensors", tensors))
    assert found.ranks == (4, 4)  # of pairs
    assert "1 layer is LoHa, 1 layer is LoKr" in found.notes
    assert {round(scale.value, 4) for scale in found.scales} == {0.3333, 1.0}
    assert {scale.source for scale in found.scales} == {"alpha"}


# ---- what does not fit ----


LOKR = {"lokr_w1": randn(4, 4), "lokr_w2_a": randn(8, 2), "lokr_w2_b": randn(2, 8)}
GLORA = {"a1.weight": randn(32, 4), "a2.weight": randn(4, 32), "b1.weight": randn(32, 4), "b2.weight": randn(4, 32)}


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ({"hada_w1_a": randn(32, 3)}, MismatchError, "hada_w1_a but no hada_w1_b"),
        (loha_parts(32, 32) | {"hada_t1": randn(3, 3, 3, 3)}, MismatchError, "hada_t1 but no hada_t2"),
        (
            loha_parts(32, 32) | {"hada_w1_b": randn(4, 32)},
            BadTensorError,
            r"hada_w1_b has the shape \[4, 32\], expected 3 rows",
        ),
        (loha_parts(32, 32) | {"hada_w2_b": randn(3, 16)}, BadTensorError, r"hada_w2_b has the shape \[3, 16\], expected that"),
        ({"lokr_w1": randn(4, 4)}, MismatchError, "lokr_w1 but no lokr_w2"),
        ({"lokr_w2": randn(4, 4)}, MismatchError, "lokr_w2 but no lokr_w1"),
        ({"lokr_w1": randn(4, 4), "lokr_w2_a": randn(8, 2)}, MismatchError, "lokr_w2_a but no lokr_w2_b"),
        (
            {"lokr_w1": randn(4, 4), "lokr_w2": randn(8, 8), "lokr_t2": randn(2, 2, 3, 3)},
            MismatchError,
            "lokr_t2 but no lokr_w2_a",
        ),
        (LOKR | {"lokr_w2": randn(8, 8)}, MismatchError, "lokr_w2.* and .*lokr_w2_a.* the one or the other"),
        (LOKR | {"lokr_w2_b": randn(3, 8)}, BadTensorError, r"lokr_w2_b has the shape \[3, 8\], expected 2 rows"),
        (LOKR | {"lokr_w1": randn(4, 4, 1, 1)}, BadTensorError, r"lokr_w1 has the shape \[4, 4, 1, 1\], expected a matrix"),
        (LOKR | {"lokr_w1": torch.ones(4, 4, dtype=torch.int8)}, BadTensorError, "lokr_w1 is stored as I8"),
        ({"lokr_w1": randn(4, 4), "lokr_w2": torch.ones(8, 8, dtype=torch.int8)}, BadTensorError, "lokr_w2 is stored as I8"),
        (LOKR | {"lokr_w1": randn(4, 4) * math.inf}, BadTensorError, "lokr_w1 holds NaN or Inf"),
        (LOKR | {"alpha": torch.tensor(math.nan)}, BadTensorError, "alpha holds NaN or Inf"),
        (LOKR | loha_parts(32, 32), MismatchError, "hada_w1_a.* and .*lokr_w1.* the one or the other"),
        (LOKR | {"diff": randn(32, 32)}, MismatchError, "lokr_w1.* and a whole difference"),
        ({"a1.weight": randn(32, 4)}, MismatchError, r"a1\.weight but no a2\.weight"),
        (GLORA | {"a2.weight": randn(3, 32)}, BadTensorError, r"a2\.weight has the shape \[3, 32\]"),
        (GLORA | {"b2.weight": randn(4, 16)}, BadTensorError, r"a1\.weight has the shape \[32, 4\], expected 4 by 16"),
        (dict.fromkeys(GLORA, randn(32, 32)), BadTensorError, "LyCORIS had two orders"),
        ({"dora_scale": randn(32, 1)}, MismatchError, "without a pair"),
        ({"dora_scale": randn(32, 1), "diff": randn(32, 32)}, MismatchError, "without a pair"),
        (LOKR | {"dora_scale": randn(32)}, BadTensorError, r"dora_scale has the shape \[32\], expected \[32, 1\]"),
        (LOKR | {"dora_scale": randn(16, 1)}, BadTensorError, r"dora_scale has the shape \[16, 1\]"),
        (LOKR | {"lora_magnitude_vector": randn(16)}, BadTensorError, r"lora_magnitude_vector has the shape \[16\]"),
        (
            LOKR | {"dora_scale": randn(32, 1), "lora_magnitude_vector": randn(32)},
            MismatchError,
            "dora_scale.* and .*magnitude",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    tmp_path: Path, target: Path, parts: Tensors, error: type[DpoError], words: str
) -> None:
    path = saved(tmp_path / "l.safetensors", named(TO_Q, parts))
    with pytest.raises(error, match=words) as raised, open_model(target) as model, open_offset(path) as offset:
        bake(model, offset, tmp_path / "b.safetensors")
    assert "l.safetensors" in str(raised.value)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"lokr_w1": randn(4, 4), "lokr_w2": randn(8, 4)}, "32x16"),
        ({"lokr_w1": randn(1, 1), "lokr_w2": torch.ones(31, 32, dtype=torch.int8)}, "31x32"),
        (loha_parts(16, 32), "16x32"),
        (LOKR | {"dora_scale": randn(1, 16)}, "16 lengths for a weight of .*32"),
        ({name: randn(*(16 if size == 32 else size for size in part.shape)) for name, part in GLORA.items()}, "16x16"),
    ],
)
def test_a_size_that_is_not_the_layers_is_named(tmp_path: Path, target: Path, parts: Tensors, words: str) -> None:
    path = saved(tmp_path / "l.safetensors", named(TO_Q, parts))
    with pytest.raises(DpoError, match=words), open_model(target) as model, open_offset(path) as offset:
        bake(model, offset, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "l.safetensors", named(TO_Q, {"lokr_w1": randn(1, 1), "lokr_w2": torch.ones(32, 32, dtype=torch.int8)})
    )
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DpoError, match=r"l\.safetensors"):
        open_offset(path)


# ---- against the programs that define them ----


def layer(kind: str) -> Any:
    found = {
        "linear": lambda: torch.nn.Linear(32, 32, bias=False),
        "point": lambda: torch.nn.Conv2d(32, 32, 1, bias=False),
        "conv": lambda: torch.nn.Conv2d(32, 32, 3, bias=False),
    }[kind]()
    return found.double()


PLACES = {"linear": (TO_Q, TO_Q_KEY, TO_Q_DOTTED), "point": (POINT, POINT_KEY, ""), "conv": (CONV, CONV_KEY, "")}
DEVIATION = 1e-12  # of numbers about 1: both compute in float64, in another order


def filled(module: Any) -> Any:
    """Every factor with random numbers, as after a training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator).abs())
    return module


def by_lycoris(name: str, kind: str, **settings: Any) -> tuple[Any, Tensors]:
    """A module of LyCORIS on a layer, and what it saves."""
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    make = {"loha": LohaModule, "lokr": LokrModule, "glora": GLoRAModule}[name]
    torch.manual_seed(0)
    module = filled(make("x", layer(kind), **settings).double())
    return module, {part: tensor.detach() for part, tensor in module.custom_state_dict().items()}


LYCORIS: list[tuple[str, str, dict[str, Any], set[str]]] = [
    ("loha", "linear", {}, {"hada_w1_a"}),
    ("loha", "point", {}, {"hada_w1_a"}),
    ("loha", "conv", {}, {"hada_w1_a"}),
    ("loha", "conv", {"use_tucker": True}, {"hada_t1", "hada_t2"}),
    ("loha", "linear", {"rs_lora": True, "lora_dim": 4}, {"hada_w1_a"}),
    ("lokr", "linear", {}, {"lokr_w1", "lokr_w2_a"}),
    ("lokr", "linear", {"factor": 4, "decompose_both": True, "lora_dim": 1}, {"lokr_w1_a", "lokr_w2_a"}),
    ("lokr", "linear", {"factor": 4, "full_matrix": True}, {"lokr_w1", "lokr_w2"}),
    ("lokr", "linear", {"factor": 2, "unbalanced_factorization": True}, {"lokr_w1", "lokr_w2_a"}),
    ("lokr", "linear", {"lora_dim": 100}, {"lokr_w1", "lokr_w2"}),
    ("lokr", "point", {"factor": 4}, {"lokr_w1", "lokr_w2_a"}),
    ("lokr", "point", {"factor": 4, "full_matrix": True}, {"lokr_w1", "lokr_w2"}),
    ("lokr", "conv", {"factor": 4}, {"lokr_w1", "lokr_w2_a"}),
    ("lokr", "conv", {"factor": 4, "use_tucker": True}, {"lokr_w1", "lokr_t2"}),
    ("lokr", "conv", {"factor": 4, "use_tucker": True, "decompose_both": True, "lora_dim": 1}, {"lokr_w1_a", "lokr_t2"}),
    ("lokr", "conv", {"full_matrix": True, "alpha": 9.0}, {"lokr_w1", "lokr_w2"}),
]


@pytest.mark.newest
@pytest.mark.parametrize(("name", "kind", "settings", "expected"), LYCORIS)
def test_the_change_is_that_of_lycoris(
    tmp_path: Path, name: str, kind: str, settings: dict[str, Any], expected: set[str]
) -> None:
    settings = {"lora_dim": 3, "alpha": 2.0} | settings
    module, parts = by_lycoris(name, kind, **settings)
    assert expected <= parts.keys(), "this is the variant that was meant"
    place, key, _ = PLACES[kind]
    own = read(saved(tmp_path / "l.safetensors", named(place, parts)), key)
    wanted = module.get_weight(module.shape).detach()
    assert float(wanted.abs().mean()) > 1e-2
    torch.testing.assert_close(own.reshape(wanted.shape), wanted, atol=DEVIATION, rtol=DEVIATION)


@pytest.mark.newest
@pytest.mark.parametrize("kind", list(PLACES))
def test_a_glora_is_that_of_lycoris(tmp_path: Path, kind: str) -> None:
    module, parts = by_lycoris("glora", kind, lora_dim=3, alpha=2.0)
    place, key, _ = PLACES[kind]
    weight = module.org_weight.detach().double()
    wanted = module.get_diff_weight()[0].detach()
    with open_offset(saved(tmp_path / "l.safetensors", named(place, parts))) as offset:
        assert offset.bound == {key: "GLoRA"}
        assert offset.terms_on is not None
        (term,) = offset.terms_on(key, weight)
    torch.testing.assert_close(term.values, wanted, atol=DEVIATION, rtol=DEVIATION)  # type: ignore[union-attr]


@pytest.mark.newest
@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("loha", "linear", {}), ("loha", "conv", {}), ("loha", "conv", {"use_tucker": True}),
        ("lokr", "point", {"factor": 4}), ("lokr", "conv", {"factor": 4}),
    ],
)  # fmt: skip
def test_dora_is_that_of_lycoris(tmp_path: Path, name: str, kind: str, settings: dict[str, Any], on_out: bool) -> None:
    settings = {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True, "wd_on_out": on_out} | settings
    module, parts = by_lycoris(name, kind, **settings)
    assert parts["dora_scale"].shape[:2] == ((32, 1) if on_out else (1, 32))
    place, key, _ = PLACES[kind]
    weight = module.org_weight.detach().double()
    wanted = module.apply_weight_decompose(weight + module.get_weight(module.shape), 1).detach() - weight
    with open_offset(saved(tmp_path / "l.safetensors", named(place, parts))) as offset:
        assert offset.terms_on is not None
        (term,) = offset.terms_on(key, weight)
    torch.testing.assert_close(term.values, wanted, atol=DEVIATION, rtol=DEVIATION)  # type: ignore[union-attr]


def by_peft(config: Any) -> Any:
    """A UNet of diffusers' names with one adapted layer of each kind."""
    from peft import get_peft_model

    class Holder(torch.nn.Module):
        pass

    root = Holder()
    for dotted, kind in ((TO_Q_DOTTED, "linear"), ("down_blocks.0.attentions.0.proj_in", "point"), (
        "down_blocks.0.resnets.0.conv1", "conv",
    )):  # fmt: skip
        place, *inner = dotted.split(".")
        at = root
        for name in (place, *inner[:-1]):
            if not hasattr(at, name):
                at.add_module(name, Holder())
            at = getattr(at, name)
        at.add_module(inner[-1], layer(kind))
    torch.manual_seed(0)
    adapted = get_peft_model(root, config)
    return filled(adapted.double())


PEFT: list[tuple[str, Callable[[], Any]]] = [
    ("loha", lambda: peft_config("LoHaConfig", use_effective_conv2d=False)),
    ("loha cp", lambda: peft_config("LoHaConfig", use_effective_conv2d=True)),
    ("lokr", lambda: peft_config("LoKrConfig", decompose_factor=4)),
    ("lokr cp", lambda: peft_config("LoKrConfig", decompose_factor=4, use_effective_conv2d=True)),
    ("lokr whole", lambda: peft_config("LoKrConfig", r=100, alpha=50)),
    ("dora", lambda: peft_config("LoraConfig", use_dora=True)),
]


def peft_config(name: str, **settings: Any) -> Any:
    import peft

    alpha = {"lora_alpha": 6} if name == "LoraConfig" else {"alpha": 6}
    return getattr(peft, name)(**{"r": 3, "target_modules": ["to_q", "proj_in", "conv1"], **alpha, **settings})


@pytest.mark.newest
@pytest.mark.parametrize(("name", "config"), PEFT, ids=[name for name, _ in PEFT])
def test_the_change_is_that_of_peft_with_its_settings(tmp_path: Path, name: str, config: Callable[[], Any]) -> None:
    model = by_peft(config())
    before = {key: tensor.clone() for key, tensor in model.get_base_model().state_dict().items() if "base_layer" in key}
    model.save_pretrained(tmp_path)
    assert "alpha" in json.loads((tmp_path / "adapter_config.json").read_text()) or name == "dora"
    path = tmp_path / "adapter_model.safetensors"
    merged = model.merge_and_unload().state_dict()
    with open_offset(path) as offset:
        assert not offset.unmatched
        assert len(offset.shapes) == 3
        for _, key, _ in PLACES.values():
            dotted = next(own for own in merged if own.startswith(DIFFUSERS[key]))
            weight = before[dotted.replace(".weight", ".base_layer.weight")]
            wanted = merged[dotted] - weight
            assert float(wanted.abs().mean()) > 1e-2
            (term,) = offset.terms_on(key, weight) if name == "dora" and offset.terms_on else offset.terms(key)
            own = getattr(term, "scale", 1.0) * term.values.double()  # type: ignore[union-attr]
            torch.testing.assert_close(own.reshape(wanted.shape), wanted, atol=DEVIATION, rtol=DEVIATION)


DIFFUSERS = {
    TO_Q_KEY: TO_Q_DOTTED, POINT_KEY: "down_blocks.0.attentions.0.proj_in", CONV_KEY: "down_blocks.0.resnets.0.conv1",
}  # fmt: skip


def test_settings_of_another_kind_of_adapter_are_refused(tmp_path: Path) -> None:
    tensors = named(f"base_model.model.{TO_Q_DOTTED}", loha_parts(*LINEAR))
    path = saved(tmp_path / "adapter_model.safetensors", tensors)
    configured(tmp_path, {"peft_type": "LOHA", "r": 3, "alpha": 6})
    twice = read(path, TO_Q_KEY)
    configured(tmp_path, {"peft_type": "LOHA", "r": 3, "alpha": 3})
    torch.testing.assert_close(twice, 2 * read(path, TO_Q_KEY))
    configured(tmp_path, {"peft_type": "LOKR", "r": 3, "alpha": 6})
    with pytest.raises(MismatchError, match="peft_type"):
        open_offset(path)
    configured(tmp_path, {"peft_type": "LOHA", "r": 4, "alpha": 6})
    with pytest.raises(MismatchError, match="has rank 3, but"):
        open_offset(path)
