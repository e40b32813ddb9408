"""The made-up pairs have the structure of the real files and the offsets that they promise."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_dpo.errors import OutputError
from lib_dpo.families.shapes import (
    REAL_SIZES,
    checkpoint_dtype,
    checkpoint_shapes,
    small,
    unet_diffusers_shapes,
    unet_name_pairs,
)
from lib_dpo.families.synthetic import base_tensor, make_pair, offset_tensor, small_pair
from lib_dpo.files.header import read_header

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
NORM = "model.diffusion_model.out.0.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return small_pair(tmp_path_factory.mktemp("pair"))


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().pow(2).mean().sqrt())


@pytest.mark.parametrize("arch", sorted(REAL_SIZES))
def test_files_have_the_published_keys_dtypes_and_shapes(tmp_path: Path, arch: str):
    base, tuned = small_pair(tmp_path, arch)
    found = {key: (info.dtype, info.shape) for key, info in read_header(base).infos.items()}
    shapes = checkpoint_shapes(arch, small(arch))
    assert found == {key: (checkpoint_dtype(key), shape) for key, shape in shapes.items()}
    found = {key: (info.dtype, info.shape) for key, info in read_header(tuned).infos.items()}
    assert found == {key: ("F32", shape) for key, shape in unet_diffusers_shapes(arch, small(arch)).items()}
    assert sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()) == [
        "base.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def test_base_is_rounded_once_from_the_weights_that_were_tuned(pair: tuple[Path, Path]):
    base, tuned = map(load_file, pair)
    for key, name in unet_name_pairs("sd1").items():
        shape = tuple(base[key].shape)
        weight = base_tensor(key, shape)
        assert torch.equal(base[key], weight.half())
        assert torch.equal(tuned[name], weight + offset_tensor(key, shape))


def test_every_tensor_of_the_unet_has_an_offset_of_the_given_size(tmp_path: Path):
    base, tuned = map(load_file, small_pair(tmp_path, offset_rms=1e-3))
    for key, name in unet_name_pairs("sd1").items():
        # 1 % is beyond float32 rounding, and beyond the rounding of the base except for norms: half an ulp of 1 is 5e-4
        tolerance = 0.15 if base[key].ndim == 1 and key.endswith(".weight") else 0.01
        assert rms(tuned[name] - base[key].float()) == pytest.approx(1e-3, rel=tolerance), key
        assert rms(offset_tensor(key, tuple(base[key].shape), rms=1e-3)) == pytest.approx(1e-3, rel=1e-5), key


def test_weights_look_like_weights(pair: tuple[Path, Path]):
    base = load_file(pair[0])
    assert all(torch.isfinite(tensor).all() for tensor in base.values())
    assert rms(base[CONV]) == pytest.approx(0.03, rel=0.05)
    assert float(base[NORM].float().mean()) == pytest.approx(1, abs=0.05)
    text = "cond_stage_model.transformer.text_model."
    assert base[text + "embeddings.position_ids"].tolist() == [list(range(77))]
    assert float(base[text + "final_layer_norm.weight"].float().mean()) == pytest.approx(1, abs=0.05)
    assert rms(base["first_stage_model.decoder.conv_in.weight"]) == pytest.approx(0.03, rel=0.2)
    # the ends of SD's schedule, as in its papers and every sampler: sigma from 0.029 to 14.6
    squares = base["alphas_cumprod"].double()
    assert ((1 - squares) / squares).sqrt()[[0, -1]].tolist() == pytest.approx([0.0292, 14.6146], rel=1e-2)


def test_same_seed_same_bytes(pair: tuple[Path, Path], tmp_path: Path):
    again, other = small_pair(tmp_path / "again"), small_pair(tmp_path / "other", seed=1)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in pair]
    tensors, others = load_file(pair[0]), load_file(other[0])
    assert not torch.equal(tensors[CONV], others[CONV])


def test_tensors_of_one_shape_differ(pair: tuple[Path, Path]):
    base, tuned = map(load_file, pair)
    names = unet_name_pairs("sd1")
    second = CONV.replace(".1.0.", ".2.0.")
    assert base[CONV].shape == base[second].shape
    first_offset, second_offset = (tuned[names[key]] - base[key].float() for key in (CONV, second))
    alike = torch.nn.functional.cosine_similarity(first_offset.flatten(), second_offset.flatten(), dim=0)
    assert abs(float(alike)) < 6 / math.sqrt(first_offset.numel())  # six standard deviations of chance


@pytest.mark.parametrize("shape", [(64, 640, 3, 3), (5760, 64)])
@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.7])
def test_spectrum_falls_by_the_exponent(shape: tuple[int, ...], exponent: float):
    """In long matrices, where the Gaussian factor is level within 10 %: a straight line in the log-log plot."""
    S = torch.linalg.svdvals(offset_tensor(CONV, shape, exponent=exponent).flatten(1).double())
    x = torch.arange(1, len(S) + 1).double().log()
    slope = ((x - x.mean()) * S.log()).sum() / (x - x.mean()).pow(2).sum()
    assert float(slope) == pytest.approx(-exponent, abs=0.06)


def test_no_low_rank_fits_the_offset_of_a_real_layer():
    energy = torch.linalg.svdvals(offset_tensor(CONV, (320, 320, 3, 3)).flatten(1)).double().pow(2)
    assert 0.3 < float(energy[:32].sum() / energy.sum()) < 0.5  # 0.1 when quite flat; i^-0.6 alone gives 0.37
    assert energy[-1] > 0.01 * energy[0]


def test_threads_are_left_as_they_were(tmp_path: Path):
    before = torch.get_num_threads()
    small_pair(tmp_path)
    assert torch.get_num_threads() == before


def test_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 3 * 10**9, 3 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"the two files need 5\.6 GB, 3\.0 GB are free"):
        make_pair("sd1", tmp_path / "missing" / "pair")
    assert list(tmp_path.iterdir()) == []


def test_existing_pair_is_kept_unless_overwriting(tmp_path: Path):
    base, _ = small_pair(tmp_path)
    before = base.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        small_pair(tmp_path, seed=1)
    assert base.read_bytes() == before
    small_pair(tmp_path, seed=1, overwrite=True)
    assert base.read_bytes() != before


def test_progress_counts_all_parameters(tmp_path: Path):
    seen: list[tuple[int, int, str]] = []
    make_pair("sd1", tmp_path, sizes=small("sd1"), on_progress=lambda *step: seen.append(step))
    total = sum(map(math.prod, checkpoint_shapes("sd1", small("sd1")).values()))
    assert len(seen) == 1135
    assert seen[-1][:2] == (total, total)


@pytest.mark.newest
def test_diffusers_loads_the_tuned_folder(pair: tuple[Path, Path]):
    from diffusers import UNet2DConditionModel

    folder = pair[1].parent
    model = UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False)
    tuned = load_file(pair[1])
    assert all(torch.equal(tensor, tuned[key]) for key, tensor in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["cross_attention_dim"] == 48
