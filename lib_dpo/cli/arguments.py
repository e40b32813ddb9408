"""What can be typed after `dpo`: commands, options and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from lib_dpo import __version__
from lib_dpo.cli.argparse_errors import Parser, among, number, program
from lib_dpo.cli.files import input_folder, output_file, output_folder
from lib_dpo.cli.pictures import add_commands as add_picture_commands
from lib_dpo.cli.pictures import add_function_arguments
from lib_dpo.settings import BUNDLED_MODEL, FIELDS, FORMS, LORA_PRECISIONS, METHODS, PRECISIONS, PROFILES

_INSPECTED = "a model, a LoRA or an offset file; several, or a pattern such as *.safetensors"
Command = Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]
Runs = Mapping[str, Callable[..., Any]]


def make_parser(runs: Runs) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        runs: what each command but those for pictures does with its arguments, by name.
    """
    parser = Parser(
        prog=program(), description="DPO offsets: what preference tuning changed in a model, as a LoRA or baked in."
    )
    parser.add_argument("--version", action="version", version=f"dpo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    common = Parser(add_help=False)
    common.add_argument("--json", type=output_file, metavar="F", help="write the figures to a file too")
    common.add_argument("--overwrite", action="store_true", help="replace existing files")
    common.add_argument("--yes", action="store_true", help="agree to downloads of hub: names")
    common.add_argument("--debug", action="store_true", help="show tracebacks and the log")

    def command(name: str, run: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    _add_extraction(command, runs)
    _add_use(command, runs)
    add_picture_commands(command)
    _add_demo(command, runs)
    return parser


def _add_extraction(command: Command, runs: Runs) -> None:
    """From a pair to its offset."""
    sub = command("diff", runs["diff"], "show what changed between a base and its tuned model")
    _pair_arguments(sub)
    sub.add_argument(
        "--plot",
        type=output_file,
        metavar="F.png",
        help="draw where the change lies and what LoRAs of several sizes keep (slower)",
    )
    sub.add_argument("--dark", action="store_true", help="draw it for a dark page")
    sub.add_argument("--device", default="auto", help=FIELDS["device"].help)

    sub = command("extract", runs["extract"], "extract a LoRA from a base and its tuned model")
    _pair_arguments(sub)
    _output_arguments(sub, "L.safetensors")
    _rank_arguments(sub)
    sub.add_argument("--conv-rank", type=number(int), metavar="N", help=FIELDS["conv_rank"].help)
    sub.add_argument("--form", **among(FORMS), default="low-rank", help=FIELDS["form"].help)
    sub.add_argument("--method", **among(METHODS), default="auto", help=FIELDS["method"].help)
    sub.add_argument("--profile", **among(PROFILES), default="portable", help=FIELDS["profile"].help)
    sub.add_argument("--precision", **among(LORA_PRECISIONS), default="fp16", help=FIELDS["lora_precision"].help)
    sub.add_argument("--device", default="auto", help=FIELDS["device"].help)
    sub.add_argument("--seed", type=number(int), default=0, help=FIELDS["seed"].help)
    _card_argument(sub)

    sub = command("offset", runs["offset"], "write the offset file: the whole change of the UNet, tuned minus base")
    _pair_arguments(sub)
    _output_arguments(sub, "O.safetensors")
    sub.add_argument("--precision", **among(("fp32", "fp16", "bf16")), default="fp32", help=FIELDS["precision"].help)

    sub = command("verify", runs["verify"], "measure how much of the offset a LoRA or offset file holds")
    sub.add_argument("--lora", required=True, metavar="L", help="the LoRA or offset file")
    _pair_arguments(sub)
    add_function_arguments(sub)


def _add_use(command: Command, runs: Runs) -> None:
    """With an offset, on other files."""
    sub = command("bake", runs["bake"], "add an offset to a checkpoint and write a new one")
    sub.add_argument("--target", required=True, metavar="C", help="the checkpoint")
    sub.add_argument("--offset", required=True, metavar="L_or_O", help="a LoRA or an offset file")
    _output_arguments(sub, "OUT.safetensors")
    sub.add_argument("--strength", type=number(float), default=1.0, help=FIELDS["strength"].help)
    sub.add_argument("--blocks", default="", help=FIELDS["blocks"].help)
    sub.add_argument("--precision", **among(("keep", *PRECISIONS)), default="keep", help=FIELDS["precision"].help)

    sub = command("resize", runs["resize"], "make a LoRA smaller, from its factors alone")
    sub.add_argument("--lora", required=True, metavar="L", help="the LoRA")
    _output_arguments(sub, "L2.safetensors")
    _rank_arguments(sub, "of the smaller LoRA")
    sub.add_argument("--conv-rank", type=number(int), metavar="N", help=FIELDS["conv_rank"].help)
    sub.add_argument("--precision", **among(("keep", *LORA_PRECISIONS)), default="keep", help=FIELDS["lora_precision"].help)
    _card_argument(sub)

    sub = command("inspect", runs["inspect"], "say what files are")
    sub.add_argument("file", nargs="+", metavar="FILE", help=_INSPECTED)

    sub = command("compat", runs["compat"], "say whether the offset fits a finetune or merge, and whether DPO is in it already")
    sub.add_argument("--target", required=True, metavar="C", help="the finetune")
    _pair_arguments(sub)


def _add_demo(command: Command, runs: Runs) -> None:
    sub = command(
        "demo",
        runs["demo"],
        "show it all on the toy model that comes along: measure, extract, bake, draw and judge pictures; needs no network",
    )
    sub.add_argument("-o", "--output", type=output_folder, metavar="DIR", help="folder to write to (default: demo, or study)")
    sub.add_argument(
        "--study", action="store_true", help="draw 500 pictures a point, at more strengths: takes a quarter of an hour or more"
    )
    sub.add_argument("--pictures", type=number(int), metavar="N", help=FIELDS["pictures"].help)
    sub.add_argument("--model", type=input_folder, default=BUNDLED_MODEL, metavar="DIR", help="folder of the toy model")


def _pair_arguments(sub: argparse.ArgumentParser) -> None:
    files = "a .safetensors or .ckpt file, a diffusers folder, or hub:owner/name[/file]"
    sub.add_argument("--base", required=True, metavar="B", help=f"the model before preference tuning: {files}")
    sub.add_argument("--tuned", required=True, metavar="T", help="the model after it (the DPO reference)")


def _output_arguments(sub: argparse.ArgumentParser, name: str) -> None:
    sub.add_argument("-o", "--output", required=True, type=output_file, metavar=name, help="the file to write")


def _card_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--no-card", dest="card", action="store_false", help="write no L.json beside it, which the LoRA lists of WebUIs read"
    )


def _rank_arguments(sub: argparse.ArgumentParser, rank: str = FIELDS["rank"].help) -> None:
    sub.add_argument("--rank", type=number(int), metavar="N", help=rank)
    sub.add_argument("--energy", type=number(float), metavar="E", help=FIELDS["energy"].help)
    sub.add_argument("--size-mb", type=number(float), metavar="MB", help=FIELDS["size_mb"].help)
