"""The whole story on the bundled model, without a network: diff, extract, verify, bake, compat, and judged pictures."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lib_dpo import __version__
from lib_dpo.families.model import Model, open_model
from lib_dpo.files.atomic import check_output, write_bytes_atomic, write_text_atomic
from lib_dpo.maths.processes import ALONE, Processes
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import Pair, open_pair
from lib_dpo.operations.bake import bake
from lib_dpo.operations.compat import compat
from lib_dpo.operations.diff import diff
from lib_dpo.operations.extract import extract
from lib_dpo.operations.verify import verify
from lib_dpo.operations.write_offset import write_offset
from lib_dpo.pictures.plots import plot_diff
from lib_dpo.settings import ExtractSettings, RankPolicy
from lib_dpo.toy import words
from lib_dpo.toy.bundled import BASE, FOLDER, MEASURED, REFERENCE, check_there, load
from lib_dpo.toy.chart import plot_study
from lib_dpo.toy.generate import GUIDANCE, STEPS
from lib_dpo.toy.page import Card, Picture, page
from lib_dpo.toy.series import SHORT, Amount, OnProgress, Series, draw_series
from lib_dpo.toy.sheets import lora_sheet, strength_sheet, turned_sheet
from lib_dpo.toy.study import Findings, find

_OFFSET, _BAKED = "dpo_offset.safetensors", "baked.safetensors"
_DIFF, _CURVE, _TURNED, _STRENGTHS, _LORAS = "diff.png", "adherence.png", "turned.png", "strengths.png", "loras.png"
_PAGE = "report.html"
_MODEL, _TUNING = "toy-shapes", "toy-shapes-dpo"
_WIDTH = 100  # of the text on a terminal

Say = Callable[[str], None]


def demo(
    folder: Path,
    *,
    model: Path = FOLDER,
    amount: Amount = SHORT,
    overwrite: bool = False,
    processes: Processes = ALONE,
    say: Say,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Take the bundled model and its DPO tuning through every step, draw pictures and judge them.

    Args:
        folder: where LoRAs, offset file, baked checkpoint, pictures and report go, all at the end: an error or a
            cancellation leaves nothing.
        model: the folder of the bundled model.
        processes: of which each draws a share of the pictures; the first one alone comes back.
        say: called with each line of the story, in the first one.
        on_progress: called with the pictures that are done and all of them; may raise to stop.

    Returns:
        The figures of every step.

    Raises:
        BadFileError: the bundled model is not there. MissingExtraError: diffusers is not installed.
        OutputError: files of an earlier demo are there and `overwrite` is off.
    """
    check_there(model)
    for name in _names(amount) if processes.first else ():
        check_output(folder / name, overwrite=overwrite)
    printed: list[str] = []

    def tell(line: str) -> None:
        printed.append(line)
        if processes.first:
            say(line)

    tell("The bundled model: a small Stable Diffusion 1.5 that draws coloured shapes, and a DPO tuning of it.\n")
    networks = load(model)
    with _all_or_nothing(folder, overwrite=overwrite) as work:
        figures = processes.hand_out(lambda: _measured(model, work, amount, tell))
        if processes.count > 1:
            _copy_to_all(work, processes)
        tell(f"\n6. pictures: {amount.pictures} of prompts that no training showed, at each strength and with each LoRA.")
        loras = {rank: work / _lora(rank) for rank in amount.ranks}
        series = draw_series(networks, work / _OFFSET, loras, amount, processes=processes, on_progress=on_progress)
        findings = _find(series, figures)
        study = _study(model)
        _tell_findings(findings, series, study, tell)
        _draw(findings, series, study, work)
        write_text_atomic(work / _PAGE, _page(findings, series, study, figures, work, "\n".join(printed).strip()))
        files = [str(folder / file.name) for file in sorted(work.iterdir())]
    say(f"\nEverything is in {folder}: open {_PAGE}, or try `dpo inspect` on any of the files.")
    switching = {"switch_seconds": series.switch_seconds, "picture_seconds": series.cell_seconds}
    return {**_moved(figures, work, folder), **findings.as_json(), "switching": switching, "files": files}


def _names(amount: Amount) -> list[str]:
    loras = [_lora(rank) for rank in amount.ranks]
    return [_OFFSET, _BAKED, Path(_BAKED).with_suffix(".yaml").name, *loras, _DIFF, _CURVE, _TURNED, _STRENGTHS, _LORAS, _PAGE]


def _lora(rank: int) -> str:
    return f"dpo_rank{rank}.safetensors"


@contextmanager
def _all_or_nothing(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to work in whose files move to `folder` at the end; when the work fails or is stopped, none do."""
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())  # on the same disk
    with tempfile.TemporaryDirectory(prefix=".dpo-demo-", dir=nearest) as name:
        yield Path(name)
        for file in Path(name).iterdir():
            check_output(folder / file.name, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(name).iterdir()):
            os.replace(file, folder / file.name)


def _moved(figures: Any, work: Path, folder: Path) -> Any:
    """Figures with the places of the finished files instead of those that were worked on."""
    if isinstance(figures, dict):
        return {key: _moved(value, work, folder) for key, value in figures.items()}
    if isinstance(figures, list):
        return [_moved(value, work, folder) for value in figures]
    if isinstance(figures, str) and figures.startswith(str(work)):
        return str(folder / Path(figures).name)
    return figures


# ---- files ----


def _measured(model: Path, work: Path, amount: Amount, say: Say) -> dict[str, Any]:
    with open_model(model / BASE) as base, open_model(model / REFERENCE) as tuned:
        return _files(open_pair(base, tuned), work, amount, say)


def _copy_to_all(work: Path, processes: Processes) -> None:
    """Give all processes the files that the first one made: they may be on another machine, and round differently there."""
    made = processes.hand_out(lambda: {file.name: file.read_bytes() for file in work.glob("*.safetensors")})
    for name, content in made.items() if not processes.first else ():
        (work / name).write_bytes(content)


def _files(pair: Pair, work: Path, amount: Amount, say: Say) -> dict[str, Any]:
    figures: dict[str, Any] = {"diff": _diff(pair, work / _DIFF, say)}
    say("2. extract: the change as a LoRA, at some ranks. Energy kept is the share of the change that the file holds.")
    figures["extract"] = [_extract(pair, work / _lora(rank), rank, say) for rank in amount.ranks]
    return figures | _bake(pair, work, say)


def _diff(pair: Pair, picture: Path, say: Say) -> dict[str, Any]:
    report = diff(pair, spectra=True, device="cpu")
    plot_diff(report, picture)
    say(f"1. diff: {report.verdict.text}")
    say(f"   Where and how, as a picture: {picture.name}\n")
    return report.as_json()


def _extract(pair: Pair, path: Path, rank: int, say: Say) -> dict[str, Any]:
    report = extract(pair, path, ExtractSettings(RankPolicy(rank=rank), device="cpu"), card=False)
    with open_offset(path) as offset:
        again = verify(offset, pair).tally.total.energy_kept
    kept = report.tally.total.energy_kept
    say(
        f"   rank {rank:>2}: {path.name:<22} {report.file_bytes / 1e6:5.2f} MB, keeps {100 * kept:5.1f} %; "
        f"verify, from the file alone: {100 * again:.1f} %"
    )
    return {"rank": rank, **report.as_json(), "energy_kept_verified": again}


def _bake(pair: Pair, work: Path, say: Say) -> dict[str, Any]:
    written = write_offset(pair, work / _OFFSET)
    say(f"\n3. offset: all of the change in one file, {_OFFSET} ({written.file_bytes / 1e6:.1f} MB).")
    with open_offset(work / _OFFSET) as offset:
        report = bake(pair.base, offset, work / _BAKED)
    with open_model(work / _BAKED) as baked:
        equal = _equals_tuned(baked, pair)
        inside = compat(baked, pair)
    fit = compat(pair.base, pair)
    say(f"4. bake: base + 1.0 x offset = {_BAKED}; {report.changed} tensors changed, {report.kept} copied as they were.")
    say(f"   Of its weights {100 * equal:.3f} % are equal to the tuned model's, to the last bit.")
    say(f"5. compat, asked about the base: {fit.text}")
    say(f"   compat, asked about the baked file: {inside.text}")
    return {
        "offset": written.as_json(),
        "bake": report.as_json(),
        "equals_tuned": equal,
        "compat": fit.as_json(),
        "compat_baked": inside.as_json(),
    }


def _equals_tuned(baked: Model, pair: Pair) -> float:
    """Share of the UNet's weights that equal the tuned ones rounded once."""
    same = total = 0
    for key in pair.keys:
        weight = baked.read(key)
        same += int((weight == pair.tuned.read(key).reshape(weight.shape).to(weight.dtype)).sum())
        total += weight.numel()
    return same / total


# ---- pictures ----


def _find(series: Series, figures: Mapping[str, Any]) -> Findings:
    return find(
        {strength: drawn.scores for strength, drawn in series.strengths.items()},
        {rank: drawn.scores for rank, drawn in series.loras.items()},
        {one["rank"]: one["energy_kept"] for one in figures["extract"]},
        figures["compat"]["suggested_strength"],
    )


def _study(model: Path) -> Findings | None:
    """What the study found that comes with a model, where one does."""
    file = model / MEASURED
    return Findings.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _tell_findings(findings: Findings, series: Series, study: Findings | None, say: Say) -> None:
    say("   Share of the pictures that show everything their prompt names, and its 95 % interval:\n")
    for name, share, interval in words.table(findings):
        say(f"   {name:<16} {share:>8}   {interval}")
    say("")
    for line in (*words.sentences(findings, series, study), "", words.TOYS):
        say(textwrap.fill(line, _WIDTH, initial_indent="   ", subsequent_indent="   "))


def _draw(findings: Findings, series: Series, study: Findings | None, work: Path) -> None:
    plot_study(findings, work / _CURVE, study=study)
    write_bytes_atomic(work / _TURNED, turned_sheet(series))
    write_bytes_atomic(work / _STRENGTHS, strength_sheet(series, model=_MODEL, offset=_TUNING))
    write_bytes_atomic(work / _LORAS, lora_sheet(series))


def _page(
    findings: Findings, series: Series, study: Findings | None, figures: Mapping[str, Any], work: Path, printed: str
) -> str:
    rows = words.table(findings)
    told = findings if findings.told or not study else study
    shares = "; ".join(f"{name} {share}" for name, share, _ in words.table(told))
    turned = f"{findings.became_right} became right and {findings.became_wrong} became wrong"
    shown = [
        (_CURVE, "Adherence against strength",
         f"Of {findings.points[0].n} pictures {turned} from strength 0 to 1. Share of {told.points[0].n} pictures that show "
         f"all their prompt names: {shares}.",
         "Bars and band are 95 % intervals. Shaded: strengths that so many pictures cannot tell from the best one. What these "
         f"{findings.points[0].n} pictures cannot tell apart is not plotted."),
        (_TURNED, "All that the change turned", f"Pairs of pictures before and after: {turned} from strength 0 to 1.",
         "All of them, at strength 0 and at strength 1."),
        (_STRENGTHS, "The same pictures at several strengths",
         "A grid of pictures of coloured shapes: a row per prompt and seed, a column per strength, the untouched model first.",
         "Every column has the same prompts and seeds; only the strength differs."),
        (_LORAS, "With LoRAs, and with the full change",
         "Rows of pictures without DPO, with LoRAs of rising rank, and with the full change, at strength 1.",
         "The pictures that the full change alters most, chosen for that: LoRAs of rising rank between the model alone and "
         "the whole change, all at strength 1."),
        (_DIFF, "What DPO changed in the weights",
         "Heat-map of the size of the change by block and kind of layer, mean spectrum, and energy kept against file size. "
         + figures["diff"]["verdict"]["text"], figures["diff"]["verdict"]["text"]),
    ]  # fmt: skip
    return page(
        "What a DPO offset does, on a toy model",
        lead="A small Stable Diffusion 1.5 learnt to draw coloured shapes from careless captions, and was then tuned with DPO "
        "to do what the prompt says. The offset is the difference of the two: here it is taken off, made into LoRAs, put back, "
        "and tried on prompts that no training showed.",
        warning=words.TOYS,
        cards=[Card(figure, text) for figure, text in words.headlines(findings, study)],
        findings=words.sentences(findings, series, study),
        pictures=[Picture(title, (work / name).read_bytes(), alt, text) for name, title, alt, text in shown],
        table=[("applied", "pictures that fit their prompt", "95 % interval"), *rows],
        printed=printed,
        foot=f"sd-webui-dpo {__version__}, torch {torch.__version__}, Python {platform.python_version()}. Every picture: DDIM, "
        f"{STEPS} steps, guidance {GUIDANCE:g}.",
    )
