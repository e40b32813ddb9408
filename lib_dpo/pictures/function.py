"""Function kept: of what tuned changed in the model's predictions, how much base + file reproduces.

f = 1 - sum ||e(base + file) - e(tuned)||^2 / sum ||e(base) - e(tuned)||^2 over prompts, seeds and timesteps, where e is what
the UNet predicts, noise or v, without classifier-free guidance. The noisy images come from the base's own trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib_dpo.errors import BadTensorError, MismatchError, SettingError
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import Model
from lib_dpo.hosts.pipeline import Weights, made_for, open_pipeline
from lib_dpo.maths.devices import memory_in_words, resolve_device
from lib_dpo.maths.precision import full_precision
from lib_dpo.offsets.coverage import nothing_changed
from lib_dpo.offsets.offset import Offset, Pair
from lib_dpo.progress import Progress, Steps

PROMPTS = (
    "a portrait of an old fisherman, oil painting",
    "two cats sleeping on a red chair",
    "a street in the rain at night, neon signs, photo",
    "a bowl of fruit on a wooden table",
    "a castle on a hill, watercolour",
    "a young woman reading a book in a cafe",
    "a blue car in front of a white house",
    "a fox in the snow, highly detailed",
)
TIMESTEPS = 10
_AT_ONCE = 16  # images at most; fewer where they are larger
_LATENTS_AT_ONCE = 1 << 12  # pixels of latents: one image of 512 x 512
_DRAWS = 2000  # of the bootstrap
_TIMES, _CHANNELS = 1000, 4

Sums = NDArray[np.float64]  # (prompts,), squares over seeds and timesteps


@dataclass(frozen=True)
class FunctionReport:
    """What was measured, and with what."""

    kept: float
    interval: tuple[float, float] | None  # 95 %, by bootstrap over prompts; None with a single one
    change: float  # ||e(base) - e(tuned)|| / ||e(base)||
    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    timesteps: int

    def as_json(self) -> dict[str, Any]:
        """The figures that the command prints."""
        return {
            "function_kept": self.kept,
            "function_interval": list(self.interval) if self.interval else None,
            "function_change": self.change,
            "model": self.model,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "timesteps": self.timesteps,
        }


def function_kept(
    offset: Offset,
    pair: Pair,
    model: Model,
    tokenizer: Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0,),
    timesteps: int = TIMESTEPS,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> FunctionReport:
    """Measure it with one pipeline in memory, float32, whose UNet gets base's weights, then base + file, then tuned.

    Changes of text encoders are not counted: all three see the prompts as `model` embeds them.

    Args:
        model: a whole checkpoint or diffusers folder of the pair's family, for all but the UNet's weights.
        tokenizer: a folder with CLIP's vocab.json and merges.txt.
        timesteps: spread evenly, as many as each trajectory has steps (DDIM with eta 0, arXiv 2010.02502).
        on_progress: counts the UNet's passes; may raise to stop.

    Raises:
        MismatchError: a model that is not whole or has another UNet, or one that takes more than a noisy image.
        BadTensorError: a tensor of the file that does not fit. SettingError: no prompt, no seed or no timestep.
        NothingToDoError: tuned predicts what base does. MissingExtraError: diffusers is not installed.
    """
    check_asked(prompts, seeds, timesteps)
    _check_fits(offset, pair, model)
    place = resolve_device(device)
    with memory_in_words(f"opening {model.path.name}", "close other programs, or choose the device cpu"):
        weights = open_pipeline(model, tokenizer, device=str(place))
    with (
        memory_in_words("predicting noise", "close other programs, or choose the device cpu"),
        full_precision(),
        torch.no_grad(),
    ):
        run = _Run(weights, made_for(model) // 8, prompts, seeds, timesteps, on_progress)
        _set_unet(weights, pair, pair.base.read)
        base = list(run.trajectories())
        _set_unet(weights, pair, _with_offset(pair, offset))
        file = list(run.predictions())
        _set_unet(weights, pair, pair.tuned.read)
        tuned = list(run.predictions())
    missed, change = run.squares(file, tuned), run.squares(base, tuned)
    if not change.sum():
        raise nothing_changed(pair, "UNets", "there is no function to keep")
    whole = sum(float(each.cpu().double().square().sum()) for each in base)
    return report_of(
        missed, change, whole, model=model.path.name, prompts=tuple(prompts), seeds=tuple(seeds), timesteps=timesteps
    )


def check_asked(prompts: Sequence[str], seeds: Sequence[int], timesteps: int) -> None:
    """Refuse what nothing can be measured with. Raises SettingError."""
    if not prompts or not seeds or not 1 <= timesteps <= _TIMES:
        raise SettingError(f"function needs a prompt, a seed and 1 to {_TIMES} timesteps; give at least one of each")


def report_of(missed: Sums, change: Sums, whole: float, **measured: Any) -> FunctionReport:
    """The figures.

    Args:
        missed: ||e(base + file) - e(tuned)||^2 by prompt.
        change: ||e(base) - e(tuned)||^2 by prompt; not all 0.
        whole: ||e(base)||^2 over all prompts.
        measured: with what: the report's other fields.
    """
    return FunctionReport(
        kept=1 - float(missed.sum() / change.sum()),
        interval=_interval(missed, change),
        change=float(np.sqrt(change.sum() / whole)),
        **measured,
    )


def _check_fits(offset: Offset, pair: Pair, model: Model) -> None:
    """All that can be known of the files before a pipeline is built."""
    for name, other in ((offset.name, offset.architecture), (model.path.name, model.architecture)):
        if other is not pair.architecture:
            raise MismatchError(
                f"{name} is for {other.title} but the pair is {pair.architecture.title}; expected one architecture"
            )
    channels = model.recognised.in_channels
    if channels != _CHANNELS:
        raise MismatchError(f"{model.path.name} takes {channels} channels, expected {_CHANNELS}: it needs more than a prompt")
    theirs = set(model.keys("unet"))
    for key in _unet_keys(pair):
        shape = pair.base.shape(key)
        if key not in theirs or math.prod(model.shape(key)) != math.prod(shape):
            raise MismatchError(f"{model.path.name} has no {key} of the shape {list(shape)}; give a model with the base's UNet")
        if key in offset.shapes and math.prod(offset.shapes[key]) != math.prod(shape):
            raise BadTensorError(
                f"{offset.name}: {key} has the shape {list(offset.shapes[key])}, the pair {list(shape)}; the file was made for "
                "another model"
            )


def _unet_keys(pair: Pair) -> Iterator[str]:
    return (key for key in pair.keys if key.startswith(UNET))


def _set_unet(weights: Weights, pair: Pair, read: Callable[[str], Tensor]) -> None:
    """Give the live UNet the weights that `read` gives by canonical key."""
    for key in _unet_keys(pair):
        live = weights.tensors[key]
        live.copy_(read(key).float().reshape(live.shape))


def _with_offset(pair: Pair, offset: Offset) -> Callable[[str], Tensor]:
    """Weights of base + file, float32."""

    def read(key: str) -> Tensor:
        weight = pair.base.read(key).float()
        return weight + offset.read(key).float().reshape(weight.shape) if key in offset.shapes else weight

    return read


@dataclass(frozen=True)
class _Batch:
    """Images that are predicted together, a row each: what the UNet is told, and the noise that a trajectory starts from."""

    prompts: Sequence[int]  # their numbers
    told: Mapping[str, Any]  # keyword arguments of the UNet
    noise: Tensor  # (n, 4, side, side)


class _Run:
    """The noisy images, and what a UNet predicts for them: one tensor (n, 4, side, side) for each batch and timestep."""

    def __init__(
        self,
        weights: Weights,
        side: int,
        prompts: Sequence[str],
        seeds: Sequence[int],
        timesteps: int,
        progress: Progress | None,
    ) -> None:
        self._unet, self._scheduler = weights.pipeline.unet, weights.pipeline.scheduler
        self._times = [round(t) for t in np.linspace(_TIMES - 1, 0, timesteps + 1)[:-1]]
        self._seen: list[tuple[_Batch, int, Tensor]] = []
        self._count = len(prompts)
        rows = [(number, seed) for number in range(len(prompts)) for seed in seeds]
        size = max(1, min(_AT_ONCE, _LATENTS_AT_ONCE // side**2))
        if len(rows) == 1 and size > 1:
            rows *= 2  # torch normalises no single value, which is what the toy's lowest level has of one image
        count = math.ceil(len(rows) / size)
        parts = [rows[len(rows) * n // count : len(rows) * (n + 1) // count] for n in range(count)]
        self._batches = [_batch(weights.pipeline, prompts, part, side) for part in parts]
        if progress:
            progress(0, 3 * len(rows) * timesteps, "")
        self._steps = Steps(3 * len(rows) * timesteps, progress)

    def trajectories(self) -> Iterator[Tensor]:
        """Go through the timesteps with the UNet as it is, keep every noisy image, and give what was predicted."""
        alphas = self._scheduler.alphas_cumprod.double().tolist()
        for batch in self._batches:
            x = batch.noise
            for t, later in zip(self._times, [*self._times[1:], None], strict=True):
                self._seen.append((batch, t, x))
                predicted = self._predict(batch, t, x)
                x = _ddim(x, predicted, alphas[t], 1.0 if later is None else alphas[later], self._is_v)
                yield predicted

    def predictions(self) -> Iterator[Tensor]:
        """What the UNet predicts now for the same noisy images."""
        return (self._predict(*seen) for seen in self._seen)

    def squares(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Sums:
        """||ours - theirs||^2 by prompt, summed over seeds and timesteps."""
        sums = np.zeros(self._count)
        for (batch, *_), one, other in zip(self._seen, ours, theirs, strict=True):
            np.add.at(sums, list(batch.prompts), (one - other).cpu().double().square().flatten(1).sum(1).numpy())
        return sums

    @property
    def _is_v(self) -> bool:
        return bool(self._scheduler.config.prediction_type == "v_prediction")

    def _predict(self, batch: _Batch, t: int, x: Tensor) -> Tensor:
        predicted: Tensor = self._unet(x, t, **batch.told).sample
        self._steps.advance(len(x), "")
        return predicted


def _batch(pipeline: Any, prompts: Sequence[str], rows: Sequence[tuple[int, int]], side: int) -> _Batch:
    """Embed the prompts of some rows (prompt's number, seed) and draw their noise, on the CPU: alike on every device."""
    device = pipeline.unet.device
    texts = [prompts[number] for number, _ in rows]
    found = pipeline.encode_prompt(prompt=texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    told: dict[str, Any] = {"encoder_hidden_states": found[0]}
    if len(found) > 2:  # SDXL: the pooled embedding, and sizes and crop as the pipeline gives them
        size = [8 * side, 8 * side, 0, 0, 8 * side, 8 * side]
        times = torch.tensor([size] * len(rows), dtype=torch.float32, device=device)
        told["added_cond_kwargs"] = {"text_embeds": found[2], "time_ids": times}
    noise = [torch.randn(_CHANNELS, side, side, generator=torch.Generator().manual_seed(seed)) for _, seed in rows]
    return _Batch([number for number, _ in rows], told, torch.stack(noise).to(device))


def _ddim(x: Tensor, predicted: Tensor, a: float, a_next: float, is_v: bool) -> Tensor:
    """One step of DDIM with eta 0 (arXiv 2010.02502, eq. 12) for either parametrisation (v: arXiv 2202.00512)."""
    signal, noisy = math.sqrt(a), math.sqrt(1 - a)
    if is_v:
        clean, noise = signal * x - noisy * predicted, signal * predicted + noisy * x
    else:
        clean, noise = (x - noisy * predicted) / signal, predicted
    return math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * noise


def _interval(missed: Sums, change: Sums) -> tuple[float, float] | None:
    """95 % by percentiles of the bootstrap over prompts; the same draws every time."""
    if len(missed) < 2:
        return None
    drawn = np.random.default_rng(0).integers(len(missed), size=(_DRAWS, len(missed)))
    whole = change[drawn].sum(1)
    low, high = np.quantile(1 - missed[drawn].sum(1)[whole > 0] / whole[whole > 0], (0.025, 0.975))
    return float(low), float(high)
