"""Cells of the host's X/Y/Z plot: what is refused before the first, what a failing one shows, what all of them hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import webui_files
from webui_files import fake

from lib_dpo.errors import BadTensorError
from lib_dpo.webui import cells
from lib_dpo.webui.axes import add_axes
from lib_dpo.webui.generation import Generation
from lib_dpo.webui.session import Session

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

LENGTH = 48  # of the sides of a picture


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return webui_files.with_offsets(tmp_path_factory.mktemp("plot"))


@pytest.fixture
def session(files: Path, tmp_path: Path) -> Session:
    return webui_files.open_session(files, tmp_path / "models")


class AxisOption:
    """The fields of the host's class, as it takes them."""

    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.confirm, self.cost, self.choices = label, type, apply, confirm, cost, choices


class Plot:
    """The host's X/Y/Z script, its runner and its pipeline, as far as cells see them (AUTOMATIC1111 1.10, Forge)."""

    def __init__(self, session: Session, script: Sequence[Any] = (False, "dpo", 1.0, "", 0)) -> None:
        self.session, self.script, self.hooks = session, tuple(script), Generation(session)
        module = ModuleType("xyz_grid.py")
        module.AxisOption = AxisOption  # type: ignore[attr-defined]
        module.axis_options = [  # type: ignore[attr-defined]
            AxisOption("Nothing", str, lambda p, x, xs: None),
            AxisOption("Steps", int, lambda p, x, xs: setattr(p, "steps", x)),
            AxisOption("Checkpoint name", str, lambda p, x, xs: setattr(p, "checkpoint", x), confirm=self._confirm_checkpoint),
            AxisOption("Refiner checkpoint", str, lambda p, x, xs: setattr(p, "refiner_checkpoint", x)),
        ]
        for _ in range(2):  # Reload script bodies registers twice
            add_axes(module, session, lambda p: self.script)
        self.current_axis_options = module.axis_options  # type: ignore[attr-defined]
        self.args_from, self.args_to, self.confirmed = 1, 10, 0
        self.refiner = ""

    def _confirm_checkpoint(self, p: Any, values: list[Any]) -> None:
        self.confirmed += 1

    def new_p(self, *axes: str) -> Any:
        labels = [option.label for option in self.current_axis_options]
        types = [labels.index(label) for label in (*axes, *["Nothing"] * 3)[:3]]
        p = SimpleNamespace(
            scripts=SimpleNamespace(selectable_scripts=[SimpleNamespace(), self]),
            script_args=(2, *(each for kind in types for each in (kind, "", [])), *self.script),
            extra_generation_params={}, comments={}, width=LENGTH, height=LENGTH, prompts=["a"], sampler=None, calls=[],
        )  # fmt: skip
        p.comment = lambda text: p.comments.__setitem__(text, 1)
        p.refiner_checkpoint, p.refiner_switch_at = self.refiner, 0.8
        return p

    def run(self, *axes: tuple[str, Sequence[Any]]) -> list[Any]:
        """Confirm, then draw all cells, the first axis innermost; each cell's `p`, with `picture` and its infotext."""
        options = [next(option for option in self.current_axis_options if option.label == label) for label, _ in axes]
        p = self.new_p(*(label for label, _ in axes))
        for option, (_, values) in zip(options, axes, strict=True):
            if option.confirm:
                option.confirm(p, list(values))
        found = []
        for second in axes[1][1] if len(axes) > 1 else (None,):
            for first in axes[0][1]:
                cell = copy.copy(p)
                for option, value in zip(options, (first, second), strict=False):
                    option.apply(cell, value, [])
                self._process_images(cell)
                found.append(cell)
        return found

    def _process_images(self, p: Any) -> None:
        p.sample = lambda: self._sample(p)
        if getattr(p, "checkpoint", None):  # reads the file: what was baked is gone
            self.session.host.live.load(fake(self.session).checkpoint_dir / p.checkpoint)  # type: ignore[attr-defined]
        self.hooks.process(p, *self.script)
        self.hooks.on_networks(p, {})
        self.hooks.on_batch(p)
        p.picture = p.sample()

    def _sample(self, p: Any) -> str:
        def sample(*args: Any) -> str:
            return "a picture"

        p.sampler = SimpleNamespace(sample=sample, sample_img2img=sample)
        self.hooks.on_sampling(p)
        drawn: str = p.sampler.sample(p)
        return drawn


def is_card(picture: Any) -> bool:
    return picture != "a picture" and picture.already_decoded


def test_a_plot_tells_its_axes(session: Session):
    plot = Plot(session)
    assert cells.plot_axes(plot.new_p("[DPO] Rank", "Steps")) == ("[DPO] Rank", "Steps")
    p = plot.new_p("Steps")
    for arguments in ((), (0, *p.script_args[1:]), (1, *p.script_args[1:]), (None,)):
        p.script_args = arguments
        assert cells.plot_axes(p) is None
    assert cells.plot_axes(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("axis", "values", "script"),
    [
        ("Strength", [0.0, 1.0], (False, "None")), ("Strength", [0.5], (True, "None")), ("Rank", [2], (False, "None")),
        ("Blocks", ["IN=0"], (False, "")), ("Method", ["off", "LoRA"], (False, "None")),
    ],
)  # fmt: skip
def test_values_without_an_offset_are_refused_before_the_first_cell(
    session: Session, axis: str, values: list[Any], script: tuple[Any, ...]
):
    with pytest.raises(RuntimeError, match=rf"^\[DPO\] {axis} .*: no offset is chosen; .* or add the axis \[DPO\] Offset"):
        Plot(session, script).run((f"[DPO] {axis}", values))
    found = Plot(session, script).run((f"[DPO] {axis}", values), ("[DPO] Offset", ["dpo"]))  # another axis brings it
    assert [cell.picture for cell in found] == ["a picture"] * len(values)


def test_only_what_no_other_axis_changes_is_refused_beforehand(session: Session):
    plot = Plot(session, (False, "exact.safetensors", 1.0, "", 4))
    with pytest.raises(RuntimeError, match="has no rank"):
        plot.run(("[DPO] Rank", [2]))
    plot.run(("[DPO] Rank", [2]), ("[DPO] Offset", ["dpo"]))
    plot.run(("[DPO] Rank", [2]), ("[DPO] Method", ["LoRA"]))
    for axis, value in (("Rank", 0), ("Rank", -1), ("Blocks", "EAR=1"), ("Blocks", "IN=0,IN=1"), ("Strength", 80.0)):
        with pytest.raises(RuntimeError, match=axis):
            plot.run((f"[DPO] {axis}", [value]), ("[DPO] Offset", ["dpo"]))
    xl = Plot(session, (True, "xl", 1.0, "", 0))
    with pytest.raises(RuntimeError, match="is an offset for SDXL"):
        xl.run(("[DPO] Strength", [1.0]), ("[DPO] Blocks", ["IN=1"]), ("Steps", [1]))


def test_a_cell_that_fails_leaves_the_others_and_says_why(session: Session):
    """The ranks fit the one offset, not the other: that shows with the cells."""
    plot = Plot(session, (False, "None"))
    found = plot.run(("[DPO] Rank", [2, 9, 4]), ("[DPO] Offset", ["dpo", "exact.safetensors"]))
    assert [is_card(cell.picture) for cell in found] == [False, True, False, True, True, True]
    told = [cell.extra_generation_params.get("DPO error", "") for cell in found]
    assert told[0] == ""
    assert told[1].startswith("[DPO] Rank 9, [DPO] Offset dpo: rank 9 is outside 1 to 4")
    assert "has no rank" in told[3]
    assert found[1].comments == {f"DPO offset: {text}": 1 for text in told if text}
    assert not fake(session).aborted  # which would end the plot
    assert found[1].do_not_save_samples
    assert not hasattr(found[2], "do_not_save_samples")


def test_a_card_is_a_picture_with_words(session: Session):
    plot = Plot(session, (False, "None"))
    (cell,) = plot.run(("[DPO] Rank", [9]), ("[DPO] Offset", ["dpo"]))
    (values,) = cell.picture
    assert (values.shape, values.dtype) == ((3, LENGTH, LENGTH), torch.float32)
    assert float(values.min()) >= -1
    assert float(values.max()) <= 1
    assert float(values.std()) > 0.05
    wide = np.asarray(cells.card("rank 9 is outside 1 to 4, the rank of dpo; choose one within", 512, 256))
    ink = (wide.min(axis=2) < 128).any(axis=1)
    assert ink.sum() > 20
    assert not ink[-8:].any()


@pytest.mark.parametrize("hook", ["on_networks", "on_batch", "on_sampling"])
def test_a_cell_may_fail_at_any_of_the_hooks(session: Session, hook: str, monkeypatch: pytest.MonkeyPatch):
    original = getattr(session.host.live, hook)

    def failing(p: Any, patch: Any, strength: float, *rest: Any) -> None:
        if strength == 2.0:
            raise BadTensorError("dpo: a tensor holds NaN")
        original(p, patch, strength, *rest)

    monkeypatch.setattr(session.host.live, hook, failing)
    found = Plot(session).run(("[DPO] Strength", [1.0, 2.0, 0.5]))
    assert [is_card(cell.picture) for cell in found] == [False, True, False]
    assert found[1].extra_generation_params["DPO error"] == "[DPO] Strength 2.0: dpo: a tensor holds NaN"
    assert "DPO error" not in found[2].extra_generation_params


def test_a_cell_of_another_family_fails_alone(session: Session, files: Path):
    """The script is on, and one of the checkpoints is SDXL."""
    target = fake(session).checkpoint_dir / "xl.safetensors"
    target.write_bytes((files.parent / "made" / "xl-base.safetensors").read_bytes())
    found = Plot(session, (True, "dpo", 1.0, "", 0)).run(
        ("Checkpoint name", ["xl.safetensors", "base.safetensors", "other.safetensors"])
    )
    assert [is_card(cell.picture) for cell in found] == [True, False, False]
    assert "xl is SDXL" in found[0].extra_generation_params["DPO error"]


# ---- something is baked ----


@pytest.fixture
def baked(session: Session) -> Session:
    session.jobs.run("bake", lambda job: session.bake(job, offset="dpo", strength=0.8, blocks="IN=0.5", rank=2))
    return session


@pytest.mark.parametrize(
    ("axis", "values"),
    [("Strength", [0.0, 1.0]), ("Offset", ["None", "dpo"]), ("Rank", [2]), ("Blocks", [""]), ("Method", ["off"])],
)
def test_our_axes_are_refused_in_a_baked_model(baked: Session, axis: str, values: list[Any]):
    """Every cell would be the bake and what its legend says: 0 the bake, 1 more than one."""
    plot = Plot(baked)
    with pytest.raises(RuntimeError) as refused:
        plot.run((f"[DPO] {axis}", values))
    assert f"[DPO] {axis}: dpo × 0.8 (rank 2; IN=0.5) is baked into the model" in str(refused.value)
    baked.jobs.run("undo", baked.unbake)
    plot.run((f"[DPO] {axis}", values))


@pytest.mark.parametrize("axis", ["Checkpoint name", "Refiner checkpoint"])
def test_axes_that_load_weights_are_refused_in_a_baked_model(baked: Session, axis: str):
    plot, values = Plot(baked), ["other.safetensors", "base.safetensors"]
    with pytest.raises(RuntimeError, match=f"{axis}: dpo × 0.8.*is baked into the loaded model.*save the baked model"):
        plot.run((axis, values))
    assert plot.confirmed == 0
    assert baked.host.live.baked()  # nothing was loaded
    baked.jobs.run("undo", baked.unbake)
    assert len(plot.run((axis, values))) == 2
    assert plot.confirmed == (axis == "Checkpoint name")  # the host's own check, once


def test_other_axes_plot_the_baked_model_and_every_cell_says_so(baked: Session):
    found = Plot(baked).run(("Steps", [1, 2]))
    assert [cell.extra_generation_params["DPO baked"] for cell in found] == ["dpo x 0.8 (rank 2; IN=0.5)"] * 2
    assert [cell.picture for cell in found] == ["a picture"] * 2


def test_a_refiner_is_refused_where_it_would_take_the_bake_away(baked: Session):
    """All axes: what is set on the page, too, would leave the bake to the first cell alone."""
    plot = Plot(baked)
    plot.refiner = "other"
    found = plot.run(("Steps", [1, 2]))
    assert all(is_card(cell.picture) for cell in found)
    (told,) = {cell.extra_generation_params["DPO error"] for cell in found}
    assert "the refiner is loaded in its place" in told
    assert "the first cell would hold it, and the others not; undo the bake" in told
    assert baked.host.live.baked()
    baked.jobs.run("undo", baked.unbake)
    assert [cell.picture for cell in plot.run(("Steps", [1, 2]))] == ["a picture"] * 2


def test_a_checkpoint_that_is_yet_to_be_loaded_is_clean(baked: Session):
    fake(baked).live.later = fake(baked).checkpoint_dir / "other.safetensors"
    Plot(baked).run(("[DPO] Strength", [0.0, 1.0]))


@pytest.mark.parametrize("axis", ["[DPO] Strength", "Checkpoint name"])
def test_a_checkpoint_that_was_kept_with_a_bake_is_not(baked: Session, axis: str):
    """A refiner drew last, and the host keeps several models in memory: the first cell takes the baked one up again."""
    live = fake(baked).live
    live.kept, live.later = live.baked(), live.path
    live._baked = None  # of the refiner, which is loaded
    with pytest.raises(RuntimeError, match=r"dpo × 0\.8 .* is baked into"):
        Plot(baked).run((axis, [0.0, 1.0]))
