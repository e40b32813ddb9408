"""Reports in plain words, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lib_dpo.errors import printable
from lib_dpo.families.blocks import block_labels
from lib_dpo.offsets.coverage import LeftOut, left_out_lines
from lib_dpo.offsets.lora.unplaced import twin_lines, unplaced_lines
from lib_dpo.offsets.prediction import Prediction
from lib_dpo.operations.bake import BakeReport
from lib_dpo.operations.compat import CompatReport
from lib_dpo.operations.diff import DiffReport
from lib_dpo.operations.extract import ExtractReport
from lib_dpo.operations.inspect import Inspection
from lib_dpo.operations.measure import Row, Tally
from lib_dpo.operations.resize import ResizeReport
from lib_dpo.operations.verdict import Verdict, changed_text_encoders
from lib_dpo.operations.verify import Fit, VerifyReport
from lib_dpo.operations.write_offset import OffsetReport

if TYPE_CHECKING:
    from lib_dpo.pictures.function import FunctionReport

_RELATED = 0.01  # of the change: what a file keeps of it at its best strength, below which it has nothing to do with it


def diff_text(report: DiffReport) -> str:
    """The verdict, sizes per component and a bar per block."""
    lines = [report.verdict.text, *([f"both hold {report.blocks.text}"] if report.blocks.pruned else []), ""]
    for name, row in report.tally.components.items():
        lines.append(
            f"{name:<5} {row.numel / 1e6:8.1f} M parameters, changed by {_percent(row.relative_change)} of their size "
            f"(rms {row.rms:.1e}, noise floor {_percent(row.noise_floor)})"
        )
    lines += [
        f"VAE   {report.vae}",
        *_predictions(report.predictions),
        *_left_out(report.left_out),
        "",
        "size of the change by block, in % of the weights",
    ]
    rows = {name: row for name, row in _ordered(report.tally) if row.offset}
    most = max((row.relative_change for row in rows.values()), default=1.0)
    lines += [
        f"  {name:<6} {_percent(row.relative_change):>8}  {_bar(row.relative_change / most)}" for name, row in rows.items()
    ]
    if report.spectra:
        kept = zip(report.spectra.ranks, report.spectra.energy_at_rank, report.spectra.size_mb_at_rank, strict=True)
        lines += ["", "what a LoRA keeps at best, by rank"]
        lines += [f"  rank {rank:<4} {_percent(share):>8}  {size:8.1f} MB" for rank, share, size in kept]
    return "\n".join(lines)


def extract_text(report: ExtractReport) -> str:
    """The result card of an extraction."""
    total = report.tally.total
    used = [rank for rank in report.ranks.values() if rank]
    ranks = "exact, int8" if report.form == "exact" else _ranks(min(used), max(used)) if used else "no pairs"
    asked = "" if report.policy in (ranks, "exact") else f", asked for: {report.policy}"
    ranks += f" in {report.precision}" * (report.precision == "fp8")
    lines = [
        f"wrote {report.path}  ({report.file_bytes / 1e6:.1f} MB, {report.layers} layers, {ranks}{asked})",
        f"energy kept {_percent(total.energy_kept)} of the DPO change" + _missed(report.energy_wanted, total.energy_kept),
        *_kept_by_component(report.tally),
        f"{_percent(total.noise_floor)} of the change may be rounding of the two files (noise floor)",
        *_left_out(report.left_out),
    ]
    lines = _with_verdict(report.verdict, lines)
    if report.capped:
        lines.append(
            f"{report.capped} of {report.layers} layers at a lower rank than asked for: a LoRA of a "
            "higher rank would be larger than these layers"
        )
    lines += [text for text in (report.exhausted_text, report.wider_text, report.card_text) if text]
    if report.fallbacks:
        lines.append("fell back: " + ", ".join(f"{reason} {count} x" for reason, count in report.fallbacks.items()))
    return "\n".join(lines)


def offset_text(report: OffsetReport) -> str:
    """What the offset file is good for."""
    lines = [
        f"wrote {report.path}  ({report.file_bytes / 1e6:.1f} MB, {report.tensors} tensors)",
        f"energy kept {_percent(report.kept.total.energy_kept)} of the DPO change",
        *_kept_by_component(report.kept),
        *_left_out(report.left_out),
    ]
    lines = _with_verdict(report.verdict, lines)
    if report.text_encoder_left_out:
        beyond = changed_text_encoders(report.tally)
        much = "" if beyond else ", by no more than rounding"
        lines.append(f"the text encoders differ too{much}; an offset file holds the UNet only")
    return "\n".join(lines)


def verify_text(report: VerifyReport) -> str:
    """Energy kept, in all and per block."""
    kept = report.tally.total.energy_kept
    lines = [f"energy kept {_percent(kept)} of the change"]
    if report.best_fit:
        lines.append(f"below zero: {_fit_text(report.best_fit)}")
    if report.claimed is not None:
        lines.append(
            f"its metadata says {_percent(report.claimed)}: {'agrees' if report.agrees else 'does NOT agree with these files'}"
        )
    lines += _kept_by_component(report.tally)
    lines += [f"  {name:<6} {_percent(row.energy_kept):>8}  {_bar(row.energy_kept)}" for name, row in _ordered(report.tally)]
    lines += twin_lines(report.twins) + unplaced_lines(report.unmatched)
    lines += _left_out(report.left_out)
    return "\n".join(lines)


def _fit_text(fit: Fit) -> str:
    """Why a file keeps less than nothing of a change, as far as its best strength tells."""
    if fit.energy_kept < _RELATED:
        return f"at no strength would it keep {_percent(_RELATED)} of this change; most likely it belongs to another pair"
    at = f"at strength {fit.strength:.2g} it would keep {_percent(fit.energy_kept)}"
    if fit.strength < 0:
        return f"{at}, so base and tuned are swapped, or the file holds the opposite"
    return f"{at}, so its scale (alpha) is {1 / fit.strength:.2g} times what this change needs"


def function_text(report: FunctionReport) -> str:
    """Function kept and its interval, and what it was measured with."""
    interval = f" (95 % interval {_percent(report.interval[0])} to {_percent(report.interval[1])})" if report.interval else ""
    counts = {"prompt": len(report.prompts), "seed": len(report.seeds), "timestep": report.timesteps}
    told = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items())
    return (
        f"function kept {_percent(report.kept)}{interval} of what tuning changed in the predictions of the UNet\n"
        f"measured over {told}; tuning changed them by {_percent(report.change)} of their size"
    )


def bake_text(report: BakeReport) -> str:
    """What was changed."""
    lines = [
        f"wrote {report.path}",
        f"{report.changed} tensors changed at strength {report.strength:g}"
        + (f" with blocks {report.blocks}" if report.blocks else "")
        + f", {report.kept} copied as they were",
        f"rounding to the file's number format lost {_percent(report.rounding_loss)} of the change",
    ]
    if report.already:
        lines.append(f"the target had {' and '.join(map(str, report.already))} baked in already: now both are in it")
    if report.unet_only:
        lines.append("holds the UNet alone, in diffusers naming, as a file in unet/ does: the target is a folder")
    if report.sidecar_text:
        lines.append(report.sidecar_text)
    lines += twin_lines(report.twins) + unplaced_lines(report.not_applied)
    return "\n".join(lines)


def resize_text(report: ResizeReport) -> str:
    """Ranks and energy before and after."""
    before, after = ("-".join(map(str, sorted(set(ranks)))) for ranks in (report.ranks_before, report.ranks_after))
    return (
        f"wrote {report.path}  ({report.file_bytes / 1e6:.1f} MB, {report.layers} layers, rank {before} -> {after})\n"
        f"keeps {_percent(report.energy_kept)} of the LoRA's energy"
        + _of_the_change(report.energy_of_change)
        + "".join(f"\n{line}" for line in (*_exhausted(report), *_twins(report.twins), *filter(None, [report.card_text])))
    )


def _exhausted(report: ResizeReport) -> list[str]:
    if not report.exhausted:
        return []
    return [f"{report.exhausted} of {report.layers} layers hold fewer components than asked for: the LoRA has no more"]


def _of_the_change(share: float | None) -> str:
    return "" if share is None else f", and so about {_percent(share)} of the change that the LoRA was made from"


def _twins(keys: Sequence[str]) -> list[str]:
    return [f"{len(keys)} keys repeat what others say and were left out, first {keys[0]}"] if keys else []


def inspect_text(found: Inspection) -> str:
    """What a file is, a line per fact."""
    family = "" if found.what else f", {found.family or 'unknown architecture'}, {found.layout} layout"
    lines = [
        f"{found.path.name}: {found.title}{family}",
        f"{found.tensors} tensors, {found.parameters / 1e6:.1f} M values, {found.file_bytes / 1e6:.1f} MB, "
        + ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items()),
    ]
    if found.components:
        lines.append("holds " + ", ".join(_with_count(name, found.contents) for name in found.components))
    if found.beside:
        lines.append("beside them " + found.beside)
    if found.ranks:
        lines.append(f"{_ranks(*found.ranks)}, scale {found.scale_text}")
    if found.energy_kept is not None:
        lines.append(f"holds {_percent(found.energy_kept)} of the change it was made from, says its metadata")
    if found.card and found.card.text:
        lines.append(f"beside it for the lists of WebUIs: {found.card.text}")
    lines += [f"an offset was baked in, says its metadata: {ingredient}" for ingredient in found.baked_in]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"for offsets: {breed.text}" for breed in found.breeds]
    lines += found.unplaced()
    lines += [f"  {_short(key)}: {_short(text)}" for key, text in sorted(found.metadata.items())]
    lines.append(f"sha256 {found.sha256}")
    return "\n".join(printable(line) for line in lines)


def compat_text(report: CompatReport) -> str:
    """The verdict and the figures behind it."""
    lines = [
        report.text,
        f"drift from the base {_percent(report.drift)}, cosine with the offset {report.cosine:+.3f}, "
        f"DPO inside {report.strength_inside:+.3f} ± {report.strength_error:.3f}",
        "drift by block, in % of the weights, and the strength inside",
    ]
    most = max((row.relative_drift for row in report.blocks.values()), default=0) or 1.0
    lines += [
        f"  {name:<6} {_percent(row.relative_drift):>8}  {row.strength:+6.2f}  {_bar(row.relative_drift / most)}"
        for name, row in report.blocks.items()
    ]
    lines += [
        "only UNets were compared",
        *_predictions(report.predictions),
        *_left_out([row for row in report.left_out if row.kind.weights]),
    ]
    return "\n".join(lines)


def _with_verdict(verdict: Verdict, lines: list[str]) -> list[str]:
    """What was written, then the verdict on the pair; a doubtful one comes before all else."""
    return [*lines, verdict.text] if verdict.level == "fits" else [verdict.text, *lines]


def _predictions(found: Mapping[str, Prediction]) -> list[str]:
    """What each file's model predicts, where any of them has a mark."""
    if not any(prediction.kind for prediction in found.values()):
        return []
    return [printable(f"{_HOLDERS[name]} predicts {prediction.text}") for name, prediction in found.items()]


_HOLDERS = {"base": "the base", "tuned": "the tuned file", "target": "the target"}


def _left_out(rows: Sequence[LeftOut]) -> list[str]:
    """What of the two files is in no figure; names from files may hold anything."""
    return [printable(line) for line in left_out_lines(rows, _HOLDERS)]


def _with_count(name: str, contents: Mapping[str, int]) -> str:
    return f"{name} ({contents[name]} tensors)" if name in contents else name


def _kept_by_component(tally: Tally) -> list[str]:
    if len(tally.components) < 2:
        return []
    return ["by part: " + ", ".join(f"{name} {_percent(row.energy_kept)}" for name, row in tally.components.items())]


def _missed(wanted: float | None, kept: float) -> str:
    if wanted is None or kept >= wanted - 1e-4:
        return ""
    return (
        f" instead of the {_percent(wanted)} asked for: a LoRA that keeps more would be larger than the layers that "
        "it stands for. An offset file holds all of the change"
    )


def _ordered(tally: Tally) -> Iterable[tuple[str, Row]]:
    return ((name, tally.blocks[name]) for name in block_labels(tally.architecture) if name in tally.blocks)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if abs(share) < 0.1 else f"{100 * share:.2f} %"


def _bar(share: float, width: int = 30) -> str:
    return "█" * max(0, round(width * min(1.0, share)))


def _short(text: str, limit: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _ranks(least: int, most: int) -> str:
    return f"rank {most}" if least == most else f"ranks {least} to {most}"
