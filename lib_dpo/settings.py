"""Settings of the engine: frozen records, and one table that describes each field to every front end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from lib_dpo.errors import NothingToDoError, SettingError, did_you_mean

Method = Literal["auto", "exact", "randomized"]
METHODS: tuple[Method, ...] = get_args(Method)
PROFILES = ("portable", "webui", "full")
PRECISIONS = ("fp16", "bf16", "fp32")
LORA_PRECISIONS = (*PRECISIONS, "fp8")
FORMS = ("low-rank", "exact")


@dataclass(frozen=True)
class Field:
    """One setting as people see it."""

    label: str
    help: str
    kind: type
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "rank": Field("Rank", "more keeps more of the change, in a larger file (default 64)", int, minimum=1),
        "energy": Field(
            "Energy", "share of the change to keep, 0 to 1; each layer gets the rank that it needs", float, minimum=0, maximum=1
        ),
        "size_mb": Field(
            "Size", "of the file in MB (10^6 bytes); each layer gets the rank that it needs", float, minimum=0, maximum=1e6
        ),
        "conv_rank": Field("Rank of convolutions", "of 3x3 convolutions (default: as rank)", int, minimum=1),
        "method": Field("Method", "auto takes the faster one for each layer", str, choices=METHODS),
        "profile": Field(
            "Profile",
            "portable: works in every program; webui: holds the norms too; full: holds layers whole whose bias changed",
            str,
            choices=PROFILES,
        ),
        "form": Field(
            "Form",
            "low-rank: a LoRA of the rank, energy or size asked for; exact: the UNet's whole change and that of text encoders' "
            "matrices, a byte a weight (LoKr)",
            str,
            choices=FORMS,
        ),
        "precision": Field("Precision", "number format of the file", str, choices=PRECISIONS),
        "lora_precision": Field(
            "Precision", "number format of the file; fp8 holds twice the rank in the same bytes", str, choices=LORA_PRECISIONS
        ),
        "device": Field("Device", "where to compute: auto, cpu, cuda, cuda:1 or mps", str),
        "seed": Field("Seed", "of the method randomized: the same seed writes the same file", int, minimum=0),
        "strength": Field("Strength", "how much of the offset: 0 is none of it, 1 is the full change", float),
        "steps": Field("Steps", "of the sampler, per picture", int, minimum=1, maximum=1000),
        "cfg": Field("CFG scale", "how closely pictures follow the prompt", float, minimum=0, maximum=100),
        "side": Field("Width or height", "of a picture in pixels, a multiple of 8", int, minimum=64, maximum=4096),
        "pictures": Field(
            "Pictures",
            "to draw and judge at each strength and with each LoRA (default: 40, in a study 500)",
            int,
            minimum=8,
            maximum=10_000,
        ),
        "blocks": Field(
            "Block weights",
            "such as IN00=0.5,MID=0,CONV=0: of blocks and of kinds of layer; what is not named has weight 1",
            str,
        ),
    }
)
DEFAULT_RANK = 64
LARGEST_STRENGTH = 10.0  # beyond it, either way, a strength is a slip of the finger: percent, or a lost decimal point
_PACKAGE = Path(__file__).resolve().parent
# models/, javascript/ and style.css lie beside the package in an extension's folder, and in it where pip installed it
ASSETS = _PACKAGE / "assets" if (_PACKAGE / "assets").is_dir() else _PACKAGE.parent
BUNDLED_MODEL = ASSETS / "models" / "bundled"  # the small model that ships with the project
BUNDLED_BASE = "toy-shapes.safetensors"
BUNDLED_CFG = 3.0  # what it draws well at
BUNDLED_WORDS = (
    "The bundled toy draws coloured shapes and knows few words: one, two or three; red, yellow, green, blue, purple or black; "
    "circle, square, triangle or cross; on the left, on the right, at the top or at the bottom. "
    "Such as: two red circles on the left."
)
BUNDLED_PROMPTS = (
    "two red circles on the left",
    "one blue cross at the top",
    "three green squares",
    "one yellow triangle on the right",
    "two purple triangles at the bottom",
    "three blue circles",
)  # in the only words that it knows


def check(name: str, value: Any) -> None:
    """Refuse a value outside its field's limits, by name. None means "not given" and passes.

    Raises:
        SettingError: outside the limits or not among the choices.
    """
    field = FIELDS[name]
    if value is None:
        return
    if field.choices and value not in field.choices:
        raise SettingError(f"{name} {value!r} is unknown; expected one of {one_of(value, field.choices)}")
    if field.kind is str and not isinstance(value, str):
        raise SettingError(f"{name} {value!r} is no text; expected {field.help}")
    if field.kind in (int, float) and not is_finite(value):
        raise SettingError(f"{name} {value!r} is not a finite number; expected one{_limits(field)}")
    if field.kind is int and value != int(value):
        raise SettingError(f"{name} {value!r} is not a whole number; expected one{_limits(field)}")
    if field.minimum is not None and value < field.minimum:
        raise SettingError(f"{name} {value} is too small; expected at least {field.minimum:g}")
    if field.maximum is not None and value > field.maximum:
        raise SettingError(f"{name} {value} is too large; expected at most {field.maximum:g}{_meant(name, value)}")


def one_of(value: Any, choices: Sequence[str]) -> str:
    """What was expected in place of an unknown value, and which of it was probably meant."""
    return ", ".join(choices) + did_you_mean(str(value), choices)


def _meant(name: str, value: float) -> str:
    """The number that somebody may have meant who gave too large a one: a share in per cent, a size in bytes."""
    if name == "energy" and 2 <= value <= 100:
        return f"; did you mean {value / 100:g}?"
    return f" MB; did you mean {value / 1e6:g}?" if name == "size_mb" and value >= 1e6 else ""


def size_meant(size_mb: float, least_mb: float) -> str:
    """The size that somebody may have meant whose size in MB is too small for anything: one in GB."""
    return f"; did you mean {size_mb * 1000:g}? The size is in MB" if 0 < size_mb < least_mb <= size_mb * 1000 else ""


def strength_of(value: Any) -> float:
    """A strength as somebody gave it, as a number; 0 is the untouched model. One rule for every front end.

    Raises:
        SettingError: nothing, no number, not finite, or beyond LARGEST_STRENGTH.
    """
    if value is None or value == "":
        raise SettingError("the strength is missing; give a number such as 0.5 or 1")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SettingError(f"strength {repr(value)[:40]} is not a finite number; expected one such as 0.5 or 1")
    if abs(number) > LARGEST_STRENGTH:
        percent = number / 100
        meant = f"; did you mean {percent:g}?" if abs(percent) <= LARGEST_STRENGTH else ""
        raise SettingError(f"strength {number:g} is too large; expected {-LARGEST_STRENGTH:g} to {LARGEST_STRENGTH:g}{meant}")
    return number


def strength_to_bake(value: Any) -> float:
    """A strength that is to change something: as `strength_of`, and 0 is refused.

    Raises:
        SettingError: as `strength_of`. NothingToDoError: 0.
    """
    number = strength_of(value)
    if not number:
        raise NothingToDoError("strength 0 changes nothing; choose one such as 0.5 or 1")
    return number


def in_digits(strength: float, form: str = ".2f") -> str:
    """A strength to two digits; nothing is 0.00, never -0.00."""
    return format(round(strength, 2) + 0.0, form)


def is_finite(value: Any) -> bool:
    """Whether it is a number that can be counted with; `True` is none."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _limits(field: Field) -> str:
    least = "" if field.minimum is None else f" of at least {field.minimum:g}"
    return least + ("" if field.maximum is None else f" and at most {field.maximum:g}")


@dataclass(frozen=True)
class RankPolicy:
    """How ranks are chosen: one of `rank`, `energy`, `size_mb`; rank 64 when none is given."""

    rank: int | None = None
    energy: float | None = None
    size_mb: float | None = None
    conv_rank: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            check(field.name, getattr(self, field.name))
        given = [name for name in ("rank", "energy", "size_mb") if getattr(self, name) is not None]
        if len(given) > 1:
            raise SettingError(f"{' and '.join(given)} exclude one another; choose one")
        if self.conv_rank is not None and given and given != ["rank"]:
            raise SettingError(f"conv_rank goes with rank only; {given[0]} chooses the ranks of all layers itself")
        if self.energy == 0:
            raise SettingError("energy 0 keeps nothing; expected more than 0 and at most 1")

    @property
    def fixed(self) -> int | None:
        """The rank of all layers, or None when ranks follow from the spectra."""
        return (self.rank or DEFAULT_RANK) if self.energy is None and self.size_mb is None else None

    def __str__(self) -> str:
        if self.energy is not None:
            return f"energy {self.energy:g}"
        if self.size_mb is not None:
            return f"size {self.size_mb:g} MB"
        return f"rank {self.fixed}" + (f", convolutions {self.conv_rank}" if self.conv_rank else "")


@dataclass(frozen=True)
class ExtractSettings:
    """Everything that decides what `extract` writes, beside the two files."""

    policy: RankPolicy = RankPolicy()
    method: Method = "auto"
    profile: str = "portable"
    precision: str = "fp16"
    device: str = "auto"
    seed: int = 0
    form: str = "low-rank"

    def __post_init__(self) -> None:
        for name in ("method", "profile", "device", "seed", "form"):
            check(name, getattr(self, name))
        check("lora_precision", self.precision)
        if self.form == "exact" and self.policy != RankPolicy():
            raise SettingError("an exact LoRA holds the whole change; leave out rank, energy, size_mb and conv_rank")
        if self.form == "exact" and self.precision != "fp16":
            raise SettingError(f"an exact LoRA has its own precision, int8; leave out {self.precision}")
        if self.form == "exact" and (self.method, self.profile, self.seed) != ("auto", "portable", 0):
            raise SettingError(
                "an exact LoRA needs no decomposition and holds what any profile does; leave out method, profile and seed"
            )
