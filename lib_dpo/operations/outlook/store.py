"""Figures of pairs kept between runs, a file each by the hashes of both files: read again in milliseconds.

A file is a .safetensors: the numbers as two tensors, everything else as JSON in its metadata, under one SHA-256. What cannot be
read, or is not what was written, counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lib_dpo.errors import DpoError
from lib_dpo.families.keymap import LoraModule
from lib_dpo.files.atomic import write_bytes_atomic
from lib_dpo.offsets.layers import Layer
from lib_dpo.operations.measure import Row
from lib_dpo.operations.outlook.figures import PLANS, Figures, Spectra

logger = logging.getLogger(__name__)

FORMAT = 1  # goes up when figures of the same two files come out differently, or are written differently
_MOST_FILES, _MOST_BYTES = 24, 200_000_000  # one takes 1 MB for SD 1.5, 4 MB for SDXL


class FigureStore:
    """A folder of figures, the least used of which go when there are too many."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, base: str, tuned: str) -> Figures | None:
        """The figures of a pair by the SHA-256 of its files; None where there are none that can be used."""
        path = self._path(base, tuned)
        try:
            figures = _read(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:  # anything can be in it
            logger.info("%s is not used: %s", path, error)
            return None
        return figures

    def save(self, base: str, tuned: str, figures: Figures) -> str:
        """Keep figures with spectra. Returns why they could not be kept, for people; nothing where they are."""
        try:
            write_bytes_atomic(self._path(base, tuned), _written(figures))
            self._tidy()
        except (OSError, DpoError) as error:
            logger.warning("the figures of a pair are not kept: %s", error)
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else "it is full, or closed to writing"
            return f"nothing could be written to the folder {self._folder.name} for them ({reason})"
        return ""

    def _path(self, base: str, tuned: str) -> Path:
        key = hashlib.sha256(f"{FORMAT} {base} {tuned}".encode()).hexdigest()
        return self._folder / f"pair-{key[:32]}.safetensors"

    def _tidy(self) -> None:
        files = sorted(self._folder.glob("pair-*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for number, path in enumerate(files):
            total += path.stat().st_size
            if number and (number >= _MOST_FILES or total > _MOST_BYTES):
                path.unlink(missing_ok=True)


def _written(figures: Figures) -> bytes:
    spectra = figures.spectra
    assert spectra, "figures without spectra are made anew in seconds"
    rows = torch.tensor([astuple(row) for row in figures.rows.values()], dtype=torch.float64)
    energies = torch.from_numpy(np.concatenate(list(spectra.energies.values())))
    rest = json.dumps({
        "keys": list(figures.rows),
        "vae": figures.vae,
        "modules": [(name, len(values), spectra.changes[name]) for name, values in spectra.energies.items()],
        "plans": {name: [asdict(layer) for layer in layers] for name, layers in spectra.plans.items()},
        "components": spectra.components,
        "total": spectra.total,
    })  # fmt: skip
    return save({"rows": rows, "energies": energies}, {"figures": rest, "sha256": _digest(rest, rows, energies)})


def _read(path: Path) -> Figures:
    with path.open("rb"):  # the library's own words for a file that is not there differ by version
        pass
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        rows, energies = (file.get_tensor(name).clone() for name in ("rows", "energies"))
    if metadata["sha256"] != _digest(metadata["figures"], rows, energies):
        raise ValueError("it is damaged")
    rest = json.loads(metadata["figures"])
    modules = rest["modules"]
    parts = np.split(energies.numpy(), np.cumsum([count for _, count, _ in modules])[:-1])
    spectra = Spectra(
        energies={name: part for (name, _, _), part in zip(modules, parts, strict=True)},
        changes={name: change for name, _, change in modules},
        plans={name: tuple(_layer(row) for row in rest["plans"][name]) for name in PLANS},
        components=tuple(rest["components"]),
        total=rest["total"],
    )
    names = [field.name for field in fields(Row)]
    found = {}
    for key, row in zip(rest["keys"], rows.tolist(), strict=True):
        figures = dict(zip(names, row, strict=True))
        found[key] = Row(numel=int(figures.pop("numel")), **figures)
    return Figures(found, rest["vae"], spectra)


def _layer(row: Mapping[str, Any]) -> Layer:
    return Layer(LoraModule(**row["module"]), tuple(row["shape"]), row["kind"], row["required"])


def _digest(rest: str, *tensors: torch.Tensor) -> str:
    digest = hashlib.sha256(rest.encode())
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
