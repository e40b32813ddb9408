"""One rule for strengths, alike wherever somebody gives one: tab, API, command line, script, X/Y/Z axes, compare's list."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from html import unescape
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import webui_files
from fastapi import FastAPI
from fastapi.testclient import TestClient
from webui_files import extract, fake

from lib_dpo.errors import DpoError, NothingToDoError, SettingError
from lib_dpo.settings import strength_of, strength_to_bake
from lib_dpo.webui.api import PREFIX, add_routes
from lib_dpo.webui.axes import add_axes
from lib_dpo.webui.generation import Generation, wish_of
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import clicks, compare
from lib_dpo.webui.tab.bake import before
from lib_dpo.webui.tab.bake import page as bake

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """One for all: nothing here may change anything."""
    folder = tmp_path_factory.mktemp("strength")
    session = webui_files.open_session(webui_files.make(folder / "files"), folder / "models")
    extract(session)
    return session


# ---- every front end, and what it answers to a strength and blocks ----


def _tab(session: Session, function: Any, *values: Any) -> str:
    html = clicks.guarded(session, partial(function, session), 1)("", *values)[0]
    sentence = unescape(re.sub("<[^>]+>", "", html))
    return sentence[:1].lower() + sentence[1:]


def _bake_in_tab(session: Session, strength: Any, blocks: str) -> str:
    return _tab(session, bake.bake, "dpo", strength, blocks)


def _save_in_tab(session: Session, strength: Any, blocks: str) -> str:
    return _tab(session, bake.save, "dpo", strength, blocks, "new", False)


def _api(route: str, session: Session, strength: Any, blocks: str) -> str:
    app = FastAPI()
    add_routes(app, session)
    body = {"offset": "dpo", "strength": strength, "blocks": blocks} | ({"name": "new"} if route == "/save" else {})
    answer = TestClient(app).post(PREFIX + route, json=body)
    assert answer.status_code in (200, 422), answer.text
    return str(answer.json().get("detail", answer.json()))


def _command(session: Session, strength: Any, blocks: str, capsys: pytest.CaptureFixture[str]) -> str:
    host = fake(session)
    lora, target, output = (
        host.lora_dir / "dpo.safetensors",
        host.checkpoint_dir / "base.safetensors",
        host.folder / "new.safetensors",
    )
    words = ("bake", "--target", target, "--offset", lora, "-o", output, f"--strength={strength}", f"--blocks={blocks}")
    code = tiny.run(*words)
    told = capsys.readouterr().err
    assert code == 2
    return told


def _script(session: Session, strength: Any, blocks: str) -> str:
    p = SimpleNamespace(extra_generation_params={}, calls=[], scripts=None)
    fake(session).aborted.clear()
    Generation(session).process(p, True, "dpo", strength, blocks, 0)
    return "".join(fake(session).aborted)


def _axis(session: Session, strength: Any, blocks: str) -> str:
    def option(label: str, kind: Any, apply: Any, confirm: Any, cost: float, choices: Any) -> Any:
        return SimpleNamespace(label=label, confirm=confirm)

    module = SimpleNamespace(axis_options=[], AxisOption=option)
    add_axes(module, session, lambda p: (True, "dpo", 1.0, blocks))  # type: ignore[arg-type]
    confirm = next(axis.confirm for axis in module.axis_options if axis.label == "[DPO] Strength")
    try:
        confirm(SimpleNamespace(), [strength])
    except RuntimeError as error:
        return str(error)
    return ""


def _compare(session: Session, strength: Any, blocks: str) -> str:
    return _tab(session, compare.compare, "dpo", f"1, {strength}", "a cat", "", "1", 4, 7, "", 64, 64, blocks)


BAKES: dict[str, Callable[..., str]] = {
    "bake in the tab": _bake_in_tab, "save in the tab": _save_in_tab, "api bake": partial(_api, "/bake"),
    "api save": partial(_api, "/save"),
}  # fmt: skip
LOOKS: dict[str, Callable[..., str]] = {"script": _script, "axis": _axis, "compare": _compare}
SLIPS = [
    (80, "strength 80 is too large; expected -10 to 10; did you mean 0.8?"),
    (-150, "strength -150 is too large; expected -10 to 10; did you mean -1.5?"),
    (10.5, "did you mean 0.105?"),
    (1e12, "strength 1e+12 is too large; expected -10 to 10"),
]


@pytest.mark.parametrize(("strength", "words"), SLIPS)
@pytest.mark.parametrize("front", [*BAKES, *LOOKS])
def test_a_slip_of_the_finger_is_refused_alike(session: Session, front: str, strength: float, words: str):
    before = tiny.snapshot(fake(session).folder), session.host.live.fingerprint()
    assert words in (BAKES | LOOKS)[front](session, strength, "")
    assert (tiny.snapshot(fake(session).folder), session.host.live.fingerprint()) == before


@pytest.mark.parametrize(("strength", "words"), SLIPS)
def test_a_slip_of_the_finger_on_the_command_line(
    session: Session, strength: float, words: str, capsys: pytest.CaptureFixture[str]
):
    assert words in _command(session, strength, "", capsys)
    assert not (fake(session).folder / "new.safetensors").exists()


@pytest.mark.parametrize(
    ("strength", "blocks", "words"),
    [
        (0, "", "strength 0 changes nothing; choose one such as 0.5 or 1"),
        (1, "ALL=0", "block weights ALL=0 leave nothing of dpo: nothing would change"),
        (1, "UNET=0", "block weights UNET=0 leave nothing of dpo"),  # it holds no text encoder
    ],
)
def test_a_bake_that_changes_nothing_is_refused_alike(
    session: Session, strength: float, blocks: str, words: str, capsys: pytest.CaptureFixture[str]
):
    before = tiny.snapshot(fake(session).folder)
    for front, ask in BAKES.items():
        assert words in ask(session, strength, blocks), front
    assert words in _command(session, strength, blocks, capsys)
    assert tiny.snapshot(fake(session).folder) == before
    assert session.host.live.baked() is None


def test_an_emptied_field_is_asked_for(session: Session):
    for ask in (_bake_in_tab, _save_in_tab):
        assert "the strength is missing; give a number such as 0.5 or 1" in ask(session, None, "")
    assert "the strength is missing" in _script(session, None, "")


def test_before_a_bake_blocks_that_leave_nothing_are_said(session: Session):
    assert "leave nothing of dpo" in before.foresee(session, "dpo", "ALL=0")


def test_zero_is_the_untouched_model_where_it_is_looked_at(session: Session):
    assert not _script(session, 0, "")
    assert not _axis(session, 0, "")
    assert "strength 1" in _compare(session, 0, "")
    assert "leave nothing of dpo" in _compare(session, 1, "ALL=0")


def test_what_stands_in_a_script_that_is_off_does_not_matter(session: Session):
    p = SimpleNamespace(extra_generation_params={}, calls=[], scripts=None)
    fake(session).aborted.clear()
    Generation(session).process(p, False, "dpo", None, "NOSE", "x")
    assert not fake(session).aborted
    assert wish_of(p, False, "dpo", None) == wish_of(p)


@pytest.mark.parametrize("value", ["much", "nan", float("inf"), True, [], {}, 10**400])
def test_what_is_no_number_is_no_strength(value: Any):
    with pytest.raises(SettingError, match="is not a finite number"):
        strength_of(value)


@pytest.mark.parametrize("value", [0.5, 1, -1, "0.8", 10, -10, 1e-6])
def test_numbers_are_strengths(value: Any):
    assert strength_of(value) == strength_to_bake(value) == float(value)


def test_zero_is_a_strength_but_none_to_bake():
    assert strength_of("0") == 0
    with pytest.raises(NothingToDoError):
        strength_to_bake(-0.0)
    assert issubclass(NothingToDoError, DpoError)
