"""What `import lib_dpo` gives: each command on model files as a function, for notebooks and other tools.

Files are paths, or what `open_model` and `open_offset` gave, which stays open. Keyword arguments are named as the options
of the command line and mean the same. Errors are those of lib_dpo.errors. docs/library.md has examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from lib_dpo.errors import SettingError
from lib_dpo.families.arch import Architecture
from lib_dpo.families.blocks import BlockWeights, check_blocks, parse_blocks
from lib_dpo.families.model import Model, open_model
from lib_dpo.files.atomic import check_output, check_safetensors_output
from lib_dpo.files.checkpoint import Checkpoint, open_checkpoint, sha256_in_background
from lib_dpo.files.sidecar import check_sidecar
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import Offset, Pair, open_pair
from lib_dpo.offsets.patch import check_changes
from lib_dpo.operations.bake import BakeReport
from lib_dpo.operations.bake import bake as bake_opened
from lib_dpo.operations.compat import CompatReport
from lib_dpo.operations.compat import compat as compat_opened
from lib_dpo.operations.diff import DiffReport
from lib_dpo.operations.diff import diff as diff_opened
from lib_dpo.operations.extract import ExtractReport
from lib_dpo.operations.extract import extract as extract_opened
from lib_dpo.operations.inspect import Inspection
from lib_dpo.operations.inspect import inspect as inspect_file
from lib_dpo.operations.resize import ResizeReport
from lib_dpo.operations.resize import resize as resize_opened
from lib_dpo.operations.verify import VerifyReport
from lib_dpo.operations.verify import verify as verify_opened
from lib_dpo.operations.write_offset import OffsetReport
from lib_dpo.operations.write_offset import write_offset as write_offset_opened
from lib_dpo.progress import Progress
from lib_dpo.settings import LORA_PRECISIONS, PRECISIONS, ExtractSettings, Method, RankPolicy, check, one_of, strength_to_bake

__all__ = [
    "bake", "compat", "diff", "extract", "inspect", "open_model", "open_offset", "resize", "verify", "write_offset",
]  # fmt: skip
ModelFile = str | Path | Model
OffsetFile = str | Path | Offset


def diff(
    base: ModelFile, tuned: ModelFile, *, spectra: bool = False, device: str = "auto", progress: Progress | None = None
) -> DiffReport:
    """What a pair's difference looks like, and whether it is the right pair. `verdict.level` is fits, doubtful or wrong.

    Args:
        spectra: singular values of every layer too, and what a LoRA of each size keeps; takes as long as an extraction.
        device: for the spectra; auto, cpu or cuda[:N].
        progress: called with done and total (parameters) and the name of a tensor; raise `Cancelled` in it to stop.

    Raises:
        BadFileError, UnsafeFileError: a file that cannot be read. MismatchError: files that do not belong together.
        NothingToDoError: base and tuned are equal.
    """
    with _pair(base, tuned) as pair:
        return diff_opened(pair, spectra=spectra, device=device, on_progress=progress)


def extract(
    base: ModelFile,
    tuned: ModelFile,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size_mb: float | None = None,
    conv_rank: int | None = None,
    method: Method = "auto",
    profile: str = "portable",
    precision: str = "fp16",
    device: str = "auto",
    seed: int = 0,
    form: str = "low-rank",
    overwrite: bool = False,
    card: bool = True,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the LoRA of a pair (kohya's names): the best of its rank, by SVD; see maths/lowrank.py.

    Args:
        rank, energy, size_mb: one of them decides the ranks: the same for all layers (64 without any), or as many as keep
            this share of the change, or as fit into a file of this many MB (10^6 bytes).
        conv_rank: another rank for 3x3 convolutions, beside `rank`.
        method: auto, exact or randomized. profile: portable, webui or full. precision: fp16, bf16, fp32 or fp8.
        form: low-rank, or exact: the whole change in int8, without a rank; see operations/forms.py.
        card: write NAME.json beside it too, which the LoRA lists of WebUIs read; never over one that is not this tool's.
        progress: as in `diff`.

    Raises:
        As `diff`, and SettingError, OutputError: a setting or a name that cannot be.
    """
    settings = ExtractSettings(RankPolicy(rank, energy, size_mb, conv_rank), method, profile, precision, device, seed, form)
    output = Path(output)
    check_safetensors_output(output, overwrite=overwrite)
    with _pair(base, tuned) as pair:
        files = pair.base.checkpoint, pair.tuned.checkpoint
        _check_apart(output, *files)
        source = _hashes(*files)
        return extract_opened(pair, output, settings, overwrite=overwrite, card=card, source=source, on_progress=progress)


def write_offset(
    base: ModelFile,
    tuned: ModelFile,
    output: str | Path,
    *,
    precision: str = "fp32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> OffsetReport:
    """Write the UNet's whole change as a file (diffusers' names): what a bake of it restores is the tuned model.

    Args:
        precision: fp32, or fp16 or bf16 for half the size and a rounding.
        progress: as in `diff`.

    Raises:
        As `diff`, and SettingError, OutputError: a setting or a name that cannot be.
    """
    check("precision", precision)
    output = Path(output)
    check_safetensors_output(output, overwrite=overwrite)
    with _pair(base, tuned) as pair:
        files = pair.base.checkpoint, pair.tuned.checkpoint
        _check_apart(output, *files)
        return write_offset_opened(
            pair, output, precision=precision, overwrite=overwrite, source=_hashes(*files), on_progress=progress
        )


def verify(lora: OffsetFile, base: ModelFile, tuned: ModelFile, *, progress: Progress | None = None) -> VerifyReport:
    """How much of a pair's change a LoRA or an offset file holds, measured from the files alone.

    Raises:
        As `diff`.
    """
    with _pair(base, tuned) as pair, _offset(lora, pair.architecture) as offset:
        return verify_opened(offset, pair, on_progress=progress)


def bake(
    target: ModelFile,
    offset: OffsetFile,
    output: str | Path,
    *,
    strength: float = 1.0,
    blocks: str | BlockWeights = "",
    precision: str = "keep",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BakeReport:
    """Write target + strength x offset as a checkpoint; all else in the target is copied byte for byte.

    Args:
        blocks: such as "IN00=0.5,MID=0,CONV=0"; blocks and kinds of layer that are not named have weight 1.
        precision: keep, or fp16, bf16 or fp32 for all tensors.
        progress: as in `diff`, counting bytes.

    Raises:
        As `diff`, and SettingError, OutputError: a setting or a name that cannot be. NothingToDoError: no value would change.
    """
    strength = strength_to_bake(strength)
    _check_precision(precision)
    weights = parse_blocks(blocks) if isinstance(blocks, str) else blocks
    output = Path(output)
    check_safetensors_output(output, overwrite=overwrite)
    with _model(target) as model:
        check_sidecar(model.path, output, overwrite=overwrite)
        with _offset(offset, model.architecture) as change:
            check_blocks(weights, change.architecture)  # a block that it lacks first, then blocks that leave nothing
            check_changes(change, weights)
            files = model.checkpoint, change.checkpoint
            _check_apart(output, *files)
            waiting = [sha256_in_background(file) for file in files]
            return bake_opened(
                model,
                change,
                output,
                strength=strength,
                blocks=weights,
                precision=precision,
                overwrite=overwrite,
                hashes=lambda: (waiting[0](), waiting[1]()),
                on_progress=progress,
            )


def resize(
    lora: OffsetFile,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size_mb: float | None = None,
    conv_rank: int | None = None,
    precision: str = "keep",
    overwrite: bool = False,
    card: bool = True,
    progress: Progress | None = None,
) -> ResizeReport:
    """Write a LoRA with smaller ranks; what it means at a strength stays.

    Args:
        rank, energy, size_mb, conv_rank: as in `extract`, but one must be given.
        precision: keep, fp16, bf16, fp32 or fp8.
        card: as in `extract`.
        progress: as in `diff`.

    Raises:
        As `diff`, and SettingError, OutputError: a setting or a name that cannot be.
    """
    if rank is None and energy is None and size_mb is None:
        raise SettingError("resize needs a new rank, energy or size_mb; give one of them")
    policy = RankPolicy(rank, energy, size_mb, conv_rank)
    _check_precision(precision, LORA_PRECISIONS)
    output = Path(output)
    check_safetensors_output(output, overwrite=overwrite)
    with open_checkpoint(lora) if isinstance(lora, (str, Path)) else nullcontext(lora.checkpoint) as checkpoint:
        _check_apart(output, checkpoint)
        return resize_opened(
            checkpoint, output, policy, precision=precision, overwrite=overwrite, card=card, on_progress=progress
        )


def inspect(file: str | Path) -> Inspection:
    """What a file is: kind, architecture, layout, number formats, metadata, hashes, peculiarities.

    Raises:
        BadFileError, UnsafeFileError: it cannot be read.
    """
    return inspect_file(file)


def compat(target: ModelFile, base: ModelFile, tuned: ModelFile, *, progress: Progress | None = None) -> CompatReport:
    """Does the offset of a pair fit a finetune: how far that is from the base, and how much DPO is in it already.

    Raises:
        As `diff`.
    """
    with _model(target) as model, _pair(base, tuned) as pair:
        return compat_opened(model, pair, on_progress=progress)


def _model(file: ModelFile) -> AbstractContextManager[Model]:
    """A model, opened and closed again; what comes opened stays so."""
    return nullcontext(file) if isinstance(file, Model) else open_model(file)


def _offset(file: OffsetFile, expected: Architecture) -> AbstractContextManager[Offset]:
    """The same for an offset."""
    return nullcontext(file) if isinstance(file, Offset) else open_offset(file, expected)


@contextmanager
def _pair(base: ModelFile, tuned: ModelFile) -> Iterator[Pair]:
    with _model(base) as first, _model(tuned) as second:
        yield open_pair(first, second)


def _check_precision(precision: str, precisions: Sequence[str] = PRECISIONS) -> None:
    """Refuse one that is unknown where `keep` is known too."""
    known = ("keep", *precisions)
    if precision not in known:
        raise SettingError(f"precision {precision!r} is unknown; expected one of {one_of(precision, known)}")


def _check_apart(output: Path, *inputs: Checkpoint) -> None:
    """Refuse an output that is one of the inputs, even where it may be replaced."""
    check_output(output, overwrite=True, inputs=[path for file in inputs for path in file.files])


def _hashes(base: Checkpoint, tuned: Checkpoint) -> Callable[[], dict[str, str]]:
    """Start hashing both files; the result waits for the hashes and gives them as metadata."""
    waiting = {"dpo.base_sha256": sha256_in_background(base), "dpo.tuned_sha256": sha256_in_background(tuned)}
    return lambda: {name: wait() for name, wait in waiting.items()}
