"""Answers that stand as long as what they are about: the loaded checkpoint, what is baked into it, files as they were.

Another browser tab, the API, the checkpoint list of the WebUI or a file manager can make an answer untrue. The page asks for
the state of the model every few seconds; what an answer is about is looked at then too, and no file is opened for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_dpo.errors import DpoError
from lib_dpo.hosts.base import Baked
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup

_Stamp = tuple[int, int] | None  # time of the last change in nanoseconds and bytes; None where there is no file


@dataclass(frozen=True)
class _Model:
    """The loaded checkpoint, and another one that is chosen for the next picture."""

    path: Path | None
    stamp: _Stamp
    chosen: Path | None

    def since(self, before: _Model) -> str:
        """What is other than before, or nothing."""
        if self.path != before.path:
            return f"{self.path.stem} is loaded now" if self.path else "no checkpoint is loaded now"
        if self.chosen != before.chosen:
            return f"{self.chosen.stem} is loaded for the next picture" if self.chosen else "no other checkpoint is chosen now"
        return f"{self.path.name} has changed" if self.path and self.stamp != before.stamp else ""


@dataclass(frozen=True)
class About:
    """What an answer is true of, as it was when the answer was given."""

    model: _Model | None = None  # the loaded checkpoint; None where it does not matter
    baked: tuple[Baked | None] | None = None  # what was in it; None where that does not matter
    files: tuple[tuple[Path, _Stamp], ...] = ()

    def changed(self, session: Session) -> str:
        """Why it is not so any more, after "because"; empty where it is. Opens no file."""
        now = about(session, model=self.model is not None, baked=self.baked is not None)
        if self.model and now.model and (why := now.model.since(self.model)):
            return why
        if self.baked != now.baked:
            assert now.baked
            return f"{now.baked[0].offset} is baked in now" if now.baked[0] else "nothing is baked in now"
        for path, stamp in self.files:
            if _stamp(path) != stamp:
                return f"{path.name} is gone" if _stamp(path) is None else f"{path.name} has changed"
        return ""


@dataclass(frozen=True)
class Given:
    """An answer that was given, and what it is about."""

    html: str
    about: About
    why: str = ""  # what the page shows in its place: the reason why it does not hold
    key: Any = None  # what it was drawn from, where the page draws it anew
    asked: tuple[Any, ...] | None = None  # what the page asked it with, where it is asked anew when that is other


@dataclass(frozen=True)
class Place:
    """Where a page shows answers, and what was given there: a gradio State of `Given`.

    `again` makes the answer anew from the values of `inputs`; without it an answer that does not hold goes, and comes back
    when it holds again. `keep`: it stays to be seen, below what has changed.
    """

    component: Any
    given: Any
    keep: bool = False
    again: Callable[..., list[Any]] | None = None
    inputs: Sequence[Any] = ()
    alert: Any = None  # where errors are shown, above the answer that stands


def about(session: Session, *names: str | Path, model: bool = False, baked: bool = False) -> About:
    """What an answer is about that was given now.

    Args:
        names: files: a name of the session's lists, or a path. Raises DpoError for a name that is in no list.
        model: whether it is about the loaded checkpoint. baked: whether it is about what was baked into that.
    """
    loaded = session.host.live.loaded() if model else None
    path = loaded.path if loaded else None
    paths = [name if isinstance(name, Path) else session.library.any(name) for name in names if name]
    return About(
        _Model(path, _stamp(path) if path else None, session.host.live.chosen()) if model else None,
        (session.host.live.baked(),) if baked else None,
        tuple((each, _stamp(each)) for each in paths),
    )


def given(html: str, of: Callable[[], About], key: Any = None, asked: tuple[Any, ...] | None = None) -> Given | None:
    """An answer with what it is about; None where that cannot be said, because a file is gone already."""
    try:
        return Given(html, of(), key=key, asked=asked)
    except (DpoError, OSError):
        return None


def looked_at(session: Session, place: Place, answer: Given | None, *values: Any) -> list[Any]:
    """What the page shows at a place now, and what is kept of it: no changes where the answer holds as before."""
    import gradio as gr

    if answer is None or session.jobs.busy:  # a job may take a bake out for its own pictures, and puts it back
        return [gr.update(), gr.update()]
    why = answer.about.changed(session)
    moved = answer.asked is not None and answer.asked != values
    if why == answer.why and not moved:
        return [gr.update(), gr.update()]
    if place.again:
        return place.again(*values)
    shown = answer.html
    if why and place.keep:
        shown = markup.note(f"Made before: {why}.") + answer.html
    elif why:
        shown = markup.note(f"The answer that stood here does not hold any more, because {why}. Ask again.")
    return [shown, Given(answer.html, answer.about, why)]


def _stamp(path: Path) -> _Stamp:
    """Of a folder: that of all the files in it."""
    try:
        files = [path] if not path.is_dir() else [file for file in path.rglob("*") if file.is_file()]
        found = [file.stat() for file in files]
    except OSError:
        return None
    return max((each.st_mtime_ns for each in found), default=0), sum(each.st_size for each in found)
