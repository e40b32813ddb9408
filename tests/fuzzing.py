"""How much is tried: a little and always the same in `make test`, DPO_FUZZ times as much and always new in `make fuzz`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, settings

from lib_dpo.errors import DpoError

Result = TypeVar("Result")

FUZZ = int(os.environ.get("DPO_FUZZ", "1"))


def inputs(count: int) -> settings:
    """Settings for so many inputs, times DPO_FUZZ."""
    return settings(
        max_examples=count * FUZZ, derandomize=FUZZ == 1, database=None, deadline=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def tried(work: Callable[..., Result], *arguments: object) -> tuple[Result | None, str]:
    """What came of it, or the sentence that refuses it; what is no DpoError makes the test fail."""
    try:
        return work(*arguments), ""
    except DpoError as error:
        return None, str(error)
