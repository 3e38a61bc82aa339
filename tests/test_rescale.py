"""Another alpha: what stays, what changes, and what is said of the error."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import adapters

import adaptertools
from adaptertools.adapter import (
    Adapter,
    Base,
    Feature,
    FullWeight,
    Kind,
    LoraModule,
    RowSlice,
    ScaleRule,
    Target,
)
from adaptertools.errors import NonFiniteError, OptionError, UnsupportedFeatureError


def module(rank: int = 4, alpha: float = 16.0, name: str = "x.q_proj", size: int = 5, **fields: Any) -> LoraModule:
    generator = torch.Generator().manual_seed(rank)
    factors: dict[str, Any] = {
        "lora_A": torch.randn(rank, size + 1, generator=generator),
        "lora_B": torch.randn(size, rank, generator=generator),
    }
    return LoraModule(target=Target(parameter=name), alpha=alpha, **{**factors, **fields})


def exact_delta(module: LoraModule) -> torch.Tensor:
    return module.lora_B.double() @ module.lora_A.double() * module.scaling


def last(adapter: Adapter) -> dict[str, Any]:
    assert adapter.history[-1].operation == "rescale"
    return dict(adapter.history[-1].details)


EVERYTHING = [Feature.DORA, Feature.LORA_BIAS, Feature.CONV, Feature.EMBEDDING, Feature.PARAMETER, Feature.FUSED_ROWS]


@settings(max_examples=60, deadline=None)
@given(adapter=adapters(EVERYTHING), alpha=st.sampled_from((1.0, 2.0, 32.0, 64.0, 5.0, 0.3, 1e-3)))
def test_keeping_the_delta_keeps_it_within_the_error_that_is_said(adapter: Adapter, alpha: float) -> None:
    rescaled = adaptertools.rescale(adapter, alpha)
    said = last(rescaled)
    for before, after in zip(adapter.modules, rescaled.modules, strict=True):
        assert after.alpha == alpha
        assert after.rank == before.rank
        assert torch.equal(after.lora_A, before.lora_A)
        product = before.lora_B.double().abs() @ before.lora_A.double().abs() * abs(before.scaling)
        error = (exact_delta(after) - exact_delta(before)).abs()
        assert (error <= (said["max_relative_error"] + 1e-15) * product + 1e-300).all()
        if before.lora_bias is not None:
            assert after.lora_bias is not None
            wanted = before.lora_bias.double() * before.scaling
            assert torch.allclose(
                after.lora_bias.double() * after.scaling, wanted, rtol=said["max_relative_error"] + 1e-15, atol=0
            )
        assert after.magnitude is before.magnitude
    assert said["exact"] == (said["max_relative_error"] == 0)


@settings(max_examples=40, deadline=None)
@given(adapter=adapters(EVERYTHING), exponent=st.integers(-3, 3))
def test_there_and_back_by_a_power_of_two_changes_no_bit(adapter: Adapter, exponent: int) -> None:
    alphas = {m.alpha for m in adapter.modules}
    rules = {m.scale_rule for m in adapter.modules}
    if len(alphas) > 1 or ScaleRule.DIRECT in rules:
        return
    (alpha,) = alphas
    there = adaptertools.rescale(adapter, alpha * 2.0**exponent)
    back = adaptertools.rescale(there, alpha)
    for before, after in zip(adapter.modules, back.modules, strict=True):
        assert after.alpha == before.alpha
        assert torch.equal(after.lora_B.double(), before.lora_B.double())
    assert last(back)["exact"]


def test_a_power_of_two_is_exact() -> None:
    rescaled = adaptertools.rescale(Adapter(modules=(module(),)), 32)
    assert last(rescaled) == {"alpha": 32, "keep": "delta", "exact": True, "max_relative_error": 0.0}
    assert rescaled.modules[0].scaling == 8.0
    assert torch.equal(exact_delta(rescaled.modules[0]), exact_delta(module()))


def test_another_factor_is_not_exact_and_its_error_is_that_of_one_rounding() -> None:
    said = last(adaptertools.rescale(Adapter(modules=(module(),)), 24))
    assert said["exact"] is False
    assert 0 < said["max_relative_error"] <= 2.0**-24


def test_every_module_gets_the_new_alpha_whatever_it_had() -> None:
    modules = (
        module(4, 16.0, "a"),
        module(2, 3.0, "b"),
        module(8, 16.0, "c", scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK),
    )
    adapter = Adapter(modules=modules)
    rescaled = adaptertools.rescale(adapter, 8)
    assert [(m.alpha, m.rank, m.scale_rule) for m in rescaled.modules] == [
        (8.0, 4, ScaleRule.ALPHA_OVER_RANK),
        (8.0, 2, ScaleRule.ALPHA_OVER_RANK),
        (8.0, 8, ScaleRule.ALPHA_OVER_SQRT_RANK),
    ]
    for before, after in zip(modules, rescaled.modules, strict=True):
        assert torch.allclose(exact_delta(after), exact_delta(before), rtol=1e-6, atol=1e-6)


def test_a_scaling_that_is_stated_directly_becomes_alpha_over_r() -> None:
    rescaled = adaptertools.rescale(Adapter(modules=(module(4, 2.0, scale_rule=ScaleRule.DIRECT),)), 16)
    (after,) = rescaled.modules
    assert (after.alpha, after.scale_rule) == (16.0, ScaleRule.ALPHA_OVER_RANK)
    assert last(rescaled)["exact"]
    assert torch.equal(after.lora_B, module(4).lora_B * 0.5)


def test_half_precision_is_promoted_only_where_bits_would_be_lost() -> None:
    normal = module(lora_A=torch.ones(4, 6).half(), lora_B=torch.ones(5, 4).half())
    subnormal = replace(normal, lora_B=torch.full((5, 4), 3 * 2.0**-24).half())
    for before, dtype in ((normal, torch.float16), (subnormal, torch.float32)):
        rescaled = adaptertools.rescale(Adapter(modules=(before,)), 32)
        assert rescaled.modules[0].lora_B.dtype == dtype
        assert last(rescaled)["exact"]
        assert torch.equal(exact_delta(rescaled.modules[0]), exact_delta(before))
    inexact = adaptertools.rescale(Adapter(modules=(normal,)), 24)
    assert inexact.modules[0].lora_B.dtype == torch.float32
    assert inexact.modules[0].lora_A.dtype == torch.float16
    assert 0 < last(inexact)["max_relative_error"] <= 2.0**-24


def test_the_same_alpha_hands_back_the_same_tensors() -> None:
    before = module()
    rescaled = adaptertools.rescale(Adapter(modules=(before,)), 16)
    assert rescaled.modules[0].lora_B is before.lora_B
    assert last(rescaled)["exact"]


def test_a_scaling_of_zero_is_not_kept_at_the_price_of_the_factors() -> None:
    for rule in ScaleRule:
        adapter = Adapter(modules=(module(), module(name="x.v_proj", alpha=0.0, scale_rule=rule)))
        with pytest.raises(
            UnsupportedFeatureError, match=r"^x\.v_proj: .*did not record.*--source-alpha.*keep=weights"
        ):
            adaptertools.rescale(adapter, 16)
        after = adaptertools.rescale(adapter, 16, keep="weights").modules[1]
        assert (after.alpha, after.scaling) == (16.0, 16.0 / (2 if rule is ScaleRule.ALPHA_OVER_SQRT_RANK else 4))
        assert torch.equal(after.lora_B, module().lora_B)


def test_an_alpha_so_large_that_the_factors_would_vanish_is_refused() -> None:
    with pytest.raises(OptionError, match="too large"):
        adaptertools.rescale(Adapter(modules=(module(alpha=1e-300),)), 1e300)


def test_dora_keeps_the_weight_that_it_makes() -> None:
    weight = torch.randn(8, 9, dtype=torch.float64)
    before = module(size=8, magnitude=torch.rand(8) + 1)
    for keep, alpha in (("delta", 32), ("ratio", 32), ("delta", 24)):
        (after,) = adaptertools.rescale(Adapter(modules=(before,)), alpha, keep=keep).modules
        one, other = (m.delta_weight(dtype=torch.float64, base_weight=weight) for m in (before, after))
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
        assert after.magnitude is before.magnitude


def test_an_expert_stack_is_rescaled_and_padded_as_a_whole() -> None:
    stack = module(lora_A=torch.randn(3, 4, 9), lora_B=torch.randn(3, 8, 4), kind=Kind.PARAMETER)
    for keep, rank in (("delta", 4), ("ratio", 8)):
        (after,) = adaptertools.rescale(Adapter(modules=(stack,)), 32, keep=keep).modules
        assert (after.rank, after.experts) == (rank, 3)
        assert torch.allclose(exact_delta(after), exact_delta(stack), rtol=1e-12, atol=1e-12)


def test_keeping_the_ratio_pads_with_zeros() -> None:
    before = module(size=8)
    rescaled = adaptertools.rescale(Adapter(modules=(before,)), 32, keep="ratio")
    (after,) = rescaled.modules
    assert (after.rank, after.alpha, after.scaling) == (8, 32.0, 4.0)
    assert torch.equal(after.lora_A[:4], before.lora_A)
    assert not after.lora_A[4:].any()
    assert not after.lora_B[:, 4:].any()
    assert torch.allclose(exact_delta(after), exact_delta(before), rtol=1e-12, atol=1e-12)
    assert last(rescaled) == {"alpha": 32, "keep": "ratio", "exact": True, "max_relative_error": 0.0}


def test_for_rslora_the_rank_follows_the_square() -> None:
    rslora = module(size=16, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK)
    (after,) = adaptertools.rescale(Adapter(modules=(rslora,)), 32, keep="ratio").modules
    assert (after.rank, after.scaling) == (16, rslora.scaling)


def test_mixed_ranks_keep_their_proportions() -> None:
    adapter = Adapter(modules=(module(4, 16.0, "a", size=12), module(2, 16.0, "b", size=12)))
    rescaled = adaptertools.rescale(adapter, 48, keep="ratio")
    assert [m.rank for m in rescaled.modules] == [12, 6]
    assert [m.scaling for m in rescaled.modules] == [m.scaling for m in adapter.modules]


def test_a_stated_alpha_that_was_rounded_still_gives_a_whole_rank() -> None:
    rounded = module(4, 11.3137084989848 / 2, size=8, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK)
    rescaled = adaptertools.rescale(Adapter(modules=(rounded,)), 8, keep="ratio")
    assert rescaled.modules[0].rank == 8
    assert 0 < last(rescaled)["max_relative_error"] < 1e-9
    assert last(rescaled)["exact"] is False


def test_a_loralib_convolution_grows_by_its_kernel_for_every_rank() -> None:
    conv = module(lora_A=torch.randn(6, 9), lora_B=torch.randn(12, 6), kind=Kind.CONV, shape=(4, 3, 3, 3), alpha=4.0)
    assert (conv.nominal_rank, conv.scaling) == (2, 2.0)
    (after,) = adaptertools.rescale(Adapter(modules=(conv,)), 8, keep="ratio").modules
    assert (after.nominal_rank, after.rank, after.scaling) == (4, 12, 2.0)
    assert torch.allclose(after.delta_weight(), conv.delta_weight(), rtol=1e-6, atol=1e-6)
    (after,) = adaptertools.rescale(Adapter(modules=(conv,)), 8).modules
    assert (after.alpha, after.nominal_rank, after.scaling) == (8.0, 2, 4.0)
    assert torch.equal(after.delta_weight(), conv.delta_weight())


def test_slots_of_a_fused_projection_are_rescaled_one_by_one() -> None:
    slots = tuple(
        LoraModule(
            target=Target(parameter="qkv", rows=RowSlice(start=start, stop=start + 5, total=15)),
            lora_A=torch.randn(2, 6),
            lora_B=torch.randn(5, 2),
            alpha=4.0,
        )
        for start in (0, 10)
    )
    for keep in ("delta", "ratio"):
        rescaled = adaptertools.rescale(Adapter(modules=slots), 8, keep=keep)
        for before, after in zip(slots, rescaled.modules, strict=True):
            assert torch.allclose(after.delta_weight(), before.delta_weight(), rtol=1e-6, atol=1e-6)
            assert after.target == before.target


def test_a_rank_that_is_no_whole_number_is_an_error() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"x\.q_proj.*rank 4\.5.*whole number"):
        adaptertools.rescale(Adapter(modules=(module(),)), 18, keep="ratio")


def test_a_rank_that_would_shrink_is_an_error() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"from 4 to 2, which loses part of the weights: use truncate"):
        adaptertools.rescale(Adapter(modules=(module(),)), 8, keep="ratio")


def test_a_rank_beyond_the_weight_is_an_error_and_costs_no_memory() -> None:
    for alpha, rank in ((28, 7), (1e12, 250000000000)):
        with pytest.raises(UnsupportedFeatureError, match=rf"x\.q_proj.*needs rank {rank}, beyond the full rank .*5\."):
            adaptertools.rescale(Adapter(modules=(module(),)), alpha, keep="ratio")
    (after,) = adaptertools.rescale(Adapter(modules=(module(),)), 24, keep="ratio").modules
    assert after.rank == 6


def test_a_ratio_of_nothing_is_an_error() -> None:
    with pytest.raises(UnsupportedFeatureError, match="alpha is 0"):
        adaptertools.rescale(Adapter(modules=(module(alpha=0.0),)), 8, keep="ratio")


def test_keeping_the_weights_changes_the_number_and_says_the_strength() -> None:
    before = module()
    rescaled = adaptertools.rescale(Adapter(modules=(before,)), 40, keep="weights")
    (after,) = rescaled.modules
    assert after.lora_B is before.lora_B
    assert after.scaling == 10.0
    assert last(rescaled) == {"alpha": 40, "keep": "weights", "strength": 2.5}


def test_the_strength_of_rslora_and_of_mixed_alphas_is_the_true_one() -> None:
    rslora = module(scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK)
    assert last(adaptertools.rescale(Adapter(modules=(rslora,)), 32, keep="weights"))["strength"] == 2.0
    mixed = Adapter(modules=(module(4, 16.0, "a"), module(4, 8.0, "b")))
    strength = last(adaptertools.rescale(mixed, 32, keep="weights"))["strength"]
    assert strength == {"smallest": 2.0, "largest": 4.0}
    nothing = last(adaptertools.rescale(Adapter(modules=(module(alpha=0.0),)), 32, keep="weights"))
    assert nothing["strength"] is None


def test_dora_refuses_to_become_stronger() -> None:
    dora = module(magnitude=torch.ones(5))
    with pytest.raises(UnsupportedFeatureError, match=r"DoRA \(x\.q_proj\)"):
        adaptertools.rescale(Adapter(modules=(dora,)), 32, keep="weights")


@pytest.mark.parametrize("keep", ["ratio", "weights"])
def test_on_a_changed_base_only_the_delta_can_be_kept(keep: Any) -> None:
    adapter = Adapter(modules=(module(),), bases={"": Base(id="org/model", change="pissa")})
    with pytest.raises(UnsupportedFeatureError, match="pissa"):
        adaptertools.rescale(adapter, 32, keep=keep)
    assert adaptertools.rescale(adapter, 32).bases == adapter.bases


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf, True, "32", None])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha: Any) -> None:
    with pytest.raises(OptionError, match="alpha"):
        adaptertools.rescale(Adapter(modules=(module(),)), alpha)


def test_an_unknown_keep_is_refused() -> None:
    with pytest.raises(OptionError, match="everything"):
        adaptertools.rescale(Adapter(modules=(module(),)), 32, keep="everything")  # type: ignore[arg-type]


def test_an_alpha_beyond_what_float64_can_balance_is_refused() -> None:
    with pytest.raises(OptionError, match="too small"):
        adaptertools.rescale(Adapter(modules=(module(alpha=1e300),)), 1e-300)


def test_values_that_would_overflow_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="lora_B"):
        adaptertools.rescale(Adapter(modules=(module(alpha=1e30),)), 1e-30)


def test_nan_is_carried_only_when_allowed() -> None:
    broken = Adapter(modules=(module(lora_B=torch.full((5, 4), math.nan)),))
    with pytest.raises(NonFiniteError):
        adaptertools.rescale(broken, 32)
    from adaptertools.operations.rescale import rescale

    assert rescale(broken, 32, allow_nonfinite=True).modules[0].lora_B.isnan().all()


def test_whole_weights_alone_have_no_alpha() -> None:
    with pytest.raises(UnsupportedFeatureError, match="no alpha"):
        adaptertools.rescale(Adapter(full_weights={"head.weight": FullWeight(weight=torch.ones(1))}), 32)


def test_all_else_stays() -> None:
    adapter = Adapter(
        modules=(module(),),
        full_weights={"head.weight": FullWeight(weight=torch.ones(1))},
        metadata={"peft": {"task_type": "X"}},
        notes=("odd",),
    )
    rescaled = adaptertools.rescale(adapter, 32)
    assert rescaled.full_weights == adapter.full_weights
    assert rescaled.metadata == adapter.metadata
    assert rescaled.notes == adapter.notes
    assert adapter.modules[0].alpha == 16.0
    assert adapter.history == ()


def test_both_projections_of_an_attention_become_stronger_alike() -> None:
    """PEFT adds out_proj of an `nn.MultiheadAttention` twice; that is no matter of alpha."""
    attention = adaptertools.read(Path(__file__).parents[1] / "fixtures" / "peft" / "attention")
    alphas = {module.alpha for module in attention.modules}
    assert len(alphas) == 1
    stronger = adaptertools.rescale(attention, 2 * alphas.pop(), keep="weights")
    assert stronger.history[-1].details["strength"] == 2.0
