"""The [DPO] axes of the host's X/Y/Z plot script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from lib_dpo.errors import DpoError
from lib_dpo.generation import METHODS, NO_OFFSET, patch_for, set_axis, wish_of
from lib_dpo.session import Session

# Costs order the loops of a grid: the dearest axis changes least often. A checkpoint costs 1.0.
_STRENGTH, _BLOCKS, _RANK, _METHOD, _OFFSET = 0.3, 0.5, 0.6, 0.65, 0.7


def add_axes(module: ModuleType, session: Session, script_args: Callable[[Any], Sequence[Any]]) -> None:
    """Append our axes to those of the X/Y/Z plot script, once.

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
            for value in values:
                try:
                    self._check(p, name, value)
                except DpoError as error:
                    raise RuntimeError(
                        f"[DPO] {name.capitalize()} {value!r}: {self._session.library.names_only(str(error))}"
                    ) from None

        return confirm

    def _check(self, p: Any, name: str, value: Any) -> None:
        """Try the value with the script's own settings and a first look at the file; other axes may still change them."""
        if name == "method" and value not in METHODS:
            raise DpoError(f"unknown; expected one of {', '.join(METHODS)}")
        args = list(self._script_args(p))
        if name == "strength":
            wish_of(p, True, *args[1:2], value)
            return
        wish = replace(wish_of(p, *args), enabled=True, **{name: value})
        if not wish.is_on or (name == "offset" and value == NO_OFFSET):
            return
        if name != "offset" and wish.offset == NO_OFFSET:  # another axis brings the offset
            return
        if self._session.host.live.chosen() is None:
            patch_for(self._session, wish)
        else:  # the host loads the chosen checkpoint only for the first cell: whether the offset fits shows then
            self._session.library.offset(wish.offset)
