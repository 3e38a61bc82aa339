"""TIES and DARE entry by entry, against plain loops and against PEFT's own functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from adaptertools.errors import OptionError
from adaptertools.operations.consensus import check_density, consensus, drop_and_rescale, ties, trim, without_rounding


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trimmed_by_loop(values: list[float], density: float) -> list[float]:
    count = max(1, round(density * len(values)))
    threshold = sorted((abs(value) for value in values), reverse=True)[count - 1]
    return [value if abs(value) >= threshold else 0.0 for value in values]


def consensus_by_loop(rows: list[list[float]]) -> list[float]:
    result = []
    for column in zip(*rows, strict=True):
        total = sum(column)
        agreeing = [value for value in column if value * total > 0]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return result


whole_numbers = st.integers(-6, 6).map(float)
stacks = st.integers(1, 4).flatmap(
    lambda sources: st.integers(1, 9).flatmap(
        lambda entries: st.lists(
            st.lists(whole_numbers, min_size=entries, max_size=entries), min_size=sources, max_size=sources
        )
    )
)
"""Small whole numbers, so that equal magnitudes, zeros and sums of zero are common and exact."""


@settings(max_examples=200, deadline=None)
@given(rows=stacks, density=st.sampled_from((0.01, 0.2, 0.5, 0.77, 1.0)))
def test_each_rule_is_what_a_plain_loop_gives(rows: list[list[float]], density: float) -> None:
    matrices = torch.tensor(rows, dtype=torch.float64)
    trimmed = [trimmed_by_loop(row, density) for row in rows]
    assert trim(matrices, density).tolist() == trimmed
    assert torch.allclose(consensus(matrices), torch.tensor(consensus_by_loop(rows), dtype=torch.float64), rtol=1e-15)
    wanted = torch.tensor(consensus_by_loop(trimmed), dtype=torch.float64)
    assert torch.allclose(ties(matrices, density), wanted, rtol=1e-15)


@settings(max_examples=60, deadline=None)
@given(rows=stacks, density=st.sampled_from((0.2, 0.5, 1.0)), signs=st.integers(0, 511), seed=st.integers(0, 99))
def test_signs_and_order_of_the_basis_do_not_matter(
    rows: list[list[float]], density: float, signs: int, seed: int
) -> None:
    matrices = torch.tensor(rows, dtype=torch.float64)
    entries = matrices.shape[1]
    flips = torch.tensor([-1.0 if signs >> k & 1 else 1.0 for k in range(entries)], dtype=torch.float64)
    order = torch.randperm(entries, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ties((matrices * flips)[:, order], density), (ties(matrices, density) * flips)[order])


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75])
def test_ties_is_that_of_peft_where_no_values_are_equal(density: float) -> None:
    matrices = random(3, 4, 6)
    theirs = merge_utils.ties(list(matrices), torch.ones(3, dtype=torch.float64), density)
    assert torch.allclose(ties(matrices, density), theirs, rtol=1e-14)


def test_trimming_and_consensus_are_those_of_peft_one_by_one() -> None:
    matrices = random(4, 5, 8, seed=1)
    pruned = torch.stack([merge_utils.prune(matrix, 0.3, method="magnitude") for matrix in matrices])
    assert torch.equal(trim(matrices, 0.3), pruned)
    mask = merge_utils.calculate_majority_sign_mask(pruned)
    assert torch.allclose(consensus(pruned), merge_utils.disjoint_merge(pruned, mask), rtol=1e-14)


def test_dropping_is_that_of_peft_under_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, weights = random(3, 4, 5, seed=2), torch.tensor([0.7, 0.3, 2.0], dtype=torch.float64)
    chances = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weighted = matrices * weights[:, None, None]
    masks = iter((chances < 0.4).double())
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))
    theirs = merge_utils.dare_linear(list(matrices), weights, 0.4)
    assert torch.allclose(drop_and_rescale(weighted, 0.4, chances).sum(dim=0), theirs, rtol=1e-14)
    masks = iter((chances < 0.4).double())
    theirs = merge_utils.dare_ties(list(weighted), torch.ones(3, dtype=torch.float64), 0.4)
    assert torch.allclose(consensus(drop_and_rescale(weighted, 0.4, chances)), theirs, rtol=1e-14)


def test_equal_weights_scale_the_merge_as_in_peft() -> None:
    matrices = random(3, 4, 6, seed=4)
    theirs = merge_utils.ties(list(matrices), torch.full((3,), 0.3, dtype=torch.float64), 0.5)
    assert torch.allclose(ties(matrices * 0.3, 0.5), theirs, rtol=1e-14)


def test_one_entry_is_kept_however_low_the_density() -> None:
    assert trim(torch.tensor([[1.0, -5.0, 2.0]]), 1e-9).tolist() == [[0.0, -5.0, 0.0]]


def test_entries_as_large_as_the_last_one_kept_are_kept_too() -> None:
    assert trim(torch.tensor([[3.0, -1.0, 1.0, 0.5]]), 0.5).tolist() == [[3.0, -1.0, 1.0, 0.0]]
    almost = torch.tensor([[3.0, -1.0, 1.0 - 1e-14, 0.5]], dtype=torch.float64)
    assert torch.equal(trim(almost, 0.5), almost * torch.tensor([1, 1, 1, 0]))


def test_a_tie_between_signs_gives_zero() -> None:
    assert consensus(torch.tensor([[2.0, 1.0], [-2.0, 1.0]])).tolist() == [0.0, 1.0]
    almost = torch.tensor([[1.0, 1.0], [-1.0 - 1e-15, 1.0]], dtype=torch.float64)
    assert consensus(almost).tolist() == [0.0, 1.0]


def test_what_is_rounding_beside_the_largest_value_does_not_vote() -> None:
    matrices = torch.tensor([[4.0, 1e-16], [1e-16, 3.0]], dtype=torch.float64)
    assert consensus(matrices).tolist() == [4.0, 3.0]


def test_a_faint_matrix_votes_but_rounding_in_its_place_is_none() -> None:
    faint = torch.tensor([[4.0, 0.0], [1e-7, 1e-7]], dtype=torch.float64)
    assert torch.equal(without_rounding(faint), faint)
    assert consensus(faint).tolist() == [2.0 + 0.5e-7, 1e-7]
    rounding = torch.tensor([[4.0, 3.0], [1e-15, -1e-30]], dtype=torch.float64)
    assert without_rounding(rounding).tolist() == [[4.0, 3.0], [0.0, 0.0]]


def test_zero_matrices_give_zero() -> None:
    zero = torch.zeros(3, 2, 2, dtype=torch.float64)
    assert torch.equal(ties(zero, 0.2), zero[0])
    assert torch.equal(ties(torch.stack([zero[0], torch.eye(2)]), 1.0), torch.eye(2, dtype=torch.float64))


def test_dropping_keeps_the_expected_value() -> None:
    matrix = random(1, 3, 3)
    chances = torch.rand(20_000, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = drop_and_rescale(matrix.expand(20_000, 3, 3), 0.3, chances).mean(dim=0)
    spread = matrix[0].abs() * math.sqrt(0.7 / 0.3 / 20_000)
    assert ((mean - matrix[0]).abs() < 4 * spread).all()


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, True, "0.5", None])
def test_a_density_outside_0_to_1_is_refused(density: object) -> None:
    with pytest.raises(OptionError, match=r"density is .*, expected a number above 0 and at most 1"):
        check_density(density)  # type: ignore[arg-type]


def test_a_density_of_1_is_allowed() -> None:
    assert check_density(1) == 1.0
