"""Any request to the API, made from its own description: 2xx, or 4xx with a sentence, and never a folder of the server.

Pictures are of a host that draws squares. The long form is `make fuzz`.
"""

from __future__ import annotations

import json
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webui_files
from fastapi import FastAPI
from fastapi.testclient import TestClient
from fuzzing import inputs
from hypothesis import given
from hypothesis import strategies as st
from webui_files import fake

from lib_dpo.webui.api import add_routes
from lib_dpo.webui.session import Session

JSON = {"Content-Type": "application/json"}


class Api:
    """The API over a host of its own, and its description."""

    def __init__(self, folder: Path) -> None:
        self.session: Session = webui_files.open_session(webui_files.with_offsets(folder / "made"), folder / "models")
        self.folder = fake(self.session).folder
        self.app = FastAPI()
        add_routes(self.app, self.session)
        self.client = TestClient(self.app, raise_server_exceptions=False)
        self.description: dict[str, Any] = self.app.openapi()

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Method, path, and the schema of the body; {} where none is taken."""
        for path, methods in sorted(self.description["paths"].items()):
            for method, told in sorted(methods.items()):
                body = told.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
                yield method.upper(), path, self._whole(body)

    def _whole(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A schema with what it refers to."""
        for each in (schema, *schema.get("anyOf", ())):
            if "$ref" in each:
                found = self.description["components"]["schemas"][each["$ref"].rpartition("/")[2]]
                return dict(found)
        return schema


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Api:
    return Api(tmp_path_factory.mktemp("api"))


numbers = st.integers(-3, 5000) | st.floats() | st.sampled_from([0, 1, 8, 64, 1.5, 1e308, 10**400, -(10**18), 2**63, 1e-320])
texts = st.text(max_size=8) | st.sampled_from(
    [
        "", " ", "base", "other", "dpo", "exact", "xl", "dpo-sd1", "base.safetensors", "../x", "/etc/passwd", "a\0b", "\ud800",
        "nul", "x" * 300,
        "MID=0", "IN00=0.5", "ALL=0", "IN99=1", "1", "0.5, 1", "0-2 (+0.5)", "-1", "1e9", "fp16", "fp8", "exact",
        "full", "cpu", "cuda:7", "meta", "left", "skip", "Euler a", "9" * 5000, "\u202e", "{}", "(red:1.5) BREAK",
    ]
)  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
# what makes it likely that more than the first check is passed
LIKELY: dict[str, list[Any]] = {
    "base": ["base", "", "other"], "reference": ["dpo-sd1"], "offset": ["dpo", "exact", "xl"], "target": ["other", "", "base"],
    "name": ["new", "dpo"], "steps": [1, 2], "width": [64, 0], "height": [64, 0], "seeds": ["1", "1, 2"],
    "strengths": ["1", "0, 1"], "prompts": [["a cat"], ["a", "b"], ["fail"]], "rank": [None, 1, 2, 400],
    "overwrite": [True], "wait": [True], "strength": [0.5, 1], "blocks": ["", "MID=0"], "size_mb": [None], "energy": [None],
    "conv_rank": [None], "form": ["low-rank"], "sampler": [""],
}  # fmt: skip


def values(schema: dict[str, Any], name: str) -> st.SearchStrategy[Any]:
    """What a field may be given: something likely, something of its kind, or anything."""
    kinds = [each.get("type") for each in (schema, *schema.get("anyOf", ()))]
    own: list[st.SearchStrategy[Any]] = [anything]
    own += [numbers] if {"number", "integer"} & set(kinds) else []
    own += [texts] if "string" in kinds else []
    own += [st.booleans()] if "boolean" in kinds else []
    own += [st.lists(texts, max_size=3)] if "array" in kinds else []
    likely = [st.sampled_from(LIKELY[name])] * 6 if name in LIKELY else []
    return st.one_of(*likely, *own)


def bodies(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Bodies by a schema, most of them with all that it requires and no other fields."""
    properties = {name: values(own, name) for name, own in schema.get("properties", {}).items()}
    required = {name: properties.pop(name) for name in schema.get("required", ())}
    fitting = st.fixed_dictionaries(required, optional=properties)
    more = st.dictionaries(st.text(max_size=6), anything, max_size=2)
    return st.one_of(
        fitting, fitting, fitting, fitting, st.builds(lambda one, two: {**one, **two}, fitting, more), more, anything
    )


def asked(api: Api, method: str, url: str, content: bytes | None) -> Any:
    """The answer to a request, which has to be one of the kinds that there are."""
    answer = api.client.request(method, url, content=content, headers=JSON if content is not None else {})
    assert 200 <= answer.status_code < 500, (method, url, content, answer.text)
    told = json.loads(answer.text, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    if answer.status_code >= 400:
        assert answer.status_code in (400, 403, 404, 405, 409, 422), answer.text
        assert told["detail"], answer.text
        assert "should not happen" not in answer.text
    assert str(api.folder) not in answer.text
    assert str(api.folder.parent) not in answer.text
    return answer


@inputs(60)
@given(data=st.data())
def test_any_body_is_answered(api: Api, data: Any):
    operations = [row for row in api.operations() if row[2]]
    weighted = operations + [row for row in operations if row[1].endswith(("bake", "save", "extract"))]
    method, path, schema = data.draw(st.sampled_from(weighted))
    body = data.draw(bodies(schema))
    outside = set(api.folder.parent.iterdir())
    asked(api, method, path, json.dumps(body).encode())
    assert set(api.folder.parent.iterdir()) == outside
    assert not [path.name for path in api.folder.rglob("*") if path.name.endswith((".part", ".tmp"))], "something was left"
    _tidy(api)


def _tidy(api: Api) -> None:
    """Wait for what was begun, and take away what was written, so that no request changes what the next one finds."""
    for record in api.session.jobs.all():
        for _ in range(12_000):  # ten minutes
            if record.is_over:
                break
            time.sleep(0.05)
    assert all(record.is_over for record in api.session.jobs.all()), "a job hangs"
    assert not any("should not happen" in record.error for record in api.session.jobs.all())
    kept = {"dpo", "exact", "xl", "base", "other"}
    for folder in (api.session.host.lora_dir, api.session.host.checkpoint_dir, api.session.host.reference_dir):
        for path in folder.glob("*.*"):
            if path.is_file() and path.stem.split(".")[0] not in kept:
                path.unlink()


@inputs(60)
@given(data=st.data())
def test_any_bytes_and_any_address_are_answered(api: Api, data: Any):
    method, path, _ = data.draw(st.sampled_from(list(api.operations())))
    job = data.draw(st.text(max_size=8) | st.sampled_from(["..", "%00", "x" * 300, "nul"]))
    names = st.sampled_from(["name", "fingerprint", "wait", "x"])
    query = urllib.parse.urlencode(data.draw(st.lists(st.tuples(names, texts.filter(_sendable)), max_size=2)))
    content = data.draw(
        st.none()
        | st.binary(max_size=30)
        | st.text(st.sampled_from('{}[]",:0123456789.-+eENaInfinityultrsw \\'), max_size=30).map(str.encode)
        | st.sampled_from(
            [b'{"wait":' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 50_000, b"NaN", b"\xff", b'"\\ud800"', b"-0"]
        )
    )
    safe = urllib.parse.quote(job.encode("utf-8", "replace").decode(), safe="") or "x"
    asked(api, method, path.replace("{job_id}", safe) + (f"?{query}" if query else ""), content)
    _tidy(api)


def _sendable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
