"""The checkpoint that AUTOMATIC1111, reForge and Forge Classic draw the next picture with, where another one is live.

A refiner, a hires checkpoint and a request that overrides the checkpoint leave theirs in memory, and the setting as it was;
each picture begins with what the setting names (processing.py:830 of AUTOMATIC1111 1.10.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any


def chosen_in_settings(model: Any | None) -> Path | None:
    """The checkpoint that the settings name; None where it is the live one, nothing is loaded yet, or it is in no list."""
    if model is None:
        return None
    aliases = import_module("modules.sd_models").checkpoint_aliases
    chosen = aliases.get(import_module("modules.shared").opts.sd_model_checkpoint)  # select_checkpoint there would print
    return None if chosen is None or chosen.filename == model.sd_checkpoint_info.filename else Path(chosen.filename)


def kept_model(models: Iterable[Any], file: Path) -> Any | None:
    """The model of a checkpoint among those that the host keeps in memory: it is taken up again without being read."""
    return next((model for model in models if Path(model.sd_checkpoint_info.filename) == file), None)
