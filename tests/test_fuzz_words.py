"""Anything typed or pasted: block weights, values of axes, infotexts, records, names. Read, or refused. Long: `make fuzz`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import webui_files
from fuzzing import inputs, tried
from hypothesis import example, given
from hypothesis import strategies as st
from webui_files import fake

from lib_dpo.errors import DpoError, SettingError
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.blocks import block_labels, check_blocks, parse_blocks
from lib_dpo.files.names import output_path
from lib_dpo.offsets.recipe import Ingredient, baked_in, ingredient_of, with_recipe
from lib_dpo.pictures.plan import parse_seeds, parse_strengths
from lib_dpo.settings import LARGEST_STRENGTH, strength_of
from lib_dpo.webui.axes import add_axes
from lib_dpo.webui.generation import INFOTEXT, Wish, wish_of
from lib_dpo.webui.session import Session

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

figures = st.floats(allow_nan=True) | st.integers() | st.sampled_from([10**400, -(10**400), 1e308, 5e-324, 0.1 + 0.2])
typed = (
    st.text(max_size=12)
    | figures.map(str)
    | st.sampled_from(
        ["9" * 5000, "-" + "9" * 5000, "٣", "²", "1_0", "0x10", "1e999", "nan", "", " ", "None", "True", "\0", "\ud800"]
    )
)
values = typed | figures | st.none() | st.booleans() | st.lists(st.integers(), max_size=2) | st.binary(max_size=3)
block_names = st.sampled_from(
    [
        "IN00",
        "IN",
        "OUT11",
        "MID",
        "TE1",
        "TE2",
        "ALL",
        "UNET",
        "TIME",
        "CONV",
        "ATTN",
        "ATTN1",
        "NORM",
        "in03",
        "IN99",
        "x",
        "",
    ]
)
blocks = st.lists(
    st.tuples(block_names, typed | st.floats(-3, 3).map(repr)).map("=".join) | typed, max_size=5
).flatmap(lambda parts: st.sampled_from([",", ", ", ";", ",,"]).map(lambda mark: mark.join(parts)))  # fmt: skip


@inputs(100)
@given(text=blocks)
def test_block_weights_come_back_as_they_were_read(text: str):
    found, refusal = tried(parse_blocks, text)
    if found is None:
        assert "block weight" in refusal
        return
    assert dict(parse_blocks(str(found)).weights) == pytest.approx(dict(found.weights), rel=1e-9)
    for arch in ARCHITECTURES.values():
        try:
            check_blocks(found, arch)
        except SettingError:
            continue
        assert all(math.isfinite(found.block(label)) for label in block_labels(arch))


# ---- what an infotext and a file tell of a bake ----

ingredients = st.builds(
    Ingredient,
    st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12),
    st.floats(-LARGEST_STRENGTH, LARGEST_STRENGTH).filter(lambda strength: strength != 0),
    st.sampled_from(["", "MID=0", "IN00=0.5,MID=0"]),
    st.none() | st.integers(1, 999),
)


@inputs(70)
@given(baked=ingredients)
@example(baked=Ingredient("a x 2", 1.0))
def test_a_bake_comes_back_from_an_infotext(baked: Ingredient):
    found = ingredient_of(baked.text)
    assert found is not None
    assert (found.offset, found.blocks, found.rank) == (baked.offset, baked.blocks, baked.rank)
    assert found.strength == pytest.approx(baked.strength, rel=1e-9)


@inputs(100)
@given(
    text=st.text() | st.tuples(st.text(max_size=5), typed, st.text(max_size=9)).map(lambda parts: "{} x {} ({})".format(*parts))
)
@example(text="a x 1 (rank " + "9" * 5000 + ")")
@example(text="a x 1 (rank ²)")
@example(text="a x 1e999")
@example(text="a x 1.7976931345e308")
def test_any_text_is_a_bake_or_is_not(text: str):
    found = ingredient_of(text)
    assert found is None or math.isfinite(found.strength)
    assert found is None or ingredient_of(found.text) is not None


@inputs(50)
@given(baked=ingredients, history=st.none() | typed | st.dictionaries(typed, typed | st.none(), max_size=3).map(json.dumps))
def test_a_recipe_comes_back_from_metadata(baked: Ingredient, history: str | None):
    before = {} if history is None else {"sd_merge_models": history}
    options: dict[str, Any] = {"models": ("model", baked.offset), "hashes": ("0" * 64, "1" * 64), "name": "out", "half": True}
    found = baked_in(with_recipe(before, baked, **options))
    assert found[0] == baked
    again = baked_in(with_recipe(with_recipe(before, baked, **options), baked, **options | {"hashes": ("2" * 64, "1" * 64)}))
    assert again[0] == baked


# ---- axes, and the script's own fields ----


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("words")
    return webui_files.open_session(webui_files.with_offsets(folder / "made"), folder / "models")


@pytest.fixture(scope="module")
def axes(session: Session) -> dict[str, Any]:
    """The [DPO] axes by name, as the X/Y/Z plot script has them."""

    def option(label: str, kind: Any, apply: Any, **more: Any) -> Any:
        return SimpleNamespace(label=label, type=kind, apply=apply, **more)

    module: Any = SimpleNamespace(axis_options=[], AxisOption=option)
    add_axes(module, session, lambda p: [True, "dpo", 1.0, "", 0])
    return {each.label.removeprefix("[DPO] ").lower(): each for each in module.axis_options}


@inputs(80)
@given(name=st.sampled_from(["strength", "offset", "rank", "blocks", "method"]), value=typed | figures | blocks)
@example(name="rank", value="9" * 5000)
@example(name="strength", value=10**400)
def test_any_value_of_an_axis_is_taken_or_refused(session: Session, axes: dict[str, Any], name: str, value: Any):
    axis = axes[name]
    try:
        value = axis.type(value)  # as the host does, which shows what goes wrong there itself
    except (ValueError, OverflowError):
        return
    if refusal := _refusal(axis, value):
        assert refusal.startswith("[DPO] ")
        assert str(fake(session).folder) not in refusal
        return
    p = SimpleNamespace()
    axis.apply(p, value, [value])
    wish = wish_of(p, True, "dpo", 1.0, "", 0)
    assert math.isfinite(wish.strength)


def _refusal(axis: Any, value: Any) -> str:
    try:
        axis.confirm(SimpleNamespace(), [value])
    except RuntimeError as error:  # what the host shows
        return str(error)
    return ""


@inputs(100)
@given(enabled=values, offset=values, strength=values, text=values, rank=values)
@example(enabled=True, offset="dpo", strength=1.0, text="", rank="9" * 5000)
@example(enabled=True, offset="dpo", strength="9" * 5000, text="", rank=0)
@example(enabled=True, offset="dpo", strength=1.0, text="", rank="²")
def test_any_arguments_of_the_script_are_a_wish_or_refused(enabled: Any, offset: Any, strength: Any, text: Any, rank: Any):
    wish, refusal = tried(wish_of, SimpleNamespace(), enabled, offset, strength, text, rank)
    if wish is None:
        assert len(refusal) < 300
        return
    assert abs(wish.strength) <= LARGEST_STRENGTH
    assert wish.rank is None or (isinstance(wish.rank, int) and wish.rank)


@inputs(40)
@given(entries=st.dictionaries(st.sampled_from(sorted(INFOTEXT)), values, max_size=6), more=st.lists(values, max_size=2))
def test_any_pasted_infotext_stops_with_a_sentence(session: Session, entries: dict[str, Any], more: list[Any]):
    from lib_dpo.webui.generation import Generation

    p = SimpleNamespace(extra_generation_params={INFOTEXT[name]: value for name, value in entries.items()}, comment=print)
    arguments = [True, *(entries.get(name, getattr(Wish(), name)) for name in ("offset", "strength", "blocks", "rank"))]
    Generation(session).process(p, *arguments, *more)
    error = str(p.extra_generation_params.get(INFOTEXT["error"], ""))
    assert "this should not happen" not in error
    assert str(fake(session).folder) not in error


# ---- numbers, lists and names ----


@inputs(100)
@given(value=values)
@example(value="9" * 5000)
@example(value=10**400)
def test_any_strength_is_a_number_or_refused(value: Any):
    found, refusal = tried(strength_of, value)
    assert len(refusal) < 200 if found is None else abs(found) <= LARGEST_STRENGTH


lists = st.lists(
    typed | st.tuples(typed, typed).map("-".join) | st.sampled_from(["0-2 (+0.5)", "1-1e9", "1-3 [5]"]), max_size=4
)


@inputs(100)
@given(text=lists.map(",".join) | st.text(st.sampled_from("0123456789.,-+() []eE"), max_size=14))
@example(text="0-1e9 (+1e-9)")
@example(text="0-" + "9" * 400)
@example(text="1-" + "9" * 5000)
@example(text="0-2 (+0)")
def test_any_list_of_seeds_and_strengths_is_read_or_refused(text: str):
    for parse in (parse_seeds, parse_strengths):
        try:
            found = parse(text)
        except DpoError:
            continue
        assert 0 < len(found) < 10_000


@inputs(70)
@given(name=typed | st.text(st.sampled_from("ab./\\ :~\0\n"), max_size=12))
def test_any_name_stays_in_its_folder(name: str):
    try:
        path = output_path(Path("/models/Lora"), name)
    except DpoError:
        return
    assert path.parent == Path("/models/Lora")
    assert Path(str(path)).resolve().parent == Path("/models/Lora").resolve()
