"""Products beside one another: exact where it can be told, against rational numbers and dense float64."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import tensor

from adaptertools.operations.distance import Comparison, compare_products

EPSILON = torch.finfo(torch.float64).eps

Factors = tuple[torch.Tensor, torch.Tensor]


def random(
    rank: int, n_in: int, n_out: int, seed: int = 0, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()
) -> Factors:
    return tensor((*batch, rank, n_in), dtype, seed), tensor((*batch, n_out, rank), dtype, seed + 1)


def exact_product(factors: Factors, scaling: float) -> list[list[Fraction]]:
    """s·B·A without any rounding."""
    lora_A, lora_B = ([[Fraction(value) for value in row] for row in factor.double().tolist()] for factor in factors)
    columns = list(zip(*lora_A, strict=True))
    return [
        [Fraction(scaling) * sum(b * a for b, a in zip(row, column, strict=True)) for column in columns]
        for row in lora_B
    ]


def root(square: Fraction) -> float:
    """The square root to all digits of a float, for numbers of any size."""
    shift = (square.denominator.bit_length() - square.numerator.bit_length()) // 2 * 2 + 240
    scaled = square * Fraction(2) ** shift
    return float(Fraction(math.isqrt(int(scaled))) / Fraction(2) ** (shift // 2))


def exact(one: Factors, other: Factors, scaling: float = 1.0, other_scaling: float = 1.0) -> Comparison:
    """The comparison from rational numbers, each result rounded once."""
    rows, other_rows = exact_product(one, scaling), exact_product(other, other_scaling)
    pairs = [pair for row, other_row in zip(rows, other_rows, strict=True) for pair in zip(row, other_row, strict=True)]
    inner = sum(x * y for x, y in pairs)
    squares = sum(x * x for x, _ in pairs), sum(y * y for _, y in pairs)
    cosine = math.copysign(root(inner * inner / (squares[0] * squares[1])), inner) if all(squares) else math.nan
    values = (
        root(Fraction(squares[0])),
        root(Fraction(squares[1])),
        root(Fraction(sum((x - y) ** 2 for x, y in pairs))),
        cosine,
    )
    names = ("norm", "other_norm", "distance", "cosine")
    return Comparison(
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in zip(names, values, strict=True)}
    )


def compare(one: Factors, other: Factors, scaling: float = 1.0, other_scaling: float = 1.0) -> Comparison:
    return compare_products(*one, *other, scaling=scaling, other_scaling=other_scaling)


def size_of_factors(one: Factors) -> float:
    """‖|B|·|A|‖, of which rounding errors are a share."""
    return float(torch.linalg.matrix_norm(one[1].double().abs() @ one[0].double().abs()).max())


def assert_right(found: Comparison, expected: Comparison, noise: float) -> None:
    for name in ("norm", "other_norm", "distance"):
        assert float((getattr(found, name) - getattr(expected, name)).abs().max()) <= noise, name
    small = torch.minimum(expected.norm, expected.other_norm)
    known = small > 1e3 * noise
    assert bool(((found.cosine - expected.cosine).abs() <= 4 * noise / small)[known].all())


@settings(max_examples=150, deadline=None)
@given(
    ranks=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    scalings=st.tuples(*[st.sampled_from((1.0, 2.0, 0.3, -1.7, 0.0, 1e-5))] * 2),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
    batch=st.sampled_from(((), (1,), (3,))),
    seed=st.integers(0, 1000),
)
def test_norms_distance_and_cosine_are_those_of_the_formed_products(
    ranks: tuple[int, int],
    n_in: int,
    n_out: int,
    scalings: tuple[float, float],
    dtype: torch.dtype,
    batch: tuple[int, ...],
    seed: int,
) -> None:
    pair = [random(rank, n_in, n_out, seed + 2 * k, dtype, batch) for k, rank in enumerate(ranks)]
    kept = [factor.clone() for factors in pair for factor in factors]
    found = compare(pair[0], pair[1], *scalings)
    one, other = (factors[1].double() @ factors[0].double() * s for factors, s in zip(pair, scalings, strict=True))
    norm, other_norm, distance = (torch.linalg.matrix_norm(matrix) for matrix in (one, other, one - other))
    cosine = (one * other).sum(dim=(-2, -1)) / (norm * other_norm)
    noise = 100 * EPSILON * sum(size_of_factors(factors) * abs(s) for factors, s in zip(pair, scalings, strict=True))
    assert found.distance.shape == batch
    assert_right(found, Comparison(norm=norm, other_norm=other_norm, distance=distance, cosine=cosine), noise)
    assert torch.equal(found.cosine.isnan(), cosine.isnan())
    assert all(
        torch.equal(factor, old) for factor, old in zip([f for factors in pair for f in factors], kept, strict=True)
    )


@pytest.mark.parametrize("exponent", [-10, -24, -40, -50, -52])
@pytest.mark.parametrize("scaling", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("factor", [0, 1])
def test_one_element_changed_in_its_last_bits_gives_a_distance_that_is_right_in_all_digits(
    exponent: int, scaling: float, factor: int
) -> None:
    one = random(3, 5, 4)
    other = one[0].clone(), one[1].clone()
    other[factor][1, 1] *= 1 + 2.0**exponent
    found, expected = compare(one, other, scaling, scaling), exact(one, other, scaling, scaling)
    assert float(expected.distance) > 0
    assert float(found.distance) == pytest.approx(float(expected.distance), rel=1e-14)
    assert float(found.distance / found.norm) == pytest.approx(float(expected.distance / expected.norm), rel=1e-14)
    assert float(found.norm) == pytest.approx(float(expected.norm), rel=1e-14)
    assert float(found.other_norm) == pytest.approx(float(expected.other_norm), rel=1e-14)


@pytest.mark.parametrize("exponent", [-10, -24, -40])
def test_a_small_change_is_seen_through_another_basis(exponent: int) -> None:
    one = random(3, 5, 4)
    basis = torch.linalg.qr(tensor((3, 3), torch.float64, 9)).Q
    changed = one[0].clone()
    changed[1, 1] *= 1 + 2.0**exponent
    other = basis.T @ changed, one[1] @ basis
    found, expected = compare(one, other), exact(one, other)
    assert float(found.distance) == pytest.approx(float(expected.distance), abs=30 * EPSILON * size_of_factors(one))
    assert float(expected.distance) > 10 * EPSILON * float(expected.norm)


@pytest.mark.parametrize("condition", [1e0, 1e4, 1e8])
def test_the_noise_of_a_refactoring_is_that_of_storing_it(condition: float) -> None:
    one = random(4, 30, 20)
    left, right = (torch.linalg.qr(tensor((4, 4), torch.float64, seed)).Q for seed in (5, 6))
    values = torch.logspace(0, -math.log10(condition), 4, dtype=torch.float64)
    mixing, inverse = left * values @ right, right.T @ (left / values).T
    other = inverse @ one[0], one[1] @ mixing
    dense = torch.linalg.matrix_norm(one[1] @ one[0] - other[1] @ other[0])
    found = compare(one, other)
    assert float(found.distance) <= 30 * EPSILON * condition * float(found.norm)
    assert float((found.distance - dense).abs()) <= 30 * EPSILON * condition * float(found.norm)
    assert float(found.cosine) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("scaling", "other"), [(0.3, 0.3), (2.0, 0.5), (1.2, 0.3), (-0.7, -0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_that_are_equal_have_no_distance_at_all(scaling: float, other: float, dtype: torch.dtype) -> None:
    lora_A, lora_B = random(3, 5, 4, dtype=dtype)
    wider = lora_A.double(), lora_B.double() * (scaling / other)  # a power of two
    found = compare((lora_A, lora_B), wider, scaling, other)
    assert float(found.distance) == 0
    assert float(found.cosine) == pytest.approx(1, rel=1e-15)


def test_a_scaling_folded_exactly_leaves_no_distance() -> None:
    lora_A, lora_B = random(3, 5, 4, dtype=torch.bfloat16)
    folded = (lora_B.float() * 3).double()
    assert torch.equal(folded, lora_B.double() * 3)
    assert float(compare((lora_A, lora_B), (lora_A, folded), 3.0, 1.0).distance) == 0
    assert float(compare((lora_A, lora_B), (lora_A, folded), 0.3, 0.1).distance) > 0  # 0.3 is not 3·0.1


def test_more_directions_that_are_zero_leave_no_distance() -> None:
    lora_A, lora_B = random(3, 5, 4)
    padded = torch.nn.functional.pad(lora_A, (0, 0, 0, 2)), torch.nn.functional.pad(lora_B, (0, 2))
    for found in (compare((lora_A, lora_B), padded), compare(padded, (lora_A, lora_B))):
        assert float(found.distance) == 0


def test_directions_in_another_order_are_the_same() -> None:
    lora_A, lora_B = random(4, 9, 8)
    order = torch.tensor([2, 0, 3, 1])
    found = compare((lora_A, lora_B), (lora_A[order], lora_B[:, order]))
    assert float(found.distance) <= 20 * EPSILON * float(found.norm)


@pytest.mark.parametrize("gauge", [1e30, 1e-30, 1e200, 1e-200])
def test_a_huge_factor_that_meets_a_tiny_one_is_compared_right(gauge: float) -> None:
    one, other = random(3, 5, 4), random(3, 5, 4, seed=7)
    gauges = torch.tensor([gauge, 1.0, 1 / gauge], dtype=torch.float64)
    strange = one[0] / gauges.unsqueeze(1), one[1] * gauges
    plain = compare(one, other)
    for pair, swapped in (((strange, other), False), ((other, strange), True)):
        found = compare(*pair)
        assert torch.allclose(found.distance, plain.distance, rtol=1e-13)
        assert torch.allclose(found.cosine, plain.cosine, rtol=1e-13)
        assert torch.allclose(found.other_norm if swapped else found.norm, plain.norm, rtol=1e-13)
    assert float(compare(strange, one).distance) <= 100 * EPSILON * float(plain.norm)


@pytest.mark.parametrize("scaling", [1e-200, 1e200, 5e-324])
def test_scalings_at_the_end_of_the_range_are_compared_right(scaling: float) -> None:
    one, other = random(3, 5, 4), random(3, 5, 4, seed=7)
    found, plain = compare(one, other, scaling, scaling), compare(one, other)
    if scaling > 1e-300:
        assert torch.allclose(found.distance, plain.distance * scaling, rtol=1e-13, atol=0)
    assert torch.allclose(found.cosine, plain.cosine, rtol=1e-13)
    far = compare(one, other, scaling, 1.0)
    assert torch.allclose(far.norm, plain.norm * scaling, rtol=1e-13, atol=1e-323)
    assert torch.allclose(far.other_norm, plain.other_norm, rtol=1e-13)
    assert torch.allclose(far.cosine, plain.cosine, rtol=1e-13)


def test_nothing_beside_something_is_as_far_as_that_is_long() -> None:
    one, zero = random(3, 5, 4), (torch.ones(2, 5), torch.zeros(4, 2))
    for found, norms in ((compare(one, zero), (1, 0)), (compare(zero, one), (0, 1)), (compare(one, one, 1, 0), (1, 0))):
        length = float(torch.linalg.matrix_norm(one[1] @ one[0]))
        assert float(found.distance) == pytest.approx(length, rel=1e-14)
        assert [float(found.norm), float(found.other_norm)] == pytest.approx(
            [length * part for part in norms], rel=1e-14
        )
        assert math.isnan(found.cosine)
    nothing = compare(zero, zero)
    assert (float(nothing.norm), float(nothing.distance)) == (0, 0)
    assert math.isnan(nothing.cosine)
    assert float(compare(one, one, 0.0, 0.0).distance) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_is_not_hidden(bad: float, place: int) -> None:
    factors: list[Any] = [*random(3, 5, 4, batch=(2,)), *random(2, 5, 4, seed=5, batch=(2,))]
    factors[place][1, 1, 1] = bad
    found = compare_products(*factors)
    assert bool(found.distance[0].isfinite())
    assert not bool(found.distance[1].isfinite())
