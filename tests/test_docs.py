"""README.md and docs/: links lead somewhere, examples can be typed, every command is told, and the README stays short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lib_dpo.cli.argparse_errors import Parser
from lib_dpo.cli.arguments import make_parser
from lib_dpo.cli.main import _runs
from tools.rooms import PACKAGE, PICTURE, WORDS, doors, picture

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "models" / "bundled" / "README.md",
]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_WORDS_IN_FIVE_MINUTES = 1250  # of plain English, read calmly


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", _CODE.sub("", _text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_lead_somewhere(page: Path):
    wrong = []
    for link in _LINK.findall(_CODE.sub("", _text(page))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            wrong.append(link)
    assert not wrong


def test_every_picture_is_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in _LINK.findall(_text(page))}
    assert {picture for picture in (ROOT / "docs").glob("*.png") if picture not in shown} == set()


def _examples(page: Path) -> list[list[str]]:
    """The calls of `dpo` in blocks of code, as a shell splits them."""
    lines = "\n".join(_CODE.findall(_text(page))).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if re.match(r"dpo \w", line)]


@pytest.mark.parametrize(
    "words", [words for page in PAGES for words in _examples(page)], ids=lambda words: " ".join(words)[:60]
)
def test_examples_can_be_typed(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("path/to/webui/models", "models/bundled", "demo"):
        Path(folder).mkdir(parents=True)
    assert make_parser(_runs()).parse_args(words).command == words[0]


def test_there_are_examples():
    assert len({words[0] for page in PAGES for words in _examples(page)}) >= 5


def _commands() -> dict[str, Parser]:
    actions = make_parser(_runs())._subparsers._group_actions  # type: ignore[union-attr]
    return actions[0].choices  # type: ignore[return-value]


def test_every_command_is_told_with_options_that_it_has():
    rows = dict(re.findall(r"^\| `dpo (\w+)(.*)$", _text(ROOT / "docs" / "commands.md"), re.MULTILINE))
    assert rows.keys() == _commands().keys()
    for name, row in rows.items():
        known = _commands()[name]._option_string_actions
        assert [option for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", row) if option not in known] == [], name


def test_modules_that_are_told_are_there():
    known = {file.with_suffix("").relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")}
    known |= {folder.relative_to(PACKAGE).as_posix() for folder in PACKAGE.rglob("*") if folder.is_dir()} | {"lib_dpo"}
    known |= {name.rpartition("/")[2] for name in known}  # the room may have been said before
    names = re.findall(r"`(?:lib_dpo/)?([a-z_0-9]+(?:/[a-z_0-9]+)*)/?(?:\.py)?`", _text(ROOT / "docs" / "ARCHITECTURE.md"))
    assert len(names) > 40
    beside = {"tests", "tests_webui", "scripts", "javascript"}
    assert [name for name in names if name not in known and name.partition("/")[0] not in beside] == []


def test_the_picture_of_the_rooms_is_that_of_the_imports():
    assert PICTURE.read_text(encoding="utf-8") == picture(doors()), "draw it again: python -m tools.rooms"
    assert {room for pair in doors() for room in pair} <= WORDS.keys() | {"errors", "settings", "progress", "__main__"}


def test_targets_that_are_told_are_in_the_makefile():
    targets = set(re.findall(r"^([a-z0-9-]+):", _text(ROOT / "Makefile"), re.MULTILINE))
    told = {name for page in PAGES for name in re.findall(r"`make ([a-z0-9-]+)", _text(page))}
    assert told
    assert told <= targets


def test_the_readme_can_be_read_in_five_minutes():
    plain = _CODE.sub("", _text(ROOT / "README.md"))
    plain = re.sub(r"^\|.*$", "", plain, flags=re.MULTILINE)  # tables are looked at, not read
    assert len(re.sub(r"\]\([^)]*\)", "]", plain).split()) <= _WORDS_IN_FIVE_MINUTES


def test_the_picture_of_what_files_keep_can_be_drawn_from_the_table(tmp_path: Path) -> None:
    from tools.kept_picture import draw, table

    rows = table((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [row.energy[1] for row in rows if row.name.startswith("offset")] == [100]
    assert len(rows) == 6
    draw(rows, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 10_000
