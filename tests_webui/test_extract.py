"""From the loaded checkpoint and a reference to files that the host lists, by the API."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXACT, LORA, RANK, Report
from files import REFERENCE
from pictures import PROMPT, Offset, distance, known
from safetensors.torch import load_file, save_file
from server import Server

INT8 = "dpo-int8"


@pytest.fixture
def int8(server: Server) -> str:
    """The name of the exact LoRA, extracted by the API and known to the host."""
    server.do("extract", reference=REFERENCE, name=INT8, form="exact", overwrite=True)
    server.post("/sdapi/v1/refresh-loras")
    return INT8


def test_the_host_knows_every_key(server: Server, lora: dict) -> None:
    matched = lora["matched_keys"]
    assert matched["matched"] == matched["of"] > 0


def test_the_host_lists_it(server: Server, lora: dict) -> None:
    assert LORA in [entry["name"] for entry in server.get("/sdapi/v1/loras")]
    assert LORA in server.get("checkpoints")["offsets"]


def test_it_changes_a_picture(server: Server, lora: dict) -> None:
    assert distance(known(server), known(server, f"{PROMPT} <lora:{LORA}:1>")) > 0.1


@pytest.mark.parametrize(
    ("name", "settings"), [("dpo-fp8", {"rank": 16, "precision": "fp8"}), (INT8, {"form": "exact"})], ids=str
)
def test_the_hosts_own_loader_reads_the_numbers_that_are_in_it(
    server: Server, name: str, settings: dict[str, Any], report: Report
) -> None:
    """The same numbers, once in the file's form and once in float32 as a plain `diff`, by `<lora:…>` both times."""
    found = server.do("extract", reference=REFERENCE, name=name, overwrite=True, **settings)
    assert found["matched_keys"]["matched"] == found["matched_keys"]["of"] > 0
    folder = server.data / "models" / "Lora"
    biases = server.flavour.name != "AUTOMATIC1111"  # passes over those beside a LoKr
    save_file(_as_differences(folder / f"{name}.safetensors", biases=biases), folder / f"{name}-plain.safetensors")
    server.post("/sdapi/v1/refresh-loras")
    one, other = (known(server, f"{PROMPT} <lora:{name}{end}:1>") for end in ("", "-plain"))
    assert distance(known(server), one) > 0.1
    largest = int(np.abs(one.astype(int) - other.astype(int)).max())
    report.measure(f"{name}, by the host's loader in its form and in float32: largest difference of a pixel", largest, "of 255")
    assert largest <= 2


def test_an_exact_lora_draws_what_the_offset_file_draws(server: Server, exact: dict, int8: str, report: Report) -> None:
    for strength in (0.5, 1.0):
        one = known(server, f"{PROMPT} <lora:{int8}:{strength}>")
        other = known(server, offset=Offset(EXACT, strength))
        largest = int(np.abs(one.astype(int) - other.astype(int)).max())
        report.measure(f"exact LoRA and offset file at {strength}: largest difference of a pixel", largest, "of 255")
        assert largest <= 8
        assert distance(known(server), one) > 0.1


def test_how_much_of_the_function_a_lora_keeps(server: Server, lora: dict, exact: dict, int8: str, report: Report) -> None:
    """Measured with the host's own pipeline: part of it by a LoRA of low rank; not asked of one that holds all."""
    asked = {"prompts": [PROMPT, "a blue house"], "strengths": "1", "steps": 2, "width": 64, "height": 64, "function": True}
    found = server.do("compare", offset=LORA, **asked)
    report.measure(f"function kept by rank {RANK}", round(found["function_kept"], 4), f"of that of {found['function_of']}")
    assert 0 < found["function_kept"] < 0.98
    low, high = found["function_interval"]
    assert low <= found["function_kept"] <= high
    refused = server.ask("POST", "compare", {"offset": int8, **asked})
    assert "or this file is one itself" in refused.json()["detail"]


def _as_differences(path: Path, *, biases: bool) -> dict[str, torch.Tensor]:
    """Every matrix of a LoRA as a whole difference in float32, by LyCORIS' definitions."""
    lora = load_file(path)
    found = {}
    for key, tensor in lora.items():
        module, _, part = key.partition(".")
        if part == "lora_up.weight":
            down = lora[f"{module}.lora_down.weight"].float()
            product = tensor.float().flatten(1) @ down.flatten(1)
            scale = float(lora[f"{module}.alpha"]) / tensor.shape[1]
            found[f"{module}.diff"] = (scale * product).reshape(len(tensor), *down.shape[1:])
        elif part == "lokr_w2":
            found[f"{module}.diff"] = float(lora[f"{module}.lokr_w1"]) * tensor.float()
        elif part in ("w_norm", "b_norm", "diff") or (part == "diff_b" and biases):
            found[key] = tensor.float()
    return {key: tensor.contiguous() for key, tensor in found.items()}


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
