"""The WebUIs that the suite knows: told from the folder, how to start them on a CPU, and what they cannot do by nature."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_A1111_LIKE = ("--skip-prepare-environment", "--skip-python-version-check", "--skip-torch-cuda-test", "--skip-version-check",
               "--no-download-sd-model", "--api")  # fmt: skip
_FORGE_LIKE = (*_A1111_LIKE, "--always-cpu", "--skip-install")
_NEO_LIKE = (*(flag for flag in _A1111_LIKE if flag != "--no-download-sd-model"), "--skip-install", "--cpu", "--fp16-unet")
_SAME_MODULES = ("hr_additional_modules", ["Use same choices"])
# Their API takes styles from an infotext by isinstance(…, list[str]), which raises: any infotext is answered with 500.
_NO_STYLES: tuple[str, object] = ("styles", [])


@dataclass(frozen=True)
class Flavour:
    """One kind of WebUI."""

    name: str  # as its status tells it
    flags: tuple[str, ...]
    any_width: bool = False  # takes models of any width, from a .yaml beside the checkpoint; the others guess it from shapes
    loads_late: bool = False  # choosing a checkpoint loads nothing until the next picture
    same_as_prompt: bool = False  # applies our offset by the same code as a LoRA of the prompt: equal to the pixel
    infotext_needs: tuple[tuple[str, object], ...] = ()  # what an API request with an infotext needs beside it
    vae_comes_back: bool = True  # choosing "Automatic" again brings back the VAE of the checkpoint
    rounds_anew: bool = False  # its own pictures differ by a grey level here and there between a model just loaded and one used
    hires: tuple[tuple[str, object], ...] = ()  # what a hires request needs beside the usual, or in its place
    pictures_in_files: bool = False  # its page gets the pictures of an answer by files (gradio 4), not in the answer (3)
    own_tokenizer: bool = False  # brings the tokenizer's files in its own folder
    vae_of_checkpoint: bool = False  # a VAE is part of the choice of checkpoint: choosing one loads the model anew


A1111 = Flavour("AUTOMATIC1111", (*_A1111_LIKE, "--use-cpu", "all", "--no-half"), any_width=True, same_as_prompt=True)
FORGE = Flavour(
    "Forge",
    _FORGE_LIKE,
    loads_late=True,
    infotext_needs=(_NO_STYLES,),  # f2.0.1v1.10.1
    hires=(_SAME_MODULES,),
    pictures_in_files=True,
    vae_of_checkpoint=True,
)
NEO = Flavour(
    "Forge Neo",
    _NEO_LIKE,  # it ignores flags that it does not know, and would look for a GPU
    loads_late=True,
    infotext_needs=(_NO_STYLES,),  # 2.26
    hires=(_SAME_MODULES, ("hr_upscaler", "None")),  # it has no latent ones; this one it has without any model file
    rounds_anew=True,  # 2.26 on a CPU, with this extension or without
    own_tokenizer=True,
    pictures_in_files=True,
    vae_of_checkpoint=True,
)
REFORGE = Flavour("reForge", _FORGE_LIKE, vae_comes_back=False)  # with this extension or without, at 3b56b268
CLASSIC = Flavour("Forge Classic", _FORGE_LIKE)


def flavour_of(webui: Path) -> Flavour:
    """The kind of an installed WebUI."""
    if not (webui / "launch.py").is_file() or not (webui / "modules").is_dir():
        raise SystemExit(f"{webui}: no WebUI is here; expected the folder with launch.py and modules/")
    if not (webui / "modules_forge").is_dir():
        return A1111
    version = webui / "modules_forge" / "forge_version.py"
    if version.is_file() and re.search(r"^version\s*=\s*[\"']neo", version.read_text(encoding="utf-8"), re.MULTILINE):
        return NEO
    if (webui / "backend").is_dir():
        return FORGE
    return CLASSIC if (webui / "extensions-builtin" / "xyz").is_dir() else REFORGE
