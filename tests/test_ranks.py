"""Choosing ranks: against every combination there is, on ladders small enough to try them all."""

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptertools.operations.ranks import (
    Ladder,
    at_most,
    energy_kept,
    joined,
    nbytes,
    relative_error,
    within_bytes,
    within_energy,
    within_error,
)


@st.composite
def ladders(draw: st.DrawFn, *, zeros: bool = True) -> list[Ladder]:
    """Up to four ladders of up to four falling steps, each with a cost of its own."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        norms = draw(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=4))
        if zeros and draw(st.booleans()):
            norms = [*norms[:-1], 0.0]
        cost = draw(st.integers(1, 30))
        made.append(Ladder(norms=tuple(sorted(norms, reverse=True)), costs=(cost,) * len(norms)))
    return made


def combinations(found: Sequence[Ladder]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(1, len(ladder) + 1) for ladder in found))


def lost(found: Sequence[Ladder], ranks: Sequence[int]) -> float:
    """‖ΔW' − ΔW‖², by its definition."""
    return math.fsum(n * n for ladder, rank in zip(found, ranks, strict=True) for n in ladder.norms[rank:])


def whole(found: Sequence[Ladder]) -> float:
    return lost(found, [0] * len(found))


@given(found=ladders(), data=st.data())
def test_what_fits_best_is_at_most_one_step_from_the_best_of_all(found: list[Ladder], data: st.DataObject) -> None:
    least = nbytes(found, [1] * len(found))
    budget = data.draw(st.integers(least, nbytes(found, list(map(len, found)))))
    ranks = within_bytes(found, budget)
    assert nbytes(found, ranks) <= budget
    best = min(lost(found, combination) for combination in combinations(found) if nbytes(found, combination) <= budget)
    one_step = max((n * n for ladder in found for n in ladder.norms[1:]), default=0.0)
    assert best <= lost(found, ranks) * (1 + 1e-12) + 1e-300
    assert lost(found, ranks) <= best + one_step * (1 + 1e-12)


@given(found=ladders(), data=st.data())
def test_no_step_is_left_that_would_still_fit(found: list[Ladder], data: st.DataObject) -> None:
    least = nbytes(found, [1] * len(found))
    budget = data.draw(st.integers(least, nbytes(found, list(map(len, found)))))
    ranks = within_bytes(found, budget)
    for ladder, rank in zip(found, ranks, strict=True):
        if rank < ladder.useful:
            assert nbytes(found, ranks) + ladder.costs[rank] > budget


@given(found=ladders(zeros=False), data=st.data())
def test_with_equal_costs_what_fits_is_the_very_best(found: list[Ladder], data: st.DataObject) -> None:
    same = [Ladder(norms=ladder.norms, costs=(5,) * len(ladder)) for ladder in found]
    least, most = len(same), sum(map(len, same))
    ranks = within_bytes(same, 5 * data.draw(st.integers(least, most)) + data.draw(st.integers(0, 4)))
    best = min(lost(same, c) for c in combinations(same) if nbytes(same, c) <= nbytes(same, ranks))
    assert lost(same, ranks) == pytest.approx(best, rel=1e-12, abs=1e-30)


@given(found=ladders(), error=st.floats(0.001, 0.999))
def test_the_smallest_within_an_error_is_at_most_one_step_from_the_smallest_of_all(
    found: list[Ladder], error: float
) -> None:
    ranks = within_error(found, error)
    assert relative_error(found, ranks) <= error
    smallest = min(
        nbytes(found, c) for c in combinations(found) if lost(found, c) <= error**2 * whole(found) * (1 + 1e-12)
    )
    one_step = max(max(ladder.costs) for ladder in found)
    assert smallest <= nbytes(found, ranks) <= smallest + one_step


@given(found=ladders(), error=st.floats(0.001, 0.999))
def test_no_step_is_kept_that_the_error_would_still_allow(found: list[Ladder], error: float) -> None:
    ranks = within_error(found, error)
    for index, rank in enumerate(ranks):
        if rank > 1:
            lower = [*ranks[:index], rank - 1, *ranks[index + 1 :]]
            assert relative_error(found, lower) > error * (1 - 1e-12)


@given(found=ladders(), share=st.floats(0.01, 1.0))
def test_energy_is_kept_with_the_smallest_rank_that_does(found: list[Ladder], share: float) -> None:
    for ladder, rank in zip(found, within_energy(found, share), strict=True):
        assert energy_kept([ladder], [rank]) >= share
        if rank > 1:
            assert share == 1.0 or energy_kept([ladder], [rank - 1]) < share


def test_an_energy_that_is_reached_exactly_is_enough() -> None:
    assert within_energy([Ladder(norms=(3.0, 1.0), costs=(1, 1))], 0.9) == [1]
    assert within_energy([Ladder(norms=(4.0, 3.0), costs=(1, 1))], 0.64) == [1]


def test_an_error_that_is_reached_exactly_is_allowed() -> None:
    assert within_error([Ladder(norms=(4.0, 3.0), costs=(1, 1))], 0.6) == [1]
    assert within_error([Ladder(norms=(4.0, 3.0), costs=(1, 1))], 0.5999) == [2]


def test_the_whole_energy_is_every_direction_that_is_not_zero_however_small() -> None:
    ladder = Ladder(norms=(1.0, 1e-12, 1e-200, 0.0), costs=(1,) * 4)
    assert energy_kept([ladder], [1]) == 1.0
    assert within_energy([ladder], 1.0) == [3]


def test_where_there_is_nothing_rank_one_loses_nothing() -> None:
    zero = Ladder(norms=(0.0, 0.0, 0.0), costs=(2,) * 3)
    for ranks in (at_most([zero], 2), within_energy([zero], 0.5), within_error([zero], 0.5), within_bytes([zero], 5)):
        assert ranks == [1]
        assert energy_kept([zero], ranks) == 1.0
        assert relative_error([zero], ranks) == 0.0
    assert at_most([zero], 3) == [3], "no longer than the limit, so it is left alone"


def test_directions_that_change_nothing_are_not_bought() -> None:
    found = [Ladder(norms=(5.0, 0.0, 0.0), costs=(1,) * 3), Ladder(norms=(4.0, 3.0), costs=(1, 1))]
    assert within_bytes(found, 4) == [1, 2]
    assert within_bytes(found, 5) == [3, 2], "all of it fits, so nothing is touched"


@pytest.mark.parametrize("scale", [1e-160, 1e160, 1e300])
def test_the_size_of_the_values_does_not_matter(scale: float) -> None:
    norms = (4.0, 2.0, 1.0)
    plain, scaled = (Ladder(norms=tuple(n * s for n in norms), costs=(1,) * 3) for s in (1.0, scale))
    assert relative_error([scaled], [1]) == pytest.approx(relative_error([plain], [1]), rel=1e-14)
    assert energy_kept([scaled], [1]) == pytest.approx(energy_kept([plain], [1]), rel=1e-14)
    assert within_error([scaled], 0.3) == within_error([plain], 0.3)


@given(found=ladders(), most=st.integers(1, 5), share=st.floats(0.01, 1.0), error=st.floats(0.01, 0.99))
def test_a_cap_holds_for_every_rule(found: list[Ladder], most: int, share: float, error: float) -> None:
    everything = nbytes(found, list(map(len, found)))
    for ranks in (within_energy(found, share, most), within_error(found, error, most), within_bytes(found, 99, most)):
        assert max(ranks) <= most
    assert within_bytes(found, everything, most) == at_most(found, most)


@given(found=ladders(), error=st.floats(0.01, 0.99))
def test_under_a_cap_that_is_too_low_nothing_more_is_lost(found: list[Ladder], error: float) -> None:
    capped = at_most(found, 1)
    assume(relative_error(found, capped) > error)
    assert within_error(found, error, 1) == capped


@given(found=ladders())
def test_a_small_error_keeps_all_its_digits(found: list[Ladder]) -> None:
    ranks = [max(1, len(ladder) - 1) for ladder in found]
    expected = math.sqrt(lost(found, ranks) / whole(found)) if whole(found) else 0.0
    assert relative_error(found, ranks) == pytest.approx(expected, rel=1e-12)


def test_ladders_climbed_in_step_add_up() -> None:
    one, other = Ladder(norms=(3.0, 1.0), costs=(2, 2)), Ladder(norms=(4.0,), costs=(5,))
    both = joined([one, other])
    assert both.norms == (5.0, 1.0)
    assert both.costs == (7, 2)
