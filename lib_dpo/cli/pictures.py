"""The commands that draw: `compare` makes a grid without a WebUI, `app` serves the tab without one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_dpo.cli.argparse_errors import number
from lib_dpo.cli.files import check_not_swapped, input_file, input_folder, output_file, output_folder
from lib_dpo.errors import OutputError, SettingError
from lib_dpo.settings import BUNDLED_MODEL, FIELDS

if TYPE_CHECKING:
    from lib_dpo.families.model import Model
    from lib_dpo.maths.processes import Processes
    from lib_dpo.pictures.function import FunctionReport
    from lib_dpo.webui.results import Comparison

LOOPBACK = "127.0.0.1"
TOKENIZER = BUNDLED_MODEL / "clip"
_SEEDS = "0"  # where none are given


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `compare` and `app` to the command line.

    Args:
        command: makes a sub-parser from a name, a function and a help text.
    """
    sub = command("compare", compare, "make the same pictures at several strengths, the untouched model first")
    sub.add_argument("--model", required=True, metavar="C", help="a whole checkpoint")
    sub.add_argument("--offset", required=True, metavar="L_or_O", help="a LoRA or an offset file")
    sub.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="what to draw; may be given several times"
    )
    sub.add_argument("--negative", default="", metavar="TEXT", help="what the pictures should not show")
    sub.add_argument("--seeds", default="1, 2", help="such as 1, 2 or 100-103; -1 is random")
    sub.add_argument("--strengths", default="0.5, 1, 1.5", help="such as 0.5, 1 or 0-2 (+0.5)")
    sub.add_argument("--blocks", default="", help=FIELDS["blocks"].help)
    sub.add_argument("--steps", type=number(int), default=20, metavar="N", help="steps of each picture")
    sub.add_argument("--cfg", type=number(float), default=7.0, help="how closely pictures follow the prompt")
    sub.add_argument("--sampler", default="", help="Euler (default), Euler a, DDIM, DPM++ 2M or UniPC")
    for side in ("--width", "--height"):
        told = "of a picture, in pixels (default: what the model was made for)"
        sub.add_argument(side, type=number(int), default=0, metavar="N", help=told)
    sub.add_argument("-o", "--output", required=True, type=output_file, metavar="GRID.png", help="the labelled grid")
    sub.add_argument("--each", type=output_folder, metavar="DIR", help="a folder for the single pictures too")
    _host_arguments(sub)

    sub = command("app", app, "serve the tab without a WebUI, on this machine only")
    sub.add_argument(
        "--models",
        type=input_folder,
        metavar="DIR",
        help="folder with Stable-diffusion, Lora and DPO in it (default: one of our own, with the toy model)",
    )
    sub.add_argument("--port", type=number(int), default=7861, metavar="N", help="to listen on")
    sub.add_argument("--host", default=LOOPBACK, help="address to listen on (default: this machine only)")
    _host_arguments(sub)


def add_function_arguments(sub: argparse.ArgumentParser) -> None:
    """What `verify` needs to measure function kept."""
    sub.add_argument(
        "--function",
        action="store_true",
        help="measure too how much of what tuning changed in the model's predictions the file reproduces (minutes on a GPU)",
    )
    sub.add_argument("--model", metavar="C", help="for --function: a whole checkpoint or diffusers folder (default: the base)")
    own = "for --function: may be given several times (default: a few of our own)"
    sub.add_argument("--prompt", action="append", metavar="TEXT", help=own)
    sub.add_argument("--seeds", help="for --function: such as 1, 2 or 100-103 (default: 0)")
    sub.add_argument("--timesteps", type=number(int), metavar="N", help="for --function: spread evenly (default: 10)")
    _host_arguments(sub)


def check_function(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured before minutes of work. Raises SettingError."""
    from lib_dpo.pictures.function import check_asked
    from lib_dpo.pictures.plan import parse_seeds

    given = [name for name in ("model", "prompt", "seeds", "timesteps") if getattr(args, name) is not None]
    if given and not args.function:
        options = " and ".join(f"--{name}" for name in given)
        raise SettingError(f"{options}: for measuring the function; say --function too, or leave them out")
    check_asked(args.prompt or ("",), parse_seeds(args.seeds or _SEEDS), _timesteps(args))


def _timesteps(args: argparse.Namespace) -> int:
    from lib_dpo.pictures.function import TIMESTEPS

    return TIMESTEPS if args.timesteps is None else int(args.timesteps)


def measure_function(args: argparse.Namespace, lora: Path, pair: Sequence[Model]) -> FunctionReport:
    """What `verify --function` measures."""
    import lib_dpo
    from lib_dpo.cli.output import progress_bar
    from lib_dpo.offsets.offset import open_pair
    from lib_dpo.pictures.function import PROMPTS, function_kept
    from lib_dpo.pictures.plan import parse_seeds

    seeds = parse_seeds(args.seeds or _SEEDS)
    opened = open_pair(*pair)
    with (
        lib_dpo.open_model(input_file(args, args.model or args.base)) as model,
        lib_dpo.open_offset(lora, opened.architecture) as offset,
        progress_bar("predicting") as tell,
    ):
        return function_kept(
            offset,
            opened,
            model,
            args.tokenizer,
            prompts=args.prompt or (_toy_prompts() if _is_toy(model.path) else PROMPTS),
            seeds=seeds,
            timesteps=_timesteps(args),
            device=args.device,
            on_progress=tell,
        )


def _is_toy(path: Path) -> bool:
    from lib_dpo.toy.bundled import BASE

    toy = BUNDLED_MODEL / BASE
    return toy.is_file() and path.samefile(toy)


def _toy_prompts() -> list[str]:
    """In the words that the toy model knows, of prompts that it never saw."""
    from lib_dpo.toy.pictures import caption
    from lib_dpo.toy.series import subjects

    return list(dict.fromkeys(caption(scene) for scene, _ in subjects(_TOY_SUBJECTS)))


_TOY_SUBJECTS = 24


def _host_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help=FIELDS["device"].help)
    sub.add_argument(
        "--tokenizer",
        type=input_folder,
        default=TOKENIZER,
        metavar="DIR",
        help="CLIP's vocab.json and merges.txt; by default those that come with this project",
    )


# ---- compare ----


def compare(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The command: figures and the text to print."""
    from tqdm import tqdm

    from lib_dpo.files.atomic import write_bytes_atomic
    from lib_dpo.hosts.standalone import Standalone
    from lib_dpo.pictures.plan import parse_seeds
    from lib_dpo.webui.comparing import Asked, compare
    from lib_dpo.webui.session import Session

    processes: Processes = args.processes
    if processes.first:
        _check_outputs(args)
    seeds = processes.hand_out(lambda: parse_seeds(args.seeds))  # -1 is drawn once
    host = Standalone(args.output.absolute().parent, args.tokenizer, device=processes.device(args.device))
    model, offset = input_file(args, args.model), input_file(args, args.offset)
    check_not_swapped("--model", model, "--offset", offset)
    host.live.load(model)
    session = Session(host)
    asked = Asked(
        offset=str(offset.absolute()),
        prompts=args.prompt,
        negative=args.negative,
        seeds=", ".join(map(str, seeds)),
        strengths=args.strengths,
        blocks=args.blocks,
        steps=args.steps,
        cfg_scale=args.cfg,
        sampler=args.sampler,
        width=args.width,
        height=args.height,
    )
    hidden = None if processes.first else True  # None: tqdm's own choice
    with tqdm(desc="drawing", unit="picture", disable=hidden, leave=False) as bar:
        found = compare(session, _Bar(bar, processes), asked, processes=processes)
    write_bytes_atomic(args.output, found.grid.png())
    files = _write_each(args.each, found, overwrite=args.overwrite) if args.each else []
    return {**found.report.as_json(), "output": str(args.output), "pictures": files}, _text(args.output, found)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse names before anything is opened. Raises OutputError."""
    from lib_dpo.files.atomic import check_output

    if args.output.suffix.lower() != ".png":
        raise OutputError(f"{args.output}: expected a name that ends in .png; write {args.output.with_suffix('.png')}")
    check_output(args.output, overwrite=args.overwrite)
    if args.each and args.each.exists() and any(args.each.glob("*.png")) and not args.overwrite:
        raise OutputError(f"{args.each}: holds pictures already; choose another folder, or allow it to be replaced")


@dataclass
class _Bar:
    """A `Job` that moves a bar of tqdm: the pictures of all processes."""

    bar: Any
    processes: Processes
    started: bool = False

    def progress(self, done: int, total: int, key: str) -> None:
        """Nothing: pictures are counted."""

    def cells(self, count: int) -> None:
        self.bar.reset(total=count)

    def check(self) -> None:
        if self.processes.count > 1:
            self.bar.update(self.processes.done - self.bar.n)
        elif self.started:  # asked once before the first picture and once after each
            self.bar.update(1)
        self.started = True


def _write_each(folder: Path, found: Comparison, *, overwrite: bool) -> list[str]:
    """Every picture by row and column, such as 01_strength-0.5.png."""
    import io

    from lib_dpo.files.atomic import check_output, write_bytes_atomic

    names = {}
    for row, (prompt, seed) in enumerate(found.plan.rows, 1):
        for cell in found.plan.cells:
            if (cell.prompt, cell.seed) == (prompt, seed):
                names[cell] = folder / f"{row:02d}_{cell.variant.label.replace(' ', '-')}.png"
    for path in names.values():
        check_output(path, overwrite=overwrite)
    for cell, path in names.items():
        data = io.BytesIO()
        found.images[cell].save(data, format="PNG")
        write_bytes_atomic(path, data.getvalue())
    return [str(path) for path in names.values()]


def _text(output: Path, found: Comparison) -> str:
    lines = [f"wrote {output}", found.report.text]
    lines += [
        f"  {effect.variant.label:<16} {effect.text:<20} mean difference {effect.difference:.2f} of 255"
        for effect in found.report.effects
    ]
    return "\n".join([*lines, found.report.caveat])


# ---- app ----


def app(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The command: serves until it is interrupted."""
    from lib_dpo.webui.app import serve

    serve(models=args.models, tokenizer=args.tokenizer, device=args.device, address=args.host, port=args.port)
    return {}, ""
