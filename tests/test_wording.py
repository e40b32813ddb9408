"""What people read in the tab, the API and pictures: no words of the command line, and no folders of the server."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import partial
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import webui_files
from fastapi import FastAPI
from fastapi.testclient import TestClient
from webui_files import extract, fake

from lib_dpo.cli.words import FLAGS, with_flags
from lib_dpo.webui.api import PREFIX, add_routes
from lib_dpo.webui.generation import Generation
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import blind, clicks, compare, inspect, lists, parts
from lib_dpo.webui.tab import extract as page
from lib_dpo.webui.tab.bake import before
from lib_dpo.webui.tab.bake import page as bake

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

PACKAGE = Path(__file__).resolve().parent.parent / "lib_dpo"
COMMAND_LINE = re.compile(r"(?<![\w-])--(?!dpo-)[a-z]|`|python -m|pip install|\bexit code")  # --dpo-… is a style's
ONLY_ON_THE_COMMAND_LINE = {
    "app.py": "the command `app` itself, before there is a page",
    "cli": "the command line itself",
    "toy": "what the command `demo` draws and writes; the custom properties of its page's style",
    "errors.py": "libraries for work without a WebUI, whose user has a terminal",
    "hub.py": "names that begin with hub:, which only commands take",
    "pipeline.py": "pictures without a WebUI, whose user has a terminal",
    "detect.py": "where no WebUI is running",
    "header.py": "`git lfs pull` is what a git-lfs pointer needs",
    "processes.py": "several processes are what `accelerate launch` starts in a terminal",
    "jobs.py": "`jobs` is a route of the API, which alone asks for jobs by id",
}


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """All strings of a module but its docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def _shared() -> list[Path]:
    """The modules whose words front ends beside the command line may show."""
    files = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__main__.py")
    return [file for file in files if not {file.name, file.parent.name} & ONLY_ON_THE_COMMAND_LINE.keys()]


def test_nothing_that_all_front_ends_show_speaks_of_the_command_line():
    found = [
        f"{file.relative_to(PACKAGE)}:{line}: {text!r}"
        for file in _shared()
        for line, text in _texts(file)
        if COMMAND_LINE.search(text)
    ]
    assert not found, "\n".join(found)
    assert len(_shared()) > 50


def test_every_exception_is_a_file_that_is_there():
    names = {path.name for path in PACKAGE.rglob("*")}
    assert names >= ONLY_ON_THE_COMMAND_LINE.keys()


def test_the_command_line_adds_the_flags_to_what_errors_advise():
    said = " ".join(text for file in _shared() for _, text in _texts(file))
    for words, flag in FLAGS.items():
        assert words in said, f"no error says {words!r}"
        assert "--" in flag
    assert (
        with_flags("x: does not fit into fp16; choose the precision fp32")
        == "x: does not fit into fp16; choose --precision fp32"
    )
    assert with_flags("choose another name, or allow it to be replaced").endswith("(--overwrite)")


# ---- what is really shown ----


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A LoRA, an offset file, files that are damaged or of the wrong kind: all in folders whose names must not be shown."""
    folder = tmp_path_factory.mktemp("wording") / "secret place"
    session = webui_files.open_session(webui_files.make(folder / "files"), folder / "models")
    extract(session)
    host = fake(session)
    for place in (host.checkpoint_dir, host.lora_dir, host.reference_dir):
        (place / "broken.safetensors").write_bytes(b"no model")
    (host.checkpoint_dir / "lora.safetensors").write_bytes((host.lora_dir / "dpo.safetensors").read_bytes())
    (host.checkpoint_dir / "base.yaml").write_text("model: {}")
    (host.checkpoint_dir / "taken.yaml").write_text("model: {other: 1}")
    session.jobs.run("save", lambda job: session.save(job, name="done", offset="dpo", strength=1.0))
    return session


def _is_clean(session: Session, text: str) -> bool:
    plain = unescape(re.sub("<[^>]+>", " ", text))
    return not COMMAND_LINE.search(plain) and "secret" not in plain and "/models/" not in plain and "Traceback" not in plain


SETTINGS = (page.BY_RANK, 4, 0, 80, 50, "auto", "portable", "fp16")
TAB: list[tuple[Any, tuple[Any, ...], str]] = [
    (page.extract, (parts.LOADED, "dpo-sd1", "dpo", False, *SETTINGS), "dpo.safetensors: exists already"),
    (page.extract, (parts.LOADED, "broken.safetensors", "x", False, *SETTINGS), "broken.safetensors"),
    (page.extract, ("lora.safetensors", "dpo-sd1", "x", False, *SETTINGS), "lora.safetensors"),
    (page.extract, ("base.safetensors", "base.safetensors", "x", False, *SETTINGS), ""),
    (page.extract, (parts.LOADED, "dpo-sd1", "dpo", True, *SETTINGS), "Lora/dpo.safetensors"),
    (page.extract, (parts.LOADED, "dpo-sd1", "x", False, page.BY_SIZE, 4, 0, -3, *SETTINGS[4:]), "Size -3 is too small"),
    (page.extract, (parts.LOADED, "dpo-sd1", "x", False, page.BY_RANK, 4, -3, 80, *SETTINGS[4:]), "Rank of convolutions -3"),
    (page.write_offset, (parts.LOADED, "dpo-sd1", "broken", False), "broken.safetensors: exists already"),
    (page.analyse, (parts.LOADED, "broken.safetensors", *SETTINGS[:5], *SETTINGS[6:]), "broken.safetensors"),
    (bake.bake, ("broken", 1.0, ""), "broken.safetensors"),
    (bake.save, ("dpo", 1.0, "", "done", False), "done.safetensors: exists already"),
    (bake.save, ("dpo", 1.0, "", "taken", False), "taken.yaml"),
    (bake.save, ("dpo", 1.0, "", "taken", True), "Stable-diffusion/taken.safetensors"),
    (inspect.what_is, ("broken.safetensors",), "broken.safetensors"),
    (inspect.what_is, ("dpo",), "It is a LoRA"),
    (inspect.does_it_fit, ("broken.safetensors", parts.LOADED, "dpo-sd1"), "broken.safetensors"),
    (blind.start, ("broken", "1", "a", "", "1", "", 4, 7, 64, 64, ""), "broken.safetensors"),
    (blind.start, ("dpo", "0", "a", "", "1", "", 4, 7, 64, 64, ""), "Strength 0 is the untouched model itself"),
    (blind.start, ("dpo", "1", "a", "", "1", "", 4, 7, 64, 64, ""), "Votes are kept in outputs/dpo-votes"),
    (compare.compare, ("broken", "1", "a", "", "1", 4, 7, "", 64, 64, ""), "broken.safetensors"),
    (compare.compare, ("dpo", "1", "a", "", "1", 4, 7, "", 9000, 64, ""), "Width or height 9000"),
]


@pytest.mark.parametrize(("action", "values", "words"), TAB)
def test_the_tab_shows_names_and_no_folders(session: Session, action: Any, values: tuple[Any, ...], words: str):
    html, status = clicks.guarded(session, partial(action, session), 1)("", *values)[:2]
    assert words in unescape(re.sub("<[^>]+>", " ", html)), html
    assert _is_clean(session, html), html
    assert _is_clean(session, str(status))


API: list[tuple[str, dict[str, Any]]] = [
    ("/extract", {"reference": "dpo-sd1", "name": "dpo"}),
    ("/extract", {"reference": "broken.safetensors", "name": "x"}),
    ("/extract", {"reference": "dpo-sd1", "name": "again", "rank": 2}),
    ("/offset", {"reference": "dpo-sd1", "name": "broken"}),
    ("/analyse", {"reference": "broken.safetensors"}),
    ("/bake", {"offset": "broken"}),
    ("/save", {"offset": "dpo", "name": "done"}),
    ("/save", {"offset": "dpo", "name": "taken"}),
    ("/save", {"offset": "dpo", "name": "fresh"}),
    ("/compat", {"target": "broken.safetensors", "reference": "dpo-sd1"}),
    ("/compare", {"offset": "broken", "prompts": ["a"]}),
    ("/blind/start", {"offset": "broken"}),
    ("/blind/vote", {"pair": "x", "choice": "middle"}),
]


@pytest.mark.parametrize(("route", "body"), API)
def test_the_api_answers_with_names_and_no_folders(session: Session, route: str, body: dict[str, Any]):
    app = FastAPI()
    add_routes(app, session)
    answer = TestClient(app).post(PREFIX + route, json=body)
    assert answer.status_code in (200, 422), answer.text
    assert _is_clean(session, answer.text), answer.text
    assert _is_clean(session, TestClient(app).get(PREFIX + "/jobs").text)


def test_a_picture_carries_no_folder_of_the_server(session: Session):
    p = SimpleNamespace(extra_generation_params={}, calls=[], scripts=None)
    Generation(session).process(p, True, "broken", 1.0, "", 0)
    told = p.extra_generation_params["DPO error"]
    assert "broken.safetensors" in told
    assert _is_clean(session, told)


def test_the_status_line_and_the_lists_show_no_folder(session: Session):
    def unreadable(_: Session) -> list[str]:
        raise PermissionError(13, "Permission denied", str(fake(session).reference_dir / "sub" / "x.safetensors"))

    live = fake(session).live
    path, live.path = live.path, fake(session).checkpoint_dir / "broken.safetensors"
    try:
        assert "broken.safetensors" in parts.status_html(session)
        shown = [parts.status_html(session), before.foresee(session, "dpo", "")]
    finally:
        live.path = path
    shown.append(lists.looked(session, [parts.Listed(None, unreadable, parts.first)], [""])[0])
    shown.append(before.foresee(session, "broken", ""))
    for html in shown:
        assert _is_clean(session, html), html


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("/home/me/models/Lora/x.safetensors: exists already", "x.safetensors: exists already"),
        ("[Errno 13] Permission denied: '/models/DPO/y'", "[Errno 13] Permission denied: 'y'"),
        (r"C:\webui\models\x.safetensors: is damaged", "x.safetensors: is damaged"),
        ("3 / 4 and/or 1/2 of it, see https://example.org/a/b", "3 / 4 and/or 1/2 of it, see https://example.org/a/b"),
        ("model.diffusion_model.a/b holds NaN", "model.diffusion_model.a/b holds NaN"),
    ],
)
def test_folders_are_taken_out_of_sentences_and_nothing_else(session: Session, message: str, shown: str):
    assert session.library.names_only(message) == shown
