"""From the loaded checkpoint and a reference to files that the host lists, by the API."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import EXACT, LORA
from files import REFERENCE
from pictures import PROMPT, distance, known
from server import Server


def test_the_host_knows_every_key(server: Server, lora: dict) -> None:
    matched = lora["matched_keys"]
    assert matched["matched"] == matched["of"] > 0


def test_the_host_lists_it(server: Server, lora: dict) -> None:
    assert LORA in [entry["name"] for entry in server.get("/sdapi/v1/loras")]
    assert LORA in server.get("checkpoints")["offsets"]


def test_it_changes_a_picture(server: Server, lora: dict) -> None:
    assert distance(known(server), known(server, f"{PROMPT} <lora:{LORA}:1>")) > 0.1


def test_the_pair_is_judged(server: Server) -> None:
    assert server.do("analyse", reference=REFERENCE)["diff"]["verdict"]["level"] == "fits"


def test_the_offset_file_is_listed(server: Server, exact: dict) -> None:
    assert f"{EXACT}.safetensors" in server.get("checkpoints")["offsets"]
    assert server.get("inspect", name=EXACT)["kind"] == "offset"


@pytest.mark.parametrize("how", ["the host's Interrupt", "DELETE of the job"])
def test_interrupting_leaves_no_file(server: Server, how: str) -> None:
    before = _files(server)
    job = server.post("extract", reference=REFERENCE, name="halfway", method="exact", rank=16, wait=False)["id"]
    _until(lambda: server.get(f"jobs/{job}")["progress"] > 0, "the extraction began")
    if how == "DELETE of the job":
        server.ask("DELETE", f"jobs/{job}")
    else:
        server.post("/sdapi/v1/interrupt")
    _until(lambda: server.get(f"jobs/{job}")["state"] not in ("waiting", "running"), "the extraction ended")
    assert server.get(f"jobs/{job}")["state"] == "cancelled"
    assert _files(server) == before


def test_a_second_click_is_refused(server: Server) -> None:
    body = {"reference": REFERENCE, "name": "twice", "method": "exact", "rank": 16, "wait": False}
    job = server.post("extract", **body)["id"]
    try:
        answer = server.ask("POST", "extract", body)
        assert answer.status_code == 409
        assert "running" in answer.json()["detail"]
    finally:
        server.ask("DELETE", f"jobs/{job}")
        _until(lambda: server.get(f"jobs/{job}")["state"] not in ("waiting", "running"), "the extraction ended")


def _files(server: Server) -> list[Path]:
    return sorted((server.data / "models" / "Lora").rglob("*"))


def _until(condition: object, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"not after {seconds} s: {what}"
        time.sleep(0.02)
