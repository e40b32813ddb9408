"""The card of a LoRA in a WebUI's list: NAME.json and NAME.preview.png beside it, as A1111 and Forge read them.

Keys of the JSON (extra networks' user metadata): description, `sd version`, `activation text`, `preferred weight`, notes. A
preview may have several endings, with and without `.preview`. What a person made or changed is never touched, but for the
preferred weight where they ask for it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lib_dpo.errors import DpoError, OutputError, SettingError
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.files.atomic import write_bytes_atomic
from lib_dpo.files.header import read_header
from lib_dpo.files.ours import is_our_json, is_our_png, json_object, signed_json, signed_png

logger = logging.getLogger(__name__)

CardFate = Literal["written", "replaced", "kept", "failed", "none"]
_SAID: Mapping[CardFate, str] = {
    "kept": "{} was kept as it is: this tool did not write it, or someone changed it since",
    "failed": "{} could not be written, so the LoRA has no card with its description",
}
WEIGHT = "preferred weight"
_OF_A_PERSON = ("activation text", "negative text", WEIGHT, "sd version")  # true of a smaller LoRA as well
_VERSIONS = {"stable-diffusion-v1": "SD1", "stable-diffusion-v2": "SD2", "stable-diffusion-xl": "SDXL"}  # WebUIs' words
_PREVIEWS = ("png", "jpg", "jpeg", "webp", "gif", "avif", "jxl", "bmp")  # what WebUIs look for, and may be set to write


@dataclass(frozen=True)
class Card:
    """What lies beside a LoRA for the lists of WebUIs."""

    file: Path | None  # NAME.json
    ours: bool  # this tool wrote it, and nobody changed it since
    weight: float | None
    preview: Path | None
    preview_ours: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.file and self.file.name,
            "ours": self.ours,
            "preferred_weight": self.weight,
            "preview": self.preview and self.preview.name,
            "preview_ours": self.preview_ours,
        }

    @property
    def text(self) -> str:
        """In a line; empty where nothing lies there."""
        whose = {True: "written by this tool", False: "made or changed by someone"}
        found = []
        if self.file:
            weight = f", preferred weight {self.weight:g}" if self.weight else ""
            found.append(f"{self.file.name} ({whose[self.ours]}{weight})")
        if self.preview:
            found.append(f"{self.preview.name} ({whose[self.preview_ours]})")
        return ", ".join(found)


def card_file(lora: Path) -> Path:
    """Where the card of a LoRA is."""
    return lora.with_suffix(".json")


def preview_file(lora: Path) -> Path:
    """Where the preview that we write is."""
    return lora.with_suffix(".preview.png")


def read_card(lora: Path) -> Card:
    """What lies beside a LoRA."""
    file, content = card_file(lora), _bytes(card_file(lora))
    found = {} if content is None else json_object(content) or {}
    preview = next((path for path in _previews(lora) if path.is_file()), None)
    return Card(
        file=None if content is None else file,
        ours=content is not None and is_our_json(content),
        weight=_number(found.get(WEIGHT)),
        preview=preview,
        preview_ours=preview is not None and _is_our_preview(preview),
    )


def write_card(lora: Path, *, source: Path | None = None) -> CardFate:
    """Write the card of a LoRA that has just been written, from its metadata; our own earlier card and preview go.

    A card that cannot be written is logged: the LoRA stands without it.

    Args:
        source: the LoRA that it was made from, whose words in prompts and preferred weight hold for it too.
    """
    try:
        preview = preview_file(lora)
        if preview.is_file() and _is_our_preview(preview):  # of the file that was replaced
            preview.unlink()
        before = _bytes(card_file(lora))
        if before is not None and not is_our_json(before):
            return "kept"
        content = _content(read_header(lora).metadata)
        known = (json_object(_bytes(card_file(source)) or b"") or {}) if source else {}
        content |= {key: known[key] for key in _OF_A_PERSON if known.get(key)}
        write_bytes_atomic(card_file(lora), signed_json(content))
    except (DpoError, OSError):
        logger.exception("the card of %s could not be written", lora)
        return "failed"
    return "written" if before is None else "replaced"


def fate_text(fate: CardFate, lora: Path) -> str:
    """What became of a LoRA's card, for people, where it is not what they expect; else nothing."""
    return _SAID[fate].format(card_file(lora).name) if fate in _SAID else ""


def keep_weight(lora: Path, weight: float) -> str:
    """Make a strength the LoRA's preferred weight, and say so. Of a person's card every other character stays as it is.

    Raises:
        SettingError: no finite number other than 0. OutputError: the card is no JSON object, or cannot be written.
    """
    if not math.isfinite(weight) or not weight:
        raise SettingError(f"preferred weight {weight}: expected a finite number other than 0, which WebUIs take for none")
    file = card_file(lora)
    before = _bytes(file)
    if before is None or is_our_json(before):
        content = _content(read_header(lora).metadata) if before is None else json_object(before) or {}
        write_bytes_atomic(file, signed_json({**content, WEIGHT: weight}))
        return f"{weight:g} is the preferred weight of {lora.stem} now, in {file.name}"
    found = json_object(before)
    if found is None:
        raise OutputError(f"{file.name} is no JSON object, so no preferred weight can be put into it; mend it, or move it away")
    write_bytes_atomic(file, _with_weight(before.decode("utf-8"), weight).encode("utf-8"))
    was = _number(found.get(WEIGHT))
    return (
        f"{weight:g} is the preferred weight of {lora.stem} now"
        + (f" instead of {was:g}" if was else "")
        + f". {file.name} is "
        "not this tool's: all else in it stays as it was"
    )


def write_preview(lora: Path, png: bytes) -> Path | None:
    """Give a LoRA that this tool wrote its preview; None where it is another's, or has a preview of a person's.

    Raises:
        OutputError: it cannot be written.
    """
    metadata = read_header(lora).metadata
    ours = metadata.get("dpo.kind") == "lora" or "dpo.resized" in metadata
    if not ours or any(path.is_file() and not _is_our_preview(path) for path in _previews(lora)):
        return None
    write_bytes_atomic(preview_file(lora), signed_png(png))
    return preview_file(lora)


def _content(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The card of a LoRA by what its metadata says; of a file without ours hardly anything."""
    arch = ARCHITECTURES.get(metadata.get("dpo.architecture", ""))
    kept = _number(metadata.get("dpo.energy_kept"))
    base, tuned = metadata.get("dpo.base", ""), metadata.get("dpo.tuned", "")
    share = f"{100 * kept:.1f} %" if kept is not None else ""
    description = ""
    if base and tuned:
        what = f"{share} of what" if share else "What"
        description = f"{what} turned {base} into {tuned}, as a LoRA{f' for {arch.title}' if arch else ''}."
    elif "dpo.resized" in metadata:
        description = "A LoRA at lower ranks."
    notes = [
        ("Energy kept", share and f"{share} of the change"),
        ("Base", base),
        ("Reference", tuned),
        ("Resized", metadata.get("dpo.resized", "")),
        ("Licence", metadata.get("dpo.licence") or metadata.get("modelspec.license", "")),
    ]
    content: dict[str, Any] = {"description": description} if description else {}
    if arch and (version := next((word for start, word in _VERSIONS.items() if arch.modelspec.startswith(start)), "")):
        content["sd version"] = version
    content["activation text"] = ""
    if lines := [f"{title}: {text}" for title, text in notes if text]:
        content["notes"] = "\n".join(lines)
    return content


def _with_weight(text: str, weight: float) -> str:
    """The text of a JSON object with this one value changed or, as its first, added."""
    decoder, value = json.JSONDecoder(), json.dumps(weight)
    first = place = _after_space(text, text.index("{") + 1)
    while text[place] != "}":
        key, end = decoder.raw_decode(text, place)
        start = _after_space(text, _after_space(text, end) + 1)  # behind the colon
        _, end = decoder.raw_decode(text, start)
        if key == WEIGHT:
            return text[:start] + value + text[end:]
        place = _after_space(text, end)
        if text[place] == ",":
            place = _after_space(text, place + 1)
    inside = text[text.index("{") + 1 : first]  # how the object is laid out
    entry = f"{json.dumps(WEIGHT)}: {value}"
    return text[:first] + (f"{entry},{inside or ' '}" if text[first] != "}" else entry) + text[first:]


def _after_space(text: str, place: int) -> int:
    while text[place] in " \t\r\n":
        place += 1
    return place


def _previews(lora: Path) -> list[Path]:
    return [lora.with_suffix(f"{middle}.{ending}") for middle in (".preview", "") for ending in _PREVIEWS]


def _is_our_preview(path: Path) -> bool:
    return path.name.endswith(".preview.png") and is_our_png(path.read_bytes())


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
