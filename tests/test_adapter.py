"""The in-memory model: what it refuses, the delta weight of every kind and orientation, and giving features up."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import adapters
from torch.nn import functional

from adaptertools.adapter import (
    Adapter,
    Base,
    Feature,
    FullWeight,
    HistoryEntry,
    Kind,
    LoraModule,
    RowSlice,
    RowWeights,
    ScaleRule,
    Target,
    WeightRole,
    merge_notes,
    parse_feature,
)
from adaptertools.errors import (
    AdapterError,
    ConfigError,
    DuplicateTargetError,
    EmptyFactorError,
    OptionError,
    ShapeError,
    UnsupportedFeatureError,
)

OUT, IN, R = 5, 6, 2


def module(name: str = "model.layers.0.q_proj", **fields: Any) -> LoraModule:
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {
        "target": Target(parameter=name),
        "lora_A": torch.randn(R, IN, generator=generator),
        "lora_B": torch.randn(OUT, R, generator=generator),
        "alpha": 3.0,
    }
    return LoraModule(**{**given, **fields})


def product(module: LoraModule) -> torch.Tensor:
    """s·B·A, element by element in plain Python."""
    lora_A, lora_B = module.lora_A.tolist(), module.lora_B.tolist()
    rows = [
        [module.scaling * sum(b * lora_A[k][j] for k, b in enumerate(row)) for j in range(len(lora_A[0]))]
        for row in lora_B
    ]
    return torch.tensor(rows, dtype=torch.float64)


# Scaling


@pytest.mark.parametrize(
    ("alpha", "rank", "scaling"), [(16, 16, 1), (32, 16, 2), (16, 8, 2), (8, 16, 0.5), (128, 4, 32)]
)
def test_alpha_over_rank_is_the_scaling_that_the_guide_gives(alpha: float, rank: int, scaling: float) -> None:
    assert ScaleRule.ALPHA_OVER_RANK.scaling(alpha, rank) == scaling


def test_doubling_the_rank_with_alpha_left_alone_halves_the_strength() -> None:
    narrow, wide = (module(lora_A=torch.ones(r, IN), lora_B=torch.ones(OUT, r), alpha=16.0) for r in (8, 16))
    assert wide.scaling == narrow.scaling / 2


def test_rslora_divides_by_the_root() -> None:
    assert ScaleRule.ALPHA_OVER_SQRT_RANK.scaling(16, 16) == 4


def test_a_direct_scaling_is_kept_as_it_was_stated() -> None:
    assert ScaleRule.DIRECT.scaling(0.1, 3) == 0.1
    assert ScaleRule.ALPHA_OVER_RANK.scaling(0.1 * 3, 3) != 0.1


@settings(max_examples=300, deadline=None)
@given(
    rule=st.sampled_from(list(ScaleRule)),
    scaling=st.floats(-1e6, 1e6, allow_subnormal=False),
    rank=st.integers(1, 1024),
)
def test_the_alpha_of_a_scaling_gives_it_back_to_the_last_place(rule: ScaleRule, scaling: float, rank: int) -> None:
    again = rule.scaling(rule.alpha(scaling, rank), rank)
    assert abs(again - scaling) <= math.ulp(scaling)


@pytest.mark.parametrize("rule", [ScaleRule.ALPHA_OVER_RANK, ScaleRule.ALPHA_OVER_SQRT_RANK])
def test_alpha_is_the_whole_number_where_one_gives_the_scaling(rule: ScaleRule) -> None:
    for alpha in range(1, 65):
        for rank in range(1, 65):
            assert rule.alpha(rule.scaling(alpha, rank), rank) == alpha


def test_a_scaling_beyond_every_alpha_is_an_error_of_ours() -> None:
    with pytest.raises(ConfigError, match="alpha"):
        ScaleRule.ALPHA_OVER_RANK.alpha(1e308, 64)


# What a module refuses


@pytest.mark.parametrize("shape", [(0,), (7,), (0, IN), (R, 0), ()])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_empty_and_flat_factors_name_the_target_and_the_cause(factor: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(EmptyFactorError, match=rf"q_proj: {factor} .*ZeRO-3") as raised:
        module(**{factor: torch.zeros(shape)})
    assert str(tuple(shape)) in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_A": torch.ones(R + 1, IN)},
        {"lora_A": torch.ones(2, R, IN)},
        {"lora_A": torch.ones(2, R, IN), "lora_B": torch.ones(3, OUT, R)},
        {"lora_A": torch.ones(1, 2, R, IN), "lora_B": torch.ones(1, 2, OUT, R)},
        {"lora_A": torch.ones(R, IN, dtype=torch.int64)},
        {"shape": (OUT, IN + 1)},
        {"shape": (-OUT, -IN)},
        {"shape": ()},
        {"target": Target(parameter="x", rows=RowSlice(start=0, stop=OUT + 1, total=20))},
        {"magnitude": torch.ones(IN)},
        {"magnitude": torch.ones(OUT), "magnitude_axis": "in"},
        {"magnitude": torch.ones(1, OUT)},
        {"lora_bias": torch.ones(OUT + 1)},
        {"lora_A": torch.ones(3, R, IN), "lora_B": torch.ones(3, OUT, R), "magnitude": torch.ones(OUT)},
        {"lora_A": torch.ones(3, R, IN), "lora_B": torch.ones(3, OUT, R), "lora_bias": torch.ones(OUT)},
    ],
)
def test_shapes_that_disagree_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        module(**fields)


def test_the_message_about_a_rank_has_both() -> None:
    with pytest.raises(ShapeError, match=r"model\.layers\.0\.q_proj.*\(3, 6\).*\(5, 2\).*rank: 3 and 2"):
        module(lora_A=torch.ones(3, IN))


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, None, "16", True, 10**400])
def test_alpha_must_be_a_finite_number(alpha: Any) -> None:
    with pytest.raises(ConfigError, match=r"q_proj: alpha"):
        module(alpha=alpha)


@pytest.mark.parametrize("span", [(-1, 2, 5), (2, 2, 5), (3, 2, 5), (0, 6, 5)])
def test_rows_must_lie_in_the_weight(span: tuple[int, int, int]) -> None:
    with pytest.raises(ShapeError):
        RowSlice(start=span[0], stop=span[1], total=span[2])


def test_a_target_has_a_name() -> None:
    with pytest.raises(AdapterError, match="name"):
        Target(parameter="")


def test_a_target_shows_component_and_rows() -> None:
    target = Target(parameter="q", component="unet", rows=RowSlice(start=0, stop=2, total=6))
    assert str(target) == "unet:q[0:2]"


# The delta weight


def test_a_linear_layer_adds_the_scaled_product() -> None:
    assert torch.allclose(module().delta_weight(dtype=torch.float64), product(module()), rtol=1e-14)
    assert module().weight_shape == (OUT, IN)


def test_a_transposed_weight_gets_it_transposed() -> None:
    turned = module(transposed=True)
    assert torch.allclose(turned.delta_weight(dtype=torch.float64), product(turned).T, rtol=1e-14)
    assert turned.weight_shape == tuple(turned.delta_weight().shape) == (IN, OUT)


def test_an_embedding_adds_to_the_row_of_each_token() -> None:
    embedding = module(kind=Kind.EMBEDDING, transposed=True)
    tokens = torch.tensor([3, 0, 3])
    looked_up = functional.embedding(tokens, embedding.lora_A.T) @ embedding.lora_B.T * embedding.scaling
    assert torch.allclose(functional.embedding(tokens, embedding.delta_weight()), looked_up, rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_slice_of_a_fused_projection_is_zero_outside_its_rows(transposed: bool) -> None:
    fused = module(
        target=Target(parameter="qkv", rows=RowSlice(start=OUT, stop=2 * OUT, total=3 * OUT)), transposed=transposed
    )
    delta = fused.delta_weight(dtype=torch.float64)
    assert tuple(delta.shape) == fused.weight_shape
    delta = delta.T if transposed else delta
    assert torch.allclose(delta[OUT : 2 * OUT], product(fused), rtol=1e-14)
    assert not delta[:OUT].any()
    assert not delta[2 * OUT :].any()


def test_a_fused_slice_of_every_expert() -> None:
    rows = RowSlice(start=0, stop=OUT, total=2 * OUT)
    stack = module(
        target=Target(parameter="gate_up", rows=rows),
        kind=Kind.PARAMETER,
        lora_A=torch.randn(3, R, IN),
        lora_B=torch.randn(3, OUT, R),
        transposed=True,
    )
    delta = stack.delta_weight()
    assert tuple(delta.shape) == stack.weight_shape == (3, IN, 2 * OUT)
    assert not delta[:, :, OUT:].any()
    assert delta[:, :, :OUT].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_of_a_stack_gets_its_own_product(transposed: bool) -> None:
    stack = module(
        kind=Kind.PARAMETER, lora_A=torch.randn(3, R, IN), lora_B=torch.randn(3, OUT, R), transposed=transposed
    )
    delta = stack.delta_weight(dtype=torch.float64)
    assert (stack.experts, stack.rank) == (3, R)
    assert tuple(delta.shape) == stack.weight_shape
    for expert in range(3):
        alone = module(lora_A=stack.lora_A[expert], lora_B=stack.lora_B[expert], transposed=transposed)
        assert torch.allclose(delta[expert], alone.delta_weight(dtype=torch.float64), rtol=1e-12)


def test_a_peft_convolution_acts_as_its_two_convolutions() -> None:
    n_in, n_out, kernel = 3, 4, (2, 3)
    conv = module(
        kind=Kind.CONV, shape=(n_out, n_in, *kernel), lora_A=torch.randn(R, n_in * 6), lora_B=torch.randn(n_out, R)
    )
    x = torch.randn(1, n_in, 6, 7)
    down = functional.conv2d(x, conv.lora_A.reshape(R, n_in, *kernel))
    expected = functional.conv2d(down, conv.lora_B.reshape(n_out, R, 1, 1)) * conv.scaling
    assert torch.allclose(functional.conv2d(x, conv.delta_weight()), expected, atol=1e-5)
    assert (conv.kernel_fold, conv.nominal_rank) == (1, R)


def test_a_loralib_convolution_divides_alpha_by_r_and_not_by_its_inner_dimension() -> None:
    n_in, n_out, k = 2, 4, 3
    conv = module(
        kind=Kind.CONV,
        shape=(n_out, n_in, k, k),
        lora_A=torch.randn(k * R, k * n_in),
        lora_B=torch.randn(k * n_out, k * R),
    )
    assert (conv.kernel_fold, conv.rank, conv.nominal_rank, conv.scaling) == (k, k * R, R, 3.0 / R)
    assert torch.equal(conv.delta_weight(), (conv.lora_B @ conv.lora_A * 1.5).view(n_out, n_in, k, k))


def test_one_and_three_dimensional_convolutions_have_the_shape_of_their_weight() -> None:
    for kernel in ((3,), (2, 2, 2)):
        size = math.prod(kernel)
        conv = module(kind=Kind.CONV, shape=(OUT, 2, *kernel), lora_A=torch.randn(R, 2 * size))
        assert tuple(conv.delta_weight().shape) == conv.weight_shape == (OUT, 2, *kernel)
        assert torch.allclose(conv.delta_weight(dtype=torch.float64).reshape(OUT, -1), product(conv))


def test_an_einsum_kernel_that_starts_with_its_inputs_is_transposed_before_it_takes_its_shape() -> None:
    heads = module(shape=(IN, OUT, 1), transposed=True)
    assert torch.allclose(heads.delta_weight(dtype=torch.float64).squeeze(-1), product(heads).T, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_multiplied_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    half = module(lora_A=torch.randn(R, IN).to(dtype), lora_B=torch.randn(OUT, R).to(dtype))
    exact = half.lora_B.double() @ half.lora_A.double() * half.scaling
    assert half.delta_weight().dtype == torch.float32
    assert torch.allclose(half.delta_weight().double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(half.delta_weight(dtype=dtype), half.delta_weight().to(dtype))


def test_products_beyond_float16_are_scaled_before_they_are_rounded() -> None:
    huge = module(lora_A=torch.full((1, 1), 400.0).half(), lora_B=torch.full((1, 1), 200.0).half(), alpha=0.5)
    assert huge.delta_weight(dtype=torch.float16).item() == 40_000


# DoRA


def test_dora_gives_each_output_row_its_magnitude() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    dora = module(lora_A=torch.zeros(1, 2), lora_B=torch.zeros(2, 1), magnitude=torch.tensor([10.0, 1.0]))
    changed = weight + dora.delta_weight(base_weight=weight)
    assert torch.allclose(changed, torch.tensor([[6.0, 8.0], [0.0, 1.0]]))


def dora_weight(weight: torch.Tensor, module: LoraModule, dim: int) -> torch.Tensor:
    """W' of an (out, in) weight, written out."""
    direction = weight + product(module)
    assert module.magnitude is not None
    norm = direction.pow(2).sum(dim=dim, keepdim=True).sqrt()
    return module.magnitude.double().reshape(norm.shape) * direction / norm


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("axis", "dim", "size"), [("out", 1, OUT), ("in", 0, IN)])
def test_dora_is_right_in_both_orientations_and_along_both_axes(
    axis: Any, dim: int, size: int, transposed: bool
) -> None:
    dora = module(magnitude=torch.rand(size) + 0.5, magnitude_axis=axis, transposed=transposed)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    given = weight.T if transposed else weight
    delta = dora.delta_weight(dtype=torch.float64, base_weight=given)
    expected = dora_weight(weight, dora, dim)
    assert torch.allclose(given + delta, expected.T if transposed else expected, rtol=1e-12)


def test_dora_of_an_embedding_normalises_over_the_vocabulary() -> None:
    dora = module(kind=Kind.EMBEDDING, transposed=True, magnitude=torch.rand(OUT) + 0.5)
    weight = torch.randn(IN, OUT, dtype=torch.float64)
    changed = weight + dora.delta_weight(dtype=torch.float64, base_weight=weight)
    assert dora.magnitude is not None
    assert torch.allclose(changed.norm(dim=0), dora.magnitude.double(), rtol=1e-12)


def test_dora_of_a_convolution_normalises_each_output_channel() -> None:
    dora = module(kind=Kind.CONV, shape=(OUT, 3, 1, 2), magnitude=torch.rand(OUT) + 0.5)
    weight = torch.randn(OUT, 3, 1, 2, dtype=torch.float64)
    changed = weight + dora.delta_weight(dtype=torch.float64, base_weight=weight)
    assert dora.magnitude is not None
    assert torch.allclose(changed.flatten(1).norm(dim=1), dora.magnitude.double(), rtol=1e-12)


def test_dora_of_a_slice_touches_its_rows_alone() -> None:
    rows = RowSlice(start=OUT, stop=2 * OUT, total=3 * OUT)
    dora = module(target=Target(parameter="qkv", rows=rows), magnitude=torch.rand(OUT) + 0.5)
    weight = torch.randn(3 * OUT, IN, dtype=torch.float64)
    changed = weight + dora.delta_weight(dtype=torch.float64, base_weight=weight)
    assert torch.allclose(changed[OUT : 2 * OUT], dora_weight(weight[OUT : 2 * OUT], dora, 1), rtol=1e-12)
    assert torch.equal(changed[:OUT], weight[:OUT])
    assert torch.equal(changed[2 * OUT :], weight[2 * OUT :])


def test_dora_needs_the_base_weight_and_the_right_one() -> None:
    dora = module(magnitude=torch.ones(OUT))
    with pytest.raises(UnsupportedFeatureError, match="base_weight"):
        dora.delta_weight()
    with pytest.raises(ShapeError, match=r"\(6, 5\), expected \(5, 6\)"):
        dora.delta_weight(base_weight=torch.ones(IN, OUT))


def test_without_dora_the_base_weight_does_not_matter() -> None:
    assert torch.equal(module().delta_weight(base_weight=torch.ones(OUT, IN)), module().delta_weight())


# What an adapter refuses


def test_an_adapter_of_nothing_is_refused() -> None:
    with pytest.raises(AdapterError, match="empty"):
        Adapter()


def slot(start: int, stop: int, total: int = 3 * OUT) -> LoraModule:
    return module(
        target=Target(parameter="qkv", rows=RowSlice(start=start, stop=stop, total=total)),
        lora_B=torch.ones(stop - start, R),
    )


def test_two_modules_of_one_weight_are_refused() -> None:
    with pytest.raises(DuplicateTargetError, match="q_proj"):
        Adapter(modules=(module(), module()))
    with pytest.raises(DuplicateTargetError, match="qkv"):
        Adapter(modules=(slot(0, OUT), slot(OUT - 1, 2 * OUT)))
    with pytest.raises(DuplicateTargetError, match="qkv"):
        Adapter(modules=(slot(0, OUT), module("qkv")))


def test_slices_of_one_weight_agree_about_its_size() -> None:
    with pytest.raises(ShapeError, match="qkv"):
        Adapter(modules=(slot(0, OUT), slot(OUT, 2 * OUT, total=2 * OUT)))


def test_slices_side_by_side_and_one_name_in_two_components_are_fine() -> None:
    Adapter(modules=(slot(0, OUT), slot(OUT, 2 * OUT)))
    Adapter(modules=tuple(replace(module(), target=Target(parameter="q", component=c)) for c in ("unet", "text")))


@pytest.mark.parametrize("indices", [(1, 1), (-1, 2), (1, 2, 3)])
def test_token_rows_have_an_index_each(indices: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError):
        RowWeights(indices=indices, rows=torch.ones(2, 4))


# Features


ALL = frozenset(Feature)


def everything() -> Adapter:
    return Adapter(
        modules=(
            module("a", magnitude=torch.ones(OUT)),
            module("b", lora_bias=torch.ones(OUT)),
            module("c", kind=Kind.CONV, shape=(OUT, IN, 1, 1)),
            module("d", kind=Kind.EMBEDDING, transposed=True),
            module("e", kind=Kind.PARAMETER),
            slot(0, OUT),
            module("plain"),
        ),
        full_weights={
            "head.weight": FullWeight(weight=torch.ones(1)),
            "a.bias": FullWeight(weight=torch.ones(1), role=WeightRole.BIAS),
            "embed.weight": FullWeight(weight=torch.ones(1), role=WeightRole.BASE),
        },
        row_weights={"tokens.weight": RowWeights(indices=(0,), rows=torch.ones(1, 2))},
        bases={"": Base(id="org/model", change="olora", layer_replication=((0, 2), (1, 2)))},
        invocation_tokens=(1, 2),
    )


def test_the_features_of_an_adapter_are_those_of_its_parts() -> None:
    assert everything().features == ALL
    assert Adapter(modules=(module(),)).features == frozenset()


@pytest.mark.parametrize("feature", list(Feature))
def test_giving_a_feature_up_removes_it_and_no_other(feature: Feature) -> None:
    adapter = everything()
    without = adapter.without(feature)
    assert without.features == ALL - {feature}
    assert without.holders(feature) == []
    assert adapter.features == ALL
    dropped = {str(m.target) for m in adapter.modules} - {str(m.target) for m in without.modules}
    whole = {Feature.CONV: "c", Feature.EMBEDDING: "d", Feature.PARAMETER: "e", Feature.FUSED_ROWS: f"qkv[0:{OUT}]"}
    assert dropped == ({whole[feature]} if feature in whole else set())


HOLDERS = {
    Feature.DORA: ["a"],
    Feature.LORA_BIAS: ["b"],
    Feature.CONV: ["c"],
    Feature.EMBEDDING: ["d"],
    Feature.PARAMETER: ["e"],
    Feature.FUSED_ROWS: [f"qkv[0:{OUT}]"],
    Feature.FULL_WEIGHTS: ["head.weight", "embed.weight"],
    Feature.BIAS: ["a.bias"],
    Feature.TOKEN_ROWS: ["tokens.weight"],
    Feature.CHANGED_BASE: ["olora initialisation"],
    Feature.LAYER_REPLICATION: [
        "org/model built of layers [[0, 2], [1, 2]]; on the published layers, factors meet others than they were "
        "trained on, or none"
    ],
    Feature.ALORA: ["invocation tokens"],
}


@pytest.mark.parametrize("feature", list(Feature))
def test_the_holders_of_a_feature_are_named(feature: Feature) -> None:
    assert everything().holders(feature) == HOLDERS[feature]


def test_giving_up_all_there_is_leaves_an_error() -> None:
    with pytest.raises(AdapterError, match="empty"):
        Adapter(modules=(slot(0, OUT),)).without(Feature.FUSED_ROWS)


@settings(max_examples=40, deadline=None)
@given(adapter=adapters(list(Feature)))
def test_every_feature_that_an_adapter_has_is_held_by_someone(adapter: Adapter) -> None:
    for feature in Feature:
        assert bool(adapter.holders(feature)) == (feature in adapter.features)


@settings(max_examples=40, deadline=None)
@given(adapter=adapters(list(Feature)))
def test_every_tensor_has_a_name_of_its_own(adapter: Adapter) -> None:
    count = sum(len(m.tensors) for m in adapter.modules) + len(adapter.full_weights) + len(adapter.row_weights)
    assert len(adapter.named_tensors) == count


@settings(max_examples=40, deadline=None)
@given(adapter=adapters(list(Feature)))
def test_a_delta_weight_has_the_shape_of_the_base_weight(adapter: Adapter) -> None:
    for m in adapter.modules:
        base = torch.ones(m.weight_shape) if m.magnitude is not None else None
        assert tuple(m.delta_weight(base_weight=base).shape) == m.weight_shape


# The rest


def test_history_survives_json_and_never_loses_its_operation() -> None:
    entry = HistoryEntry(operation="rescale", source="x", details={"alpha": 32, "operation": "hidden"})
    again = HistoryEntry.from_json(entry.to_json())
    assert (again.operation, again.source, again.details) == ("rescale", "x", {"alpha": 32})
    assert "source" not in HistoryEntry(operation="write").to_json()
    assert HistoryEntry.from_json({}).operation == "unknown"


def test_then_adds_to_the_history_of_a_copy() -> None:
    adapter = Adapter(modules=(module(),))
    assert [entry.operation for entry in adapter.then(HistoryEntry(operation="x")).history] == ["x"]
    assert adapter.history == ()


def test_notes_are_merged_in_order_and_once() -> None:
    assert merge_notes(["b", "a"], (), ["a", "c"]) == ("b", "a", "c")


def test_a_feature_is_known_by_its_name() -> None:
    assert parse_feature("lora-bias") is Feature.LORA_BIAS
    with pytest.raises(OptionError, match=r"'dorra': expected one of .*dora"):
        parse_feature("dorra")
