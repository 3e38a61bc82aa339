"""Norms, singular values and inner products of products, without the product."""

from dataclasses import replace

import pytest
import torch
from factor_cases import ACCURACY, PAIRS, TALL, Pair, check_svd, check_triangle, normal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import tensor

from adaptertools import linalg
from adaptertools.adapter import Kind, LoraModule, Target
from adaptertools.errors import OptionError
from adaptertools.linalg import (
    cholesky_triangle,
    delta_norm,
    inner_product,
    parse_device,
    product_norm,
    spectral_norm,
    svd_of_product,
    triangle,
)


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


@pytest.mark.parametrize("name", TALL)
def test_a_triangle_has_the_gram_matrix_of_its_factor(name: str) -> None:
    check_triangle(TALL[name], triangle(TALL[name].clone()))


@pytest.mark.parametrize("name", TALL)
def test_the_triangle_from_matrix_products_is_as_good(name: str) -> None:
    kept = TALL[name].clone()
    found = cholesky_triangle(TALL[name])
    assert found.shape == (*kept.shape[:-2], kept.shape[-1], kept.shape[-1])
    check_triangle(kept, found)
    assert torch.equal(TALL[name], kept)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 7),
    batch=st.sampled_from(((), (1,), (3,), (2, 2))),
    power=st.integers(0, 15),
    seed=st.integers(0, 1000),
)
@example(rows=3, columns=3, batch=(), power=5, seed=171)
@example(rows=14, columns=3, batch=(), power=6, seed=66)
def test_the_triangle_from_matrix_products_is_right_at_any_shape_and_condition(
    rows: int, columns: int, batch: tuple[int, ...], power: int, seed: int
) -> None:
    scales = torch.logspace(0, -power, columns, dtype=torch.float64)
    mixed = normal(columns, columns, seed=seed + 1)
    factor = (normal(*batch, rows, columns, seed=seed) * scales) @ mixed
    check_triangle(factor, cholesky_triangle(factor))


def test_only_what_is_unsafe_falls_back_to_householder(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, plain = [], torch.linalg.qr

    def counted(matrices: torch.Tensor, mode: str) -> object:
        sizes.append(len(matrices))
        return plain(matrices, mode=mode)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    cholesky_triangle(TALL["a batch"])
    assert sizes == []
    cholesky_triangle(TALL["a batch of which some are dependent"])
    assert sizes == [1]


def test_a_triangle_of_what_is_not_finite_leaves_the_rest_of_the_batch_alone() -> None:
    batch = normal(3, 60, 6)
    batch[1, 4, 2] = float("nan")
    found = cholesky_triangle(batch)
    check_triangle(batch[[0, 2]], found[[0, 2]])
    assert torch.isnan(found[1]).any()


@pytest.mark.parametrize("rank", [1, 2, 4, 100])
@pytest.mark.parametrize("name", PAIRS)
def test_the_svd_of_a_product_is_that_of_the_dense_matrix(name: str, rank: int) -> None:
    pair = PAIRS[name]
    found = svd_of_product(pair.lora_A, pair.lora_B)
    size = min(*pair.lora_A.shape[-2:], pair.lora_B.shape[-2])
    assert found.singular_values.shape == (*pair.lora_A.shape[:-2], size)
    lora_A, lora_B = found.factors(pair.lora_A, pair.lora_B, rank)
    assert lora_A.shape == (*pair.lora_A.shape[:-2], min(rank, size), pair.lora_A.shape[-1])
    assert lora_B.shape == (*pair.lora_B.shape[:-2], pair.lora_B.shape[-2], min(rank, size))
    check_svd(pair, found.singular_values, lora_A, lora_B, min(rank, size))


@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("name", PAIRS)
def test_the_svd_by_matrix_products_is_that_of_the_dense_matrix(
    name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "triangle", cholesky_triangle)  # what a GPU does
    test_the_svd_of_a_product_is_that_of_the_dense_matrix(name, rank)


def test_directions_that_are_lost_in_rounding_are_zero() -> None:
    pair = PAIRS["dependent rows"]
    found = svd_of_product(pair.lora_A, pair.lora_B)
    assert (found.singular_values[:2] > 0.1).all()
    assert (found.singular_values[2:] < 1e-14 * found.singular_values[0]).all()
    lost = found.singular_values == 0
    assert (found.left[:, lost] == 0).all()
    assert (found.right[lost] == 0).all()


def test_singular_values_keep_their_digits_when_the_factors_trade_sizes() -> None:
    plain, odd = PAIRS["random"], PAIRS["huge columns that meet tiny rows"]
    expected = svd_of_product(plain.lora_A, plain.lora_B).singular_values
    found = svd_of_product(odd.lora_A, odd.lora_B).singular_values
    assert torch.allclose(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_one_bad_value_spoils_its_own_decomposition_alone(factor: str, bad: float) -> None:
    pair = {"lora_A": normal(3, 6, 40), "lora_B": normal(3, 50, 6, seed=1)}
    pair[factor][1, 2, 3] = bad
    found = svd_of_product(**pair)
    assert torch.isnan(found.singular_values[1]).all()
    assert torch.isnan(spectral_norm(**pair)[1])
    for index in (0, 2):
        expected = torch.linalg.svdvals(pair["lora_B"][index] @ pair["lora_A"][index])[:6]
        assert torch.allclose(found[index].singular_values, expected, rtol=1e-12, atol=1e-13)


@settings(max_examples=80, deadline=None)
@given(
    rank=st.integers(1, 9),
    n_in=st.integers(1, 12),
    n_out=st.integers(1, 12),
    keep=st.integers(1, 10),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    batch=st.sampled_from(((), (1,), (3,), (2, 2))),
    seed=st.integers(0, 1000),
)
def test_truncating_a_product_is_optimal_at_any_shape(
    rank: int, n_in: int, n_out: int, keep: int, dtype: torch.dtype, batch: tuple[int, ...], seed: int
) -> None:
    pair = Pair(tensor((*batch, rank, n_in), dtype, seed), tensor((*batch, n_out, rank), dtype, seed + 1))
    found = svd_of_product(pair.lora_A, pair.lora_B)
    lora_A, lora_B = found.factors(pair.lora_A, pair.lora_B, keep)
    check_svd(pair, found.singular_values, lora_A, lora_B, min(keep, rank, n_in, n_out))


@pytest.mark.parametrize("name", PAIRS)
def test_the_spectral_norm_is_that_of_the_dense_matrix(name: str) -> None:
    pair = PAIRS[name]
    error = spectral_norm(pair.lora_A, pair.lora_B) - torch.linalg.matrix_norm(pair.dense, ord=2)
    assert (error.abs() <= ACCURACY * pair.magnitude).all()


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    n_in=st.integers(1, 12),
    n_out=st.integers(1, 12),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    batch=st.sampled_from(((), (1,), (3,))),
    seed=st.integers(0, 1000),
)
def test_the_inner_product_of_two_products_is_that_of_the_dense_matrices(
    ranks: tuple[int, int], n_in: int, n_out: int, dtype: torch.dtype, batch: tuple[int, ...], seed: int
) -> None:
    one, other = (
        Pair(tensor((*batch, rank, n_in), dtype, seed + i), tensor((*batch, n_out, rank), dtype, seed + 10 + i))
        for i, rank in enumerate(ranks)
    )
    found = inner_product(one.lora_A, one.lora_B, other.lora_A, other.lora_B)
    expected = (one.dense * other.dense).sum(dim=(-2, -1))
    assert found.shape == batch
    scale = one.dense.flatten(-2).norm(dim=-1) * other.dense.flatten(-2).norm(dim=-1)
    magnitudes = one.lora_B.double().abs() @ one.lora_A.double().abs()
    scale = scale + (magnitudes * (other.lora_B.double().abs() @ other.lora_A.double().abs())).sum(dim=(-2, -1))
    assert ((found - expected).abs() <= 1e-13 * scale).all()


def test_the_product_with_itself_is_the_square_of_the_norm() -> None:
    pair = PAIRS["a batch"]
    found = inner_product(pair.lora_A, pair.lora_B, pair.lora_A, pair.lora_B)
    assert torch.allclose(found, product_norm(pair.lora_A, pair.lora_B) ** 2, rtol=1e-13)


def test_devices_are_known_by_name() -> None:
    cuda = torch.cuda.is_available()
    assert parse_device("auto") == torch.device("cuda" if cuda else "cpu")
    assert parse_device("cpu") == parse_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "said"),
    [("cuda:99", "no such device"), ("gpu", "expected auto, cpu"), ("meta", "expected auto, cpu, cuda, cuda:N or mps")],
)
def test_a_device_that_will_not_do_is_an_error(name: str, said: str) -> None:
    with pytest.raises(OptionError, match=rf"^device '{name}': .*{said}"):
        parse_device(name)


def test_mps_multiplies_where_it_is_and_leaves_float64_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(OptionError, match=r"^device 'mps': there is no such device, torch finds no MPS here$"):
        parse_device("mps", has_float64=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert parse_device("mps") == torch.device("cpu")
    assert parse_device("mps", has_float64=False) == torch.device("mps")
    assert parse_device("cpu", has_float64=False) == torch.device("cpu")
