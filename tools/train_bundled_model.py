"""Make the bundled model and its DPO reference from nothing, and measure them.

    python -m tools.train_bundled_model --work build/bundled            all stages, then the files and the figures
    python -m tools.train_bundled_model --work build/bundled --smoke    the same in seconds; the pictures are noise

Run it from the folder of the repository with the packages of `pip install '.[standalone]'`. It goes on where it was
stopped: --work keeps the state of every stage. --bpe is the file of merges that the packages open_clip_torch and
clip-anytorch ship; without it the tokenizer's files of the bundled model are used again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lib_dpo.maths.devices import resolve_device
from lib_dpo.toy import bundled
from lib_dpo.toy.demo import demo
from lib_dpo.toy.series import STUDY
from tools.bundled import autoencoder, denoiser, files, note, preference, text_encoder
from tools.bundled.recipe import SHIPPED, SMOKE, Recipe

_CPU = torch.device("cpu")


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the state of every stage")
    parser.add_argument("--out", type=Path, help="folder for the files (default: WORK/model)")
    parser.add_argument("--bpe", type=Path, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage")
    parser.add_argument("--threads", type=int, help="of torch; the shipped files were made with one")
    parser.add_argument(
        "--device", default="cpu", help="of the training: cpu, as the shipped files were made on, cuda, mps or auto"
    )
    parser.add_argument("--measure", type=int, default=0, metavar="N", help="then study it, N pictures a side")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    out = args.out or args.work / "model"

    def say(line: str) -> None:
        print(line, flush=True)

    recipe = SMOKE if args.smoke else SHIPPED
    device = resolve_device(args.device)
    make(recipe, args.work, out, bpe=args.bpe, say=say, device=device)
    figures = None
    if args.measure:
        amount = replace(STUDY, pictures=args.measure)
        figures = demo(args.work / "study", model=out, amount=amount, overwrite=True, say=say)
        note.write_measured(out, figures)
    (args.work / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    (out / "README.md").write_text(
        note.note(recipe, files.hashes(out), figures, device=str(device)), encoding="utf-8", newline="\n"
    )
    say(f"the files and a note of them are in {out}")


def make(
    recipe: Recipe, work: Path, out: Path, *, bpe: Path | None, say: Callable[[str], None], device: torch.device = _CPU
) -> None:
    """All stages on a device of torch's, each going on from its state in `work`, and the files in `out`.

    What is drawn at random is the same on every device. Its arithmetic rounds in its own way, which in the end changes which
    pictures are compared too: another device makes another model, as good as this one.
    """
    clip = out / bundled.CLIP
    if bpe:
        text_encoder.write_tokenizer(bpe, clip, recipe)
    else:
        text_encoder.copy_tokenizer(bundled.FOLDER / bundled.CLIP, clip, recipe)
    tokenizer = _tokenizer(clip)
    vae = autoencoder.fit(recipe, work, say, device)
    text = text_encoder.fit(recipe, tokenizer, work, say, device)
    world = denoiser.make_world(recipe, vae, text, tokenizer)
    base = denoiser.fit(recipe, world, work, say)
    files.write_base(out, vae, text, base, recipe)
    tuned = preference.fit(recipe, world, base, vae, work, say)
    files.write_reference(out, tuned)


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


if __name__ == "__main__":
    main()
