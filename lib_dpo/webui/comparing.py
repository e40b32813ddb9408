"""A comparison in a host: what is asked for, how many pictures and how long that is, and making them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lib_dpo.errors import HostError, NotFoundError, SettingError
from lib_dpo.hosts.base import Job, Request
from lib_dpo.maths.processes import ALONE, Processes
from lib_dpo.offsets.patch import Patch
from lib_dpo.pictures.plan import Cell, Images, Plan, Variant, parse_seeds, parse_strengths, run, strength_variants
from lib_dpo.progress import duration
from lib_dpo.webui.cards import give_previews
from lib_dpo.webui.results import Comparison
from lib_dpo.webui.session import Session, sendable

if TYPE_CHECKING:
    from PIL.Image import Image

    from lib_dpo.pictures.effects import EffectReport

Told = Callable[[Plan, Images], None]  # called with all pictures that are made so far
_WEAK = 0.5  # a strength below which an effect may well be too small to see
_ROUNDED_AWAY = 0.5  # of the change: less than this survives a model's coarse numbers


@dataclass(frozen=True)
class Asked:
    """What is to be compared: prompts x seeds x strengths, of one offset or of two side by side.

    `width` and `height` are in pixels, 0 for what the model was made for. `beside` is another offset, empty for none.
    `function`: measure afterwards how much of the whole offset's effect on the model's predictions the first one keeps.
    `undo`: take out first what is baked into the model.
    """

    offset: str
    prompts: Sequence[str]
    negative: str = ""
    seeds: str = "1"
    strengths: str = "0.5, 1, 1.5"
    blocks: str = ""
    rank: int | None = None
    steps: int = 20
    cfg_scale: float = 7.0
    sampler: str = ""
    width: int = 0
    height: int = 0
    beside: str = ""
    function: bool = False
    undo: bool = False

    def columns(self, names: Sequence[str]) -> dict[Variant, tuple[int, float]]:
        """What stands above each column, and its strength of which offset of `names`. Raises SettingError: odd strengths."""
        strengths = strength_variants(parse_strengths(self.strengths))
        if len(names) == 1:
            return {each: (0, each.value or 0.0) for each in strengths}
        return {
            Variant(f"{name} × {each.value:g}") if each.value else each: (number, each.value or 0.0)
            for number, name in enumerate(names)
            for each in strengths
        }

    def plan(self, names: Sequence[str]) -> Plan:
        """What is drawn. Raises SettingError: lists that cannot be read, or too many pictures."""
        prompts = [sendable(prompt) for prompt in self.prompts]
        return Plan(prompts, parse_seeds(self.seeds), tuple(self.columns(names)), self.width or 512, self.height or 512)


def compare(session: Session, job: Job, asked: Asked, tell: Told | None = None, *, processes: Processes = ALONE) -> Comparison:
    """Make the pictures with the host's own pipeline, the untouched model first.

    Args:
        tell: called before the first picture and after each.
        processes: of which each makes a share of the pictures; the first one alone comes back.

    Raises:
        SettingError: lists that cannot be read, or too many pictures. HostError: something is baked into the model.
        NotFoundError: no file holds the whole offset, or the one to be measured does itself.
    """
    from lib_dpo.pictures.drawing import draw_grid
    from lib_dpo.pictures.effects import effects

    host = session.host
    host.live.ready()
    asked = _checked(session, asked)
    names = [asked.offset, *([asked.beside] if asked.beside else [])]
    asked.plan(names)  # its lists are looked at before any file
    patches = [session.to_add(name, asked.blocks, asked.rank if n == 0 else None) for n, name in enumerate(names)]
    if len(patches) > 1 and patches[0].id == patches[1].id:
        raise SettingError(f"{asked.offset} would be compared with itself; choose another offset beside it, or none")
    shown = [patch.name for patch in patches]
    if len({*shown}) < len(shown):
        shown = names  # of two folders, perhaps: the lists tell them apart
    plan, columns, model = asked.plan(shown), asked.columns(shown), session.loaded()
    whole = _whole(session, asked.offset) if asked.function else None
    _clean(session, job, asked)
    images: dict[Cell, Image] = {}
    pace = _Pace(plan, asked)
    if tell:
        tell(plan, images)

    def make(cell: Cell) -> Image:
        request = Request(
            cell.prompt, asked.negative, cell.seed, asked.steps, asked.cfg_scale, asked.sampler, asked.width, asked.height
        )
        number, strength = columns.get(cell.variant, (0, 0.0))
        images[cell] = host.generate(request, patches[number] if strength else None, strength).image
        session.pace = pace.after(len(images)) or session.pace
        if tell:
            tell(plan, images)
        return images[cell]

    made = run(plan, make, job, processes)
    report = effects(plan, made)
    settings = {"Steps": asked.steps, "Sampler": asked.sampler or host.samplers()[0], "CFG scale": asked.cfg_scale}
    options = {"Negative prompt": asked.negative, "Blocks": asked.blocks, "Rank": asked.rank}
    settings |= {name: value for name, value in options.items() if value}
    grid = draw_grid(
        plan,
        made,
        model=model.path.stem,
        offset=" and ".join(shown),
        settings=settings,
        note=f"{report.text} {report.caveat}",
    )
    remarks = _remarks(session, report, plan, patches)
    remarks += give_previews(plan, columns, patches, made)
    found = Comparison(plan, made, grid, report, tuple(patch.offset for patch in patches), remarks)
    if whole is None:
        return found
    from lib_dpo.pictures.heard import function_in_host

    kept = function_in_host(host, patches[0], whole, Request("", width=asked.width, height=asked.height), plan.rows, job)
    return replace(found, function=kept, whole=whole.name)


def forecast(session: Session, asked: Asked) -> str:
    """How many pictures that is, and how long it may take where pictures were compared before.

    Raises:
        SettingError: lists that cannot be read, or too many pictures.
    """
    plan = asked.plan([asked.offset, *([asked.beside] if asked.beside else [])])
    count = len(plan.cells)
    said = f"{count} pictures ({plan})"
    if session.pace is None:
        return f"{said}. The first ones tell how long that takes"
    width, height = session.picture_size(asked.width, asked.height)
    seconds = session.pace * count * asked.steps * width * height
    if asked.function:
        seconds *= 1 + 3 * len(plan.rows) * 10 / (count * asked.steps)
    return f"{said}, about {duration(seconds)}"


class _Pace:
    """Seconds per pixel and step of pictures, without the first, for which a host loads and merges."""

    def __init__(self, plan: Plan, asked: Asked) -> None:
        self._work = asked.steps * plan.width * plan.height
        self._first = 0.0

    def after(self, made: int) -> float | None:
        now = time.monotonic()
        if made == 1:
            self._first = now
            return None
        return (now - self._first) / (made - 1) / self._work


def _checked(session: Session, asked: Asked) -> Asked:
    """With the size that is drawn, and text that can be sent. Raises SettingError."""
    request = session.request(
        asked.negative, steps=asked.steps, cfg_scale=asked.cfg_scale, sampler=asked.sampler, width=asked.width,
        height=asked.height,
    )  # fmt: skip
    return replace(asked, width=request.width, height=request.height, negative=request.negative)


def _clean(session: Session, job: Job, asked: Asked) -> None:
    """See to it that nothing is baked in. Raises HostError where something is and was not to be undone."""
    if asked.undo:
        session.unbake(job)
    baked = session.host.live.baked()
    if baked:
        raise HostError(
            f"{baked.offset} is baked into {session.loaded().name}, so there is no untouched picture to compare with; undo it "
            "first"
        )


def _whole(session: Session, offset: str) -> Patch:
    """What holds all of the offset that a file was made from. Raises NotFoundError."""
    entry = session.library.whole(offset)
    if entry is None:
        raise NotFoundError(
            f"how much of the function {offset} keeps is measured against the whole offset: an offset file or an exact LoRA of "
            "the same base and reference. None is in the lists, or this file is one itself; write one on the page Extract, or "
            "leave the measure out"
        )
    return session.patch(entry.name)


def _remarks(session: Session, report: EffectReport, plan: Plan, patches: Sequence[Patch]) -> tuple[str, ...]:
    """What is known of the reasons for what is seen."""
    found = []
    for ingredient in session.status().in_file:
        found.append(f"the untouched model's file holds {ingredient} already: what you see comes on top of it")
    if report.level != "none":
        return tuple(found)
    strengths = [variant.value for variant in plan.variants if isinstance(variant.value, float)]
    if strengths and max(map(abs, strengths)) < _WEAK:
        found.append(f"no strength is above {max(map(abs, strengths)):g}: try 1")
    for patch in patches:
        weights = {patch.weight(key) for key in patch.offset.shapes}
        if max(map(abs, weights)) < _WEAK:
            found.append(f"the block weights leave at most {max(map(abs, weights)):g} of {patch.name}")
        if len(patch.offset.unmatched) > len(patch.offset.shapes):
            found.append(f"most keys of {patch.name} have no place in this model")
        share, storage = session.survives(patch, max(strengths, key=abs)) if strengths else (None, "")
        if share is not None and share < _ROUNDED_AWAY:
            left = f"about {share:.0%}" if share > 0 else "nothing"
            found.append(f"{left} of {patch.name} survives rounding to the model's numbers ({storage})")
    return tuple(found)
