"""What a model was trained to predict, as far as its files say: eps or v, and whether its noise ends at zero signal.

Read as hosts read it: the .yaml beside a checkpoint before its keys `v_pred` and `ztsnr` (ComfyUI, Forge Neo, reForge); the
scheduler of a diffusers folder; metadata after Stability's model specification and kohya's scripts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_dpo.families.model import Model
from lib_dpo.offsets.offset import Pair

_WORDS = {"eps": "eps", "v": "v", "edm": "by EDM", "edm-v": "v by EDM", "sample": "the picture itself"}
_SPELLINGS = {
    "eps": "eps", "epsilon": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v", "vprediction": "v", "velocity": "v",
    "sample": "sample", "edm": "edm",
}  # fmt: skip
# in the text, not in the structure: standalone use alone has a library for it
_YAML_KIND = re.compile(r"^[^#\n]*?\bparameterization[\"']?\s*:\s*[\"']?(\w+)", re.MULTILINE)
_YAML_SCALING = re.compile(r"^[^#\n]*?\b(V|Eps|EDM)Scaling\b", re.MULTILINE)
_YAML_ZERO = re.compile(
    r"^[^#\n]*?\b(ztsnr|zsnr|zero_terminal_snr|rescale_betas_zero_snr)[\"']?\s*:\s*true\b", re.MULTILINE | re.IGNORECASE
)
_LARGEST_TEXT = 1 << 20  # bytes of a .yaml or .json that are looked at


@dataclass(frozen=True)
class Prediction:
    """What is known of a model. `kind` is eps, v, edm, edm-v or sample; "" where nothing says it."""

    kind: str = ""
    mark: str = ""  # what says it
    zero_snr: str = ""  # what says that the noise ends at zero signal
    against: str = ""  # what says another kind
    assumed: str = ""  # the kind that hosts take where nothing says it; "" where that cannot be told

    @property
    def effective(self) -> str:
        """The kind that is known, or else assumed."""
        return self.kind or self.assumed

    @property
    def text(self) -> str:
        """After "predicts": the kind and what says it."""
        if not self.kind:
            return f"{_WORDS[self.assumed]} (nothing says otherwise)" if self.assumed else "eps or v: nothing in it says which"
        zero = f", with zero terminal SNR ({self.zero_snr})" if self.zero_snr else ""
        against = f", though {self.against} says otherwise" if self.against else ""
        return f"{_WORDS[self.kind]} ({self.mark}){zero}{against}"

    def as_json(self) -> dict[str, Any]:
        """What is known and whence."""
        return {
            "kind": self.kind or None,
            "mark": self.mark or None,
            "zero_terminal_snr": self.zero_snr or None,
            "contradicted_by": self.against or None,
            "assumed": None if self.kind else self.assumed or None,
        }


def prediction_of(model: Model) -> Prediction:
    """What the marks in and beside a file say."""
    kinds = list(_kinds(model))
    zero = next(_zero_snr(model), "")
    if kinds:
        kind, mark = kinds[0]
        against = next((other for found, other in kinds if found != kind), "")
        return Prediction(kind, mark, zero, against)
    # a UNet alone carries no marks, and of SD 2 both kinds were published without any
    unknown = model.architecture.name.startswith("sd2") or model.components() == ("unet",)
    return Prediction(zero_snr=zero, assumed="" if unknown else "eps")


def prediction_doubt(pair: Pair) -> tuple[str, bool]:
    """A sentence where base and tuned predict different things, else "", and whether both files say so themselves."""
    base, tuned = prediction_of(pair.base), prediction_of(pair.tuned)
    names = pair.names
    if base.effective and tuned.effective and base.effective != tuned.effective:
        text = (
            f"{names[0]} predicts {base.text}, but {names[1]} predicts {tuned.text}: their difference is no preference tuning."
        )
        return text, bool(base.kind and tuned.kind)
    if bool(base.zero_snr) != bool(tuned.zero_snr) and base.kind and tuned.kind:
        which, mark = (names[0], base.zero_snr) if base.zero_snr else (names[1], tuned.zero_snr)
        return f"Only {which} is marked as one with zero terminal SNR ({mark}): the two were trained on different noise.", False
    return "", False


def predictions(pair: Pair) -> dict[str, Prediction]:
    """What both files of a pair say, as `base` and `tuned`."""
    return {"base": prediction_of(pair.base), "tuned": prediction_of(pair.tuned)}


def target_doubt(target: Model, pair: Pair) -> str:
    """A sentence where a target predicts something else than the pair, else nothing."""
    theirs = prediction_of(target)
    for model, name in zip((pair.base, pair.tuned), pair.names, strict=True):
        ours = prediction_of(model)
        if theirs.effective and ours.effective and theirs.effective != ours.effective:
            return (
                f"The offset was not made for it: {target.name} predicts {theirs.text}, but {name} of the pair predicts "
                f"{ours.text}. Expect less of it, or something else; a pair of the target's own kind is better."
            )
    return ""


# ---- marks ----


def _kinds(model: Model) -> Iterator[tuple[str, str]]:
    """Kind and mark, those first that hosts look at first."""
    file, yaml = _yaml(model.path)
    found = _YAML_KIND.search(yaml)
    if found and found[1].lower() in _SPELLINGS:
        yield _SPELLINGS[found[1].lower()], file
    elif scaling := _YAML_SCALING.search(yaml):
        yield {"V": "v", "Eps": "eps", "EDM": "edm"}[scaling[1]], file
    keys = model.checkpoint.infos
    if "edm_vpred.sigma_max" in keys:
        yield "edm-v", "its key edm_vpred.sigma_max"
    elif "edm_mean" in keys and "edm_std" in keys:
        yield "edm", "its keys edm_mean and edm_std"
    elif own := {"v_pred", "model.v_pred"} & keys.keys():
        yield "v", f"its key {min(own)}"
    scheduler = _scheduler(model.path)
    if (kind := str(scheduler.get("prediction_type", ""))) in _SPELLINGS:
        yield _SPELLINGS[kind], "its scheduler_config.json"
    yield from _metadata_kinds(model.checkpoint.metadata)


def _metadata_kinds(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    kind = metadata.get("modelspec.prediction_type", "").strip().lower()
    if kind in _SPELLINGS:
        yield _SPELLINGS[kind], "modelspec.prediction_type"
    if metadata.get("ss_v_parameterization", "").lower() == "true":
        yield "v", "ss_v_parameterization"
    if "768-v" in metadata.get("modelspec.architecture", ""):
        yield "v", "modelspec.architecture"


def _zero_snr(model: Model) -> Iterator[str]:
    file, yaml = _yaml(model.path)
    if _YAML_ZERO.search(yaml):
        yield file
    if "ztsnr" in model.checkpoint.infos:
        yield "its key ztsnr"
    if _scheduler(model.path).get("rescale_betas_zero_snr") is True:
        yield "its scheduler_config.json"
    if model.checkpoint.metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        yield "ss_zero_terminal_snr"


def _yaml(path: Path) -> tuple[str, str]:
    """As `_beside`, of the .yaml of a checkpoint; hosts read none beside a folder."""
    return ("", "") if path.is_dir() else _beside(path.with_suffix(".yaml"))


def _beside(file: Path) -> tuple[str, str]:
    """What a file beside a model is called in a sentence, and its text; "" where there is none."""
    try:
        with file.open("rb") as stream:
            return f"{file.name} beside it", stream.read(_LARGEST_TEXT).decode("utf-8", "replace")
    except (OSError, ValueError):
        return "", ""


def _scheduler(path: Path) -> Mapping[str, Any]:
    """The scheduler's settings of the diffusers folder that a model is, or that its UNet lies in."""
    roots = [
        path,
        *([path.parent] if path.name == "unet" else []),
        *([path.parent.parent] if path.parent.name == "unet" else []),
    ]
    for root in roots:
        text = _beside(root / "scheduler" / "scheduler_config.json")[1]
        try:
            found = json.loads(text) if text else None
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}
