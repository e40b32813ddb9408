"""Progress in one shape for every front end: a callback that may cancel by raising."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # done, total (parameters), key; may raise Cancelled


class Steps:
    """Counts finished parameters and tells the callback."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self._total, self._done, self._tell = total, 0, on_progress

    def advance(self, numel: int, key: str) -> None:
        """Count `numel` more as done."""
        self._done += numel
        if self._tell:
            self._tell(self._done, self._total, key)


def duration(seconds: float) -> str:
    """A time for people: 40 s, 5 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
