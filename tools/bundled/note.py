"""The note beside the files: what they are, how they were made, what was measured on them, and their hashes.

After a study of the shipped files: `python -m tools.bundled.note study/figures.json`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lib_dpo.toy.bundled import BASE, CLIP, FOLDER, MEASURED, REFERENCE
from lib_dpo.toy.study import Findings
from tools.bundled.recipe import Recipe, Stage

_MEASURED, _FILES = "## What was measured", "## Files"
_HEAD = f"""\
# The bundled model

A small Stable Diffusion 1.5 that draws coloured shapes, 64 by 64 pixels, and a DPO tuning of it. It exists so that this
project can show on any machine, without a download, what a DPO offset does. Its pictures are toys; its files are not: they
have the names, layout and forms of the published ones, so every tool that opens those opens these.

| | |
|---|---|
| `{BASE}` | the base: one checkpoint in the layout of SD 1.5, fp16, with UNet, VAE and text encoder |
| `{BASE.replace(".safetensors", ".yaml")}` | its widths, for AUTOMATIC1111's WebUI; keep it beside the checkpoint |
| `{REFERENCE}` | the DPO reference: the UNet alone, in the naming of diffusers, fp16 |
| `{CLIP}/` | CLIP's tokenizer, and the text encoder's configuration |

**What it draws.** One to three shapes of one colour in one part of the picture: `two red circles on the left`. A prompt may
leave any of the four out. Colours: red, yellow, green, blue, purple, black; shapes: circle, square, triangle, cross; places:
on the left, on the right, at the top, at the bottom. It knows no other words.

**Why the base does not listen well.** The captions that it learnt from are careless, as those of real training sets are:
they take two for three and left for right nearly half of the time, and blue for purple and circles for squares often.

**What DPO taught it.** The Diffusion-DPO loss (arXiv 2311.12908, eq. 14) on pairs of the base's own pictures for one caption,
of which the judge finds that one fits it better (by its rule of then, which took squares with soft edges for circles).
UNet only, as with the published models.

**In AUTOMATIC1111's WebUI**: copy or link `{BASE}` and its `.yaml` into `models/Stable-diffusion`, and choose 64 × 64 pixels,
CFG scale 3. The `.yaml` names the folder `{CLIP}` as seen from the WebUI's own folder, for an extension that is installed as
`extensions/sd-webui-dpo`; change that line if yours has another name. Forge reads no such `.yaml` and cannot load it.
"""


def note(
    recipe: Recipe, hashes: Mapping[str, tuple[int, str]], figures: Mapping[str, Any] | None, *, device: str = "cpu"
) -> str:
    """The text of the note."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers"))
    lines = [
        _HEAD,
        "## How the files were made",
        "",
        "`python -m tools.train_bundled_model`, which draws its pictures itself.",
        "",
    ]
    lines += ["| | |", "|---|---|", f"| versions | {versions}, Python {platform.python_version()} |", f"| device | {device} |"]
    lines += [f"| {field.name} | {_shown(getattr(recipe, field.name))} |" for field in fields(recipe)]
    if figures:
        lines += ["", *_measured(figures)]
    lines += ["", _FILES, "", "| file | bytes | SHA-256 |", "|---|--:|---|"]
    lines += [f"| `{name}` | {size:,} | `{digest}` |" for name, (size, digest) in hashes.items()]
    return "\n".join([*lines, ""])


def measure_again(folder: Path, figures: Mapping[str, Any]) -> None:
    """Put the figures of a new study of the same files into their note, and beside it as `study.json`."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(_MEASURED)
    after = rest.split(_FILES)[1]
    path.write_text(before + "\n".join([*_measured(figures), "", _FILES]) + after, encoding="utf-8", newline="\n")
    write_measured(folder, figures)


def write_measured(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write what the demo shows beside figures of its own that too few pictures cannot tell apart."""
    text = json.dumps(Findings.from_json(figures).as_json(), indent=1)
    (folder / MEASURED).write_text(text + "\n", encoding="utf-8", newline="\n")


def _shown(value: Any) -> str:
    if isinstance(value, Stage):
        return f"{value.steps} steps of {value.batch}, rate {value.rate:g}"
    return str(value)


def _measured(figures: Mapping[str, Any]) -> list[str]:
    """Adherence: the share of pictures that show everything their prompt names, read off by `lib_dpo/toy/judge.py`."""
    n = figures["adherence"][0]["n"]
    lines = [_MEASURED, "", f"Share of {n} pictures of held-out prompts that show all that the prompt names.", ""]
    lines += ["| strength of the exact offset | share | 95 % interval |", "|--:|--:|---|"]
    for one in figures["adherence"]:
        lines.append(f"| {one['strength']:g} | {_percent(one['mean'])} | {_percent(one['low'])} to {_percent(one['high'])} |")
    low, high = (_points(figures["gain"][name]) for name in ("low", "high"))
    gain = f"{_points(figures['gain']['mean'])} points, 95 % interval {low} to {high}"
    turned = f"{figures['became_right']} became right and {figures['became_wrong']} became wrong"
    lines += ["", f"Gain at strength 1, same prompts and seeds: {gain}; {turned}."]
    for one in figures["loras"]:
        line = f"A LoRA of rank {one['rank']} keeps {_percent(one['energy_kept'])} of the offset's energy"
        if share := one["share_of_gain"]:
            kept, low, high = (_percent(share[name]) for name in ("mean", "low", "high"))
            line += f" and {kept} of the gain, 95 % interval {low} to {high}"
        lines.append(line + ".")
    first, last = figures["plateau"]
    lines.append(
        f"{n} pictures cannot tell strengths {first:g} to {last:g} from the best; `compat` suggests {figures['suggested']:g}."
    )
    return lines


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    measure_again(FOLDER, json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
