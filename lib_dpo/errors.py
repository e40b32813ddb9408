"""What can go wrong, as a tree, and what may have been meant.

Every message names the file or key, what was found, what was expected, what to do.

DpoError
├── BadFileError            a file that cannot be read as what it claims to be
│   └── BadTensorError      one tensor in it: wrong shape, NaN or Inf, an unexpected dtype
├── UnsafeFileError         a pickle that would run code, or that this torch cannot read safely
├── MismatchError           files that do not belong together: architectures, shapes, missing UNet tensors
├── NothingToDoError        base and tuned are the same
├── SettingError            a rank, strength, block name or other setting that makes no sense
├── OutputError             the output exists, cannot be written, or the disk is full
├── MissingExtraError       an optional library is not installed
├── NotAllowedError         a download that nobody agreed to
├── NotFoundError           a name that is in no list
├── NoModelError            the WebUI has no checkpoint loaded yet
├── BusyError               the same work is running or waiting already
├── NoMemoryError           the machine or its GPU has no memory left for it
├── HostError               something that this WebUI cannot do, or a model that others changed meanwhile
└── Cancelled               stopped by the user; nothing was left behind
"""

from __future__ import annotations

import sys
from collections.abc import Iterable


def printable(text: str) -> str:
    """Text from a file as a terminal may be given it: without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that somebody may have meant, the same but for its case before a similar one; None if none is near."""
    import difflib  # what refuses a word needs it, a start does not

    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(name.casefold(), name)
    near = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.7)
    return folded[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a word: the known one that was probably meant, or nothing."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""


class DpoError(Exception):
    """Base of all errors that are shown to people in one line, without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())  # the names that it repeats are from files


class BadFileError(DpoError):
    """A file that cannot be read as what it claims to be."""


class BadTensorError(BadFileError):
    """One tensor of a file is unusable; the message names its key."""


class UnsafeFileError(DpoError):
    """A pickle that would run code, or that this torch cannot read safely."""


class MismatchError(DpoError):
    """Files that do not belong together."""


class NothingToDoError(DpoError):
    """Base and tuned are the same: there is no offset."""


class SettingError(DpoError):
    """A setting that makes no sense."""


class OutputError(DpoError):
    """The output exists already, cannot be written, or the disk is full."""


class MissingExtraError(DpoError):
    """An optional library is not installed; the message names it."""


def missing_extra(purpose: str, *libraries: str, instead: str = "") -> MissingExtraError:
    """The error for libraries that are not there, with the command that installs them for the Python that runs.

    Args:
        purpose: what needs them, such as "the app needs".
        instead: what else can be done.
    """
    *others, last = libraries
    names = f"{', '.join(others)} and {last}" if others else last
    how = f"install with: {this_python()} -m pip install {' '.join(libraries)}"
    return MissingExtraError(f"{purpose} {names}, which this Python lacks; {how}" + (f", or {instead}" if instead else ""))


def this_python() -> str:
    """The Python that runs, as it can be typed."""
    return f'"{sys.executable}"' if " " in sys.executable else sys.executable


class NotAllowedError(DpoError):
    """Something that needs the user's consent and did not get it."""


class NotFoundError(DpoError):
    """A name that is in none of the lists it may be taken from."""


class NoModelError(DpoError):
    """The WebUI has no checkpoint loaded yet."""


class BusyError(DpoError):
    """The same work is running or waiting already."""


class HostError(DpoError):
    """Something that this WebUI cannot do, or a model that somebody else changed meanwhile."""


class NoMemoryError(DpoError):
    """The machine or its GPU has no memory left for it."""


class Cancelled(DpoError):  # noqa: N818  a decision of the user, not a fault
    """Stopped by the user; nothing was left behind."""
