"""Modules laid out alike: every change of layout keeps the delta weight, against dense float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import tensor

from adaptertools.adapter import Adapter, Kind, LoraModule, RowSlice, ScaleRule, Target
from adaptertools.errors import ShapeError, UnsupportedFeatureError
from adaptertools.operations.align import by_parameter, in_common_layout, unfolded, whole

IN = 5


def slot(start: int, stop: int, total: int = 9, *, rank: int = 2, alpha: float = 4.0, **fields: Any) -> LoraModule:
    seed = 100 * start + stop
    factors = {
        "lora_A": tensor((rank, IN), torch.float64, seed),
        "lora_B": tensor((stop - start, rank), torch.float64, seed + 1),
    }
    target = Target(
        parameter="h.0.qkv", rows=None if (start, stop) == (0, total) else RowSlice(start=start, stop=stop, total=total)
    )
    return LoraModule(target=target, alpha=alpha, **{**factors, **fields})


def folded_conv(out: int, n_in: int, kernel: int, rank: int, seed: int = 0, **fields: Any) -> LoraModule:
    """A convolution with factors as loralib lays them out."""
    return LoraModule(
        target=Target(parameter="conv"),
        kind=Kind.CONV,
        shape=(out, n_in, kernel, kernel),
        lora_A=tensor((kernel * rank, kernel * n_in), torch.float64, seed),
        lora_B=tensor((kernel * out, kernel * rank), torch.float64, seed + 1),
        alpha=4.0,
        **fields,
    )


def delta(*modules: LoraModule) -> torch.Tensor:
    """The sum of what the modules add to their weight, slices placed in the whole."""
    return torch.stack([module.delta_weight(dtype=torch.float64) for module in modules]).sum(dim=0)


def assert_near(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.shape == other.shape
    assert torch.allclose(one, other, rtol=1e-13, atol=1e-13)


THIRDS = ((0, 3), (3, 6), (6, 9))
HALVES = ((0, 4), (4, 9))


@st.composite
def groups_of_slots(draw: st.DrawFn) -> tuple[LoraModule, ...]:
    """Some slots of a fused weight of nine rows, or all of it as one; ranks and scalings of their own."""
    places = draw(st.sampled_from((THIRDS, HALVES, ((0, 9),), ((1, 8),))))
    chosen = draw(st.lists(st.sampled_from(places), unique=True, max_size=3))
    return tuple(
        slot(
            *place,
            rank=draw(st.integers(1, 3)),
            alpha=draw(st.sampled_from((4.0, 8.0, 0.3, -1.0, 0.0))),
            scale_rule=draw(st.sampled_from(list(ScaleRule))),
        )
        for place in chosen
    )


@settings(max_examples=150, deadline=None)
@given(groups=st.lists(groups_of_slots(), min_size=1, max_size=3))
def test_slots_in_a_common_layout_keep_their_delta_weights_and_never_overlap_in_part(
    groups: list[tuple[LoraModule, ...]],
) -> None:
    aligned = in_common_layout(groups)
    assert len(aligned) == len(groups)
    for before, after in zip(groups, aligned, strict=True):
        assert bool(before) == bool(after)
        if before:
            assert_near(delta(*after), delta(*before))
    slices = {module.target.rows for group in aligned for module in group}
    assert len(slices) <= 1 if None in slices else True
    taken = [row for rows in slices if rows for row in range(rows.start, rows.stop)]
    assert len(taken) == len(set(taken))


def test_slots_that_agree_are_left_alone_even_where_some_are_missing() -> None:
    q, k, v = (slot(*place) for place in THIRDS)
    aligned = in_common_layout([(v, q), (k,), ()])
    assert aligned == [(q, v), (k,), ()]
    assert aligned[0][1] is v


def test_slots_become_whole_where_another_adapter_holds_the_whole() -> None:
    everything = slot(0, 9)
    (before,), (after,) = in_common_layout([(everything,), tuple(slot(*place) for place in THIRDS[1:])])
    assert before is everything
    assert (after.target, after.rank) == (everything.target, 4)


def test_scalings_that_differ_are_folded_without_losing_a_bit_where_that_can_be() -> None:
    q, v = (slot(*place, lora_B=tensor((3, 2), torch.bfloat16, 1)) for place in THIRDS[:2])
    half = slot(6, 9, alpha=2.0, lora_B=tensor((3, 2), torch.bfloat16, 2))
    third = slot(6, 9, alpha=4.0 / 3, lora_B=tensor((3, 2), torch.bfloat16, 2))
    assert (whole((q, v, half)).lora_B.dtype, whole((q, v, half)).scaling) == (torch.bfloat16, 2.0)
    assert whole((q, v, third)).lora_B.dtype == torch.float64
    for group in ((q, v), (q, v, half), (q, v, third)):
        assert_near(delta(whole(group)), delta(*group))
    assert torch.equal(delta(whole((q, v, half))), delta(q, v, half))


def test_slots_of_one_shared_lora_A_keep_their_rank() -> None:
    shared = tensor((2, IN), torch.float64, 3)
    q, k, v = (slot(*place, lora_A=shared, alpha=alpha) for place, alpha in zip(THIRDS, (4.0, 8.0, 4.0), strict=True))
    apart = slot(3, 6)
    assert whole((q, k, v)).rank == 2
    assert whole((q, apart, v)).rank == 4
    for group in ((q, k, v), (q, apart, v), (apart, q), (v,)):
        assert_near(delta(whole(group)), delta(*group))


def test_one_slot_alone_gets_rows_of_zeros() -> None:
    only = slot(3, 6)
    widened = whole((only,))
    assert (widened.target.rows, widened.rank, widened.out_features) == (None, 2, 9)
    assert torch.equal(delta(widened), delta(only))


def test_a_module_of_the_whole_weight_is_handed_back() -> None:
    module = slot(0, 9)
    assert whole((module,)) is module
    assert unfolded(module) is module


def test_the_biases_of_slots_are_placed_and_scaled_like_their_delta_weights() -> None:
    q = slot(0, 3, alpha=4.0, lora_bias=tensor((3,), torch.float64, 1))
    v = slot(6, 9, alpha=0.3, lora_bias=tensor((3,), torch.float64, 2))
    joined = whole((q, slot(3, 6), v))
    assert joined.lora_bias is not None
    expected = torch.zeros(9, dtype=torch.float64)
    expected[:3], expected[6:] = q.lora_bias * 2.0, v.lora_bias * 0.15
    assert_near(joined.lora_bias * joined.scaling, expected)


def test_stacks_of_experts_become_whole_too() -> None:
    group = tuple(
        slot(*place, kind=Kind.PARAMETER, lora_A=torch.randn(4, 2, IN).double(), lora_B=torch.randn(4, 3, 2).double())
        for place in THIRDS[:2]
    )
    assert_near(delta(whole(group)), delta(*group))


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 4),
    n_in=st.integers(1, 4),
    kernel=st.integers(1, 3),
    rank=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_an_unfolded_convolution_is_the_same_weight(out: int, n_in: int, kernel: int, rank: int, seed: int) -> None:
    conv = folded_conv(out, n_in, kernel, rank, seed)
    plain = unfolded(conv)
    assert plain.kernel_fold == 1
    assert (plain.out_features, plain.in_features) == (out, n_in * kernel**2)
    assert plain.scaling == conv.scaling
    assert_near(delta(plain), delta(conv))


def test_convolutions_are_unfolded_only_where_another_is_laid_out_otherwise() -> None:
    folded, other = folded_conv(4, 3, 2, 2), folded_conv(4, 3, 2, 1, seed=5)
    plain = unfolded(other)
    assert in_common_layout([(folded,), (other,)]) == [(folded,), (other,)]
    (one,), (two,) = in_common_layout([(folded,), (plain,)])
    assert two is plain
    assert (one.out_features, one.in_features) == (two.out_features, two.in_features)
    assert_near(delta(one), delta(folded))


def test_kernels_of_other_shapes_with_factors_alike_are_not_taken_for_one_another() -> None:
    with pytest.raises(ShapeError, match=r"conv: .*\(3, 16\) in adapter 1 and \(6, 4\) in adapter 2"):
        in_common_layout([(folded_conv(3, 4, 2, 1),), (unfolded(folded_conv(6, 1, 2, 1)),)])


def test_shapes_that_disagree_are_refused_with_both() -> None:
    other = slot(0, 9, lora_A=torch.ones(2, 7))
    with pytest.raises(ShapeError, match=r"h\.0\.qkv: .*\(9, 5\) in adapter 1 and \(9, 7\) in adapter 3"):
        in_common_layout([(slot(0, 9),), (), (other,)])
    with pytest.raises(ShapeError, match=r"\(9, 5\) in adapter 1 and \(12, 5\) in adapter 2"):
        in_common_layout([(slot(0, 3),), (slot(6, 9, total=12),)])
    stack = slot(0, 9, kind=Kind.PARAMETER, lora_A=torch.ones(2, 2, IN), lora_B=torch.ones(2, 9, 2))
    with pytest.raises(ShapeError, match=r"\(9, 5\) in A and \(2, 9, 5\) in B"):
        in_common_layout([(slot(0, 9),), (stack,)], names=("A", "B"))


def test_what_a_whole_weight_cannot_hold_is_refused_by_name() -> None:
    dora = slot(0, 3, magnitude=torch.ones(3))
    with pytest.raises(UnsupportedFeatureError, match=r"h\.0\.qkv\[0:3\]: .*magnitude"):
        whole((dora, slot(3, 6)))
    for field in ("magnitude", "lora_bias"):
        with pytest.raises(UnsupportedFeatureError, match=f"conv: .*{field}"):
            unfolded(folded_conv(2, 3, 2, 1, **{field: torch.ones(4)}))


def test_parameters_are_told_apart_by_component_and_slots_stand_in_order() -> None:
    q, k, v = (slot(*place) for place in THIRDS)
    text, image = (
        LoraModule(
            target=Target(parameter="q", component=component),
            lora_A=torch.ones(1, 2),
            lora_B=torch.ones(2, 1),
            alpha=1.0,
        )
        for component in ("text_encoder", "unet")
    )
    assert by_parameter(Adapter(modules=(v, text, q, image, k))) == {
        ("", "h.0.qkv"): (q, k, v),
        ("text_encoder", "q"): (text,),
        ("unet", "q"): (image,),
    }
