"""The HTTP API over a host without a WebUI: results, refusals as 4xx with the sentence, jobs, and --api-auth."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import webui_files
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from webui_files import fake

from lib_dpo.webui.api import PREFIX, add_routes
from lib_dpo.webui.session import Session

PAIR = {"base": "base", "reference": "dpo-sd1"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return webui_files.make(tmp_path_factory.mktemp("api"))


@pytest.fixture
def session(files: Path, tmp_path: Path) -> Session:
    return webui_files.open_session(files, tmp_path / "models")


def client_of(session: Session) -> TestClient:
    app = FastAPI()
    add_routes(app, session)
    return TestClient(app)


@pytest.fixture
def client(session: Session) -> TestClient:
    return client_of(session)


def get(client: TestClient, path: str, **params: Any) -> Any:
    answer = client.get(PREFIX + path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(client: TestClient, path: str, body: dict[str, Any] | None = None) -> Any:
    answer = client.post(PREFIX + path, json=body or {})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, path: str, body: dict[str, Any], status: int, message: str) -> None:
    answer = client.post(PREFIX + path, json=body)
    assert answer.status_code == status, answer.text
    assert message in str(answer.json()["detail"]), answer.text


def test_extract_bake_undo_and_save(session: Session, client: TestClient):
    clean = get(client, "/status", fingerprint=True)
    assert clean["text"] == "base · SD 1.x · clean"
    found = post(client, "/extract", {**PAIR, "name": "dpo", "rank": 4})
    assert found["state"] == "done"
    assert 0 < found["result"]["energy_kept"] < 1
    assert found["result"]["matched_keys"]["matched"] == found["result"]["matched_keys"]["of"]
    assert get(client, "/checkpoints")["offsets"] == ["dpo", "xl"]
    baked = post(client, "/bake", {"offset": "dpo", "strength": 0.5, "blocks": "MID=0"})["result"]
    assert baked["blocks"] == "MID=0"
    status = get(client, "/status", fingerprint=True)
    assert status["baked"]["strength"] == 0.5
    assert status["fingerprint"]["unet"] != clean["fingerprint"]["unet"]
    assert status["fingerprint"]["te"] == clean["fingerprint"]["te"]
    saved = post(client, "/save", {"name": "mine", "offset": "dpo", "strength": 0.5})["result"]
    assert saved["output"] == "mine.safetensors"
    assert "mine.safetensors" in get(client, "/checkpoints")["checkpoints"]
    assert post(client, "/unbake")["result"] == {"undone": True}
    assert get(client, "/status", fingerprint=True)["fingerprint"] == clean["fingerprint"]


def test_looking_at_files(client: TestClient):
    verdict = post(client, "/analyse", PAIR)["result"]["diff"]["verdict"]
    assert verdict["level"] == "fits"
    assert post(client, "/compat", {**PAIR, "target": "other"})["result"]["verdict"]["level"] == "weaker"
    found = get(client, "/inspect", name="xl")
    assert (found["kind"], found["architecture"], found["path"]) == ("lora", "sdxl", "xl.safetensors")
    assert post(client, "/offset", {**PAIR, "name": "exact"})["result"]["output"] == "exact.safetensors"


def test_compare_gives_one_grid(client: TestClient):
    post(client, "/extract", {**PAIR, "name": "dpo", "rank": 4})
    body = {"offset": "dpo", "prompts": ["a cat", "a dog"], "seeds": "1, 2", "strengths": "1", "width": 64, "height": 64}
    found = post(client, "/compare", body)["result"]
    image = Image.open(io.BytesIO(base64.b64decode(found["grid"])))
    assert image.width > 2 * 64
    assert image.height > 4 * 64
    assert "a cat" in found["infotext"]
    assert [row["variant"] for row in found["effects"]] == ["strength 1"]
    post(client, "/bake", {"offset": "dpo"})
    refused(client, "/compare", body, 422, "undo it first")


@pytest.mark.parametrize("wait", [True, False])
def test_messages_name_files_without_the_folders_of_the_server(session: Session, client: TestClient, wait: bool):
    (session.host.lora_dir / "broken.safetensors").write_bytes(b"no such thing")
    answer = client.post(PREFIX + "/bake", json={"offset": "broken", "wait": wait})
    assert answer.status_code == (422 if wait else 200)
    jobs = settled(client)
    assert jobs[0]["error"].startswith("broken.safetensors: ")
    assert str(fake(session).folder) not in answer.text + str(jobs)


def settled(client: TestClient) -> Any:
    """All jobs, once none runs any more."""
    for _ in range(200):
        jobs = get(client, "/jobs")
        if all(job["state"] in ("done", "failed", "cancelled") for job in jobs):
            return jobs
        time.sleep(0.05)
    raise AssertionError(jobs)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/extract", {**PAIR, "name": "../evil"}, 422, "folders"),
        ("/extract", {**PAIR, "name": "nul"}, 422, "reserved"),
        ("/extract", {**PAIR, "name": "xl"}, 422, "exists already"),
        ("/extract", {**PAIR, "name": "x", "rank": 0}, 422, "too small"),
        ("/extract", {**PAIR, "name": "x", "rank": 4, "energy": 0.5}, 422, "exclude one another"),
        ("/extract", {**PAIR, "name": "x", "method": "magic"}, 422, "unknown"),
        ("/extract", {"base": "base", "reference": "/etc/passwd", "name": "x"}, 404, "no DPO reference named"),
        ("/extract", {"base": "base", "reference": "base", "name": "x"}, 422, "same file"),
        ("/bake", {"offset": "nothing"}, 404, "no offset named"),
        ("/bake", {"offset": "xl"}, 422, "is an offset for SDXL"),
        ("/bake", {"offset": "../xl"}, 404, "no offset named"),
        ("/bake", {"offset": "xl", "strength": "much"}, 422, "strength"),
        ("/save", {"name": "a/b", "offset": "xl"}, 422, "folders"),
        ("/save", {"name": "base", "offset": "xl"}, 422, "offset for SDXL"),
        ("/compat", {**PAIR, "target": "..\\x"}, 404, "no file named"),
        ("/compare", {"offset": "xl", "prompts": []}, 422, "prompt"),
        ("/compare", {"offset": "xl", "prompts": ["a"], "strengths": "lots"}, 422, "neither a number nor a range"),
    ],
)
def test_refusals_say_why_and_change_nothing(
    session: Session, client: TestClient, path: str, body: dict[str, Any], status: int, message: str
):
    before, weights = tiny.snapshot(fake(session).folder), session.host.live.fingerprint()
    refused(client, path, body, status, message)
    assert tiny.snapshot(fake(session).folder) == before
    assert session.host.live.fingerprint() == weights


def test_without_a_model(session: Session, client: TestClient):
    fake(session).live.path = None
    assert get(client, "/status")["model"] is None
    refused(client, "/bake", {"offset": "xl"}, 409, "no checkpoint is loaded yet")


def test_damaged_and_vanished_offsets(session: Session, client: TestClient):
    (fake(session).lora_dir / "bad.safetensors").write_bytes(b'\x10\0\0\0\0\0\0\0{"a":')
    refused(client, "/bake", {"offset": "bad"}, 422, "bad.safetensors")
    entries = fake(session).loras()
    fake(session).loras = lambda: entries  # type: ignore[method-assign]
    (fake(session).lora_dir / "xl.safetensors").unlink()
    refused(client, "/bake", {"offset": "xl"}, 404, "has vanished")


@pytest.mark.parametrize(
    ("path", "body"), [("/extract", {"rank": 4}), ("/offset", {}), ("/save", {"offset": "dpo", "strength": 1})]
)
def test_a_full_disk_is_said_and_leaves_nothing(
    session: Session, client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
):
    post(client, "/extract", PAIR | {"name": "dpo", "rank": 4})
    folders = (session.host.lora_dir, session.host.checkpoint_dir, session.host.reference_dir)
    before = [sorted(folder.rglob("*")) for folder in folders]
    monkeypatch.setattr("lib_dpo.files.atomic.shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    sources = {} if path == "/save" else PAIR
    refused(client, path, {**sources, **body, "name": "new"}, 422, "free some space")
    assert [sorted(folder.rglob("*")) for folder in folders] == before


def test_a_job_can_be_polled_and_cancelled(session: Session, client: TestClient):
    held = threading.Event()
    extract, before = session.extract, tiny.snapshot(fake(session).folder)

    def slow(job: Any, **options: Any) -> Any:
        held.wait(10)
        return extract(job, **options)

    session.extract = slow  # type: ignore[method-assign]
    job = post(client, "/extract", {**PAIR, "name": "dpo", "rank": 4, "wait": False})
    assert job["state"] in ("waiting", "running")
    refused(client, "/extract", {**PAIR, "name": "dpo", "rank": 4, "wait": False}, 409, "running or waiting already")
    assert get(client, "/jobs")[0]["id"] == job["id"]
    assert client.delete(f"{PREFIX}/jobs/{job['id']}").status_code == 200
    held.set()
    while (state := get(client, f"/jobs/{job['id']}"))["state"] not in ("done", "failed", "cancelled"):
        time.sleep(0.02)
    assert (state["state"], state["error"]) == ("cancelled", "")
    assert tiny.snapshot(fake(session).folder) == before
    assert client.get(f"{PREFIX}/jobs/none").status_code == 404


def test_api_auth_is_asked_for_on_every_route(session: Session):
    fake(session).auth = {"me": "secret"}
    client = client_of(session)
    paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) >= 12
    for path, methods in paths.items():
        for method in methods:
            url = path.replace("{job_id}", "x")
            assert client.request(method, url, json={}).status_code == 401, path
            assert client.request(method, url, json={}, auth=("me", "wrong")).status_code == 401, path
            assert client.request(method, url, json={}, auth=("nobody", "")).status_code == 401, path
    assert client.get(PREFIX + "/status", auth=("me", "secret")).status_code == 200


def test_every_route_is_described_and_no_handler_blocks_the_server(session: Session):
    import inspect

    app = FastAPI()
    add_routes(app, session)
    ours = [route for route in app.routes if getattr(route, "path", "").startswith(PREFIX)]
    assert all(route.summary and not inspect.iscoroutinefunction(route.endpoint) for route in ours)  # type: ignore[attr-defined]
    names = {route.path[len(PREFIX) :] for route in ours}  # type: ignore[attr-defined]
    wanted = "status checkpoints analyse extract bake unbake save compare inspect compat jobs/{job_id}"
    assert {f"/{name}" for name in wanted.split()} <= names


def test_the_list_of_jobs_stands_whatever_ran_before(session: Session, client: TestClient):
    session.jobs.run("tab", lambda job: object())
    escaped = json.dumps({**PAIR, "name": "\ud800"})  # a lone surrogate, as JSON may hold it
    answer = client.post(f"{PREFIX}/offset", content=escaped, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    refused(client, "/compare", {"offset": "xl", "prompts": ["a"], "cfg_scale": float("1e6")}, 422, "too large")
    post(client, "/analyse", PAIR)
    listed = get(client, "/jobs")
    assert [row["state"] for row in listed][-1] == "done"
    assert all("result" not in row for row in listed)
    assert get(client, f"/jobs/{listed[-1]['id']}")["result"]["diff"]["architecture"] == "sd1"


def test_results_are_plain_json(client: TestClient):
    """Figures such as NaN would break the answer."""
    found = post(client, "/analyse", {**PAIR, "spectra": True})["result"]
    assert found["diff"]["spectra"]["rank"]["energy"][0] > 0
    assert torch.isfinite(torch.tensor(found["diff"]["noise_floor"]))
