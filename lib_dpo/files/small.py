"""Files beside a model that are text of a few kB: settings, configurations, lists of parts."""

from __future__ import annotations

from pathlib import Path

from lib_dpo.errors import BadFileError

MOST = 8_000_000  # bytes; the largest real one, the list of the parts of a large model, has 0.3 MB


def read_small(path: Path) -> bytes:
    """All of a file.

    Raises:
        BadFileError: it has more than MOST bytes; no more than these are read, whatever it is.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise BadFileError(
            f"{path.name}: has more than {MOST / 1e6:g} MB, expected a few kB of text; get it again, or move it away"
        )
    return content
