"""Function kept: of exact and empty files, beside a computation by hand, and that a size wins by it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from fakes_standalone import tokenizer

from lib_dpo.families.model import open_model
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import open_pair
from lib_dpo.operations.extract import extract
from lib_dpo.operations.write_offset import write_offset
from lib_dpo.pictures import function
from lib_dpo.pictures.function import FunctionReport, function_kept
from lib_dpo.settings import ExtractSettings, RankPolicy
from lib_dpo.toy.bundled import BASE, CLIP, FOLDER, REFERENCE, load
from lib_dpo.toy.generate import LATENTS, alphas_cumprod

pytestmark = pytest.mark.newest
PROMPTS = ("two red circles on the left", "one blue cross at the top", "three green squares", "one yellow triangle")


def kept(
    file: Path, *, prompts: tuple[str, ...] = PROMPTS, seeds: tuple[int, ...] = (1,), timesteps: int = 4
) -> FunctionReport:
    """Of the bundled pair's change."""
    with open_model(FOLDER / BASE) as base, open_model(FOLDER / REFERENCE) as tuned, open_offset(file) as offset:
        return function_kept(
            offset, open_pair(base, tuned), base, FOLDER / CLIP, prompts=prompts, seeds=seeds, timesteps=timesteps, device="cpu"
        )


def extracted(path: Path, **policy: float) -> Path:
    with open_model(FOLDER / BASE) as base, open_model(FOLDER / REFERENCE) as tuned:
        settings = ExtractSettings(RankPolicy(**policy), device="cpu")  # type: ignore[arg-type]
        return extract(open_pair(base, tuned), path, settings).path


@pytest.fixture(scope="module")
def rank2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(tmp_path_factory.mktemp("function") / "rank2.safetensors", rank=2)


def test_the_whole_change_is_all_of_the_function_and_zeros_are_none(tmp_path: Path, rank2: Path):
    with open_model(FOLDER / BASE) as base, open_model(FOLDER / REFERENCE) as tuned:
        write_offset(open_pair(base, tuned), tmp_path / "offset.safetensors")
    assert kept(tmp_path / "offset.safetensors", timesteps=2).kept == pytest.approx(1, abs=1e-6)
    with open_offset(rank2) as offset:
        zeros = {key: torch.zeros(info.shape) for key, info in offset.checkpoint.infos.items() if not key.endswith("alpha")}
    tiny.save(tmp_path / "zeros.safetensors", zeros)
    assert kept(tmp_path / "zeros.safetensors", timesteps=2).kept == 0


def test_it_is_what_a_computation_by_hand_gives(rank2: Path):
    networks = load()
    alphas = alphas_cumprod().tolist()
    told = networks.embed(PROMPTS[:2])
    first = torch.randn(LATENTS, generator=torch.Generator().manual_seed(7)).expand(2, *LATENTS)

    @torch.no_grad()
    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        found: torch.Tensor = networks.pipeline.unet(x, t, told).sample
        return found

    start, middle = predict(first, 999), round(999 / 2)
    clean = (first - math.sqrt(1 - alphas[999]) * start) / math.sqrt(alphas[999])
    second = math.sqrt(alphas[middle]) * clean + math.sqrt(1 - alphas[middle]) * start
    seen = ((first, 999), (second, middle))
    base = [predict(*each) for each in seen]
    with open_offset(rank2) as offset:
        networks.set_unet(offset)
    file = [predict(*each) for each in seen]
    with open_model(FOLDER / REFERENCE) as tuned, torch.no_grad():
        for key in tuned.keys("unet"):
            networks.live[key].copy_(tuned.read(key).reshape(networks.live[key].shape))
    whole = [predict(*each) for each in seen]
    missed, change = (sum(float((a - b).square().sum()) for a, b in zip(own, whole, strict=True)) for own in (file, base))
    report = kept(rank2, prompts=PROMPTS[:2], seeds=(7,), timesteps=2)
    assert report.kept == pytest.approx(1 - missed / change, abs=1e-4)
    assert report.interval is not None
    assert report.interval[0] <= report.kept <= report.interval[1]


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_a_size_keeps_more_function_than_one_rank_for_all_in_as_many_bytes(tmp_path: Path, rank: int):
    flat = extracted(tmp_path / "flat.safetensors", rank=rank)
    sized = extracted(tmp_path / "sized.safetensors", size_mb=flat.stat().st_size / 1e6)
    assert sized.stat().st_size <= flat.stat().st_size
    assert kept(sized).kept > kept(flat).kept + 0.02


@pytest.mark.parametrize("arch", ["sd2", "sdxl"])
def test_other_families_are_measured_alike(tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(function, "made_for", lambda model: 64)
    base = tiny.save(tmp_path / "base.safetensors", tiny.base(arch))
    tuned = tiny.save(tmp_path / "tuned.safetensors", tiny.tuned(arch, rms=1e-2))
    words = tokenizer(tmp_path / "tokenizer")
    with open_model(base) as first, open_model(tuned) as second:
        pair = open_pair(first, second)
        write_offset(pair, tmp_path / "offset.safetensors")
        with open_offset(tmp_path / "offset.safetensors") as offset:
            report = function_kept(offset, pair, first, words, prompts=["a b"], timesteps=2, device="cpu")
    assert report.kept == pytest.approx(1, abs=1e-5)
    assert report.interval is None
    assert report.change > 0


def test_a_step_of_v_is_one_of_noise():
    x, noise = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    a = 0.3
    clean = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
    v = math.sqrt(a) * noise - math.sqrt(1 - a) * clean
    torch.testing.assert_close(function._ddim(x, v, a, 0.6, True), function._ddim(x, noise, a, 0.6, False))


PAIR = ("--base", FOLDER / BASE, "--tuned", FOLDER / REFERENCE)


def test_the_command_gives_both_figures(tmp_path: Path, rank2: Path, capsys: pytest.CaptureFixture[str]):
    options = ("--function", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--timesteps", 2, "--device", "cpu")
    assert tiny.run("verify", "--lora", rank2, *PAIR, *options, "--json", tmp_path / "f.json") == 0
    figures = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert 0 < figures["function_kept"] < 1
    assert figures["prompts"] == list(PROMPTS[:2])
    assert (figures["seeds"], figures["timesteps"]) == ([0], 2)
    assert figures["energy_kept"] > 0
    assert "function kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", FOLDER / BASE), "say --function too"),
        (("--seeds", "3"), "--seeds: for measuring the function; say --function too"),
        (("--timesteps", 4, "--prompt", "a"), "--prompt and --timesteps: for"),
        (("--function", "--seeds", "one"), "is neither a number nor a range"),
        (("--function", "--model", FOLDER / REFERENCE), "expected a whole checkpoint"),
        (("--function", "--timesteps", 0), "timesteps"),
    ],
)
def test_bad_input_is_refused_in_one_line(rank2: Path, capsys: pytest.CaptureFixture[str], options, message: str):
    assert tiny.run("verify", "--lora", rank2, *PAIR, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_of_another_family_is_refused(tmp_path: Path, rank2: Path, capsys: pytest.CaptureFixture[str]):
    other = tiny.save(tmp_path / "other.safetensors", tiny.base("sdxl"))
    assert tiny.run("verify", "--lora", rank2, *PAIR, "--function", "--model", other) == 2
    assert "expected one architecture" in capsys.readouterr().err


def test_one_prompt_alone_is_measured_as_among_others(rank2: Path):
    one, other, both = (kept(rank2, prompts=prompts, timesteps=2) for prompts in (PROMPTS[:1], PROMPTS[1:2], PROMPTS[:2]))
    assert one.interval is None
    assert min(one.kept, other.kept) <= both.kept <= max(one.kept, other.kept)
