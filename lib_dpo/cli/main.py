"""The command line: reads arguments, opens files, calls the engine, prints figures. No maths here."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lib_dpo
from lib_dpo import __version__
from lib_dpo.cli.argparse_errors import REFUSED
from lib_dpo.cli.arguments import Runs, make_parser
from lib_dpo.cli.files import check_inputs_apart, check_not_swapped, folders_to_make, input_file, input_files, unquoted
from lib_dpo.cli.output import check_reports, progress_bar, write_json
from lib_dpo.cli.words import with_flags
from lib_dpo.errors import Cancelled, DpoError, SettingError, printable, this_python
from lib_dpo.maths.processes import launched, together
from lib_dpo.settings import ExtractSettings, RankPolicy, check, strength_to_bake

logger = logging.getLogger(__name__)

DONE, CANCELLED = 0, 130  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 refused, 130 cancelled."""
    args = make_parser(_runs()).parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING, format="%(name)s: %(message)s")
    if not args.debug:  # diffusers asks for parts of transformers that want torchvision, which we do not need
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        _check_may_be_shared(args.command)
        with together() as args.processes:
            return _run(args)
    except (KeyboardInterrupt, Cancelled):
        print("cancelled", file=sys.stderr)
        return CANCELLED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if args.debug:
            raise
        print(_error_line(_explained(error, args)), file=sys.stderr)
        return REFUSED


def _run(args: argparse.Namespace) -> int:
    """The command that was parsed. Of several processes the first one alone comes back."""
    started = time.perf_counter()
    if args.processes.first:
        check_reports(args)
        check_inputs_apart(args)
    made = folders_to_make(_outputs(args))
    figures, text = args.run(args)
    figures = {"command": args.command, "version": __version__, "inputs": _inputs(args), **figures}
    figures["seconds"] = round(time.perf_counter() - started, 3)
    if args.json:
        write_json(args.json, figures)
    lines = [*filter(None, [text]), *(f"made the folder {folder}" for folder in made if folder.is_dir())]
    if lines:
        print("\n".join(lines))
    sys.stdout.flush()  # here, where a reader that went away can be told from an error
    return REFUSED if figures.get("refused") else DONE


def _check_may_be_shared(command: str) -> None:
    """Refuse several processes where all would do the same work and write the same file. Raises SettingError."""
    if launched() > 1 and command not in _SHARED:
        raise SettingError(
            f"{launched()} processes were launched, and {command} is work for one: run it without accelerate launch, or with "
            f"--num_processes 1; several share the pictures of {' and '.join(_SHARED)}"
        )


_SHARED = ("compare", "demo")


def _explained(error: Exception, args: argparse.Namespace) -> str:
    """An error in the words of one line."""
    if isinstance(error, DpoError):
        return with_flags(str(error))
    if isinstance(error, ModuleNotFoundError):
        advice = f"run `{this_python()} -m pip install .` in the folder of this project, or use the Python of your WebUI"
        return f"{error.name} is not installed in this Python; {advice}"
    devices = sys.modules.get("lib_dpo.maths.devices")  # with torch, which may be missing or broken
    if isinstance(error, MemoryError) or (devices and devices.is_out_of_memory(error)):
        advice = "close other programs" + (", or choose --device cpu" if getattr(args, "device", "cpu") != "cpu" else "")
        return f"out of memory ({error}); {advice}".replace(" ()", "")
    if isinstance(error, OSError):
        return with_flags(str(error))
    logger.debug("unforeseen", exc_info=True)
    return f"this should not happen: {type(error).__name__}: {error}; run again with --debug and report it"


def _runs() -> Runs:
    return {
        "diff": _diff, "extract": _extract, "offset": _offset, "verify": _verify, "bake": _bake, "resize": _resize,
        "inspect": _inspect, "compat": _compat, "demo": _demo,
    }  # fmt: skip


def _error_line(message: str) -> str:
    """One line of bounded length, whatever the names in a file may be."""
    line = printable(" ".join(message.split()))
    return "error: " + (line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…")


_LONGEST_LINE = 2000


def _inputs(args: argparse.Namespace) -> dict[str, Any]:
    """What was read, as it was given."""
    given = {name: getattr(args, name, None) for name in ("file", "model", "target", "base", "tuned", "lora", "offset")}
    if given["file"] and len(given["file"]) == 1:
        (given["file"],) = given["file"]
    return {name: value if name == "file" else str(value) for name, value in given.items() if value is not None}


def _outputs(args: argparse.Namespace) -> list[Path | None]:
    """The files that will be written, as far as their names are given."""
    each, output = getattr(args, "each", None), getattr(args, "output", None)
    if output and args.command == "demo":
        output /= "report.html"
    return [output, args.json, getattr(args, "plot", None), each and each / "picture.png"]


def _ranks(args: argparse.Namespace) -> dict[str, Any]:
    """How ranks are chosen. Raises SettingError where that cannot be, before anything is fetched."""
    ranks = {"rank": args.rank, "energy": args.energy, "size_mb": args.size_mb, "conv_rank": args.conv_rank}
    RankPolicy(**ranks)
    return ranks


@contextmanager
def _pair(args: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """Base and tuned, opened; a base that cannot be read is refused before tuned is fetched."""
    with lib_dpo.open_model(input_file(args, args.base)) as base, lib_dpo.open_model(input_file(args, args.tuned)) as tuned:
        yield base, tuned


# ---- commands: each returns its figures and the text to print ----

Result = tuple[dict[str, Any], str]


def _diff(args: argparse.Namespace) -> Result:
    from lib_dpo.cli.text import diff_text

    with _pair(args) as pair, progress_bar("comparing") as tell:
        report = lib_dpo.diff(*pair, spectra=args.plot is not None, device=args.device, progress=tell)
    if args.plot:
        from lib_dpo.pictures.plots import plot_diff

        plot_diff(report, args.plot, dark=args.dark)
    return report.as_json(), diff_text(report) + (f"\npicture: {args.plot}" if args.plot else "")


def _extract(args: argparse.Namespace) -> Result:
    from lib_dpo.cli.text import extract_text
    from lib_dpo.files.atomic import check_safetensors_output

    check_safetensors_output(args.output, overwrite=args.overwrite)  # before anything is fetched, here and below
    ranks = _ranks(args)
    ExtractSettings(RankPolicy(**ranks), args.method, args.profile, args.precision, args.device, args.seed, args.form)
    with _pair(args) as pair, progress_bar("extracting") as tell:
        report = lib_dpo.extract(
            *pair,
            args.output,
            **ranks,
            method=args.method,
            profile=args.profile,
            precision=args.precision,
            device=args.device,
            seed=args.seed,
            form=args.form,
            overwrite=args.overwrite,
            card=_wants_card(args),
            progress=tell,
        )
    return report.as_json(), extract_text(report)


def _offset(args: argparse.Namespace) -> Result:
    from lib_dpo.cli.text import offset_text
    from lib_dpo.files.atomic import check_safetensors_output

    check_safetensors_output(args.output, overwrite=args.overwrite)
    with _pair(args) as pair, progress_bar("writing") as tell:
        report = lib_dpo.write_offset(*pair, args.output, precision=args.precision, overwrite=args.overwrite, progress=tell)
    return report.as_json(), offset_text(report)


def _verify(args: argparse.Namespace) -> Result:
    from lib_dpo.cli.pictures import check_function, measure_function
    from lib_dpo.cli.text import function_text, verify_text

    check_function(args)
    with _pair(args) as pair:
        lora = input_file(args, args.lora)
        with progress_bar("verifying") as tell:
            report = lib_dpo.verify(lora, *pair, progress=tell)
        if not args.function:
            return report.as_json(), verify_text(report)
        function = measure_function(args, lora, pair)
    return {**report.as_json(), **function.as_json()}, f"{function_text(function)}\n{verify_text(report)}"


def _bake(args: argparse.Namespace) -> Result:
    from lib_dpo.cli.text import bake_text
    from lib_dpo.families.blocks import parse_blocks
    from lib_dpo.files.atomic import check_safetensors_output
    from lib_dpo.files.sidecar import check_sidecar

    strength, blocks = strength_to_bake(args.strength), parse_blocks(args.blocks)
    check_safetensors_output(args.output, overwrite=args.overwrite)
    typed = Path(os.path.expanduser(unquoted(args.target)))
    check_sidecar(typed, args.output, overwrite=args.overwrite)  # what a hub: name stands for has none
    target, offset = input_file(args, args.target), input_file(args, args.offset)
    check_not_swapped("--target", target, "--offset", offset)
    with progress_bar("baking") as tell:
        report = lib_dpo.bake(
            target,
            offset,
            args.output,
            strength=strength,
            blocks=blocks,
            precision=args.precision,
            overwrite=args.overwrite,
            progress=tell,
        )
    return report.as_json(), bake_text(report)


def _resize(args: argparse.Namespace) -> Result:
    from lib_dpo.cli.text import resize_text
    from lib_dpo.files.atomic import check_safetensors_output

    ranks = _ranks(args)
    if args.rank is None and args.energy is None and args.size_mb is None:
        raise SettingError("resize needs a new rank, energy or size; give --rank, --energy or --size-mb")
    check_safetensors_output(args.output, overwrite=args.overwrite)
    lora = input_file(args, args.lora)
    with progress_bar("resizing") as tell:
        report = lib_dpo.resize(
            lora,
            args.output,
            **ranks,
            precision=args.precision,
            overwrite=args.overwrite,
            card=_wants_card(args),
            progress=tell,
        )
    return report.as_json(), resize_text(report)


def _wants_card(args: argparse.Namespace) -> bool:
    """Whether the LoRA is to have a card, and its name is free: a report may be asked for under that."""
    return args.card and not (args.json and args.json.absolute() == args.output.with_suffix(".json").absolute())


def _inspect(args: argparse.Namespace) -> Result:
    from lib_dpo.cli.text import inspect_text

    def one(typed: str | Path) -> Result:
        found = lib_dpo.inspect(input_file(args, typed))
        return found.as_json(), inspect_text(found)

    named = list(_each_file(args.file))
    if len(named) == 1:
        figures, text = one(named[0])
        return {**figures, "files": [figures]}, text
    files, texts = [], []
    for typed in named:
        try:
            figures, text = one(typed)
        except Exception as error:  # one bad file does not hide the others
            if args.debug or isinstance(error, Cancelled):
                raise
            figures, text = {"path": str(typed), "error": _explained(error, args)}, ""
            print(_error_line(figures["error"]), file=sys.stderr)
        files.append(figures)
        texts.append(text)
    refused = sum("error" in figures for figures in files)
    told = [*filter(None, texts), f"{len(files)} files, {refused} of them refused" if refused else f"{len(files)} files"]
    return {"files": files, "refused": refused}, "\n\n".join(told)


def _each_file(names: Sequence[str]) -> Iterator[str | Path]:
    """The files that patterns stand for, each once; what fits none is passed on, to be refused in its turn."""
    seen: dict[str, str | Path] = {}
    for name in names:
        try:
            found: Sequence[str | Path] = [name] if name.startswith("hub:") else input_files(name)
        except DpoError:
            found = [name]
        seen.update({str(path): path for path in found})
    yield from seen.values()


def _compat(args: argparse.Namespace) -> Result:
    from lib_dpo.cli.text import compat_text

    with (
        lib_dpo.open_model(input_file(args, args.target)) as target,
        _pair(args) as pair,
        progress_bar("comparing") as tell,
    ):
        report = lib_dpo.compat(target, *pair, progress=tell)
    return report.as_json(), compat_text(report)


def _demo(args: argparse.Namespace) -> Result:
    from dataclasses import replace

    from tqdm import tqdm

    from lib_dpo.toy.demo import demo
    from lib_dpo.toy.series import SHORT, STUDY

    check("pictures", args.pictures)
    amount = STUDY if args.study else SHORT
    if args.pictures is not None:
        amount = replace(amount, pictures=args.pictures)
    folder = args.output or Path("study" if args.study else "demo")
    with progress_bar("drawing", shown=args.processes.first) as tell:
        figures = demo(
            folder,
            model=args.model,
            amount=amount,
            overwrite=args.overwrite,
            processes=args.processes,
            say=lambda line: tqdm.write(line),  # above the bar
            on_progress=lambda done, total: tell(done, total, "pictures"),
        )
    return figures, ""
