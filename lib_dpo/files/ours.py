"""Small files that carry a proof of who wrote them: what a person made or changed is told from what we wrote ourselves.

The proof is a SHA-256 of the rest, under a name of ours: in JSON one more key, in a PNG a text chunk
(https://www.w3.org/TR/png-3/#11tEXt). It keeps nobody from forging it; it is there so that nothing of a person's is lost.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

KEY = "sd-webui-dpo"
_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = KEY.encode() + b"\0sha256 "


def signed_json(content: Mapping[str, Any]) -> bytes:
    """An object as JSON with the proof in it, four spaces an indent, as WebUIs write theirs."""
    body = {key: value for key, value in content.items() if key != KEY}
    signed = {**body, KEY: {"sha256": _json_digest(body)}}
    return json.dumps(signed, indent=4, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def is_our_json(data: bytes) -> bool:
    """Whether JSON holds what `signed_json` wrote and nothing else; how it is laid out does not matter."""
    content = json_object(data)
    if content is None or not isinstance(content.get(KEY), dict):
        return False
    proof = content.pop(KEY)
    return set(proof) == {"sha256"} and proof["sha256"] == _json_digest(content)


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object of a file; None where it holds none."""
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def signed_png(data: bytes) -> bytes:
    """A PNG with the proof in it, behind its first chunk."""
    chunks = list(_chunks(data))
    text = _CHUNK + _png_digest(chunks).encode()
    proof = len(text).to_bytes(4, "big") + b"tEXt" + text + zlib.crc32(b"tEXt" + text).to_bytes(4, "big")
    return _PNG + b"".join([chunks[0], proof, *chunks[1:]])


def is_our_png(data: bytes) -> bool:
    """Whether a file is a PNG that `signed_png` made, with every byte as it was."""
    chunks = list(_chunks(data))
    proofs = [chunk for chunk in chunks if chunk[4:].startswith(b"tEXt" + _CHUNK)]
    rest = [chunk for chunk in chunks if chunk not in proofs]
    return len(proofs) == 1 and signed_png(_PNG + b"".join(rest)) == data


def _json_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _png_digest(chunks: list[bytes]) -> str:
    return hashlib.sha256(b"".join(chunks)).hexdigest()


def _chunks(data: bytes) -> Iterator[bytes]:
    """The chunks of a PNG, each with its length and checksum; none of what is no PNG."""
    if not data.startswith(_PNG):
        return
    place = len(_PNG)
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        yield data[place:end]
        place = end
