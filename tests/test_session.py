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

import lib_dpo
from lib_dpo.errors import (
    BusyError,
    Cancelled,
    MismatchError,
    NoMemoryError,
    NoModelError,
    NotFoundError,
    OutputError,
    SettingError,
)
from lib_dpo.families.keymap import UNET
from lib_dpo.hosts.base import FileEntry
from lib_dpo.settings import ExtractSettings, RankPolicy
from lib_dpo.webui.comparing import Asked, compare
from lib_dpo.webui.session import Session


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
        with pytest.raises(NotFoundError, match=r"choose one|is chosen|did you mean"):
            look(name)


def test_a_mistyped_name_offers_the_nearest(session: Session):
    for name in ("bsae", "Base.safetensors", "bas.safetensors"):
        with pytest.raises(
            NotFoundError, match=rf"there is no checkpoint named '{name}'; did you mean 'base(.safetensors)?'\?"
        ):
            session.library.checkpoint(name)
    with pytest.raises(NotFoundError, match="choose one from the list"):
        session.library.checkpoint("something else")


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


def test_undo_finds_the_bake_in_a_model_that_was_kept_while_another_drew(session: Session):
    session.jobs.run("offset", lambda job: session.write_offset(job, base="", reference="dpo-sd1", name="exact"))
    session.jobs.run("bake", lambda job: session.bake(job, offset="exact.safetensors", strength=1.0))
    fake_live = fake(session).live
    fake_live.kept, fake_live.later, fake_live._baked = fake_live.baked(), fake_live.path, None
    assert session.jobs.run("undo", session.unbake) is True
    assert fake_live.chosen() is None
    assert session.jobs.run("undo", session.unbake) is False


@pytest.mark.parametrize("form", ["DoRA", "GLoRA"])
def test_what_is_bound_to_the_weights_is_saved_as_the_command_line_bakes_it(session: Session, form: str, tmp_path: Path):
    """The live weights may carry other things; the file has what it is bound to."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    key = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    (out, in_), draw = tiny.base()[key].shape, torch.Generator().manual_seed(4)
    up, down = torch.randn(out, 2, generator=draw) * 0.1, torch.randn(2, in_, generator=draw) * 0.1
    if form == "DoRA":
        tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.dora_scale": torch.ones(out, 1)}
    else:
        tensors = {f"{name}.a1.weight": down.T, f"{name}.a2.weight": up.T, f"{name}.b1.weight": up, f"{name}.b2.weight": down}
    lora = tiny.save(session.host.lora_dir / "bound.safetensors", tensors)
    with pytest.raises(MismatchError, match=f"bound is {form}.*Save as checkpoint on the page Bake"):
        session.jobs.run("bake", lambda job: session.bake(job, offset="bound", strength=0.7))
    report = session.jobs.run("save", lambda job: session.save(job, name="mine", offset="bound", strength=0.7))
    base = session.library.checkpoint("base")
    baked = lib_dpo.bake(base, lora, tmp_path / "baked.safetensors", strength=0.7)
    assert report.changed == baked.changed == 1
    saved, right = load_file(report.path), load_file(baked.path)
    assert saved.keys() == right.keys()
    assert all(torch.equal(saved[name], right[name]) for name in right)
    assert not torch.equal(saved[key], load_file(base)[key])
    with pytest.raises((MismatchError, SettingError), match=r"bound (is DoRA|has no pairs)"):
        session.jobs.run("save", lambda job: session.save(job, name="cut", offset="bound", strength=0.7, rank=1))
    with pytest.raises(NotFoundError):
        session.library.checkpoint("cut")


def test_offsets_of_another_family_are_refused(session: Session):
    before = session.host.live.fingerprint()
    with pytest.raises(MismatchError, match=r"offset for SDXL but base is SD 1\.x"):
        session.jobs.run("bake", lambda job: session.bake(job, offset="xl", strength=1.0))
    assert session.host.live.fingerprint() == before


def test_refusals_name_what_to_do(session: Session):
    extract(session)
    for options, error, message in (
        ({"blocks": "MIDDLE=1"}, SettingError, "block weight"),
        ({"rank": 9}, SettingError, "rank 9 is outside"),
        ({"strength": float("nan")}, SettingError, "not a finite number"),
        ({"strength": 1e39}, SettingError, "too large"),
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


# ---- what only shows with other models, names and jobs ----


def test_names_in_subfolders_are_told_apart(session: Session):
    library, entries = session.library, fake(session).checkpoints()
    base = entries[0].path
    other = tiny.save(base.parent / "archive" / "base.safetensors", tiny.base(seed=9))
    listed = [FileEntry("archive/base.safetensors", other), *entries]
    fake(session).checkpoints = lambda: listed  # type: ignore[method-assign]
    assert library.checkpoint("base.safetensors") == base
    assert library.checkpoint("archive/base.safetensors") == other
    with pytest.raises(NotFoundError, match="several files"):
        library.checkpoint("base")


def test_a_checkpoint_that_is_chosen_but_not_loaded_yet_is_the_one_that_counts(session: Session):
    extract(session)
    live, folder = fake(session).live, fake(session).checkpoint_dir
    live.later = folder / "other.safetensors"
    assert session.status().text == "base · SD 1.x · clean · other is loaded for the next picture"
    report = session.jobs.run("save", lambda job: session.save(job, name="mine", offset="dpo", strength=1.0, blocks="OUT=0"))
    assert session.status().text == "other · SD 1.x · clean"
    key = f"{UNET}out.2.weight"
    assert torch.equal(load_file(report.path)[key], tiny.base(seed=5)[key].half())
    live.path, live.later = None, folder / "base.safetensors"
    assert session.status().text == "base is loaded for the next picture"
    session.jobs.run("bake", lambda job: session.bake(job, offset="dpo", strength=1.0))
    assert session.status().text == "base · SD 1.x · baked: dpo × 1"


def test_names_with_dots_keep_them(session: Session):
    path = fake(session).checkpoint_dir / "sd_xl_base_1.0.safetensors"
    path.write_bytes((fake(session).checkpoint_dir / "base.safetensors").read_bytes())
    fake(session).live.load(path)
    assert session.status().text == "sd_xl_base_1.0 · SD 1.x · clean"


def test_a_reference_folder_that_cannot_be_read_leaves_the_other_lists(session: Session, monkeypatch: pytest.MonkeyPatch):
    reference_dir = fake(session).reference_dir

    def iterdir(path: Path) -> object:
        if path == reference_dir:
            raise PermissionError(13, "Permission denied")
        return original(path)

    original = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert [entry.name for entry in session.library.offsets()] == ["xl"]
    assert [entry.name for entry in session.library.references()] == ["base.safetensors", "other.safetensors"]


def test_names_that_are_no_text_are_left_out(session: Session):
    listed = [*fake(session).loras(), FileEntry("bad\udcff", fake(session).lora_dir / "xl.safetensors")]
    fake(session).loras = lambda: listed  # type: ignore[method-assign]
    assert [entry.name for entry in session.library.offsets()] == ["xl"]


def test_finished_jobs_keep_few_results_and_none_of_the_tabs(session: Session):
    jobs = session.jobs
    jobs.run("tab", lambda job: object())  # nothing that JSON could hold
    started = [jobs.start(f"job {n}", lambda job: "large") for n in range(8)]
    while not all(record.is_over for record in started):
        time.sleep(0.01)
    time.sleep(0.05)
    assert sum(record.result is not None for record in jobs.all()) == 4
    assert jobs.all()[0].result is None
    assert "result" not in jobs.all()[-1].as_json(with_result=False)


def test_a_cancelled_job_that_waits_does_not_hold_its_title(session: Session):
    go_on = threading.Event()
    first = session.jobs.start("first", lambda job: go_on.wait(10))
    second = session.jobs.start("second", lambda job: pytest.fail("must not run"))
    session.jobs.cancel(second.id)
    third = session.jobs.start("second", lambda job: "done")
    go_on.set()
    while not (first.is_over and second.is_over and third.is_over):
        time.sleep(0.01)
    assert (second.state, third.state) == ("cancelled", "done")


def test_a_host_that_fails_after_writing_does_not_undo_the_writing(session: Session):
    def fail() -> None:
        raise RuntimeError("the host's list is broken")

    fake(session).refresh = fail  # type: ignore[method-assign]
    found = extract(session)
    assert found.report.path.is_file()  # type: ignore[attr-defined]
    assert found.matched is None  # type: ignore[attr-defined]


def test_compare_checks_its_numbers_first(session: Session):
    extract(session)
    for options, message in (
        ({"width": 500}, "multiples of 8"), ({"steps": 0}, "too small"), ({"cfg_scale": float("nan")}, "not a finite number"),
    ):  # fmt: skip
        arguments = {"offset": "dpo", "prompts": ["a"], "width": 64, "height": 64} | options
        with pytest.raises(SettingError, match=message):
            session.jobs.run("compare", lambda job, a=arguments: compare(session, job, Asked(**a)))
    odd = {"offset": "dpo", "prompts": ["a \ud800 b"], "negative": "\udfff", "width": 64, "height": 64, "strengths": "1"}
    found = session.jobs.run("compare", lambda job: compare(session, job, Asked(**odd)))
    assert found.grid.png()


@pytest.mark.parametrize(
    ("sidecar", "side"),
    [("model: {params: {image_size: 8}}", 64), (None, 512), ("model: [1", 512), ("model: 3", 512)]
    + [(f"model: {{params: {{image_size: {odd}}}}}", 512) for odd in ("true", "4", "512", "'8'", "[8]", "0x" + 5000 * "f")],
)
def test_pictures_are_of_the_size_that_the_model_was_made_for(session: Session, sidecar: str | None, side: int):
    yaml = fake(session).live.loaded().path.with_suffix(".yaml")
    try:
        if sidecar is not None:
            yaml.write_text(sidecar)
        extract(session)
        asked = Asked(offset="dpo", prompts=["a"], strengths="1")
        found = session.jobs.run("compare", lambda job: compare(session, job, asked))
    finally:
        yaml.unlink(missing_ok=True)
    assert {image.size for image in found.images.values()} == {(side, side)}


def test_memory_that_runs_out_is_a_sentence(session: Session):
    def fail(job: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(NoMemoryError, match=r"^bake: the GPU is out of memory; close other programs"):
        session.jobs.run("bake", fail)


def test_a_saved_bake_is_not_offered_as_a_reference(session: Session):
    webui_files.extract(session)
    session.jobs.run("save", lambda job: session.save(job, name="mine", offset="dpo", strength=0.5))
    names = [entry.name for entry in session.library.references()]
    assert "mine.safetensors" in [entry.name for entry in session.library.checkpoints()]
    assert names == ["dpo-sd1", "base.safetensors", "other.safetensors"]
    report = session.jobs.run("analyse", lambda job: session.analyse(job, base="", reference="mine.safetensors"))
    assert report.diff.verdict.text.startswith("No new reference: mine has dpo × 0.5 baked in by this tool")


def test_the_loaded_model_is_not_held_against_itself(session: Session):
    for target in ("", "base.safetensors"):
        with pytest.raises(SettingError, match="choose as the base the checkpoint that DPO started from"):
            session.jobs.run("fit", lambda job, t=target: session.compat(job, target=t, base="", reference="dpo-sd1"))
    chosen = session.jobs.run("fit", lambda job: session.compat(job, target="", base="base.safetensors", reference="dpo-sd1"))
    assert chosen.level == "base"
