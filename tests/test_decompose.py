"""Layers side by side: in order, each alone on its thread, and the host's settings as they were. What a broken GPU costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from lib_dpo.errors import Cancelled
from lib_dpo.families.model import open_model
from lib_dpo.families.synthetic import small_pair
from lib_dpo.maths.lowrank import factorise
from lib_dpo.maths.threads import side_by_side
from lib_dpo.offsets.offset import Pair, open_pair
from lib_dpo.operations import decompose
from lib_dpo.operations.decompose import Decomposer

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


# ---- devices that fail ----


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU until it is moved to the CPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def to(self, *where: Any, **options: Any) -> torch.Tensor:  # type: ignore[override]  # overloads there
        if torch.device("cuda") in where:
            return self
        return self.as_subclass(torch.Tensor).to(*where, **options)

    def cpu(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    files = small_pair(tmp_path_factory.mktemp("sd1"), "sd1")
    with open_model(files[0]) as base, open_model(files[1]) as tuned:
        yield open_pair(base, tuned)


def breaking(work: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The same function, but it raises on a device other than the CPU."""

    def broken(A: torch.Tensor, *args: Any, **options: Any) -> Any:
        if A.device.type != "cpu":
            raise error
        return work(A, *args, **options)

    return broken


def matrices(device: str, count: int = 2) -> Sequence[torch.Tensor]:
    made = [torch.randn(24, 40, generator=torch.Generator().manual_seed(n)) for n in range(count)]
    return [A.as_subclass(OnDevice) for A in made] if device == "cuda" else made


BROKEN_SOLVERS = [
    RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd`"),
    RuntimeError("hipsolver error: HIPSOLVER_STATUS_INTERNAL_ERROR"),
    RuntimeError("Calling torch.linalg.eigh on a CUDA tensor requires compiling PyTorch with MAGMA."),
    RuntimeError("linalg_eigh: not supported on MPS"),
    NotImplementedError("aten::_linalg_eigh.eigenvalues is not currently implemented for the MPS device"),
]


@pytest.mark.parametrize("error", BROKEN_SOLVERS)
def test_whatever_a_device_cannot_decompose_is_done_on_the_cpu(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    decomposer = Decomposer(pair, torch.device("cuda"), method="exact", seed=0)
    expected = [factorise(A, 4, method="exact") for A in matrices("cpu")]
    spectrum = decomposer.singular_values(matrices("cpu")[0], "a")
    for name in ("factorise", "singular_values"):
        monkeypatch.setattr(decompose, name, breaking(getattr(decompose, name), error))
    found = decomposer.factorise(matrices("cuda"), 4, ["a", "b"])
    assert decomposer.fallbacks == {"decomposition failed": 3}  # the batch, and each alone
    for factors, right in zip(found, expected, strict=True):
        assert factors.up.device == CPU
        assert torch.equal(factors.up, right.up)
    torch.testing.assert_close(decomposer.singular_values(matrices("cuda")[0], "a"), spectrum, rtol=1e-3, atol=1e-3)
    assert decomposer.fallbacks == {"decomposition failed": 4}


@pytest.mark.parametrize(
    ("device", "error"), [("cpu", RuntimeError("a bug")), ("cuda", Cancelled("stop")), ("cuda", TypeError("a bug"))]
)
def test_a_bug_on_the_cpu_and_a_stop_anywhere_are_raised(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, device: str, error: Exception
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    decomposer = Decomposer(pair, torch.device(device), method="exact", seed=0)
    for name in ("factorise", "singular_values"):
        monkeypatch.setattr(decompose, name, fail)
    with pytest.raises(type(error), match=str(error)):
        decomposer.factorise(matrices(device, 1), 4, ["a"])
    with pytest.raises(type(error), match=str(error)):
        decomposer.singular_values(matrices(device)[0], "a")
    assert not decomposer.fallbacks


# ---- what is counted ----


def test_the_method_that_ran_is_counted_not_the_one_asked_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    decomposer = Decomposer(pair, CPU, method="randomized", seed=0)
    decomposer.factorise(matrices("cpu"), 1, ["a", "b"])  # 12 blocks of 4 columns span all 24 rows
    assert decomposer.methods == {"exact": 2}
    decomposer.factorise([torch.randn(64, 80, generator=torch.Generator().manual_seed(0))], 1, ["c"])
    assert decomposer.methods == {"exact": 2, "randomized": 1}
    real = decompose.factorise

    def factorise(A: torch.Tensor, rank: int, **options: Any) -> Any:
        if options["method"] == "randomized":
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]  # not in its stubs
        return real(A, rank, **options)

    monkeypatch.setattr(decompose, "factorise", factorise)
    decomposer.factorise([torch.randn(64, 80, generator=torch.Generator().manual_seed(0))], 1, ["d"])
    assert decomposer.methods == {"exact": 3, "randomized": 1}
