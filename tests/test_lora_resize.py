"""What a resized LoRA says of itself: ranks, alphas, the training's arguments, and what it keeps of the change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lib_dpo.cli.text import inspect_text, resize_text
from lib_dpo.errors import BadTensorError
from lib_dpo.families.model import open_model
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import open_pair
from lib_dpo.operations.extract import extract
from lib_dpo.operations.inspect import inspect
from lib_dpo.operations.resize import ResizeReport, resize
from lib_dpo.operations.verify import verify
from lib_dpo.settings import ExtractSettings, RankPolicy
from tests import tiny
from tests.lora_files import TO_Q, kohya, pair, saved

CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def resized(path: Path, output: Path, **policy: Any) -> tuple[ResizeReport, dict[str, str]]:
    with open_checkpoint(path) as checkpoint:
        report = resize(checkpoint, output, RankPolicy(**policy), precision="fp32")
    with open_checkpoint(output) as checkpoint:
        return report, dict(checkpoint.metadata)


def with_convolution(scale: float) -> dict[str, torch.Tensor]:
    up, down = pair(32, 32 * 9)
    tensors = kohya(CONV, up.reshape(32, 4, 1, 1), down.reshape(4, 32, 3, 3), 4 * scale / 2)
    return tensors | kohya(TO_Q, *pair(), 4 * scale)


def test_the_ranks_and_alphas_of_the_metadata_are_those_of_the_file(tmp_path: Path) -> None:
    trained = {"algo": "locon", "preset": "full", "dropout": "0.1", "conv_dim": "4", "conv_alpha": "8", "use_tucker": "True"}
    metadata = {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_network_args": json.dumps(trained)}
    path = saved(tmp_path / "l.safetensors", with_convolution(0.5), metadata)
    _, new = resized(path, tmp_path / "r.safetensors", rank=2, conv_rank=3)
    arguments = {"algo": "locon", "preset": "full", "dropout": "0.1", "conv_dim": "3", "conv_alpha": "0.75"}
    assert (new["ss_network_dim"], new["ss_network_alpha"]) == ("2", "0.75")  # one alpha for all: see readable_alphas
    assert json.loads(new["ss_network_args"]) == arguments
    with open_checkpoint(tmp_path / "r.safetensors") as checkpoint:
        assert float(checkpoint.read(f"{TO_Q}.alpha")) == float(new["ss_network_alpha"])
        assert float(checkpoint.read(f"{CONV}.alpha")) == float(arguments["conv_alpha"])
        assert checkpoint.infos[f"{CONV}.lora_down.weight"].shape[0] == int(arguments["conv_dim"])


def test_ranks_that_differ_are_called_dynamic_and_no_convolution_is_claimed(tmp_path: Path) -> None:
    other = TO_Q.replace("to_q", "to_k")
    tensors = kohya(TO_Q, *pair(rank=4), 4.0) | kohya(other, *pair(rank=2), 1.0)
    path = saved(tmp_path / "l.safetensors", tensors, {"ss_network_args": '{"conv_dim": 4, "dropout": 0.3}'})
    _, new = resized(path, tmp_path / "r.safetensors", rank=3)
    assert (new["ss_network_dim"], new["ss_network_alpha"]) == ("Dynamic", "1")
    assert json.loads(new["ss_network_args"]) == {"dropout": 0.3}


@pytest.mark.parametrize("precision", ["keep", "fp16"])
def test_scales_of_either_sign_and_none_keep_their_meaning(tmp_path: Path, precision: str) -> None:
    """Against float64 by hand; ranks and scales differ, so that one alpha stands for all."""
    kinds = {"to_q": (8, 4.0), "to_k": (4, -2.0), "to_v": (8, 0.0), "to_out_0": (6, 1e-9)}
    tensors: dict[str, torch.Tensor] = {}
    for name, (rank, alpha) in kinds.items():
        tensors |= kohya(TO_Q.replace("to_q", name), *pair(rank=rank), alpha)
    path = saved(tmp_path / "l.safetensors", tensors, {})
    with open_checkpoint(path) as lora:
        report = resize(lora, tmp_path / "r.safetensors", RankPolicy(energy=0.8), precision=precision)
    new = load_file(tmp_path / "r.safetensors")
    missed = total = 0.0
    for name, (rank, alpha) in kinds.items():
        module = TO_Q.replace("to_q", name)
        up, down = (tensors[f"{module}.lora_{part}.weight"].double() for part in ("up", "down"))
        before = up @ down * alpha / rank
        after = torch.zeros_like(before)
        if f"{module}.lora_up.weight" in new:
            up, down = (new[f"{module}.lora_{part}.weight"].double() for part in ("up", "down"))
            after = up @ down * float(new[f"{module}.alpha"]) / len(down)
        missed += float((before - after).square().sum())
        total += float(before.square().sum())
    assert report.energy_kept == pytest.approx(1 - missed / total, abs=1e-9)
    assert report.energy_kept >= 0.79


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "7"])
def test_arguments_that_cannot_be_read_are_left_out(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path / "l.safetensors", kohya(TO_Q, *pair(), 4.0), {"ss_network_args": text})
    assert json.loads(resized(path, tmp_path / "r.safetensors", rank=2)[1]["ss_network_args"]) == {}


@pytest.mark.parametrize("method", ["exact", "auto"])
def test_what_is_kept_of_the_change_is_the_product_of_both_shares(tmp_path: Path, method: Any) -> None:
    base = tiny.save(tmp_path / "base.safetensors", tiny.base())
    tuned = tiny.save(tmp_path / "tuned.safetensors", tiny.tuned())
    with open_model(base) as one, open_model(tuned) as other:
        both = open_pair(one, other)
        first = tmp_path / "l.safetensors"
        extract(both, first, ExtractSettings(RankPolicy(rank=8), method=method))
        path = first
        for rank in (6, 3):  # a resized file is resized again
            output = tmp_path / f"r{rank}.safetensors"
            report, metadata = resized(path, output, rank=rank)
            with open_offset(output) as offset:
                checked = verify(offset, both)
            measured = checked.tally.total.energy_kept
            assert report.energy_of_change == pytest.approx(measured, abs=1e-4)
            assert float(metadata["dpo.energy_kept"]) == report.energy_of_change == checked.claimed
            assert report.as_json()["energy_kept_of_change"] == report.energy_of_change
            share = f"{100 * measured:.1f}"[:-1]
            assert "of the change that the LoRA was made from" in resize_text(report)
            assert f"holds {share}" in inspect_text(inspect(output))
            path = output


def test_nothing_is_said_of_a_change_that_the_file_does_not_know(tmp_path: Path) -> None:
    report, metadata = resized(saved(tmp_path / "l.safetensors", kohya(TO_Q, *pair(), 4.0)), tmp_path / "r.safetensors", rank=2)
    assert report.energy_of_change is None
    assert "of the change" not in resize_text(report)
    assert "dpo.energy_kept" not in metadata


def test_differences_that_are_copied_count_in_what_is_kept(tmp_path: Path) -> None:
    up, down = pair()
    diff = torch.full((32,), 3.0)
    tensors = kohya(TO_Q, up, down, 4.0) | {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm": diff}
    report, _ = resized(saved(tmp_path / "l.safetensors", tensors), tmp_path / "r.safetensors", rank=2)
    S2 = torch.linalg.svdvals(up.double() @ down.double()).square()
    total = float(S2.sum() + diff.double().square().sum())
    assert report.energy_kept == pytest.approx(1 - float(S2[2:].sum()) / total, abs=1e-5)


def test_a_difference_with_nan_is_refused_by_name(tmp_path: Path) -> None:
    norm = "lora_unet_down_blocks_0_resnets_0_norm1.w_norm"
    path = saved(tmp_path / "l.safetensors", kohya(TO_Q, *pair(), 4.0) | {norm: torch.full((32,), float("nan"))})
    with open_checkpoint(path) as checkpoint, pytest.raises(BadTensorError, match=norm.replace(".", r"\.")):
        resize(checkpoint, tmp_path / "r.safetensors", RankPolicy(rank=2))
    assert not (tmp_path / "r.safetensors").exists()
