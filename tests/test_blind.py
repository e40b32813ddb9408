"""A blind test over a host without a WebUI: what is drawn ahead, what voters can know, what is written, what goes wrong."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webui_files
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from webui_files import fake

from lib_dpo.errors import DpoError, HostError, NotFoundError, OutputError, SettingError
from lib_dpo.hosts.base import Picture, Request
from lib_dpo.pictures.votes.ballots import Vote
from lib_dpo.pictures.votes.prompts import shipped
from lib_dpo.settings import BUNDLED_BASE, BUNDLED_PROMPTS
from lib_dpo.webui.api import PREFIX, add_routes
from lib_dpo.webui.blind import AHEAD, Asked
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import blind as page
from lib_dpo.webui.tab import clicks, parts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return webui_files.with_offsets(tmp_path_factory.mktemp("blind"))


@pytest.fixture
def session(files: Path, tmp_path: Path) -> Session:
    return webui_files.open_session(files, tmp_path / "models")


def start(session: Session, **options: Any) -> None:
    settings = {"offset": "exact", "width": 64, "height": 64} | options
    session.jobs.run("start", lambda job: session.blind.start(job, **settings))


def until(condition: Callable[[], Any]) -> Any:
    """What a condition gives when it holds."""
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it never came about")


def pair(session: Session) -> Asked:
    found: Asked = until(session.blind.current)
    return found


def idle(session: Session) -> bool:
    return not session.jobs.busy


def lines(session: Session) -> list[dict[str, Any]]:
    return [json.loads(line) for file in session.blind.folder.glob("*.jsonl") for line in file.read_text("utf-8").splitlines()]


def pixels(data: bytes) -> Any:
    return Image.open(io.BytesIO(data)).getpixel((0, 0))


# ---- one test ----


def test_without_prompts_a_model_is_asked_for_what_it_can_draw(session: Session):
    start(session)
    assert pair(session).prompt in shipped()
    until(lambda: idle(session))
    toy = fake(session).checkpoint_dir / BUNDLED_BASE
    shutil.copyfile(fake(session).checkpoint_dir / "base.safetensors", toy)
    fake(session).live.load(toy)
    start(session)
    assert pair(session).prompt in BUNDLED_PROMPTS


def test_a_vote_is_written_before_the_next_pair_is_shown(session: Session):
    start(session, prompts=["a cat", "a dog", " "])
    first = pair(session)
    assert (first.a, first.b, first.prompt, first.seed) == (1.0, 0.0, "a cat", 1)
    told = session.blind.vote(first.id, "left")
    assert told is not None
    (line,) = lines(session)
    assert line == {
        "time": told.time, "model": "base", "offset": "exact", "blocks": "", "a": 1.0, "b": 0.0, "prompt": "a cat", "seed": 1,
        "side": first.side, "answer": "a" if first.side == "left" else "b",
    }  # fmt: skip
    assert session.blind.vote(first.id, "right") is None, "the same pair again, by a second click"
    assert len(lines(session)) == 1
    seen = [(first.prompt, first.seed)]
    for choice in ("right", "none", "skip", "left"):
        asked = pair(session)
        seen.append((asked.prompt, asked.seed))
        session.blind.vote(asked.id, choice)
    assert seen == [("a cat", 1), ("a dog", 1), ("a cat", 2), ("a dog", 2), ("a cat", 3)]
    figures = session.blind.figures()
    assert (figures.tally.decided, figures.tally.ties, figures.tally.skipped) == (3, 1, 1)
    assert figures.curve is None


def test_the_picture_of_a_stands_where_the_side_says(session: Session):
    """The fake pipeline draws another grey with the offset: the recorded side is that of the pixels."""
    start(session, prompts=["a cat"])
    untouched = fake(session).generate(Request("a cat", seed=1, width=64, height=64), None, 0.0).image.getpixel((0, 0))
    sides = set()
    for _ in range(20):
        asked = pair(session)
        base = untouched[0] + asked.seed - 1
        plain = [pixels(data)[0] == base % 256 for data in asked.png]
        assert plain == ([False, True] if asked.side == "left" else [True, False])
        sides.add(asked.side)
        session.blind.vote(asked.id, "left")
    assert sides == {"left", "right"}, "drawn at random: one in 500,000 runs fails"


def test_pairs_are_drawn_ahead_and_the_host_is_let_go(session: Session):
    start(session)
    until(lambda: session.blind.current() and idle(session) and len(session.blind._ready) == AHEAD)
    assert not fake(session).lock.locked()
    asked = [session.blind._ready[n].prompt for n in range(AHEAD)]
    assert asked == list(shipped()[:AHEAD])


def test_the_next_pair_is_there_in_a_fifth_of_a_second(session: Session):
    start(session, width=512, height=512)
    until(lambda: session.blind.current() and idle(session) and len(session.blind._ready) == AHEAD)
    took = []
    for _ in range(2):
        asked = session.blind.current()
        assert asked
        began = time.perf_counter()
        page.vote(session, "left", asked.id)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.2


def test_it_goes_on_after_the_webui_was_closed(session: Session, files: Path):
    start(session, prompts=["a cat", "a dog"])
    session.blind.vote(pair(session).id, "none")
    until(lambda: idle(session))
    again = Session(fake(session))
    start(again, prompts=["a cat", "a dog"])
    assert pair(again).prompt == "a dog"
    assert again.blind.figures().tally.ties == 1
    assert again.blind.export().splitlines() == [json.dumps(line, ensure_ascii=False) for line in lines(session)]


def test_starting_again_keeps_what_is_drawn_and_another_offset_does_not(session: Session):
    start(session, prompts=["a cat"])
    first = pair(session)
    start(session, prompts=["a cat"])
    assert pair(session).id == first.id
    start(session, offset="dpo", prompts=["a cat"])
    assert pair(session).id != first.id
    assert session.blind.vote(first.id, "left") is None
    assert lines(session) == []


def test_several_strengths_meet_and_the_best_is_told(session: Session):
    start(session, strengths="0.5, 1, 2")
    met = set()
    for _ in range(24):
        asked = pair(session)
        met |= {asked.a, asked.b}
        liked = {0.0: 0.0, 0.5: 2.0, 1.0: 3.0, 2.0: -1.0}
        better = "left" if (liked[asked.a] > liked[asked.b]) == (asked.side == "left") else "right"
        session.blind.vote(asked.id, better)
    assert met >= {0.0, 2.0}
    assert len(met) >= 3
    curve = session.blind.figures().curve
    assert curve is not None
    assert 0.5 <= curve.best <= 1.5
    html = page.figures_html(session.blind.figures())
    assert "Best strength" in html
    assert "Preferred to the untouched model" in html


# ---- what a voter can know ----


def test_the_page_does_not_tell_the_sides(session: Session):
    """Without the pixels, the page is the same whichever side the picture with the offset is on."""
    start(session, prompts=["a cat"])
    pages = set()
    for _ in range(12):
        asked = pair(session)
        html = page.pair_html(asked)
        pages.add(re.sub(r"base64,[^\"]*", "", html))
        for word in ("strength", "untouched", "exact", asked.id, str(asked.a)):
            assert word not in re.sub(r"base64,[^\"]*", "", html)
        session.blind.vote(asked.id, "skip")
    assert len(pages) == 1


def test_pictures_carry_nothing_but_pixels(session: Session, monkeypatch: pytest.MonkeyPatch):
    def tells(request: Request, patch: Any, strength: float) -> Picture:
        image = Image.new("RGB", (64, 64), (int(100 + strength), 0, 0))
        image.info |= {"parameters": f"DPO strength: {strength}", "dpi": (72, 72 + strength), "comment": b"with DPO"}
        return Picture(image, "")

    monkeypatch.setattr(fake(session), "generate", tells)
    start(session, prompts=["a cat"])
    asked = pair(session)
    for png, jpeg in zip(asked.png, asked.jpeg, strict=True):
        assert b"DPO" not in png + jpeg
        assert Image.open(io.BytesIO(png)).info == {}
        assert set(Image.open(io.BytesIO(jpeg)).info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert Image.open(io.BytesIO(asked.png[0])).size == (64, 64)


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"strengths": "0"}, SettingError, "strength 0 is the untouched model itself"),
        ({"strengths": "0-2 (+0.1)"}, SettingError, "too many to vote on"),
        ({"strengths": "one"}, SettingError, "neither a number nor a range"),
        ({"offset": "gone"}, NotFoundError, "no offset named 'gone'"),
        ({"offset": ""}, NotFoundError, "no offset is chosen"),
        ({"width": 60}, SettingError, "is too small"),
        ({"sampler": "Eulr a"}, SettingError, "did you mean Euler a"),
        ({"seeds": "x"}, SettingError, "seeds"),
        ({"blocks": "MIDDLE=1"}, SettingError, "MIDDLE"),
        ({"prompts": ["fail"]}, HostError, "the pipeline failed"),
    ],
)
def test_refusals(session: Session, options: dict[str, Any], error: type[DpoError], words: str):
    with pytest.raises(error, match=re.escape(words)):
        start(session, **options)
    assert not session.blind.folder.exists()


def test_it_is_refused_while_something_is_baked(session: Session):
    session.jobs.run("bake", lambda job: session.bake(job, offset="exact", strength=1.0))
    with pytest.raises(HostError, match="exact is baked into base, so there is no untouched picture"):
        start(session)
    with pytest.raises(NotFoundError):
        session.blind.current()


def test_without_a_test_there_is_nothing_to_vote_on(session: Session):
    for asks in (session.blind.current, session.blind.figures, session.blind.export, lambda: session.blind.vote("x", "left")):
        with pytest.raises(NotFoundError, match="no blind test is running; start one"):
            asks()


def test_a_pipeline_that_fails_in_the_middle_costs_no_vote(session: Session):
    start(session, prompts=["a cat", "fail", "a dog"])
    until(lambda: session.blind.problem)
    assert session.blind.problem.startswith("the pipeline failed. Your votes are kept")
    session.blind.vote(pair(session).id, "left")  # what was drawn is still there, and drawing goes on behind the bad prompt
    assert len(lines(session)) == 1
    assert pair(session).prompt == "a dog"


def test_interrupt_stops_drawing_until_one_goes_on(session: Session, monkeypatch: pytest.MonkeyPatch):
    start(session, prompts=["a cat", "a dog"])
    until(lambda: idle(session))
    host, real = fake(session), fake(session).generate

    def interrupted(*arguments: Any) -> Picture:
        session.jobs.interrupt()
        return real(*arguments)

    monkeypatch.setattr(host, "generate", interrupted)
    while (asked := session.blind.current()) is not None:
        session.blind.vote(asked.id, "none")
        until(lambda: idle(session))
    assert "interrupted" in session.blind.problem
    view, _, found = page.look(session, "")
    assert "interrupted" in view
    assert found == ""
    assert session.blind.current() is None, "looking does not start it again"
    count = len(lines(session))
    monkeypatch.setattr(host, "generate", real)
    start(session, prompts=["a cat", "a dog"])
    assert pair(session)
    assert not session.blind.problem
    assert len(lines(session)) == count


@pytest.mark.parametrize("change", ["other", "baked", "gone"])
def test_a_model_or_file_that_changes_meanwhile_is_said(session: Session, change: str):
    start(session, prompts=["a cat"])
    until(lambda: idle(session))
    host = fake(session)
    words = {
        "other": "is of base, but other is loaded now",
        "baked": "exact is baked into base",
        "gone": "vanished from the disk",
    }
    if change == "other":
        host.live.load(host.checkpoint_dir / "other.safetensors")
    elif change == "baked":
        session.jobs.run("bake", lambda job: session.bake(job, offset="exact", strength=1.0))
    else:
        listed = [*host.loras(), *session.library.offsets()]
        session.library.offsets = lambda: listed  # type: ignore[method-assign]  # the list is older than the disk
        (host.reference_dir / "exact.safetensors").unlink()
    session.blind.vote(pair(session).id, "left")
    assert words[change] in until(lambda: session.blind.problem)
    assert len(lines(session)) == 1


def test_a_damaged_file_of_votes_is_named_and_kept(session: Session):
    start(session, prompts=["a cat"])
    session.blind.vote(pair(session).id, "none")
    (file,) = session.blind.folder.glob("*.jsonl")
    with open(file, "ab") as out:
        out.write(b'{"time": "2026-01')
    asked = pair(session)
    _, html, _ = page.vote(session, "none", asked.id)
    assert "line 2: is no whole line of JSON; passed over" in html
    assert session.blind.figures().tally.ties == 2


def test_a_vote_that_cannot_be_written_can_be_given_again(session: Session):
    start(session, prompts=["a cat"])
    asked = pair(session)
    session.blind.folder.parent.mkdir(parents=True, exist_ok=True)
    session.blind.folder.write_text("in the way")
    with pytest.raises(OutputError, match="is a file, expected the folder of votes"):
        session.blind.vote(asked.id, "left")
    assert "expected the folder of votes" in page.vote(session, "left", asked.id)[1]
    session.blind.folder.unlink()
    assert session.blind.vote(asked.id, "left")


# ---- page and API ----


def test_the_page_from_start_to_the_file_of_votes(session: Session):
    how = ("", "1", "", 4, 7, 64, 64, "")
    begun = clicks.guarded(session, lambda *values: page.start(session, *values), 4)("", "exact", "1", "a cat\na dog", *how)
    note, view, figures, shown = begun[:4]
    assert "dpo-votes" in note
    assert str(fake(session).folder) not in note
    assert view.count("data-dpo-vote") == 2
    assert "No votes yet" in figures
    view, figures, after = page.vote(session, "left", shown)
    assert after != shown
    assert re.search(r"That was (strength 1|the untouched model) at the left and", figures)
    assert re.search(r"DPO wins [01] of 1", figures)
    until(lambda: session.blind.current())
    current = session.blind.current()
    assert current
    assert page.look(session, current.id) == [parts.update()] * 3
    link = page.votes_file(session)
    data = re.search(r"base64,([^\"]+)", link)
    assert data
    assert [json.loads(line) for line in base64.b64decode(data[1]).splitlines()] == lines(session)


def test_a_page_without_a_test_shows_its_hint(session: Session):
    assert page.look(session, "") == [parts.update()] * 3
    assert "no blind test is running" in page.vote(session, "left", "")[1].casefold()
    assert "no blind test is running" in page.votes_file(session).casefold()


def test_names_from_prompts_are_escaped(session: Session):
    start(session, prompts=["<img src=x onerror=alert(1)>"])
    assert "<img src=x" not in page.pair_html(pair(session))


def test_the_api_asks_and_counts(session: Session):
    app = FastAPI()
    add_routes(app, session)
    client = TestClient(app)
    assert client.get(f"{PREFIX}/blind/pair").status_code == 404
    body = {"offset": "exact", "prompts": ["a cat", "a dog"], "width": 64, "height": 64}
    begun = client.post(f"{PREFIX}/blind/start", json=body).json()
    assert begun["state"] == "done", begun
    assert begun["result"]["text"] == "No votes yet."
    asked = client.get(f"{PREFIX}/blind/pair").json()
    assert set(asked) == {"ready", "pair", "prompt", "left", "right"}
    assert Image.open(io.BytesIO(base64.b64decode(asked["left"]))).size == (64, 64)
    found = client.post(f"{PREFIX}/blind/vote", json={"pair": asked["pair"], "choice": "left"}).json()
    assert Vote(**found["vote"]).answer in ("a", "b")
    assert found["figures"]["wins"] + found["figures"]["losses"] == 1
    assert client.post(f"{PREFIX}/blind/vote", json={"pair": asked["pair"], "choice": "left"}).json()["vote"] is None
    refused = client.post(f"{PREFIX}/blind/vote", json={"pair": "x", "choice": "middle"})
    assert refused.status_code == 422
    assert "expected one of left, right, none, skip" in refused.json()["detail"]
    assert client.get(f"{PREFIX}/blind/figures").json() == found["figures"]
    assert json.loads(client.get(f"{PREFIX}/blind/votes").json()["votes"]) == found["vote"]


def test_a_look_that_fails_is_said(session: Session, monkeypatch: pytest.MonkeyPatch):
    """Without a test there is nothing to say; any other error is no silence."""
    assert page.look(session, "") == [parts.update()] * 3
    monkeypatch.setattr(session.blind, "current", lambda: (_ for _ in ()).throw(OutputError("the disk is full")))
    assert "disk is full" in page.look(session, "")[0]
