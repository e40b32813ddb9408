"""Baking into the live model, taking it out bit for bit, and saving."""

from __future__ import annotations

import pytest
from conftest import EXACT, LORA, choose
from files import BASE, OTHER, TEXT_LORA, describe
from pictures import HIRES, PROMPT, Offset, distance, draw, known, request, same
from server import Server

pytestmark = pytest.mark.usefixtures("lora", "exact")
WITH_LORA = f"{PROMPT} <lora:{LORA}:1>"


def known_fingerprint(server: Server) -> dict[str, str]:
    """Of the clean base, asked for once of each process."""
    if "fingerprint" not in server.known:
        server.known["fingerprint"] = fingerprint(server)
    found: dict[str, str] = server.known["fingerprint"]
    return found


def fingerprint(server: Server) -> dict[str, str]:
    return dict(server.get("status", fingerprint=True)["fingerprint"])


@pytest.mark.parametrize("offset", [LORA, EXACT, TEXT_LORA])
def test_undo_is_exact(server: Server, offset: str) -> None:
    before, plain = known_fingerprint(server), known(server)
    baked = server.do("bake", offset=offset, strength=0.8)
    assert baked["tensors"] > 0
    assert server.get("status")["text"].endswith(f"baked: {baked['offset']} × 0.8")
    changed = draw(server)
    assert not same(changed, plain)
    assert fingerprint(server) != before
    assert server.do("unbake") == {"undone": True}
    assert server.get("status")["text"].endswith("clean")
    assert fingerprint(server) == before
    assert same(draw(server), plain)
    assert server.do("unbake") == {"undone": False}


def test_a_bake_before_the_models_first_picture(server: Server) -> None:
    """Some hosts change the dtype of weights when they first encode a prompt."""
    choose(server, OTHER)
    before, plain = fingerprint(server), draw(server)
    choose(server, BASE)
    try:
        server.post("/sdapi/v1/options", sd_model_checkpoint=OTHER)
        server.do("bake", offset=EXACT, strength=0.8)
        assert server.get("status")["model"]["file"] == OTHER
        assert not same(draw(server), plain)
        assert server.do("unbake") == {"undone": True}
        assert fingerprint(server) == before
        assert same(draw(server), plain)
    finally:
        choose(server, BASE)


def test_a_bake_is_like_the_script(server: Server) -> None:
    plain, scripted = known(server), known(server, offset=Offset(EXACT))
    server.do("bake", offset=EXACT, strength=1)
    assert distance(draw(server), scripted) < 0.1 * distance(plain, scripted)


def test_a_second_bake_takes_the_place_of_the_first(server: Server) -> None:
    before = known_fingerprint(server)
    server.do("bake", offset=EXACT, strength=0.5)
    half = fingerprint(server)
    server.do("bake", offset=EXACT, strength=1)
    server.do("bake", offset=EXACT, strength=0.5)
    assert fingerprint(server) == half
    server.do("unbake")
    assert fingerprint(server) == before


def test_loras_of_the_prompt_do_not_spoil_undo(server: Server) -> None:
    """Some hosts leave a prompt's LoRAs in the weights until the next picture: before the bake, in it, and at its end."""
    before, plain, prompted = known_fingerprint(server), known(server), known(server, WITH_LORA)
    draw(server, WITH_LORA)
    server.do("bake", offset=EXACT, strength=0.8)
    with_lora, baked = draw(server, WITH_LORA), draw(server)
    assert not same(with_lora, baked)
    assert not same(baked, plain)
    assert same(draw(server, WITH_LORA), with_lora)
    server.do("unbake")
    assert fingerprint(server) == before
    assert same(draw(server, WITH_LORA), prompted)
    assert same(draw(server), plain)
    assert fingerprint(server) == before


def test_the_script_on_top_of_a_bake(server: Server) -> None:
    before = known_fingerprint(server)
    scripted = known(server, offset=Offset(EXACT))
    server.do("bake", offset=EXACT, strength=0.5)
    baked = draw(server)
    on_top = draw(server, offset=Offset(EXACT, 0.5))
    assert not same(on_top, baked)
    assert same(draw(server), baked)
    server.do("unbake")
    assert distance(on_top, scripted) < 0.1 * distance(on_top, known(server))
    assert fingerprint(server) == before


def test_hires_of_a_baked_model(server: Server) -> None:
    options = HIRES | {"denoising_strength": 0.7}
    plain = known(server, **options)
    server.do("bake", offset=EXACT, strength=1)
    baked = draw(server, **options)
    assert not same(baked, plain)
    assert same(draw(server, **options), baked)
    server.do("unbake")
    assert same(draw(server, **options), plain)


def test_the_infotext_says_it(server: Server) -> None:
    server.do("bake", offset=LORA, strength=0.8)
    assert f"DPO baked: {LORA} x 0.8" in request(server).infotexts[0]
    server.do("unbake")
    assert "DPO baked" not in request(server).infotexts[0]


def test_save_as_checkpoint(server: Server) -> None:
    """The file that is written draws what the baked model draws: the host rounds neither more nor less."""
    name = "with-dpo"
    saved = server.do("save", name=name, offset=EXACT, strength=1, overwrite=True)
    try:
        assert saved["output"] == f"{name}.safetensors"
        assert name in [model["model_name"] for model in server.get("/sdapi/v1/sd-models")]
        plain = known(server)
        server.do("bake", offset=EXACT, strength=1)
        baked = draw(server)
        server.do("unbake")
        describe(server.data, saved["output"])
        choose(server, saved["output"])
        assert distance(draw(server), baked) < 0.1 * distance(plain, baked)
    finally:
        choose(server, BASE)
        (server.data / "models" / "Stable-diffusion" / f"{name}.safetensors").unlink(missing_ok=True)
        server.post("/sdapi/v1/refresh-checkpoints")
