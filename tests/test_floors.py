"""Imports go down the floors, and the library runs with no WebUI and none of the optional libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lib_dpo"
FLOOR = {
    "devices": 0, "errors": 0, "names": 0, "precision": 0, "progress": 0, "settings": 0,
    "arch": 1, "foreign": 0, "checkpoint": 1, "hashes": 1, "header": 1, "hub": 1, "lowrank": 1, "ranks": 1,
    "shapes": 1, "writer": 1,
    "delta": 1, "addition": 2, "threads": 2,
    "keymap": 2, "model": 2, "pruning": 2, "synthetic": 2,
    "lora_alias": 3, "lora_keys": 2, "lora_metadata": 2, "lora_scale": 3, "unplaced": 0,
    "offset": 3,
    "analyse": 4, "bake": 4, "compat": 4, "coverage": 4, "decompose": 4, "dense": 4, "extract": 4,
    "figures": 4, "prediction": 4, "hosts": 4,
    "inspection": 4, "layers": 4, "lora": 4, "lora_file": 4, "patch": 4, "pipeline": 4, "rank_plan": 4, "recipe": 4,
    "resize": 4, "resize_metadata": 4, "verify": 4,
    "answers": 5, "effects": 5, "grid": 5, "jobs": 5, "lettering": 5, "library": 5, "pictures": 5, "plots": 5, "report": 5,
    "session": 6, "toy": 6,
    "api": 7, "api_requests": 6, "axes": 7, "cells": 6, "cli": 8, "cli_arguments": 8, "cli_files": 7, "cli_parser": 7,
    "cli_pictures": 7,
    "cli_reports": 7, "cli_words": 7, "app": 7, "demo": 7, "generation": 7, "ui": 7,
    "__main__": 9,
}  # fmt: skip
OPTIONAL = ["modules", "modules_forge", "backend", "ldm_patched", "networks", "diffusers", "huggingface_hub", "gradio"]
NEEDS_HOST = {"lib_dpo.hosts.a1111", "lib_dpo.hosts.forge", "lib_dpo.hosts.webui"}
RUNS = {"lib_dpo.__main__"}  # importing it is running the command line


def module_files(package: Path) -> dict[str, Path]:
    """Dotted module names of a package, such as lib_dpo.hosts.base, and their files."""
    names = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imported_modules(name: str, files: dict[str, Path]) -> set[str]:
    """The modules of the package that one of them imports, anywhere in its file (ruff refuses relative imports)."""
    found = set()
    for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in files else node.module or "")
    return found & files.keys() - {name}


def floor_errors(package: Path) -> Iterator[str]:
    """What breaks the rule of the floors in a package, one line each."""
    files = module_files(package)
    graph = {name: imported_modules(name, files) for name in files}
    floor = {name: FLOOR.get(name.split(".")[1]) for name in files if "." in name}
    for name in sorted(name for name in floor if floor[name] is None):
        yield f"{name} stands on no floor: add it to the table"
    for name, imports in graph.items():
        here = floor.get(name, -1)  # the package itself, in __init__.py, imports nothing
        for other in sorted(imports & floor.keys()):
            there = floor[other]
            if here is not None and there is not None and there > here:
                yield f"{name} (floor {here}) imports {other} (floor {there}): imports go down"
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
        ({"keymap.py": "from lib_dpo.errors import DpoError"}, None),
        ({"lora.py": "from lib_dpo import __version__, extract", "extract.py": ""}, None),
        ({"keymap.py": "import lib_dpo.offset", "offset.py": ""}, "keymap (floor 2) imports lib_dpo.offset (floor 3)"),
        ({"keymap.py": "def late():\n    from lib_dpo import offset", "offset.py": ""}, "imports go down"),
        ({"hosts/base.py": "from lib_dpo.session import S", "session.py": ""}, "lib_dpo.hosts.base (floor 4) imports"),
        ({"lora.py": "import lib_dpo.bake", "bake.py": "from lib_dpo.lora import read"}, "imports in a circle"),
        ({"__init__.py": "from lib_dpo.errors import DpoError"}, "lib_dpo (floor -1) imports lib_dpo.errors"),
        ({"helpers.py": ""}, "lib_dpo.helpers stands on no floor: add it to the table"),
    ],
)
def test_floor_errors_are_found(tmp_path: Path, sources: dict[str, str], message: str | None):
    for file, source in {"__init__.py": "", "errors.py": "", **sources}.items():
        path = tmp_path / "lib_dpo" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    found = list(floor_errors(tmp_path / "lib_dpo"))
    assert not found if message is None else any(message in line for line in found), found


def test_modules_import_without_a_webui_and_without_optional_libraries():
    names = sorted(module_files(PACKAGE).keys() - NEEDS_HOST - RUNS)
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
