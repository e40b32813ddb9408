"""The words of the tab and the script that a WebUI can show in another language, and what its files for them hold.

python -m tools.localizations        # every string, as JSON
python -m tools.localizations de_DE  # what the file of a language lacks

A WebUI replaces text nodes, titles and placeholders that equal a key of localizations/LANGUAGE.json (its localization.js).
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "localizations"
LANGUAGES = ("de_DE", "es_ES", "fr_FR", "ja_JP", "ko_KR", "pt_BR", "ru_RU", "zh_CN", "zh_TW")
# what these lists hold are names, also on the command line and in files
_NAMES = ("_sampler", "_choice", "_method", "_profile", "_precision")
_HIDDEN = "dpo-hidden"
_NO_WORDS = re.compile(r"[\W\d_]*")  # signs and numbers alone


def strings() -> list[str]:
    """Everything that the page shows before anything was done, in the order of the page, once each."""
    found = [*_tab(), *_script(), *_titles(), *_settings()]
    return [text for text in dict.fromkeys(text.strip() for text in found) if not _NO_WORDS.fullmatch(text)]


def translations(language: str) -> dict[str, str]:
    """What the file of a language holds. Raises FileNotFoundError."""
    loaded: dict[str, str] = json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    return loaded


def _tab() -> Iterator[str]:
    from lib_dpo.hosts.standalone import Standalone
    from lib_dpo.webui.session import Session
    from lib_dpo.webui.tab import build

    with tempfile.TemporaryDirectory() as folder:
        for block in build(Session(Standalone(Path(folder), Path(folder), device="cpu"))).blocks.values():
            yield from _of(block)


def _script() -> Iterator[str]:
    import gradio as gr

    from lib_dpo.hosts.standalone import Standalone
    from lib_dpo.webui.session import Session
    from lib_dpo.webui.tab.script import script_controls

    with tempfile.TemporaryDirectory() as folder, gr.Blocks(analytics_enabled=False) as blocks:
        script_controls(
            Session(Standalone(Path(folder), Path(folder), device="cpu")),
            lambda name: name,
            lambda value, **options: gr.Accordion(**options),
        )
        for block in blocks.blocks.values():
            yield from _of(block)


def _of(block: Any) -> Iterator[str]:
    kind = type(block).__name__
    if _HIDDEN in (getattr(block, "elem_classes", None) or ()) or block.elem_id == "dpo_task":
        return
    for name in ("label", "info", "placeholder"):
        text = getattr(block, name, None)
        if isinstance(text, str) and kind != "State":
            yield text
    value = getattr(block, "value", None)
    if kind in ("Button", "ClearButton", "DownloadButton") and isinstance(value, str):
        yield value
    if kind in ("HTML", "Markdown") and isinstance(value, str):
        yield from _text_nodes(value)
    if kind in ("Radio", "Dropdown") and not str(block.elem_id).endswith(_NAMES):
        for choice in block.choices or ():
            yield str(choice[0] if isinstance(choice, (tuple, list)) else choice)


def _text_nodes(html: str) -> list[str]:
    found: list[str] = []

    class Parser(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value for name, value in attrs if name in ("title", "placeholder") and value)

    Parser(convert_charrefs=True).feed(html)
    return found


def _titles() -> list[str]:
    """What a pointer that rests on a button is told: dpo.js sets it."""
    script = (ROOT / "javascript" / "dpo.js").read_text(encoding="utf-8")
    table = script[script.index("const dpoTitles = {") :].split("\n};")[0]
    return [*re.findall(r'^    \w+: "(.+)",$', table, re.MULTILINE), *re.findall(r'\.title = "(.+?)"', script)]


def _settings() -> list[str]:
    """The labels and explanations in the WebUI's settings: the host's modules are needed to run that file, not to read it."""
    tree = ast.parse((ROOT / "scripts" / "dpo.py").read_text(encoding="utf-8"))
    (function,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "add_settings")
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    named = [(call.func.attr, call.args) for call in calls if isinstance(call.func, ast.Attribute)]
    labels = [arguments[1] for name, arguments in named if name == "OptionInfo"]
    told = [arguments[0] for name, arguments in named if name == "info"]
    return [
        *map(ast.literal_eval, labels),
        *(f"({ast.literal_eval(each)})" for each in told),
    ]  # the host puts these in brackets


if __name__ == "__main__":
    known = translations(sys.argv[1]) if sys.argv[1:] else {}
    json.dump({text: "" for text in strings() if text not in known}, sys.stdout, indent=1, ensure_ascii=False)
