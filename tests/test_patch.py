"""A patch: block weights, ranks and rows of a LoRA or an offset file, against the offset it was opened from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from lib_dpo.errors import BadTensorError, SettingError
from lib_dpo.families.blocks import parse_blocks
from lib_dpo.families.keymap import UNET
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.patch import Patch, Row, open_patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, its LoRA (with norms) and its dense offset file."""
    folder = tmp_path_factory.mktemp("patch")
    base = tiny.save(folder / "base.safetensors", tiny.base())
    tuned = tiny.save(folder / "tuned.safetensors", tiny.tuned(rms=1e-3))
    pair = ("--base", base, "--tuned", tuned)
    assert tiny.run("extract", *pair, "-o", folder / "lora.safetensors", "--rank", 8, "--profile", "webui") == 0
    assert tiny.run("offset", *pair, "-o", folder / "dense.safetensors") == 0
    return folder


def delta_of(rows: list[Row], key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight's change as a host would add it up from rows, in float64."""
    total = torch.zeros(shape, dtype=torch.float64)
    for row in rows:
        if row.key == key and row.up is not None and row.down is not None:
            total += row.scale * (row.up.double() @ row.down.double().flatten(1)).reshape(shape)
        elif row.key == key and row.diff is not None:
            total += row.diff.double().reshape(shape)
        elif row.key[: -len("weight")] + "bias" == key and row.bias is not None:
            total += row.bias.double()
    return total


def check_rows_match(patch: Patch) -> None:
    rows = list(patch.rows())
    biases = {row.key[: -len("weight")] + "bias" for row in rows if row.bias is not None}
    assert {row.key for row in rows if row.up is not None or row.diff is not None} | biases == set(patch.changed_keys())
    for key in patch.changed_keys():
        expected = delta_of(rows, key, patch.offset.shapes[key])
        torch.testing.assert_close(patch.delta(key).double(), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dense"])
@pytest.mark.parametrize("blocks", ["", "IN=0.5,MID=0,OUT=-1"])
def test_rows_add_up_to_the_deltas(folder: Path, name: str, blocks: str):
    patch = open_patch(folder / f"{name}.safetensors", blocks=parse_blocks(blocks))
    check_rows_match(patch)
    with open_offset(folder / f"{name}.safetensors") as offset:
        for key in patch.changed_keys():
            torch.testing.assert_close(patch.delta(key), offset.read(key) * patch.weight(key))
        if blocks:
            assert not any("middle_block" in key for key in patch.changed_keys())
            assert any("middle_block" in key for key in offset.shapes)


def test_a_lower_rank_keeps_the_strongest_components(folder: Path):
    whole, cut = open_patch(folder / "lora.safetensors"), open_patch(folder / "lora.safetensors", rank=3)
    check_rows_match(cut)
    key = next(row.key for row in whole.rows() if row.up is not None and row.up.shape[1] == 8)
    U, S, Vh = torch.linalg.svd(whole.delta(key).flatten(1).double())
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    torch.testing.assert_close(cut.delta(key).flatten(1).double(), best, atol=3e-3 * float(S[0]), rtol=0)


def test_a_lower_rank_of_a_foreign_lora_is_its_best_approximation(folder: Path, tmp_path: Path):
    generator = torch.Generator().manual_seed(3)
    up, down = (torch.randn(shape, generator=generator) for shape in ((32, 6), (6, 32)))
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(3.0)}
    file = tiny.save(tmp_path / "foreign.safetensors", tensors)
    patch = open_patch(file, rank=2)
    (row,) = patch.rows()
    assert row.up is not None
    assert row.down is not None
    assert row.up.shape == (32, 2)
    U, S, Vh = torch.linalg.svd((up @ down).double() * 0.5)
    torch.testing.assert_close(row.scale * (row.up @ row.down).double(), (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-4, rtol=1e-4)


def test_the_id_tells_content_blocks_and_rank_apart(folder: Path, tmp_path: Path):
    file = Path(shutil.copy(folder / "lora.safetensors", tmp_path))
    ids = [
        open_patch(file).id,
        open_patch(file, rank=4).id,
        open_patch(file, blocks=parse_blocks("MID=0")).id,
        open_patch(folder / "dense.safetensors").id,
    ]
    assert open_patch(file).id == ids[0]
    os.utime(file, ns=(0, 0))  # written again, at another time
    ids.append(open_patch(file).id)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"rank": 0}, "rank 0 is outside 1 to 8"),
        ("lora", {"rank": 9}, "rank 9 is outside 1 to 8"),
        ("dense", {"rank": 4}, "dense offset file, which has no rank"),
        ("lora", {"blocks": "IN14=1"}, "has no block IN14"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder: Path, name: str, options: dict[str, object], message: str):
    if "blocks" in options:
        options = {"blocks": parse_blocks(str(options["blocks"]))}
    with pytest.raises(SettingError, match=message):
        open_patch(folder / f"{name}.safetensors", **options)  # type: ignore[arg-type]


def test_nan_is_named_by_key(folder: Path, tmp_path: Path):
    name = "lora_unet_mid_block_attentions_0_norm"
    tensors = {f"{name}.w_norm": torch.full((32,), float("nan")), f"{name}.b_norm": torch.zeros(32)}
    patch = open_patch(tiny.save(tmp_path / "nan.safetensors", tensors))
    with pytest.raises(BadTensorError, match=r"mid_block_attentions_0_norm.w_norm holds NaN"):
        list(patch.rows())
    with pytest.raises(BadTensorError, match="NaN"):
        patch.delta(f"{UNET}middle_block.1.norm.weight")
