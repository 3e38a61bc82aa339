"""How far a sum is from the one that was meant, against dense matrices in float64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from stack_cases import adapter, dense, kinds, module, weighted
from torch import Tensor

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.operations.stack import Stacked
from adaptertools.operations.sum_error import delta_error


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def true_error(meant_A: Tensor, meant_B: Tensor, lora_A: Tensor, lora_B: Tensor) -> float:
    meant = meant_B.double() @ meant_A.double()
    return float((lora_B.double() @ lora_A.double() - meant).norm() / meant.norm())


def off(done: Stacked, adapters: list[Adapter], weights: list[float]) -> float:
    """The largest relative error of a module, of dense matrices."""
    wanted, found = weighted(adapters, weights), weighted([done.adapter], [1.0])
    return max(float((found[name] - delta).norm() / delta.norm()) for name, delta in wanted.items())


@pytest.mark.parametrize("which", ["lora_A", "lora_B", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shapes", [((5, 20), (17, 5)), ((30, 20), (17, 30)), ((3, 4, 12), (3, 9, 4)), ((1, 1), (1, 1))]
)
def test_the_error_is_that_of_dense_matrices(which: str, dtype: torch.dtype, shapes: Any) -> None:
    meant_A, meant_B = normal(*shapes[0], seed=1), normal(*shapes[1], seed=2)
    if which == "lora_B":
        meant_A = meant_A.to(dtype).double()
    if which == "lora_A":
        meant_B = meant_B.to(dtype).double()
    stored = meant_A.to(dtype), meant_B.to(dtype)
    error, estimated = delta_error(meant_A, meant_B, *stored)
    assert error == pytest.approx(true_error(meant_A, meant_B, *stored), rel=1e-6)
    assert not estimated


@pytest.mark.parametrize("rounded", [False, True])
def test_the_error_of_many_rows_is_estimated(rounded: bool) -> None:
    meant_A, meant_B = normal(150, 160, seed=1), normal(140, 150, seed=2)
    if not rounded:
        meant_A = meant_A.float().double()
    meant_B[:, 75:] = -meant_B[:, :75] + 1e-3 * meant_B[:, 75:]
    meant_A[75:] = meant_A[:75]  # so that most of it cancels
    stored = meant_A.float(), meant_B.bfloat16()
    error, estimated = delta_error(meant_A, meant_B, *stored)
    assert estimated
    assert true_error(meant_A, meant_B, *stored) > 1
    assert error == pytest.approx(true_error(meant_A, meant_B, *stored), rel=0.15)
    assert delta_error(meant_A, meant_B, *stored)[0] == error


def test_an_estimate_is_near_even_for_one_direction() -> None:
    meant_A, meant_B = normal(200, 1, seed=1) @ normal(1, 50, seed=2), normal(40, 200, seed=3)
    stored = meant_A.float(), meant_B.float()
    exact = true_error(meant_A.float().double(), meant_B, *stored)
    error, estimated = delta_error(meant_A.float().double(), meant_B, *stored)
    assert estimated
    assert error == pytest.approx(exact, rel=0.5)  # the norms of both are off alike, within four sigma


def test_factors_of_zero_have_no_error_and_a_norm_beyond_float64_is_not_divided_by() -> None:
    zero = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    assert delta_error(*zero, *zero) == (0.0, False)
    lora_A, lora_B = normal(2, 6).repeat(2, 1), torch.cat([normal(5, 2, seed=1), -normal(5, 2, seed=1)], dim=1)
    error, _ = delta_error(lora_A, lora_B, lora_A.float(), lora_B.float())
    assert 1 < error < math.inf


@pytest.mark.parametrize(("size_A", "size_B"), [(1e-200, 1e-200), (1e200, 1e-200), (1e160, 1e160), (1e-300, 1.0)])
def test_sizes_whose_squares_float64_cannot_hold_are_no_trouble(size_A: float, size_B: float) -> None:
    meant_A, meant_B = normal(3, 6), normal(5, 3, seed=1)
    stored = meant_A, meant_B.float().double()
    error, _ = delta_error(meant_A * size_A, meant_B * size_B, stored[0] * size_A, stored[1] * size_B)
    assert error == pytest.approx(true_error(meant_A, meant_B, *stored), rel=1e-6)


def test_values_that_are_not_finite_have_no_error() -> None:
    meant_A, meant_B = normal(3, 6), normal(5, 3, seed=1)
    meant_B[0, 0], meant_A[1, 1] = math.inf, math.nan
    error, _ = delta_error(meant_A, meant_B, meant_A.float(), meant_B.float())
    assert 0 < error < 1e-6


def related(scale: float = 1e-6, **fields: Any) -> list[Adapter]:
    """An adapter and one that was trained on from it a little, of another alpha."""
    one = module(n_in=30, n_out=20, alpha=3.0, **fields)
    noise = normal(*one.lora_B.shape, seed=9).to(one.lora_B.dtype) * scale
    moved = one.lora_B * 0.6 + noise  # alpha 5: about the same delta weight
    return [adapter(one), adapter(replace(one, lora_A=one.lora_A * (1 + 1e-7), lora_B=moved, alpha=5.0))]


@pytest.mark.parametrize(("options", "least"), [({}, 1e-3), ({"dtype": "bf16"}, 1.0), ({"dtype": "f16"}, 1.0)])
def test_terms_that_nearly_cancel_show_in_the_error_of_the_delta_weight(options: dict[str, Any], least: float) -> None:
    adapters, weights = related(), [0.7, -0.7]
    done = adaptertools.stack(adapters, weights, **options)
    assert done.max_delta_error == pytest.approx(off(done, adapters, weights), rel=1e-3)
    assert done.max_delta_error > max(least, 100 * done.max_element_error)
    assert done.rows[0].delta_error == done.max_delta_error
    assert any(note.startswith("the sources nearly cancel one another in 1 module") for note in done.notes)
    details = done.adapter.history[-1].details
    assert details["max_delta_error"] == done.max_delta_error
    assert details["max_element_error"] == done.max_element_error
    assert "max_relative_error" not in details


def test_terms_that_do_not_cancel_have_an_error_of_the_size_of_the_rounding_and_no_note() -> None:
    adapters, weights = [adapter(*kinds(seed=seed, ranks=1)) for seed in (0, 40)], [0.7, -0.3]
    done = adaptertools.stack(adapters, weights)
    assert 0 < done.max_delta_error < 1e-7
    assert not any("cancel" in note for note in done.notes)
    assert max(off(done, adapters, weights), 1e-9) <= done.max_delta_error * 1.001


def test_a_rank_option_leaves_the_error_of_the_sum_in_the_report() -> None:
    adapters, weights = related(), [0.7, -0.7]
    done = adaptertools.stack(adapters, weights, rank=2)
    assert done.max_delta_error == adaptertools.stack(adapters, weights).max_delta_error > 1e-3


def test_one_adapter_cast_to_a_dtype_has_the_error_of_the_cast() -> None:
    one = adapter(module(n_in=30, n_out=20))
    done = adaptertools.stack([one], dtype="bf16")
    assert done.max_delta_error == pytest.approx(off(done, [one], [1.0]), rel=1e-3)


def test_float64_admits_what_its_own_arithmetic_loses() -> None:
    adapters = [adapter(module(seed=seed, dtype=torch.float64, alpha=alpha)) for seed, alpha in ((0, 3.0), (1, 1.7))]
    done = adaptertools.stack(adapters, [0.7, 0.3])
    assert 0 < done.max_delta_error < 1e-14


def test_nothing_is_measured_where_nothing_was_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptertools.operations.concatenate.delta_error", lambda *_: pytest.fail("measured"))
    done = adaptertools.stack([adapter(module(alpha=2.0)), adapter(module(seed=1, alpha=1.0))], [1.0, -2.0])
    assert done.exact
    assert done.max_delta_error == done.max_element_error == 0


# Sources that add nothing, and sums of which nothing is left.


@pytest.mark.parametrize("shared", [True, False])
def test_an_adapter_beside_one_that_was_never_trained_is_exactly_itself(shared: bool) -> None:
    one = module(n_in=30, n_out=20, alpha=16.0)
    idle = replace(one if shared else module(n_in=30, n_out=20, seed=5, alpha=7.0), lora_B=torch.zeros(20, 3))
    for weights in ([1.0, 1.0], [0.3, 0.7]):
        done = adaptertools.stack([adapter(idle), adapter(one)], weights)
        (after,) = done.adapter.modules
        assert torch.equal(after.lora_A, one.lora_A)
        assert torch.equal(after.lora_B, one.lora_B)
        assert after.scaling == pytest.approx(weights[1] * one.scaling, rel=2.0**-51)
    assert adaptertools.stack([adapter(idle), adapter(one)]).exact


def test_what_is_not_finite_is_not_lost_beside_a_lora_B_of_zeros() -> None:
    one = module()
    bad = replace(module(seed=1), lora_A=torch.full_like(one.lora_A, math.nan), lora_B=torch.zeros(8, 3))
    done = adaptertools.stack([adapter(one), adapter(bad)], allow_nonfinite=True)
    assert torch.isnan(done.adapter.modules[0].lora_A).any()


@pytest.mark.parametrize("method", ["sum", "ties"])
def test_a_sum_of_which_nothing_is_left_has_a_note(method: Any) -> None:
    one = adapter(module("a"), module("b", seed=1))
    done = adaptertools.stack([one, one], [0.7, -0.7], method=method, **({} if method == "sum" else {"density": 1.0}))
    assert not any(dense(m).any() for m in done.adapter.modules)
    assert "the sources cancel one another in all modules: the delta weight is zero there" in done.notes
    beside = adapter(module("a"), module("c", seed=2))
    done = adaptertools.stack([one, beside], [1.0, -1.0])
    assert "the sources cancel one another in 1 of 3 modules, such as a: the delta weight is zero there" in done.notes
    idle = adapter(module("a", lora_B=torch.zeros(8, 3)))
    assert not any("cancel" in note for note in adaptertools.stack([idle, idle], [1.0, -1.0]).notes)
    assert not any("cancel" in note for note in adaptertools.stack([adapter(module(alpha=0.0))]).notes)


# Half precision.


def half(seed: int, alpha: float, dtype: torch.dtype = torch.bfloat16) -> Adapter:
    return adapter(module(rank=8, seed=seed, n_in=60, n_out=50, alpha=alpha, dtype=dtype))


def test_factors_that_became_float32_are_named() -> None:
    done = adaptertools.stack([half(0, 3.0), half(1, 5.0)], [0.7, 0.3])
    assert done.promoted == {"x.q_proj.lora_B": "f32"}
    assert done.to_json()["promoted"] == done.promoted
    assert adaptertools.stack([half(0, 4.0), half(1, 4.0)]).promoted == {}
    assert adaptertools.stack([half(0, 3.0), half(1, 5.0)], dtype="f32").promoted == {}
    assert adaptertools.stack([half(0, 3.0), half(1, 5.0, torch.float32)]).promoted == {}
    mixed = adaptertools.stack([half(0, 4.0), half(1, 4.0, torch.float16)])
    assert mixed.promoted == {"x.q_proj.lora_A": "f32", "x.q_proj.lora_B": "f32"}


@pytest.mark.parametrize("method", ["sum", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_rank_option_gives_the_dtype_of_the_sources_again(dtype: torch.dtype, method: Any) -> None:
    adapters = [half(0, 3.0, dtype), half(1, 5.0, dtype)]
    for options in ({"rank": 4}, {"max_rank": 4, "energy": 0.9}, {"size": "60%"}, {"rank": 64}):
        done = adaptertools.stack(adapters, [0.7, 0.3], method=method, **options)
        assert {t.dtype for t in done.adapter.named_tensors.values()} == {dtype}
        assert done.promoted == {}
    wide = adaptertools.stack(adapters, [0.7, 0.3], method=method, rank=4, dtype="f32")
    assert {t.dtype for t in wide.adapter.named_tensors.values()} == {torch.float32}
    joined = adaptertools.stack([adapters[0], half(1, 5.0, torch.float32)], [0.7, 0.3], method=method, rank=4)
    assert {t.dtype for t in joined.adapter.named_tensors.values()} == {torch.float32}


def test_a_size_of_half_precision_sources_holds_what_that_dtype_would_hold() -> None:
    adapters = [half(0, 3.0), half(1, 5.0)]
    own, asked, wide = (
        adaptertools.stack(adapters, [0.7, 0.3], size=5500, dtype=dtype) for dtype in (None, "bf16", "f32")
    )
    for done in (own, asked, wide):
        assert done.truncation is not None
    assert own.truncation.relative_error == pytest.approx(asked.truncation.relative_error, rel=1e-6)
    assert own.truncation.relative_error < 0.9 * wide.truncation.relative_error
    whole = own.truncation.relative_error + own.truncation.rounding_error + own.max_delta_error
    assert off(own, adapters, [0.7, 0.3]) <= whole
