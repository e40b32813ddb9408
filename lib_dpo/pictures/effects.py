"""How much a comparison's variants change the pictures: figures, and what they say in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lib_dpo.errors import SettingError
from lib_dpo.pictures.plan import UNTOUCHED, Cell, Images, Plan, Variant

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.float32]  # (height, width, 3), 0 to 255

# Heuristics, set beside what is known to be small or large on a photo of 512x600. Mean difference in grey levels of 255 and
# structure (1 = the same): JPEG at quality 75 gives 1.5 and 0.99, at 20 6.0 and 0.83; moving it by one pixel 7.9 and 0.77,
# by eight 25 and 0.41; an unrelated picture 60 and 0.28.
VISIBLE = 1.0  # grey levels: below, it is no more than noise of one level in every pixel
STRONG = 8.0  # grey levels, or
STRONG_STRUCTURE = 0.75  # structure below this: edges have moved

# A picture that has fallen apart, as far as pixels can tell.
FLAT = 2.0  # standard deviation of the brightness, in grey levels: one colour, as after NaNs
NOISE, NOISE_GROWTH = 60.0, 3.0  # mean |Laplacian| of the brightness; a sharp photo has 17, oversharpened 49, noise 140
BURNT, BURNT_GROWTH = 0.5, 0.3  # share of values that are 0 or 255; a photo at twice its contrast has 0.6

JUMP = 3.0  # an effect that grows so many times faster than before jumps
_EVEN = 2.0  # growth per strength that differs by more than so many times is not steady
_UNEVEN = 0.9  # a mean difference that falls below this share of an earlier one does not grow

Level = Literal["none", "subtle", "strong", "broken"]
WORDS: dict[Level, str] = {
    "none": "no visible effect",
    "subtle": "subtle",
    "strong": "strong",
    "broken": "the pictures fall apart",
}
CAVEAT = "The figures say how much changes, not which picture is better: that is for your eyes."
NO_EFFECT = (
    "Three usual reasons: your file holds little of the offset (take a LoRA of higher rank, or an offset file, which holds all "
    "of it), your model has DPO in it already or is far from its base (ask whether the offset fits it), or the strength is "
    "too low (try 1.5 and 2). Compare on several seeds, with prompts that name several things."
)


@dataclass(frozen=True)
class Effect:
    """What one variant changes against the untouched model, over all prompts and seeds."""

    variant: Variant
    difference: float  # mean absolute difference of the pixels in grey levels, 0 to 255
    least: float  # the picture that changes least
    most: float
    structure: float  # mean SSIM of the brightness, 1 = the same
    broken: tuple[str, ...]  # one reason per picture that has fallen apart
    level: Level
    text: str

    def as_json(self) -> dict[str, Any]:
        return {
            "variant": self.variant.label,
            "difference": {"mean": self.difference, "min": self.least, "max": self.most},
            "structure": self.structure,
            "broken": list(self.broken),
            "verdict": {"level": self.level, "text": self.text},
        }


@dataclass(frozen=True)
class EffectReport:
    """All variants of a plan, and what they say together. `suggested` is one of the variants, or None."""

    effects: tuple[Effect, ...]
    level: Level
    text: str
    suggested: Variant | None
    caveat: str

    def as_json(self) -> dict[str, Any]:
        """The figures that front ends print."""
        return {
            "effects": [effect.as_json() for effect in self.effects],
            "verdict": {"level": self.level, "text": self.text, "caveat": self.caveat},
            "suggested": self.suggested.label if self.suggested else None,
        }


def effects(plan: Plan, images: Images) -> EffectReport:
    """Compare every picture with the untouched one of its prompt and seed.

    Raises:
        SettingError: pictures of one row that differ in size.
    """
    variants = [variant for variant in plan.variants if variant != UNTOUCHED]
    figures: dict[Variant, list[tuple[float, float, str]]] = {variant: [] for variant in variants}
    for prompt, seed in plan.rows:
        before = pixels(images[Cell(prompt, seed, UNTOUCHED)])
        for variant in variants:
            after = pixels(images[Cell(prompt, seed, variant)])
            figures[variant].append((_mean(difference(before, after)), structure(before, after), fallen_apart(before, after)))
    return _judge([_effect(variant, rows) for variant, rows in figures.items()], pictures=len(plan.rows))


def pixels(image: Image) -> Pixels:
    """A picture's pixels; what is transparent lies on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32)
        opaque = rgba[..., 3:] / 255
        return np.asarray(rgba[..., :3] * opaque + 255 * (1 - opaque), dtype=np.float32)
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def difference(before: Pixels, after: Pixels) -> Pixels:
    """Absolute difference per pixel in grey levels, the mean of the three channels.  # (height, width)

    Raises:
        SettingError: pictures of different size.
    """
    if before.shape != after.shape:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (before.shape, after.shape)]
        raise SettingError(f"pictures of {sizes[0]} and {sizes[1]} cannot be compared; expected one size")
    return np.asarray(np.abs(after - before).mean(axis=-1))


def structure(before: Pixels, after: Pixels) -> float:
    """Mean structural similarity of the brightness over windows of 8x8 (Wang et al. 2004, with plain windows)."""
    x, y = _windows(_brightness(before)), _windows(_brightness(after))
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    covariance = (x * y).mean(axis=1) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return _mean(likeness * (2 * covariance + c2) / (x.var(axis=1) + y.var(axis=1) + c2))


def _windows(brightness: Pixels) -> NDArray[np.float64]:
    """One row per 8x8 window; what does not fill one at the right and bottom is left out. A tiny picture is one window."""
    height, width = brightness.shape
    if min(height, width) < 8:
        return brightness.reshape(1, -1).astype(np.float64)
    whole = brightness[: height - height % 8, : width - width % 8].astype(np.float64)
    tiles = whole.reshape(height // 8, 8, width // 8, 8)
    return np.asarray(tiles.swapaxes(1, 2).reshape(-1, 64))


def _brightness(picture: Pixels) -> Pixels:
    return np.asarray(picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32))  # ITU-R BT.601


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64))


def fallen_apart(before: Pixels, after: Pixels) -> str:
    """Why a picture counts as broken where the untouched one is not, in a few words; empty when it does not."""
    old, new = _brightness(before), _brightness(after)
    if new.std() < FLAT <= old.std():
        return "one flat colour"
    if _roughness(new) >= max(NOISE, NOISE_GROWTH * _roughness(old)):
        return "noise"
    if _clipped(after) >= max(BURNT, BURNT_GROWTH + _clipped(before)):
        return "burnt out"
    return ""


def _roughness(brightness: Pixels) -> float:
    """Mean |Laplacian|."""
    if min(brightness.shape) < 3:
        return 0.0
    middle, around = brightness[1:-1, 1:-1], (brightness[:-2, 1:-1], brightness[2:, 1:-1])
    return _mean(np.abs(4 * middle - sum(around) - brightness[1:-1, :-2] - brightness[1:-1, 2:]))


def _clipped(picture: Pixels) -> float:
    return _mean((picture <= 0) | (picture >= 255))


# ---- in words ----


def _effect(variant: Variant, rows: Sequence[tuple[float, float, str]]) -> Effect:
    differences = [row[0] for row in rows]
    mean = sum(differences) / len(rows)
    alike = sum(row[1] for row in rows) / len(rows)
    broken = tuple(row[2] for row in rows if row[2])
    level: Level
    if 2 * len(broken) > len(rows):
        level = "broken"
    elif mean < VISIBLE:
        level = "none"
    else:
        level = "strong" if mean >= STRONG or alike < STRONG_STRUCTURE else "subtle"
    text = WORDS[level]
    if broken:
        text += f" ({len(broken)} of {len(rows)}{'' if level == 'broken' else ' fall apart'}: {', '.join(sorted(set(broken)))})"
    return Effect(variant, mean, min(differences), max(differences), alike, broken, level, text)


def _judge(found: list[Effect], pictures: int) -> EffectReport:
    caveat = CAVEAT
    if pictures == 1:
        caveat += " And this is one picture per column: more seeds make it surer."
    level: Level = max((effect.level for effect in found), key=list(WORDS).index)
    suggested = None
    if level == "none":
        text = _no_effect(found)
    elif all(isinstance(effect.variant.value, float) for effect in found):
        text, suggested = _strengths(found)
    else:
        text = _ranking(found)
    return EffectReport(tuple(found), level, text, suggested, caveat)


def _no_effect(found: list[Effect]) -> str:
    strengths = all(isinstance(effect.variant.value, float) for effect in found)
    where = "at any strength" if strengths else "in any column"
    if not any(effect.most for effect in found):
        return (
            f"No effect {where}: the pictures are equal to the last bit, so nothing was applied, or less than the model's "
            "numbers can hold. Look for a model of another architecture than the offset, or for keys that the WebUI reported "
            "as not matched."
        )
    return f"No visible effect {where}. {NO_EFFECT}"


def _ranking(found: list[Effect]) -> str:
    order = sorted((effect for effect in found if effect.level != "broken"), key=lambda effect: effect.difference)
    broken = [effect.variant.label for effect in found if effect.level == "broken"]
    parts = []
    if len(order) == 1:
        parts.append(f"The change with {order[0].variant.label}: {order[0].text}")
    elif order:
        most, least = order[-1], order[0]
        parts.append(
            f"The change is largest with {most.variant.label} ({most.difference:.1f} grey levels on average) "
            f"and smallest with {least.variant.label} ({least.difference:.1f})"
        )
    if broken:
        parts.append(f"The pictures fall apart with {', '.join(broken)}")
    return ". ".join(parts) + "."


def _strengths(found: list[Effect]) -> tuple[str, Variant | None]:
    """How the effect grows with the strength, and the strength nearest to 1, the full change, of those worth starting with."""
    rising = sorted((effect for effect in found if effect.variant.value > 0), key=lambda effect: effect.variant.value)
    if not rising:
        return _ranking(found), None
    sound = rising[: next((i for i, effect in enumerate(rising) if effect.level == "broken"), len(rising))]
    broken = [effect.variant.value for effect in rising[len(sound) :]]
    if not sound:
        return f"The pictures fall apart from strength {broken[0]:g} on; try lower ones, such as {broken[0] / 4:g}.", None
    text, steady = _growth(sound)
    if broken:
        text += f"; the pictures fall apart from {broken[0]:g} on"
    visible = [effect for effect in steady if effect.level != "none"]
    if not visible and (broken or len(steady) < len(sound)):  # nothing is to be seen before the jump
        return f"{text}; compare strengths between the two.", None
    if not visible:
        return f"{text}.{_opposite(found)}", None
    if len(rising) == 1:
        times = 0.5 if rising[0].level == "strong" else 2  # of a subtle effect more may be wanted
        return f"{text}; compare it with others, such as {rising[0].variant.value * times:g}.", None
    start = min(visible, key=lambda effect: (abs(effect.variant.value - 1), effect.variant.value))
    though = ", where it is subtle" if start.level == "subtle" and any(effect.level == "strong" for effect in sound) else ""
    return f"{text}; start with {start.variant.value:g}{though}.", start.variant


def _opposite(found: list[Effect]) -> str:
    """What the largest strength below 0 does, after a sentence that tells of no effect above it."""
    below = [effect for effect in found if effect.variant.value < 0 and effect.level != "none"]
    if not below:
        return ""
    most = min(below, key=lambda effect: effect.variant.value)
    does = "the pictures fall apart" if most.level == "broken" else f"the effect is {most.level}"
    return f" With strength {most.variant.value:g}, the opposite of DPO, {does}."


def _growth(sound: list[Effect]) -> tuple[str, list[Effect]]:
    """In words how the effect grows, and the strengths up to where it does so steadily."""
    if all(effect.level == "none" for effect in sound):
        return f"No visible effect up to strength {sound[-1].variant.value:g}", sound
    if len(sound) == 1:
        return f"The effect of strength {sound[0].variant.value:g} is {sound[0].level}", sound
    strength, so_far, slope, top = 0.0, 0.0, 0.0, 0.0
    slopes: list[float] = []
    for i, effect in enumerate(sound):
        step, gain = effect.variant.value - strength, effect.difference - so_far
        if effect.difference < _UNEVEN * so_far:
            return "The effect does not grow steadily with the strength, so more seeds are needed", sound
        if i and effect.level == "strong" and gain / step > JUMP * max(slope, VISIBLE):
            return f"The effect jumps between {strength:g} and {effect.variant.value:g}", sound[:i]
        if effect.difference > so_far:
            top = effect.variant.value
        slopes.append(gain / step)
        strength, so_far, slope = effect.variant.value, max(so_far, effect.difference), effect.difference / effect.variant.value
    if top < strength:
        return f"In these pictures the effect grows up to {top:g} and no further", sound
    steadily = "steadily " if max(slopes) <= _EVEN * min(slopes) else ""
    return f"The effect grows {steadily}up to {strength:g}", sound
