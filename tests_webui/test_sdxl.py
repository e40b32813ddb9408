"""SDXL: two text encoders, of which one has its q, k and v in one weight; transposed projections; a size embedding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import choose, clean
from files import BASE, TEXT_LORA, XL_BASE, XL_REFERENCE, XL_TEXT_LORA, add_sdxl
from pictures import PROMPT, Offset, distance, draw, grid, known, same
from server import REPOSITORY, Server
from test_bake import fingerprint

LORA, EXACT = "xl-dpo", "xl-dpo-exact"
_CLIP_G = Path(__file__).resolve().parent / "micro_clip"


@pytest.fixture(scope="module")
def started(process: Server, folders: Any, webui: Path, pytestconfig: pytest.Config) -> Iterator[dict[str, Any]]:
    """An SDXL with a LoRA of it; what the extraction told."""
    small = process.flavour.any_width
    if not small and not pytestconfig.getoption("--webui-sdxl"):
        pytest.skip("this host takes an SDXL of the real size only: --webui-sdxl")
    data = folders(full=False)
    add_sdxl(data, process.flavour, webui)
    process.ensure(data, *(() if small else ("--unet-in-fp16",)), links=(_CLIP_G, REPOSITORY))
    clean(process)  # the host may still be loading what it starts with
    try:
        choose(process, XL_BASE)
        found: dict[str, Any] = process.do("extract", reference=XL_REFERENCE, name=LORA, rank=8, overwrite=True)
        yield found
    finally:
        choose(process, BASE)  # the next process starts with it, and without this CLIP-G


@pytest.fixture
def xl(process: Server, started: dict[str, Any]) -> Iterator[Server]:
    """A clean SDXL; afterwards nothing of ours may have been printed as an error."""
    if process.get("status")["baked"]:
        process.post("unbake")
    before = len(process.tracebacks())
    yield process
    assert not process.tracebacks()[before:]


def test_every_key_is_known_to_the_host(xl: Server, started: dict[str, Any]) -> None:
    assert xl.get("status")["text"] == "xl-base · SDXL · clean"
    assert started["architecture"] == "sdxl"
    matched = started["matched_keys"]
    assert matched["matched"] == matched["of"] > 2000


def test_strength_1_is_the_lora_in_the_prompt(xl: Server) -> None:
    prompted = draw(xl, f"{PROMPT} <lora:{LORA}:1>")
    assert not same(prompted, known(xl))
    assert same(draw(xl, offset=Offset(LORA)), prompted)
    assert same(draw(xl, offset=Offset(LORA, 0.0)), known(xl))


def test_a_lora_of_both_text_encoders(xl: Server) -> None:
    prompted = draw(xl, f"{PROMPT} <lora:{XL_TEXT_LORA}:1>")
    assert not same(prompted, known(xl))
    assert same(draw(xl, offset=Offset(XL_TEXT_LORA)), prompted)
    assert same(draw(xl), known(xl))


@pytest.mark.parametrize("offset", [LORA, EXACT, XL_TEXT_LORA])
def test_a_bake_is_like_the_script_and_undo_is_exact(xl: Server, offset: str) -> None:
    if offset == EXACT:
        if not xl.flavour.any_width:
            pytest.skip("of the real size it takes 25 GB of memory")
        xl.do("offset", reference=XL_REFERENCE, name=EXACT, precision="fp32", overwrite=True)
    before, plain, scripted = fingerprint(xl), known(xl), draw(xl, offset=Offset(offset))
    baked = xl.do("bake", offset=offset, strength=1)
    assert baked["not_applied"] == []
    changed = fingerprint(xl)
    assert (changed["unet"] != before["unet"], changed["te"] != before["te"]) == (
        (False, True) if offset == XL_TEXT_LORA else (True, False)
    )
    assert distance(draw(xl), scripted) < 0.1 * distance(plain, scripted)
    assert xl.do("unbake") == {"undone": True}
    assert fingerprint(xl) == before
    assert same(draw(xl), plain)


def test_cells_of_a_grid(xl: Server) -> None:
    cells = grid(xl, ("[DPO] Strength", ["0", "0.5", "1"]), offset=Offset(LORA)).all
    assert same(cells[0], known(xl))
    assert same(cells[2], draw(xl, offset=Offset(LORA)))
    assert not same(cells[1], cells[2])


def test_the_saved_checkpoint_draws_what_the_bake_draws(xl: Server) -> None:
    name = "xl-with-dpo"
    models = xl.data / "models" / "Stable-diffusion"
    xl.do("save", name=name, offset=LORA, strength=1, overwrite=True)
    try:
        xl.do("bake", offset=LORA, strength=1)
        baked = draw(xl)
        xl.do("unbake")
        choose(xl, f"{name}.safetensors")
        assert xl.get("status")["text"] == f"{name} · SDXL · clean · its file holds {LORA} × 1"
        assert distance(draw(xl), baked) < 0.1 * distance(known(xl), baked)
    finally:
        choose(xl, XL_BASE)
        for file in models.glob(f"{name}.*"):
            file.unlink()
        xl.post("/sdapi/v1/refresh-checkpoints")


def test_an_offset_of_sd_1_is_refused(xl: Server) -> None:
    answer: httpx.Response = xl.ask("POST", "bake", {"offset": TEXT_LORA, "strength": 1})
    assert answer.status_code == 422
    assert "SD 1.x" in answer.json()["detail"]
    assert "SDXL" in answer.json()["detail"]
