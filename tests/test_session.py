"""What people do in a WebUI, through the session, over a host without a WebUI."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
import webui_files
from safetensors.torch import load_file
from webui_files import RANK_4, extract, fake

from lib_dpo.errors import BusyError, Cancelled, MismatchError, NoModelError, NotFoundError, OutputError, SettingError
from lib_dpo.keymap import UNET
from lib_dpo.session import Session
from lib_dpo.settings import ExtractSettings, RankPolicy


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return webui_files.make(tmp_path_factory.mktemp("session"))


@pytest.fixture
def session(files: Path, tmp_path: Path) -> Session:
    return webui_files.open_session(files, tmp_path / "models")


def live(session: Session) -> dict[str, torch.Tensor]:
    return fake(session).live.weights


def test_lists_name_what_can_be_chosen(session: Session):
    library = session.library
    assert [entry.name for entry in library.checkpoints()] == ["base.safetensors", "other.safetensors"]
    assert [entry.name for entry in library.references()] == ["dpo-sd1", "base.safetensors", "other.safetensors"]
    assert [entry.name for entry in library.offsets()] == ["xl"]
    assert library.checkpoint("base").name == "base.safetensors"


@pytest.mark.parametrize("name", ["", "nothing", "../Lora/xl", "/etc/passwd", "DPO/dpo-sd1", "base.safetensors/..", "\0"])
def test_names_outside_the_lists_are_refused(session: Session, name: str):
    for look in (session.library.checkpoint, session.library.reference, session.library.offset, session.library.any):
        with pytest.raises(NotFoundError, match=r"choose one|is chosen"):
            look(name)


def test_paths_are_taken_only_where_the_user_allowed_it(session: Session, files: Path):
    path = files / "xl-base.safetensors"
    with pytest.raises(NotFoundError):
        session.library.checkpoint(str(path))
    fake(session).paths_allowed = True
    assert session.library.checkpoint(str(path)) == path
    with pytest.raises(NotFoundError):
        session.library.checkpoint("relative/xl-base.safetensors")


def test_a_vanished_file_is_named(session: Session):
    entries = session.library.offsets()
    session.host.loras = lambda: entries  # type: ignore[method-assign]  # a list that is out of date
    entries[0].path.unlink()
    with pytest.raises(NotFoundError, match="has vanished"):
        session.library.offset("xl")


def test_the_status_line_is_true(session: Session):
    assert session.status().text == "base · SD 1.x · clean"
    extract(session)
    session.jobs.run("bake", lambda job: session.bake(job, offset="dpo", strength=0.8))
    assert session.status().text == "base · SD 1.x · baked: dpo × 0.8"
    fake(session).live.load(fake(session).checkpoint_dir / "other.safetensors")
    assert session.status().text == "other · SD 1.x · clean"
    fake(session).live.path = None
    assert session.status().text == "no checkpoint is loaded yet"


def test_extract_takes_the_loaded_checkpoint_as_base(session: Session):
    found = extract(session)
    assert found.name == "dpo"
    assert found.matched is not None
    assert found.matched[0] == found.matched[1] > 0
    assert fake(session).refreshed == 1
    assert [entry.name for entry in session.library.offsets()] == ["dpo", "xl"]
    assert "dpo.base_sha256" in session.patch("dpo").offset.metadata
    told = fake(session).told
    assert told[-1][0] == told[-1][1]


def test_an_existing_lora_is_kept_unless_asked(session: Session):
    extract(session)
    before = tiny.snapshot(session.host.lora_dir)
    with pytest.raises(OutputError, match="exists already"):
        extract(session)
    assert tiny.snapshot(session.host.lora_dir) == before
    session.patch("dpo")  # open while it is replaced
    extract(session, overwrite=True, settings=ExtractSettings(RankPolicy(rank=2)))
    assert session.patch("dpo").lora.largest_rank() == 2  # type: ignore[union-attr]


def test_analysis_tells_before_anything_is_written(session: Session):
    before = tiny.snapshot(fake(session).folder)
    found = session.jobs.run("analyse", lambda job: session.analyse(job, base="", reference="dpo-sd1"))
    assert found.diff.verdict.level == "fits"
    assert found.compat is None
    fake(session).live.load(fake(session).checkpoint_dir / "other.safetensors")
    found = session.jobs.run("analyse", lambda job: session.analyse(job, base="base", reference="dpo-sd1"))
    assert found.compat is not None
    assert found.compat.level == "weaker"
    assert tiny.snapshot(fake(session).folder) == before


def test_bake_undo_and_save(session: Session):
    clean = {key: tensor.clone() for key, tensor in live(session).items()}
    session.jobs.run("offset", lambda job: session.write_offset(job, base="", reference="dpo-sd1", name="exact"))
    session.jobs.run("bake", lambda job: session.bake(job, offset="exact.safetensors", strength=1.0))
    tuned = tiny.tuned(rms=1e-3)
    key = next(key for key in tuned if key.startswith(UNET))
    torch.testing.assert_close(live(session)[key], tuned[key])
    report = session.jobs.run("save", lambda job: session.save(job, name="mine", offset="exact", strength=1.0))
    saved = load_file(report.path)
    assert torch.equal(saved[key], tuned[key].half())
    assert session.library.checkpoint("mine") == report.path
    assert session.jobs.run("undo", session.unbake) is True
    assert session.jobs.run("undo", session.unbake) is False
    assert all(torch.equal(live(session)[key], tensor) for key, tensor in clean.items())


def test_offsets_of_another_family_are_refused(session: Session):
    before = session.host.live.fingerprint()
    with pytest.raises(MismatchError, match=r"offset for SDXL but base.safetensors is SD 1\.x"):
        session.jobs.run("bake", lambda job: session.bake(job, offset="xl", strength=1.0))
    assert session.host.live.fingerprint() == before


def test_refusals_name_what_to_do(session: Session):
    extract(session)
    for options, error, message in (
        ({"blocks": "MIDDLE=1"}, SettingError, "block weight"),
        ({"rank": 9}, SettingError, "rank 9 is outside"),
        ({"strength": float("nan")}, SettingError, "not a finite number"),
        ({"offset": "none such"}, NotFoundError, "no offset named"),
    ):
        arguments = {"offset": "dpo", "strength": 1.0} | options
        with pytest.raises(error, match=message):
            session.jobs.run("bake", lambda job, a=arguments: session.bake(job, **a))
    for name in ("../evil", "con", ""):
        with pytest.raises(OutputError):
            extract(session, name)
    fake(session).live.path = None
    with pytest.raises(NoModelError, match="no checkpoint is loaded yet"):
        session.patch("dpo")


def test_a_second_click_is_refused_and_interrupt_leaves_nothing(session: Session):
    before = tiny.snapshot(fake(session).folder)
    running, go_on = threading.Event(), threading.Event()

    def work(job: object) -> None:
        running.set()
        go_on.wait(10)
        fake(session).interrupted = True
        session.extract(job, base="", reference="dpo-sd1", name="dpo", settings=RANK_4)  # type: ignore[arg-type]

    record = session.jobs.start("extract dpo", work)
    assert running.wait(10)
    with pytest.raises(BusyError, match="running or waiting"):
        extract(session)
    go_on.set()
    while not record.is_over:
        time.sleep(0.01)
    assert record.state == "cancelled"
    assert tiny.snapshot(fake(session).folder) == before
    extract(session)  # and the way is free again


def test_jobs_show_progress_results_and_errors(session: Session):
    jobs = session.jobs
    record = jobs.start("count", lambda job: [job.progress(n, 4, "key") for n in range(5)] and "counted")
    while not record.is_over:
        time.sleep(0.01)
    assert (record.state, record.result, record.share) == ("done", "counted", 1.0)
    failed = jobs.start("fail", lambda job: session.extract(job, base="", reference="no", name="x", settings=RANK_4))
    while not failed.is_over:
        time.sleep(0.01)
    assert failed.state == "failed"
    assert failed.kind == "NotFoundError"
    assert "no DPO reference named 'no'" in failed.error
    assert [row["state"] for row in (each.as_json() for each in jobs.all())] == ["done", "failed"]
    with pytest.raises(NotFoundError, match="no job"):
        jobs.get("none")


def test_a_waiting_job_can_be_cancelled(session: Session):
    go_on = threading.Event()
    first = session.jobs.start("first", lambda job: go_on.wait(10))
    second = session.jobs.start("second", lambda job: pytest.fail("must not run"))
    session.jobs.cancel(second.id)
    go_on.set()
    while not (first.is_over and second.is_over):
        time.sleep(0.01)
    assert (first.state, second.state) == ("done", "cancelled")
    with pytest.raises(Cancelled):
        session.jobs.run("third", lambda job: (setattr(fake(session), "interrupted", True), job.check()))
