"""Regular expressions of PEFT's settings: which of them names a module, as `get_pattern_key` in peft/utils/other.py has it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

_PLAIN = re.compile(r"[\w.-]*")
_REPEATED_GROUP, _REPEATS = re.compile(r"\)[*+{]"), re.compile(r"[*+{]")
_MOST_REPEATS, _MOST_OPTIONAL, _MOST_GROUPS, _MOST_CHOICES, _LONGEST = 3, 8, 4, 64, 2000


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern, in the order of the settings, that matches a module's name or its last parts.

    Raises:
        ValueError: with the first pattern that is none, or is not tried, and why.
    """
    for pattern in patterns:
        end, compiled = _compiled(pattern)
        if module.endswith(end) and compiled.match(module):
            return pattern
    return None


@lru_cache(maxsize=16384)  # some files have one for each layer, and `re` itself remembers 512
def _compiled(pattern: str) -> tuple[str, re.Pattern[str]]:
    """With what every module that it matches ends; most patterns are the names of modules, and this is much faster."""
    plain = _PLAIN.fullmatch(pattern)
    if len(pattern) > _LONGEST or not (plain or _is_quick(pattern)):
        raise ValueError(f"{pattern[:80]!r}, which could be matched for hours")
    try:
        found = re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise ValueError(f"{pattern!r}, which is no regular expression ({error})") from error
    return pattern.rpartition(".")[2] if plain else "", found


def _is_quick(pattern: str) -> bool:
    """Whether no name takes exponentially long: Python tries every way to divide it among repeats, groups and choices."""
    return (
        not _REPEATED_GROUP.search(pattern)
        and len(_REPEATS.findall(pattern)) <= _MOST_REPEATS
        and pattern.replace("(?", "").count("?") <= _MOST_OPTIONAL
        and pattern.count("(") <= _MOST_GROUPS
        and pattern.count("|") <= _MOST_CHOICES
    )
