"""The tab over a host without a WebUI: how it is built, and what its buttons do and say."""

from __future__ import annotations

import inspect as signatures
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fake_host import FakeHost
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lib_dpo.errors import Cancelled, HostError, NotFoundError
from lib_dpo.hosts.base import Check, FileEntry, Request, Silent
from lib_dpo.offsets.file_kinds import plain_name
from lib_dpo.webui.references.picker import Bases
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import build, clicks, compare, comparison, inspect, lists, markup, parts
from lib_dpo.webui.tab.bake import before, blocks
from lib_dpo.webui.tab.bake import page as bake
from lib_dpo.webui.tab.extract import outlook
from lib_dpo.webui.tab.extract import page as extract
from lib_dpo.webui.tab.extract.cards import analysis_html, first_view, offset_html

EVIL = "<img src=x onerror=alert(1)>\"'&"
SETTINGS = (extract.BY_RANK, 4, 0, 80, 50, "auto", "portable", "fp16")
CONTROLS = (extract.BY_RANK, 4, 0, 80, 50, "portable", "fp16")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ui")
    tiny.save(folder / "Stable-diffusion" / "base.safetensors", tiny.base(), torch.float16)
    tiny.save(folder / "Stable-diffusion" / "other.safetensors", tiny.base(seed=5), torch.float16)
    tuned = tiny.in_diffusers("sd1", tiny.only_unet(tiny.tuned(rms=1e-3)))
    tiny.save(folder / "DPO" / "dpo-sd1" / "unet" / "diffusion_pytorch_model.safetensors", tuned)
    for file in folder.rglob("*.safetensors"):
        os.utime(file, (1e9, 1e9))  # hashes of files of the last two seconds are not remembered
    return folder


@pytest.fixture
def session(files: Path, tmp_path: Path) -> Session:
    shutil.copytree(files, tmp_path / "models")
    host = FakeHost(tmp_path / "models")
    host.live.load(host.checkpoint_dir / "base.safetensors")
    return Session(host)


@pytest.fixture
def host(session: Session) -> FakeHost:
    assert isinstance(session.host, FakeHost)
    return session.host


@pytest.fixture
def with_lora(session: Session) -> Session:
    extract.extract(session, None, parts.LOADED, "dpo-sd1", "mine", False, *SETTINGS)  # type: ignore[arg-type]
    return session


PRESSED = ("dpo_shown", "dpo_tick", "dpo_extract_to_compare", "dpo_extract_to_bake")  # buttons that dpo.js presses


def components(blocks: Any) -> list[Any]:
    return [block for block in blocks.blocks.values() if block is not blocks]


def tags(html: str) -> set[str]:
    """The names of all elements, so that a name from a file which became one is seen."""
    found: set[str] = set()

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.add(tag)
            assert not any(name.startswith("on") for name, _ in attributes), html

    Parser().feed(html)
    return found


# ---- how it is built ----


def test_every_label_and_elem_id_is_there_once(session: Session):
    found = components(build(session))
    labelled = [block for block in found if getattr(block, "label", None)]
    labels = [block.label for block in labelled]
    assert len(labels) > 25
    assert sorted(labels) == sorted(set(labels))
    ids = [block.elem_id for block in found if getattr(block, "elem_id", None)]
    assert sorted(ids) == sorted(set(ids))
    assert all(elem_id.startswith("dpo_") for elem_id in ids)
    assert all(block.elem_id for block in labelled)


def test_lists_of_files_and_results_are_not_kept_in_the_hosts_configuration(session: Session):
    kept = {
        block.elem_id
        for block in components(build(session))
        if type(block).__name__ in ("Dropdown", "Textbox", "HTML", "Image", "Number", "Slider", "Radio", "Checkbox")
        and not getattr(block, "do_not_save_to_config", False)
    }
    files_and_results = ("_base", "_reference", "_offset", "_file", "_target", "_result", "_name", "overwrite", "_pair")
    assert not [elem_id for elem_id in kept if elem_id.endswith(files_and_results)]
    assert {"dpo_extract_rank", "dpo_bake_strength", "dpo_compare_steps"} <= kept


def test_every_button_hands_over_what_its_action_takes(session: Session, monkeypatch: pytest.MonkeyPatch):
    started: dict[str, tuple[Any, ...]] = {}
    real = clicks.start

    def record(tab: Any, button: Any, function: Any, inputs: Any, outputs: Any, **options: Any) -> None:
        started[button.elem_id] = (function, inputs, outputs)
        real(tab, button, function, inputs, outputs, **options)

    monkeypatch.setattr(clicks, "start", record)
    build(session)
    assert len(started) == 12
    for elem_id, (function, inputs, outputs) in started.items():
        signatures.signature(function).bind(None, *inputs)
        assert outputs[0].elem_id.endswith("_result"), elem_id


def test_what_the_page_asks_by_itself_is_not_queued(session: Session):
    """Gradio 3.41 keeps a queued event of a page that is gone, and then Reload UI waits for it without end."""
    config = build(session).get_config_file()
    ids = {row["id"]: row["props"].get("elem_id", "") for row in config["components"]}
    asked = []
    for row in config["dependencies"]:
        targets = [(target, row["trigger"]) if isinstance(target, int) else tuple(target) for target in row["targets"]]
        by_itself = {ids.get(n, "") for n, event in targets if event in ("change", "blur") or ids.get(n) in PRESSED}
        if by_itself and row["backend_fn"]:
            asked.append(row)
            assert row["queue"] is False, by_itself
    assert len(asked) >= 6


def dependencies(blocks: Any) -> list[tuple[set[tuple[str, str]], list[str], list[str], dict[str, Any]]]:
    """The events of a page: (elem_id, trigger) that start it, elem_ids of inputs and outputs, and all of it."""
    config = blocks.get_config_file()
    ids = {row["id"]: row["props"].get("elem_id", "") for row in config["components"]}
    found = []
    for row in config["dependencies"]:
        targets = [(target, row["trigger"]) if isinstance(target, int) else tuple(target) for target in row["targets"]]
        started = {(ids.get(n) or "", str(event)) for n, event in targets}
        found.append((started, [ids.get(n) or "" for n in row["inputs"]], [ids.get(n) or "" for n in row["outputs"]], row))
    return found


def test_what_depends_on_a_saved_choice_follows_it_when_the_tab_is_shown(session: Session):
    """The WebUI puts saved values into components after the tab was built, without a change event."""
    blocks = build(session)
    saved = {
        block.elem_id for block in components(blocks)
        if type(block).__name__ in ("Dropdown", "Radio", "Checkbox", "Slider", "Number", "Textbox")
        and not getattr(block, "do_not_save_to_config", False)
    }  # fmt: skip
    found = dependencies(blocks)
    followed = [row for row in found if {trigger for trigger in row[0] if trigger[0] in saved and trigger[1] == "change"}]
    assert followed
    for _, inputs, outputs, _ in followed:
        assert any(("dpo_shown", "click") in row[0] and row[1:3] == (inputs, outputs) for row in found), inputs


@pytest.mark.parametrize(("choice", "shown"), [
    (extract.BY_RANK, [True, True, False, False, False]), (extract.BY_SIZE, [False, False, True, False, False]),
    (extract.BY_ENERGY, [False, False, False, True, False]), (extract.EXACT, [False, False, False, False, True]),
])  # fmt: skip
def test_the_field_of_a_restored_choice_is_shown(
    session: Session, monkeypatch: pytest.MonkeyPatch, choice: str, shown: list[bool]
):
    tabs: list[parts.Tab] = []
    monkeypatch.setattr(lists, "wire", lambda tab, *rest: tabs.append(tab))
    build(session)
    follower = next(each for each in tabs[0].followers if [one.elem_id for one in each.inputs] == ["dpo_extract_by"])
    assert [each.elem_id.removeprefix("dpo_extract_") for each in follower.components] == [
        "rank",
        "conv_rank",
        "size",
        "energy",
        "exact",
    ]
    assert [change["visible"] for change in follower.function(choice)] == shown


def test_the_scripts_own_list_is_filled_without_the_queue(session: Session):
    import gradio as gr

    from lib_dpo.webui.tab.script import script_controls

    @contextmanager
    def accordion(value: bool, **options: Any) -> Iterator[Any]:
        yield gr.Checkbox(value, **options)

    with gr.Blocks() as blocks:
        script_controls(session, lambda item: f"script_txt2img_dpo_offset_{item}", accordion)
    (row,) = [row for row in dependencies(blocks) if ("script_txt2img_dpo_offset_refresh", "click") in row[0]]
    assert row[2] == ["script_txt2img_dpo_offset_offset"]
    assert row[3]["queue"] is False
    script = (Path(__file__).parent.parent / "javascript" / "dpo.js").read_text(encoding="utf-8")
    assert '"script_txt2img_dpo_offset_refresh"' in script


def test_building_opens_no_file_and_is_quick(session: Session, host: FakeHost):
    build(session)  # gradio is imported
    watching, opened = True, []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(arguments[0]).startswith(str(host.folder)):
            opened.append(arguments[0])

    sys.addaudithook(watch)  # stays until the process ends
    began = time.perf_counter()
    build(session)
    took = time.perf_counter() - began
    watching = False
    assert not opened
    assert took < 3  # seconds; 0.1 on a quiet machine


def test_importing_the_tab_imports_no_gradio():
    program = (
        "import sys, lib_dpo.webui.tab; heavy = {'gradio', 'matplotlib', 'PIL', 'pandas', 'diffusers'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- what keeps it true ----


def listed(choices: Any, likely: Any = parts.first) -> parts.Listed:
    return parts.Listed(None, choices, likely)


def test_lists_fill_when_the_tab_is_looked_at(with_lora: Session):
    rows = [
        listed(parts.checkpoints), listed(parts.references, parts.named_dpo), listed(parts.offsets, parts.named_dpo),
        listed(inspect.everything),
    ]  # fmt: skip
    status, foot, *updates = lists.looked(with_lora, rows, [parts.LOADED, None, "", "other.safetensors"])
    assert "base · SD 1.x · clean" in status
    assert "X/Y/Z plot script was not found" in foot
    assert "<details open>" in foot
    assert updates[0]["choices"] == [parts.LOADED, "base.safetensors", "other.safetensors"]
    assert updates[1]["value"] == "dpo-sd1"
    assert updates[2]["choices"] == ["mine"]
    assert "value" not in updates[2], "nothing that says DPO: the choice is the user's"
    assert "value" not in updates[3], "what was chosen stays"
    names = [plain_name(choice) for choice in updates[3]["choices"]]
    assert names == ["dpo-sd1", "base.safetensors", "other.safetensors", "mine"]
    until(lambda: inspect.models(with_lora)[:2] == [parts.LOADED, "base.safetensors · checkpoint, SD 1.x"])


def test_does_it_fit_takes_names_with_what_they_are(session: Session):
    until(lambda: all(" · " in each for each in (*inspect.everything(session), *inspect.models(session)[1:])))
    target, reference = inspect.models(session)[-1], inspect.references(session)[0]
    html, _ = run(session, inspect.does_it_fit, target, parts.LOADED, reference)
    assert "Strength to start with" in html


def test_the_answer_of_a_closed_page_comes_to_the_next_one_once(session: Session, monkeypatch: pytest.MonkeyPatch):
    """What the page does: take what is new after an answer came (`taken`), look again every few seconds."""
    place, status, name = object(), object(), object()
    work = parts.Work([place, status, name])
    tab = parts.Tab(session, status, None, works=[work])
    outputs = [status, place, name]
    assert lists.arrived(tab, outputs, ["now", "older"]) == ["now", "older", parts.update()]
    work.answered(["it is written", "then", "new.safetensors"])
    assert lists.arrived(tab, outputs, ["now", "older"]) == ["now", "older", parts.update()], "its own page may be there yet"
    monkeypatch.setattr(lists, "_LATE", 0.0)
    assert lists.arrived(tab, outputs, ["now", "older"]) == ["now", "it is written", "new.safetensors"]
    assert lists.arrived(tab, outputs, ["now", "older"]) == ["now", "older", parts.update()]


def test_a_job_at_work_is_in_the_status_line(session: Session):
    def work(job: Any) -> None:
        job.progress(1, 4, "")
        record.seconds_left = 20.0
        assert "Extract mine: 25%, about 20 s left" in parts.status_html(session)
        raise NotFoundError("the end")

    record = session.jobs.register("Extract mine")
    assert "Extract mine: waits for its turn" in parts.status_html(session)
    with pytest.raises(NotFoundError):
        session.jobs.finish(record, work)
    assert "Extract mine" not in parts.status_html(session)


def test_a_refresh_button_makes_the_host_look_too(session: Session, host: FakeHost):
    lists.looked(session, [], [])
    assert host.refreshed == 0
    lists.looked(session, [], [], rescan=True)
    assert host.refreshed == 1


def test_a_folder_that_cannot_be_read_is_said_and_keeps_the_lists(session: Session):
    def unreadable(_: Session) -> list[str]:
        raise PermissionError(13, "Permission denied", "/models/DPO")

    status, _, update = lists.looked(session, [listed(unreadable)], [""])
    assert 'role="alert"' in status
    assert "Permission denied" in status
    assert "choices" not in update


def test_the_foot_is_closed_where_nothing_is_missing(session: Session, host: FakeHost):
    host.self_test = lambda: (Check("hook", True, "was found"),)  # type: ignore[method-assign]
    foot = lists.foot_html(session)
    assert "everything that DPO needs was found" in foot
    assert "<details>" in foot


def test_the_status_line_says_why_a_model_is_none_of_ours(session: Session, host: FakeHost):
    broken = host.checkpoint_dir / "broken.safetensors"
    broken.write_bytes(b"no model")
    host.live.path = broken
    status = parts.status_html(session)
    assert "dpo-off" in status
    assert "dpo-problem" in status
    host.live.path = None
    status = parts.status_html(session)
    assert "no checkpoint is loaded yet" in status
    assert "Make one picture" in status


# ---- errors ----


def until(condition: Callable[[], bool]) -> None:
    """Files are looked at in the background where a list had no time for all."""
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("not after 10 s")


def run(session: Session, function: Any, *values: Any, outputs: int = 1) -> list[Any]:
    """An action as a click does it: errors become HTML; the status line is the last of what comes back."""
    found = clicks.guarded(session, partial(function, session), outputs)("", *values)
    assert len(found) == outputs + 1
    return found


@pytest.mark.parametrize(
    ("function", "values", "message"),
    [
        (extract.analyse, (parts.LOADED, "", *CONTROLS), "No DPO reference is chosen; choose one from the list"),
        (extract.analyse, ("nothing", "dpo-sd1", *CONTROLS), "there is no file named"),
        (extract.extract, (parts.LOADED, "dpo-sd1", "../evil", False, *SETTINGS), "which file names cannot have"),
        (extract.extract, (parts.LOADED, "dpo-sd1", "x", False, extract.BY_RANK, 999, *SETTINGS[2:]), "rank 999 is larger"),
        (extract.extract, (parts.LOADED, "dpo-sd1", "x", False, extract.BY_RANK, None, *SETTINGS[2:]), "the rank is missing"),
        (extract.extract, (parts.LOADED, "dpo-sd1", "x", False, extract.BY_SIZE, 4, 0, None, *SETTINGS[4:]), "is missing"),
        (extract.write_offset, (parts.LOADED, None, "", False), "No DPO reference is chosen|a name is missing"),
        (bake.bake, ("", 1.0, ""), "No offset is chosen; choose one from the list"),
        (bake.bake, ("none", None, ""), "the strength is missing"),
        (bake.bake, ("none", 0.0, ""), "strength 0 changes nothing"),
        (bake.bake, ("none", 1.0, ""), "there is no offset named"),
        (bake.save, ("none", 0.0, "", "x", False), "strength 0 changes nothing"),
        (compare.compare, ("x", "1", "a cat", "", "1", None, 7, "", 64, 64, ""), "Steps: a number is missing"),
        (compare.compare, ("x", "one", "a cat", "", "1", 4, 7, "", 64, 64, ""), "is neither a number nor a range"),
        (inspect.what_is, (None,), "No file is chosen"),
        (inspect.does_it_fit, (parts.LOADED, parts.LOADED, "gone"), "no DPO reference named"),
    ],
)
def test_refusals_are_one_sentence_with_what_to_do(session: Session, function: Any, values: Any, message: str):
    before = tiny.snapshot(session.host.folder)  # type: ignore[attr-defined]
    html, *_, status = run(session, function, *values)
    assert re.search(message, html, re.IGNORECASE), html
    assert html.startswith('<p class="dpo-alert" role="alert">')
    assert tags(html) == {"p"}
    assert "Traceback" not in html
    assert "base · SD 1.x · clean" in status
    assert tiny.snapshot(session.host.folder) == before  # type: ignore[attr-defined]


def test_what_nobody_foresaw_is_logged_and_said_in_a_sentence(session: Session, caplog: pytest.LogCaptureFixture):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError(EVIL)

    html, _ = run(session, fail)
    assert "This should not happen: ZeroDivisionError" in html
    assert tags(html) == {"p"}
    assert "Traceback" in caplog.text


def test_an_interrupt_is_news_and_no_error(session: Session):
    html = parts.error_html(session, Cancelled("stopped by Interrupt; nothing was left behind"))
    assert "Stopped by Interrupt" in html
    assert "alert" not in html


def test_other_outputs_stay_as_they_are_after_an_error(session: Session):
    _, second, third, _ = run(session, extract.analyse, parts.LOADED, "", *CONTROLS, outputs=3)
    assert second == third == parts.update()


def test_a_second_click_is_told_that_the_first_is_running(session: Session):
    running, go_on = threading.Event(), threading.Event()
    record = session.jobs.start("Analyse", lambda job: (running.set(), go_on.wait(10)))
    assert running.wait(10)
    html, _ = run(session, extract.analyse, parts.LOADED, "dpo-sd1", *CONTROLS)
    assert "Analyse: is running or waiting already" in html
    go_on.set()
    while not record.is_over:
        time.sleep(0.01)


def test_interrupt_stops_our_jobs_and_nothing_else(session: Session, host: FakeHost):
    session.jobs.interrupt()
    assert not host.interrupted, "somebody else's work goes on"
    running = threading.Event()

    def work(job: Any) -> None:
        while True:
            running.set()
            job.check()
            time.sleep(0.005)

    record = session.jobs.start("Analyse", work)
    assert running.wait(10)
    session.jobs.interrupt()
    while not record.is_over:
        time.sleep(0.01)
    assert record.state == "cancelled"


# ---- extract ----


def analysed(session: Session, base: str = parts.LOADED, *controls: Any) -> list[Any]:
    return run(session, extract.analyse, base, "dpo-sd1", *(controls or CONTROLS), outputs=5)[:5]


def test_analyse_answers_the_four_questions(session: Session, host: FakeHost):
    html = analysed(session)[0]
    for words in ("Is it the right base?", "Right base", "is itself the base", "LoRA or bake?", "Which strength", "IN00"):
        assert words in html
    assert "dpo-heat" in html
    host.live.load(host.checkpoint_dir / "other.safetensors")
    html = analysed(session, "base.safetensors")[0]
    assert "is far from the base" in html
    assert "0.5; compare" in html


def test_analyse_on_the_loaded_reference_does_not_say_that_it_fits(session: Session, host: FakeHost):
    base, reference = host.checkpoint_dir / "base.safetensors", host.checkpoint_dir / "tuned.safetensors"
    tiny.save(reference, tiny.tuned(rms=1e-3), torch.float16)
    host.live.load(reference)
    html = analysis_html(session, session.analyse(Silent(), base=base.name, reference=reference.name))
    assert "tuned is the reference itself: all of it is in it already" in html
    assert "0: the loaded model is the reference" in html


def test_analyse_on_a_loaded_base_that_is_the_wrong_one_repeats_that(session: Session, host: FakeHost):
    host.live.load(host.checkpoint_dir / "other.safetensors")
    html = analysed(session, "other.safetensors")[0]
    assert html.count("Wrong base: ") == 2
    assert "is itself the base" not in html
    assert "first look for the right base" in html


def test_the_card_of_an_offset_file_says_what_it_holds(session: Session, host: FakeHost):
    encoder = tiny.tuned(rms=1e-3)
    for key in encoder:
        if key.startswith("cond_stage_model.") and encoder[key].is_floating_point():
            encoder[key] = encoder[key] + 0.01
    reference = tiny.save(host.reference_dir / "both.safetensors", encoder)
    found = session.write_offset(Silent(), base="base.safetensors", reference=reference.stem, name="part")
    assert found.kept.total.energy_kept < 0.5
    html = offset_html(session, found)
    assert "It holds all" not in html
    assert f"It holds {markup.percent(found.kept.total.energy_kept)} of what DPO changed." in html


def test_analyse_draws_the_curve_and_ends_the_sliders(session: Session):
    _, curve, known, rank, conv_rank = analysed(session)
    assert "Rank 4 →" in curve
    assert "dpo-dot-marked" in curve
    last = session.figures.sizes(known.key, "portable", "fp16").largest_rank  # type: ignore[union-attr]  # it is known
    assert rank == parts.update(maximum=last)
    assert conv_rank == parts.update(maximum=last)
    wide = analysed(session, parts.LOADED, extract.BY_RANK, 300, 0, 80, 50, "portable", "fp16")
    assert wide[3] == parts.update(value=last)  # and its end at the next look


def test_the_second_look_measures_nothing(session: Session, host: FakeHost, monkeypatch: pytest.MonkeyPatch):
    from lib_dpo.operations.outlook import figures

    old = time.time() - 60  # hashes of files that were written just now are not remembered
    for path in host.folder.rglob("*.safetensors"):
        os.utime(path, (old, old))
    first = analysed(session)
    monkeypatch.setattr(figures, "measure", None)
    assert analysed(session)[:2] == first[:2]
    again = Session(host)  # after a restart
    assert outlook.outlook(again, parts.LOADED, "dpo-sd1", *CONTROLS)[0] == first[1], "known before it is asked for"
    assert analysed(again)[:2] == first[:2]


def test_moving_a_control_moves_one_marked_point_and_reads_no_file(session: Session, host: FakeHost):
    known = analysed(session)[2]
    shutil.rmtree(host.reference_dir)
    seen = set()
    for controls in (
        (extract.BY_RANK, 4, 0), (extract.BY_RANK, 8, 0), (extract.BY_RANK, 8, 2), (extract.BY_SIZE, 4, 0),
        (extract.BY_ENERGY, 4, 0), (extract.EXACT, 4, 0),
    ):  # fmt: skip
        (html,) = outlook.moved(session, known, *controls, 1.0, 50, "portable", "fp16")
        assert html.count("dpo-dot-marked") == 1
        seen.add(re.search('dpo-marked-words">([^<]+)<', html)[1])  # type: ignore[index]
    assert len(seen) == 6
    (html,) = outlook.moved(session, known, extract.BY_RANK, None, 0, 80, 50, "portable", "fp16")
    assert "the rank is missing" in html.casefold()
    assert "dpo-curve" in html, "an error takes the place of nothing else"
    assert outlook.moved(session, None, *CONTROLS) == [parts.update()]


def test_what_takes_long_is_said_first(session: Session, host: FakeHost):
    html, known, *_ = outlook.outlook(session, parts.LOADED, "dpo-sd1", *CONTROLS)
    assert "a minute or two" in html
    assert known is not None
    assert known.key is None
    assert outlook.outlook(session, parts.LOADED, "", *CONTROLS)[:2] == ["", None]
    shutil.rmtree(host.reference_dir / "dpo-sd1")
    html, known, *_ = outlook.outlook(session, parts.LOADED, "dpo-sd1", *CONTROLS)
    assert "dpo-alert" in html
    assert known is None


def test_a_cache_folder_that_cannot_be_written_is_said_and_no_more(session: Session, host: FakeHost):
    host.cache_dir.write_text("a file in its place")
    html, curve, known, *_ = analysed(session)
    assert "are not remembered: nothing could be written" in html
    assert "Is it the right base?" in html
    assert "Rank 4 →" in curve
    assert "Rank 8 →" in outlook.moved(session, known, extract.BY_RANK, 8, *CONTROLS[2:])[0]


@pytest.mark.parametrize(("name", "words"), [
    ("published", "Rank 32 →"), ("small", "ranks up to"), ("most", "ranks up to"), ("exact", "keeps all of the change"),
])  # fmt: skip
def test_presets_end_where_the_model_does(session: Session, name: str, words: str):
    known = analysed(session)[2]
    values = [update.get("value", old) for update, old in zip(outlook.preset(session, name, known), CONTROLS[:5], strict=True)]
    last = session.figures.sizes(known.key, "portable", "fp16").largest_rank  # type: ignore[union-attr]  # it is known
    (html,) = outlook.moved(session, known, *values, "portable", "fp16")
    assert words.replace("32", str(min(128, last))) in html
    assert "dpo-alert" not in html


def test_lora_or_bake_follows_from_the_figures(session: Session):
    from lib_dpo.webui.tab.extract.cards import _lora_or_bake

    def said(kept: float, *, encoders: bool = False) -> str:
        from types import SimpleNamespace

        spectra: Any = SimpleNamespace(ranks=[64], energy_at_rank=[kept])
        return " ".join(_lora_or_bake(spectra, encoders=encoders))

    answers = {said(kept).partition(":")[0] for kept in (0.98, 0.6, 0.3)}
    assert len(answers) == 3
    assert "98.0 %" in said(0.98)
    assert "bake would add nothing" in said(0.98)
    assert "30.0 %" in said(0.3)
    assert "All of it is in an exact LoRA" in said(0.3)
    assert "All of the UNet's part is in an exact LoRA" in said(0.3, encoders=True), "no file holds an encoder's norms"


def test_the_first_view_says_which_file_to_put_where(session: Session):
    assert "choose one in the list" in first_view(session, "")
    assert "mhdang" not in first_view(session, "")  # the list below is filled in a moment
    shutil.rmtree(session.host.reference_dir / "dpo-sd1")
    html = first_view(session, "")
    for words in ("Get a reference", "Extract", "Compare", "mhdang/dpo-sd1.5-text2image-v1", "DPO/dpo-sd1.5.safetensors"):
        assert words in html
    chosen = first_view(session, EVIL)
    assert "mhdang" not in chosen
    assert "img" not in tags(chosen)


def test_a_new_file_is_handed_over_to_other_pages(session: Session):
    blocks = build(session)
    _, name, _ = run(session, extract.extract, parts.LOADED, "dpo-sd1", "mine", False, *SETTINGS, outputs=2)
    assert name == "mine"
    for page in ("compare", "bake"):
        (row,) = [row for row in dependencies(blocks) if (f"dpo_extract_to_{page}", "click") in row[0]]
        assert row[2] == [f"dpo_{page}_offset"]
    listed = parts.Listed(None, parts.offsets, parts.named_dpo)
    assert extract._chosen(session, listed, "mine")["value"] == "mine"
    assert extract._chosen(session, listed, "gone") == parts.update()


def test_extract_says_what_it_kept_and_how_to_use_it(session: Session, host: FakeHost):
    html = run(session, extract.extract, parts.LOADED, "dpo-sd1", "", False, *SETTINGS, outputs=2)[0]
    assert "dpo-sd1-lora is written" in html
    assert re.search(r"keeps .* of what DPO changed: \d+\.\d % of the energy", html)
    assert "&lt;lora:dpo-sd1-lora:1&gt;" in html
    assert 'data-dpo-prompt="&lt;lora:dpo-sd1-lora:1&gt;"' in html
    assert re.search(r"knows ([\d,]+) of its \1 keys", html)
    assert (host.lora_dir / "dpo-sd1-lora.safetensors").exists()
    again = run(session, extract.extract, parts.LOADED, "dpo-sd1", "", False, *SETTINGS, outputs=2)[0]
    assert "exists already" in again
    assert "is written" in run(session, extract.extract, parts.LOADED, "dpo-sd1", "", True, *SETTINGS, outputs=2)[0]


def test_extract_by_share_says_when_it_fell_short(session: Session):
    by_energy = (extract.BY_ENERGY, 4, 0, 80, 100, "auto", "portable", "fp16")
    html = run(session, extract.extract, parts.LOADED, "dpo-sd1", "all", False, *by_energy, outputs=2)[0]
    assert "You asked for 100.0 %" in html
    by_size = (extract.BY_SIZE, 4, 0, 0.5, 50, "auto", "portable", "fp16")
    assert "is written" in run(session, extract.extract, parts.LOADED, "dpo-sd1", "small", False, *by_size, outputs=2)[0]


def test_write_offset_file(session: Session, host: FakeHost):
    html = run(session, extract.write_offset, parts.LOADED, "dpo-sd1", "exact", False, outputs=2)[0]
    assert "exact is written" in html
    assert (host.reference_dir / "exact.safetensors").exists()


# ---- bake ----


def test_what_baking_costs_is_said_before(with_lora: Session):
    html = before.foresee(with_lora, "mine", "")
    assert "a LoRA for SD 1.x, as the loaded model is" in html
    assert "of main memory" in html
    assert "282 weights" in html
    assert before.foresee(with_lora, "", "") == ""
    assert "block weight" in before.foresee(with_lora, "mine", "NOSE=1")
    assert "no offset named" in before.foresee(with_lora, "gone", "")
    assert "comes on top" not in before.foresee(with_lora, "mine", "")


def test_a_bake_on_top_of_one_in_the_file_is_said_before(with_lora: Session, host: FakeHost):
    run(with_lora, bake.save, "mine", 0.5, "", "with-mine", False)
    path = host.live.loaded().path
    kept = path.read_bytes()
    try:
        path.write_bytes((path.parent / "with-mine.safetensors").read_bytes())
        os.utime(path, (1, 1))  # another file to whoever remembers this one
        html = before.foresee(with_lora, "mine", "")
        assert "has mine × 0.5 baked in already: this comes on top" in html
        assert "dpo-doubt" in html
    finally:
        path.write_bytes(kept)
        (path.parent / "with-mine.safetensors").unlink()


def test_undo_is_off_where_nothing_is_baked(with_lora: Session):
    assert bake.undo_now(with_lora)["interactive"] is False
    run(with_lora, bake.bake, "mine", 0.8, "")
    assert bake.undo_now(with_lora)["interactive"] is True
    run(with_lora, bake.unbake)
    assert bake.undo_now(with_lora)["interactive"] is False
    off = [block for block in components(build(with_lora)) if getattr(block, "elem_id", "") == "dpo_bake_undo"]
    assert [block.interactive for block in off] == [False]  # until the model was looked at


def test_without_offsets_the_page_says_where_to_get_one(session: Session, with_lora: Session, host: FakeHost):
    assert before.nothing_to_bake(with_lora, None)[0]["visible"] is False
    for entry in with_lora.library.offsets():
        entry.path.unlink()
    assert "Make one on the page Extract" in before.nothing_to_bake(with_lora, None)[0]["value"]


@pytest.mark.parametrize(
    ("storage", "strength", "words"),
    [
        ("float32", 0.5, "100.0 % of the change survives rounding to the model&#x27;s numbers (float32) at strength 0.5."),
        ("bfloat16", 0.05, "load the model in float16 if it is to take up more"),
        ("nf4", 0.5, "nothing is rounded away, the change is added in every step"),
        ("float8_e4m3fn online", 0.5, "nothing is rounded away, the change is added in every step"),
    ],
)
def test_what_survives_the_models_numbers_is_said_before_the_click(
    with_lora: Session, host: FakeHost, monkeypatch: pytest.MonkeyPatch, storage: str, strength: float, words: str
):
    loaded = replace(with_lora.loaded(), storage=storage.split()[0], online="online" in storage)
    monkeypatch.setattr(host.live, "loaded", lambda: loaded)
    assert words in before.foresee(with_lora, "mine", "", strength)
    assert "survives" not in before.foresee(with_lora, "mine", "", 0.0)
    assert "survives" not in before.foresee(with_lora, "mine", "", None)


def test_a_pickle_is_not_loaded_to_say_what_would_survive(with_lora: Session, host: FakeHost, monkeypatch: pytest.MonkeyPatch):
    patch = with_lora.patch("mine")
    loaded = replace(with_lora.loaded(), path=host.checkpoint_dir / "of-ten-gigabytes.ckpt")
    monkeypatch.setattr(host.live, "loaded", lambda: loaded)
    assert with_lora.survives(patch, 1.0) == (None, "float32")


def test_bake_and_undo(with_lora: Session):
    clean = with_lora.host.live.fingerprint()
    html, status = run(with_lora, bake.bake, "mine", 0.8, "MID=0")
    assert "Baked into the loaded model" in html
    assert "baked: mine × 0.8 (MID=0)" in status
    assert "takes the place of mine, which is baked in now" in before.foresee(with_lora, "mine", "")
    html, status = run(with_lora, bake.unbake)
    assert "bit for bit" in html
    assert "clean" in status
    assert with_lora.host.live.fingerprint() == clean
    assert "Nothing was baked" in run(with_lora, bake.unbake)[0]


def test_what_of_a_lora_counts_once_or_has_no_place_is_said_wherever_it_is_used(with_lora: Session, host: FakeHost):
    tensors = load_file(host.lora_dir / "mine.safetensors")
    one, other = (
        f"lora_unet_{block}_transformer_blocks_0_attn1_to_q" for block in ("down_blocks_0_attentions_0", "input_blocks_1_1")
    )
    again = {other + key.removeprefix(one): tensor for key, tensor in tensors.items() if key.startswith(one + ".")}
    assert len(again) == 3
    odd = {f"lora_te_text_model_encoder_layers_40_mlp_fc1.lora_{end}.weight": torch.ones(2, 2) for end in ("up", "down")}
    tiny.save(host.lora_dir / "odd.safetensors", tensors | again | odd)
    once, missing = (
        "3 keys say again what others say, and count once",
        "The text encoder&#x27;s part is missing or incomplete: 2 keys",
    )
    html = run(with_lora, compare.compare, "odd", "1", "a cat", "", "1", 4, 7, "", 64, 64, "", outputs=9)[0]
    for said in (
        html,
        before.foresee(with_lora, "odd", ""),
        run(with_lora, bake.save, "odd", 1.0, "", "", False)[0],
    ):
        assert once in said
        assert missing in said
    assert missing in run(with_lora, bake.bake, "odd", 1.0, "")[0]
    assert "count once" not in before.foresee(with_lora, "mine", "")


@pytest.mark.parametrize("arch", ["sd1", "sdxl"])
def test_presets_are_blocks_that_every_model_has(arch: str):
    from lib_dpo.families.arch import ARCHITECTURES
    from lib_dpo.families.blocks import check_blocks, parse_blocks

    for text in blocks.PRESETS.values():
        check_blocks(parse_blocks(text), ARCHITECTURES[arch])


def test_presets_leave_what_their_names_say():
    from lib_dpo.families.arch import ARCHITECTURES
    from lib_dpo.families.blocks import parse_blocks
    from lib_dpo.families.keymap import component_of
    from lib_dpo.families.shapes import checkpoint_shapes

    arch = ARCHITECTURES["sdxl"]
    keys = [key for key in checkpoint_shapes("sdxl") if component_of(arch, key) == "unet"]

    def left(preset: str) -> set[str]:
        weights = parse_blocks(blocks.PRESETS[preset])
        return {key for key in keys if weights.of(arch, key)}

    assert left("Attention only") == {key for key in keys if ".attn1." in key or ".attn2." in key}
    convolutions = left("Convolutions only")
    assert {len(checkpoint_shapes("sdxl")[key]) for key in convolutions if key.endswith("weight")} == {4}
    assert not any("transformer_blocks" in key or "norm" in key for key in convolutions)
    assert all(".input_blocks." in key for key in left("Only the way down (composition)"))


@given(
    text=st.sampled_from(
        ["", "IN00=0.5", "ALL=0,IN=1", "ATTN1=0", "UNET=0.5,MID=2", "IN=0.3,OUT03=-1,TE=0", "CONV=0,ATTN=0.25"]
    ),
    place=st.integers(0, len(blocks.GROUPS) - 1),
    value=st.integers(-40, 40).map(lambda n: n / 20),
)
def test_a_slider_of_a_group_writes_its_weight_and_leaves_the_others(text: str, place: int, value: float):
    values = blocks.of_groups(text)
    assert blocks.with_groups(text, values) == text
    values[place] = value
    written = blocks.with_groups(text, values)
    assert blocks.of_groups(written) == values
    kept = {part for part in text.split(",") if part and part.split("=")[0] != list(blocks.GROUPS)[place]}
    assert kept <= set(written.split(","))


def test_presets_sliders_and_text_follow_each_other():
    preset, *sliders = blocks.shown("ALL=0,IN=1")
    assert preset == "Only the way down (composition)"
    assert dict(zip(blocks.GROUPS, sliders, strict=True)) == dict.fromkeys(blocks.GROUPS, 0) | {
        "IN": 1, "ATTN": 1, "FF": 1, "CONV": 1,
    }  # fmt: skip
    assert blocks.shown("ALL=0,IN=0.5")[0] == blocks.OWN
    assert blocks.chosen("Without the middle") == ["MID=0", *blocks.of_groups("MID=0")]
    unread = "IN=0.5,MI"
    for silent in (*blocks.shown(unread), *blocks.moved(unread, *[1.0] * len(blocks.GROUPS)), *blocks.chosen(blocks.OWN)):
        assert "value" not in silent
    assert blocks.shown("IN=9")[1] == 2.0
    assert blocks.moved("IN=9", *blocks.of_groups("IN=9")) == ["IN=9", blocks.OWN]


def test_save_says_what_became_of_the_configuration(with_lora: Session, host: FakeHost):
    (host.checkpoint_dir / "base.yaml").write_text("model: {}")
    html = run(with_lora, bake.save, "mine", 1.0, "", "", False)[0]
    assert "copied the target&#x27;s .yaml to " in html
    assert (host.checkpoint_dir / "base-dpo.yaml").exists()


def test_save_as_checkpoint(with_lora: Session, host: FakeHost):
    html = run(with_lora, bake.save, "mine", 1.0, "", "", False)[0]
    assert "base-dpo is saved" in html
    assert "Rounding" in html
    assert (host.checkpoint_dir / "base-dpo.safetensors").exists()
    assert "exists already" in run(with_lora, bake.save, "mine", 1.0, "", "", False)[0]


# ---- compare ----


def compared(session: Session) -> list[Any]:
    return run(session, compare.compare, "mine", "0.5, 1", "a cat\n\na dog", "", "1, 2", 4, 7, "", 64, 64, "", outputs=9)


def test_compare_shows_grid_verdict_and_a_pair(with_lora: Session):
    html, cells, grid, _, pair, wipe, where, made, *_ = compared(with_lora)
    assert cells.count("<img ") == 3 * 4
    assert "strength 0.5" in html
    assert grid["value"].width > 3 * 64
    assert grid["value"].info["parameters"].startswith("a cat")
    assert len(pair["choices"]) == 8
    assert pair["value"] in pair["choices"]
    assert wipe.count("data:image/jpeg;base64,") == 2
    assert 'type="range"' in wipe
    assert where["visible"] is True
    other, _ = compare.look(with_lora, made, pair["choices"][-1])
    assert "strength 1" in other
    assert tags(html) <= {"section", "h4", "span", "p", "div", "table", "caption", "thead", "tbody", "tr", "th", "td"}


def test_every_picture_is_shown_as_it_comes(with_lora: Session):
    shown: list[str] = []
    values = ("mine", "0.5, 1", "a cat", "", "1, 2", 4, 7, "", 64, 64, "")
    compare.compare(with_lora, None, *values, show=lambda *found: shown.append(found[1]))
    assert [html.count("<img ") for html in shown] == list(range(7))
    assert "Picture 1 of 6" in shown[0]
    assert all(html.count("dpo-empty") == 6 - n for n, html in enumerate(shown))
    shown.clear()
    with pytest.raises(HostError):
        compare.compare(with_lora, None, "mine", "1", "a cat\nfail", *values[3:], show=lambda *found: shown.append(found[1]))
    assert shown[-1] == ""  # no half of a table stays


def test_what_streams_gives_its_last_word_and_every_one_before(session: Session):
    def work(show: Any) -> list[Any]:
        show("half")
        return ["whole", "rest"]

    assert list(clicks.streamed(work, 2)) == [["half", parts.update()], ["whole", "rest"]]
    events = build(session).get_config_file()["dependencies"]
    assert sum(bool(row["types"]["generator"]) for row in events) == 2  # compare, and undo and compare


def test_two_offsets_side_by_side(with_lora: Session):
    run(with_lora, extract.write_offset, parts.LOADED, "dpo-sd1", "dense", False, outputs=2)
    values = ("mine", "0, 1", "a cat", "", "1", 4, 7, "", 64, 64, "")
    html, cells, *_ = run(with_lora, compare.compare, *values, "dense.safetensors", outputs=9)
    assert "mine × 1" in html
    assert "dense × 1" in html
    assert cells.count("<img ") == 3
    assert "compared with itself" in run(with_lora, compare.compare, *values, "mine", outputs=9)[0]


def test_the_function_kept_is_said_with_what_it_was_measured_against(with_lora: Session):
    values = ("mine", "1", "a cat\na dog", "", "1", 4, 7, "", 64, 64, "", compare.ALONE, True)
    assert "write one on the page Extract" in run(with_lora, compare.compare, *values, outputs=9)[0]
    run(with_lora, extract.write_offset, parts.LOADED, "dpo-sd1", "dense", False, outputs=2)
    html = run(with_lora, compare.compare, *values, outputs=9)[0]
    assert "of the function" in html
    assert "Of what dense changes in this model" in html


@pytest.mark.parametrize(
    ("storage", "strengths", "blocks", "reason"),
    [
        ("float8_e4m3fn", "1", "", "about 32% of mine survives rounding to the model's numbers (float8_e4m3fn)"),
        ("float32", "0.1, 0.2", "", "no strength is above 0.2: try 1"),
        ("float32", "1", "ALL=0.1", "the block weights leave at most 0.1 of mine"),
        ("float32", "1", "", ""),
    ],
)
def test_a_reason_for_no_effect_is_said_where_it_is_known(
    with_lora: Session, host: FakeHost, monkeypatch: pytest.MonkeyPatch, storage: str, strengths: str, blocks: str, reason: str
):
    from lib_dpo.webui.comparing import Asked, compare

    loaded = replace(with_lora.loaded(), storage=storage)
    monkeypatch.setattr(host.live, "loaded", lambda: loaded)
    picture = host.generate(Request("a cat", width=64, height=64, steps=1), None, 0.0)
    monkeypatch.setattr(host, "generate", lambda *_: picture)
    asked = Asked("mine", ["a cat"], strengths=strengths, seeds="1", steps=1, width=64, height=64, blocks=blocks)
    found = with_lora.jobs.run("compare", lambda job: compare(with_lora, job, asked))
    assert found.report.level == "none"
    assert [remark for remark in found.remarks if "preview beside" not in remark] == ([reason] if reason else [])


def test_undo_and_compare_is_offered_where_something_is_baked(with_lora: Session, host: FakeHost):
    run(with_lora, bake.bake, "mine", 1.0, "")
    shown: list[tuple[Any, ...]] = []
    values = ("mine", "1", "a cat", "", "1", 4, 7, "", 64, 64, "")
    with pytest.raises(HostError, match="undo it first"):
        compare.compare(with_lora, None, *values, show=lambda *found: shown.append(found))
    assert shown[0][8]["visible"] is True
    html, *_, button, _ = run(with_lora, compare.undo_and_compare, *values, outputs=9)
    assert "dpo-card" in html
    assert button["visible"] is False
    assert host.live.baked() is None


def test_how_many_pictures_and_how_long_is_said_before(with_lora: Session):
    asked = ("0.5, 1", "a cat\na dog", "1, 2", 4, 64, 64, compare.ALONE, False)
    assert "12 pictures" in compare.told(with_lora, *asked)
    assert "The first ones tell" in compare.told(with_lora, *asked)
    compared(with_lora)
    assert "about 0 s" in compare.told(with_lora, *asked)
    with_lora.pace = 1 / (64 * 64)  # a second for each step of such a picture
    assert "about 48 s" in compare.told(with_lora, *asked)
    assert "about 51 min" in compare.told(with_lora, *asked[:4], 0, 0, *asked[6:])  # 512: what SD 1.x was made for
    assert "neither a number nor a range" in compare.told(with_lora, "many", *asked[1:])
    assert "12 pictures (3 prompts" in compare.told(with_lora, "1", "", *asked[2:]), "three ready-made ones"
    assert len(compare.ready_made(with_lora).splitlines()) == 3


def test_the_effect_is_drawn_over_the_strength(with_lora: Session):
    html = run(with_lora, compare.compare, "mine", "0.5, 1, 2", "a cat", "", "1", 4, 7, "", 64, 64, "", outputs=9)[0]
    assert html.count("<circle") == 3
    assert '<svg class="dpo-effects"' in html
    assert "<svg" not in compared(with_lora)[0]  # two points are no curve


def test_pictures_that_are_gone_are_said(with_lora: Session):
    for made, label in ((None, "1. x"), (compared(with_lora)[7], "nothing")):
        html, where = compare.look(with_lora, made, label)
        assert "compare again" in html
        assert where["visible"] is False


def test_where_no_picture_can_be_shown_nothing_is_drawn(with_lora: Session, host: FakeHost):
    """Gradio itself would say "Error", after all of the work."""
    made = compared(with_lora)[7]
    host.no_pictures, drawn = "No picture could be shown: disk full", list(host.told)
    assert host.no_pictures in compared(with_lora)[0]
    assert host.told == drawn
    html, where = compare.look(with_lora, made, next(iter(compare._labels(made))))
    assert host.no_pictures in html
    assert where["visible"] is False


def test_compare_with_a_bake_in_the_model_is_refused(with_lora: Session):
    run(with_lora, bake.bake, "mine", 1.0, "")
    assert "undo it first" in compared(with_lora)[0]


# ---- inspect ----


def test_what_a_file_is(with_lora: Session):
    html = run(with_lora, inspect.what_is, "mine")[0]
    assert "It is a LoRA, SD 1.x." in html
    assert "Metadata" in html
    assert "It is a UNet alone, SD 1.x." in run(with_lora, inspect.what_is, "dpo-sd1")[0]


def test_a_model_that_is_its_own_base_is_asked_about(session: Session):
    for target in (parts.LOADED, "base.safetensors"):
        html = run(session, inspect.does_it_fit, target, parts.LOADED, "dpo-sd1")[0]
        assert "dpo-alert" in html
        assert "choose as the base the checkpoint that DPO started from" in html
    html = run(session, inspect.does_it_fit, "base.safetensors", "base.safetensors", "dpo-sd1")[0]
    assert "dpo-doubt" in html
    assert "so it was compared with itself" in html


def test_a_bake_in_the_loaded_model_does_not_count_for_its_file(with_lora: Session):
    asked = (with_lora, inspect.does_it_fit, parts.LOADED, "base.safetensors", "dpo-sd1")
    assert "does not count here" not in run(*asked)[0]
    with_lora.jobs.run("bake", lambda job: with_lora.bake(job, offset="mine", strength=0.5))
    for target in (parts.LOADED, "base.safetensors"):
        html = run(with_lora, inspect.does_it_fit, target, "base.safetensors", "dpo-sd1")[0]
        assert "the loaded model had mine × 0.5 baked in. That does not count here" in html
    assert "dpo-card" in run(with_lora, inspect.does_it_fit, "dpo-sd1", "base.safetensors", "dpo-sd1")[0]
    other = run(with_lora, inspect.does_it_fit, "other.safetensors", "base.safetensors", "dpo-sd1")[0]
    assert "does not count here" not in other


def test_the_base_is_found_by_what_is_in_it(session: Session, monkeypatch: pytest.MonkeyPatch):
    html = run(session, inspect.does_it_fit, "other.safetensors", inspect.FOUND, "dpo-sd1")[0]
    assert re.search("Base, found among your checkpoints<[^a-z]*[a-z]*><[a-z]*>base.safetensors", html)
    monkeypatch.setattr(session.references, "bases", lambda *_: Bases((), 2, ()))
    html = run(session, inspect.does_it_fit, "other.safetensors", inspect.FOUND, "dpo-sd1")[0]
    assert "None of the 2 checkpoints that can be looked into is the base that dpo-sd1 was tuned from" in html


def test_does_it_fit(session: Session):
    html = run(session, inspect.does_it_fit, "other.safetensors", parts.LOADED, "dpo-sd1")[0]
    assert "is far from the base" in html
    assert "Strength to start with" in html
    assert ">MID</th>" in html


# ---- names from the disk ----


EVIL_NAMES = ("<img src=x onerror=alert(1)>", '"><script>alert(1)</script>', "' onmouseover='alert(1)")


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_names_and_metadata_never_become_elements(with_lora: Session, host: FakeHost, name: str):
    path = host.lora_dir / "mine.safetensors"
    host.loras = lambda: [FileEntry(name, path)]  # type: ignore[method-assign]
    host.version = host.name = name  # type: ignore[misc]
    loaded = host.live.loaded()
    assert loaded
    host.live.loaded = lambda: type(loaded)(name, loaded.path, name, name)  # type: ignore[method-assign]
    allowed = {
        "p", "span", "section", "h4", "dl", "dt", "dd", "details", "summary", "table", "caption", "tbody", "thead", "tr",
        "th", "td", "div", "code", "ul", "li", "b", "img", "input", "button", "figure",
        "figcaption", "svg", "path", "rect", "title",
    }  # fmt: skip
    shown = [
        lists.foot_html(with_lora),
        before.foresee(with_lora, name, ""),
        before.foresee(with_lora, "gone" + name, name),
        *run(with_lora, bake.bake, name, 1.0, "")[:2],
        run(with_lora, inspect.what_is, name)[0],
        run(with_lora, extract.analyse, name, name, *CONTROLS)[0],
        comparison.wipe_html(*(2 * [compare_image()]), name),
    ]
    for html in shown:
        assert tags(html) <= allowed - {"script"}
        assert "<script" not in html
        assert "<img src=x" not in html


def compare_image() -> Any:
    from PIL import Image

    return Image.new("RGB", (8, 8))


def test_markup_escapes_everything():
    for html in (
        markup.alert(EVIL), markup.note(EVIL), markup.card(EVIL, EVIL), markup.facts([(EVIL, EVIL)]), markup.code(EVIL),
        markup.bars(EVIL, [(EVIL, 1.0, EVIL)]), markup.table([EVIL], [[EVIL]], EVIL), markup.folded(EVIL, ""),
        markup.headed(EVIL, EVIL),
    ):  # fmt: skip
        assert "img" not in tags(html)
        assert "&lt;img" in html
    assert "\x1b" not in markup.text("\x1b[31mred")


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.0, "all"), (0.93, "nearly all"), (0.5, "about half"), (0.31, "about a third"), (0.02, "very little"), (-1, "nothing")],
)
def test_shares_in_words(share: float, words: str):
    assert markup.in_words(share) == words
