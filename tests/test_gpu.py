"""What only a GPU can show: `python -m pytest -m gpu`. Everywhere else these are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lib_dpo.families.model import open_model
from lib_dpo.families.synthetic import small_pair
from lib_dpo.files.hashes import file_sha256
from lib_dpo.offsets.offset import open_pair
from lib_dpo.operations.extract import ExtractReport, extract
from lib_dpo.settings import ExtractSettings, RankPolicy

pytestmark = pytest.mark.gpu
GPU = "cuda"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return small_pair(tmp_path_factory.mktemp("pair"), "sd1")


def run(files: tuple[Path, Path], output: Path, device: str, policy: RankPolicy, **settings: Any) -> ExtractReport:
    with open_model(files[0]) as first, open_model(files[1]) as second:
        return extract(open_pair(first, second), output, ExtractSettings(policy, device=device, **settings))


@pytest.mark.parametrize("method", ["randomized", "exact"])
@pytest.mark.parametrize("policy", [RankPolicy(rank=8), RankPolicy(energy=0.5), RankPolicy(size_mb=1.0)], ids=str)
def test_a_gpu_keeps_what_the_cpu_keeps(files: tuple[Path, Path], tmp_path: Path, policy: RankPolicy, method: str):
    on_cpu = run(files, tmp_path / "cpu.safetensors", "cpu", policy, method=method)
    on_gpu = run(files, tmp_path / "gpu.safetensors", GPU, policy, method=method)
    kept = [report.as_json()["energy_kept"] for report in (on_cpu, on_gpu)]
    assert kept[1] == pytest.approx(kept[0], abs=1e-4)
    assert on_gpu.fallbacks == {}
    ours, theirs = load_file(tmp_path / "gpu.safetensors"), load_file(tmp_path / "cpu.safetensors")
    assert {key: tensor.dtype for key, tensor in ours.items()} == {key: tensor.dtype for key, tensor in theirs.items()}


def test_the_same_seed_writes_the_same_file_on_the_same_gpu(files: tuple[Path, Path], tmp_path: Path):
    outputs = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for output in outputs:
        run(files, output, GPU, RankPolicy(rank=8))
    first, second = map(load_file, outputs)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.newest
def test_the_bundled_model_is_trained_there(tmp_path: Path):
    from lib_dpo.toy.bundled import BASE
    from tools.bundled.recipe import SMOKE
    from tools.train_bundled_model import make

    for name in ("first", "second"):  # the second goes on from the states of the first
        make(SMOKE, tmp_path / "work", tmp_path / name, bpe=None, say=lambda _: None, device=torch.device(GPU))
    assert file_sha256(tmp_path / "first" / BASE) == file_sha256(tmp_path / "second" / BASE)
