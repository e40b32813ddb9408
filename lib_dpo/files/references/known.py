"""The published references in one table. What no page, paper or repository says is None here, and "not known" to people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NOT_KNOWN = "not known"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"

Form = Literal["unet", "lora", "two"]
FORMS: dict[Form, str] = {
    "unet": "a UNet",
    "lora": "a LoRA",
    "two": "two models",
}


@dataclass(frozen=True)
class Known:
    """One published reference.

    Attributes:
        name: what its file is called here, without suffix.
        repo: where it is published, owner/name on the hub.
        base: the model before.
        form: what is published; how it gets here follows from it.
        tuned_for: what it was trained on or towards.
        paper: arXiv number.
        file: in the repository, where that is known for sure; else the hub is asked.
        size: of that file, in bytes, to three digits.
        licence: of the weights, as their own page says.
        remark: what else one should know before.
    """

    name: str
    repo: str
    base: str
    form: Form
    tuned_for: str
    paper: str
    file: str | None = None
    size: int | None = None
    licence: str | None = None
    remark: str = ""

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"https://huggingface.co/{self.repo}"

    @property
    def can_be_fetched(self) -> bool:
        """Whether what is published is a single file that can be used here."""
        return self.form != "two"


_SD, _XL = "SD 1.5", "SDXL 1.0"
_HUMAN = "human choices between two pictures (Pick-a-Pic v2)"
_PICKSCORE = "the choices of Pick-a-Pic v2, weighed by PickScore (SmPO)"
_STEPS = "choices made at every step of the denoising, on 4,000 prompts of Pick-a-Pic (SPO)"
_INVERTED = "preference pairs, traced back through the noise (InPO)"
_BOTH = "Pictures are drawn with both at once, so it is no single offset."
_CODE = "The repository of its code is under Apache-2.0."
_APACHE, _RAIL = "apache-2.0", "openrail++"

REFERENCES: tuple[Known, ...] = (
    Known(
        "dpo-sd1.5", "mhdang/dpo-sd1.5-text2image-v1", _SD, "unet", f"{_HUMAN} (Diffusion-DPO)", "2311.12908", UNET_FILE,
        3_440_000_000, _RAIL,
    ),
    Known(
        "dpo-sdxl", "mhdang/dpo-sdxl-text2image-v1", _XL, "unet", f"{_HUMAN} (Diffusion-DPO)", "2311.12908", UNET_FILE,
        10_300_000_000, _RAIL,
    ),
    Known("inpo-sd1.5", "JaydenLu666/InPO-SD1.5", _SD, "unet", _INVERTED, "2503.18454", remark=_CODE),
    Known("inpo-sdxl", "JaydenLu666/InPO-SDXL", _XL, "unet", _INVERTED, "2503.18454", remark=_CODE),
    Known("smpo-sd1.5", "JaydenLu666/SmPO-SD1.5", _SD, "unet", _PICKSCORE, "2506.02698", remark=_CODE),
    Known("smpo-sdxl", "JaydenLu666/SmPO-SDXL", _XL, "unet", _PICKSCORE, "2506.02698", remark=_CODE),
    Known("spo-sd1.5", "SPO-Diffusion-Models/SPO-SD-v1-5_4k-p_10ep", _SD, "unet", _STEPS, "2406.04314", licence=_APACHE),
    Known("spo-sdxl", "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep", _XL, "unet", _STEPS, "2406.04314", licence=_APACHE),
    Known(
        "mapo-sdxl", "mapo-t2i/mapo-beta", _XL, "unet", f"{_HUMAN}, without a model to compare with (MaPO)", "2406.06424",
        licence=_RAIL,
    ),
    Known(
        "kto-sd1.5", "jacklishufan/diffusion-kto", _SD, "unet", "likes and dislikes of single pictures, from Pick-a-Pic (KTO)",
        "2404.04465",
    ),
    Known("dro-sd1.5", "ylwu/diffusion-dro-sd1.5", _SD, "unet", NOT_KNOWN, NOT_KNOWN),
    Known(
        "ncp-dpo-sdxl", "alexgambashidze/SDXL_NCP-DPO_v0.1", _XL, "lora",
        "human choices; its authors report that 60.8 % prefer it to DPO for SDXL (NCP-DPO)", "2406.17636",
        remark="Already a LoRA: nothing has to be extracted.",
    ),
    Known(
        "chats-sd1.5", "AIDC-AI/CHATS-SD1d5", _SD, "two", "a preferred and a dispreferred model, sampled together (CHATS)",
        "2502.12579", remark=f"{_BOTH} {_CODE}",
    ),
    Known(
        "chats-sdxl", "AIDC-AI/CHATS", _XL, "two", "a preferred and a dispreferred model, sampled together (CHATS)",
        "2502.12579", remark=f"{_BOTH} {_CODE}",
    ),
)  # fmt: skip


def known(name: str) -> Known | None:
    """The reference of a name; None for another name."""
    return next((each for each in REFERENCES if each.name == name), None)
