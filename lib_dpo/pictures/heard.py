"""Function kept, in any host: its own pipeline draws, and what its UNet is given and predicts is heard at the module.

The untouched model's noisy images are put in the place of those that a picture with an offset would go through, so that all
three predict for the same ones. As in pictures/function.py, but with the host's numbers (float16 on most) and with what the
offset changes in the text encoders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lib_dpo.errors import HostError, NothingToDoError
from lib_dpo.hosts.base import Host, Job, Request
from lib_dpo.pictures.function import TIMESTEPS, FunctionReport, report_of

if TYPE_CHECKING:
    from lib_dpo.offsets.patch import Patch

_SAMPLER = "DDIM"  # asks the UNet once a step, at timesteps that are spread evenly; without noise of its own


@dataclass
class _Heard:
    """Calls of the UNet in one picture: the noisy images, (n, 4, side, side) in the host's dtype, and what it predicted."""

    noisy: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)


def function_in_host(
    host: Host, patch: Patch, whole: Patch, request: Request, rows: Sequence[tuple[str, int]], job: Job
) -> FunctionReport:
    """Of what `whole` changes in the loaded model's predictions, how much `patch` reproduces, both at strength 1.

    Args:
        whole: the offset that `patch` was made from.
        request: the size of the pictures; prompt and seed come from `rows`, and the rest is chosen here.
        rows: prompts with seeds.

    Raises:
        NothingToDoError: `whole` changes no prediction of this model. HostError: the host does not ask its UNet as expected.
        Cancelled: stopped by the user.
    """
    sampler = _SAMPLER if _SAMPLER in host.samplers() else ""
    # The prompt is its own negative one, so guidance changes nothing, and each prediction is made twice. A CFG scale of 1 is no
    # way around: not every host spares the second then, and torch normalises no single value, which the toy has of one image.
    request = replace(request, steps=TIMESTEPS, cfg_scale=2.0, sampler=sampler)
    prompts = tuple(dict.fromkeys(prompt for prompt, _ in rows))
    sums = np.zeros((3, len(prompts)))  # ||file - whole||^2, ||untouched - whole||^2, ||untouched||^2 by prompt
    job.cells(3 * len(rows))
    job.check()
    for prompt, seed in rows:
        asked = replace(request, prompt=prompt, negative=prompt, seed=seed)
        base = _hear(host, asked, None, _Heard(), job)
        file, tuned = (_hear(host, asked, each, base, job) for each in (patch, whole))
        sums[:, prompts.index(prompt)] += (
            _squares(file, tuned),
            _squares(base, tuned),
            sum(_square(each) for each in base.predicted),
        )
    missed, change, size = sums
    if not change.sum():
        raise NothingToDoError(f"{whole.name} changes nothing that this model predicts, so there is no function to keep")
    loaded = host.live.loaded()
    seeds = tuple(dict.fromkeys(seed for _, seed in rows))
    name = loaded.path.stem if loaded else ""
    return report_of(missed, change, float(size.sum()), model=name, prompts=prompts, seeds=seeds, timesteps=TIMESTEPS)


def _hear(host: Host, request: Request, patch: Patch | None, given: _Heard, job: Job) -> _Heard:
    """Draw one picture; where `given` holds noisy images, the UNet gets those."""
    heard = _Heard()
    with _listening(host, given.noisy, heard):
        host.generate(request, patch, 1.0 if patch else 0.0)
    job.check()
    shapes, wanted = ([noisy.shape for noisy in each.noisy] for each in (heard, given))
    if not shapes or (wanted and shapes != wanted):
        raise HostError(
            "this WebUI does not ask its UNet for one prediction a step, so function kept cannot be measured in it; use the "
            "command line"
        )
    return heard


@contextmanager
def _listening(host: Host, given: Sequence[Tensor], heard: _Heard) -> Iterator[None]:
    def before(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        noisy = positional[0]
        number = len(heard.noisy)
        if number < len(given) and given[number].shape == noisy.shape:
            noisy = given[number].to(noisy)
        heard.noisy.append(noisy.detach().cpu().clone())
        return (noisy, *positional[1:]), named

    def after(module: Any, positional: tuple[Any, ...], predicted: Any) -> None:
        tensor = predicted if isinstance(predicted, Tensor) else predicted[0]  # diffusers gives a tuple
        heard.predicted.append(tensor.detach().float().cpu().clone())

    unet = host.live.unet()
    handles = [unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _squares(ours: _Heard, theirs: _Heard) -> float:
    return sum(_square(one.double() - other) for one, other in zip(ours.predicted, theirs.predicted, strict=True))


def _square(values: Tensor) -> float:
    return float(values.to(torch.float64).square().sum())
