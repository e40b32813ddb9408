"""Imports go down the floors, and the library runs with no WebUI and none of the optional libraries."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tools.rooms import FLOORS, PACKAGE, imported_modules, module_files, room_of

MOST_FILES = 14  # in one room
MOST_ENTRIES = 14  # at the top of the package, beside __init__, __main__ and py.typed
OPTIONAL = [
    "modules",
    "modules_forge",
    "backend",
    "ldm_patched",
    "networks",
    "diffusers",
    "accelerate",
    "huggingface_hub",
    "gradio",
]
NEEDS_HOST = ("lib_dpo.hosts.a1111.", "lib_dpo.hosts.forge.live", "lib_dpo.hosts.a1111_family")
RUNS = {"lib_dpo.__main__"}  # importing it is running the command line


def floor_errors(package: Path) -> Iterator[str]:
    """What breaks the rule of the floors in a package, one line each."""
    files = module_files(package)
    graph = {name: imported_modules(name, files) for name in files}
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for room in sorted({room_of(name) for name in files} - floor.keys()):
        yield f"{room} stands on no floor: add it to tools/rooms.py"
    for name, imports in graph.items():
        for other in sorted(imports):
            here, there = floor.get(room_of(name)), floor.get(room_of(other))
            if here is not None and there is not None and (there > here or (there == here and room_of(name) != room_of(other))):
                yield f"{name} imports {other}: a room imports only rooms below it"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "imports in a circle: " + " -> ".join(reversed(error.args[1]))


def test_imports_go_down_the_floors():
    errors = list(floor_errors(PACKAGE))
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"families/keymap.py": "from lib_dpo.errors import DpoError"}, None),
        ({"offsets/lora.py": "from lib_dpo import __version__\nfrom lib_dpo.files import header", "files/header.py": ""}, None),
        ({"families/keymap.py": "import lib_dpo.offsets.offset", "offsets/offset.py": ""}, "only rooms below it"),
        ({"families/keymap.py": "def late():\n    from lib_dpo.cli import main", "cli/main.py": ""}, "only rooms below it"),
        ({"files/hub.py": "from lib_dpo.maths import ranks", "maths/ranks.py": ""}, "only rooms below it"),
        ({"files/hub.py": "import lib_dpo.files.names", "files/names.py": "from lib_dpo.files.hub import x"}, "in a circle"),
        ({"errors.py": "from lib_dpo import settings", "settings.py": ""}, "lib_dpo.errors imports lib_dpo.settings"),
        ({"offsets/lora.py": "from lib_dpo import extract", "face.py": ""}, "lib_dpo.offsets.lora imports lib_dpo.face"),
        ({"offsets/lora.py": "import lib_dpo", "face.py": ""}, "lib_dpo.offsets.lora imports lib_dpo.face"),
        ({"helpers.py": ""}, "helpers stands on no floor"),
    ],
)
def test_floor_errors_are_found(tmp_path: Path, sources: dict[str, str], message: str | None):
    for file, source in {"__init__.py": "", "errors.py": "", **sources}.items():
        path = tmp_path / "lib_dpo" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    found = list(floor_errors(tmp_path / "lib_dpo"))
    assert not found if message is None else any(message in line for line in found), found


def test_rooms_are_few_small_and_described():
    entries = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}
    assert len(entries - {"__init__.py", "__main__.py"}) <= MOST_ENTRIES, entries
    for folder in {file.parent for file in module_files(PACKAGE).values()} - {PACKAGE}:
        assert len([file for file in folder.glob("*.py") if file.name != "__init__.py"]) <= MOST_FILES, folder
        described = (folder / "__init__.py").read_text(encoding="utf-8")
        assert "May import " in described.split("\n\n")[1], f"{folder}: say what lives there and what it imports"


def test_modules_import_without_a_webui_and_without_optional_libraries():
    names = sorted(name for name in module_files(PACKAGE).keys() - RUNS if not name.startswith(NEEDS_HOST))
    program = textwrap.dedent("""
        import importlib, importlib.abc, sys, traceback

        class Refuse(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in OPTIONAL:
                    raise ImportError(f"{name} is not installed")

        sys.meta_path.insert(0, Refuse())
        failed = False
        for name in NAMES:
            for loaded in [m for m in sys.modules if m.split(".")[0] == "lib_dpo"]:
                del sys.modules[loaded]  # so that each is imported on its own
            try:
                importlib.import_module(name)
                assert "matplotlib" not in sys.modules, "matplotlib is imported at import time"
            except BaseException:
                failed = True
                print(f"import {name}", traceback.format_exc(limit=-2), sep="\\n")
        sys.exit(failed)
    """)
    header = f"OPTIONAL = {OPTIONAL!r}\nNAMES = {names!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", header + program], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
