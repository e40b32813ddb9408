"""Our axes in the host's X/Y/Z plot, by its API."""

from __future__ import annotations

import pytest
from conftest import EXACT, LORA
from pictures import PROMPT, Offset, axes, distance, draw, grid, grid_args, known, same, xyz_info
from server import Server

pytestmark = pytest.mark.usefixtures("lora", "exact")
OURS = ["[DPO] Strength", "[DPO] Offset", "[DPO] Rank", "[DPO] Blocks", "[DPO] Method"]


def test_each_axis_is_there_once(server: Server) -> None:
    for img2img in (False, True):
        labels = next(arg for arg in xyz_info(server, img2img=img2img)["args"] if arg["label"] == "X type")["choices"]
        assert [labels.count(label) for label in OURS] == [1] * len(OURS)
    assert set(OURS) <= set(axes(server))


def test_strengths(server: Server) -> None:
    plain, full = known(server), known(server, offset=Offset(LORA))
    cells = grid(server, ("[DPO] Strength", ["0", "1", "0"]), offset=Offset(LORA, 0.3))
    first, second, third = cells.all
    assert same(first, plain)
    assert same(third, plain)
    assert same(second, full)
    assert "DPO strength: 1" in cells.infotexts[1]
    assert "DPO strength: 0" in cells.infotexts[2]
    assert same(draw(server), plain)


def test_strengths_of_an_offset_file(server: Server) -> None:
    first, second, third = grid(server, ("[DPO] Strength", ["0", "1", "0"]), offset=Offset(EXACT)).all
    assert same(first, known(server))
    assert same(third, first)
    assert same(second, known(server, offset=Offset(EXACT)))


def test_offsets(server: Server) -> None:
    """An axis switches a script on that is off; "None" leaves the model alone."""
    names = [LORA, f"{EXACT}.safetensors"]
    cells = grid(server, ("[DPO] Offset", names)).all
    assert same(cells[0], known(server, offset=Offset(LORA)))
    assert same(cells[1], known(server, offset=Offset(EXACT)))


def test_ranks(server: Server) -> None:
    low, all_of_it = grid(server, ("[DPO] Rank", ["1", "8"]), offset=Offset(LORA)).all
    plain, full = known(server), known(server, offset=Offset(LORA))
    assert distance(all_of_it, full) < 0.1 * distance(plain, full)
    assert not same(low, full)
    assert not same(low, plain)


def test_blocks(server: Server) -> None:
    cells = grid(server, ("[DPO] Blocks", ["ALL=0", "IN=0,MID=0", "ALL=1"]), offset=Offset(LORA)).all
    assert same(cells[0], known(server))
    assert same(cells[1], known(server, offset=Offset(LORA, blocks="IN=0,MID=0")))
    assert same(cells[2], known(server, offset=Offset(LORA)))


def test_methods(server: Server) -> None:
    off, lora, exact = grid(server, ("[DPO] Method", ["off", "LoRA", "exact"]), offset=Offset(LORA)).all
    assert same(off, known(server))
    assert same(lora, known(server, offset=Offset(LORA)))
    assert same(exact, known(server, offset=Offset(EXACT)))


def test_two_axes(server: Server) -> None:
    cells = grid(
        server, ("[DPO] Strength", ["0", "1"]), ("[DPO] Offset", [LORA, f"{EXACT}.safetensors"]), offset=Offset(LORA)
    ).all
    assert same(cells[0], cells[2])
    assert same(cells[1], known(server, offset=Offset(LORA)))
    assert same(cells[3], known(server, offset=Offset(EXACT)))


@pytest.mark.errors_logged
@pytest.mark.parametrize(
    ("label", "value"),
    [("Strength", "1000"), ("Offset", "no such file"), ("Rank", "0"), ("Blocks", "NOWHERE=1"), ("Method", "magic")],
)
def test_bad_values_are_refused_before_any_picture(server: Server, label: str, value: str) -> None:
    args = grid_args(server, (f"[DPO] {label}", [value]))
    body = {
        "prompt": PROMPT, "steps": 1, "width": 64, "height": 64, "script_name": "x/y/z plot", "script_args": args,
        "alwayson_scripts": Offset(LORA).args(),
    }  # fmt: skip
    answer = server.ask("POST", "/sdapi/v1/txt2img", body)
    assert answer.status_code >= 400
    assert f"[DPO] {label}" in answer.text
    assert value in answer.text
