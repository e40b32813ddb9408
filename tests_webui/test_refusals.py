"""What the API refuses, and that nothing changed then."""

from __future__ import annotations

import pytest
from conftest import EXACT, LORA
from files import BROKEN, REFERENCE, XL_LORA
from server import Server
from test_bake import fingerprint, known_fingerprint

pytestmark = pytest.mark.usefixtures("lora", "exact")


@pytest.mark.parametrize(
    ("offset", "status"),
    [
        ("no such file", 404), ("", 404), ("../Lora/dpo.safetensors", 404), ("/etc/passwd", 404),
        (BROKEN, 422), (f"{BROKEN}-offset", 404), (XL_LORA, 422),
    ],
)  # fmt: skip
def test_bad_offsets(server: Server, offset: str, status: int) -> None:
    before = known_fingerprint(server)
    for path, body in (("bake", {}), ("save", {"name": "never"})):
        answer = server.ask("POST", path, {"offset": offset} | body)
        assert answer.status_code == status, answer.text
        assert len(answer.json()["detail"]) > 20
    assert fingerprint(server) == before
    assert not (server.data / "models" / "Stable-diffusion" / "never.safetensors").exists()


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", "", "CON", "x" * 300])
def test_bad_names(server: Server, name: str) -> None:
    for path, body in (("extract", {"reference": REFERENCE}), ("save", {"offset": LORA}), ("offset", {"reference": REFERENCE})):
        answer = server.ask("POST", path, body | {"name": name})
        assert 400 <= answer.status_code < 500, (path, answer.text)
        assert answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {"strength": 1e39}, {"strength": "much"}, {"blocks": "NOWHERE=1"}, {"blocks": "IN"}, {"rank": 0}, {"rank": -1},
        {"strenght": 0.2}, {"strength": True}, {"strength": None}, {"rank": 1.5}, {"rank": "4"},
    ],
)  # fmt: skip
def test_bad_numbers(server: Server, body: dict) -> None:
    before = known_fingerprint(server)
    answer = server.ask("POST", "bake", {"offset": LORA} | body)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["detail"]
    assert fingerprint(server) == before


def test_files_are_not_overwritten_unasked(server: Server) -> None:
    pair = {"reference": REFERENCE}
    taken = (
        ("extract", pair | {"name": LORA}),
        ("offset", pair | {"name": EXACT}),
        ("save", {"name": "other", "offset": LORA}),
    )
    for path, body in taken:
        answer = server.ask("POST", path, body)
        assert 400 <= answer.status_code < 500
        assert "exists" in answer.json()["detail"]


def test_the_loaded_file_is_never_overwritten(server: Server) -> None:
    answer = server.ask("POST", "save", {"name": "base", "offset": LORA, "overwrite": True})
    assert 400 <= answer.status_code < 500
    assert "input" in answer.json()["detail"]


def test_unknown_jobs(server: Server) -> None:
    for method in ("GET", "DELETE"):
        assert server.ask(method, "jobs/no-such-job").status_code == 404
