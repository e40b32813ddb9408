"""The figures of pairs that were analysed: the last ones in memory, others in the host's cache folder, by the files' hashes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_dpo.files.checkpoint import open_checkpoint, sha256_in_background
from lib_dpo.files.hashes import remembered_sha256
from lib_dpo.offsets.offset import Pair
from lib_dpo.progress import Progress

if TYPE_CHECKING:  # the maths is imported when it is needed: a WebUI starts without it
    from lib_dpo.operations.outlook.figures import Figures
    from lib_dpo.operations.outlook.sizes import Sizes

Key = tuple[str, str]  # SHA-256 of the base and of the reference

_FIGURES_KEPT, _SIZES_KEPT = 2, 6  # 4 MB each for SDXL; profiles and precisions of these


class KnownFigures:
    """What was measured on pairs, and what files would come of it. May be used from several threads."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._figures: OrderedDict[Key, Figures] = OrderedDict()
        self._sizes: OrderedDict[tuple[Key, str, str], Sizes] = OrderedDict()

    def look(self, key: Key) -> Figures | None:
        """The figures of a pair, where they are known."""
        from lib_dpo.operations.outlook.store import FigureStore

        with self._lock:
            found = self._figures.get(key)
        found = found or FigureStore(self._folder()).load(*key)
        if found:
            self._remember(self._figures, key, found, _FIGURES_KEPT)
        return found

    def measure(self, pair: Pair, on_progress: Progress) -> tuple[Key, Figures, str]:
        """The figures of a pair with its spectra, measured where they are not known.

        Returns:
            The key, the figures, and why they could not be kept for the next time; empty where they are.
        """
        from lib_dpo.operations.outlook.figures import measure_figures
        from lib_dpo.operations.outlook.store import FigureStore

        base, tuned = (sha256_in_background(model.checkpoint) for model in (pair.base, pair.tuned))
        key = (base(lambda: on_progress(0, 1, "")), tuned(lambda: on_progress(0, 1, "")))
        found, not_kept = self.look(key), ""
        if not found:
            found = measure_figures(pair, on_progress=on_progress)
            not_kept = FigureStore(self._folder()).save(*key, found)
            self._remember(self._figures, key, found, _FIGURES_KEPT)
        return key, found, not_kept

    def sizes(self, key: Key, profile: str, precision: str) -> Sizes | None:
        """Every file that can come of a pair, where its figures are known."""
        from lib_dpo.operations.outlook.sizes import Sizes

        place = (key, profile, precision)
        with self._lock:
            found = self._sizes.get(place)
        if not found and (figures := self.look(key)):
            found = Sizes(figures, profile=profile, precision=precision)
        if found:
            self._remember(self._sizes, place, found, _SIZES_KEPT)
        return found

    def _remember(self, kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
        with self._lock:
            kept[key] = value
            kept.move_to_end(key)
            while len(kept) > most:
                kept.popitem(last=False)


def known_key(base: Path, tuned: Path) -> Key | None:
    """The key of a pair of files or folders, where it can be told without reading the files. Raises BadFileError."""
    first, second = _known_hash(base), _known_hash(tuned)
    return (first, second) if first and second else None


def _known_hash(path: Path) -> str | None:
    if path.is_file():
        return remembered_sha256(path)
    with open_checkpoint(path) as checkpoint:
        return checkpoint.sha256() if all(map(remembered_sha256, checkpoint.files)) else None
