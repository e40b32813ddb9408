"""Extraction of a change that has fewer components than are asked for, against a float64 SVD by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_dpo.cli.text import extract_text, resize_text
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET, lora_modules
from lib_dpo.families.model import open_model
from lib_dpo.families.synthetic import small_pair
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.maths.lowrank import factorise, singular_values
from lib_dpo.offsets.layers import plan_layers
from lib_dpo.offsets.offset import open_pair
from lib_dpo.operations.decompose import Decomposer
from lib_dpo.operations.extract import ExtractReport, extract
from lib_dpo.operations.resize import resize
from lib_dpo.settings import ExtractSettings, RankPolicy

RANK = 4
Files = tuple[Path, Path]


def low_rank(out: int, in_: int, rank: int = RANK, seed: int = 0, size: float = 1e-4) -> Tensor:
    """A float32 matrix (out, in) of that rank and rms."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    product = up @ torch.randn(rank, in_, generator=generator, dtype=torch.float64)
    return (product * size / product.square().mean().sqrt()).float()


@pytest.fixture(scope="module", params=["fp32", "underflow"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Two whole checkpoints in float32 that differ by rank 4 in every matrix and convolution of the UNet but conv_out.

    `underflow`: in the first rows and columns alone, the rest is equal, as of a LoRA whose factors are mostly 0; the
    biases and norms are equal in both.
    """
    folder = tmp_path_factory.mktemp(str(request.param))
    base, _ = small_pair(folder / "made", "sd1")
    tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in load_file(base).items()}
    save_file(tensors, folder / "base.safetensors")
    for number, (key, tensor) in enumerate(tensors.items()):
        if key.startswith(UNET) and tensor.ndim > 1 and tensor.shape[0] > RANK:
            delta = low_rank(tensor.shape[0], tensor[0].numel(), seed=number)
            if request.param == "underflow":
                delta[6:] = 0
                delta[:, 6:] = 0
            tensors[key] = tensor + delta.reshape(tensor.shape)
    save_file(tensors, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def run(files: Files, output: Path, *, method: Any = "auto", precision: Any = "fp16", **policy: Any) -> ExtractReport:
    with open_model(files[0]) as base, open_model(files[1]) as tuned:
        settings = ExtractSettings(RankPolicy(**policy), device="cpu", method=method, precision=precision)
        return extract(open_pair(base, tuned), output, settings)


def check(files: Files, lora: Path, precision: str = "fp16") -> None:
    """Every layer that changed is in the file with four components, which are the change as its own SVD in float64 has it."""
    base, tuned, found = load_file(files[0]), load_file(files[1]), load_file(lora)
    keys = [key for key in base if not torch.equal(base[key], tuned[key])]
    modules = [each for key in keys for each in lora_modules(ARCHITECTURES["sd1"], key)]
    assert len(modules) == len(found) // 3 == 281
    for module in modules:
        delta = (tuned[module.key].double() - base[module.key].double()).flatten(1)
        up, down = (found[f"{module.name}.lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
        assert up.shape[1] == down.shape[0] == RANK, module.name
        up = up * (float(found[f"{module.name}.alpha"]) / RANK)
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        best = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
        error = float((up @ down - best).norm() / best.norm())
        assert error < {"fp16": 2e-3, "fp32": 2e-5}[precision], module.name


@pytest.mark.parametrize(
    ("policy", "method"),
    [
        ({"rank": 64}, "exact"),
        ({"rank": 128}, "randomized"),
        ({"rank": 16, "conv_rank": 8}, "randomized"),
        ({"size_mb": 20}, "auto"),
        ({"energy": 1.0}, "auto"),
    ],
)
def test_a_change_of_rank_4_becomes_a_lora_of_rank_4(files: Files, tmp_path: Path, policy: dict[str, Any], method: str) -> None:
    report = run(files, tmp_path / "l.safetensors", method=method, **policy)
    check(files, tmp_path / "l.safetensors")
    assert report.tally.total.energy_kept == pytest.approx(1, abs=1e-5)
    assert set(report.ranks.values()) <= {0, RANK}
    figures = report.as_json()
    assert figures["ranks"] == {"min": RANK, "max": RANK}
    with safe_open(str(tmp_path / "l.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    dim = str(RANK) if "rank" in policy else "Dynamic"
    found = load_file(tmp_path / "l.safetensors")
    alphas = [
        f"{float(found[f'lora_unet_{name}.alpha']):g}"
        for name in ("mid_block_attentions_0_proj_in", "mid_block_resnets_0_conv1")
    ]
    assert metadata["ss_network_dim"] == dim
    assert metadata["ss_network_alpha"] == alphas[0]
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": dim, "conv_alpha": alphas[1]}
    assert f"{figures['exhausted_layers']} of {report.layers} layers hold fewer components than asked for" in extract_text(
        report
    )
    assert "a lower rank than asked for" not in extract_text(report) or report.capped
    assert report.file_bytes == (tmp_path / "l.safetensors").stat().st_size


def test_in_float32_the_file_is_the_change_itself(files: Files, tmp_path: Path) -> None:
    run(files, tmp_path / "l.safetensors", precision="fp32", rank=64)
    check(files, tmp_path / "l.safetensors", "fp32")


def test_in_batches_too(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_dpo.operations.forms.batch_size", lambda device, numel: 4)
    run(files, tmp_path / "l.safetensors", rank=64)
    check(files, tmp_path / "l.safetensors")


def test_what_rounding_of_the_files_left_is_part_of_their_change(tmp_path: Path) -> None:
    """Half-precision files differ by the noise of their rounding as well: energy kept counts it, so it is not dropped."""
    base, tuned = torch.randn(96, 80, generator=torch.Generator().manual_seed(1)) * 0.03, low_rank(96, 80)
    delta = (base.half().float() + tuned).half().float() - base.half().float()
    _, _, values = factorise(delta, 32, method="exact")
    torch.testing.assert_close(values.double(), torch.linalg.svdvals(delta.double())[:32], rtol=1e-3, atol=0)
    assert bool((values > 0).all())


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(320, 320), (1280, 320), (320, 1280), (640, 2880), (320, 36)])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1.0])
def test_components_that_carry_nothing_are_zeros(shape: tuple[int, int], method: Any, size: float) -> None:
    A = low_rank(*shape, size=size)
    up, down, values = factorise(A, 36, method=method)
    assert torch.count_nonzero(values) == RANK
    assert not up[:, RANK:].any()
    assert not down[RANK:].any()
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    torch.testing.assert_close(values[:RANK].double(), S[:RANK], rtol=1e-4, atol=0)
    error = up.double() @ down.double() - (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
    assert float(error.norm() / S.norm()) < 1e-5
    spectrum = singular_values(A)
    torch.testing.assert_close(spectrum[:RANK], S[:RANK], rtol=1e-4, atol=0)
    assert not spectrum[RANK:].any()


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_in_a_batch_each_matrix_has_its_own_components(method: Any) -> None:
    matrices = [low_rank(320, 640, rank, seed=rank) for rank in (1, 4, 30)]
    matrices += [torch.zeros(320, 640), low_rank(320, 640, 4, size=1e-20)]
    up, down, values = factorise(torch.stack(matrices), 24, method=method, seeds=range(5))
    assert [int(torch.count_nonzero(row)) for row in values] == [1, 4, 24, 0, 4]
    assert bool(torch.isfinite(up).all() and torch.isfinite(down).all())
    assert not up[3].any()
    assert not down[3].any()
    for i in (0, 1):
        torch.testing.assert_close(up[i] @ down[i], matrices[i], atol=1e-9, rtol=1e-4)
    torch.testing.assert_close(up[4] @ down[4], matrices[4], atol=1e-25, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-14, 1e-9, 1e12, 1e25])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_change_whose_squares_leave_float32_comes_back_too(size: float, method: Any) -> None:
    A = low_rank(320, 640, size=size)
    up, down, values = factorise(A, 16, method=method)
    assert torch.count_nonzero(values) == RANK
    error = up.double() @ down.double() - A.double()
    assert float(error.norm() / A.double().norm()) < 1e-5


def test_resizing_drops_components_that_carry_nothing(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(320, 32, generator=generator), torch.randn(32, 320, generator=generator)
    up[:, RANK:] = up[:, :1]  # of 32 columns four are their own
    save_file(
        {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(8.0)},
        tmp_path / "l.safetensors",
    )
    for number, policy in enumerate(({"rank": 16}, {"size_mb": 1}, {"energy": 1.0})):
        output = tmp_path / f"{number}.safetensors"
        with open_checkpoint(tmp_path / "l.safetensors") as lora:
            report = resize(lora, output, RankPolicy(**policy))
        found = load_file(output)
        assert found[f"{name}.lora_down.weight"].shape == (RANK, 320)
        assert float(found[f"{name}.alpha"]) == 8 / 32 * RANK  # the scale stays
        torch.testing.assert_close(found[f"{name}.lora_up.weight"] @ found[f"{name}.lora_down.weight"], up @ down)
        assert report.ranks_after == (RANK, RANK)
        with safe_open(str(output), framework="pt") as file:
            assert file.metadata()["ss_network_dim"] == str(RANK)
        told = "1 of 1 layers hold fewer components than asked for: the LoRA has no more" in resize_text(report)
        assert told == ("rank" in policy)


def test_the_spectrum_of_a_pair_ends_where_the_change_does(files: Files) -> None:
    with open_model(files[0]) as base, open_model(files[1]) as tuned:
        pair = open_pair(base, tuned)
        decomposer = Decomposer(pair, torch.device("cpu"), method="auto", seed=0)
        for layer in plan_layers(pair, "portable", ("unet",)):
            delta, row = decomposer.load(layer)
            found = torch.count_nonzero(decomposer.singular_values(delta, layer.module.name))
            assert found == (RANK if row.offset else 0), layer.module.name
