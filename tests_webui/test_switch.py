"""Another checkpoint, another VAE: what the status says of a bake is true."""

from __future__ import annotations

import pytest
from conftest import EXACT, choose
from files import BASE, OTHER, OTHER_VAE
from pictures import draw, known, same
from server import Server
from test_bake import fingerprint, known_fingerprint


def test_another_checkpoint_while_baked(server: Server, exact: dict) -> None:
    _switch_and_back(server)


def test_another_checkpoint_read_into_the_same_model(full_server: Server) -> None:
    """Checkpoints without a description beside them are read into the model that is there."""
    if not full_server.flavour.any_width:
        pytest.skip("checkpoints of this host have no description beside them: the test before was this one")
    full_server.do("offset", reference="dpo-sd15", name=EXACT, precision="fp16", overwrite=True)
    _switch_and_back(full_server)


def _switch_and_back(server: Server) -> None:
    before, plain = known_fingerprint(server), known(server)
    choose(server, OTHER)
    other_before, other = fingerprint(server), draw(server)
    choose(server, BASE)
    server.do("bake", offset=EXACT, strength=1)
    baked = draw(server)
    choose(server, OTHER)
    assert server.get("status")["baked"] is None
    assert fingerprint(server) == other_before
    assert same(draw(server), other)
    assert server.do("unbake") == {"undone": False}
    choose(server, BASE)
    still = server.get("status")["baked"] is not None
    assert same(draw(server), baked if still else plain)
    assert server.do("unbake") == {"undone": still}
    assert fingerprint(server) == before
    assert same(draw(server), plain)


def test_a_request_with_another_checkpoint_leaves_the_work_on_the_chosen_one(server: Server, exact: dict) -> None:
    """A1111, reForge and Classic take the setting back, but keep its checkpoint in memory until the next picture."""
    before, plain = known_fingerprint(server), known(server)
    other = draw(server, override_settings={"sd_model_checkpoint": OTHER}, override_settings_restore_afterwards=True)
    assert not same(other, plain)
    server.do("bake", offset=EXACT, strength=1)
    status = server.get("status")
    assert status["baked"] is not None
    assert status["model"]["name"] == BASE.removesuffix(".safetensors")
    baked = draw(server)
    assert not same(baked, plain)
    assert server.get("status")["baked"] is not None, "the next picture is drawn with the bake in it"
    assert server.do("unbake") == {"undone": True}
    assert fingerprint(server) == before
    assert same(draw(server), plain)


def test_another_vae_while_baked(server: Server, exact: dict) -> None:
    if server.flavour.vae_of_checkpoint:
        pytest.skip("on this host a VAE is part of the choice of checkpoint: choosing one loads the model anew")
    before, plain = known_fingerprint(server), known(server)
    server.do("bake", offset=EXACT, strength=1)
    baked = draw(server)
    try:
        server.post("/sdapi/v1/options", sd_vae=OTHER_VAE)
        assert not same(draw(server), baked)
        assert server.get("status")["baked"]
    finally:
        server.post("/sdapi/v1/options", sd_vae="Automatic")
    if server.flavour.vae_comes_back:
        assert same(draw(server), baked)
    server.do("unbake")
    assert fingerprint(server) == before
    if not server.flavour.vae_comes_back:
        choose(server, OTHER)
        choose(server, BASE)
    assert same(draw(server), plain)
