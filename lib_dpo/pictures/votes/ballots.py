"""Votes as JSON lines: read from all files of a folder, added one by one, never rewritten.

A line is `{time, model, offset, blocks, a, b, prompt, seed, side, answer}`. `a` and `b` are the strengths of the two
pictures, `answer` is `a`, `b`, `none` (no difference) or `skip`, and `side` says where the picture of strength `a` stood.
Figures are computed from the lines whenever they are asked for, and stored nowhere.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from lib_dpo.errors import BadFileError, OutputError, printable
from lib_dpo.files.atomic import explained
from lib_dpo.settings import LARGEST_STRENGTH, is_finite

Answer = Literal["a", "b", "none", "skip"]
Side = Literal["left", "right"]
ANSWERS: tuple[Answer, ...] = get_args(Answer)
SIDES: tuple[Side, ...] = get_args(Side)
SUFFIX = ".jsonl"

_SHOWN = 60  # characters of a bad value that a message repeats
_LONGEST_NAME = 60  # characters of a model's or an offset's name in that of a file
_LINES_KEPT = 1 << 15
_appending = threading.Lock()


@dataclass(frozen=True)
class Vote:
    """One answer to one pair of pictures of the same prompt and seed."""

    time: str  # ISO 8601, UTC
    model: str
    offset: str
    blocks: str
    a: float  # strength of one picture; 0 is the untouched model
    b: float
    prompt: str
    seed: int
    side: Side  # where the picture of strength a stood
    answer: Answer

    def as_line(self) -> str:
        """The vote as it stands in a file, without the end of the line."""
        return json.dumps(asdict(self), ensure_ascii=False)


_KINDS = {name: (float if name in "ab" else int if name == "seed" else str) for name in (each.name for each in fields(Vote))}
_CHOICES: dict[str, tuple[str, ...]] = {"side": SIDES, "answer": ANSWERS}


@dataclass(frozen=True)
class Ballots:
    """All votes of a folder in the order of their time, and a sentence for each line or file that could not be read."""

    votes: tuple[Vote, ...]
    problems: tuple[str, ...] = ()

    def of(self, model: str, offset: str, blocks: str) -> tuple[Vote, ...]:
        """Those on one offset in one model."""
        return tuple(vote for vote in self.votes if (vote.model, vote.offset, vote.blocks) == (model, offset, blocks))


def now() -> str:
    """The time of a vote that is given now: UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def file_for(folder: Path, model: str, offset: str) -> Path:
    """Where votes on one offset in one model go: one file for all sessions."""
    return folder / f"{_plain(model)} - {_plain(offset)}{SUFFIX}"


def add(path: Path, vote: Vote) -> None:
    """Add one line to a file, on the disk when this returns; the file and its folder are made where they are missing.

    What a killed process left of a last line stays as it is: the new line begins below it.

    Raises:
        OutputError: it cannot be written. Then the vote does not count, and can be given again.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise OutputError(f"{path.parent}: is a file, expected the folder of votes; move it elsewhere")
    with _appending, explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            whole = True
            if size:
                file.seek(size - 1)
                whole = file.read(1) == b"\n"
            line = (b"" if whole else b"\n") + vote.as_line().encode("utf-8") + b"\n"
            if file.write(line) != len(line):
                raise OSError(f"only a part of {len(line)} bytes")
            os.fsync(file.fileno())


def read(*places: Path) -> Ballots:
    """The votes of files, and of all files of folders.

    A bad line is named and passed over; the rest counts. A line that is there twice is a copy, and counts once: files of
    several sessions and machines can be put together.
    """
    votes: dict[Vote, None] = {}
    problems: list[str] = []
    for path in _files(places):
        try:
            content = path.read_bytes()
        except OSError as error:
            problems.append(f"{path.name}: cannot be read ({error.strerror}); its votes are not counted")
            continue
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                votes[parse(line)] = None
            except BadFileError as error:
                problems.append(f"{path.name}, line {number}: {error}; passed over")
    return Ballots(tuple(sorted(votes, key=lambda vote: vote.time)), tuple(problems))


@lru_cache(maxsize=_LINES_KEPT)
def parse(line: bytes) -> Vote:
    """One line; remembered, since all lines are read again after each vote. Fields that are unknown are left out.

    Raises:
        BadFileError: what is wrong with it, in words.
    """
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFileError("is no whole line of JSON") from error
    if not isinstance(found, dict):
        raise BadFileError("is no vote, expected an object in braces")
    return Vote(**{name: _value(found, name, kind) for name, kind in _KINDS.items()})


def _value(found: dict[str, Any], name: str, kind: type) -> Any:
    if name not in found:
        raise BadFileError(f"is no vote, {name} is missing")
    value = found[name]
    if kind is str:
        if not isinstance(value, str) or value not in _CHOICES.get(name, (value,)):
            raise BadFileError(f"{name} is {_cut(value)}, expected {' or '.join(_CHOICES.get(name, ('a text',)))}")
        return value
    if not is_finite(value) or (kind is int and value != int(value)):
        raise BadFileError(f"{name} is {_cut(value)}, expected {'a whole number' if kind is int else 'a number'}")
    if kind is float and abs(value) > LARGEST_STRENGTH:
        raise BadFileError(f"{name} is {value:g}, expected a strength from {-LARGEST_STRENGTH:g} to {LARGEST_STRENGTH:g}")
    return kind(value)


def _cut(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _files(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(file for file in place.glob(f"*{SUFFIX}") if not file.name.startswith("."))
        elif place.exists():
            yield place


def _plain(name: str) -> str:
    """A name as every file system takes it."""
    kept = "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in name)[:_LONGEST_NAME]
    return kept.strip(".") or "unnamed"
