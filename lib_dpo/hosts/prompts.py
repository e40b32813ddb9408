"""Prompts as people write them for WebUIs, for a diffusers pipeline: weights, BREAK, and more words than CLIP takes at once.

The marks are AUTOMATIC1111's: (word) × 1.1, [word] ÷ 1.1, (word:1.5), a backslash before a bracket that is meant. The library
compel computes the embeddings, by its own rules (compel/embeddings_provider.py): a weight moves the words' embedding away
from that of an empty prompt, so pictures are not those of a WebUI with the same weights. What only WebUIs do is refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from lib_dpo.errors import SettingError, missing_extra

_STEP = 1.1  # of one pair of brackets
_LARGEST_WEIGHT = 10.0
_MARK = re.compile(r"\\(?P<meant>[()\[\]\\])|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])")
_ONLY_IN_WEBUIS = (
    (re.compile(r"<[a-z]+:[^<>]*>", re.IGNORECASE), "take it out, and give a LoRA as the offset"),
    (re.compile(r"(?<!\\)\[[^\[\]]*[|:][^\[\]]*(?<!\\)\]"), "write one prompt for all steps"),
    (re.compile(r"\bAND\b"), "write it in small letters if the word is meant"),
)


@dataclass(frozen=True)
class Fragment:
    """Words of one weight."""

    text: str
    weight: float = 1.0


def parse(prompt: str) -> list[list[Fragment]]:
    """The parts of a prompt between BREAKs, each as fragments in their order.

    A bracket that is never closed holds to the end, and one that was never opened is meant, as AUTOMATIC1111 reads them.

    Raises:
        SettingError: a mark that only WebUIs know (a LoRA, prompt editing, AND), or a weight out of range.
    """
    for mark, instead in _ONLY_IN_WEBUIS:
        if found := mark.search(prompt):
            raise SettingError(f"the prompt has {found[0][:60]}, which is known to WebUIs alone; {instead}")
    return [_fragments(part) for part in re.split(r"\s*\bBREAK\b\s*", prompt)]


def _fragments(text: str) -> list[Fragment]:
    found: list[Fragment] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # how many fragments stood before each bracket that is open
    place = 0
    for mark in _MARK.finditer(text):
        _add(found, text[place : mark.start()])
        place = mark.end()
        bracket = mark["open"] or ("[" if mark["close"] == "]" else "(")
        if mark["meant"]:
            _add(found, mark["meant"])
        elif mark["open"]:
            opened[bracket].append(len(found))
            found.append(Fragment(""))  # what follows does not belong to what stood before
        elif not opened[bracket]:
            _add(found, mark[0])
        else:
            _weigh(found, bracket, opened[bracket].pop(), mark["weight"])
    _add(found, text[place:])
    for bracket, starts in opened.items():
        for first in starts:
            _weigh(found, bracket, first, None)
    return _joined(found)


def _add(found: list[Fragment], text: str) -> None:
    if text:
        found.append(Fragment(text))


def _weigh(found: list[Fragment], bracket: str, first: int, given: str | None) -> None:
    weight = float(given) if given else _STEP if bracket == "(" else 1 / _STEP
    if not 0 <= weight <= _LARGEST_WEIGHT:
        raise SettingError(f"weight {given} in a prompt: expected 0 to {_LARGEST_WEIGHT:g}; put what is not wanted into the "
                           "negative prompt")  # fmt: skip
    found[first:] = [Fragment(each.text, each.weight * weight) for each in found[first:]]


def _joined(found: list[Fragment]) -> list[Fragment]:
    """Neighbours of one weight as one fragment, so that a tokenizer sees words whole."""
    joined: list[Fragment] = []
    for each in found:
        if joined and math.isclose(joined[-1].weight, each.weight):
            joined[-1] = Fragment(joined[-1].text + each.text, each.weight)
        elif each.text:
            joined.append(each)
    return joined


def arguments(pipeline: Any, prompt: str, negative: str) -> dict[str, Any]:
    """What a diffusers pipeline of SD 1.x, SD 2.x or SDXL takes for the two prompts: plain ones as they are, others embedded.

    Raises:
        SettingError: as `parse`. MissingExtraError: compel is needed and not installed.
    """
    both = [parse(prompt), parse(negative)]
    if all(_is_plain(pipeline, parts) for parts in both):
        words = ["".join(each.text for each in parts[0]) for parts in both]
        return {"prompt": words[0], "negative_prompt": words[1]}
    encoder = _encoder(pipeline)
    pairs = [_embedded(encoder, parts) for parts in both]
    long = max(embeds.shape[1] for embeds, _ in pairs)
    empty, _ = _embedded(encoder, [[]])
    found: dict[str, Any] = {}
    for side, (embeds, pooled) in zip(("", "negative_"), pairs, strict=True):
        missing = (long - embeds.shape[1]) // empty.shape[1]
        found[f"{side}prompt_embeds"] = torch.cat([embeds, *[empty] * missing], dim=1)
        if pooled is not None:
            found[f"{side}pooled_prompt_embeds"] = pooled
    return found


def _is_plain(pipeline: Any, parts: list[list[Fragment]]) -> bool:
    if len(parts) > 1 or any(not math.isclose(each.weight, 1.0) for each in parts[0]):
        return False
    words = "".join(each.text for each in parts[0])
    return bool(len(pipeline.tokenizer(words).input_ids) <= pipeline.tokenizer.model_max_length)


def _encoder(pipeline: Any) -> Any:
    try:
        from compel.embeddings_provider import EmbeddingsProviderMulti, ReturnedEmbeddingsType
    except ImportError as error:
        raise missing_extra("weights in prompts, BREAK, and prompts of more than 75 tokens need", "compel") from error
    two = getattr(pipeline, "text_encoder_2", None) is not None
    kind = ReturnedEmbeddingsType
    return EmbeddingsProviderMulti(
        tokenizers=[pipeline.tokenizer, *([pipeline.tokenizer_2] if two else [])],
        text_encoders=[pipeline.text_encoder, *([pipeline.text_encoder_2] if two else [])],
        truncate=False,
        returned_embeddings_type=kind.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if two else kind.LAST_HIDDEN_STATES_NORMALIZED,
        requires_pooled_mask=[False, True] if two else [],
    )


def _embedded(encoder: Any, parts: list[list[Fragment]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(1, tokens, width), and SDXL's pooled embedding of the first part, which knows no weights."""
    device = encoder.text_encoder.device
    embeds = [
        encoder.get_embeddings_for_weighted_prompt_fragments(
            [[each.text for each in part or [Fragment("")]]], [[each.weight for each in part or [Fragment("")]]], device=device
        )
        for part in parts
    ]
    pooled = encoder.get_pooled_embeddings(["".join(each.text for each in parts[0])], device=device)
    return torch.cat(embeds, dim=1), pooled
