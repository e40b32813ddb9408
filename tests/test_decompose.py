"""Layers side by side: in order, each alone on its thread, and the host's settings as they were."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from lib_dpo.decompose import side_by_side
from lib_dpo.lowrank import factorise

CPU = torch.device("cpu")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_results_come_in_order_though_the_first_takes_longest(three_threads: None) -> None:
    together = threading.Barrier(3, timeout=30)

    def work(number: int) -> int:
        if number < 3:
            together.wait()  # three are in work at once
        time.sleep(0.2 if number == 0 else 0)
        return number

    with side_by_side(work, range(40), CPU) as done:
        assert list(done) == list(range(40))


def test_each_item_has_one_thread_and_neither_autograd_nor_autocast(three_threads: None) -> None:
    def settings(_: int) -> tuple[int, bool, torch.dtype]:
        x = torch.ones(2, 2)
        return torch.get_num_threads(), torch.is_grad_enabled(), (x @ x).dtype

    with torch.autocast("cpu", dtype=torch.bfloat16), side_by_side(settings, range(6), CPU) as done:
        assert set(done) == {(1, False, torch.float32)}
    assert torch.get_num_threads() == 3


def test_more_cores_than_layers_at_once_share_them() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(20)
    try:
        with side_by_side(lambda _: torch.get_num_threads(), range(3), CPU) as done:
            assert set(done) == {2}
        assert torch.get_num_threads() == 20
    finally:
        torch.set_num_threads(before)


def test_an_error_is_raised_in_its_turn_and_the_rest_is_dropped(three_threads: None) -> None:
    started = []

    def work(number: int) -> int:
        started.append(number)
        time.sleep(0.01)
        if number == 2:
            raise ValueError("two")
        return number

    seen = []
    with pytest.raises(ValueError, match="two"), side_by_side(work, range(1000), CPU) as done:
        seen.extend(done)
    assert len(started) < 100
    assert torch.get_num_threads() == 3
    assert seen in ([], [0, 1])


def test_leaving_early_drops_the_rest(three_threads: None) -> None:
    started = []

    def leave() -> None:
        with side_by_side(started.append, range(1000), CPU) as done:
            for _ in done:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert len(started) < 100
    assert threading.active_count() < 3
    assert torch.get_num_threads() == 3


def test_factors_do_not_depend_on_what_runs_beside_them(three_threads: None) -> None:
    matrices = [torch.randn(192, 160 + n, generator=torch.Generator().manual_seed(n)) for n in range(9)]
    with side_by_side(lambda A: factorise(A, 12, method="randomized"), matrices, CPU) as done:
        together = list(done)
    torch.set_num_threads(1)
    for A, factors in zip(matrices, together, strict=True):
        with side_by_side(lambda A: factorise(A, 12, method="randomized"), [A], CPU) as done:
            assert all(torch.equal(one, other) for one, other in zip(factors, next(done), strict=True))
