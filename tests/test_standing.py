"""Answers on the page that a later step made untrue: they go, or say what has changed; pressed as gradio would press."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fake_host import FakeHost

from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import build, lists, parts

GONE = "does not hold any more"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standing")
    for name, seed in (("base", 0), ("other", 5)):
        tiny.save(folder / "Stable-diffusion" / f"{name}.safetensors", tiny.base(seed=seed), torch.float16)
    tuned = tiny.in_diffusers("sd1", tiny.only_unet(tiny.tuned(rms=1e-3)))
    tuned_file = tiny.save(folder / "DPO" / "dpo-sd1" / "unet" / "diffusion_pytorch_model.safetensors", tuned)
    base = folder / "Stable-diffusion" / "base.safetensors"
    assert (
        tiny.run("extract", "--base", base, "--tuned", tuned_file, "-o", folder / "Lora" / "mine.safetensors", "--rank", 4) == 0
    )
    return folder


class Page:
    """One open page: the values of its components, and what a press of a button does to them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.blocks = build(session)
        rows = self.blocks.get_config_file()
        self.ids = {row["props"].get("elem_id"): row["id"] for row in rows["components"]}
        self.values = {row["id"]: row["props"].get("value") for row in rows["components"]}
        self.changes = 0
        fns = self.blocks.fns
        self.events = [
            (row, fns[row.get("id", place)].fn if hasattr(fns, "keys") or row.get("id") is None else fns[place].fn)
            for place, row in enumerate(rows["dependencies"])
        ]

    def fire(self, elem_id: str, event: str) -> None:
        """Run what an event starts, in its order. JavaScript is not: it only passes values on.

        Of what comes after an event only that the page has its answer.
        """
        for place, (row, function) in enumerate(self.events):
            for target in row["targets"]:
                at, trigger = (target, row["trigger"]) if isinstance(target, int) else target
                if at == self.ids[elem_id] and trigger == event and function is not None:
                    self._run(row, function)
                    self._tell(row.get("id", place))

    def _tell(self, event: int) -> None:
        for row, function in self.events:
            if row.get("trigger_after") == event and not row["inputs"] and not row["outputs"] and function is not None:
                function()

    def _run(self, row: dict[str, Any], function: Any) -> None:
        answer = function(*(self.values[each] for each in row["inputs"]))
        for found in answer if inspect.isgenerator(answer) else (answer,):
            self._put(row, found)

    def _put(self, row: dict[str, Any], found: Any) -> None:
        found = found if len(row["outputs"]) != 1 else [found]  # a list would be the value, as gradio has it
        for each, value in zip(row["outputs"], found, strict=True):
            if isinstance(value, dict) and "update" in value.get("__type__", ""):
                if "value" not in value:
                    continue
                value = value["value"]
            self.changes += self.values[each] != value
            self.values[each] = value

    def put(self, **values: Any) -> None:
        for elem_id, value in values.items():
            self.values[self.ids[f"dpo_{elem_id}"]] = value

    def press(self, elem_id: str) -> str:
        """Press a button of the tab, and what stands at its page's place of results then."""
        self.fire(f"dpo_{elem_id}", "click")
        return self.shown(elem_id.partition("_")[0] + "_result")

    def shown(self, elem_id: str) -> str:
        return str(self.values[self.ids[f"dpo_{elem_id}"]])

    def after_a_while(self, elem_id: str) -> str:
        """What stands there after the page has looked at the model by itself."""
        self.fire("dpo_tick", "click")
        return self.shown(elem_id)


@pytest.fixture
def host(files: Path, tmp_path: Path) -> FakeHost:
    shutil.copytree(files, tmp_path / "models")
    host = FakeHost(tmp_path / "models")
    host.live.load(host.checkpoint_dir / "base.safetensors")
    return host


@pytest.fixture
def page(host: FakeHost) -> Page:
    page = Page(Session(host))
    page.put(extract_base=parts.LOADED, extract_reference="dpo-sd1", extract_rank=4)
    page.put(bake_offset="mine", compare_offset="mine", compare_prompts="a cat", compare_strengths="1", compare_seeds="1")
    page.put(compare_width=64, compare_height=64, compare_steps=2)
    return page


def other(host: FakeHost) -> None:
    host.live.load(host.checkpoint_dir / "other.safetensors")


def touched(path: Path) -> None:
    """Made again in another second, as large as it was."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_an_answer_that_came_is_not_kept_for_another_page(page: Page, host: FakeHost, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lists, "_LATE", 0.0)
    page.press("bake_go")
    page.put(bake_result="as it was read")
    assert page.after_a_while("bake_result") == "as it was read"


def test_what_holds_is_left_alone(page: Page):
    page.press("extract_analyse")
    baked = page.press("bake_go")
    page.press("compare_go")
    for event in ("dpo_shown", "dpo_tick"):  # the status line of now, the lists
        page.fire(event, "click")
    page.changes = 0
    for event in ("dpo_shown", "dpo_tick"):
        page.fire(event, "click")
    assert page.changes == 0
    assert page.shown("bake_result") == baked


def test_a_baked_card_goes_with_its_bake_and_its_model(page: Page, host: FakeHost):
    page.press("bake_go")
    host.live.unbake()  # from another browser tab
    assert GONE in page.after_a_while("bake_result")
    assert "nothing is baked in now" in page.shown("bake_result")
    assert "Baked into the loaded model" in page.press("bake_go")
    other(host)
    assert "other is loaded now" in page.after_a_while("bake_result")


def test_a_baked_card_goes_when_another_checkpoint_is_chosen_for_the_next_picture(page: Page, host: FakeHost):
    baked = page.press("bake_go")
    host.live.later = host.checkpoint_dir / "other.safetensors"  # as Forge chooses
    assert "other is loaded for the next picture" in page.after_a_while("bake_result")
    host.live.later = None
    assert page.after_a_while("bake_result") == baked
    touched(host.checkpoint_dir / "base.safetensors")
    assert "base.safetensors has changed" in page.after_a_while("bake_result")


def test_an_undone_card_goes_with_the_next_bake(page: Page):
    page.press("bake_go")
    assert "Undone" in page.press("bake_undo")
    second = Page(page.session)
    second.put(bake_offset="mine", bake_strength=0.5)
    second.press("bake_go")
    assert GONE in page.after_a_while("bake_result")
    assert "mine is baked in now" in page.shown("bake_result")
    second.press("bake_undo")
    assert "Undone" in page.after_a_while("bake_result")  # true again


def test_what_baking_costs_is_said_of_the_model_that_is_loaded(page: Page, host: FakeHost):
    page.fire("dpo_bake_offset", "change")
    assert "It takes the place of" not in page.shown("bake_before")
    second = Page(page.session)
    second.put(bake_offset="mine")
    second.press("bake_go")
    assert "It takes the place of mine" in page.after_a_while("bake_before")
    second.press("bake_undo")
    assert "It takes the place of" not in page.after_a_while("bake_before")
    (host.lora_dir / "mine.safetensors").unlink()
    assert "mine" in page.after_a_while("bake_before")
    assert "can be baked" not in page.shown("bake_before")


def test_an_analysis_goes_with_the_model_and_the_files_that_it_is_about(page: Page, host: FakeHost):
    page.press("extract_analyse")
    assert "Is it the right base?" in page.shown("extract_pair_result")
    other(host)
    assert "other is loaded now" in page.after_a_while("extract_pair_result")
    host.live.load(host.checkpoint_dir / "base.safetensors")
    assert "Is it the right base?" in page.after_a_while("extract_pair_result")
    touched(host.reference_dir / "dpo-sd1" / "unet" / "diffusion_pytorch_model.safetensors")
    assert "dpo-sd1 has changed" in page.after_a_while("extract_pair_result")


@pytest.mark.parametrize(("button", "folder"), [("extract_go", "lora_dir"), ("extract_dense", "reference_dir")])
def test_a_written_card_goes_when_its_file_is_made_again_or_gone(page: Page, host: FakeHost, button: str, folder: str):
    page.put(extract_name="again")
    assert "again is written" in page.press(button)
    file = getattr(host, folder) / "again.safetensors"
    touched(file)
    assert "again.safetensors has changed" in page.after_a_while("extract_result")
    page.put(extract_overwrite=True)
    assert "again is written" in page.press(button)
    file.unlink()
    assert "again.safetensors is gone" in page.after_a_while("extract_result")


def test_a_saved_card_goes_with_its_file(page: Page, host: FakeHost):
    page.put(bake_save_name="mixed")
    assert "mixed is saved" in page.press("bake_save_go")
    assert "mixed is saved" in page.after_a_while("bake_result")
    touched(host.checkpoint_dir / "mixed.safetensors")
    assert "mixed.safetensors has changed" in page.after_a_while("bake_result")


def test_pictures_stay_with_what_has_changed_above_them(page: Page, host: FakeHost):
    made = page.press("compare_go")
    assert "Same structure" in made
    assert page.after_a_while("compare_result") == made
    other(host)
    later = page.after_a_while("compare_result")
    assert "Made before: other is loaded now." in later
    assert later.endswith(made)


def test_inspections_go_with_their_files(page: Page, host: FakeHost):
    page.put(inspect_file="mine")
    assert "It is a LoRA" in page.press("inspect_look")
    touched(host.lora_dir / "mine.safetensors")
    assert "mine.safetensors has changed" in page.after_a_while("inspect_result")
    page.put(inspect_target="other.safetensors", inspect_base="base.safetensors", inspect_reference="dpo-sd1")
    assert "Does it fit your model?" in page.press("inspect_fit")
    other(host)  # it was not about the loaded one
    assert "Does it fit your model?" in page.after_a_while("inspect_result")
    page.put(inspect_target=parts.LOADED)
    assert "Does it fit your model?" in page.press("inspect_fit")
    host.live.load(host.checkpoint_dir / "base.safetensors")
    assert "base is loaded now" in page.after_a_while("inspect_result")


def test_an_error_is_about_nothing_and_takes_the_place_of_nothing(page: Page, host: FakeHost):
    baked = page.press("bake_go")
    page.put(bake_offset="none such")
    assert page.press("bake_go") == baked
    error = page.shown("bake_result_alert")
    assert "alert" in error
    other(host)
    assert GONE in page.after_a_while("bake_result")
    assert page.shown("bake_result_alert") == error
    page.put(bake_offset="mine")
    page.press("bake_go")
    assert page.shown("bake_result_alert") == ""


def test_the_cards_of_analyse_stay_when_a_lora_is_written(page: Page):
    page.press("extract_analyse")
    cards, curve = page.shown("extract_pair_result"), page.shown("extract_outlook")
    assert "dpo-dot-marked" in curve
    assert "is written" in page.press("extract_go")
    assert page.shown("extract_pair_result") == cards
    page.put(extract_rank=2)
    page.fire("dpo_extract_rank", "change")
    assert page.shown("extract_outlook") != curve
    page.put(extract_reference="none such")
    page.fire("dpo_extract_reference", "change")
    assert "dpo-alert" in page.shown("extract_outlook")


def test_the_curve_goes_with_its_files(page: Page, host: FakeHost):
    page.press("extract_analyse")
    shutil.rmtree(host.reference_dir / "dpo-sd1")
    page.after_a_while("extract_result")
    assert "dpo-dot-marked" not in page.shown("extract_outlook")
    assert "dpo-sd1" in page.shown("extract_outlook")


def test_a_new_file_is_chosen_on_the_page_that_it_is_taken_to(page: Page):
    page.put(extract_name="brand-new", extract_rank=2)
    assert 'data-dpo-press="dpo_extract_to_bake"' in page.press("extract_go")
    for name in ("compare", "bake"):
        page.fire(f"dpo_extract_to_{name}", "click")
        assert page.shown(f"{name}_offset") == "brand-new"


def test_while_a_job_runs_nothing_is_looked_at(page: Page, host: FakeHost):
    baked = page.press("bake_go")
    record = page.session.jobs.register("Compare")
    host.live.unbake()
    assert page.after_a_while("bake_result") == baked
    page.session.jobs.finish(record, lambda job: None)
    assert GONE in page.after_a_while("bake_result")
