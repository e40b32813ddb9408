"""Other ways to start the WebUI; each test restarts it."""

from __future__ import annotations

from typing import Any

from conftest import LORA
from pictures import Offset, axes, draw, grid, same
from server import Server
from test_xyz import OURS

ACCOUNT = ("someone", "password")
ROUTES = {
    "/status", "/checkpoints", "/analyse", "/extract", "/offset", "/bake", "/unbake", "/save", "/compare", "/inspect",
    "/compat", "/jobs", "/jobs/{job_id}", "/jobs/{job_id}/cancel", "/blind/start", "/blind/pair", "/blind/vote",
    "/blind/figures", "/blind/votes",
}  # fmt: skip


def _routes(server: Server) -> list[tuple[str, str]]:
    paths = server.get("/openapi.json")["paths"]
    return [(method.upper(), path) for path, methods in paths.items() if path.startswith("/dpo/v1/") for method in methods]


def test_openapi_has_our_routes(server: Server) -> None:
    assert {path.removeprefix("/dpo/v1") for _, path in _routes(server)} == ROUTES


def test_every_route_asks_for_the_password(process: Server, folders: Any) -> None:
    process.ensure(folders(full=False), "--api-auth", ":".join(ACCOUNT), auth=ACCOUNT)
    assert process.get("status")["host"]["name"] == process.flavour.name
    routes = _routes(process)
    assert len(routes) > 10
    for method, path in routes:
        for wrong in (None, ("someone", "wrong"), ("", "")):
            answer = process.ask(method, path.replace("{job_id}", "x"), {}, auth=wrong)
            assert answer.status_code == 401, (method, path, wrong)


def test_without_a_page(process: Server, folders: Any, lora: dict) -> None:
    process.ensure(folders(full=False), "--nowebui")
    plain = draw(process)
    assert process.get("status")["text"].endswith("clean")
    assert [axes(process).count(label) for label in OURS] == [1] * len(OURS)
    cells = grid(process, ("[DPO] Strength", ["0", "1"]), offset=Offset(LORA)).all
    assert same(cells[0], plain)
    assert not same(cells[1], plain)
    process.do("bake", offset=LORA, strength=1)
    assert not same(draw(process), plain)
    process.do("unbake")
    assert same(draw(process), plain)
    assert not process.tracebacks()
