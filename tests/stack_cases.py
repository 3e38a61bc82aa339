"""Families of adapters for one model, and what their weighted sums must be, computed densely in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from strategies import tensor
from torch import Tensor

from adaptertools.adapter import Adapter, Base, Kind, LoraModule, RowSlice, ScaleRule, Target

ALPHAS = (1.0, 16.0, 3.0, 0.1, 5.0)
WEIGHTS = (1.0, 0.7, -1.0, 0.3, 2.0, 0.5, -0.25)


def module(
    name: str = "x.q_proj",
    rank: int = 3,
    *,
    seed: int = 0,
    n_in: int = 10,
    n_out: int = 8,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> LoraModule:
    """A linear module with seeded factors."""
    given: dict[str, Any] = {
        "target": Target(parameter=name),
        "lora_A": tensor((rank, n_in), dtype, 100 + seed),
        "lora_B": tensor((n_out, rank), dtype, 200 + seed),
        "alpha": 2.0 * rank,
    }
    return LoraModule(**{**given, **fields})


def adapter(*modules: LoraModule, **fields: Any) -> Adapter:
    return Adapter(modules=modules, **{"bases": {"": Base(id="org/model")}, **fields})


def dense(one: LoraModule) -> Tensor:
    """ΔW of the whole weight as (out, in), in float64: convolutions in their weight's own order."""
    delta = one.lora_B.double() @ one.lora_A.double() * one.scaling
    return _whole(one, delta)


def magnitude(one: LoraModule) -> Tensor:
    """Σ |s|·|B|·|A|, the size of what is added up in each element."""
    return _whole(one, one.lora_B.double().abs() @ one.lora_A.double().abs() * abs(one.scaling))


def _whole(one: LoraModule, delta: Tensor) -> Tensor:
    if one.target.rows:
        whole = delta.new_zeros(one.target.rows.total, one.in_features)
        whole[one.target.rows.start : one.target.rows.stop] = delta
        delta = whole
    if one.kind is Kind.CONV and one.shape is not None:
        delta = delta.reshape(one.shape[0], -1)
    return delta


def weighted(adapters: Sequence[Adapter], weights: Sequence[float], of: Any = dense) -> dict[str, Tensor]:
    """Σ w·ΔW of every parameter; with `of=magnitude` the size of its terms."""
    found: dict[str, Tensor] = {}
    for one, weight in zip(adapters, weights, strict=True):
        for each in one.modules:
            factor = abs(weight) if of is magnitude else weight
            name = f"{each.target.component}:{each.target.parameter}"
            found[name] = found.get(name, 0.0) + of(each) * factor
    return found


def biases(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """Σ w·s·b of every lora_bias."""
    found: dict[str, Tensor] = {}
    for one, weight in zip(adapters, weights, strict=True):
        for each in one.modules:
            if each.lora_bias is not None:
                term = each.lora_bias.double() * (each.scaling * weight)
                found[str(each.target)] = found.get(str(each.target), 0.0) + term
    return found


def assert_is_weighted_sum(got: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], error: float) -> None:
    """Every element is within the error that was said, relative to the size of its terms."""
    wanted, found = weighted(adapters, weights), weighted([got], [1.0])
    sizes = weighted(adapters, weights, magnitude)
    assert found.keys() <= wanted.keys()
    for name, delta in wanted.items():
        off = (found[name] - delta).abs() if name in found else delta.abs()
        assert (off <= (error + 1e-14) * sizes[name] + 1e-300).all(), f"{name}: off by {float(off.max())}"


def kinds(dtype: torch.dtype = torch.float32, seed: int = 0, ranks: Mapping[str, int] | int = 2) -> list[LoraModule]:
    """A module of every kind there is."""

    def rank(name: str) -> int:
        return ranks if isinstance(ranks, int) else ranks[name]

    def factors(name: str, n_in: int, n_out: int, *experts: int, fold: int = 1) -> dict[str, Any]:
        r = rank(name) * fold
        return {
            "target": Target(parameter=name),
            "lora_A": tensor((*experts, r, n_in), dtype, seed + 1),
            "lora_B": tensor((*experts, n_out, r), dtype, seed + 2),
            "alpha": 4.0,
        }

    slots = [
        LoraModule(
            **{
                **factors("fused", 6, 5),
                "target": Target(parameter="fused", rows=RowSlice(start=start, stop=start + 5, total=15)),
                "lora_A": tensor((rank("fused"), 6), dtype, seed + start),
            },
            transposed=True,
        )
        for start in (0, 10)
    ]
    return [
        LoraModule(**factors("linear", 7, 5)),
        LoraModule(**factors("bias", 7, 5), lora_bias=tensor((5,), dtype, seed + 3)),
        LoraModule(**factors("embedding", 9, 6), kind=Kind.EMBEDDING, transposed=True),
        LoraModule(**factors("conv", 12, 6), kind=Kind.CONV, shape=(6, 3, 2, 2)),
        LoraModule(**factors("folded", 6, 8, fold=2), kind=Kind.CONV, shape=(4, 3, 2, 2)),
        LoraModule(**factors("moe.experts", 5, 6, 3), kind=Kind.PARAMETER, transposed=False),
        *slots,
    ]


NAMES = ("linear", "bias", "embedding", "conv", "folded", "moe.experts", "fused")


@st.composite
def sources(draw: st.DrawFn, least: int = 1, most: int = 3) -> list[Adapter]:
    """Adapters for one model, each with some of its modules, in ranks, alphas, rules and dtypes of its own."""
    made = []
    for number in range(draw(st.integers(least, most))):
        chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
        dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
        rule = draw(st.sampled_from(ScaleRule))
        modules = kinds(dtype, seed=50 * number, ranks={name: draw(st.integers(1, 4)) for name in NAMES})
        alphas = {name: draw(st.sampled_from(ALPHAS)) for name in NAMES}
        made.append(
            adapter(
                *(
                    replace(one, alpha=alphas[one.target.parameter], scale_rule=rule)
                    for one in modules
                    if one.target.parameter in chosen
                )
            )
        )
    return made
