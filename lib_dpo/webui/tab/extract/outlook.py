"""The curve on the page Extract: what a LoRA of each size keeps, and the one that is asked for, before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lib_dpo.errors import DpoError, SettingError
from lib_dpo.pictures.curve import Point, size_curve
from lib_dpo.settings import RankPolicy
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup, parts
from lib_dpo.webui.tab.standing import Given, about, given

if TYPE_CHECKING:
    from lib_dpo.operations.outlook.sizes import Foreseen, Sizes, Way

BY_RANK, BY_SIZE, BY_ENERGY, EXACT = "Rank", "Size", "Share", "Exact"
PUBLISHED_RANK, SMALL_MB = 128, 80
PRESETS = {
    "published": ("As published", f"Rank {PUBLISHED_RANK}, like the LoRAs that others have published"),
    "small": ("Small", f"At most {SMALL_MB} MB, divided among the layers by what they count for"),
    "most": ("All that fits", "As much of the change as a LoRA can hold"),
    "exact": ("Exact", "The whole change, a byte for each weight"),
}
_WAYS: dict[str, Way] = {BY_RANK: "rank", BY_SIZE: "size", BY_ENERGY: "energy", EXACT: "energy"}
_DOTS = 8  # points of the curve that can be pointed at
_LONG = (
    "Analyse reads both files and takes every layer apart: a minute or two for SD 1.5 and several for SDXL, less on a GPU. It "
    "is remembered, so the next look takes no time. Then a curve stands here: what a LoRA of each size keeps."
)


def outlook(session: Session, base: str | None, reference: str | None, *controls: Any) -> list[Any]:
    """The curve of a pair or that it is not known yet, what that is about, and the ends of the two sliders of ranks."""
    html, key, last = "", None, None
    if reference:
        try:
            key = session.pair_key(parts.checkpoint_name(base), reference)
            html = drawn(session, key, *controls)
            sizes = session.figures.sizes(key, *controls[-2:]) if key else None
            last = sizes.largest_rank if sizes else None
        except DpoError as error:
            html = parts.error_html(session, error)
    ends = [_ended(last, value) for value in controls[1:3]]
    found = given(
        html, lambda: about(session, parts.checkpoint_name(base), session.library.reference(reference or ""), model=True), key
    )
    return [html, found, *ends]


def moved(session: Session, known: Given | None, *controls: Any) -> list[Any]:
    """The same curve for other controls: no file is looked at."""
    return [parts.update() if known is None or known.why else drawn(session, known.key, *controls)]


def drawn(
    session: Session, key: tuple[str, str] | None, by: str, rank: Any, conv_rank: Any, size: Any, energy: Any, profile: str,
    precision: str,
) -> str:  # fmt: skip
    """Sentence and curve of a pair by its key; what takes long where the pair is not known."""
    sizes = session.figures.sizes(key, profile, precision) if key else None
    if sizes is None:
        return markup.note(_LONG)
    marked, words = None, ""
    try:
        marked = sizes.exact() if by == EXACT else sizes.foresee(policy_of(by, rank, conv_rank, size, energy))
        words = f'<p class="dpo-marked-words">{markup.text(_sentence(by, marked, rank) + _rest(by, marked, sizes))}</p>'
    except SettingError as error:
        words = parts.error_html(session, error)
    way = _WAYS.get(by, "rank")
    curve = sizes.curve(way)
    caption = f"Change kept by a LoRA of each size ({precision})"
    dots = [_point(each, _dot_words(way, each)) for each in _dots(way, curve)]
    mark = _point(marked, _sentence(by, marked, rank)) if marked else None
    return words + size_curve([_point(each) for each in curve], dots, mark, caption)


def policy_of(by: str, rank: float | None, conv_rank: float | None, size: float | None, energy: float | None) -> RankPolicy:
    """The size controls as a rank policy. Raises SettingError."""
    if by == EXACT:
        return RankPolicy()
    if by == BY_SIZE:
        return RankPolicy(size_mb=_number(size, "size in MB"))
    if by == BY_ENERGY:
        return RankPolicy(energy=_number(energy, "share of the change") / 100)
    return RankPolicy(rank=int(_number(rank, "rank")), conv_rank=int(conv_rank or 0) or None)


def preset(session: Session, name: str, known: Given | None) -> list[Any]:
    """By, rank, rank of convolutions, size and share of a preset."""
    sizes: Sizes | None = None
    if known and known.key:
        sizes = session.figures.sizes(known.key, "portable", "fp16")
    rank = min(PUBLISHED_RANK, sizes.largest_rank) if sizes else PUBLISHED_RANK
    same = parts.update()
    return {
        "published": [parts.update(value=BY_RANK), parts.update(value=rank), parts.update(value=0), same, same],
        "small": [parts.update(value=BY_SIZE), same, same, parts.update(value=SMALL_MB), same],
        "most": [parts.update(value=BY_ENERGY), same, same, same, parts.update(value=100)],
        "exact": [parts.update(value=EXACT), same, same, same, same],
    }[name]


def _number(value: float | None, what: str) -> float:
    if value is None:
        raise SettingError(f"the {what} is missing; give a number")
    return value


def _ended(last: int | None, value: Any) -> Any:
    """A slider of ranks that ends where the model's layers do.

    One that stands beyond them is moved first, and ends there at the next look: the newest gradio answers with a bare "Error"
    where a value comes that lies beyond an end which the page has not heard of yet.
    """
    if last is None:
        return parts.update()
    return parts.update(value=last) if (value or 0) > last else parts.update(maximum=last)


def _sentence(by: str, found: Foreseen, rank: Any) -> str:
    size, kept = markup.size(found.file_bytes), markup.percent(found.energy_kept)
    if by == EXACT:
        return f"Exact → {size}, keeps {'all of the change' if found.energy_kept >= markup.ALL else kept}"
    if by == BY_RANK:
        return f"Rank {int(rank)} → {size}, keeps {kept}"
    return f"{size} → keeps {kept}, ranks up to {found.largest_rank}"


def _rest(by: str, found: Foreseen, sizes: Sizes) -> str:
    """What holds the part of the change that this LoRA would lack; nothing where it lacks none to speak of."""
    if by == EXACT or found.energy_kept >= markup.NEARLY_ALL:
        return ""
    exact = sizes.exact().energy_kept
    if exact < markup.ALL:
        return f". The most that a file can keep: an exact LoRA, {markup.percent(exact)}"
    beside = ", or an offset file to bake" if sizes.components == ("unet",) else ""  # which holds the UNet alone
    return f". All of it: an exact LoRA{beside}"


def _dots(way: Way, curve: Sequence[Foreseen]) -> list[Foreseen]:
    if way == "rank":  # 1, 2, 4, ... and the last
        return [each for each in curve if each.largest_rank & (each.largest_rank - 1) == 0 or each is curve[-1]]
    return list(curve[:: max(1, len(curve) // _DOTS)])


def _dot_words(way: Way, found: Foreseen) -> str:
    said = f"{markup.size(found.file_bytes)}, keeps {markup.percent(found.energy_kept)}"
    return f"Rank {found.largest_rank}: {said}" if way == "rank" else said


def _point(found: Foreseen, words: str = "") -> Point:
    return Point(found.file_bytes, found.energy_kept, words)
