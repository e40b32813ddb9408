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
