"""The bundled model: that training makes both of its parts, and pictures from them; and that what ships is what was made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib_dpo.families.model import open_model
from lib_dpo.families.shapes import checkpoint_shapes
from lib_dpo.files.hashes import file_sha256
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import open_pair
from lib_dpo.operations.write_offset import write_offset
from lib_dpo.toy.bundled import BASE, CLIP, FOLDER, MEASURED, REFERENCE, generate, load
from lib_dpo.toy.generate import LATENTS, sample
from lib_dpo.toy.pictures import Scene, held_out
from lib_dpo.toy.study import Findings, gain, plateau, point
from tools.bundled import autoencoder, denoiser, preference, text_encoder, training
from tools.bundled.captions import all_captions, seen_by_captioner
from tools.bundled.files import hashes
from tools.bundled.recipe import SMOKE
from tools.train_bundled_model import make


@pytest.mark.newest
def test_training_makes_a_pair_that_the_engine_knows(smoke: Path):
    with open_model(smoke / "model" / BASE) as base, open_model(smoke / "model" / REFERENCE) as tuned:
        pair = open_pair(base, tuned)
        assert pair.architecture.name == "sd1"
        assert tuned.components() == ("unet",)
        shortcuts = {key for key in checkpoint_shapes("sd1") if "nin_shortcut" in key}  # none where widths do not change
        assert checkpoint_shapes("sd1").keys() - shortcuts == base.checkpoint.infos.keys()
        assert {info.dtype for info in tuned.checkpoint.infos.values()} == {"F16"}
        assert any(pair.delta(key).any() for key in pair.keys)


@pytest.mark.newest
def test_training_goes_on_from_its_state_and_comes_out_the_same(smoke: Path, tmp_path: Path):
    work = shutil.copytree(smoke / "work", tmp_path / "work")
    (work / "preference.pt").unlink()
    make(SMOKE, work, tmp_path / "again", bpe=None, say=lambda _: None)
    for name in (BASE, REFERENCE):
        assert file_sha256(tmp_path / "again" / name) == file_sha256(smoke / "model" / name)


@pytest.mark.newest
def test_every_loss_stays_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On torch's meta device, which computes nothing: whatever goes into a layer must be there, as its weights are."""
    transformers = pytest.importorskip("transformers")
    seen = []

    def one_step(name: str, network: Any, stage: Any, loss: training.Loss, *, seed: int, **rest: object) -> None:
        with torch.nn.modules.module.register_module_forward_pre_hook(all_there):
            value = loss(0, *training.generators(seed, name, 0))
        value.backward()
        assert {parameter.device for parameter in network.parameters()} == {value.device} == {meta}
        seen.append(name)

    def all_there(layer: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        places = [value.device for value in inputs if isinstance(value, torch.Tensor)]
        assert all(place == meta for place in places), f"{type(layer).__name__} gets tensors of {places}"

    meta = torch.device("meta")
    for stage in (autoencoder, text_encoder, denoiser, preference):
        monkeypatch.setattr(stage, "train", one_step)
    monkeypatch.setattr(autoencoder, "_normalise", lambda *_: None)  # on the CPU
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda network: network)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(FOLDER / CLIP, local_files_only=True)
    autoencoder.fit(SMOKE, tmp_path, print, meta)
    text = text_encoder.fit(SMOKE, tokenizer, tmp_path, print, meta)
    scenes, said = denoiser.shown_scenes()[:3], [None, *all_captions()]
    context = text_encoder.embed(text, tokenizer, said[:2]).repeat(len(said), 1, 1)
    latents = torch.zeros(len(scenes), 1, *LATENTS, device=meta)
    world = denoiser.World(scenes, latents, {scene: n for n, scene in enumerate(said)}, context)
    base = denoiser.fit(SMOKE, world, tmp_path, print)
    drawn = preference.Drawn(torch.zeros(len(scenes), 2, *LATENTS), torch.tensor([[0.0, 1.0]] * len(scenes)))
    monkeypatch.setattr(preference, "draw", lambda *_: drawn)
    preference.fit(SMOKE, world, base.requires_grad_(False), None, tmp_path, print)
    assert sample(base, world.context_of(scenes), world.context_of([None]), [1, 2, 3], steps=1).device == meta
    assert seen == ["autoencoder", "decoder", "text_encoder", "denoiser", "preference"]


def test_captions_of_the_training_are_wrong_about_as_often_as_they_should_be():
    rng = np.random.default_rng(0)
    said = [seen_by_captioner(Scene("two", "red", "cross", "on the left"), rng) for _ in range(2000)]
    assert {one.colour for one in said} == {"red", None}
    named = [one.count for one in said if one.count]
    assert 0.4 < named.count("three") / len(named) < 0.5
    assert set(said) < set(all_captions())


@pytest.mark.newest
def test_a_picture_comes_from_prompt_and_seed(smoke: Path):
    networks = load(smoke / "model")
    scenes = list(held_out()[:2])
    first = generate(networks, scenes, [1, 2], steps=2)
    assert first.shape == (2, 64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, generate(networks, scenes, [1, 2], steps=2))
    assert not np.array_equal(first[0], generate(networks, scenes[:1], [3], steps=2)[0])


@pytest.mark.newest
def test_strength_is_always_counted_from_the_base(smoke: Path, tmp_path: Path):
    networks = load(smoke / "model")
    before = {key: tensor.clone() for key, tensor in networks.live.items()}
    with open_model(smoke / "model" / BASE) as base, open_model(smoke / "model" / REFERENCE) as tuned:
        pair = open_pair(base, tuned)
        write_offset(pair, tmp_path / "offset.safetensors")
        with open_offset(tmp_path / "offset.safetensors") as offset:
            networks.set_unet(offset, 2.0)
        key = "model.diffusion_model.middle_block.1.proj_in.weight"
        expected = base.read(key).float() + 2 * pair.delta(key)
        torch.testing.assert_close(networks.live[key], expected)  # float32, one rounding either way
        networks.set_unet()
    assert all(torch.equal(before[key], tensor) for key, tensor in networks.live.items())


def test_the_files_that_ship_are_those_of_the_note():
    note = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|$", note, re.MULTILINE)
    assert {name: (int(size.replace(",", "")), digest) for name, size, digest in rows} == hashes(FOLDER)
    assert {BASE, BASE.replace(".safetensors", ".yaml"), REFERENCE} < hashes(FOLDER).keys()
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 20_000_000


def test_the_tokenizer_that_ships_is_clips():
    words = json.loads((FOLDER / "clip" / "vocab.json").read_text(encoding="utf-8"))
    assert len(words) == 49408
    assert (words["<|startoftext|>"], words["<|endoftext|>"], words["cat</w>"]) == (49406, 49407, 2368)


def test_intervals_are_those_of_the_textbook():
    one = point(1.0, np.repeat([1.0, 0.0], [81, 263 - 81]))
    assert (round(one.low, 4), round(one.high, 4)) == (0.2553, 0.3662)  # Newcombe 1998, table I, method 3
    mean, low, high = gain(np.zeros(100), np.repeat([1.0, 0.0], 50))
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.959964 * 0.502519 / 10, abs=1e-5)
    assert high == pytest.approx(1 - low)
    curve = {n / 2: np.repeat([1.0, 0.0], [share, 100 - share]) for n, share in enumerate((30, 74, 80, 78, 40))}
    assert plateau(curve) == (1.0, 1.5)  # six pictures are right at 1 alone and none at 0.5 alone: paired, z is 2.5


def test_the_study_that_comes_with_the_model_is_the_notes():
    study = Findings.from_json(json.loads((FOLDER / MEASURED).read_text(encoding="utf-8")))
    note = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"Share of {study.points[0].n} pictures" in note
    assert re.findall(r"^\| ([\d.]+) \| ([\d.]+) % \|", note, re.MULTILINE) == [
        (f"{one.strength:g}", f"{100 * one.mean:.1f}") for one in study.points
    ]
    assert f"{study.became_right} became right and {study.became_wrong} became wrong" in note
    assert study.points[0].n >= 500
    assert study.told
