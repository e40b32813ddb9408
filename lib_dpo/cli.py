"""The command line: reads arguments, opens files, calls the engine, prints figures. No maths here."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lib_dpo import __version__
from lib_dpo.cli_pictures import add_commands as add_picture_commands
from lib_dpo.cli_reports import check_reports, progress_bar, write_json
from lib_dpo.errors import Cancelled, DpoError, SettingError, printable
from lib_dpo.settings import BUNDLED_MODEL, FIELDS, METHODS, PRECISIONS, PROFILES, ExtractSettings, RankPolicy, check

logger = logging.getLogger(__name__)

DONE, REFUSED, CANCELLED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 refused, 130 cancelled."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING, format="%(name)s: %(message)s")
    if not args.debug:  # diffusers asks for parts of transformers that want torchvision, which we do not need
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        started = time.perf_counter()
        check_reports(args)
        figures, text = args.run(args)
        figures = {"command": args.command, "version": __version__, **figures}
        figures["seconds"] = round(time.perf_counter() - started, 3)
        if args.json:
            write_json(args.json, figures)
        if text:
            print(text)
        sys.stdout.flush()  # here, where a reader that went away can be told from an error
    except (KeyboardInterrupt, Cancelled):
        print("cancelled", file=sys.stderr)
        return CANCELLED
    except DpoError as error:
        if args.debug:
            raise
        print(_error_line(str(error)), file=sys.stderr)
        return REFUSED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if args.debug:
            raise
        print(_error_line(str(error)), file=sys.stderr)
        return REFUSED
    except ModuleNotFoundError as error:
        if args.debug:
            raise
        advice = "use the Python whose path `make env` prints, or `pip install .` in the folder of this project"
        print(_error_line(f"{error.name} is not installed in this Python; {advice}"), file=sys.stderr)
        return REFUSED
    except Exception as error:
        if args.debug:
            raise
        devices = sys.modules.get("lib_dpo.devices")  # with torch, which may be missing or broken
        if isinstance(error, MemoryError) or (devices and devices.is_out_of_memory(error)):
            advice = "close other programs" + (", or choose --device cpu" if getattr(args, "device", "cpu") != "cpu" else "")
            print(_error_line(f"out of memory ({error}); {advice}".replace(" ()", "")), file=sys.stderr)
            return REFUSED
        logger.debug("unforeseen", exc_info=True)
        what = f"this should not happen: {type(error).__name__}: {error}"
        print(_error_line(what) + "; run again with --debug and report it", file=sys.stderr)
        return REFUSED
    return DONE


def _error_line(message: str) -> str:
    """One line of bounded length, whatever the names in a file may be."""
    line = printable(" ".join(message.split()))
    return "error: " + (line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…")


_LONGEST_LINE = 2000

# ---- arguments ----


class _Help(argparse.HelpFormatter):
    """Says defaults, where there are any and the text does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "default" in text or not action.option_strings or action.default in (None, False, "", argparse.SUPPRESS)
        return text if told else f"{text} (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    """argparse with our one line for errors."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **options})
        # a private name of argparse: before Python 3.14 it takes -1e-3 for an option
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> Any:
        self.exit(REFUSED, f"error: {' '.join(message.split())}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lib_dpo", description="DPO offsets: what preference tuning changed in a model, as a LoRA or baked in."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--json", type=Path, metavar="F", help="write the figures to a file too")
    common.add_argument("--overwrite", action="store_true", help="replace existing files")
    common.add_argument("--yes", action="store_true", help="agree to downloads of hub: names")
    common.add_argument("--debug", action="store_true", help="show tracebacks and the log")

    def command(name: str, run: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    sub = command("diff", _diff, "show what changed between a base and its tuned model")
    _pair_arguments(sub)
    sub.add_argument("--plot", type=Path, metavar="F.png", help="write a picture too (computes all spectra)")
    sub.add_argument("--device", default="auto", help=FIELDS["device"].help)

    sub = command("extract", _extract, "extract a LoRA from a base and its tuned model")
    _pair_arguments(sub)
    _output_arguments(sub, "L.safetensors")
    _rank_arguments(sub)
    sub.add_argument("--conv-rank", type=_number(int), metavar="N", help=FIELDS["conv_rank"].help)
    sub.add_argument("--method", choices=METHODS, default="auto", help=FIELDS["method"].help)
    sub.add_argument("--profile", choices=PROFILES, default="portable", help=FIELDS["profile"].help)
    sub.add_argument("--precision", choices=PRECISIONS, default="fp16", help=FIELDS["precision"].help)
    sub.add_argument("--device", default="auto", help=FIELDS["device"].help)
    sub.add_argument("--seed", type=_number(int), default=0, help=FIELDS["seed"].help)

    sub = command("offset", _offset, "write the dense offset file (tuned minus base, UNet)")
    _pair_arguments(sub)
    _output_arguments(sub, "O.safetensors")
    sub.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help=FIELDS["precision"].help)

    sub = command("verify", _verify, "measure how much of the offset a LoRA or offset file holds")
    sub.add_argument("--lora", required=True, metavar="L", help="the LoRA or offset file")
    _pair_arguments(sub)

    sub = command("bake", _bake, "add an offset to a checkpoint and write a new one")
    sub.add_argument("--target", required=True, metavar="C", help="the checkpoint")
    sub.add_argument("--offset", required=True, metavar="L_or_O", help="a LoRA or an offset file")
    _output_arguments(sub, "OUT.safetensors")
    sub.add_argument("--strength", type=_number(float), default=1.0, help=FIELDS["strength"].help)
    sub.add_argument("--blocks", default="", help=FIELDS["blocks"].help)
    sub.add_argument("--precision", choices=("keep", *PRECISIONS), default="keep", help=FIELDS["precision"].help)

    sub = command("resize", _resize, "make a LoRA smaller, from its factors alone")
    sub.add_argument("--lora", required=True, metavar="L", help="the LoRA")
    _output_arguments(sub, "L2.safetensors")
    _rank_arguments(sub)
    sub.add_argument("--conv-rank", type=_number(int), metavar="N", help=FIELDS["conv_rank"].help)
    sub.add_argument("--precision", choices=("keep", *PRECISIONS), default="keep", help=FIELDS["precision"].help)

    sub = command("inspect", _inspect, "say what a file is")
    sub.add_argument("file", metavar="FILE")

    sub = command("compat", _compat, "say whether the offset fits a finetune, and whether DPO is in it already")
    sub.add_argument("--target", required=True, metavar="C", help="the finetune")
    _pair_arguments(sub)

    add_picture_commands(command, _number)

    sub = command("demo", _demo, "the whole story on the bundled model, with pictures that are judged, without a network")
    sub.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder to write to (default: demo, or study)")
    sub.add_argument("--study", action="store_true", help="many more pictures and strengths: a quarter of an hour or so")
    sub.add_argument("--pictures", type=_number(int), metavar="N", help=FIELDS["pictures"].help)
    sub.add_argument("--model", type=Path, default=BUNDLED_MODEL, metavar="DIR", help="folder of the bundled model")
    return parser


def _pair_arguments(sub: argparse.ArgumentParser) -> None:
    files = "a .safetensors or .ckpt file, a diffusers folder, or hub:owner/name[/file]"
    sub.add_argument("--base", required=True, metavar="B", help=f"the model before preference tuning: {files}")
    sub.add_argument("--tuned", required=True, metavar="T", help="the model after it (the DPO reference)")


def _output_arguments(sub: argparse.ArgumentParser, name: str) -> None:
    sub.add_argument("-o", "--output", required=True, type=Path, metavar=name, help="the file to write")


def _rank_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--rank", type=_number(int), metavar="N", help=FIELDS["rank"].help)
    sub.add_argument("--energy", type=_number(float), metavar="E", help=FIELDS["energy"].help)
    sub.add_argument("--size-mb", type=_number(float), metavar="MB", help=FIELDS["size_mb"].help)


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None

    return read


def _policy(args: argparse.Namespace) -> RankPolicy:
    return RankPolicy(rank=args.rank, energy=args.energy, size_mb=args.size_mb, conv_rank=args.conv_rank)


# ---- files ----


def _path(args: argparse.Namespace, spec: str) -> Path:
    from lib_dpo.hub import resolve

    return resolve(spec, consent=lambda question: _agreed(args, question))


def _agreed(args: argparse.Namespace, question: str) -> bool:
    if args.yes:
        return True
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


@contextmanager
def _pair(args: argparse.Namespace) -> Iterator[Any]:
    from lib_dpo.model import open_model
    from lib_dpo.offset import open_pair

    with ExitStack() as stack:
        models = [stack.enter_context(open_model(_path(args, spec))) for spec in (args.base, args.tuned)]
        yield open_pair(*models)


def _sources(base: Any, tuned: Any) -> Callable[[], dict[str, str]]:
    """Start hashing both files; the result waits for the hashes and gives them as metadata."""
    from lib_dpo.checkpoint import sha256_in_background

    waiting = {"dpo.base_sha256": sha256_in_background(base), "dpo.tuned_sha256": sha256_in_background(tuned)}
    return lambda: {name: wait() for name, wait in waiting.items()}


# ---- commands: each returns its figures and the text to print ----

Result = tuple[dict[str, Any], str]


def _diff(args: argparse.Namespace) -> Result:
    from lib_dpo.analyse import diff
    from lib_dpo.report import diff_text

    with _pair(args) as pair, progress_bar("comparing") as tell:
        report = diff(pair, spectra=args.plot is not None, device=args.device, on_progress=tell)
    if args.plot:
        from lib_dpo.plots import plot_diff

        plot_diff(report, args.plot)
    return report.as_json(), diff_text(report) + (f"\npicture: {args.plot}" if args.plot else "")


def _extract(args: argparse.Namespace) -> Result:
    from lib_dpo.extract import extract
    from lib_dpo.report import extract_text
    from lib_dpo.writer import check_output, check_safetensors_output

    check_safetensors_output(args.output, overwrite=args.overwrite)
    settings = ExtractSettings(_policy(args), args.method, args.profile, args.precision, args.device, args.seed)
    with _pair(args) as pair, progress_bar("extracting") as tell:
        files = (*pair.base.checkpoint.files, *pair.tuned.checkpoint.files)
        check_output(args.output, overwrite=args.overwrite, inputs=files)
        source = _sources(pair.base.checkpoint, pair.tuned.checkpoint)
        report = extract(pair, args.output, settings, overwrite=args.overwrite, source=source, on_progress=tell)
    return report.as_json(), extract_text(report)


def _offset(args: argparse.Namespace) -> Result:
    from lib_dpo.dense import write_offset
    from lib_dpo.report import offset_text
    from lib_dpo.writer import check_output, check_safetensors_output

    check_safetensors_output(args.output, overwrite=args.overwrite)
    with _pair(args) as pair, progress_bar("writing") as tell:
        files = (*pair.base.checkpoint.files, *pair.tuned.checkpoint.files)
        check_output(args.output, overwrite=args.overwrite, inputs=files)
        source = _sources(pair.base.checkpoint, pair.tuned.checkpoint)
        report = write_offset(
            pair, args.output, precision=args.precision, overwrite=args.overwrite, source=source, on_progress=tell
        )
    return report.as_json(), offset_text(report)


def _verify(args: argparse.Namespace) -> Result:
    from lib_dpo.lora import open_offset
    from lib_dpo.report import verify_text
    from lib_dpo.verify import verify

    with _pair(args) as pair, progress_bar("verifying") as tell:
        checkpoint, offset = open_offset(_path(args, args.lora), pair.architecture)
        with checkpoint:
            report = verify(offset, pair, on_progress=tell)
    return report.as_json(), verify_text(report)


def _bake(args: argparse.Namespace) -> Result:
    from lib_dpo.bake import bake, check_sidecar
    from lib_dpo.checkpoint import sha256_in_background
    from lib_dpo.keymap import parse_blocks
    from lib_dpo.lora import open_offset
    from lib_dpo.model import open_model
    from lib_dpo.report import bake_text
    from lib_dpo.writer import check_output, check_safetensors_output

    check("strength", args.strength)
    blocks = parse_blocks(args.blocks)
    check_safetensors_output(args.output, overwrite=args.overwrite)
    check_sidecar(Path(args.target), args.output, overwrite=args.overwrite)  # what a hub: name stands for has none
    with ExitStack() as stack:
        target = stack.enter_context(open_model(_path(args, args.target)))
        checkpoint, offset = open_offset(_path(args, args.offset), target.architecture)
        stack.enter_context(checkpoint)
        tell = stack.enter_context(progress_bar("baking"))
        check_output(args.output, overwrite=args.overwrite, inputs=(*target.checkpoint.files, *checkpoint.files))
        waiting = [sha256_in_background(file) for file in (target.checkpoint, checkpoint)]
        report = bake(
            target,
            offset,
            args.output,
            strength=args.strength,
            blocks=blocks,
            precision=args.precision,
            overwrite=args.overwrite,
            hashes=lambda: (waiting[0](), waiting[1]()),
            on_progress=tell,
        )
    return report.as_json(), bake_text(report)


def _resize(args: argparse.Namespace) -> Result:
    from lib_dpo.checkpoint import open_checkpoint
    from lib_dpo.report import resize_text
    from lib_dpo.resize import resize
    from lib_dpo.writer import check_output, check_safetensors_output

    if args.rank is None and args.energy is None and args.size_mb is None:
        raise SettingError("resize needs a new rank, energy or size; give --rank, --energy or --size-mb")
    check_safetensors_output(args.output, overwrite=args.overwrite)
    with open_checkpoint(_path(args, args.lora)) as lora, progress_bar("resizing") as tell:
        check_output(args.output, overwrite=args.overwrite, inputs=lora.files)
        report = resize(lora, args.output, _policy(args), precision=args.precision, overwrite=args.overwrite, on_progress=tell)
    return report.as_json(), resize_text(report)


def _inspect(args: argparse.Namespace) -> Result:
    from lib_dpo.inspection import inspect
    from lib_dpo.report import inspect_text

    found = inspect(_path(args, args.file))
    return found.as_json(), inspect_text(found)


def _compat(args: argparse.Namespace) -> Result:
    from lib_dpo.compat import compat
    from lib_dpo.model import open_model
    from lib_dpo.report import compat_text

    with open_model(_path(args, args.target)) as target, _pair(args) as pair, progress_bar("comparing") as tell:
        report = compat(target, pair, on_progress=tell)
    return report.as_json(), compat_text(report)


def _demo(args: argparse.Namespace) -> Result:
    from dataclasses import replace

    from tqdm import tqdm

    from lib_dpo.demo import demo
    from lib_dpo.toy.series import SHORT, STUDY

    check("pictures", args.pictures)
    amount = STUDY if args.study else SHORT
    if args.pictures is not None:
        amount = replace(amount, pictures=args.pictures)
    folder = args.output or Path("study" if args.study else "demo")
    with progress_bar("drawing") as tell:
        figures = demo(
            folder,
            model=args.model,
            amount=amount,
            overwrite=args.overwrite,
            say=lambda line: tqdm.write(line),  # above the bar
            on_progress=lambda done, total: tell(done, total, "pictures"),
        )
    return figures, ""
