"""Regular expressions of PEFT's settings: which of them names a module, as `get_pattern_key` in peft/utils/other.py has it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache

_PLAIN = re.compile(r"[\w.-]*")
_REPEATED_GROUP, _INNER_GROUP = re.compile(r"\)[*+{]"), re.compile(r"\(([^()]*)\)")
_NUMBER, _REPEAT, _OPTION = re.compile(r"\\d[*+]"), re.compile(r"[*+{]"), re.compile(r"(?<!\()\?")
_DIGITS, _LETTERS = 3, 60  # that a repeat may take of a module's name
_MOST_WAYS, _LONGEST = 1_000_000, 2000


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern, in the order of the settings, that matches a module's name or its last parts.

    Raises:
        ValueError: with the first pattern that is none, or is not tried, why, and what to do.
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
    if len(pattern) > _LONGEST or not (plain or _ways(pattern) <= _MOST_WAYS):
        raise ValueError(f"{pattern[:80]!r}, which could take hours to match; name the modules, or repeat less")
    try:
        found = re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError) as error:
        raise ValueError(f"{pattern!r}, which is no regular expression ({error}); get the file again") from error
    return pattern.rpartition(".")[2] if plain else "", found


def _ways(pattern: str) -> int:
    """About how many ways there are to divide a name among a pattern's repeats, options and choices: `re` tries all of them."""
    if _REPEATED_GROUP.search(pattern):
        return _MOST_WAYS + 1  # more than can be said
    choices = math.prod(group.count("|") + 1 for group in _INNER_GROUP.findall(pattern))
    choices *= _INNER_GROUP.sub("", pattern).count("|") + 1
    rest = _NUMBER.sub("", pattern)
    numbers, options, repeats = (len(each.findall(of)) for each, of in ((_NUMBER, pattern), (_OPTION, rest), (_REPEAT, rest)))
    return int(choices * 2**options * _DIGITS**numbers * _LETTERS**repeats)
