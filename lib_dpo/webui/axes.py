"""The [DPO] axes of the host's X/Y/Z plot script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

from lib_dpo.errors import DpoError
from lib_dpo.families.blocks import parse_blocks
from lib_dpo.offsets.recipe import Ingredient
from lib_dpo.settings import one_of
from lib_dpo.webui.cells import plot_axes
from lib_dpo.webui.generation import AXES, METHODS, NO_OFFSET, TITLE, Wish, patch_for, set_axis, wish_of
from lib_dpo.webui.session import Session

# Costs order the loops of a grid: the dearest axis changes least often. A checkpoint costs 1.0.
_STRENGTH, _BLOCKS, _RANK, _METHOD, _OFFSET = 0.3, 0.5, 0.6, 0.65, 0.7
_OURS, _CHECKPOINT = "[DPO] ", "Checkpoint name"
_LOADING = (_CHECKPOINT, "Refiner checkpoint", "FP8 mode")  # axes of the host's that read weights again


def add_axes(module: ModuleType, session: Session, script_args: Callable[[Any], Sequence[Any]]) -> None:
    """Append our axes to those of the X/Y/Z plot script, once, and let its own spare what is baked into the model.

    Labels go into infotexts: never rename one.

    Args:
        module: the script's module as the host has loaded it.
        script_args: the always-on script's own arguments in a `p`.
    """
    known = {option.label for option in module.axis_options}
    axes = _Axes(session, script_args)
    for label, kind, name, cost, choices in (
        ("[DPO] Strength", float, "strength", _STRENGTH, None),
        ("[DPO] Offset", str, "offset", _OFFSET, axes.offsets),
        ("[DPO] Rank", int, "rank", _RANK, None),
        ("[DPO] Blocks", str, "blocks", _BLOCKS, None),
        ("[DPO] Method", str, "method", _METHOD, lambda: list(METHODS)),
    ):
        if label not in known:
            option = module.AxisOption(label, kind, _applying(name), confirm=axes.confirming(name), cost=cost, choices=choices)
            module.axis_options.append(option)
    for option in module.axis_options:
        if option.label in _LOADING and not hasattr(option, "dpo_spares_bakes"):
            axes.spare_bakes(option)


def _applying(name: str) -> Callable[[Any, Any, Any], None]:
    return lambda p, value, values: set_axis(p, name, value)


class _Axes:
    """Checks of values before any cell of a grid is made."""

    def __init__(self, session: Session, script_args: Callable[[Any], Sequence[Any]]) -> None:
        self._session, self._script_args = session, script_args

    def offsets(self) -> list[str]:
        return [NO_OFFSET, *(entry.name for entry in self._session.library.offsets())]

    def confirming(self, name: str) -> Callable[[Any, list[Any]], None]:
        """The host's `confirm` of one axis: it calls it once, and shows what RuntimeErrors say."""

        def confirm(p: Any, values: list[Any]) -> None:
            if baked := self._baked():
                raise RuntimeError(
                    f"[DPO] {name.capitalize()}: {baked} is baked into the model, so every cell would hold it too, and none "
                    "would be the untouched model; undo the bake first (tab DPO, page Bake)"
                )
            for value in values:
                try:
                    self._check(p, name, value)
                except DpoError as error:
                    raise RuntimeError(
                        f"[DPO] {name.capitalize()} {value!r}: {self._session.library.names_only(str(error))}"
                    ) from None

        return confirm

    def spare_bakes(self, option: Any) -> None:
        """Let an axis of the host's that loads weights again refuse to plot while something is baked into them."""
        confirm = option.confirm

        def guarded(p: Any, values: list[Any]) -> None:
            if baked := self._baked():
                raise RuntimeError(
                    f"{option.label}: {baked} is baked into the loaded model, and this axis loads weights again: some cells "
                    "would hold it, others not, and it would be lost. Undo the bake (tab DPO, page Bake) and switch the script "
                    f"«{TITLE}» on, which adds it to every cell; or save the baked model as a checkpoint and plot that"
                )
            if confirm:
                confirm(p, values)

        option.confirm, option.dpo_spares_bakes = guarded, True

    def _baked(self) -> Ingredient | None:
        """What is baked into the model that the first cell would be drawn with."""
        baked = self._session.host.live.baked_next()
        return Ingredient(baked.offset, baked.strength, baked.blocks, baked.rank) if baked else None

    def _check(self, p: Any, name: str, value: Any) -> None:
        """Try the value with the script's own settings and a first look at the file, as far as no other axis changes them."""
        labels = plot_axes(p)
        others = {label[len(_OURS) :].lower() for label in labels or () if label.startswith(_OURS)} - {name}
        axes = {field: getattr(Wish(), field) for field in others} | {name: value}
        wish = wish_of(SimpleNamespace(**{AXES: axes}), True, *self._script_args(p)[1:])
        if name == "method" and value not in METHODS:
            raise DpoError(f"unknown; expected one of {one_of(value, METHODS)}")
        if name == "rank" and value < 1:
            raise DpoError("no rank; expected a whole number of at least 1, such as 16")
        parse_blocks(wish.blocks.replace(";", ","))
        if wish.offset == NO_OFFSET:
            if name == "offset" or "offset" in others or labels is None or not wish.is_on:  # without a plot: nothing is known
                return
            raise DpoError(f"no offset is chosen; choose one in the script «{TITLE}», or add the axis [DPO] Offset")
        if not wish.is_on:
            return
        if self._session.host.live.chosen() is None and "method" not in others and _CHECKPOINT not in (labels or ()):
            patch_for(self._session, wish)
        else:  # whether the offset fits shows with the cells: only then their model is loaded, or their file known
            self._session.library.offset(wish.offset)
