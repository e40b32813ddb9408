"""One generation with an offset: what the always-on script and the XYZ axes ask for, and what the infotext says of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lib_dpo.errors import DpoError, HostError, NotFoundError, SettingError
from lib_dpo.hosts.base import Baked
from lib_dpo.offsets.patch import Patch
from lib_dpo.offsets.recipe import Ingredient
from lib_dpo.settings import is_finite, strength_of
from lib_dpo.webui import cells
from lib_dpo.webui.library import FileKind
from lib_dpo.webui.session import Session

logger = logging.getLogger(__name__)

TITLE = "DPO offset"
NO_OFFSET = "None"
Method = Literal["off", "LoRA", "exact"]
METHODS: tuple[Method, ...] = get_args(Method)
# Keys of the infotext: the host's parser wants words, spaces and dashes only. Never rename one: old pictures carry them.
INFOTEXT: Mapping[str, str] = {
    "offset": "DPO offset",
    "strength": "DPO strength",
    "blocks": "DPO blocks",
    "rank": "DPO rank",
    "baked": "DPO baked",
    "error": "DPO error",
}
_DIGITS = 20  # of a rank: Python reads thousands, and no more
AXES, _ACTIVE = "dpo_axes", "dpo_active"  # attributes that we set on the host's `p`


@dataclass(frozen=True)
class Wish:
    """What one generation is to get. `method` None: the offset as it was chosen."""

    enabled: bool = False
    offset: str = NO_OFFSET
    strength: float = 1.0
    blocks: str = ""
    rank: int | None = None
    method: Method | None = None

    @property
    def is_on(self) -> bool:
        return self.enabled and self.method != "off"


def wish_of(
    p: Any, enabled: Any = False, offset: Any = NO_OFFSET, strength: Any = 1.0, blocks: Any = "", rank: Any = 0, *_: Any
) -> Wish:
    """The script's own arguments, overridden by what XYZ axes set on `p`.

    An axis switches a script that is off on; the offset "None" of an axis is the model without one.

    Args:
        rank: 0 for all of the LoRA.

    Raises:
        SettingError: a switch that is neither on nor off, a strength or rank that is no number, or absurd.
    """
    axes: Mapping[str, Any] = getattr(p, AXES, {})
    if not (enabled is None or enabled in (False, True)):  # the text "False" would switch it on
        raise SettingError(f"enabled {str(enabled)[:40]!r} is neither true nor false; expected one of them")
    if not enabled and not axes:  # off: what stands in its fields does not matter
        return Wish()
    asked = {"offset": offset, "strength": strength, "blocks": blocks, "rank": rank, "method": None, **axes}
    return Wish(
        enabled=axes.get("offset") != NO_OFFSET if axes else True,
        offset=str(asked["offset"] or NO_OFFSET),
        strength=strength_of(asked["strength"]),
        blocks=str(asked["blocks"] or ""),
        rank=_rank(asked["rank"]),
        method=asked["method"],
    )


def set_axis(p: Any, name: str, value: Any) -> None:
    """Let an XYZ axis decide one field of the wish. The host copies `p` shallowly for each cell: never change the dict."""
    setattr(p, AXES, {**getattr(p, AXES, {}), name: value})


def _rank(value: Any) -> int | None:
    """A whole number, or its digits; nothing and 0 are all of the LoRA."""
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if text.isdecimal() and len(text) <= _DIGITS else text and value
    if value in (None, ""):
        return None
    if not is_finite(value) or value != int(value):
        raise SettingError(f"rank {str(value)[:40]!r} is not a whole number; expected one such as 16, or 0 for all")
    return int(value) or None


def patch_for(session: Session, wish: Wish) -> Patch:
    """The offset that a wish is about, opened for the loaded model.

    Raises:
        NotFoundError: none is chosen, it has vanished, or the method has no file to use.
        SettingError, MismatchError, BadFileError: as `Session.patch`.
    """
    if wish.offset in ("", NO_OFFSET):
        raise NotFoundError("no offset is chosen; choose a LoRA or an offset file")
    name = wish.offset
    if wish.method in ("LoRA", "exact"):
        kind: FileKind = "lora" if wish.method == "LoRA" else "offset"
        entry = session.library.same_pair(name, kind)
        if entry is None:
            wanted, make = ("LoRA", "Extract DPO LoRA") if kind == "lora" else ("offset file", "Write offset file")
            raise NotFoundError(f"{name}: no {wanted} of the same base and reference was found; make one with «{make}»")
        name = entry.name
    return session.patch(name, blocks=wish.blocks, rank=wish.rank)


class Generation:
    """The hooks of the always-on script, in our words; each is called with the host's `p`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def process(self, p: Any, *args: Any) -> None:
        """Once per generation, when the right checkpoint is loaded: decide, and write the infotext."""
        ours = set(INFOTEXT.values())  # cells of a grid share the dict with one another: start clean
        p.extra_generation_params = {key: text for key, text in p.extra_generation_params.items() if key not in ours}
        setattr(p, _ACTIVE, (None, 0.0))
        with self._refusing(p):
            baked = self._write_baked(p)
            if baked:
                self._tell_of_loss(p, baked)
            wish = wish_of(p, *args)
            if not wish.is_on:
                return
            if cells.plot_axes(p) is not None:
                cells.guard(p)
            patch = patch_for(self._session, wish)
            p.extra_generation_params.update(_infotext(wish, self._session.library.name_of(patch.checkpoint.path)))
            if wish.strength and patch.changed_keys():  # blocks that are all 0 leave nothing
                self._check_networks(p, patch)
                setattr(p, _ACTIVE, (patch, wish.strength))
                self._tell_of_refiner(p)
                if baked and _is_same(baked, patch.checkpoint.path):
                    p.comment(
                        f"{TITLE}: {self._ingredient(baked)} is baked into the model, and the script adds it once more, × "
                        f"{wish.strength:g}; undo the bake, or switch the script off, to have it once"
                    )

    def on_networks(self, p: Any, extra_network_data: dict[str, Any]) -> None:
        patch, strength = getattr(p, _ACTIVE, (None, 0.0))
        with self._refusing(p):
            self._tell_of_loras(p, patch, extra_network_data)
            self._session.host.live.on_networks(p, patch, strength, extra_network_data)

    def on_batch(self, p: Any) -> None:
        patch, strength = getattr(p, _ACTIVE, (None, 0.0))
        with self._refusing(p):
            self._write_baked(p)  # a refiner may have taken it away since the batch before
            self._session.host.live.on_batch(p, patch, strength)

    def on_sampling(self, p: Any) -> None:
        patch, strength = getattr(p, _ACTIVE, (None, 0.0))
        with self._refusing(p):
            self._session.host.live.on_sampling(p, patch, strength)

    def after_batch(self, p: Any) -> None:
        """The pictures of a batch are drawn, and their infotexts not yet written."""
        if getattr(p, _ACTIVE, (None, 0.0))[0] is None:
            return
        p.extra_generation_params.pop(INFOTEXT["error"], None)  # of another batch
        left_out = self._session.host.live.left_out()
        if left_out:
            p.comment(f"{TITLE}: {left_out}")
            p.extra_generation_params[INFOTEXT["error"]] = left_out

    def _write_baked(self, p: Any) -> Baked | None:
        """Let the infotext say what is in the weights now; that is given back."""
        baked = self._session.host.live.baked()
        if baked:
            p.extra_generation_params[INFOTEXT["baked"]] = self._ingredient(baked).text
        else:
            p.extra_generation_params.pop(INFOTEXT["baked"], None)
        return baked

    def _tell_of_loss(self, p: Any, baked: Baked) -> None:
        """Say that a bake does not outlast a picture for which another checkpoint is loaded.

        Raises:
            HostError: in a plot, of which the cells would differ.
        """
        other = "the refiner" if self._is_refined(p) else "the hires checkpoint" if _has_hires_checkpoint(p) else ""
        if not other:
            return
        found = f"{self._ingredient(baked)} is baked into the model, and {other} is loaded in its place to finish the picture"
        instead = "undo the bake and switch this script on, or save the baked model as a checkpoint and choose that"
        if cells.plot_axes(p) is not None:
            raise HostError(f"{found}: the first cell would hold it, and the others not; {instead}")
        p.comment(
            f"{TITLE}: {found}: unless the WebUI keeps both in memory, the bake is lost then, and the pictures after the first "
            f"batch are without it; to have it in all, {instead}"
        )

    def _is_refined(self, p: Any) -> bool:
        """Whether a refiner takes over: at once where no time is set, never at 1 or where it is the loaded checkpoint."""
        refiner, switch_at = getattr(p, "refiner_checkpoint", None), getattr(p, "refiner_switch_at", None)
        if refiner in (None, "", "None", "none") or (switch_at is not None and switch_at >= 1):
            return False
        found, loaded = getattr(p, "refiner_checkpoint_info", None), self._session.host.live.loaded()
        return found is None or loaded is None or Path(found.filename) != loaded.path

    def _check_networks(self, p: Any, patch: Patch) -> None:
        """Raises HostError where a request switches off what the offset would be added through."""
        if getattr(p, "disable_extra_networks", False) and self._session.host.live.needs_networks(p, patch):
            raise HostError(
                f"the request sets disable_extra_networks, and this WebUI adds {patch.name} the way it adds LoRAs; leave that "
                "field out, or switch the script off and bake the offset"
            )

    def _tell_of_refiner(self, p: Any) -> None:
        told = self._session.host.live.refiner
        if told and self._is_refined(p):
            p.comment(f"{TITLE}: {told}")

    def _tell_of_loras(self, p: Any, patch: Patch | None, extra_network_data: Mapping[str, Any]) -> None:
        """Say where a LoRA of the prompt is what the script adds or what is baked in: the picture holds both."""
        names = {str(network.items[0]) for network in extra_network_data.get("lora", ()) if getattr(network, "items", None)}
        baked = self._session.host.live.baked() if names else None
        for name in sorted(names if patch or baked else ()):
            try:
                file = self._session.library.offset(name)
            except NotFoundError:  # the host tells of those
                continue
            if patch and file == patch.checkpoint.path:
                p.comment(f"{TITLE}: the prompt has <lora:{name}>, and the script adds the same file; this picture holds both")
            if baked and _is_same(baked, file):
                p.comment(f"{TITLE}: the prompt has <lora:{name}>, and the same file is baked in; this picture holds both")

    def _ingredient(self, baked: Baked) -> Ingredient:
        """A bake by the name under which its file is listed, by which it can be chosen again."""
        name = self._session.library.name_of(baked.file) if baked.file else baked.offset
        return Ingredient(name, baked.strength, baked.blocks, baked.rank)

    @contextmanager
    def _refusing(self, p: Any) -> Iterator[None]:
        """No picture instead of one without the offset: the host would print an exception and go on without us."""
        try:
            yield
        except DpoError as error:
            logger.info("%s", error)
            self._abort(p, str(error))
        except Exception as error:
            logger.exception("the DPO offset could not be applied")
            self._abort(p, f"this should not happen: {type(error).__name__}: {error}")

    def _abort(self, p: Any, why: str) -> None:
        """Without a picture; in a plot, of which the other cells go on, with a card that says why."""
        setattr(p, _ACTIVE, (None, 0.0))
        why, in_plot = self._session.library.names_only(why), cells.plot_axes(p) is not None  # pictures are passed on
        if in_plot and getattr(p, AXES, {}):
            why = f"{', '.join(f'[DPO] {name.capitalize()} {value}' for name, value in getattr(p, AXES).items())}: {why}"
        p.extra_generation_params[INFOTEXT["error"]] = why  # API callers see the infotext, not the page's comments
        if in_plot:
            p.comment(f"{TITLE}: {why}")
            cells.fail(p, why)
        else:
            self._session.host.abort(p, f"{TITLE}: {why}")


def _has_hires_checkpoint(p: Any) -> bool:
    chosen = getattr(p, "hr_checkpoint_name", None)
    return bool(getattr(p, "enable_hr", False)) and chosen not in (None, "", "None", "Use same checkpoint")


def _is_same(baked: Baked, file: Path) -> bool:
    return baked.file is not None and baked.file == file


def _infotext(wish: Wish, name: str) -> dict[str, Any]:
    """The wish as the infotext has it; what is at its default is left out.

    Args:
        name: the file that is used, which a method may have chosen in the place of the one that was asked for: pasting
            brings the same picture then.
    """
    entries: dict[str, Any] = {INFOTEXT["offset"]: name, INFOTEXT["strength"]: wish.strength}
    for field in ("blocks", "rank"):
        if getattr(wish, field):
            entries[INFOTEXT[field]] = getattr(wish, field)
    return entries
