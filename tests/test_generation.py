"""The always-on script's logic and the X/Y/Z axes, over a host without a WebUI."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import webui_files
from webui_files import fake

from lib_dpo.errors import BadTensorError, SettingError
from lib_dpo.offsets.recipe import ingredient_of
from lib_dpo.webui.axes import add_axes
from lib_dpo.webui.generation import Generation, set_axis, wish_of
from lib_dpo.webui.session import Session


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return webui_files.with_offsets(tmp_path_factory.mktemp("generation"))


@pytest.fixture
def session(files: Path, tmp_path: Path) -> Session:
    return webui_files.open_session(files, tmp_path / "models")


def new_p(**attributes: Any) -> Any:
    return SimpleNamespace(extra_generation_params={"Other": 1}, calls=[], scripts=None, **attributes)


def generate(session: Session, p: Any, *args: Any) -> list[tuple[str, str | None, float]]:
    """The hooks as a host calls them, the hires pass and its repetitions too; what reached the live model."""
    hooks = Generation(session)
    hooks.process(p, *args)
    hooks.on_networks(p, {})
    hooks.on_batch(p)
    hooks.on_sampling(p)
    hooks.on_networks(p, {})
    hooks.on_sampling(p)
    calls: list[tuple[str, str | None, float]] = p.calls
    return calls


def test_off_means_off(session: Session):
    for args in ((), (False, "dpo", 1.0, ""), (None, None, 1.0, None)):
        p = new_p()
        assert {call[1] for call in generate(session, p, *args)} == {None}
        assert p.extra_generation_params == {"Other": 1}


def test_on_reaches_every_hook_and_the_infotext(session: Session):
    p = new_p()
    calls = generate(session, p, True, "dpo", 0.5, "IN=0.5;MID=0")
    assert calls == [(name, "dpo", 0.5) for name in ("networks", "batch", "sampling", "networks", "sampling")]
    assert p.extra_generation_params == {
        "Other": 1, "DPO offset": "dpo", "DPO strength": 0.5, "DPO blocks": "IN=0.5;MID=0",
    }  # fmt: skip


def test_blocks_that_are_all_0_apply_nothing(session: Session):
    p = new_p()
    assert {call[1] for call in generate(session, p, True, "dpo", 1.0, "ALL=0")} == {None}
    assert p.extra_generation_params["DPO blocks"] == "ALL=0"
    assert not fake(session).aborted


def test_strength_0_applies_nothing_and_says_so(session: Session):
    p = new_p()
    assert {call[1] for call in generate(session, p, True, "dpo", 0, "")} == {None}
    assert p.extra_generation_params["DPO strength"] == 0


def test_a_refiner_is_told_of_only_where_there_is_one(session: Session):
    cases = ((None, None, False), ("xl-refiner", 0.8, True), ("xl-refiner", 1.0, False), ("xl-refiner", None, True))
    for refiner, switch_at, told in cases:  # without a time it takes over at once: sd_samplers_common.py:173 of A1111
        comments: list[str] = []
        p = new_p(refiner_checkpoint=refiner, refiner_switch_at=switch_at, comment=comments.append)
        generate(session, p, True, "dpo", 1.0, "")
        assert comments == (["DPO offset: the refiner draws without it"] if told else [])


def test_what_was_left_out_of_a_picture_is_told(session: Session):
    comments: list[str] = []
    p = new_p(comment=comments.append)
    hooks = Generation(session)
    hooks.process(p, True, "dpo", 0.5)
    fake(session).live.lost = "a part is missing"
    hooks.after_batch(p)
    assert comments == ["DPO offset: a part is missing"]
    assert p.extra_generation_params["DPO error"] == "a part is missing"
    fake(session).live.lost = ""
    hooks.after_batch(p)  # the next batch has all of it
    assert "DPO error" not in p.extra_generation_params
    assert p.extra_generation_params["DPO strength"] == 0.5
    fake(session).live.lost = "of another picture"
    for args in ((False, "dpo"), (True, "gone")):
        p = new_p(comment=comments.append)
        hooks.process(p, *args)
        error = p.extra_generation_params.get("DPO error")
        hooks.after_batch(p)
        assert p.extra_generation_params.get("DPO error") == error
    assert len(comments) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"offset": "dpo", "strength": 0.8}, "dpo x 0.8"),
        ({"offset": "dpo", "strength": -1, "blocks": "IN=0.5;MID=0"}, "dpo x -1 (IN=0.5,MID=0)"),
        ({"offset": "dpo", "strength": 0.12345678, "rank": 2}, "dpo x 0.12345678 (rank 2)"),
        ({"offset": "exact", "strength": 1, "blocks": "ALL=0.5"}, "exact.safetensors x 1 (ALL=0.5)"),
        ({"offset": "dpo", "strength": 1, "rank": 3, "blocks": "OUT=0"}, "dpo x 1 (rank 3; OUT=0)"),
    ],
)
def test_a_bake_is_in_the_infotext_so_that_it_can_be_done_again(session: Session, options: dict[str, Any], text: str):
    bake(session, **options)
    weights, p = session.host.live.fingerprint(), new_p()
    generate(session, p)
    assert p.extra_generation_params["DPO baked"] == text
    told = ingredient_of(text)
    assert told is not None
    session.jobs.run("undo", session.unbake)
    bake(session, offset=told.offset, strength=told.strength, blocks=told.blocks, rank=told.rank)
    assert session.host.live.fingerprint() == weights


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("dpo x 0.8", ("dpo", 0.8, "", None)),  # as it was written before blocks and rank were
        ("a x b (1) x 1e-05", ("a x b (1)", 1e-05, "", None)), ("dpo x 1 (rank 4)", ("dpo", 1, "", 4)),
        ("dpo x 1 (rank 4; IN=0.5,MID=0)", ("dpo", 1, "IN=0.5,MID=0", 4)), (" dpo x 2 (MID=0) ", ("dpo", 2, "MID=0", None)),
        ("dpo", None), ("dpo x much", None), ("", None), ("dpo x 1.2.3", None), (" x 1", None),
    ],
)  # fmt: skip
def test_what_an_infotext_tells_of_a_bake_is_read(text: str, read: Any):
    found = ingredient_of(text)
    assert (found and (found.offset, found.strength, found.blocks, found.rank)) == read


def bake(session: Session, **options: Any) -> None:
    session.jobs.run("bake", lambda job: session.bake(job, **options))


@pytest.mark.parametrize(
    "other", [{"refiner_checkpoint": "other", "refiner_switch_at": 0.5}, {"enable_hr": True, "hr_checkpoint_name": "other"}]
)
def test_batches_after_one_that_took_the_bake_away_do_not_name_it(session: Session, other: dict[str, Any]):
    """The host reads the first checkpoint again before the second batch: processing.py:941 of A1111."""
    bake(session, offset="dpo", strength=0.8)
    comments: dict[str, int] = {}
    p, hooks, said = new_p(comment=lambda text: comments.setdefault(text, 1), **other), Generation(session), []
    hooks.process(p)
    for _ in range(2):
        hooks.on_networks(p, {})
        hooks.on_batch(p)
        said.append(p.extra_generation_params.get("DPO baked"))
        live = fake(session).live
        assert live.path
        live.load(live.path)  # after the other one
    assert said == ["dpo x 0.8", None]
    (told,) = comments
    assert "dpo × 0.8 is baked into the model, and the " in told
    assert "the bake is lost then" in told
    assert not fake(session).aborted


@pytest.mark.parametrize(
    "options",
    [
        {}, {"refiner_checkpoint": "None", "refiner_switch_at": 0.8}, {"refiner_checkpoint": "other", "refiner_switch_at": 1.0},
        {"enable_hr": True, "hr_checkpoint_name": "Use same checkpoint"}, {"enable_hr": True, "hr_checkpoint_name": None},
        {"enable_hr": False, "hr_checkpoint_name": "other"},
    ],
)  # fmt: skip
def test_a_bake_that_outlasts_the_picture_is_said_in_every_batch_and_not_warned_of(session: Session, options: dict[str, Any]):
    bake(session, offset="dpo", strength=0.8)
    same = SimpleNamespace(filename=str(fake(session).live.path))
    for more in ({}, {"refiner_checkpoint": "base", "refiner_switch_at": 0.5, "refiner_checkpoint_info": same}):
        p = new_p(**options | more)  # without `comment`: nothing is said
        generate(session, p)
        assert p.extra_generation_params["DPO baked"] == "dpo x 0.8"
        assert not fake(session).aborted


def comments_of(session: Session, *args: Any, loras: tuple[str, ...] = ()) -> list[str]:
    comments: dict[str, int] = {}
    p = new_p(comment=lambda text: comments.setdefault(text, 1))
    hooks = Generation(session)
    hooks.process(p, *args)
    hooks.on_networks(p, {"lora": [SimpleNamespace(items=[name, "1.0"]) for name in loras], "dpo": [SimpleNamespace(items=[])]})
    assert not fake(session).aborted
    return list(comments)


def test_an_offset_that_is_in_a_picture_twice_is_told(session: Session):
    assert comments_of(session, True, "dpo", 1.0, "", loras=("xl", "gone")) == []
    (told,) = comments_of(session, True, "dpo", 1.0, "", loras=("dpo",))
    assert told == "DPO offset: the prompt has <lora:dpo>, and the script adds the same file; this picture holds both"
    bake(session, offset="dpo", strength=0.8, blocks="IN=0.5")
    (told,) = comments_of(session, True, "dpo.safetensors", 0.5, "")
    assert told.startswith("DPO offset: dpo × 0.8 (IN=0.5) is baked into the model, and the script adds it once more, × 0.5")
    assert comments_of(session, True, "exact", 0.5, "") == []
    assert comments_of(session) == []
    (told,) = comments_of(session, loras=("xl", "dpo"))
    assert told == "DPO offset: the prompt has <lora:dpo>, and the same file is baked in; this picture holds both"
    assert len(comments_of(session, True, "dpo", 0.5, "", loras=("dpo",))) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((True, "None", 1.0, ""), "no offset is chosen"),
        ((True, "gone", 1.0, ""), "no offset named 'gone'"),
        ((True, "xl", 1.0, ""), "is an offset for SDXL"),
        ((True, "dpo", "much", ""), "strength 'much' is not a finite number"),
        ((True, "dpo", float("inf"), ""), "strength inf is not a finite number"),
        ((True, "dpo", 1.0, "HEAD=1"), "block weight 'HEAD=1'"),
    ],
)
def test_what_cannot_be_applied_stops_the_generation_with_a_sentence(session: Session, args: Any, message: str):
    p = new_p()
    assert {call[1] for call in generate(session, p, *args)} == {None}
    (told,) = fake(session).aborted
    assert message in told
    assert told.startswith("DPO offset: ")


def test_a_request_that_disables_what_an_offset_is_added_through_is_refused(session: Session):
    """A1111's processing.py:959 skips the hook then: the picture would be without the offset that its infotext names."""
    for by_networks in (False, True):
        fake(session).live.adds_by_networks = by_networks
        for args in ((False, "dpo"), (True, "dpo", 0.0), (True, "dpo", 1.0)):
            generate(session, new_p(disable_extra_networks=True), *args)
        generate(session, new_p(disable_extra_networks=False), True, "dpo", 1.0)
    (told,) = fake(session).aborted
    assert told.startswith("DPO offset: the request sets disable_extra_networks, and this WebUI adds dpo the way it adds LoRAs")


def test_errors_while_applying_stop_the_generation(session: Session):
    def fail(*_: Any) -> None:
        raise BadTensorError("dpo: a tensor holds NaN")

    session.host.live.on_sampling = fail  # type: ignore[method-assign]
    generate(session, new_p(), True, "dpo", 1.0, "")
    assert fake(session).aborted[0] == "DPO offset: dpo: a tensor holds NaN"
    session.host.live.on_sampling = lambda *_: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    generate(session, new_p(), True, "dpo", 1.0, "")
    assert "ZeroDivisionError" in fake(session).aborted[-1]


# ---- X/Y/Z ----


class AxisOption:
    """The fields of the host's class, as it takes them."""

    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.confirm, self.cost, self.choices = label, type, apply, confirm, cost, choices


def axes_of(session: Session, args: tuple[Any, ...] = (False, "dpo", 1.0, "")) -> dict[str, AxisOption]:
    module = ModuleType("xyz_grid.py")
    module.AxisOption, module.axis_options = AxisOption, []  # type: ignore[attr-defined]
    for _ in range(2):  # Reload script bodies registers twice
        add_axes(module, session, lambda p: args)
    return {option.label[len("[DPO] ") :].lower(): option for option in module.axis_options}  # type: ignore[attr-defined]


def test_axes_are_added_once(session: Session):
    assert list(axes_of(session)) == ["strength", "offset", "rank", "blocks", "method"]
    assert axes_of(session)["offset"].choices() == ["None", "exact.safetensors", "dpo", "xl"]
    assert axes_of(session)["method"].choices() == ["off", "LoRA", "exact"]


def test_cells_of_a_grid_are_independent(session: Session):
    """The host copies p shallowly for each cell: what one cell set must not reach the next."""
    axes, p = axes_of(session), new_p()
    shown = []
    for strength in (0.0, 1.5, 0.0):
        cell = copy.copy(p)
        cell.calls = []
        axes["strength"].apply(cell, strength, [])
        calls = generate(session, cell, False, "dpo", 1.0, "")
        shown.append((calls[0][1], cell.extra_generation_params.get("DPO strength")))
    assert shown == [(None, 0.0), ("dpo", 1.5), (None, 0.0)]
    p.calls = []
    assert {call[1] for call in generate(session, p, False, "dpo", 1.0, "")} == {None}
    assert p.extra_generation_params == {"Other": 1}


def test_axes_override_the_script(session: Session):
    p = new_p()
    for name, value in (("strength", 0.25), ("rank", 2), ("blocks", "OUT=0"), ("method", "LoRA")):
        set_axis(p, name, value)
    wish = wish_of(p, False, "dpo", 1.0, "")
    assert (wish.enabled, wish.strength, wish.rank, wish.blocks, wish.method) == (True, 0.25, 2, "OUT=0", "LoRA")
    generate(session, p, False, "dpo", 1.0, "")
    assert p.extra_generation_params["DPO rank"] == 2
    assert wish_of(new_p(), True, "dpo", 1.0, "", 3.0).rank == 3
    assert wish_of(new_p(), True, "dpo", 1.0, "", 0).rank is None
    for rank in ("all", 2.5, "2.5", True, float("nan"), float("inf"), [2], "-"):
        with pytest.raises(SettingError, match="not a whole number"):
            wish_of(new_p(), True, "dpo", 1.0, "", rank)
    assert [wish_of(new_p(), True, "dpo", 1.0, "", rank).rank for rank in ("16 ", " ", None, 16.0)] == [16, None, None, 16]


@pytest.mark.parametrize("enabled", ["False", "off", "0", 2, [], {}])
def test_a_switch_is_on_or_off(enabled: Any):
    """The text "False", as a request may hold it, would switch the script on."""
    with pytest.raises(SettingError, match="neither true nor false"):
        wish_of(new_p(), enabled, "dpo")


def test_fields_that_an_axis_replaces_are_not_looked_at():
    p = new_p()
    set_axis(p, "strength", 0.5)
    assert wish_of(p, False, "dpo", None).strength == 0.5
    set_axis(p, "strength", float("nan"))
    with pytest.raises(SettingError, match="not a finite number"):
        wish_of(p, False, "dpo", 1.0)


@pytest.mark.parametrize(("chosen", "method", "used"), [
    ("dpo", "exact", "exact"), ("dpo", "LoRA", "dpo"), ("exact.safetensors", "LoRA", "dpo"), ("dpo", "off", None),
])  # fmt: skip
def test_the_method_takes_the_file_of_the_same_pair(session: Session, chosen: str, method: str, used: str | None):
    p = new_p()
    axes_of(session)["method"].apply(p, method, [])
    calls = generate(session, p, True, chosen, 1.0, "")
    assert {call[1] for call in calls} == {used}
    name = None if used is None else "exact.safetensors" if used == "exact" else used
    assert p.extra_generation_params.get("DPO offset") == name  # pasting it brings the same picture
    assert not fake(session).aborted


def test_no_offset_is_a_value_of_the_offset_axis(session: Session):
    axes, shown = axes_of(session), []
    for name in ("None", "dpo", "None"):
        p = new_p()
        axes["offset"].apply(p, name, [])
        shown.append((generate(session, p, True, "dpo", 1.0, "")[0][1], p.extra_generation_params.get("DPO offset")))
    assert shown == [(None, None), ("dpo", "dpo"), (None, None)]
    assert not fake(session).aborted


@pytest.mark.parametrize(
    ("axis", "values", "message"),
    [
        ("strength", [0.5, float("nan")], "Strength nan"),
        ("strength", [1e9], "too large"),
        ("offset", ["dpo", "gone"], "Offset 'gone': there is no offset named"),
        ("offset", ["xl"], "is an offset for SDXL"),
        ("rank", [2, 5], "Rank 5: rank 5 is outside 1 to 4"),
        ("blocks", ["IN=1", "EAR=2"], "Blocks 'EAR=2'"),
        ("method", ["LoRA", "magic"], "Method 'magic': unknown; expected one of off, LoRA, exact"),
    ],
)
def test_confirm_refuses_bad_values_by_name(session: Session, axis: str, values: list[Any], message: str):
    confirm = axes_of(session)[axis].confirm
    with pytest.raises(RuntimeError, match="DPO") as found:
        confirm(new_p(), values)
    assert message in str(found.value)


def test_confirm_takes_good_values(session: Session):
    axes, p = axes_of(session), new_p()
    for axis, values in (("strength", [0.0, -1.0, 2.0]), ("offset", ["None", "dpo"]), ("rank", [1, 4]),
                         ("blocks", ["", "IN=0.5;MID=0"]), ("method", ["off", "LoRA", "exact"])):  # fmt: skip
        axes[axis].confirm(p, values)
    without = axes_of(session, (False, "None", 1.0, ""))
    without["rank"].confirm(p, [4])  # another axis brings the offset
    fake(session).live.path = None
    with pytest.raises(RuntimeError, match="no checkpoint is loaded"):
        axes["offset"].confirm(p, ["dpo"])


def test_confirm_waits_for_a_checkpoint_that_is_loaded_later(session: Session):
    live = fake(session).live
    live.later = fake(session).checkpoint_dir / "other.safetensors"
    axes_of(session)["offset"].confirm(new_p(), ["xl"])  # whether it fits shows with the first cell
    with pytest.raises(RuntimeError, match="no offset named"):
        axes_of(session)["offset"].confirm(new_p(), ["gone"])


def test_exact_without_an_offset_file_says_how_to_make_one(session: Session):
    (fake(session).reference_dir / "exact.safetensors").unlink()
    with pytest.raises(RuntimeError, match="no offset file of the same base and reference"):
        axes_of(session)["method"].confirm(new_p(), ["exact"])


def test_a_strength_that_is_no_number_is_refused():
    with pytest.raises(SettingError):
        wish_of(new_p(), True, "dpo", object(), "")
