"""The rooms of lib_dpo and their floors, read from its imports, and their picture in docs/ARCHITECTURE.md.

    python -m tools.rooms        draws docs/rooms.svg

tests/test_floors.py holds the imports to the floors, tests/test_docs.py the picture to the imports.
"""

from __future__ import annotations

import ast
from collections import Counter
from html import escape
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
    return {name: file for name, file in names.items() if name != package.name}  # the package itself only hands on its face


def imported_modules(name: str, files: dict[str, Path]) -> set[str]:
    """The modules of the package that one of them imports, anywhere in its file (ruff refuses relative imports)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update("lib_dpo.face" if alias.name == "lib_dpo" else alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "lib_dpo":  # its face, or a room
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            found.update(f"lib_dpo.{name}" if f"lib_dpo.{name}" in files else "lib_dpo.face" for name in names)
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


_ROW, _COLUMN, _LEFT, _TOP = 34, 40, 470, 92
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .name { font-weight: 600 } .words { fill: #59636e }
.floor { fill: #f3f5f8 } .line { stroke: #d1d9e0 } .door { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .words { fill: #9198a1 } .floor { fill: #1b222b } .line { stroke: #3d444d } .door { fill: #4493f8 }
}"""


def picture(counts: Counter[tuple[str, str]]) -> str:
    """An SVG: the rooms from the top floor down, and a dot where one imports another, its area the number of imports."""
    floors = [[room for room in rooms if room in WORDS] for rooms in reversed(FLOORS)]
    rooms = [room for floor in floors for room in floor]
    place = {room: number for number, room in enumerate(rooms)}
    width, height = _LEFT + _COLUMN * len(rooms) + 30, _TOP + _ROW * len(rooms) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        "<title>The rooms of lib_dpo, the top floor first: a dot where the room of a row imports the room of a column</title>",
        f"<style>{_STYLE}</style>",
    ]
    for floor in floors:
        if floor:
            top, deep = _TOP + _ROW * place[floor[0]], _ROW * len(floor)
            parts.append(f'<rect class="floor" x="0" y="{top + 2}" width="{width}" height="{deep - 4}" rx="6"/>')
    for room in rooms:
        middle, column = _TOP + _ROW * place[room] + _ROW // 2, _LEFT + _COLUMN * place[room] + _COLUMN // 2
        parts += [
            f'<text class="name" x="12" y="{middle + 5}">{room}</text>',
            f'<text class="words" x="108" y="{middle + 5}">{escape(WORDS[room])}</text>',
            f'<text class="words" transform="translate({column + 4} {_TOP - 8}) rotate(-50)">{room}</text>',
            f'<line class="line" x1="{column}" y1="{_TOP}" x2="{column}" y2="{height - 8}"/>',
        ]
    for (here, there), count in sorted(counts.items()):
        if here in place and there in place:
            x, y = _LEFT + _COLUMN * place[there] + _COLUMN // 2, _TOP + _ROW * place[here] + _ROW // 2
            many = "imports" if count > 1 else "import"
            radius = min(14.0, 2 + 1.5 * count**0.5)
            title = f"<title>{here}: {count} {many} of {there}</title>"
            parts.append(f'<circle class="door" cx="{x}" cy="{y}" r="{radius:.1f}">{title}</circle>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(doors()), encoding="utf-8")
    print(PICTURE)
