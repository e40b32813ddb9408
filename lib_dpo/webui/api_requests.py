"""What the HTTP API takes: the body of each request, and a check that guesses nothing.

pydantic would drop a misspelt field, so that a bake of "strenght" 0.2 is one at 1, and read 1.5 as rank 1, `true` as
strength 1 and "64" as 64, each of its versions otherwise: what a request holds is looked at before it sees it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field

from lib_dpo.errors import SettingError, nearest, printable
from lib_dpo.settings import FIELDS, is_finite

_SHOWN = 60  # characters of a value that a message repeats
_WORDS: Mapping[Any, str] = {
    str: "text", bool: "true or false", int: "a whole number", float: "a number", list[str]: "a list of texts"
}  # fmt: skip


class Body(BaseModel, extra="forbid"):
    """What a request holds; the description of the API says by `extra` that there are no other fields."""


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str | list[dict[str, Any]]  # the sentence; a list where the body is not JSON at all


_BASE = Field("", description="checkpoint before tuning, by name; empty: the loaded one")
_REFERENCE = Field(..., description="DPO reference, by name")
_NAME = Field(..., description="name of the file to write, without folders")
_OFFSET = Field(..., description="LoRA or offset file, by name")
_STRENGTH = Field(1.0, description=FIELDS["strength"].help)
_BLOCKS = Field("", description=FIELDS["blocks"].help)
_SIDE = FIELDS["side"].help + "; 0: what the model was made for"
_RANK = Field(None, description="keep the strongest components of each layer of a LoRA only")
_OVERWRITE = Field(False, description="replace an existing file of that name")
_WAIT = Field(True, description="answer when the job is over; false: at once, then ask for jobs/{id}")


class AnalyseRequest(Body):
    """A pair to look at."""

    base: str = _BASE
    reference: str = _REFERENCE
    spectra: bool = Field(False, description="all singular values too: what a LoRA of a given rank or size can keep")
    wait: bool = _WAIT


class ExtractRequest(Body):
    """A LoRA to extract; one of rank, energy, size_mb, or none of them with the form exact."""

    base: str = _BASE
    reference: str = _REFERENCE
    name: str = _NAME
    rank: int | None = Field(None, description=FIELDS["rank"].help)
    energy: float | None = Field(None, description=FIELDS["energy"].help)
    size_mb: float | None = Field(None, description=FIELDS["size_mb"].help)
    conv_rank: int | None = Field(None, description=FIELDS["conv_rank"].help)
    method: str = Field("auto", description=FIELDS["method"].help)
    profile: str = Field("portable", description=FIELDS["profile"].help)
    precision: str = Field("fp16", description=FIELDS["lora_precision"].help)
    device: str = Field("auto", description=FIELDS["device"].help)
    seed: int = Field(0, description=FIELDS["seed"].help)
    form: str = Field("low-rank", description=FIELDS["form"].help)
    overwrite: bool = _OVERWRITE
    wait: bool = _WAIT


class OffsetRequest(Body):
    """A dense offset file to write into the reference folder."""

    base: str = _BASE
    reference: str = _REFERENCE
    name: str = _NAME
    precision: str = Field("fp32", description=FIELDS["precision"].help)
    overwrite: bool = _OVERWRITE
    wait: bool = _WAIT


class BakeRequest(Body):
    """An offset to add to the loaded model."""

    offset: str = _OFFSET
    strength: float = _STRENGTH
    blocks: str = _BLOCKS
    rank: int | None = _RANK
    wait: bool = _WAIT


class WaitRequest(Body):
    """Nothing but whether to wait."""

    wait: bool = _WAIT


class SaveRequest(Body):
    """A checkpoint to write: the loaded one's file plus strength x offset."""

    name: str = _NAME
    offset: str = _OFFSET
    strength: float = _STRENGTH
    blocks: str = _BLOCKS
    rank: int | None = _RANK
    overwrite: bool = _OVERWRITE
    wait: bool = _WAIT


class CompareRequest(Body):
    """A grid of pictures: prompts x seeds down, the untouched model and the strengths across."""

    offset: str = _OFFSET
    prompts: list[str] = Field(..., description="one row of pictures for each prompt and seed")
    negative: str = ""
    seeds: str = Field("1", description="such as 1, 2 or 100-103; -1 is random")
    strengths: str = Field("0.5, 1, 1.5", description="such as 0.5, 1 or 0-2 (+0.5)")
    blocks: str = _BLOCKS
    rank: int | None = _RANK
    steps: int = Field(20, description=FIELDS["steps"].help)
    cfg_scale: float = Field(7.0, description=FIELDS["cfg"].help)
    sampler: str = Field("", description="empty: the host's first")
    width: int = Field(0, description=_SIDE)
    height: int = Field(0, description=_SIDE)
    beside: str = Field("", description="another offset at the same strengths; empty: none")
    undo: bool = Field(False, description="take out first what is baked into the model")
    function: bool = Field(False, description="measure how much of the whole offset's effect on the predictions is kept")
    wait: bool = _WAIT


class BlindRequest(Body):
    """A blind test to begin, or to go on with."""

    offset: str = _OFFSET
    strengths: str = Field("1", description="one, against the untouched model; or several, to find the best: 0.5, 1, 1.5")
    prompts: list[str] = Field([], description="one pair for each prompt and seed; none: those that come with DPO")
    negative: str = ""
    seeds: str = Field("1", description="such as 1, 2 or 100-103; when all prompts were shown, the next seed follows")
    blocks: str = _BLOCKS
    steps: int = Field(20, description=FIELDS["steps"].help)
    cfg_scale: float = Field(7.0, description=FIELDS["cfg"].help)
    sampler: str = Field("", description="empty: the host's first")
    width: int = Field(0, description=_SIDE)
    height: int = Field(0, description=_SIDE)
    wait: bool = _WAIT


class VoteRequest(Body):
    """A vote on the pair that was asked for last."""

    pair: str = Field(..., description="the id of the pair")
    choice: str = Field(..., description="left, right, none (no difference) or skip")


class CompatRequest(Body):
    """Does the offset of a pair fit a checkpoint?"""

    target: str = Field("", description="checkpoint by name; empty: the loaded one")
    base: str = _BASE
    reference: str = _REFERENCE
    wait: bool = _WAIT


def check_body(model: type[Body] | None, content: bytes, what: str) -> None:
    """Refuse a body with anything that is not in the model, twice there, missing, or of another kind.

    A body that is no JSON passes: it is refused, or left alone where none is wanted, by those who parse it.

    Args:
        model: None where no body is wanted.
        what: the request, for messages.

    Raises:
        SettingError: naming the field, what was found and what was expected.
    """
    try:
        body = json.loads(content, object_pairs_hook=_pairs) if content else None
    except (ValueError, RecursionError):
        return
    kinds = _kinds(model) if model else {}
    if body is None and not any(_required(model, name) for name in kinds):
        return
    if not isinstance(body, _Object):
        raise SettingError(f'{what}: {_shown(body)} is no JSON object; expected one such as {{"wait": true}}')
    check_names((name for name, _ in body.pairs), kinds, what)
    given = dict(body.pairs)
    for name, kind in kinds.items():
        if name not in given and _required(model, name):
            raise SettingError(f"{what}: {name} is missing; expected {_expected(kind)}, {_meaning(model, name)}")
        if name in given and not _fits(kind, given[name]):
            raise SettingError(
                f"{what}: {name} {_shown(given[name])} is not {_expected(kind)}; expected {_meaning(model, name)}"
            )


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse a name that is unknown, with the nearest that is not, or that comes twice. Raises SettingError."""
    known, seen = list(known), set()
    for name in given:
        if name in seen:
            raise SettingError(f"{what}: {name} is given twice; expected it once")
        seen.add(name)
        if name not in known:
            near = nearest(name, known)
            meant = f"did you mean {near}? " if near else ""
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise SettingError(f"{what}: {printable(name)[:_SHOWN]!r} is unknown; {meant}{takes}")


class _Object:
    """A JSON object with what it holds in order: a dict would keep the last of two alike."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _pairs(pairs: list[tuple[str, Any]]) -> _Object:
    return _Object(pairs)


def _kinds(model: type[Body]) -> dict[str, Any]:
    hints = get_type_hints(model)  # of the base classes too: pydantic 1 has some of its own there
    return {name: hints[name] for name in signature(model).parameters}


def _required(model: Any, name: str) -> bool:
    return bool(signature(model).parameters[name].default is Parameter.empty)  # the same in pydantic 1 and 2


def _fits(kind: Any, value: Any) -> bool:
    if type(None) in get_args(kind):
        return value is None or any(_fits(each, value) for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(get_args(kind)[0], item) for item in value)
    if kind in (bool, str):
        return isinstance(value, kind)
    return is_finite(value) and (kind is float or value == int(value))  # 64.0 is whole: JSON knows one kind of number


def _expected(kind: Any) -> str:
    kinds = [each for each in get_args(kind) if each is not type(None)] if type(None) in get_args(kind) else [kind]
    return _WORDS[kinds[0]]


def _meaning(model: Any, name: str) -> str:
    fields = model.model_fields if hasattr(model, "model_fields") else model.__fields__
    field = fields[name]
    text = getattr(field, "description", None) or getattr(getattr(field, "field_info", None), "description", None)
    return str(text or "what its name says")


def _shown(value: Any) -> str:
    """A value as JSON has it, cut."""
    text = json.dumps(value, ensure_ascii=False, default=lambda each: dict(each.pairs))
    return printable(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
