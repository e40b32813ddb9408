"""The standalone host: a pipeline from one file, against diffusers' own loader, and pictures that a strength changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from fakes_standalone import tokenizer
from PIL import Image

from lib_dpo.errors import Cancelled, MismatchError, MissingExtraError, NoMemoryError, NoModelError, NotFoundError, SettingError
from lib_dpo.families.keymap import UNET, VAE
from lib_dpo.families.model import open_model
from lib_dpo.families.synthetic import small_pair
from lib_dpo.hosts.base import Request
from lib_dpo.hosts.pipeline import made_for, open_pipeline
from lib_dpo.hosts.standalone import SAMPLERS, Standalone, StandaloneLive
from lib_dpo.offsets.patch import open_patch
from lib_dpo.webui import comparing
from lib_dpo.webui.session import Session

pytestmark = [
    pytest.mark.newest,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers with numpy 2
]
REQUEST = Request("a b c", negative="c", seed=3, steps=2, cfg_scale=4.0, width=32, height=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models as the standalone host has it, with a strong offset."""
    folder = tmp_path_factory.mktemp("models")
    base, tuned = folder / "Stable-diffusion" / "base.safetensors", folder / "tuned.safetensors"
    tiny.save(base, tiny.base())
    tiny.save(tuned, tiny.tuned(rms=3e-2))
    (folder / "Lora").mkdir()
    assert tiny.run("extract", "--base", base, "--tuned", tuned, "-o", folder / "Lora" / "dpo.safetensors", "--rank", 8) == 0
    tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def host(models: Path) -> Standalone:
    host = Standalone(models, models / "tokenizer", device="cpu")
    host.live.load(host.checkpoint_dir / "base.safetensors")
    return host


@pytest.mark.parametrize("arch", ["sd1", "sd2", "sdxl"])
def test_a_pipeline_holds_every_weight_of_the_file(arch: str, tmp_path: Path):
    file = tiny.save(tmp_path / "model.safetensors", tiny.base(arch))
    with open_model(file) as model:
        weights = open_pipeline(model, tokenizer(tmp_path / "tokenizer"))
        unet = {key for key in model.keys("unet") if key.startswith(UNET)}
        assert unet <= weights.tensors.keys()
        own = {parameter.data_ptr() for part in ("unet", "text_encoder", "text_encoder_2")
               if (module := getattr(weights.pipeline, part, None)) for parameter in module.parameters()}  # fmt: skip
        for key, tensor in weights.tensors.items():
            assert torch.equal(tensor.reshape(-1), model.read(key).float().reshape(-1)) or tensor.shape != model.shape(key), key
        starts = {tensor.data_ptr() for tensor in weights.tensors.values()}
        assert starts <= own | {0}
        picture = weights.pipeline("a b", num_inference_steps=1, width=32, height=32, output_type="np").images[0]
    assert np.isfinite(picture).all()


def test_the_text_encoder_gives_what_transformers_gives(tmp_path: Path):
    """The same weights loaded by transformers from a diffusers folder give the same embeddings."""
    from transformers import CLIPTextConfig, CLIPTextModel

    file = tiny.save(tmp_path / "model.safetensors", tiny.base())
    with open_model(file) as model:
        pipeline = open_pipeline(model, tokenizer(tmp_path / "tokenizer")).pipeline
    config = CLIPTextConfig(
        vocab_size=16, hidden_size=16, intermediate_size=64, num_hidden_layers=12, num_attention_heads=1, eos_token_id=49407
    )
    theirs = CLIPTextModel(config).eval()
    names = {name if name.startswith("text_model.") else f"text_model.{name}": name for name in theirs.state_dict()}
    prefix = "cond_stage_model.transformer."
    theirs.load_state_dict(
        {names[key[len(prefix) :]]: t for key, t in tiny.base().items() if key[len(prefix) :] in names}, strict=False
    )
    tokens = torch.tensor([[7, 0, 1, 2, 8, 8, 8]])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.text_encoder(tokens)[0], theirs(tokens)[0])


def test_strengths_change_the_picture_and_0_is_the_untouched_one(host: Standalone):
    patch = open_patch(host.lora_dir / "dpo.safetensors")
    untouched, prints = host.generate(REQUEST, None, 0.0), host.live.fingerprint()
    half, full = (host.generate(REQUEST, patch, strength) for strength in (0.5, 1.0))
    difference = [np.abs(np.asarray(each.image, float) - np.asarray(untouched.image, float)).mean() for each in (half, full)]
    assert 0 < difference[0] < difference[1]
    assert np.array_equal(host.generate(REQUEST, patch, 0.0).image, untouched.image)
    assert host.live.fingerprint() == prints
    assert "DPO strength: 0.5" in half.infotext
    assert "Negative prompt: c" in half.infotext


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), Cancelled("stop")]
)
def test_a_picture_that_fails_leaves_the_weights_as_they_were(host: Standalone, error: Exception, monkeypatch):
    patch = open_patch(host.lora_dir / "dpo.safetensors")
    untouched, prints = host.generate(REQUEST, None, 0.0), host.live.fingerprint()

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(host.live.pipeline.unet, "forward", fail)
        with pytest.raises(Cancelled if isinstance(error, Cancelled) else NoMemoryError, match=r"stop|32x32.*make it smaller"):
            host.generate(REQUEST, patch, 1.0)
    assert host.live.fingerprint() == prints
    assert np.array_equal(host.generate(REQUEST, None, 0.0).image, untouched.image)


def test_a_checkpoint_too_large_for_memory_is_refused(host: Standalone, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr("lib_dpo.hosts.standalone.open_pipeline", fail)
        with pytest.raises(NoMemoryError, match=r"opening base\.safetensors: the GPU is out of memory; close other programs"):
            host.live.load(host.checkpoint_dir / "base.safetensors")
    assert host.live.loaded() is None
    host.live.load(host.checkpoint_dir / "base.safetensors")
    assert host.generate(REQUEST, None, 0.0).image.size == (32, 32)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_clips_what_stable_diffusion_does_not(host: Standalone, sampler: str):
    host.generate(replace(REQUEST, sampler=sampler), None, 0.0)
    config = host.live.pipeline.scheduler.config
    assert not config.get("clip_sample", False)
    assert config.prediction_type == "epsilon"
    assert config.beta_end == 0.012


def test_half_precision_draws_too(models: Path):
    host = Standalone(models, models / "tokenizer", device="cpu")
    host.live = StandaloneLive(models / "tokenizer", "cpu", torch.float16)
    host.live.load(host.checkpoint_dir / "base.safetensors")
    patch = open_patch(host.lora_dir / "dpo.safetensors")
    pictures = [host.generate(REQUEST, patch, strength).image for strength in (0.0, 1.0)]
    assert np.abs(np.asarray(pictures[0], float) - np.asarray(pictures[1], float)).mean() > 0


@pytest.mark.parametrize(
    ("arch", "sidecar", "side"),
    [("sd1", "", 512), ("sd2", "", 768), ("sdxl", "", 1024), ("sd2", "parameterization: v, image_size: 64", 768),
     ("sd2", "image_size: 64", 512), ("sdxl", "image_size: 8", 1024), ("sd1", "image_size: 8", 64)],
)  # fmt: skip
def test_what_a_model_was_made_for(tmp_path: Path, arch: str, sidecar: str, side: int):
    path = small_pair(tmp_path, arch)[0]
    if sidecar:
        path.with_suffix(".yaml").write_text(f"model: {{params: {{{sidecar}}}}}")
    with open_model(path) as model:
        assert made_for(model) == side


def test_weights_are_those_of_the_pipeline_on_another_device(models: Path):
    """`meta` stands for a GPU: nothing may stay on the CPU."""
    with open_model(models / "Stable-diffusion" / "base.safetensors") as model:
        weights = open_pipeline(model, models / "tokenizer", device="meta")
    assert {tensor.device.type for tensor in weights.tensors.values()} == {"meta"}


def test_a_bake_draws_what_the_saved_checkpoint_draws(host: Standalone, models: Path):
    session = Session(host)
    try:
        session.jobs.run("save", lambda job: session.save(job, name="saved", offset="dpo", strength=1.0))
        session.jobs.run("bake", lambda job: session.bake(job, offset="dpo", strength=1.0))
        baked = host.generate(REQUEST, None, 0.0)
        assert session.status().text == "base · SD 1.x · baked: dpo × 1"
        host.live.load(host.checkpoint_dir / "saved.safetensors")
        assert session.status().text == "saved · SD 1.x · clean · its file holds dpo × 1"
        difference = np.asarray(host.generate(REQUEST, None, 0.0).image, float) - np.asarray(baked.image, float)
        assert np.abs(difference).max() <= 1  # float32 sums, in another order
    finally:
        (host.checkpoint_dir / "saved.safetensors").unlink(missing_ok=True)


def test_compare_makes_a_grid(host: Standalone):
    session = Session(host)
    found = session.jobs.run("compare", lambda job: comparing.compare(session, job, comparing.Asked(
        offset="dpo", prompts=["a b"], seeds="1", strengths="1", steps=1, width=64, height=64)))  # fmt: skip
    assert len(found.images) == 2
    assert found.report.effects[0].difference > 0


def test_samplers_and_interrupt(host: Standalone):
    pictures = {name: host.generate(Request("a", sampler=name, steps=2, width=32, height=32), None, 0.0) for name in SAMPLERS}
    assert all(f"Sampler: {name}" in picture.infotext for name, picture in pictures.items())
    with pytest.raises(SettingError, match="sampler 'Magic' is unknown"):
        host.generate(Request("a", sampler="Magic"), None, 0.0)
    host.interrupt()
    with pytest.raises(Cancelled):
        host.generate(REQUEST, None, 0.0)
    with host.job("again") as job:
        job.check()


def test_what_makes_no_pictures_is_refused(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host = Standalone(models, models / "tokenizer", device="cpu")
    with pytest.raises(NoModelError, match="choose one"):
        host.generate(REQUEST, None, 0.0)
    for tensors, message in (
        (tiny.only_unet(tiny.base()), "lacks te1, vae"),
        (tiny.base("sdxl-refiner"), "is a refiner"),
        ({key: t for key, t in tiny.base().items() if key != f"{VAE}decoder.conv_in.weight"}, "lacks 1 tensors, first decoder"),
        ({key: t for key, t in tiny.base().items() if "layers.3.mlp.fc1.bias" not in key}, "lacks 1 tensors of TE1"),
    ):
        file = tiny.save(tmp_path / "part.safetensors", tensors)
        with pytest.raises(MismatchError, match=message):
            host.live.load(file)
        assert host.live.loaded() is None
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match="-m pip install diffusers transformers accelerate"):
        host.live.load(host.checkpoint_dir / "base.safetensors")


# ---- the command ----


def compare(models: Path, output: Path, *options: object) -> tuple[object, ...]:
    return (
        "compare", "--model", models / "Stable-diffusion" / "base.safetensors", "--offset", models / "Lora" / "dpo.safetensors",
        "--prompt", "a b", "--prompt", "c", "--seeds", "1", "--strengths", "1", "--steps", 1, "--width", 64, "--height", 64,
        "--tokenizer", models / "tokenizer", "--device", "cpu", "-o", output, *options,
    )  # fmt: skip


def test_the_command_writes_the_grid_and_each_picture(models: Path, tmp_path: Path):
    figures = tiny.figures(tmp_path / "f.json", *compare(models, tmp_path / "grid.png", "--each", tmp_path / "each"))
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 2 * 64
        assert "DPO compare" in grid.info["parameters"]
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [
        "01_strength-1.png", "01_untouched.png", "02_strength-1.png", "02_untouched.png",
    ]  # fmt: skip
    assert len(figures["pictures"]) == 4
    assert figures["effects"][0]["difference"]["mean"] > 0
    before = tiny.snapshot(tmp_path)
    assert tiny.run(*compare(models, tmp_path / "grid.png")) == 2  # exists already
    assert tiny.snapshot(tmp_path) == before


def test_the_command_says_when_memory_runs_out(models: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("lib_dpo.hosts.standalone.check_whole", fail)
    assert tiny.run(*compare(models, tmp_path / "grid.png")) == 2
    assert "out of memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--width", 68), "multiples of 8"),
        (("--steps", 0), "too small"),
        (("--strengths", "lots"), "neither a number nor a range"),
        (("--sampler", "Magic"), "sampler 'Magic' is unknown"),
        (("--blocks", "EAR=1"), "block weight"),
        (("-o", "grid.jpg"), "ends in .png"),
        (("--offset", "/nowhere.safetensors"), "does not exist"),
    ],
)
def test_the_command_refuses_in_one_line(models: Path, tmp_path: Path, capsys, options, message: str):
    assert tiny.run(*compare(models, tmp_path / "grid.png", *options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


# ---- the app ----


def test_the_app_serves_the_tab_on_this_machine_only(models: Path):
    import os
    import re
    import subprocess
    import sys
    import urllib.request

    env = {**os.environ, "HTTP_PROXY": "http://127.0.0.1:9"}  # nobody is there: pages of this machine need no proxy
    port = str(free_port())
    command = [sys.executable, "-m", "lib_dpo", "app", "--models", models, "--tokenizer", models / "tokenizer", "--port", port,
               "--device", "cpu"]  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert f"http://127.0.0.1:{port}" in said
            page = wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=5).read().decode())
            for elem_id in ("dpo_tab", "dpo_extract", "dpo_bake", "dpo_compare", "dpo_inspect", "dpo_app_refresh"):
                assert re.search(f'"elem_id":"{elem_id}"', page), elem_id
            second = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
            assert (second.returncode, second.stdout) == (2, "")
            assert f"port {port} is used by another program" in second.stderr
        finally:
            process.terminate()
            process.wait(30)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for(work: Callable[[], str]) -> str:
    for _ in range(200):
        try:
            return work()
        except OSError:
            time.sleep(0.2)
    return work()


def test_the_app_loads_another_checkpoint_and_refuses_what_cannot_be(host: Standalone, models: Path, tmp_path: Path, capsys):
    from lib_dpo.webui.app import build, load

    session = Session(host)
    assert build(session) is not None
    second = tiny.save(host.checkpoint_dir / "second.safetensors", tiny.base(seed=5))
    part = tiny.save(host.checkpoint_dir / "part.safetensors", tiny.only_unet(tiny.base()))
    try:
        load(session, "second.safetensors")
        assert session.status().text == "second · SD 1.x · clean"
        for name, error in (("nothing", NotFoundError), ("part", MismatchError)):
            with pytest.raises(error):
                load(session, name)
        assert session.status().text == "second · SD 1.x · clean"
    finally:
        second.unlink()
        part.unlink()
    empty = ("app", "--models", tmp_path, "--tokenizer", models / "tokenizer")
    for options, message in (((), "holds no checkpoint"), (("--port", 0), "port 0 does not exist")):
        assert tiny.run(*empty, *options) == 2
        assert message in capsys.readouterr().err
