"""Hypothesis strategies for adapters: small, awkward, and always valid."""

from collections.abc import Collection

import torch
from hypothesis import strategies as st

from adaptertools.adapter import (
    Adapter,
    Base,
    Feature,
    FullWeight,
    Kind,
    LoraModule,
    RowSlice,
    RowWeights,
    ScaleRule,
    Target,
    WeightRole,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def linear_modules(draw: st.DrawFn, parameter: str, dtype: torch.dtype, features: Collection[Feature]) -> LoraModule:
    """A module on a linear weight, with DoRA or a bias where asked for."""
    rank, n_in, n_out = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 1 << 16))
    rule = draw(st.sampled_from((ScaleRule.ALPHA_OVER_RANK, ScaleRule.ALPHA_OVER_SQRT_RANK, ScaleRule.DIRECT)))
    alpha = draw(st.sampled_from((1.0, 2.0, 8.0, 16.0, 0.5, 5.0, 0.1, 3.7)))
    return LoraModule(
        target=Target(parameter=parameter),
        lora_A=tensor((rank, n_in), dtype, seed),
        lora_B=tensor((n_out, rank), dtype, seed + 1),
        alpha=alpha,
        scale_rule=rule,
        magnitude=tensor((n_out,), dtype, seed + 2).abs() if Feature.DORA in features else None,
        lora_bias=tensor((n_out,), dtype, seed + 3) if Feature.LORA_BIAS in features else None,
    )


@st.composite
def slot_modules(draw: st.DrawFn, parameter: str, dtype: torch.dtype) -> tuple[LoraModule, ...]:
    """First and last of three equal slots of a fused projection, as loralib's MergedLinear adapts them."""
    rank, n_in, slot, seed = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 4)), 7
    return tuple(
        LoraModule(
            target=Target(parameter=parameter, rows=RowSlice(start=k * slot, stop=(k + 1) * slot, total=3 * slot)),
            lora_A=tensor((rank, n_in), dtype, seed + k),
            lora_B=tensor((slot, rank), dtype, seed + 10 + k),
            alpha=16.0,
            transposed=True,
        )
        for k in (0, 2)
    )


@st.composite
def adapters(draw: st.DrawFn, carries: Collection[Feature] = ()) -> Adapter:
    """An adapter with any subset of the features in `carries`."""
    features = draw(st.sets(st.sampled_from(sorted(carries)))) if carries else set()
    dtype = draw(st.sampled_from(DTYPES))
    layers = draw(st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True))
    modules: list[LoraModule] = []
    for layer in layers:
        for leaf in draw(st.lists(st.sampled_from(_LEAVES), min_size=1, max_size=3, unique=True)):
            home = "mlp" if leaf in _LEAVES[4:] else "self_attn"
            modules.append(draw(linear_modules(f"model.layers.{layer}.{home}.{leaf}", dtype, features)))
    if Feature.EMBEDDING in features:
        modules.append(
            LoraModule(
                target=Target(parameter="model.embed_tokens"),
                kind=Kind.EMBEDDING,
                transposed=True,
                lora_A=tensor((2, 9), dtype, 1),
                lora_B=tensor((5, 2), dtype, 2),
                magnitude=tensor((5,), dtype, 3).abs() if Feature.DORA in features else None,
                alpha=4.0,
            )
        )
    if Feature.CONV in features and not features & {Feature.LORA_BIAS, Feature.DORA}:
        modules.append(
            LoraModule(
                target=Target(parameter="model.conv"),
                kind=Kind.CONV,
                shape=(4, 3, 2, 2),
                lora_A=tensor((2, 12), dtype, 4),
                lora_B=tensor((4, 2), dtype, 5),
                alpha=4.0,
            )
        )
    if Feature.PARAMETER in features and Feature.DORA not in features and Feature.LORA_BIAS not in features:
        modules.append(
            LoraModule(
                target=Target(parameter="model.mlp.experts.gate_up_proj"),
                kind=Kind.PARAMETER,
                transposed=False,
                lora_A=tensor((3, 2, 4), dtype, 6),
                lora_B=tensor((3, 6, 2), dtype, 7),
                alpha=4.0,
            )
        )
    if Feature.FUSED_ROWS in features and not features & {Feature.LORA_BIAS, Feature.DORA}:
        modules.extend(draw(slot_modules("transformer.h.0.attn.c_attn", dtype)))
    full: dict[str, FullWeight] = {}
    if Feature.FULL_WEIGHTS in features:
        full["classifier.dense.weight"] = FullWeight(weight=tensor((3, 3), dtype, 8))
        full["classifier.out_proj.bias"] = FullWeight(weight=tensor((3,), dtype, 9))
    if Feature.BIAS in features:
        name = f"{modules[0].target.parameter}.bias"
        full[name] = FullWeight(weight=tensor((modules[0].out_features,), dtype, 11), role=WeightRole.BIAS)
    rows = {}
    if Feature.TOKEN_ROWS in features and Feature.EMBEDDING not in features:
        rows["model.embed_tokens.weight"] = RowWeights(indices=(3, 1), rows=tensor((2, 5), dtype, 10))
    change = "pissa" if Feature.CHANGED_BASE in features else None
    layers = ((0, 2), (1, 2)) if Feature.LAYER_REPLICATION in features else ()
    return Adapter(
        modules=tuple(modules),
        full_weights=full,
        row_weights=rows,
        bases={"": Base(id=draw(st.sampled_from((None, "org/model"))), change=change, layer_replication=layers)},
        invocation_tokens=(1, 2) if Feature.ALORA in features else None,
    )
