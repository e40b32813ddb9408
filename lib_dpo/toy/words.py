"""What a study found, in plain words: for the terminal and the page."""

from __future__ import annotations

from lib_dpo.toy.series import Series
from lib_dpo.toy.study import FULL, Findings, Interval

TOYS = (
    "These are toy pictures: a small model that draws coloured shapes, judged by rules. They show how the tool works and how "
    "to read its figures. What DPO does to your model, only pictures from it can say: the command compare draws them."
)

_FEW = 300  # pictures a point: fewer cannot show what this model gains


def sentences(findings: Findings, series: Series, study: Findings | None = None) -> list[str]:
    """One finding each.

    Args:
        study: what many more pictures of the same model found; told beside what these cannot tell.
    """
    found = [_turned(findings), *_turned_by_loras(series), _gain(findings)]
    if findings.told:
        found += [_curve(findings), _suggested(findings), *_loras(findings)]
    if study and not findings.told:
        told = [_turned(study), _gain(study), _curve(study), _suggested(study), *_loras(study)]
        found += [f"In the study that comes with the model, of{told[0].removeprefix('Of')}", *told[1:]]
    return [*found, _switching(series)]


def table(findings: Findings) -> list[tuple[str, str, str]]:
    """Rows of what was applied, the share of pictures that fit their prompts, and its 95 % interval."""
    rows = [("without DPO" if not one.strength else f"strength {one.strength:g}", one) for one in findings.points]
    rows += [(f"LoRA of rank {one.rank}", one.point) for one in findings.loras]
    return [(name, percent(one.mean), f"{percent(one.low)} to {percent(one.high)}") for name, one in rows]


def headlines(findings: Findings, study: Findings | None = None) -> list[tuple[str, str]]:
    """A figure and what it is, two to five of them: what was counted, and what the pictures (or the study's) can tell."""
    turned = f"{findings.became_right} right, {findings.became_wrong} wrong"
    found = [
        (turned, f"is what became of {findings.points[0].n} pictures from strength 0 to 1; the others stayed right or wrong")
    ]
    told = findings if findings.told or not study else study
    if told.told:
        gain, (first, last), n = told.gain, told.plateau, told.points[0].n
        low, high = f"{100 * gain.low:+.1f}", f"{100 * gain.high:+.1f}"
        text = f"in the share of {n} pictures that fit their prompt, at strength 1 (95 % interval {low} to {high})"
        found.append((f"{100 * gain.mean:+.1f} points", text))
        if first != last:
            found.append((f"{first:g} to {last:g}", f"strengths that {n} pictures cannot tell from the best"))
        else:
            found.append((f"{first:g}", f"best of the strengths that were tried with {n} pictures"))
    found.append((f"{findings.suggested:g}", "strength that the tool suggests"))
    if told.loras and (share := told.loras[-1].share) and share.is_told:
        kept = f"of the gain of {told.points[0].n} pictures is kept by a LoRA of rank {told.loras[-1].rank}"
        found.append((f"{100 * share.mean:.0f} %", kept))
    return found


def percent(share: float) -> str:
    """Such as 41.7 %."""
    return f"{100 * share:.1f} %"


def points(interval: Interval) -> str:
    """A difference of shares in percentage points, with its interval."""
    return f"{100 * interval.mean:+.1f} points (95 % interval {100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def _turned(findings: Findings) -> str:
    stayed = findings.points[0].n - findings.became_right - findings.became_wrong
    return (
        f"Of {findings.points[0].n} pictures {findings.became_right} became right from strength 0 to 1, "
        f"{findings.became_wrong} became wrong, and {stayed} stayed right or wrong."
    )


def _turned_by_loras(series: Series) -> list[str]:
    """How much of what the full change turned the LoRA of the highest rank turns too."""
    if not series.loras:
        return []
    rank, lora = max(series.loras.items())
    base, full = series.strengths[0.0].scores, series.strengths[FULL].scores
    right, wrong = full > base, full < base
    return [
        f"With the LoRA of rank {rank}, {int((lora.scores > base)[right].sum())} of these {int(right.sum())} become right too, "
        f"and {int((lora.scores < base)[wrong].sum())} of these {int(wrong.sum())} wrong."
    ]


def _gain(findings: Findings) -> str:
    at = {one.strength: one for one in findings.points}
    before, after = percent(at[0.0].mean), percent(at[FULL].mean)
    text = f"{before} of {at[0.0].n} pictures show all that their prompt names without DPO, {after} with it at strength 1"
    if findings.told:
        return f"{text}: {points(findings.gain)}, same prompts and seeds."
    return f"{text}: that may be chance, {points(findings.gain)}. {_few(at[0.0].n)}"


def _few(pictures: int) -> str:
    more = "; `dpo demo --study` draws 500 a point" if pictures < _FEW else ""
    return f"{pictures} pictures tell neither strengths nor LoRAs apart{more}."


def _curve(findings: Findings) -> str:
    best, last = findings.best, findings.points[-1].strength
    if not findings.rise.rises:
        return "The curve over the strengths does not rise for sure."
    text = f"The curve rises up to strength {best:g}, {points(findings.rise)}"
    if best == last:
        return f"{text}, the highest that was tried."
    if findings.fall.falls:
        return f"{text}, and falls from there to strength {last:g}, {points(findings.fall)}."
    return f"{text}; up to strength {last:g} it does not fall for sure, {points(findings.fall)}."


def _suggested(findings: Findings) -> str:
    first, last = findings.plateau
    where = "is among them" if findings.suggested_is_best else "is NOT among them"
    found = f"{findings.points[0].n} pictures cannot tell strengths {first:g} to {last:g} from the best, {findings.best:g}"
    if first == last:
        where = "is just that" if findings.suggested_is_best else "is another one"
        found = f"The best of the strengths that were tried is {first:g}, and every other one is surely worse"
    return f"{found}; the suggested strength, {findings.suggested:g}, {where}."


def _loras(findings: Findings) -> list[str]:
    if not findings.loras:
        return []
    main = findings.loras[-1]
    if main.share is None:
        return ["What LoRAs keep of the gain cannot be told, since the gain itself is not sure."]
    share, low, high = (f"{100 * value:.0f}" for value in main.share)
    if not main.share.is_told:
        return [
            f"What a LoRA of rank {main.rank} keeps of the gain, so few pictures cannot tell ({share} %, 95 % interval {low} "
            f"to {high} %); it holds {percent(main.energy_kept)} of the change."
        ]
    return [
        f"A LoRA of rank {main.rank}, which holds {percent(main.energy_kept)} of the change, keeps {share} % "
        f"of its gain (95 % interval {low} to {high} %)."
    ]


def _switching(series: Series) -> str:
    switch, cell = series.switch_seconds, series.cell_seconds
    share = f"{100 * switch / cell:.0f} %"
    return f"Going over to another strength takes {switch:.3f} s, {share} of the {cell:.2f} s that one picture takes."
