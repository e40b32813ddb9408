"""Several pieces of work at once on the CPU, one thread each."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from lib_dpo.maths.precision import full_precision

Item = TypeVar("Item")
Result = TypeVar("Result")

_CPU = torch.device("cpu")
_AT_ONCE = 8  # layers at most: each needs 120 MB for the largest delta of SDXL, and half as much to work in
AHEAD = 4  # results per thread that may wait for a slow one before them: factors, a few MB each


@contextmanager
def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], device: torch.device = _CPU, *, ahead: int = AHEAD
) -> Iterator[Iterator[Result]]:
    """`work` of each item, in the order of the items. On the CPU several items at once, on one thread each.

    The small matrices inside a factorisation keep one core busy and no more, so two layers on a core each are done well
    before one after the other on two cores. What comes out does not depend on what runs beside it: each item has its
    thread from beginning to end. Beyond `_AT_ONCE` cores each item gets several, to bound the memory.

    torch's number of threads is one setting for the whole process; it is as before when the context ends. The first
    error of `work` is raised in its turn. `items` is iterated here, not in the threads.

    Args:
        ahead: results per thread that may wait for a slow one before them, or for whoever takes them.
    """
    if device.type != "cpu":
        yield map(work, items)
        return

    def alone(item: Item) -> Result:
        with full_precision():  # autocast and no_grad are settings of each thread
            return work(item)

    threads = torch.get_num_threads()
    workers = min(threads, _AT_ONCE)
    waiting: deque[Future[Result]] = deque()

    def results() -> Iterator[Result]:
        for item in items:
            waiting.append(pool.submit(alone, item))
            if len(waiting) > ahead * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            try:
                yield results()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)


class Scratch(threading.local):
    """Memory for one delta, each thread its own: fresh pages take as long as reading it. GPUs keep freed memory: 0, none."""

    def __init__(self, numel: int) -> None:
        self.memory = torch.empty(numel) if numel else None

    def shaped(self, shape: Sequence[int]) -> torch.Tensor:
        """The memory in a shape, to be written to."""
        numel = math.prod(shape)
        return torch.empty(shape) if self.memory is None else self.memory[:numel].view(shape)
