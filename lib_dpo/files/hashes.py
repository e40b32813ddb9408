"""SHA-256 of files, remembered between runs: hashing SDXL's two files takes 14 s."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib_dpo.files.header import unreadable

logger = logging.getLogger(__name__)

_REMEMBERED_FILES = 1000
_cache_lock = threading.Lock()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, taken from memory where the file has the size and modification time that it had then."""
    path = Path(path)
    try:
        place, before = str(path.resolve()), _size_and_time(path)
        known = _load().get(place)
        if known and known[:2] == before:
            return str(known[2])
        digest = _hash(path)
        settled = time.time() - path.stat().st_mtime > 2  # FAT counts in 2 s: a later change could go unseen
        unchanged = _size_and_time(path) == before
    except OSError as error:
        raise unreadable(path, error) from error
    if settled and unchanged:
        _remember(place, [*before, digest])
    return digest


def remembered_sha256(path: str | Path) -> str | None:
    """The SHA-256 of a file where it is known without reading the file; else None."""
    path = Path(path)
    try:
        known = _load().get(str(path.resolve()))
        return str(known[2]) if known and known[:2] == _size_and_time(path) else None
    except OSError:
        return None


def in_background(work: Callable[[], str]) -> Callable[..., str]:
    """Start work in a thread, beside everything else; call what comes back to wait for the result, or its error.

    `meanwhile`, if it is given then, is called every half second, and may raise to stop waiting. Hashing lets other Python code
    run meanwhile. The thread does not keep the process alive.
    """
    outcome: concurrent.futures.Future[str] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001  goes to whoever waits
            outcome.set_exception(error)

    def wait(meanwhile: Callable[[], None] | None = None) -> str:
        while not outcome.done():  # by half seconds: on Windows an endless wait cannot be interrupted
            concurrent.futures.wait([outcome], timeout=0.5)
            if meanwhile:
                meanwhile()
        return outcome.result()

    threading.Thread(target=run, name="sha256", daemon=True).start()
    return wait


def user_cache(name: str) -> Path:
    """Where a file lies that is kept between runs and may be lost. Raises RuntimeError for a user without a home."""
    if sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "sd-webui-dpo" / name


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _size_and_time(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _load() -> dict[str, list[Any]]:
    """Resolved path -> [size, mtime_ns, sha256]; empty where there is no cache or it makes no sense."""
    try:
        rows = json.loads(user_cache("hashes.json").read_bytes())
        return {place: row for place, row in rows.items() if len(row) == 3 and re.fullmatch(r"[0-9a-f]{64}", row[2])}
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:  # anything can be in it
        logger.info("the hash cache is not used: %s", error)
        return {}


def _remember(place: str, row: list[Any]) -> None:
    try:
        with _cache_lock:
            rows = _load()
            rows.pop(place, None)
            kept = dict([*rows.items(), (place, row)][-_REMEMBERED_FILES:])
            path = user_cache("hashes.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
            try:
                part.write_text(json.dumps(kept, indent=0), encoding="utf-8")
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: this user has no home folder
        logger.info("a hash is not remembered: %s", error)
