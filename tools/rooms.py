"""The rooms of lib_dpo and their floors, read from its imports, and their picture in docs/ARCHITECTURE.md.

    python -m tools.rooms        draws docs/rooms.svg

tests/test_floors.py holds the imports to the floors, tests/test_docs.py the picture to the imports.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lib_dpo"
PICTURE = ROOT / "docs" / "rooms.svg"

# From the ground up: a room imports itself and the floors below its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "progress"),
    ("settings",),
    ("files", "maths"),
    ("families",),
    ("offsets",),
    ("operations",),
    ("face", "hosts"),
    ("pictures",),
    ("toy", "webui"),
    ("cli",),
    ("__main__",),
)
WORDS = {
    "cli": "the command line",
    "toy": "the bundled model, its demo and study",
    "webui": "the tab, the API, the script, the axes",
    "pictures": "grids, differences, charts",
    "hosts": "live models: A1111, Forge, none",
    "face": "what `import lib_dpo` gives",
    "operations": "extract, verify, resize, bake, diff, compat, inspect",
    "offsets": "tuned minus base: of a pair, a file, a LoRA",
    "families": "what SD 1.x, SD 2.x and SDXL look like",
    "files": "read lazily, written all or nothing",
    "maths": "matrices in, factors out",
}


def module_files(package: Path) -> dict[str, Path]:
    """Dotted module names of a package, such as lib_dpo.hosts.base, and their files."""
    names = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {name: file for name, file in names.items() if name != package.name}  # the package itself holds no code of ours


def imported_modules(name: str, files: dict[str, Path]) -> set[str]:
    """The modules of the package that one of them imports, anywhere in its file (ruff refuses relative imports)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in files else node.module or "")
    return found & files.keys() - {name}


def room_of(name: str) -> str:
    """lib_dpo.hosts.forge.live -> hosts."""
    return name.split(".")[1]


def doors(package: Path = PACKAGE) -> Counter[tuple[str, str]]:
    """How many imports lead from one room to another."""
    files = module_files(package)
    pairs = ((room_of(name), room_of(other)) for name in files for other in imported_modules(name, files))
    return Counter((here, there) for here, there in pairs if here != there)
