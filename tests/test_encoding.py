"""Folding a scale into a tensor: exactness is proven or measured, and an inexact fold is promoted."""

import math
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.encoding import Encoder, fold_is_exact, measure, scale
from adaptertools.errors import NonFiniteError
from adaptertools.module import LoraModule, Target

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FACTORS = (1.0, 2.0, 0.5, -4.0, 2.0**-20, 2.0**30, 2.5, 0.1, 1 / 3, 3.0, 0.0, 2.0**-140, 2.0**120)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Random bits in any shape, without NaN and infinity, or random normal values; zeros among both."""
    dtype = draw(st.sampled_from(FLOATS))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    if draw(st.booleans()):
        tensor = torch.randn(shape, generator=generator).to(dtype)
    else:
        raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        tensor = raw.view(dtype).reshape(shape).nan_to_num(1.5, 1.0, -1.0)
    if draw(st.booleans()):
        tensor.view(-1)[0] = 0.0
    return tensor.permute(draw(st.permutations(range(tensor.ndim))))


@settings(deadline=None, max_examples=400)
@given(tensor=tensors(), factor=st.sampled_from(FACTORS), dtype=st.sampled_from(FLOATS))
def test_exactness_agrees_with_exact_arithmetic(tensor: torch.Tensor, factor: float, dtype: torch.dtype) -> None:
    scaled = scale(tensor, factor, dtype)
    truth = [Fraction(float(x)) * Fraction(factor) for x in tensor.reshape(-1)]
    found = [float(y) for y in scaled.reshape(-1)]
    kept = [math.isfinite(y) and Fraction(y) == x for x, y in zip(truth, found, strict=True)]
    loss = measure("x", tensor, factor, dtype)
    assert loss.exact == all(kept) or (tensor.dtype is torch.float64 and not loss.exact)  # quotients err to this side
    assert loss.exact == fold_is_exact(tensor, factor, dtype)
    assert loss.exact == (loss.max_relative_error == 0.0)
    errors = [
        math.inf if not math.isfinite(y) else float(abs((Fraction(y) - x) / x))
        for x, y in zip(truth, found, strict=True)
        if x
    ]
    worst = max(errors, default=0.0)
    assert loss.max_relative_error == pytest.approx(worst, rel=1e-6, abs=2.0**-51) or worst == math.inf


@settings(deadline=None, max_examples=200)
@given(tensor=tensors(), factor=st.sampled_from(FACTORS), dtype=st.sampled_from(FLOATS))
def test_scaling_rounds_the_product_to_the_nearest(tensor: torch.Tensor, factor: float, dtype: torch.dtype) -> None:
    scaled = scale(tensor, factor, dtype)
    assert scaled.dtype is dtype
    assert scaled.shape == tensor.shape
    if dtype is torch.float64:
        assert torch.equal(scaled, tensor.double() * factor)
    else:
        assert torch.equal(scaled, (tensor.double() * factor).to(dtype))


def test_halving_is_inexact_in_subnormals_of_float16() -> None:
    smallest = torch.tensor([2.0**-24, 2.0**-23]).half()
    assert fold_is_exact(torch.tensor([2.0**-13, 1.0]).half(), 0.5, torch.float16)
    assert fold_is_exact(smallest, 2.0, torch.float16)
    assert fold_is_exact(smallest[1:], 0.5, torch.float16)
    assert not fold_is_exact(smallest, 0.5, torch.float16)
    assert measure("x", smallest, 0.5, torch.float16).max_relative_error == 1.0  # 2^-25 becomes 0


def test_doubling_beyond_the_largest_number_is_inexact() -> None:
    loss = measure("x", torch.tensor([40000.0]).half(), 2.0, torch.float16)
    assert not loss.exact
    assert loss.max_relative_error == math.inf


def test_two_and_a_half_times_bfloat16_is_exact_in_float32_alone() -> None:
    tensor = torch.randn(1000).bfloat16()
    assert not fold_is_exact(tensor, 2.5, torch.bfloat16)
    assert fold_is_exact(tensor, 2.5, torch.float32)


def test_a_tenth_of_float32_errs_by_half_a_last_bit() -> None:
    loss = measure("x", torch.randn(100_000, generator=torch.Generator().manual_seed(0)), 0.1, torch.float32)
    assert not loss.exact
    assert 2.0**-25 < loss.max_relative_error <= 2.0**-24


def test_a_cast_to_bfloat16_errs_by_half_a_last_bit() -> None:
    loss = measure("x", torch.randn(100_000, generator=torch.Generator().manual_seed(0)), 1.0, torch.bfloat16)
    assert 2.0**-9 < loss.max_relative_error <= 2.0**-8
    assert measure("x", torch.randn(100).bfloat16(), 1.0, torch.float32).exact


@pytest.mark.parametrize("factor", [0.5, 2.0, 0.1])
def test_zeros_are_exact_whatever_the_factor(factor: float) -> None:
    assert measure("x", torch.zeros(70_000), factor, torch.float32).exact
    assert measure("x", torch.empty(0, 3), factor, torch.float32).exact


def test_non_finite_values_count_as_kept_when_they_stay_what_they_are() -> None:
    tensor = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0])
    assert measure("x", tensor, 2.0, torch.float32).exact
    assert measure("x", tensor, 2.0, torch.bfloat16).exact
    loss = measure("x", tensor, 0.1, torch.float32)
    assert 0 < loss.max_relative_error < 2.0**-24


@pytest.mark.parametrize("position", [0, 1 << 15, 99_999])
def test_one_bad_element_in_any_chunk_is_found(position: int) -> None:
    tensor = torch.ones(100_000)
    tensor[position] = 2.0**-149
    assert not fold_is_exact(tensor, 0.5, torch.float32)
    tensor[position] = 2.0**-126
    assert not fold_is_exact(tensor * (1 + 2.0**-23), 0.5, torch.float32)
    assert fold_is_exact(tensor, 0.5, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "factor", "expected"),
    [
        (torch.bfloat16, 2.0, torch.bfloat16),
        (torch.bfloat16, 2.5, torch.float32),
        (torch.float16, 0.25, torch.float16),
        (torch.float16, 0.1, torch.float32),
        (torch.float32, 0.1, torch.float32),
        (torch.float64, 0.1, torch.float64),
    ],
)
def test_an_inexact_fold_promotes_to_float32(dtype: torch.dtype, factor: float, expected: torch.dtype) -> None:
    tensor = torch.linspace(0.5, 2.0, 64).to(dtype)
    encoder = Encoder()
    folded = encoder.fold("w", tensor, factor)
    assert folded.dtype is expected
    assert folded.compute().dtype is expected
    assert torch.equal(folded.compute(), (tensor.double() * factor).to(expected))
    (loss,) = encoder.losses
    assert (loss.tensor, loss.factor) == ("w", factor)


def test_a_dtype_that_is_asked_for_is_used_and_its_loss_reported() -> None:
    encoder = Encoder(torch.float16)
    assert encoder.fold("w", torch.linspace(0.5, 2.0, 64), 0.1).dtype is torch.float16
    assert encoder.keep("h", torch.linspace(0.5, 2.0, 64).bfloat16()).dtype is torch.float16
    assert encoder.keep("i", torch.arange(3)).dtype is torch.int64
    assert [(loss.tensor, loss.exact, loss.dtype) for loss in encoder.losses] == [
        ("w", False, "f16"),
        ("h", True, "f16"),
    ]


def test_keeping_a_tensor_loses_nothing_and_reports_nothing() -> None:
    encoder, tensor = Encoder(), torch.randn(3, 4).bfloat16().t()
    assert torch.equal(encoder.keep("w", tensor).compute(), tensor)
    assert encoder.losses == []


def test_non_finite_values_are_refused_unless_allowed() -> None:
    bad = torch.tensor([1.0, math.nan])
    with pytest.raises(NonFiniteError, match="w: 1 NaN and 0 infinite of 2 values"):
        Encoder().keep("w", bad).compute()
    assert Encoder(allow_nonfinite=True).fold("w", bad, 2.0).compute()[0] == 2.0


def test_a_value_that_overflows_on_the_way_is_refused() -> None:
    with pytest.raises(NonFiniteError, match=r"^w: values too large for f16: choose another --dtype$"):
        Encoder(torch.float16).keep("w", torch.tensor([1e6])).compute()
    with pytest.raises(NonFiniteError, match=r"^w: values too large for f32 once they are scaled by 2$"):
        Encoder().fold("w", torch.tensor([3e38]), 2.0).compute()


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "limit"), [(2.0, 0.5), (0.5, 1.0), (0.1, 4.0)])
def test_measuring_a_gigabyte_is_quick(factor: float, limit: float) -> None:
    tensor = torch.randn(1 << 28)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        measure("x", tensor, factor, torch.float32)
        best = min(best, time.perf_counter() - start)
    assert best < limit


@pytest.mark.parametrize("format", ["peft", "loralib", "flax"])
def test_an_infinite_error_is_written_into_the_history_of_every_format(format: str, tmp_path: Path) -> None:
    module = LoraModule(
        target=Target(parameter="layers.0.q_proj"), lora_A=torch.ones(2, 4), lora_B=torch.full((6, 2), 1e6), alpha=4.0
    )
    adapter = Adapter(modules=(module,))
    report = adaptertools.write(adapter, tmp_path / "x", format=format, dtype="f16", allow_nonfinite=True)
    assert report.max_relative_error == math.inf
    (entry,) = adaptertools.read(report.path).history
    assert entry.details["max_relative_error"] == "inf"
