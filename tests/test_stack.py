"""The exact weighted sum of adapters, against the dense sum in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stack_cases import (
    WEIGHTS,
    adapter,
    assert_is_weighted_sum,
    biases,
    dense,
    kinds,
    module,
    sources,
    weighted,
)
from strategies import tensor

import adaptertools
from adaptertools.adapter import Adapter, Base, FullWeight, RowSlice, ScaleRule, Target


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@settings(max_examples=150, deadline=None)
@given(adapters=sources(), data=st.data())
def test_the_stack_is_the_dense_weighted_sum_within_the_error_that_is_said(
    adapters: list[Adapter], data: st.DataObject
) -> None:
    weights = [data.draw(st.sampled_from(WEIGHTS)) for _ in adapters]
    before = [{name: t.clone() for name, t in one.named_tensors.items()} for one in adapters]
    done = adaptertools.stack(adapters, weights)
    error = done.max_element_error
    wanted, found = weighted(adapters, weights), weighted([done.adapter], [1.0])
    remade = any("full rank" in note for note in done.notes)
    for name, delta in wanted.items():
        said = max(row.delta_error for row in done.rows if row.target.partition("[")[0] == name[1:])
        off, norm = float((found[name] - delta).norm()), float(delta.norm())
        assert off <= (said * 1.001 + 1e-14) * norm
        assert said < 1e-6
        if len([row for row in done.rows if row.target.startswith(name[1:])]) == 1 and not remade:
            assert off >= (said * 0.999 - 1e-14) * norm
    if not remade:
        assert_is_weighted_sum(done.adapter, adapters, weights, error)
        assert error <= 2.0**-22
    assert done.exact == (error == 0 and done.max_delta_error == 0)
    assert not done.estimated
    wanted_biases, found_biases = biases(adapters, weights), biases([done.adapter], [1.0])
    assert wanted_biases.keys() == found_biases.keys()
    for name, bias in wanted_biases.items():
        assert torch.allclose(found_biases[name], bias, rtol=1e-6, atol=1e-6)
    for one, tensors in zip(adapters, before, strict=True):
        for name, value in one.named_tensors.items():
            assert torch.equal(value, tensors[name]), f"stacking changed {name}"


@settings(max_examples=60, deadline=None)
@given(adapters=sources(2), data=st.data())
def test_the_order_of_the_sources_does_not_matter(adapters: list[Adapter], data: st.DataObject) -> None:
    weights = [data.draw(st.sampled_from(WEIGHTS)) for _ in adapters]
    order = data.draw(st.permutations(range(len(adapters))))
    one = adaptertools.stack(adapters, weights)
    other = adaptertools.stack([adapters[i] for i in order], [weights[i] for i in order])
    first, second = weighted([one.adapter], [1.0]), weighted([other.adapter], [1.0])
    assert first.keys() == second.keys()
    sizes = weighted(adapters, [1.0] * len(adapters))
    for name, delta in first.items():
        scale = max(float(sizes[name].abs().max()), float(delta.abs().max()), 1.0)
        assert float((delta - second[name]).abs().max()) <= 1e-4 * scale


@settings(max_examples=60, deadline=None)
@given(adapters=sources(1, 1), exponent=st.integers(-3, 3))
def test_an_adapter_beside_itself_is_twice_the_adapter_without_rank(adapters: list[Adapter], exponent: int) -> None:
    (one,) = adapters
    power = 2.0**exponent
    done = adaptertools.stack([one, one], [power, power])
    assert done.max_element_error <= 2.0**-52  # alpha / r cannot always state alpha / sqrt(r) to the last bit
    assert done.exact or any(m.scale_rule is not ScaleRule.ALPHA_OVER_RANK for m in one.modules)
    assert [m.rank for m in done.adapter.modules] == [m.rank for m in one.modules]
    for before, after in zip(one.modules, done.adapter.modules, strict=True):
        assert torch.equal(after.lora_A, before.lora_A)
        assert torch.equal(after.lora_B, before.lora_B)
        assert after.scaling == pytest.approx(2 * power * before.scaling, rel=1e-15)


@settings(max_examples=60, deadline=None)
@given(adapters=sources(1, 1), weight=st.sampled_from(WEIGHTS))
def test_an_adapter_less_itself_is_nothing(adapters: list[Adapter], weight: float) -> None:
    (one,) = adapters
    done = adaptertools.stack([one, one], [weight, -weight])
    assert done.exact
    assert {str(m.target) for m in done.adapter.modules} == {str(m.target) for m in one.modules}
    for after in done.adapter.modules:
        assert not dense(after).any()
        assert after.nominal_rank == 1


@settings(max_examples=60, deadline=None)
@given(adapters=sources(1, 1), data=st.data())
def test_weights_of_the_same_adapter_add_up(adapters: list[Adapter], data: st.DataObject) -> None:
    first, second = (data.draw(st.sampled_from((0.7, 2.0, 0.3, 0.5))) for _ in range(2))
    apart = adaptertools.stack([adapters[0], adapters[0]], [first, second])
    assert_is_weighted_sum(apart.adapter, adapters, [first + second], apart.max_element_error + 1e-15)


@settings(max_examples=60, deadline=None)
@given(adapters=sources(2), rank=st.integers(1, 5))
def test_a_truncated_stack_is_within_the_reported_error(adapters: list[Adapter], rank: int) -> None:
    whole = adaptertools.stack(adapters)
    cut = adaptertools.stack(adapters, rank=rank)
    assert cut.truncation is not None
    exact, lower = weighted(adapters, [1.0] * len(adapters)), weighted([cut.adapter], [1.0])
    total = sum(float(delta.norm()) ** 2 for delta in exact.values()) ** 0.5
    off = sum(float((lower[name] - delta).norm()) ** 2 for name, delta in exact.items()) ** 0.5
    allowed = cut.truncation.relative_error + cut.truncation.rounding_error
    assert off <= (allowed + 1e-5) * total
    if cut.truncation.rounding_error == 0 and whole.exact:
        assert off >= (cut.truncation.relative_error - 1e-9) * total
    assert max(m.nominal_rank for m in cut.adapter.modules) <= max(rank, 1)
    assert [entry.operation for entry in cut.adapter.history] == ["stack", "truncate"]
    assert cut.adapter.origin == whole.adapter.origin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_kind_of_module_is_stacked(dtype: torch.dtype) -> None:
    adapters = [adapter(*kinds(dtype, 0, 1)), adapter(*kinds(dtype, 40, 2))]
    done = adaptertools.stack(adapters, [0.7, -1.0])
    assert not any("full rank" in note for note in done.notes)
    assert_is_weighted_sum(done.adapter, adapters, [0.7, -1.0], done.max_element_error)
    assert {m.nominal_rank for m in done.adapter.modules} == {3}
    for before, after in zip(adapters[0].modules, done.adapter.modules, strict=True):
        assert (after.target, after.kind, after.shape, after.transposed) == (
            before.target,
            before.kind,
            before.shape,
            before.transposed,
        )
        assert (after.scale_rule, after.scaling) == (ScaleRule.ALPHA_OVER_RANK, 1.0)
        assert {after.lora_A.dtype, after.lora_B.dtype} == {dtype, torch.float32}


def test_equal_coefficients_stand_in_alpha_and_every_factor_keeps_its_bits() -> None:
    ranks, alphas, size = (4, 4, 8), (0.4, 0.4, 0.8), {"n_out": 18, "n_in": 20, "dtype": torch.bfloat16}
    parts = [module(rank=r, alpha=a, seed=i, **size) for i, (r, a) in enumerate(zip(ranks, alphas, strict=True))]
    done = adaptertools.stack([adapter(one) for one in parts], [0.5, 0.5, 0.5])
    (after,) = done.adapter.modules
    assert done.exact
    assert torch.equal(after.lora_A, torch.cat([one.lora_A for one in parts]))
    assert torch.equal(after.lora_B, torch.cat([one.lora_B for one in parts], dim=1))
    assert after.scaling == 0.5 * 0.1


def test_coefficients_that_differ_by_powers_of_two_and_signs_are_exact_too() -> None:
    one, other = module(rank=4, alpha=0.4), module(rank=4, alpha=1.6, seed=1)
    done = adaptertools.stack([adapter(one), adapter(other)], [1.0, -0.0625])
    assert done.exact
    assert done.adapter.modules[0].scaling == 0.1
    assert torch.equal(done.adapter.modules[0].lora_B, torch.cat([one.lora_B, other.lora_B * -0.25], dim=1))


def test_what_one_source_has_alone_is_kept_as_it_is() -> None:
    rslora = module("a", scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK, alpha=3.0)
    direct = module("b", scale_rule=ScaleRule.DIRECT, alpha=0.1, seed=1)
    done = adaptertools.stack([adapter(rslora), adapter(direct)])
    assert done.exact
    for before, after in zip((rslora, direct), done.adapter.modules, strict=True):
        assert after.lora_A is before.lora_A
        assert after.lora_B is before.lora_B
        assert (after.alpha, after.scale_rule) == (before.alpha, before.scale_rule)


def test_a_weight_of_what_one_source_has_alone_goes_into_alpha_and_its_sign_into_lora_B() -> None:
    one = module("a", alpha=3.0, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK, lora_bias=tensor((8,), torch.float32, 5))
    done = adaptertools.stack([adapter(one), adapter(module("b"))], [-0.5, 1.0])
    after = done.adapter.modules[0]
    assert done.exact
    assert after.alpha == 1.5
    assert after.scale_rule is ScaleRule.ALPHA_OVER_SQRT_RANK
    assert torch.equal(after.lora_B, -one.lora_B)
    assert torch.equal(after.lora_bias, -one.lora_bias)
    inexact = adaptertools.stack([adapter(one), adapter(module("b"))], [0.7, 1.0])
    assert inexact.max_element_error <= 2.0**-51
    got = dense(inexact.adapter.modules[0])
    assert relative(got, 0.7 * dense(one)) <= inexact.max_element_error + 1e-15
    assert inexact.adapter.modules[0].lora_B is one.lora_B


def test_half_precision_is_promoted_where_bits_would_be_lost_and_the_whole_factor_with_it() -> None:
    one, other = module(rank=3, dtype=torch.float16), module(rank=4, seed=1, dtype=torch.float16)
    whole = adaptertools.stack([adapter(one), adapter(other)], [2.0, 0.5]).adapter.modules[0]
    assert {whole.lora_A.dtype, whole.lora_B.dtype} == {torch.float16}
    done = adaptertools.stack([adapter(one), adapter(other)], [0.7, 1.0])
    (after,) = done.adapter.modules
    assert (after.lora_A.dtype, after.lora_B.dtype) == (torch.float16, torch.float32)
    assert 0 < done.max_element_error <= 2.0**-24 + 2.0**-50
    cast = adaptertools.stack([adapter(one), adapter(other)], [0.7, 1.0], dtype="f16")
    assert {m.lora_B.dtype for m in cast.adapter.modules} == {torch.float16}
    assert 2.0**-13 < cast.max_element_error <= 2.0**-11 + 2.0**-50
    assert_is_weighted_sum(cast.adapter, [adapter(one), adapter(other)], [0.7, 1.0], cast.max_element_error)


def test_dtypes_that_differ_are_joined_in_the_wider() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float64)
    adapters = [adapter(module(rank=2, seed=i, dtype=dtype)) for i, dtype in enumerate(dtypes)]
    done = adaptertools.stack(adapters[:2])
    assert done.exact
    assert done.adapter.modules[0].lora_A.dtype == torch.float32
    assert adaptertools.stack(adapters).adapter.modules[0].lora_A.dtype == torch.float64


def test_all_factors_take_the_dtype_that_is_asked_for() -> None:
    adapters = [adapter(module("a"), module("b", lora_bias=torch.ones(8) / 3)), adapter(module("a", seed=1))]
    done = adaptertools.stack(adapters, dtype="bf16")
    assert {t.dtype for m in done.adapter.modules for t in m.tensors.values()} == {torch.bfloat16}
    assert_is_weighted_sum(done.adapter, adapters, [1.0, 1.0], done.max_element_error)
    assert done.max_element_error > 2.0**-10


@pytest.mark.parametrize("shared", ["lora_A", "lora_B"])
def test_sources_that_share_a_factor_add_up_without_rank(shared: str) -> None:
    first = module(rank=3)
    family = [
        replace(module(rank=3, seed=i, alpha=a), **{shared: first.tensors[shared].clone()})
        for i, a in ((1, 2.0), (2, 5.0))
    ]
    adapters = [adapter(first), *(adapter(one) for one in family), adapter(module(rank=2, seed=7))]
    weights = [0.7, -1.0, 0.3, 1.0]
    done = adaptertools.stack(adapters, weights)
    (after,) = done.adapter.modules
    assert after.rank == 5
    assert torch.equal(after.lora_A[:3] if shared == "lora_A" else after.lora_B[:, :3], first.tensors[shared])
    assert not done.exact
    assert_is_weighted_sum(done.adapter, adapters, weights, done.max_element_error)
    assert done.max_element_error < 2.0**-23


def test_a_factor_shared_in_half_precision_gives_a_sum_in_float32() -> None:
    first = module(rank=3, dtype=torch.bfloat16)
    other = replace(module(rank=3, seed=1, dtype=torch.bfloat16), lora_A=first.lora_A.clone())
    (after,) = adaptertools.stack([adapter(first), adapter(other)]).adapter.modules
    assert (after.lora_A.dtype, after.lora_B.dtype, after.rank) == (torch.bfloat16, torch.float32, 3)


@pytest.mark.parametrize("kind", ["linear", "conv", "folded", "moe.experts", "fused"])
def test_the_rank_stays_within_that_of_the_weight(kind: str) -> None:
    adapters = [adapter(*(m for m in kinds(seed=20 * i, ranks=4) if m.target.parameter == kind)) for i in range(3)]
    done = adaptertools.stack(adapters, [0.7, 1.0, -0.5])
    full = {"linear": 5, "conv": 6, "folded": 3, "moe.experts": 5, "fused": 5}[kind]
    assert {m.nominal_rank for m in done.adapter.modules} == {full}
    assert {m.scaling for m in done.adapter.modules} == {1.0}
    assert 0 < done.max_delta_error < 1e-6
    assert not done.exact
    wanted, found = weighted(adapters, [0.7, 1.0, -0.5]), weighted([done.adapter], [1.0])
    for name, delta in wanted.items():
        assert relative(found[name], delta) <= done.max_delta_error
    assert any(f"instead of {12}" in note for note in done.notes)


def test_a_rank_beyond_that_of_the_weight_is_left_alone_where_nothing_was_added() -> None:
    large = module("a", rank=12)
    done = adaptertools.stack([adapter(large), adapter(module("b"))])
    assert done.exact
    assert done.adapter.modules[0].lora_A is large.lora_A


def test_slots_of_a_fused_weight_have_one_rank_and_meet_whole_weights() -> None:
    def slot(k: int, rank: int, seed: int) -> Any:
        rows = RowSlice(start=6 * k, stop=6 * k + 6, total=18)
        return module(rank=rank, seed=seed, n_in=20, n_out=6, target=Target(parameter="qkv", rows=rows))

    one, other = adapter(slot(0, 1, 1), slot(2, 1, 2)), adapter(slot(0, 2, 3), slot(1, 2, 4))
    done = adaptertools.stack([one, other], [0.7, 1.0])
    assert_is_weighted_sum(done.adapter, [one, other], [0.7, 1.0], done.max_element_error)
    assert [(m.target.rows.start, m.rank) for m in done.adapter.modules if m.target.rows] == [(0, 3), (12, 3), (6, 3)]
    whole = adapter(module("qkv", rank=2, n_in=20, n_out=18))
    mixed = adaptertools.stack([one, whole], [0.7, 1.0])
    assert_is_weighted_sum(mixed.adapter, [one, whole], [0.7, 1.0], mixed.max_element_error)
    assert [(m.target.rows, m.rank) for m in mixed.adapter.modules] == [(None, 4)]


def test_slots_of_different_scalings_meet_a_whole_weight_in_float32() -> None:
    def slot(k: int, alpha: float) -> Any:
        rows = RowSlice(start=6 * k, stop=6 * k + 6, total=12)
        return module(rank=3, seed=k, n_in=20, n_out=6, alpha=alpha, target=Target(parameter="qkv", rows=rows))

    sources = [adapter(slot(0, 0.3), slot(1, 0.7)), adapter(module("qkv", rank=2, n_in=20, n_out=12))]
    done = adaptertools.stack(sources)
    assert {t.dtype for t in done.adapter.named_tensors.values()} == {torch.float32}
    assert 0 < done.max_element_error < 2.0**-22
    assert_is_weighted_sum(done.adapter, sources, [1.0, 1.0], done.max_element_error)


def test_convolutions_of_loralib_and_of_peft_add_up() -> None:
    folded = next(m for m in kinds(seed=1) if m.target.parameter == "folded")
    other = next(m for m in kinds(seed=30) if m.target.parameter == "conv")
    other = replace(
        other,
        target=folded.target,
        shape=folded.shape,
        lora_A=tensor((1, 12), torch.float32, 1),
        lora_B=tensor((4, 1), torch.float32, 2),
    )
    adapters = [adapter(folded), adapter(other)]
    done = adaptertools.stack(adapters, [0.7, 1.0])
    wanted, found = weighted(adapters, [0.7, 1.0]), weighted([done.adapter], [1.0])
    assert relative(found[":folded"], wanted[":folded"]) < 1e-6
    assert done.adapter.modules[0].rank == 4


def test_what_one_source_knows_of_a_weight_the_stack_knows() -> None:
    done = adaptertools.stack([adapter(module()), adapter(module(seed=1, transposed=True))])
    assert done.adapter.modules[0].transposed is True


def test_components_are_weights_of_their_own() -> None:
    texts = [replace(module(), target=Target(parameter="x.q_proj", component=name)) for name in ("unet", "text")]
    done = adaptertools.stack([adapter(texts[0]), adapter(texts[1])])
    assert [m.target.component for m in done.adapter.modules] == ["unet", "text"]
    assert done.exact


def test_a_weight_of_zero_takes_no_rank_and_leaves_nothing_behind() -> None:
    heads = {"head.weight": FullWeight(weight=torch.ones(2, 2))}
    other = adapter(module(seed=1), module("y"), full_weights=heads, bases={"": Base(id="another/model")})
    done = adaptertools.stack([adapter(module()), other], [0.7, 0.0])
    assert [(str(m.target), m.rank) for m in done.adapter.modules] == [("x.q_proj", 3)]
    assert not done.adapter.full_weights
    assert "source 2 (in memory) has weight 0 and contributes nothing" in done.notes
    assert done.rows[0].ranks == (3, 0)


def test_a_scaling_of_zero_takes_no_rank_either() -> None:
    done = adaptertools.stack([adapter(module(alpha=0.0)), adapter(module(seed=1))])
    assert done.adapter.modules[0].rank == 3
    assert torch.equal(dense(done.adapter.modules[0]), dense(module(seed=1)))


def test_one_adapter_alone_is_itself() -> None:
    one = adapter(*kinds())
    done = adaptertools.stack([one])
    assert done.exact
    assert [m.lora_A for m in done.adapter.modules] == [m.lora_A for m in one.modules]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.0], [-1.0, -1.0]])
def test_float8_is_calculated_in_float32(weights: list[float]) -> None:
    float8 = [
        replace(one, lora_A=one.lora_A.to(torch.float8_e4m3fn), lora_B=one.lora_B.to(torch.float8_e4m3fn))
        for one in (module(), module(seed=1), module("y"))
    ]
    adapters = [adapter(float8[0]), adapter(*float8[1:])]
    done = adaptertools.stack(adapters, weights)
    assert done.adapter.modules[0].lora_A.dtype == torch.float32
    assert_is_weighted_sum(done.adapter, adapters, weights, done.max_element_error)


def test_a_truncated_stack_is_rounded_once_to_the_dtype_that_is_asked_for() -> None:
    size = {"n_in": 40, "n_out": 30}
    adapters = [adapter(module(seed=s, **size), module(f"only{s}", rank=1, seed=s)) for s in (0, 1)]
    done = adaptertools.stack(adapters, [0.7, 0.3], rank=2, dtype="bf16")
    assert {t.dtype for m in done.adapter.modules for t in m.tensors.values()} == {torch.bfloat16}
    assert done.max_element_error < 2.0**-23
    assert done.truncation is not None
    assert done.truncation.rounding_error > 2.0**-11
    exact, lower = weighted(adapters, [0.7, 0.3]), weighted([done.adapter], [1.0])
    total = sum(float(delta.norm()) ** 2 for delta in exact.values()) ** 0.5
    off = sum(float((lower[name] - delta).norm()) ** 2 for name, delta in exact.items()) ** 0.5
    assert off <= (done.truncation.relative_error + done.truncation.rounding_error + 1e-6) * total
