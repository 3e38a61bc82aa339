"""Norms of products without the product."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import tensor

from adaptertools.adapter import Kind, LoraModule, Target
from adaptertools.linalg import delta_norm, product_norm


def formed(lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(lora_B.double() @ lora_A.double())


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 9),
    n_in=st.integers(1, 12),
    n_out=st.integers(1, 12),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    experts=st.sampled_from(((), (1,), (3,))),
    seed=st.integers(0, 1000),
)
def test_the_norm_of_a_product_is_that_of_the_formed_product(
    rank: int, n_in: int, n_out: int, dtype: torch.dtype, experts: tuple[int, ...], seed: int
) -> None:
    lora_A, lora_B = tensor((*experts, rank, n_in), dtype, seed), tensor((*experts, n_out, rank), dtype, seed + 1)
    kept = lora_A.clone(), lora_B.clone()
    assert product_norm(lora_A, lora_B).shape == experts
    assert torch.allclose(product_norm(lora_A, lora_B), formed(lora_A, lora_B), rtol=1e-12, atol=1e-14)
    assert torch.equal(lora_A, kept[0])
    assert torch.equal(lora_B, kept[1])


def test_a_zero_factor_gives_zero() -> None:
    ones = torch.ones(3, 4)
    assert product_norm(ones, torch.zeros(5, 3)) == 0
    assert product_norm(torch.zeros(3, 4), torch.ones(5, 3)) == 0
    assert product_norm(torch.zeros(2, 3, 4), torch.ones(2, 5, 3)).tolist() == [0, 0]


def test_dependent_columns_that_cancel_keep_their_digits() -> None:
    step = 2.0**-20
    lora_B = torch.tensor([[1.0, 1.0], [1.0, 1.0 + step]], dtype=torch.float64)
    lora_A = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert float(product_norm(lora_A, lora_B)) == pytest.approx(step * 2**0.5, rel=1e-9)


def test_repeated_rows_are_rank_deficient_and_counted_right() -> None:
    row, column = torch.randn(1, 7, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    expected = 16 * row.norm() * column.norm()
    assert torch.allclose(product_norm(row.repeat(16, 1), column.repeat(1, 16)), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_a_huge_column_that_meets_a_tiny_row_does_not_drown_the_rest(scale: float) -> None:
    lora_A, lora_B = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    expected = formed(lora_A, lora_B)
    weights = torch.tensor([scale, 1.0], dtype=torch.float64)
    assert torch.allclose(product_norm(lora_A / weights.unsqueeze(1), lora_B * weights), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_that_leave_float64_do_no_harm(scale: float) -> None:
    lora_A, lora_B = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    expected = formed(lora_A, lora_B) * scale
    assert torch.allclose(product_norm(lora_A * scale, lora_B), expected, rtol=1e-12, atol=0)


def test_the_smallest_number_is_not_lost() -> None:
    tiny = torch.tensor([[5e-324]], dtype=torch.float64)
    assert float(product_norm(tiny, torch.tensor([[1e300]], dtype=torch.float64))) == 5e-324 * 1e300


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    lora_A = torch.ones(2, 3, 4)
    lora_A[1, 2, 3] = bad
    clean, dirty = product_norm(lora_A, torch.ones(2, 5, 3)).tolist()
    assert clean == pytest.approx(3 * 20**0.5)
    assert dirty != dirty


def test_delta_norm_is_that_of_the_delta_weight() -> None:
    module = LoraModule(target=Target(parameter="x"), lora_A=torch.randn(4, 6), lora_B=torch.randn(5, 4), alpha=-7.0)
    assert delta_norm(module) == pytest.approx(float(module.delta_weight(dtype=torch.float64).norm()), rel=1e-12)
    stack = replace(module, lora_A=torch.randn(3, 4, 6), lora_B=torch.randn(3, 5, 4), kind=Kind.PARAMETER)
    assert delta_norm(stack) == pytest.approx(float(stack.delta_weight(dtype=torch.float64).norm()), rel=1e-12)


def test_the_delta_weight_is_never_formed() -> None:
    wide = 1_000_000
    norm = product_norm(torch.ones(1, wide), torch.ones(wide, 1))
    assert float(norm) == pytest.approx(wide, rel=1e-12)
