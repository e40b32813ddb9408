"""What commands tell beside their output: a bar while they work, the figures as JSON, the diagram of `diff`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib_dpo.errors import OutputError, SettingError, missing_extra


@contextmanager
def progress_bar(title: str, *, shown: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with ETA on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    hidden = None if shown else True  # None: tqdm's own choice
    with tqdm(total=1, desc=title, unit="", disable=hidden, leave=False, bar_format=_BAR, file=sys.stderr) as bar:

        def tell(done: int, total: int, key: str) -> None:
            if done == 0:  # counting begins here: what came before says nothing of the time that is left
                bar.reset(total)
            bar.total = total
            bar.update(done - bar.n)

        yield tell


_BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"


def check_reports(args: argparse.Namespace) -> None:
    """Refuse early the names of a report or picture: they are written last. What an earlier run wrote may be replaced."""
    plot = getattr(args, "plot", None)
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("--plot needs", "matplotlib", instead="leave --plot out")
    if plot and args.json and plot.absolute() == args.json.absolute():
        raise OutputError(f"{plot}: is to be both the report and the picture; choose another name for one")
    if getattr(args, "dark", False) and not plot:
        raise SettingError("--dark is about the picture of --plot; give a file with --plot, or leave --dark out")
    for path in filter(None, (args.json, plot)):
        from lib_dpo.files.atomic import check_output

        if path.suffix.lower() in _NOT_REPORTS:
            raise OutputError(f"{path}: is the name of a checkpoint or its config; choose a name with .json or .png")
        if not path.exists() or path.is_file() or path.is_dir():  # a device such as /dev/stdout is written to as it is
            check_output(path, overwrite=args.overwrite or _is_ours(path))


_NOT_REPORTS = (".safetensors", ".ckpt", ".pt", ".pth", ".yaml", ".yml")


def _is_ours(path: Path) -> bool:
    """Whether a file is empty, or a report or picture of this command line."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return not head or head.startswith(b'{\n  "command": ') or (head.startswith(b"\x89PNG") and b"sd-webui-dpo" in head)


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures of a command, all or nothing; a device gets them as they are."""
    from lib_dpo.files.atomic import write_text_atomic

    text = json.dumps(_finite(figures), indent=2, allow_nan=False) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_text_atomic(path, text)


def _finite(content: Any) -> Any:
    """JSON has no NaN and no Infinity: null in their place."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
