"""argparse with our one line for errors: it names what was mistyped and offers what may have been meant."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib_dpo.errors import did_you_mean, printable
from lib_dpo.settings import one_of

REFUSED = 2  # exit code
_DASHES = "–—−‐‑"  # what word processors and web pages make of a hyphen
_AMOUNT = re.compile(r"(?P<number>[-+]?[\d.]+)\s*(?P<unit>%|[kmg]i?b|[x×])?", re.IGNORECASE)
_FACTORS = {"%": 0.01, "k": 1e-3, "g": 1e3}  # of a share, and of MB


class _Help(argparse.HelpFormatter):
    """Says defaults, where there are any and the text does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "default" in text or not action.option_strings or action.default in (None, False, "", argparse.SUPPRESS)
        return text if told else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with our one line for errors."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **options})
        # a private name of argparse: before Python 3.14 it takes -1e-3 for an option
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
        self._typed: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse, but what is left over is refused here, where the command is known that it was meant for."""
        self._typed = list(sys.argv[1:] if args is None else args)
        for word in self._typed:  # argparse takes it for a file
            option = "--" + word.lstrip(_DASHES + "-").partition("=")[0]
            if word[0:1] and word[0] in _DASHES and option in self._option_string_actions:
                self._refuse(f"{word} begins with a dash that is no hyphen; write {option}")
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"{' '.join(left)}: unknown to `{self.prog}`")
        return found, left

    def error(self, message: str) -> Any:
        self._refuse(self._mistyped() or message)

    def _refuse(self, message: str) -> Any:
        self.exit(REFUSED, f"error: {printable(' '.join(message.split()))}; see `{self.prog} --help`\n")

    def _mistyped(self) -> str | None:
        """What argparse tells badly or late: a wrong command or option."""
        if self._subparsers is not None:
            return self._wrong_command()
        options = self._option_string_actions
        for word in self._typed:
            name = word.partition("=")[0]
            if name.startswith("--") and len(name) > 2 and not any(option.startswith(name) for option in options):
                return f"{name} is no option of `{self.prog}`" + did_you_mean(name, options)
        return None

    def _wrong_command(self) -> str | None:
        commands = next(action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        known = ", ".join(commands or ())
        word = next((word for word in self._typed if not word.startswith("-")), None)
        if word is None:
            return None if self._typed else f"no command is given, expected one of {known}"
        if word in (commands or ()):
            return None
        return f"{word} is no command, expected one of {known}" + did_you_mean(word, commands or ())


def program() -> str:
    """What the command line was called as, for people to type again."""
    return "dpo" if Path(sys.argv[0]).stem.lower() == "dpo" else "python -m lib_dpo"


def number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of argparse: a number, int or float. What else was typed is refused, with the number that it may stand for."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            what = f"{text!r} is not a {'whole ' if kind is int else ''}number"
            raise argparse.ArgumentTypeError(what + _meant(_number_meant(text, kind))) from None

    return read


def among(known: Sequence[str]) -> dict[str, Any]:
    """For `add_argument`: one of some words, in any case. What else was typed is refused, with the word it may stand for."""

    def read(text: str) -> str:
        if text.lower() not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; expected one of {one_of(text, known)}")
        return text.lower()

    return {"type": read, "choices": known}


def _number_meant(text: str, kind: Callable[[str], Any]) -> str | None:
    """0.8 for 0,8 and 80%, 64 for 64.0, and 80 for 80 MB and 0.08GB: sizes are in MB."""
    plain = text.strip().translate({ord(dash): "-" for dash in _DASHES})
    match = _AMOUNT.fullmatch(plain.replace(",", ".") if plain.count(",") == 1 and "." not in plain else plain)
    try:
        amount = float(match["number"]) * _FACTORS.get((match["unit"] or "")[:1].lower(), 1)  # type: ignore[index]
    except (TypeError, ValueError):  # no match; 1.2.3
        return None
    return f"{amount:g}" if kind is float or amount.is_integer() else None


def _meant(near: str | None) -> str:
    return f"; did you mean {near}?" if near else ""
