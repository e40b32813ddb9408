"""What a pair, LoHa, LoKr or GLoRA is multiplied by: alpha / rank, from alpha in the file or from the settings of PEFT for it.

PEFT keeps them in adapter_config.json beside its adapter_model file, diffusers in the metadata of its own. How a module's
own rank and alpha are found follows `patterns.py`, LoraModel in peft/tuners/lora/model.py and LycorisLayer in
peft/tuners/lycoris_utils.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lib_dpo.errors import BadFileError, MismatchError
from lib_dpo.files.checkpoint import Checkpoint
from lib_dpo.files.small import read_small
from lib_dpo.offsets.lora.decompositions import LOHA, LOKR
from lib_dpo.offsets.lora.keys import PEFT_PAIR, Group, parse_key
from lib_dpo.offsets.lora.patterns import first_match

ADAPTER_METADATA = "lora_adapter_metadata"  # entry of diffusers' own files
ADAPTER_CONFIG: Literal["adapter_config.json"] = "adapter_config.json"
_ADAPTER_MODEL = "adapter_model."  # the file that PEFT puts its config beside
_RESIZED = "dpo.resized"  # a file of ours: its factors carry what no alpha says
_PEFT = "base_model.model."
_MOST_PATTERNS = 10_000  # SDXL has 2,000 layers
_DEFAULT_RANK = _DEFAULT_ALPHA = 8  # LoraConfig's own, and those of LoHa and LoKr
# the kinds of adapter by their parts, with the names of their alpha
_KINDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "LORA": (("up",), "lora_alpha"), "LOHA": (LOHA, "alpha"), "LOKR": (LOKR, "alpha"),
}  # fmt: skip
Source = Literal["alpha", "adapter_config.json", "metadata", "none"]

# what these say of the adapter cannot be kept: its weights alone do not hold it
_REFUSED = (
    "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# these start from the base's weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base too
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Scale:
    """The factor of what a module's parts make up, and where it is from."""

    value: float
    source: Source


@dataclass(frozen=True)
class PeftSettings:
    """The LoraConfig of a file; in diffusers' metadata one for each component, by its name and a dot."""

    file: str
    source: Source
    config: Mapping[str, Any]

    def scale(self, module: str, rank: int | None) -> Scale:
        """The scale of one module.

        Args:
            module: its name in the file. rank: of its factors there; None where it has none, as a LoKr of two whole matrices,
                which PEFT scales all the same.

        Raises:
            MismatchError: the settings are of another file: they say another rank.
            BadFileError: settings that cannot be read.
        """
        within = self._within(module)
        if within is None:
            return Scale(1.0, "none")
        component, inner = within
        wanted = self._number(component, inner, "rank_pattern", "r", _DEFAULT_RANK)
        if rank is None:
            rank = int(wanted)
        if wanted != rank:
            raise MismatchError(
                f"{self.file}: {module} has rank {rank}, but its {self._words} says {wanted:g}; it belongs to another LoRA, "
                "and the right scale is not known: get the two that belong together"
            )
        name = _KINDS.get(_kind(self._setting(component, "peft_type")), _KINDS["LORA"])[1]
        alpha = self._number(component, inner, "alpha_pattern", name, _DEFAULT_ALPHA)
        return Scale(alpha / (math.sqrt(rank) if self._setting(component, "use_rslora") else rank), self.source)

    @property
    def _words(self) -> str:
        return ADAPTER_CONFIG if self.source == ADAPTER_CONFIG else f"metadata entry {ADAPTER_METADATA}"

    def _within(self, module: str) -> tuple[str, str] | None:
        """The component that the settings are looked up for, and the module's name as PEFT saw it; None: not in them."""
        component, _, inner = module.partition(".")
        if self.source == "metadata" and any(name.startswith(component + ".") for name in self.config):
            return component + ".", inner
        is_whole = self.source == ADAPTER_CONFIG or "r" in self.config or "lora_alpha" in self.config
        return ("", module.removeprefix(_PEFT)) if is_whole else None

    def _setting(self, component: str, name: str) -> Any:
        return self.config.get(component + name)

    def _number(self, component: str, module: str, patterns: str, name: str, default: int) -> float:
        own = self._setting(component, patterns) or {}
        if not isinstance(own, dict) or len(own) > _MOST_PATTERNS:
            raise self._unreadable(patterns)
        value = own.get(self._pattern_key(own, module))
        if value is None:
            value = self._setting(component, name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._unreadable(name)
        return value

    def _pattern_key(self, patterns: Iterable[str], module: str) -> str:
        try:
            return first_match(patterns, module) or module
        except ValueError as error:
            raise BadFileError(f"{self.file}: its {self._words} has the pattern {error}") from error

    def _unreadable(self, name: str) -> BadFileError:
        return BadFileError(f"{self.file}: {name} in its {self._words} cannot be read; get the file again")


def read_settings(checkpoint: Checkpoint, groups: Iterable[Group]) -> PeftSettings | None:
    """The settings that belong to a LoRA file: those in its metadata, or in adapter_config.json beside `adapter_model.*`.

    Only pairs without an alpha need them. In files of ours, and under kohya's names, such pairs mean what they are.

    Raises:
        BadFileError: they cannot be read.
        MismatchError: they say that the adapter is more than a LoRA.
    """
    groups = list(groups)
    lacking = [group for group in groups if has_scale(group.parts) and "alpha" not in group.parts]
    if not any(_by_peft_or_diffusers(group) for group in lacking) or _RESIZED in checkpoint.metadata:
        return None
    text = checkpoint.metadata.get(ADAPTER_METADATA)
    if text is not None:
        return _checked(PeftSettings(checkpoint.path.name, "metadata", _parsed(checkpoint.path, text)), groups)
    config = checkpoint.path.with_name(ADAPTER_CONFIG)
    is_peft = any(_by_peft_or_diffusers(group) and PEFT_PAIR.search(group.parts.get("up", ".lora_B.")) for group in lacking)
    if not (checkpoint.path.name.startswith(_ADAPTER_MODEL) and is_peft and config.is_file()):
        return None
    try:
        text = read_small(config).decode("utf-8")
    except (OSError, ValueError) as error:
        raise BadFileError(f"{config}: cannot be read ({error}); the scale of {checkpoint.path.name} is in it") from error
    return _checked(PeftSettings(checkpoint.path.name, ADAPTER_CONFIG, _parsed(config, text)), groups)


def has_scale(parts: Mapping[str, str]) -> bool:
    """Whether a module's parts, those of one spelling, are of a kind that PEFT's settings have an alpha for."""
    return any(part in parts for own, _ in _KINDS.values() for part in own)


def form_scale(checkpoint: Checkpoint, settings: PeftSettings | None, parts: Mapping[str, str], rank: int | None) -> Scale:
    """alpha / rank of one module: from its own alpha, else from the settings, else 1. Raises as `PeftSettings.scale`.

    Args:
        rank: None where alpha counts for nothing: LyCORIS and all hosts leave it out of a LoKr of two whole matrices.
    """
    if "alpha" in parts:
        return Scale(float(checkpoint.read(parts["alpha"])) / rank, "alpha") if rank else Scale(1.0, "none")
    key = next((parts[part] for own, _ in _KINDS.values() for part in own if part in parts), "")
    parsed = parse_key(key)
    if settings is None or parsed is None or not _by_peft_or_diffusers(Group(parsed[0], dict(parts))):
        return Scale(1.0, "none")
    return settings.scale(parsed[0], rank)


def unused_config(checkpoint: Checkpoint, settings: PeftSettings | None) -> bool:
    """Whether an adapter_config.json lies beside the file that is not taken for its own."""
    of_another = settings is None or settings.source != ADAPTER_CONFIG
    return of_another and checkpoint.path.with_name(ADAPTER_CONFIG).is_file()


def _by_peft_or_diffusers(group: Group) -> bool:
    """Whether a module goes by other names than kohya's and LyCORIS's, who always write an alpha where there is one."""
    if "up" in group.parts:
        return ".lora_up." not in group.parts["up"]
    return not group.module.startswith(("lora_", "lycoris_"))


def _parsed(path: Path, text: str) -> Mapping[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path.name}: its LoRA settings cannot be read ({error}); get the file again") from error
    if not isinstance(config, dict):
        raise BadFileError(f"{path.name}: its LoRA settings are no JSON object; get the file again")
    return config


def _kind(peft_type: Any) -> str:
    return str(peft_type).rpartition(".")[2]


def _checked(settings: PeftSettings, groups: Sequence[Group]) -> PeftSettings:
    """Refuse an adapter that is more than its weights, or another than these, by the name of the setting that says so."""
    kinds = [kind for kind, (own, _) in _KINDS.items() if any(part in group.parts for group in groups for part in own)]
    has_lengths = any("magnitude" in group.parts or "dora_scale" in group.parts for group in groups)
    for full, value in settings.config.items():
        name = full.rpartition(".")[2]
        more = (name in _REFUSED and bool(value)) or (name == "bias" and value not in (None, "none"))
        more = more or (name == "peft_type" and value is not None and _kind(value) not in kinds)
        more = more or (name == "use_dora" and bool(value) and not has_lengths)
        more = more or (name == "init_lora_weights" and not isinstance(value, bool) and value not in (None, *_HARMLESS_STARTS))
        if more:
            raise MismatchError(
                f"{settings.file}: {full} in its {settings._words} is {json.dumps(value)[:80]}, so its weights alone are not "
                "all of it; expected a plain LoRA, LoHa, LoKr or DoRA"
            )
    return settings
