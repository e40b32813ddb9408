"""Names that people type never leave the folder they are meant for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_dpo.errors import OutputError
from lib_dpo.files.names import names_apart, output_path

FOLDER = Path("/models/Lora")


@pytest.mark.parametrize("name", ["dpo", "dpo v1.5", "dpo.safetensors", "  dpo  ", "模型 DPO", "a-b_c(1)", "console"])
def test_plain_names_are_taken(name: str):
    path = output_path(FOLDER, name)
    assert path.parent == FOLDER
    assert path.suffix == ".safetensors"
    assert path.name.count(".safetensors") == 1


@pytest.mark.parametrize(
    "name",
    ["", "   ", ".safetensors", "../x", "..", "a/b", "a\\b", "/etc/passwd", "C:x", "a\0b", "a\nb", "con", "NUL", "com1.x",
     "none", "Addams", ".hidden", "x.", "a..b", "x" * 200, "a?b", "a*b", "\u202ex", "\ud800"],
)  # fmt: skip
def test_other_names_are_refused(name: str):
    with pytest.raises(OutputError) as found:
        output_path(FOLDER, name)
    assert "\n" not in str(found.value)


@given(st.text(max_size=40))
def test_nothing_leaves_the_folder(name: str):
    try:
        path = output_path(FOLDER, name)
    except OutputError:
        return
    assert path.resolve().parent == FOLDER


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        ("a/base.safetensors", "a/tuned.safetensors", ("base.safetensors", "tuned.safetensors")),
        (
            "sd/unet/model.safetensors",
            "dpo/unet/model.safetensors",
            ("sd/unet/model.safetensors", "dpo/unet/model.safetensors"),
        ),
        ("model.safetensors", "dpo/model.safetensors", (f"{Path.cwd().name}/model.safetensors", "dpo/model.safetensors")),
        ("/a", "/b/a", ("/a", "b/a")),
        ("same", "same", ("same", "same")),
    ],
)
def test_names_that_are_equal_get_their_folders(one: str, other: str, names: tuple[str, str]):
    assert names_apart(Path(one), Path(other)) == tuple(str(Path(name)) for name in names)
