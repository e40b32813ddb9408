"""Rank allocation, against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_dpo.maths.ranks import Spectrum, allocate, break_even_rank, size_curve


def spectrum(energies: list[float], per_rank: int, fixed: int = 0, cap: int | None = None) -> Spectrum:
    return Spectrum(np.array(energies, dtype=np.float64), per_rank, fixed, len(energies) if cap is None else cap)


def kept(spectra: dict[str, Spectrum], ranks: dict[str, int]) -> float:
    return sum(float(row.energies[: ranks[name]].sum()) for name, row in spectra.items())


def size(spectra: dict[str, Spectrum], ranks: dict[str, int]) -> int:
    return sum(row.bytes_per_rank * ranks[name] + (row.fixed_bytes if ranks[name] else 0) for name, row in spectra.items())


falling = st.lists(st.floats(0.01, 10), min_size=1, max_size=4).map(lambda values: sorted(values, reverse=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(falling, min_size=1, max_size=3), st.integers(1, 13))
def test_with_equal_costs_no_other_allocation_keeps_more(energies: list[list[float]], budget: int) -> None:
    spectra = {str(n): spectrum(values, 1) for n, values in enumerate(energies)}
    ranks = allocate(spectra, budget=budget)
    assert size(spectra, ranks) <= budget
    choices = itertools.product(*(range(len(values) + 1) for values in energies))
    best = max(kept(spectra, dict(zip(spectra, choice, strict=True))) for choice in choices if sum(choice) <= budget)
    assert kept(spectra, ranks) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(st.lists(falling, min_size=1, max_size=3), st.lists(st.integers(1, 5), min_size=3, max_size=3), st.floats(0.05, 1))
def test_an_energy_is_reached_and_one_component_less_would_miss_it(
    energies: list[list[float]], costs: list[int], share: float
) -> None:
    spectra = {str(n): spectrum(values, costs[n]) for n, values in enumerate(energies)}
    wanted = share * sum(map(sum, energies))
    ranks = allocate(spectra, energy=wanted)
    assert kept(spectra, ranks) >= wanted * (1 - 1e-9)
    gains = {name: spectra[name].energies[rank - 1] / costs[int(name)] for name, rank in ranks.items() if rank}
    last = max(gains, key=lambda name: (-gains[name], int(name)))  # the component that was taken last
    fewer = ranks | {last: ranks[last] - 1}
    assert kept(spectra, fewer) < wanted * (1 + 1e-9)


def test_the_budget_counts_what_a_layer_costs_beside_its_numbers() -> None:
    spectra = {"a": spectrum([4.0, 1.0], 10, fixed=100), "b": spectrum([3.0], 10, fixed=100)}
    assert allocate(spectra, budget=120) == {"a": 2, "b": 0}
    assert allocate(spectra, budget=109) == {"a": 0, "b": 0}
    assert allocate(spectra, budget=230) == {"a": 2, "b": 1}


def test_weights_divide_a_size_and_leave_an_energy_alone() -> None:
    spectra = {"a": spectrum([4.0, 3.0], 1), "b": replace(spectrum([2.0, 1.0], 1), weight=3.0)}
    assert allocate(spectra, budget=2) == {"a": 1, "b": 1}
    assert allocate(spectra, energy=7.0) == {"a": 2, "b": 0}


def test_an_energy_out_of_reach_ends_at_the_caps() -> None:
    spectra = {"a": spectrum([1.0, 1.0, 1.0], 1, cap=2), "b": spectrum([1.0, 1.0], 1)}
    assert allocate(spectra, energy=100.0) == {"a": 2, "b": 2}


def test_break_even_rank() -> None:
    assert break_even_rank(1280, 1280) == 640
    assert break_even_rank(320, 36) == 32
    assert break_even_rank(4, 2880) == 3
    assert break_even_rank(1, 1) == 1


def test_the_curve_rises_to_all_of_the_energy() -> None:
    spectra = {"a": spectrum([4.0, 1.0], 10), "b": spectrum([3.0], 20)}
    sizes, energies = size_curve(spectra)
    assert sizes == [10, 30, 40]
    assert energies == [4.0, 7.0, 8.0]
    assert size_curve({}) == ([], [])
