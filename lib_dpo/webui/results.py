"""What a session answers: the state of the model, verdicts, a LoRA that was written, a grid of pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from lib_dpo.families.arch import Architecture
from lib_dpo.hosts.base import Baked, LoadedModel
from lib_dpo.offsets.recipe import Ingredient

if TYPE_CHECKING:  # the maths is imported when it is needed: a WebUI starts without it
    from lib_dpo.offsets.offset import Offset
    from lib_dpo.operations.compat import CompatReport
    from lib_dpo.operations.diff import DiffReport
    from lib_dpo.operations.extract import ExtractReport
    from lib_dpo.pictures.drawing import Grid
    from lib_dpo.pictures.effects import EffectReport
    from lib_dpo.pictures.function import FunctionReport
    from lib_dpo.pictures.plan import Images, Plan


@dataclass(frozen=True)
class Status:
    """What is loaded and what is in it, checked now."""

    model: LoadedModel | None
    architecture: Architecture | None
    baked: Baked | None
    problem: str = ""  # why the loaded file is none of ours
    chosen: str = ""  # another checkpoint, which the host loads only for the next picture
    in_file: tuple[Ingredient, ...] = ()  # baked into the file itself, as its metadata says

    @property
    def text(self) -> str:
        """One line, such as `dreamshaper_8 · SD 1.x · baked: dpo-sd15 × 0.8`."""
        if self.model is None:
            return f"{self.chosen} is loaded for the next picture" if self.chosen else "no checkpoint is loaded yet"
        title = self.architecture.title if self.architecture else "not supported"
        state = "clean"
        if self.baked:
            state = f"baked: {Ingredient(self.baked.offset, self.baked.strength, self.baked.blocks, self.baked.rank)}"
        if self.in_file:
            state += f" · its file holds {', '.join(map(str, self.in_file))}"
        later = f" · {self.chosen} is loaded for the next picture" if self.chosen else ""
        return f"{self.model.path.stem} · {title} · {state}{later}"

    def as_json(self) -> dict[str, Any]:
        model = self.model
        return {
            "text": self.text,
            "model": model and {"name": model.name, "file": model.path.name, "storage": model.storage},
            "architecture": self.architecture and self.architecture.name,
            "baked": self.baked and self.baked.as_json(),
            "in_file": [asdict(ingredient) for ingredient in self.in_file],
            "problem": self.problem,
            "chosen": self.chosen,
        }


@dataclass(frozen=True)
class Analysis:
    """The verdicts before anything is written: on the pair, and on the loaded model where it is none of the two."""

    diff: DiffReport
    compat: CompatReport | None
    key: tuple[str, str] | None = None  # by which the figures of the pair are known
    not_kept: str = ""  # why they are not there the next time
    loaded: Literal["", "base", "reference"] = ""  # which of the two the loaded model is

    def as_json(self) -> dict[str, Any]:
        return {"diff": self.diff.as_json(), "compat": self.compat and self.compat.as_json()}


@dataclass(frozen=True)
class Extracted:
    """A LoRA that was written, and how much of it the host's own loader knows (None: no model to load it into)."""

    name: str
    report: ExtractReport
    matched: tuple[int, int] | None

    def as_json(self) -> dict[str, Any]:
        figures = self.report.as_json() | {"name": self.name, "output": self.report.path.name}
        figures["matched_keys"] = self.matched and {"matched": self.matched[0], "of": self.matched[1]}
        return figures


@dataclass(frozen=True)
class Comparison:
    """A grid of pictures, the pictures themselves, and how strong the effect is."""

    plan: Plan
    images: Images
    grid: Grid
    report: EffectReport
    offsets: tuple[Offset, ...]  # what was compared, and what it was compared beside
    remarks: tuple[str, ...] = ()  # what is known of the reasons for what is seen
    function: FunctionReport | None = None  # where it was asked for
    whole: str = ""  # the file that holds the whole offset, which `function` was measured against
