"""Nothing in a request to the API is dropped, converted or guessed, with pydantic 1 and 2 alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_host import FakeHost
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib_dpo.errors import SettingError
from lib_dpo.settings import RankPolicy, check
from lib_dpo.webui.api import PREFIX, add_routes
from lib_dpo.webui.session import Session

JSON = {"Content-Type": "application/json"}
POSTS = ("analyse", "extract", "offset", "bake", "unbake", "save", "compare", "compat", "jobs/x/cancel")
BAKE, EXTRACT = {"offset": "dpo"}, {"reference": "dpo-sd1", "name": "x"}
COMPARE = {"offset": "dpo", "prompts": ["a cat"]}
PASSED = 404  # this host has no files: what is refused for its name only was taken


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    app = FastAPI()
    add_routes(app, Session(FakeHost(tmp_path)))
    return TestClient(app)


def send(client: TestClient, path: str, content: str, method: str = "POST") -> tuple[int, str]:
    answer = client.request(method, f"{PREFIX}/{path}", content=content.encode(), headers=JSON)
    return answer.status_code, answer.json().get("detail")


def refused(client: TestClient, path: str, body: dict[str, Any] | str) -> str:
    status, detail = send(client, path, body if isinstance(body, str) else json.dumps(body))
    assert status == 422, detail
    assert isinstance(detail, str)  # a sentence
    return detail


@pytest.mark.parametrize("path", POSTS)
def test_an_unknown_field_is_refused_on_every_route(client: TestClient, path: str):
    assert f"POST /{path.replace('jobs/x', 'jobs/{job_id}')}: 'strenhgt' is unknown" in refused(client, path, {"strenhgt": 1})


def test_a_misspelt_field_is_told_its_nearest(client: TestClient):
    told = refused(client, "bake", BAKE | {"strenght": 0.2})
    assert told == ("POST /bake: 'strenght' is unknown; did you mean strength? it takes offset, strength, blocks, rank, wait")
    assert "did you mean cfg_scale?" in refused(client, "compare", COMPARE | {"cfg_scal": 5})


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("bake", BAKE | {"rank": 1.5}, "rank 1.5 is not a whole number"),
        ("bake", BAKE | {"rank": True}, "rank true is not a whole number"),
        ("bake", BAKE | {"rank": "64"}, 'rank "64" is not a whole number'),
        ("bake", BAKE | {"strength": True}, "strength true is not a number"),
        ("bake", BAKE | {"strength": "0.5"}, 'strength "0.5" is not a number'),
        ("bake", BAKE | {"strength": None}, "strength null is not a number"),
        ("bake", BAKE | {"strength": 10**400}, "is not a number"),
        ("bake", BAKE | {"blocks": None}, "blocks null is not text"),
        ("bake", BAKE | {"wait": "no"}, 'wait "no" is not true or false'),
        ("bake", BAKE | {"wait": 0}, "wait 0 is not true or false"),
        ("bake", {"offset": None}, "offset null is not text"),
        ("bake", {"offset": 5}, "offset 5 is not text"),
        ("bake", {}, "offset is missing; expected text, LoRA or offset file, by name"),
        ("save", BAKE | {"name": "x", "overwrite": "false"}, 'overwrite "false" is not true or false'),
        ("extract", EXTRACT | {"rank": 64.5}, "rank 64.5 is not a whole number"),
        ("extract", EXTRACT | {"seed": 0.5}, "seed 0.5 is not a whole number"),
        ("extract", EXTRACT | {"energy": "0.9"}, 'energy "0.9" is not a number'),
        ("extract", {"reference": "a", "name": ["x"]}, 'name ["x"] is not text'),
        ("compare", COMPARE | {"prompts": "a cat"}, 'prompts "a cat" is not a list of texts'),
        ("compare", COMPARE | {"prompts": ["a cat", None]}, 'prompts ["a cat", null] is not a list of texts'),
        ("compare", COMPARE | {"prompts": [{"a": 1}]}, 'prompts [{"a": 1}] is not a list of texts'),
        ("compare", COMPARE | {"seeds": 5}, "seeds 5 is not text"),
        ("compare", COMPARE | {"steps": 20.5}, "steps 20.5 is not a whole number"),
        ("unbake", {"wait": None}, "wait null is not true or false"),
    ],
)  # fmt: skip
def test_values_are_of_their_kind(client: TestClient, path: str, body: dict[str, Any], said: str):
    assert said in refused(client, path, body)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_finite_number_is_refused(client: TestClient, number: str):
    assert "is not a number" in refused(client, "bake", f'{{"offset": "dpo", "strength": {number}}}')
    assert "is not a whole number" in refused(client, "bake", f'{{"offset": "dpo", "rank": {number}}}')


def test_a_field_twice_and_what_is_no_object(client: TestClient):
    assert "strength is given twice" in refused(client, "bake", '{"offset": "dpo", "strength": 0.1, "strength": 1}')
    for body in ("[]", "5", '"dpo"', "null"):
        assert "is no JSON object" in refused(client, "bake", body)
    assert "'??' is unknown" in refused(client, "bake", r'{"\ud800\u0007": 1}')


@pytest.mark.parametrize("body", ["{", "nonsense", '{"offset": 1' + "0" * 5000 + "}", "[" * 100_000])
def test_what_cannot_be_read_is_refused(client: TestClient, body: str):
    answer = client.post(f"{PREFIX}/bake", content=body.encode(), headers=JSON)
    assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("bake", BAKE | {"rank": None}),
        ("bake", BAKE | {"rank": 4.0, "strength": 1}),  # JSON has one kind of number
        ("bake", BAKE | {"strength": 0.5, "blocks": "IN=0.5"}),
        ("compare", COMPARE | {"cfg_scale": 7, "steps": 4, "width": 64, "height": 64}),
    ],
)
def test_what_is_right_is_taken(client: TestClient, path: str, body: dict[str, Any]):
    status, detail = send(client, path, json.dumps(body))
    assert (status, "no offset named 'dpo'" in detail) == (PASSED, True), detail


def test_undo_and_cancel_want_no_body(client: TestClient):
    for body in ("", "{}", "null"):
        assert send(client, "unbake", body)[0] == 200
        assert send(client, "jobs/x/cancel", body)[0] == 404
        assert send(client, "jobs/x", body, "DELETE")[0] == 404
    assert "'hard' is unknown" in send(client, "jobs/x", '{"hard": true}', "DELETE")[1]


@pytest.mark.parametrize(
    ("method", "query", "said"),
    [
        ("GET", "status?fingerprnt=true", "did you mean fingerprint?"),
        ("GET", "checkpoints?kind=lora", "'kind' is unknown; it takes none"),
        ("GET", "inspect?nam=x", "did you mean name?"),
        ("GET", "inspect?name=x&name=y", "name is given twice"),
        ("GET", "jobs?all=1", "'all' is unknown"),
        ("GET", "jobs/x?wait=1", "'wait' is unknown"),
        ("POST", "bake?strength=0.2", "'strength' is unknown; it takes none"),
    ],
)
def test_parameters_of_the_address_too(client: TestClient, method: str, query: str, said: str):
    status, detail = send(client, query, json.dumps(BAKE), method)
    assert status == 422
    assert said in detail


def test_the_description_says_what_is_taken(client: TestClient):
    found = client.get("/openapi.json").json()
    schemas = found["components"]["schemas"]
    bodies = {name: schema for name, schema in schemas.items() if name.endswith("Request")}
    assert len(bodies) == 10
    assert all(schema["additionalProperties"] is False for schema in bodies.values())
    bake = bodies["BakeRequest"]
    assert bake["required"] == ["offset"]
    assert set(bake["properties"]) == {"offset", "strength", "blocks", "rank", "wait"}
    assert bake["properties"]["strength"]["type"] == "number"
    answers = found["paths"][f"{PREFIX}/bake"]["post"]["responses"]
    assert {"200", "404", "409", "422"} <= set(answers)
    assert answers["422"]["content"]["application/json"]["schema"]["$ref"].endswith("Refusal")


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 1.5), ("rank", True), ("rank", "64"), ("strength", "1"), ("strength", True), ("strength", 10**400),
     ("seed", float("nan")), ("device", 0), ("profile", ["full"])],
)  # fmt: skip
def test_settings_take_nothing_for_a_number_that_is_none(name: str, value: Any):
    with pytest.raises(SettingError, match=name):
        check(name, value)


def test_a_rank_of_a_half_is_refused_for_every_caller():
    with pytest.raises(SettingError, match=r"rank 1\.5 is not a whole number"):
        RankPolicy(rank=1.5)  # type: ignore[arg-type]
