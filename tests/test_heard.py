"""Function kept in a host: what is heard at its UNet, beside the measure of pictures/function.py and by hand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_dpo.errors import HostError, NotFoundError
from lib_dpo.families.model import open_model
from lib_dpo.hosts.base import Request, Silent
from lib_dpo.hosts.standalone import Standalone
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import open_pair
from lib_dpo.offsets.patch import open_patch
from lib_dpo.pictures.function import FunctionReport, function_kept
from lib_dpo.pictures.heard import function_in_host
from lib_dpo.settings import ExtractSettings, RankPolicy
from lib_dpo.toy.bundled import BASE, CLIP, FOLDER, REFERENCE
from lib_dpo.webui.comparing import Asked, compare
from lib_dpo.webui.session import Session

pytestmark = pytest.mark.newest
PROMPTS = ("two red circles on the left", "one blue cross at the top")
ROWS = tuple((prompt, seed) for prompt in PROMPTS for seed in (1, 2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heard")


@pytest.fixture(scope="module")
def host(models: Path) -> Standalone:
    """The toy as a checkpoint; a LoRA of rank 2 and an offset file of its pair, as the tab writes them."""
    for name in ("Stable-diffusion", "Lora", "DPO"):
        (models / name).mkdir()
    for file in (FOLDER / BASE, (FOLDER / BASE).with_suffix(".yaml")):
        shutil.copy(file, models / "Stable-diffusion")
    shutil.copytree((FOLDER / REFERENCE).parents[1], models / "DPO" / "reference")
    found = Standalone(models, FOLDER / CLIP, device="cpu")
    found.live.load(models / "Stable-diffusion" / Path(BASE).name)
    session, pair = Session(found), {"base": "", "reference": "reference"}
    settings = ExtractSettings(RankPolicy(rank=2), device="cpu")
    session.jobs.run("extract", lambda job: session.extract(job, name="rank2", settings=settings, **pair))
    session.jobs.run("offset", lambda job: session.write_offset(job, name="offset", **pair))
    return found


def measured(host: Standalone, models: Path, file: str, rows: Sequence[tuple[str, int]] = ROWS) -> FunctionReport:
    with closing(open_patch(models / file)) as patch, closing(open_patch(models / "DPO" / "offset.safetensors")) as whole:
        return function_in_host(host, patch, whole, Request("", width=64, height=64), rows, Silent())


def test_it_agrees_with_the_measure_without_a_host(host: Standalone, models: Path):
    """Other noisy images on the way: the pictures' noise is drawn otherwise, and timesteps lie elsewhere."""
    found = measured(host, models, "Lora/rank2.safetensors")
    file = models / "Lora" / "rank2.safetensors"
    asked: dict[str, Any] = {"prompts": PROMPTS, "seeds": (1, 2), "device": "cpu"}
    with open_model(FOLDER / BASE) as base, open_model(FOLDER / REFERENCE) as tuned, open_offset(file) as offset:
        other = function_kept(offset, open_pair(base, tuned), base, FOLDER / CLIP, **asked)
    assert found.kept == pytest.approx(other.kept, abs=0.05)
    assert found.change == pytest.approx(other.change, rel=0.35)
    assert (found.prompts, found.seeds) == (PROMPTS, (1, 2))
    assert found.interval is not None


def test_the_whole_offset_keeps_all(host: Standalone, models: Path):
    assert measured(host, models, "DPO/offset.safetensors").kept == 1


def test_all_three_predict_for_the_untouched_models_noisy_images(host: Standalone, models: Path, monkeypatch):
    """And the figure is what their predictions give by hand, in float64."""
    given: list[list[torch.Tensor]] = []
    predicted: list[list[torch.Tensor]] = []
    unet, generate = host.live.unet(), Standalone.generate
    forward = unet.forward

    def generated(self: Standalone, *asked: Any) -> Any:
        given.append([])
        predicted.append([])
        return generate(self, *asked)

    def heard(x: torch.Tensor, *others: Any, **named: Any) -> Any:
        found = forward(x, *others, **named)
        given[-1].append(x.clone())
        predicted[-1].append(found[0].double())
        return found

    monkeypatch.setattr(Standalone, "generate", generated)
    monkeypatch.setattr(unet, "forward", heard)
    report = measured(host, models, "Lora/rank2.safetensors", rows=ROWS[:1])
    base, file, whole = given
    assert len(base) == len(file) == len(whole) == report.timesteps
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(base, file, whole, strict=True))
    assert not torch.equal(base[0], base[1])
    untouched, with_file, with_whole = (torch.stack(each) for each in predicted)
    kept = 1 - (with_file - with_whole).square().sum() / (untouched - with_whole).square().sum()
    assert report.kept == pytest.approx(float(kept), abs=1e-9)
    assert report.interval is None  # of one prompt


def test_nothing_stays_at_the_unet(host: Standalone, models: Path, monkeypatch):
    unet = host.live.unet()
    measured(host, models, "Lora/rank2.safetensors")
    monkeypatch.setattr(Standalone, "generate", lambda *a: (_ for _ in ()).throw(HostError("no picture")))
    with pytest.raises(HostError, match="no picture"):
        measured(host, models, "Lora/rank2.safetensors")
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


def test_a_host_that_asks_another_module_is_refused(host: Standalone, models: Path, monkeypatch):
    monkeypatch.setattr(host.live, "unet", lambda: torch.nn.Identity())
    with pytest.raises(HostError, match="cannot be measured"):
        measured(host, models, "Lora/rank2.safetensors")


def test_a_comparison_finds_the_whole_offset_by_itself(host: Standalone, models: Path):
    session = Session(host)
    asked: dict[str, Any] = {"prompts": PROMPTS, "strengths": "1", "width": 64, "height": 64, "sampler": "DDIM"}
    asked["function"] = True
    found = session.jobs.run("compare", lambda job: compare(session, job, Asked(offset="rank2", **asked)))
    assert found.function is not None
    assert 0.2 < found.function.kept < 0.9
    assert found.whole == "offset"
    with pytest.raises(NotFoundError, match="or this file is one itself"):
        session.jobs.run("compare", lambda job: compare(session, job, Asked(offset="offset", **asked)))
