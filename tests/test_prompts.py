"""Prompts with weights, BREAK and many words on the standalone host: what is read, and what the pipeline is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fakes_standalone import tokenizer

from lib_dpo.errors import SettingError
from lib_dpo.families.model import open_model
from lib_dpo.hosts.prompts import arguments, parse

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2


def _read(prompt: str) -> list[list[tuple[str, float]]]:
    return [[(each.text, round(each.weight, 4)) for each in part] for part in parse(prompt)]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a red cat", [("a red cat", 1)]),
        ("", []),
        ("a (red:1.5) cat", [("a ", 1), ("red", 1.5), (" cat", 1)]),
        ("a (red) [cat]", [("a ", 1), ("red", 1.1), (" ", 1), ("cat", 0.9091)]),
        ("((red))", [("red", 1.21)]),
        ("((red:2) cat:0.5)", [("red", 1.0), (" cat", 0.5)]),
        (r"a cat \(black\)", [("a cat (black)", 1)]),
        ("a (red cat", [("a ", 1), ("red cat", 1.1)]),
        ("a red) cat", [("a red) cat", 1)]),
        ("a (red: 1.25 ) cat", [("a ", 1), ("red", 1.25), (" cat", 1)]),
        ("time 12:30", [("time 12:30", 1)]),
        ("(ratio 1:2)", [("ratio 1", 2)]),  # as a WebUI reads it
        ("(:.5) a", [(" a", 1)]),
        ("[(]b", [("b", 1.1)]),  # each kind of bracket by itself
    ],
)
def test_weights_are_read_as_webuis_read_them(prompt: str, wanted: list[tuple[str, float]]):
    (part,) = _read(prompt)
    assert part == wanted


def test_break_parts_a_prompt_and_breakfast_does_not():
    assert _read("a cat BREAK (red:2)") == [[("a cat", 1)], [("red", 2)]]
    assert _read("a BREAKFAST, a break") == [[("a BREAKFAST, a break", 1)]]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a cat <lora:dpo:1>", "<lora:dpo:1>"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5]"),
        ("a [cat|dog]", "[cat|dog]"),
        ("a cat AND a dog", "AND"),
        ("a (cat:-1)", "weight -1"),
        ("a (cat:99)", "weight 99"),
    ],
)
def test_what_only_webuis_know_is_refused_by_name(prompt: str, named: str):
    with pytest.raises(SettingError) as caught:
        parse(prompt)
    assert named in str(caught.value)


# ---- what the pipeline is given ----


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("compel")
    from lib_dpo.hosts.pipeline import open_pipeline

    folder = tmp_path_factory.mktemp(request.param)
    with open_model(tiny.save(folder / "model.safetensors", tiny.base(request.param))) as model:
        return open_pipeline(model, tokenizer(folder / "tokenizer")).pipeline


def _plain(pipeline: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """diffusers' own embeddings."""
    found = pipeline.encode_prompt(
        prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )  # fmt: skip
    return found[0], found[2] if len(found) > 2 else None


@pytest.mark.newest
def test_plain_prompts_go_as_they_are(pipeline: Any):
    assert arguments(pipeline, r"a \(b\)", "c") == {"prompt": "a (b)", "negative_prompt": "c"}


@pytest.mark.newest
def test_a_weight_moves_its_words_away_from_an_empty_prompt(pipeline: Any):
    """By hand: each token of the word is the empty prompt's + weight x (its own - the empty prompt's)."""
    found = arguments(pipeline, "a (b:1.5) c", "c")
    own, pooled = _plain(pipeline, "a b c")
    empty, _ = _plain(pipeline, "")
    wanted = own.clone()
    wanted[:, 2] = empty[:, 2] + 1.5 * (own[:, 2] - empty[:, 2])
    assert torch.allclose(found["prompt_embeds"], wanted, atol=1e-5)
    assert torch.allclose(found["negative_prompt_embeds"], _plain(pipeline, "c")[0], atol=1e-5)
    if pooled is not None:
        assert torch.allclose(found["pooled_prompt_embeds"], pooled, atol=1e-5)
        assert torch.allclose(found["negative_pooled_prompt_embeds"], _plain(pipeline, "c")[1], atol=1e-5)


@pytest.mark.newest
def test_break_puts_one_embedding_behind_the_other(pipeline: Any):
    found = arguments(pipeline, "a BREAK b", "c")
    wanted = torch.cat([_plain(pipeline, "a")[0], _plain(pipeline, "b")[0]], dim=1)
    assert torch.allclose(found["prompt_embeds"], wanted, atol=1e-5)
    assert found["negative_prompt_embeds"].shape == wanted.shape
    assert torch.allclose(found["negative_prompt_embeds"][:, 77:], _plain(pipeline, "")[0], atol=1e-5)


@pytest.mark.newest
def test_a_long_prompt_is_not_cut(pipeline: Any):
    found = arguments(pipeline, "a b c " * 40, "")
    assert found["prompt_embeds"].shape[1] == 2 * 77
    other = arguments(pipeline, "a b c " * 39 + "c c c", "")
    assert not torch.allclose(found["prompt_embeds"], other["prompt_embeds"])


@pytest.mark.newest
def test_pictures_follow_the_weight(pipeline: Any, tmp_path: Path):
    def draw(prompt: str) -> Any:
        given = arguments(pipeline, prompt, "c")
        made = torch.Generator().manual_seed(1)
        return pipeline(**given, num_inference_steps=2, width=32, height=32, output_type="pt", generator=made).images[0]

    assert not torch.equal(draw("a (b:2) c"), draw("a b c"))
