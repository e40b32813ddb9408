"""The command line from end to end: every command, in every mix of layouts, its figures, its exit codes and its manners."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lib_dpo.errors import BadFileError, Cancelled
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import open_model
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.progress import Steps

ROOT = Path(__file__).parents[1]
READS_PICKLES = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 6)
Layouts = dict[str, Path]


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def layouts_of(arch: str, folder: Path) -> Layouts:
    """The same pair in every layout: base.* hold numbers that float16 holds too, tuned.* any float32."""
    base, tuned = tiny.base(arch), tiny.tuned(arch)
    return {
        "base.ldm16": tiny.save(folder / "base.safetensors", base, torch.float16),
        "base.ldm": tiny.save(folder / "base32.safetensors", base),
        "base.unet": tiny.save(folder / "base_unet.safetensors", tiny.in_diffusers(arch, base)),
        "base.folder": tiny.save_folder(folder / "base", arch, base),
        "base.sharded": tiny.save_folder(folder / "base_sharded", arch, base, torch.float16, shards=3),
        "tuned.ldm": tiny.save(folder / "tuned.safetensors", tuned),
        "tuned.unet": tiny.save(folder / "tuned_unet.safetensors", tiny.in_diffusers(arch, tuned)),
        "tuned.folder": tiny.save_folder(folder / "tuned", arch, tuned),
        "tuned.sharded": tiny.save_folder(folder / "tuned_sharded", arch, tuned, shards=2),
    }


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    return layouts_of("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    return layouts_of("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(params=["sd1", "sdxl"])
def any_arch(request: pytest.FixtureRequest) -> tuple[str, Layouts]:
    return request.param, request.getfixturevalue(request.param)


def pair(files: Layouts, base: str = "ldm16", tuned: str = "unet") -> tuple[str, Path, str, Path]:
    return "--base", files[f"base.{base}"], "--tuned", files[f"tuned.{tuned}"]


# ---- every command ----


def test_the_whole_chain(any_arch: tuple[str, Layouts], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arch, files = any_arch
    lora, smaller, offset = (tmp_path / f"{name}.safetensors" for name in ("lora", "smaller", "offset"))
    report = tmp_path / "report.json"

    diff = tiny.figures(report, "diff", *pair(files))
    assert (diff["command"], diff["architecture"], diff["verdict"]["level"]) == ("diff", arch, "fits")
    assert diff["components"].keys() == {"unet"}
    assert diff["rms"] == pytest.approx(1e-4, rel=0.05)
    assert diff["changed_text_encoders"] == []

    extracted = tiny.figures(report, "extract", *pair(files), "-o", lora, "--rank", 4)
    assert (extracted["output"], extracted["components"], extracted["architecture"]) == (str(lora), ["unet"], arch)
    assert extracted["file_bytes"] == lora.stat().st_size
    assert extracted["ranks"] == {"min": 3, "max": 4}  # the last convolution has 4 rows: 4 components outgrow it
    assert extracted["capped_layers"] == 1
    assert 0.2 < extracted["energy_kept"] < 0.6
    assert extracted["energy_kept_by_component"] == {"unet": extracted["energy_kept"]}
    assert {"TIME", "IN00", "MID", "OUT00", "OUT"} <= extracted["energy_kept_by_block"].keys()
    assert extracted["verdict"]["level"] == "fits"
    assert 0 < extracted["noise_floor"] < 0.1
    assert sum(extracted["methods"].values()) == extracted["layers"]
    capsys.readouterr()

    verified = tiny.figures(report, "verify", "--lora", lora, *pair(files))
    assert verified["energy_kept"] == pytest.approx(extracted["energy_kept"], abs=1e-6)
    assert verified["energy_kept_claimed"] == extracted["energy_kept"]
    assert verified["unmatched"] == []
    assert "agrees" in capsys.readouterr().out

    resized = tiny.figures(report, "resize", "--lora", lora, "-o", smaller, "--rank", 2)
    assert resized["ranks_after"] == {"min": 2, "max": 2}
    assert resized["inputs"] == {"lora": str(lora)}
    told = tiny.figures(report, "inspect", smaller)["metadata"]
    assert told["modelspec.title"] == smaller.stem
    assert told["dpo.resized"] == f"rank 2, from {lora.stem}, {resized['energy_kept_of_lora']:.6f} of its energy"
    assert 0.4 < resized["energy_kept_of_lora"] < 1
    assert tiny.figures(report, "verify", "--lora", smaller, *pair(files))["energy_kept"] < verified["energy_kept"]

    written = tiny.figures(report, "offset", *pair(files), "-o", offset)
    assert written["tensors"] == len(tiny.only_unet(tiny.base(arch)))
    assert written["energy_kept"] == pytest.approx(1, abs=1e-9)
    assert tiny.figures(report, "verify", "--lora", offset, *pair(files))["energy_kept"] == pytest.approx(1, abs=1e-9)

    kinds = {lora: "lora", smaller: "lora", offset: "offset", files["base.ldm16"]: "checkpoint", files["tuned.unet"]: "unet"}
    for file, kind in kinds.items():
        found = tiny.figures(report, "inspect", file)
        assert (found["kind"], found["architecture"], len(found["sha256"])) == (kind, arch, 64)

    for name in (lora, offset):
        baked = tmp_path / f"baked_{name.name}"
        done = tiny.figures(report, "bake", "--target", files["base.ldm"], "--offset", name, "-o", baked)
        assert done["strength"] == 1
        assert done["tensors_changed"] + done["tensors_kept"] == len(tiny.base(arch))
        inside = tiny.figures(report, "compat", "--target", baked, *pair(files))
        assert inside["verdict"]["level"] == "contained"
        assert inside["strength_inside"] == pytest.approx(1 if name is offset else verified["energy_kept"], abs=0.05)
        assert f"times the whole change ({name.stem} × 1, as its metadata says)" in inside["verdict"]["text"]
        assert ("the part which the LoRA keeps; for all of it bake an offset file" in inside["verdict"]["text"]) == (
            name is lora
        )
    assert tiny.figures(report, "compat", "--target", files["base.ldm16"], *pair(files))["verdict"]["level"] == "base"


def test_baking_the_offset_of_a_pair_restores_the_tuned_weights(sd1: Layouts, tmp_path: Path):
    offset, baked = tmp_path / "offset.safetensors", tmp_path / "baked.safetensors"
    tuned = tiny.save(tmp_path / "tuned.safetensors", tiny.tuned("sd1"), torch.float16)
    assert tiny.run("offset", *pair(sd1)[:2], "--tuned", tuned, "-o", offset) == 0
    assert tiny.run("bake", "--target", sd1["base.ldm16"], "--offset", offset, "-o", baked) == 0
    restored = load_file(baked)
    assert all(torch.equal(tensor, restored[key]) for key, tensor in load_file(tuned).items())


def test_baking_in_float32_restores_them_to_the_rounding_of_the_offset(sd1: Layouts, tmp_path: Path):
    offset, baked = tmp_path / "offset.safetensors", tmp_path / "baked.safetensors"
    assert tiny.run("offset", *pair(sd1), "-o", offset) == 0
    assert tiny.run("bake", "--target", sd1["base.ldm"], "--offset", offset, "-o", baked) == 0
    restored, before, after = load_file(baked), tiny.base("sd1"), tiny.tuned("sd1")
    equal = total = 0
    for key in tiny.only_unet(after):
        # where a tuned weight is smaller than its offset, the float32 offset itself is what is rounded
        allowed = (after[key] - before[key]).abs() * 2**-24
        assert bool(((restored[key] - after[key]).abs() <= allowed).all()), key
        equal += int((restored[key] == after[key]).sum())
        total += after[key].numel()
    assert equal / total > 0.999


def test_energy_and_size_are_what_was_asked_for(sd1: Layouts, tmp_path: Path):
    lora, report = tmp_path / "lora.safetensors", tmp_path / "report.json"
    kept = tiny.figures(report, "extract", *pair(sd1), "-o", lora, "--energy", 0.5)
    assert kept["energy_wanted"] == 0.5
    assert kept["energy_kept"] == pytest.approx(0.5, abs=2e-3)
    sized = tiny.figures(report, "extract", *pair(sd1), "-o", lora, "--size-mb", 0.4, "--overwrite")
    assert 200_000 < lora.stat().st_size <= 400_000
    assert sized["rank_policy"] == "size 0.4 MB"
    smaller = tmp_path / "smaller.safetensors"
    resized = tiny.figures(report, "resize", "--lora", lora, "-o", smaller, "--size-mb", 0.3)
    assert smaller.stat().st_size <= 300_000
    assert resized["energy_kept_of_lora"] < 1


@pytest.mark.parametrize(
    "arguments", [["--profile", "webui"], ["--profile", "full"], ["--precision", "fp32", "--conv-rank", "2"]]
)
def test_other_profiles_and_precisions_verify_as_extracted(sd1: Layouts, tmp_path: Path, arguments: list[str]):
    lora, report = tmp_path / "lora.safetensors", tmp_path / "report.json"
    kept = tiny.figures(report, "extract", *pair(sd1), "-o", lora, "--rank", 4, *arguments)["energy_kept"]
    assert tiny.figures(report, "verify", "--lora", lora, *pair(sd1))["energy_kept"] == pytest.approx(kept, abs=1e-6)


def test_diff_draws_a_picture(sd1: Layouts, tmp_path: Path):
    picture = tmp_path / "plots" / "pair.png"
    report = tiny.figures(tmp_path / "report.json", "diff", *pair(sd1), "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    energies = report["spectra"]["rank"]["energy"]
    assert energies == sorted(energies)
    assert 0.9 < energies[-1] <= 1  # biases and norms are no part of it
    assert [path.name for path in picture.parent.iterdir()] == ["pair.png"]


def test_a_dark_picture_without_a_picture_is_refused(sd1: Layouts, capsys: pytest.CaptureFixture[str]):
    assert tiny.run("diff", *pair(sd1), "--dark") == 2
    assert "give a file with --plot" in capsys.readouterr().err


def test_blocks_and_strength_scale_what_is_baked(sd1: Layouts, tmp_path: Path):
    offset, baked = tmp_path / "offset.safetensors", tmp_path / "baked.safetensors"
    assert tiny.run("offset", *pair(sd1), "-o", offset) == 0
    arguments = ("--strength", "-0.5", "--blocks", "IN=0, IN01=2 ,MID=0.5")
    done = tiny.figures(tmp_path / "r.json", "bake", "--target", sd1["base.ldm"], "--offset", offset, "-o", baked, *arguments)
    assert done["blocks"] == "IN=0,IN01=2,MID=0.5"
    tensors, before, after = load_file(baked), tiny.base("sd1"), tiny.tuned("sd1")
    for block, weight in (("input_blocks.2.0", 0), ("input_blocks.1.0", 2), ("middle_block.0", 0.5), ("output_blocks.0.0", 1)):
        key = f"{UNET}{block}.in_layers.2.weight"
        expected = before[key] - 0.5 * weight * (after[key] - before[key])
        assert torch.allclose(tensors[key], expected, atol=1e-8, rtol=0)  # one rounding of 0.1 in float32


# ---- layouts ----

MIXES = [
    *(("sd1", *mix.split()) for mix in ("ldm16 ldm", "folder ldm", "ldm16 sharded", "unet unet", "sharded folder", "unet ldm")),
    *(("sdxl", *mix.split()) for mix in ("folder ldm", "sharded unet")),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Layouts], dict[str, Any]]:
    """The figures of the published mix: a whole float16 checkpoint against a UNet in float32."""
    known: dict[str, dict[str, Any]] = {}

    def of(arch: str, files: Layouts) -> dict[str, Any]:
        if arch not in known:
            folder = tmp_path_factory.mktemp("reference")
            known[arch] = tiny.figures(folder / "r.json", "extract", *pair(files), "-o", folder / "l.safetensors", "--rank", 3)
        return known[arch]

    return of


@pytest.mark.parametrize(("arch", "base", "tuned"), MIXES)
def test_all_mixes_of_layouts_give_the_same_figures(
    arch: str, base: str, tuned: str, reference: Callable[..., dict[str, Any]], request: Any, tmp_path: Path
):
    files: Layouts = request.getfixturevalue(arch)
    lora = tmp_path / "lora.safetensors"
    found = tiny.figures(tmp_path / "r.json", "extract", *pair(files, base, tuned), "-o", lora, "--rank", 3)
    expected = reference(arch, files)
    assert found["energy_kept"] == pytest.approx(expected["energy_kept"], abs=1e-6)
    for part in ("energy_kept_by_block", "energy_kept_by_component"):
        assert found[part] == pytest.approx(expected[part], abs=1e-6)
    assert found["components"] == ["unet"]
    assert found["verdict"]["level"] == ("doubtful" if (base, tuned) == ("unet", "ldm") else "fits")  # a UNet alone as the base
    same = load_file(Path(expected["output"]))
    assert all(torch.equal(tensor, same[key]) for key, tensor in load_file(lora).items())


@pytest.mark.parametrize("mix", [("ldm16", "unet"), ("folder", "ldm"), ("unet", "sharded")], ids="-".join)
def test_compat_and_offset_take_all_layouts(sd1: Layouts, mix: tuple[str, str], tmp_path: Path):
    report, offset = tmp_path / "r.json", tmp_path / "o.safetensors"
    found = tiny.figures(report, "compat", "--target", sd1["tuned.sharded"], *pair(sd1, *mix))
    assert found["strength_inside"] == pytest.approx(1, abs=1e-6)
    assert tiny.run("offset", *pair(sd1, *mix), "-o", offset) == 0
    names = load_file(offset)
    before, after = tiny.base("sd1"), tiny.tuned("sd1")
    expected = tiny.in_diffusers("sd1", {key: after[key] - before[key] for key in after})
    assert names.keys() == expected.keys()
    assert all(torch.equal(names[key], expected[key]) for key in names)


@pytest.mark.parametrize("arch", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_a_folder_reads_as_the_file_does(arch: str, tmp_path: Path):
    tensors = tiny.base(arch)
    folder = tiny.save_folder(tmp_path / "folder", arch, tensors, shards=2)
    file = tiny.save(tmp_path / "file.safetensors", tensors)
    with open_model(folder) as ours, open_model(file) as whole:
        assert ours.architecture is whole.architecture is ARCHITECTURES[arch]
        assert set(whole.keys()) - set(ours.keys()) <= {f"{e.prefix}logit_scale" for e in ARCHITECTURES[arch].text_encoders}
        for key in ours.keys():  # noqa: SIM118  a method of Model
            assert torch.equal(ours.read(key).reshape(whole.shape(key)), tensors[key]), key


def test_te2_of_a_folder_equals_the_fused_one(sdxl: Layouts):
    prefix = ARCHITECTURES["sdxl"].text_encoders[1].prefix
    with open_model(sdxl["base.folder"]) as folder, open_model(sdxl["base.ldm16"]) as whole:
        for key in (f"{prefix}transformer.resblocks.31.attn.in_proj_weight", f"{prefix}text_projection"):
            assert folder.shape(key) == whole.shape(key)
            assert torch.equal(folder.read(key), whole.read(key).float())
        projection = whole.read(f"{prefix}text_projection")
        assert not torch.equal(projection, projection.T)


def test_text_encoder_names_from_before_transformers_4(sd1: Layouts, tmp_path: Path):
    old = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in tiny.base("sd1").items()}
    path = tiny.save(tmp_path / "old.safetensors", old, torch.float16)
    with open_model(path) as model, open_model(sd1["base.ldm16"]) as now:
        assert model.keys("te1") == now.keys("te1") != []
    report = tiny.figures(tmp_path / "r.json", "diff", "--base", path, *pair(sd1, tuned="folder")[2:])
    assert report["components"].keys() == {"unet", "te1"}
    assert report["changed_text_encoders"] == []


def test_ema_keys_are_ignored_and_kept(sd1: Layouts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = tiny.rounded(tiny.base("sd1"), torch.float16)
    ema = {
        "model_ema." + key[len("model.") :].replace(".", ""): tensor + 1
        for key, tensor in tensors.items()
        if key.startswith(UNET)
    }
    extra = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    path = tiny.save(tmp_path / "ema.safetensors", {**tensors, **ema, **extra}, torch.float16)
    files = {**sd1, "base.ema": path}
    offset, baked, report = tmp_path / "o.safetensors", tmp_path / "baked.safetensors", tmp_path / "r.json"
    diffs = [tiny.figures(report, "diff", *pair(files, name)) for name in ("ema", "ldm16")]
    assert diffs[0]["components"] == diffs[1]["components"]
    assert tiny.run("offset", *pair(files, "ema"), "-o", offset) == 0
    assert tiny.run("bake", "--target", path, "--offset", offset, "-o", baked) == 0
    with open_checkpoint(path) as before, open_checkpoint(baked) as after:
        assert list(before.infos) == list(after.infos)
        same = {key for key in before.infos if before.raw(key) == after.raw(key)}
        assert {key for key in before.infos if not key.startswith(UNET)} <= same
        assert sum(key.startswith(UNET) for key in same) < 20
    capsys.readouterr()
    assert tiny.run("inspect", path) == 0
    assert "EMA" in capsys.readouterr().out


def test_bfloat16_files(sd1: Layouts, tmp_path: Path):
    base = tiny.save(tmp_path / "base.safetensors", tiny.base("sd1"), torch.bfloat16)
    tuned = tiny.save(tmp_path / "tuned.safetensors", tiny.tuned("sd1", rms=1e-3), torch.bfloat16)
    lora, offset, baked, report = (tmp_path / name for name in ("l.safetensors", "o.safetensors", "b.safetensors", "r.json"))
    found = tiny.figures(report, "extract", "--base", base, "--tuned", tuned, "-o", lora, "--rank", 4, "--precision", "bf16")
    assert found["noise_floor"] > 1e-3
    with open_checkpoint(lora) as file:
        assert {info.dtype for key, info in file.infos.items() if not key.endswith("alpha")} == {"BF16"}
    assert tiny.run("offset", "--base", base, "--tuned", tuned, "-o", offset) == 0
    assert tiny.run("bake", "--target", base, "--offset", offset, "-o", baked) == 0
    expected = load_file(tuned)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(baked).items())


@pytest.mark.skipif(not READS_PICKLES, reason="torch before 2.6 reads no pickles safely")
def test_a_ckpt_that_holds_only_tensors_is_read(sd1: Layouts, reference: Callable[..., dict[str, Any]], tmp_path: Path):
    path, lora = tmp_path / "base.ckpt", tmp_path / "l.safetensors"
    torch.save({"state_dict": {key: tensor.half() for key, tensor in tiny.base("sd1").items()}, "epoch": 3}, path)
    found = tiny.figures(tmp_path / "r.json", "extract", "--base", path, *pair(sd1)[2:], "-o", lora, "--rank", 3)
    assert found["energy_kept"] == pytest.approx(reference("sd1", sd1)["energy_kept"], abs=1e-6)
    assert tiny.run("bake", "--target", path, "--offset", lora, "-o", tmp_path / "baked.safetensors") == 0


def test_an_inpainting_model_takes_the_offset_of_a_plain_one(sd1: Layouts, tmp_path: Path):
    tensors = tiny.base("sd1", seed=1, in_channels=9)
    target = tiny.save(tmp_path / "inpainting.safetensors", tensors)
    first = UNET + "input_blocks.0.0.weight"
    offset, lora, report = tmp_path / "o.safetensors", tmp_path / "l.safetensors", tmp_path / "r.json"
    assert tiny.run("offset", *pair(sd1), "-o", offset) == 0
    assert tiny.run("extract", *pair(sd1), "-o", lora, "--rank", 2) == 0
    for name in (offset, lora):
        baked = tmp_path / f"baked_{name.name}"
        assert tiny.run("bake", "--target", target, "--offset", name, "-o", baked) == 0
        result = load_file(baked)[first]
        assert torch.equal(result[:, 4:], tensors[first][:, 4:])
        assert not torch.equal(result[:, :4], tensors[first][:, :4])
    assert tiny.figures(report, "compat", "--target", target, *pair(sd1))["drift"] > 0.5


@pytest.mark.parametrize("part", ["", "unet"])
@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_of_a_folder_the_unet_is_baked_into_one_file(
    sdxl: Layouts, layout: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, offset, baked = sdxl[f"base.{layout}"] / part, tmp_path / "o.safetensors", tmp_path / "b.safetensors"
    assert tiny.run("offset", *pair(sdxl), "-o", offset) == 0
    before = tiny.snapshot(folder)
    capsys.readouterr()
    report = tiny.figures(tmp_path / "r.json", "bake", "--target", folder, "--offset", offset, "-o", baked)
    assert "UNet alone" in capsys.readouterr().out
    assert tiny.snapshot(folder) == before
    assert (report["unet_only"], report["not_applied"]) == (True, [])
    with open_model(folder) as target:
        unet = {
            name.removeprefix("unet."): target.read(key) for key in target.keys("unet") for name in target.sources[key].keys
        }
    found, deltas = load_file(baked), load_file(offset)
    assert found.keys() == unet.keys() == deltas.keys()
    equal = sum(torch.equal(found[key], weight) for key, weight in unet.items())  # too small a change for half precision
    assert (report["tensors_kept"], report["tensors_changed"]) == (equal, len(unet) - equal)
    assert equal < len(unet) / 10
    for key, weight in unet.items():
        assert torch.equal(found[key], (weight.double() + deltas[key].double()).to(weight.dtype)), key
    with open_model(baked) as model:
        assert (model.architecture.name, model.components()) == ("sdxl", ("unet",))


def test_of_a_folder_the_text_encoder_is_named_as_not_applied(sd1: Layouts, tmp_path: Path):
    tuned = tiny.save(tmp_path / "tuned.safetensors", with_changed_text_encoder("sd1", "cond_stage", 1e-3))
    lora, baked = tmp_path / "l.safetensors", tmp_path / "b.safetensors"
    assert tiny.run("extract", *pair(sd1)[:2], "--tuned", tuned, "-o", lora, "--rank", 2) == 0
    report = tiny.figures(tmp_path / "r.json", "bake", "--target", sd1["base.folder"], "--offset", lora, "-o", baked)
    assert report["not_applied"]
    assert all(key.startswith("cond_stage_model.") for key in report["not_applied"])


# ---- verdicts ----


def verdict_of(base: Path, tuned: Path, folder: Path) -> tuple[str, str, dict[str, Any]]:
    report = tiny.figures(folder / "r.json", "diff", "--base", base, "--tuned", tuned)
    return report["verdict"]["level"], report["verdict"]["text"], report


def with_changed_text_encoder(arch: str, part: str, rms: float) -> tiny.Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        key: tensor + rms * torch.randn(tensor.shape, generator=generator) if part in key and tensor.ndim == 2 else tensor
        for key, tensor in tiny.tuned(arch).items()
    }


@pytest.mark.parametrize(("arch", "part", "name"), [("sd1", "cond_stage", "te1"), ("sdxl", "embedders.1", "te2")])
def test_a_changed_text_encoder_does_not_fit(arch: str, part: str, name: str, request: Any, tmp_path: Path):
    files: Layouts = request.getfixturevalue(arch)
    tuned = tiny.save(tmp_path / "tuned.safetensors", with_changed_text_encoder(arch, part, 1e-3))
    level, text, report = verdict_of(files["base.ldm16"], tuned, tmp_path)
    assert (level, report["changed_text_encoders"]) == ("doubtful", [name])
    assert "text encoder" in text
    lora = tmp_path / "l.safetensors"
    found = tiny.figures(
        tmp_path / "r.json", "extract", "--base", files["base.ldm16"], "--tuned", tuned, "-o", lora, "--rank", 2
    )
    assert found["components"] == ["unet", name]
    assert found["energy_kept_by_component"].keys() == {"unet", name}
    verified = tiny.figures(tmp_path / "r.json", "verify", "--lora", lora, "--base", files["base.ldm16"], "--tuned", tuned)
    assert verified["energy_kept_by_component"] == pytest.approx(found["energy_kept_by_component"], abs=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.float16)], ids=str)
def test_another_dtype_of_the_same_text_encoder_is_no_change(dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path):
    exact = tiny.exact_base("sd1")
    unet = tiny.only_unet(tiny.tuned("sd1", rms=1e-3))
    base = tiny.save(tmp_path / "base.safetensors", exact, dtypes[0])
    tuned = tiny.save(tmp_path / "tuned.safetensors", {**exact, **unet}, dtypes[1])
    level, text, report = verdict_of(base, tuned, tmp_path)
    assert (level, report["changed_text_encoders"]) == ("fits", [])
    assert "text encoders agree" in text
    assert report["components"]["te1"]["rms"] > 0


def test_the_same_text_encoder_fits(sd1: Layouts, tmp_path: Path):
    level, text, report = verdict_of(sd1["base.ldm16"], sd1["tuned.ldm"], tmp_path)
    assert (level, report["components"]["te1"]["rms"], report["vae"]) == ("fits", 0, "the same")
    assert "text encoders agree" in text


def test_unrelated_weights_are_the_wrong_base(sd1: Layouts, tmp_path: Path):
    other = tiny.save(tmp_path / "other.safetensors", tiny.base("sd1", seed=5), torch.float16)
    level, text, _ = verdict_of(other, sd1["tuned.unet"], tmp_path)
    assert level == "wrong"
    assert text.startswith("Wrong base")


def test_too_large_a_change_is_doubtful(sd1: Layouts, tmp_path: Path):
    tuned = tiny.save(tmp_path / "t.safetensors", tiny.in_diffusers("sd1", tiny.tuned("sd1", rms=8e-3)))
    assert verdict_of(sd1["base.ldm16"], tuned, tmp_path)[0] == "doubtful"


def test_a_swapped_order_is_noticed(sd1: Layouts, tmp_path: Path):
    level, text, _ = verdict_of(sd1["tuned.unet"], sd1["base.ldm16"], tmp_path)
    assert level == "doubtful"
    assert "swapped" in text
    named = tiny.save(tmp_path / "model-dpo.safetensors", tiny.base("sd1"))
    level, text, _ = verdict_of(named, sd1["tuned.ldm"], tmp_path)
    assert (level, "swapped" in text) == ("doubtful", True)


def test_compat_and_verify_notice_a_swapped_order_too(sd1: Layouts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    swapped = ("--base", sd1["tuned.unet"], "--tuned", sd1["base.ldm16"])
    right = ("--base", sd1["base.ldm16"], "--tuned", sd1["tuned.unet"])
    found = tiny.figures(tmp_path / "f.json", "compat", "--target", sd1["base.ldm16"], *swapped)
    assert found["verdict"]["text"].startswith("The order looks swapped")
    lora = tmp_path / "l.safetensors"
    assert tiny.run("extract", *right, "-o", lora, "--rank", 8) == 0
    capsys.readouterr()
    for command, *options in (("extract", "--rank", 8), ("offset",)):  # a warning comes before what was written
        assert tiny.run(command, *swapped, "-o", tmp_path / f"{command}.safetensors", *options) == 0
        assert capsys.readouterr().out.startswith("The order looks swapped")
    assert tiny.run("verify", "--lora", lora, *swapped) == 0
    assert "base and tuned are swapped" in capsys.readouterr().out
    assert tiny.run("verify", "--lora", lora, *right) == 0
    assert "swapped" not in capsys.readouterr().out


def test_compat_on_a_target_with_the_opposite_inside(sd1: Layouts, tmp_path: Path):
    offset, baked = tmp_path / "o.safetensors", tmp_path / "b.safetensors"
    pair = ("--base", sd1["base.ldm16"], "--tuned", sd1["tuned.unet"])
    assert tiny.run("offset", *pair, "-o", offset) == 0
    assert tiny.run("bake", "--target", sd1["base.ldm16"], "--offset", offset, "-o", baked, "--strength", -1) == 0
    found = tiny.figures(tmp_path / "f.json", "compat", "--target", baked, *pair)
    assert "holds the opposite of DPO" in found["verdict"]["text"]
    assert found["suggested_strength"] == pytest.approx(2)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(args: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("lib_dpo.cli.main._inspect", fail)
    assert tiny.run("inspect", "x.safetensors") == 2
    assert capsys.readouterr().err.startswith(
        f"error: torch is not installed in this Python; run `{sys.executable} -m pip install .` in the folder of this project"
    )


@pytest.mark.parametrize(("drift", "level"), [(3e-4, "fits"), (4e-3, "fits"), (4e-2, "weaker")])
def test_compat_tells_near_finetunes_from_far_ones(sd1: Layouts, drift: float, level: str, tmp_path: Path):
    generator = torch.Generator().manual_seed(2)
    finetune = {
        key: tensor + drift * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for key, tensor in tiny.base("sd1").items()
    }
    target = tiny.save(tmp_path / "finetune.safetensors", finetune)
    found = tiny.figures(tmp_path / "r.json", "compat", "--target", target, *pair(sd1))
    assert found["verdict"]["level"] == level
    assert abs(found["strength_inside"]) < 4 * found["strength_inside_error"]
    assert {"drift", "cosine", "suggested_strength", "blocks"} <= found.keys()


# ---- what is written ----


def test_an_existing_output_is_kept_or_replaced_as_told(sd1: Layouts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"mine")
    assert tiny.run("extract", *pair(sd1), "-o", lora, "--rank", 1) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert lora.read_bytes() == b"mine"
    assert tiny.run("extract", *pair(sd1), "-o", lora, "--rank", 1, "--overwrite") == 0
    with safe_open(str(lora), framework="pt") as file:
        assert file.metadata()["dpo.rank_policy"] == "rank 1"
    assert tiny.snapshot(tmp_path).keys() == {"lora.safetensors", "lora.json"}


@pytest.mark.parametrize("command", ["extract", "offset", "bake", "resize"])
@pytest.mark.parametrize(("name", "message"), [("mine.safetensors", "--overwrite"), ("out.ckpt", "ends in .safetensors")])
def test_an_output_is_refused_before_anything_is_fetched(
    command: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fetch(spec: str, **options: Any) -> Path:
        pytest.fail(f"{spec} was fetched")

    monkeypatch.setattr("lib_dpo.files.hub.resolve", fetch)
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    names = {"bake": ("--target", "--offset"), "resize": ("--lora",)}.get(command, ("--base", "--tuned"))
    arguments = [part for option in names for part in (option, "hub:owner/name")]
    rank = ("--rank", 2) if command == "resize" else ()
    assert tiny.run(command, *arguments, *rank, "-o", tmp_path / name) == 2
    assert message in capsys.readouterr().err


def test_an_other_sidecar_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("lib_dpo.files.hub.resolve", lambda spec, **options: pytest.fail(f"{spec} was fetched"))
    (tmp_path / "out.yaml").write_text("mine\n")
    output = tmp_path / "out.safetensors"
    assert tiny.run("bake", "--target", "hub:owner/name", "--offset", "hub:owner/other", "-o", output) == 2
    assert "out.yaml: exists already" in capsys.readouterr().err


def test_missing_folders_are_made(sd1: Layouts, tmp_path: Path):
    assert tiny.run("extract", *pair(sd1), "-o", tmp_path / "a" / "b" / "lora.safetensors", "--rank", 1) == 0
    assert tiny.snapshot(tmp_path).keys() == {"a", "a/b", "a/b/lora.safetensors", "a/b/lora.json"}


def test_the_sidecar_is_copied_and_an_other_one_is_kept(sd1: Layouts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target, offset, baked = (tmp_path / f"{name}.safetensors" for name in ("target", "offset", "baked"))
    target.write_bytes(sd1["base.ldm16"].read_bytes())
    target.with_suffix(".yaml").write_text("model: v-prediction\n")
    assert tiny.run("offset", *pair(sd1), "-o", offset) == 0
    arguments = ("bake", "--target", target, "--offset", offset, "-o", baked)
    baked.with_suffix(".yaml").write_text("mine\n")
    before = tiny.snapshot(tmp_path)
    assert tiny.run(*arguments) == 2
    assert "baked.yaml" in capsys.readouterr().err
    assert tiny.snapshot(tmp_path) == before
    assert tiny.run(*arguments, "--overwrite") == 0
    assert baked.with_suffix(".yaml").read_text() == "model: v-prediction\n"


def test_the_printed_figures_are_those_in_the_json(sd1: Layouts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lora = tmp_path / "lora.safetensors"
    found = tiny.figures(tmp_path / "r.json", "extract", *pair(sd1), "-o", lora, "--rank", 4)
    out = capsys.readouterr().out
    assert f"energy kept {100 * found['energy_kept']:.2f} %" in out
    assert found["verdict"]["text"] in out
    assert f"{found['layers']} layers" in out
    assert f"{found['file_bytes'] / 1e6:.1f} MB" in out
    with safe_open(str(lora), framework="pt") as file:
        metadata = file.metadata()
    assert float(metadata["dpo.energy_kept"]) == found["energy_kept"]
    assert json.loads(metadata["dpo.energy_kept_by_block"]) == found["energy_kept_by_block"]
    assert metadata["dpo.verdict"] == found["verdict"]["text"]
    assert re.fullmatch(r"[0-9a-f]{64}", metadata["dpo.base_sha256"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_offset_file_says_what_it_holds(sd1: Layouts, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    offset, report = tmp_path / "my offset.safetensors", tmp_path / "r.json"
    found = tiny.figures(report, "offset", *pair(sd1), "-o", offset, "--precision", precision)
    kept = found["energy_kept"]
    assert kept == 1 if precision == "fp32" else 0.999 < kept < 1
    assert found["energy_kept_by_component"] == {"unet": kept}
    assert {"TIME", "IN00", "MID", "OUT00", "OUT"} <= found["energy_kept_by_block"].keys()
    assert "energy kept 100.00 %" in capsys.readouterr().out
    with safe_open(str(offset), framework="pt") as file:
        metadata = file.metadata()
    assert float(metadata["dpo.energy_kept"]) == kept
    for name in ("energy_kept_by_component", "energy_kept_by_block"):
        assert json.loads(metadata[f"dpo.{name}"]) == found[name]
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/offset"
    assert metadata["modelspec.title"] == "my offset"
    verified = tiny.figures(report, "verify", "--lora", offset, *pair(sd1))
    assert verified["energy_kept_claimed"] == kept
    assert verified["energy_kept"] == pytest.approx(kept, abs=1e-9)
    assert verified["energy_kept_by_block"] == pytest.approx(found["energy_kept_by_block"], abs=1e-9)


def test_an_offset_file_keeps_nothing_of_a_text_encoder(sd1: Layouts, tmp_path: Path):
    tuned = tiny.save(tmp_path / "tuned.safetensors", with_changed_text_encoder("sd1", "cond_stage", 1e-3))
    offset, files = tmp_path / "o.safetensors", (*pair(sd1)[:2], "--tuned", tuned)
    found = tiny.figures(tmp_path / "r.json", "offset", *files, "-o", offset)
    verified = tiny.figures(tmp_path / "r.json", "verify", "--lora", offset, *files)
    assert found["energy_kept_by_component"] == verified["energy_kept_by_component"] == {"unet": 1, "te1": 0}
    assert found["energy_kept"] == pytest.approx(verified["energy_kept"], abs=1e-9)


@pytest.mark.parametrize(
    ("command", "stop"),
    [
        ("extract", KeyboardInterrupt),
        ("extract", Cancelled),
        ("offset", KeyboardInterrupt),
        ("bake", KeyboardInterrupt),
        ("resize", KeyboardInterrupt),
    ],
)
def test_cancelling_leaves_nothing(
    sd1: Layouts,
    tmp_path: Path,
    command: str,
    stop: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    lora, output = tmp_path / "lora.safetensors", tmp_path / "out" / "out.safetensors"
    assert tiny.run("extract", *pair(sd1), "-o", lora, "--rank", 1) == 0
    arguments = {
        "extract": (*pair(sd1), "--energy", 0.3),
        "offset": pair(sd1),
        "bake": ("--target", sd1["base.ldm16"], "--offset", lora),
        "resize": ("--lora", lora, "--rank", 1),
    }[command]
    before = tiny.snapshot(tmp_path)
    advance, left = Steps.advance, [400]

    def stopped(self: Steps, numel: int, key: str) -> None:
        left[0] -= 1
        if not left[0]:
            assert (tmp_path / "out").exists()
            raise stop
        advance(self, numel, key)

    monkeypatch.setattr(Steps, "advance", stopped)
    capsys.readouterr()
    assert tiny.run(command, *arguments, "-o", output) == 130
    assert "cancelled" in capsys.readouterr().err
    assert tiny.snapshot(tmp_path) == before


# ---- the process ----


def process(*args: object, code: str = "", **options: Any) -> subprocess.Popen[str]:
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "lib_dpo"]
    return subprocess.Popen(
        [*start, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        encoding="utf-8",
        **options,
    )


def test_a_process_ends_with_the_exit_code(sd1: Layouts, tmp_path: Path):
    done = process("inspect", sd1["base.ldm16"])
    refused = process("inspect", tmp_path / "missing.safetensors")
    out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, "")
    assert "SD 1.x" in out
    out, err = refused.communicate(timeout=60)
    assert (refused.returncode, out, len(err.splitlines())) == (2, "", 1)
    assert "missing.safetensors" in err
    with pytest.raises(BadFileError):
        tiny.run("inspect", tmp_path / "missing.safetensors", "--debug")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_error(sd1: Layouts, unbuffered: str):
    child = process("inspect", sd1["base.ldm16"], env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    err = child.stderr.read()
    child.stderr.close()
    assert (child.wait(60), err) == (0, "")


def test_a_terminal_without_our_letters_is_no_error(sd1: Layouts):
    child = process("diff", *pair(sd1), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert "Right base" in out


INTERRUPTIBLE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import lib_dpo.operations.decompose
factorise = lib_dpo.operations.decompose.factorise
def slowly(*args, **options):
    time.sleep(0.2)
    return factorise(*args, **options)
lib_dpo.operations.decompose.factorise = slowly
import runpy
runpy.run_module("lib_dpo", run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_ctrl_c_during_an_extraction_leaves_nothing(sd1: Layouts, tmp_path: Path):
    output = tmp_path / "out" / "lora.safetensors"
    child = process("extract", *pair(sd1), "-o", output, "--rank", 2, code=INTERRUPTIBLE)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/.*.part")):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, out, len(err.splitlines())) == (130, "", 1)
    assert err.startswith("cancelled")
    assert tiny.snapshot(tmp_path) == {}


EARLY = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "lib_dpo.settings":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
runpy.run_module("lib_dpo", run_name="__main__")
"""

LATE = """
import atexit, builtins, os, runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt(kill=os.kill, here=os.getpid(), number=signal.SIGINT):
    kill(here, number)
class Last:
    def __del__(self, interrupt=interrupt):
        interrupt()
builtins.last = Last()
atexit.register(interrupt)
runpy.run_module("lib_dpo", run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_ctrl_c_during_the_imports_is_one_line(sd1: Layouts):
    child = process("inspect", sd1["base.ldm16"], code=EARLY)
    assert child.communicate(timeout=60) == ("", "cancelled\n")
    assert child.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_ctrl_c_after_the_end_changes_nothing(sd1: Layouts):
    child = process("inspect", sd1["base.ldm16"], code=LATE)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert "SD 1.x" in out
