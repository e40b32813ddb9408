"""The section «Get a reference»: consent, a fetch beside the host's work, what is shown on return, and the base that fits."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import webui_files
from test_references import DPO, FilesHub

from lib_dpo.errors import BusyError, SettingError
from lib_dpo.files.references.known import NOT_KNOWN, REFERENCES, UNET_FILE
from lib_dpo.hosts.base import FileEntry
from lib_dpo.webui.jobs import Jobs
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import parts
from lib_dpo.webui.tab.extract import references
from lib_dpo.webui.tab.extract.reference_cards import known_html, table_html

needs_library = pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"), reason="needs huggingface_hub")
ALERT, VIEW, OFFER, GO, CANCEL, TABLE = range(6)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return webui_files.make(tmp_path_factory.mktemp("picker"))


@pytest.fixture
def session(files: Path, tmp_path: Path) -> Session:
    return webui_files.open_session(files, tmp_path / "models")


@pytest.fixture(scope="module")
def served() -> Iterator[FilesHub]:
    hub = FilesHub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def hub(served: FilesHub, files: Path, monkeypatch: pytest.MonkeyPatch) -> FilesHub:
    """The hub of this process, with the reference of `base` as the published one of SD 1.5."""
    import huggingface_hub
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as file_download

    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        for name, value in {
            "ENDPOINT": served.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("reset_sessions", "close_session"):  # by version; an open one may be closed to the network
        if reset := getattr(huggingface_hub.utils, name, None) or getattr(huggingface_hub, name, None):
            reset()
    reference = files / "DPO" / "dpo-sd1" / "unet" / "diffusion_pytorch_model.safetensors"
    served.repos = {DPO: {UNET_FILE: reference.read_bytes()}}
    served.refuse, served.breaks, served.slow, served.wrong = {}, [], 0.0, False
    served.ranges.clear()
    return served


def wait_for(found: Callable[[], Any]) -> Any:
    until = time.monotonic() + 60
    while not (value := found()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return value


def ended(session: Session) -> list[Any]:
    wait_for(lambda: session.references.last and session.references.last.record.is_over)
    return references.looked(session, "dpo-sd1.5", None)


# ---- the table ----


def test_the_table_says_what_is_known_and_what_is_not(session: Session):
    html = table_html(session)
    for reference in REFERENCES:
        assert f">{reference.name}</a>" in html
        assert reference.page in html
    assert NOT_KNOWN in html
    assert "10.30 GB" in html
    assert html.count("can be fetched") == len([each for each in REFERENCES if each.can_be_fetched])


def test_a_file_of_that_name_is_here_and_a_part_of_it_is_begun(session: Session):
    folder = session.host.reference_dir
    (folder / "dpo-sd1.5.safetensors").write_bytes(b"x")
    (folder / ".dpo-sdxl.safetensors.0123456789ab.fetch").write_bytes(b"x" * 1_500_000)
    states = {row.reference.name: (row.state, row.kept) for row in session.references.rows()}
    assert states["dpo-sd1.5"] == ("here", 0)
    assert states["dpo-sdxl"] == ("begun", 1_500_000)
    assert "begun: 1.5 MB are here" in table_html(session)
    assert "is here already" in known_html(session, "dpo-sd1.5")


def test_the_section_is_open_where_there_is_no_reference(session: Session):
    assert "open" not in references.returned(session, "dpo-sd1.5", None)[0]
    shutil.rmtree(session.host.reference_dir)
    assert references.returned(session, "dpo-sd1.5", None)[0]["open"] is True


def test_what_is_two_models_is_not_offered(session: Session):
    found = references.asked(session, "chats-sdxl")
    assert "published as two models" in found[ALERT]
    assert found[OFFER] is None
    assert found[GO]["visible"] is False


# ---- consent ----


@needs_library
def test_nothing_is_fetched_before_it_was_asked_and_agreed_to(session: Session, hub: FilesHub):
    with pytest.raises(SettingError, match="press Ask the hub first"):
        session.references.start(None, "dpo-sd1.5")
    found = references.asked(session, "dpo-sd1.5")
    for words in ("Fetch dpo-sd1.5?", "openrail++", "models/DPO/dpo-sd1.5.safetensors", "SHA-256"):
        assert words in found[VIEW]
    assert found[GO]["visible"] is True
    assert "MB" in found[GO]["value"]
    assert not hub.ranges
    assert "was not asked for yet" in references.started(session, found[OFFER], "dpo-sdxl")[ALERT]
    assert references.chosen(session, "dpo-sdxl")[OFFER] is None, "an offer holds for its own reference alone"


@needs_library
def test_without_a_network_it_says_what_to_put_where(session: Session, hub: FilesHub, monkeypatch: pytest.MonkeyPatch):
    hub.refuse[DPO] = (500, "")
    found = references.asked(session, "dpo-sd1.5")
    assert "cannot be fetched" in found[ALERT]
    assert f"https://huggingface.co/{DPO}" in found[VIEW]
    assert "save it as models/DPO/dpo-sd1.5.safetensors" in found[VIEW]


@needs_library
def test_a_file_of_that_name_is_said_before_anything_is_fetched(session: Session, hub: FilesHub):
    own = session.host.reference_dir / "dpo-sd1.5.safetensors"
    own.write_bytes(b"mine")
    found = references.asked(session, "dpo-sd1.5")
    assert "exists already, and is not replaced" in found[ALERT]
    assert str(own.parent) not in found[ALERT]
    assert found[GO]["visible"] is False
    assert own.read_bytes() == b"mine"


# ---- the fetch ----


@needs_library
def test_a_fetch_ends_with_hash_and_base_which_go_into_the_lists(session: Session, hub: FilesHub):
    offer = references.asked(session, "dpo-sd1.5")[OFFER]
    references.started(session, offer, "dpo-sd1.5")
    found = ended(session)
    last = session.references.last
    assert last
    assert last.fetched, last.record.error
    assert last.fetched.sha256 in found[VIEW]
    assert "as the hub announced" in found[VIEW]
    assert "base.safetensors fits as its base" in found[VIEW]
    assert ">here<" in found[TABLE]
    base, reference = references.taken(session)
    assert (base["value"], reference["value"]) == ("base.safetensors", "dpo-sd1.5.safetensors")
    assert session.jobs.get(last.record.id).as_json()["result"]["sha256"] == last.fetched.sha256


@needs_library
def test_a_fetch_goes_on_when_nobody_looks_and_is_shown_on_return(session: Session, hub: FilesHub):
    hub.slow = 0.05
    references.started(session, references.asked(session, "dpo-sd1.5")[OFFER], "dpo-sd1.5")
    shown = references.returned(session, "dpo-sd1.5", None)  # another page, or the same one again
    assert shown[0]["open"] is True
    assert "dpo-fetching" in shown[1 + VIEW]
    assert shown[1 + CANCEL]["visible"] is True
    assert "value" not in references.followed(session, "dpo-sd1.5", None)[TABLE], "the table moves under its reader"
    assert shown[1 + GO]["visible"] is False
    wait_for(lambda: session.references.last and session.references.last.record.is_over)
    shown = references.returned(session, "dpo-sd1.5", None)
    assert shown[0]["open"] is True
    assert "dpo-sd1.5.safetensors is here" in shown[1 + VIEW]
    assert "open" not in references.returned(session, "dpo-sd1.5", None)[0], "what was seen is no news"


@needs_library
def test_a_fetch_keeps_nobody_waiting_and_interrupt_leaves_it_alone(session: Session, hub: FilesHub):
    hub.slow = 0.2
    references.started(session, references.asked(session, "dpo-sd1.5")[OFFER], "dpo-sd1.5")
    assert session.jobs.run("another", lambda job: "done") == "done"
    assert not session.jobs.busy
    session.jobs.interrupt()
    last = session.references.last
    assert last
    assert not last.record.is_over
    with pytest.raises(BusyError, match="is being fetched"):
        session.references.start(last.offer, "dpo-sd1.5")
    ended(session)
    assert last.record.state == "done", last.record.error


@needs_library
def test_cancel_keeps_what_came_and_says_so(session: Session, hub: FilesHub):
    hub.repos[DPO][UNET_FILE] *= 8  # several pieces; that it is no checkpoint is seen at its end
    hub.slow = 0.1
    references.started(session, references.asked(session, "dpo-sd1.5")[OFFER], "dpo-sd1.5")
    last = session.references.last
    assert last
    wait_for(lambda: last.offer.kept > 0)
    references.cancelled(session, "dpo-sd1.5")
    found = ended(session)
    assert last.record.state == "cancelled"
    assert "was not fetched to the end" in found[VIEW]
    assert "are kept" in found[VIEW]
    assert "dpo-fetching" not in found[VIEW]
    assert not last.offer.target.exists()
    again = references.asked(session, "dpo-sd1.5")
    assert "are here already" in again[VIEW]


@needs_library
def test_a_failure_is_said_with_what_to_do_by_hand(session: Session, hub: FilesHub):
    hub.wrong = True
    references.started(session, references.asked(session, "dpo-sd1.5")[OFFER], "dpo-sd1.5")
    found = ended(session)
    assert "could not be fetched" in found[VIEW]
    assert "nothing of it is kept" in found[VIEW]
    assert f"https://huggingface.co/{DPO}" in found[VIEW]
    assert str(session.host.reference_dir) not in found[VIEW]


def test_what_was_here_before_counts_for_no_speed(session: Session):
    """A fetch that goes on at half, and has done a tenth more in its first part of a second, is not nearly done."""
    jobs = Jobs(session.host)
    record = jobs.register("goes on", beside=True)

    def work(job: Any) -> None:
        job.progress(50, 100, "")
        time.sleep(0.2)
        job.progress(60, 100, "")
        assert record.seconds_left
        assert record.seconds_left > 0.75  # 40 of 100 at 10 in 0.2 s; from nothing it would be 0.13

    jobs.finish(record, work)


# ---- the base ----


def test_the_base_is_found_by_content_and_the_nearest_is_first(session: Session, monkeypatch: pytest.MonkeyPatch):
    folder = session.host.checkpoint_dir
    finetune = tiny.base()
    generator = torch.Generator().manual_seed(3)
    for key, weight in finetune.items():
        if weight.dtype == torch.float32 and weight.ndim > 1:
            finetune[key] = weight + 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    tiny.save(folder / "a-finetune.safetensors", finetune)
    tiny.save(folder / "sdxl.safetensors", tiny.base("sdxl"), torch.float16)
    (folder / "broken.safetensors").write_bytes(b"<html>")
    (folder / "old.ckpt").write_bytes(b"\x80")
    listed = [*session.host.checkpoints(), FileEntry("old.ckpt", folder / "old.ckpt")]
    monkeypatch.setattr(session.host, "checkpoints", lambda: listed)
    found = session.references.bases(session.library.reference("dpo-sd1"))
    assert [name for name, _ in found.fitting] == ["base.safetensors", "a-finetune.safetensors"], found
    assert found.fitting[0][1] < found.fitting[1][1]
    assert found.not_looked_into == ("old.ckpt",)
    html, name = references.find_base(session, None, "dpo-sd1")
    assert name == "base.safetensors"
    assert 'data-dpo-press="dpo_extract_take_base"' in html
    assert "old.ckpt" in html


def test_without_the_base_it_says_so_and_offers_nothing(session: Session):
    (session.host.checkpoint_dir / "base.safetensors").unlink()
    html, name = references.find_base(session, None, "dpo-sd1")
    assert name == ""
    assert "None of the 1 checkpoints" in html
    assert "data-dpo-press" not in html


def test_the_reference_itself_is_no_base_of_it(session: Session):
    tiny.save(session.host.checkpoint_dir / "whole.safetensors", tiny.tuned(rms=1e-3))
    found = session.references.bases(session.library.reference("dpo-sd1"))
    assert [name for name, _ in found.fitting] == ["base.safetensors"]


def test_its_button_puts_the_base_into_the_list(session: Session):
    from lib_dpo.webui.tab.extract.page import _based

    assert _based(session, "base.safetensors")["value"] == "base.safetensors"
    assert parts.LOADED in _based(session, "base.safetensors")["choices"]
    assert "value" not in _based(session, "gone.safetensors")
