"""What is compared with what: prompts x seeds x variants, the lists as people type them, and making the pictures."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from lib_dpo.errors import SettingError
from lib_dpo.hosts.base import Job
from lib_dpo.maths.processes import ALONE, Processes
from lib_dpo.settings import strength_of

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PICTURES = 400
MAX_MEGAPIXELS = 200  # of a whole grid, as the WebUI's own "maximum size of a grid"
MAX_SIDE = 32_767  # Firefox shows no picture that is longer
MAX_SEED = 2**63 - 1
_DRAWN_SEEDS = 2**32  # a random seed is below: what the WebUIs draw from
_LONGEST = 100  # characters of one number or range


@dataclass(frozen=True)
class Variant:
    """One column of a comparison: what people read above it, and whatever the host needs in order to make it.

    The label alone tells variants apart.
    """

    label: str
    value: Any = field(default=None, compare=False)


UNTOUCHED = Variant("untouched")


def strength_variants(strengths: Iterable[float]) -> tuple[Variant, ...]:
    """Strengths as variants; 0 is the untouched model.

    Raises:
        SettingError: a strength that is no finite number, or too large to be meant.
    """
    return tuple(Variant(f"strength {value:g}", value) if value else UNTOUCHED for value in map(strength_of, strengths))


@dataclass(frozen=True)
class Cell:
    """One picture of a comparison."""

    prompt: str
    seed: int
    variant: Variant


Images = Mapping[Cell, "Image"]


@dataclass(frozen=True)
class Plan:
    """Prompts x seeds x variants: each row a prompt with a seed, each column a variant.

    The untouched model is the first column, listed or not. Duplicates and blank prompts are left out, the order is kept.

    Raises:
        SettingError: nothing to compare, too many pictures, or too large a grid; the message says what to reduce.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    variants: Sequence[Variant]
    width: int = 512
    height: int = 512

    def __post_init__(self) -> None:
        normal = {
            "prompts": _unique(text for prompt in self.prompts if (text := prompt.strip())),
            "seeds": _unique(self.seeds),
            "variants": _unique([UNTOUCHED, *self.variants]),
        }
        for name, values in normal.items():
            object.__setattr__(self, name, values)
        if not self.prompts or not self.seeds:
            raise SettingError(f"there is no {'seed' if self.prompts else 'prompt'} to compare with; give at least one")
        if len(self.variants) == 1:
            raise SettingError("there is nothing to compare the untouched model with; give a strength such as 0.5 or 1")
        if min(self.width, self.height) < 1:
            raise SettingError(f"pictures of {self.width}x{self.height} cannot be made; expected such as 512x512")
        count = len(self.rows) * len(self.variants)
        if count > MAX_PICTURES:
            raise SettingError(f"{self} are {count:,} pictures; at most {MAX_PICTURES} are made. {self._remedy(MAX_PICTURES)}")
        self.check_size(self.width, self.height)

    def __str__(self) -> str:
        counts = {"prompt": len(self.prompts), "seed": len(self.seeds), "column": len(self.variants)}
        return " × ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items())

    @property
    def rows(self) -> tuple[tuple[str, int], ...]:
        """Prompt and seed of each row, from the top."""
        return tuple((prompt, seed) for prompt in self.prompts for seed in self.seeds)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells in the order of making.

        A column is finished before the next begins, since another strength means patching the model anew; the seeds of a
        prompt follow one another, since hosts keep what the text encoder made of the last prompt.
        """
        return tuple(Cell(prompt, seed, variant) for variant in self.variants for prompt, seed in self.rows)

    def check_size(self, width: int, height: int) -> None:
        """Refuse a grid too large to be drawn or looked at, of pictures of this size.

        Raises:
            SettingError: beyond MAX_MEGAPIXELS or MAX_SIDE.
        """
        across, down = len(self.variants), len(self.rows)
        pixels = across * width * down * height
        grid = f"a grid of {across} × {down} pictures of {width}x{height}"
        if pixels > MAX_MEGAPIXELS * 1e6:
            fitting = int(MAX_MEGAPIXELS * 1e6) // (width * height)
            raise SettingError(
                f"{grid} has {pixels / 1e6:,.0f} megapixels; at most {MAX_MEGAPIXELS} are drawn. "
                f"{self._remedy(fitting)}, or make smaller pictures"
            )
        for side, few in ((across * width, "columns"), (down * height, "prompts or seeds")):
            if side > MAX_SIDE:
                raise SettingError(
                    f"{grid} is {side:,} pixels long; browsers show at most {MAX_SIDE:,}. "
                    f"Use fewer {few}, or make smaller pictures"
                )

    def _remedy(self, pictures: int) -> str:
        """What to shorten so that so many pictures are left: the longest list."""
        lengths = {"seeds": len(self.seeds), "prompts": len(self.prompts), "columns": len(self.variants)}
        longest = max(lengths, key=lambda name: lengths[name])
        left = pictures * lengths[longest] // math.prod(lengths.values())
        if left < (2 if longest == "columns" else 1):
            return "Use fewer prompts, seeds and columns"
        return f"Use at most {left} {longest}"


def _unique(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def run(plan: Plan, make: Callable[[Cell], Image], job: Job, processes: Processes = ALONE) -> dict[Cell, Image]:
    """Make all pictures of a plan, in the order of `plan.cells`; of several processes each makes its share.

    Rows may differ in size, a row's pictures must not: they are compared pixel by pixel.

    Raises:
        SettingError: a picture of another size than its row's untouched one, or pictures too large for one grid.
        Cancelled: stopped by the user. Nothing is kept.
    """
    cells = plan.cells
    images: dict[Cell, Image] = {}
    job.cells(len(cells))
    job.check()
    for cell in processes.share(cells):
        image = make(cell)
        processes.report(len(images) + 1)
        job.check()  # an interrupted sampler returns what it has: an unfinished picture
        if not images:
            plan.check_size(*image.size)  # a hires pass makes them larger than planned
        untouched = images.get(Cell(cell.prompt, cell.seed, UNTOUCHED), image)
        if image.size != untouched.size:
            raise SettingError(
                f"{cell.variant.label}, seed {cell.seed}: the picture is {_size(image)}, but {_size(untouched)} untouched; "
                "only pictures of one size can be compared: switch off what changes the size"
            )
        images[cell] = image
    return dict(zip(cells, processes.collect(list(images.values()), job.check), strict=True))


def _size(image: Image) -> str:
    return f"{image.width}x{image.height}"


# ---- lists as people type them, after the WebUI's X/Y/Z plot: "0.5, 1", "0-2 (+0.5)", "0-2 [5]" ----

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
_VALUE = re.compile(_NUMBER)
_RANGE = re.compile(
    rf"(?P<first>{_NUMBER})\s*-\s*(?P<last>{_NUMBER})\s*"
    rf"(?:\(\s*(?P<step>{_NUMBER})\s*\)|\[\s*(?P<count>\d{{1,9}})\s*\])?"
)


def parse_strengths(text: str) -> tuple[float, ...]:
    """Numbers, ranges with a step, "0-2 (+0.5)", and ranges with a count, "0-2 [5]", with commas or on lines.

    The ends belong to a range. Decimal arithmetic: 0-1 (+0.1) gives 0.3, not 0.30000000000000004.

    Raises:
        SettingError: naming the part that makes no sense.
    """
    return tuple(float(value) for value in _values(text, "strengths", "0.5, 1, 1.5 or 0-2 (+0.5) or 0-2 [5]"))


def parse_seeds(text: str, rng: random.Random | None = None) -> tuple[int, ...]:
    """Whole numbers and ranges of them, "1, 2, 100-103"; each -1 is drawn here, once for all pictures.

    Args:
        rng: where -1 is drawn from (the system's randomness).

    Raises:
        SettingError: naming the part that makes no sense.
    """
    rng = rng or random.SystemRandom()
    seeds = []
    for value in _values(text, "seeds", "1, 2, 3 or 100-103, or -1 for a random one"):
        if value != int(value):
            raise SettingError(f"seeds: {value:f} is not a whole number")
        seed = int(value)
        if not -1 <= seed <= MAX_SEED:
            raise SettingError(f"seeds: {seed} is out of range; expected 0 to {MAX_SEED}, or -1 for a random one")
        seeds.append(rng.randrange(_DRAWN_SEEDS) if seed == -1 else seed)
    return tuple(seeds)


def _values(text: str, name: str, examples: str) -> list[Decimal]:
    values: list[Decimal] = []
    for part in (part.strip() for part in re.split(r"[,;\n]", text)):
        if not part:
            continue
        if len(part) > _LONGEST:  # of thousands of digits, which Python does not count with
            raise SettingError(f"{name}: {part[:_LONGEST]!r}… is too long for a number or a range; expected such as {examples}")
        if _VALUE.fullmatch(part):
            values.append(Decimal(part))
        elif match := _RANGE.fullmatch(part.replace("–", "-")):
            values.extend(_range(match, f"{name}: {part!r}"))
        else:
            raise SettingError(f"{name}: {part!r} is neither a number nor a range; expected such as {examples}")
        if len(values) > MAX_PICTURES:
            raise SettingError(f"{name}: with {part!r} they are more than {MAX_PICTURES}; give fewer")
    if not values:
        raise SettingError(f"{name}: nothing is given; expected such as {examples}")
    return values


def _range(match: re.Match[str], where: str) -> Iterator[Decimal]:
    first, last = Decimal(match["first"]), Decimal(match["last"])
    way = -1 if last < first else 1
    if match["count"]:
        count = int(match["count"])
        if not 2 <= count <= MAX_PICTURES:
            raise SettingError(f"{where}: the count in brackets must be 2 to {MAX_PICTURES}")
        return (round(first + (last - first) * i / (count - 1), 10) for i in range(count))
    step = Decimal(match["step"] or way)
    if match["step"] and match["step"][0] not in "+-":
        step *= way  # without a sign it is a distance
    if not step:
        raise SettingError(f"{where}: the step in parentheses must not be 0")
    if step * way < 0:
        raise SettingError(f"{where}: the step leads away from the end; write ({-step:+f})")
    steps = (last - first) / step
    if steps >= MAX_PICTURES:
        raise SettingError(f"{where}: gives more than {MAX_PICTURES} values; take a longer step")
    return (first + step * i for i in range(int(steps) + 1))
