"""Truncation, every figure against the singular value decomposition of the dense delta weight."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import adapters, tensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adaptertools
from adaptertools.adapter import Adapter, Base, Feature, FullWeight, Kind, LoraModule, RowSlice, ScaleRule, Target
from adaptertools.errors import NonFiniteError, OptionError, UnsupportedFeatureError
from adaptertools.operations import spectra
from adaptertools.operations import truncate as truncate_module
from adaptertools.operations.truncate import Truncation, truncate, truncation_table

ROOT = ScaleRule.ALPHA_OVER_SQRT_RANK
EVERYTHING = [feature for feature in Feature if feature is not Feature.CHANGED_BASE]


def module(name: str = "q", rank: int = 6, n_out: int = 14, n_in: int = 10, seed: int = 0, **fields: Any) -> LoraModule:
    """A module whose directions differ in size."""
    decay = torch.tensor([0.7**i for i in range(rank)]).unsqueeze(-1)
    given: dict[str, Any] = {
        "lora_A": tensor((rank, n_in), torch.float32, seed) * decay,
        "lora_B": tensor((n_out, rank), torch.float32, seed + 1),
        "alpha": 12.0,
    }
    return LoraModule(**{"target": Target(parameter=name), **given, **fields})


def slots() -> tuple[LoraModule, ...]:
    """Two slots of a fused projection, as loralib's MergedLinear has them."""
    return tuple(
        module(seed=20 + k, n_out=5, target=Target(parameter="c_attn", rows=RowSlice(start=k, stop=k + 5, total=15)))
        for k in (0, 10)
    )


MODULES: dict[str, tuple[LoraModule, ...]] = {
    "linear": (module(),),
    "wide": (module(n_out=5, n_in=30),),
    "embedding": (module(kind=Kind.EMBEDDING, transposed=True),),
    "conv": (module(n_in=12, n_out=5, kind=Kind.CONV, shape=(5, 3, 2, 2)),),
    "loralib conv": (module(rank=8, n_in=6, n_out=10, kind=Kind.CONV, shape=(5, 3, 2, 2)),),
    "experts": (
        module(
            kind=Kind.PARAMETER,
            lora_A=tensor((3, 6, 10), torch.float32, 5),
            lora_B=tensor((3, 7, 6), torch.float32, 6) * torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1),
        ),
    ),
    "slots": slots(),
    "rslora": (module(scale_rule=ROOT, alpha=7.0),),
    "direct": (module(scale_rule=ScaleRule.DIRECT, alpha=0.3),),
    "negative": (module(alpha=-5.0),),
    "dora": (module(magnitude=torch.ones(14)),),
    "beyond full rank": (module(rank=12, n_in=4),),
    "float64": (module(lora_A=tensor((6, 10), torch.float64, 1), lora_B=tensor((14, 6), torch.float64, 2)),),
    "mixed dtypes": (module(lora_A=tensor((6, 10), torch.bfloat16, 1)),),
}


def products(module: LoraModule) -> Tensor:
    """s·B·A, formed; of a stack one for each expert."""
    formed = module.lora_B.double() @ module.lora_A.double() * module.scaling
    return formed.reshape(-1, *formed.shape[-2:])


def singular_values(module: LoraModule) -> Tensor:
    return torch.linalg.svdvals(products(module))


def optimum(module: LoraModule, rank: int) -> float:
    """The least error of any factors of this rank."""
    return float(singular_values(module)[:, rank:].norm())


def distance(one: Adapter, other: Adapter) -> float:
    return math.hypot(*(float((products(a) - products(b)).norm()) for a, b in pairs(one, other)))


def total(adapter: Adapter) -> float:
    return math.hypot(*(float(products(m).norm()) for m in adapter.modules))


def pairs(one: Adapter, other: Adapter) -> Iterator[tuple[LoraModule, LoraModule]]:
    return zip(one.modules, other.modules, strict=True)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", MODULES)
def test_nothing_of_that_rank_is_nearer_and_the_figures_are_those_of_the_dense_svd(name: str, rank: int) -> None:
    before = Adapter(modules=MODULES[name])
    done = truncate(before, rank=rank)
    lost, whole = 0.0, 0.0
    for old, new, row in zip(before.modules, done.adapter.modules, done.rows, strict=True):
        assert new.nominal_rank == min(rank, min(old.in_features, old.out_features))
        assert new.scaling == pytest.approx(old.scaling, rel=2e-16)
        norm, least = float(products(old).norm()), optimum(old, new.rank)
        allowed = max(
            1e-6, 1.01 * row.rounding_error if torch.bfloat16 in (old.lora_A.dtype, old.lora_B.dtype) else 0.0
        )
        assert float((products(new) - products(old)).norm()) == pytest.approx(least, abs=allowed * norm)
        assert row.relative_error == pytest.approx(least / norm, rel=1e-9, abs=1e-12)
        assert row.energy == pytest.approx(1 - (least / norm) ** 2, rel=1e-12)
        assert (row.rank_before, row.rank_after) == (old.nominal_rank, new.nominal_rank)
        assert row.nbytes == new.lora_A.nbytes + new.lora_B.nbytes
        assert (new.lora_A.dtype, new.lora_B.dtype) == (old.lora_A.dtype, old.lora_B.dtype)
        assert new.magnitude is old.magnitude
        lost, whole = math.hypot(lost, least), math.hypot(whole, norm)
    assert done.relative_error == pytest.approx(lost / whole, rel=1e-9, abs=1e-12)
    assert done.energy == pytest.approx(1 - (lost / whole) ** 2, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "wide", "float64"])
def test_the_new_factors_span_the_first_singular_directions(name: str) -> None:
    old = MODULES[name][0]
    U, S, Vh = torch.linalg.svd(products(old)[0])
    for rank in (1, 2, 3):
        assert S[rank - 1] > 1.02 * S[rank]
        new = truncate(Adapter(modules=(old,)), rank=rank).adapter.modules[0]
        for basis, factor in ((U[:, :rank], new.lora_B), (Vh[:rank].T, new.lora_A.T)):
            ours = torch.linalg.qr(factor.double()).Q
            assert torch.allclose(basis @ basis.T, ours @ ours.T, atol=1e-5)


def test_singular_values_are_split_evenly_over_both_factors() -> None:
    old = MODULES["linear"][0]
    new = truncate(Adapter(modules=(old,)), rank=3).adapter.modules[0]
    S = singular_values(old)[0, :3] / abs(old.scaling)
    for gram in (new.lora_A @ new.lora_A.T, new.lora_B.T @ new.lora_B):
        assert torch.allclose(gram.double(), torch.diag(S), atol=1e-5)


def gauged(old: LoraModule, gauge: Tensor) -> LoraModule:
    """The same product from other factors, in float64."""
    return replace(
        old, lora_A=torch.linalg.solve(gauge, old.lora_A.double()), lora_B=old.lora_B.double() @ gauge.double()
    )


def ill_conditioned_gauge() -> Tensor:
    Q = torch.linalg.qr(tensor((6, 6), torch.float64, 3)).Q
    P = torch.linalg.qr(tensor((6, 6), torch.float64, 4)).Q
    return Q @ torch.diag(torch.logspace(-4, 4, 6, dtype=torch.float64)) @ P


ILL_CONDITIONED: dict[str, Callable[[], LoraModule]] = {
    "a gauge of condition 1e8": lambda: gauged(module(), ill_conditioned_gauge()),
    "columns scaled by 1e30 and 1e-30": lambda: gauged(
        module(), torch.diag(torch.tensor([1e30, 1e-30, 1.0, 1e15, 1e-15, 2.0], dtype=torch.float64))
    ),
    "rank-deficient factors": lambda: module(
        lora_A=tensor((3, 10), torch.float64, 1).repeat(2, 1), lora_B=tensor((14, 3), torch.float64, 2).repeat(1, 2)
    ),
    "factors that cancel": lambda: module(
        lora_A=torch.cat([t := tensor((3, 10), torch.float64, 1), -t + 1e-7 * tensor((3, 10), torch.float64, 7)]),
        lora_B=tensor((14, 3), torch.float64, 2).repeat(1, 2),
    ),
    "a spectrum that falls by 1e12": lambda: module(
        lora_A=torch.diag(torch.logspace(0, -12, 6, dtype=torch.float64)) @ tensor((6, 10), torch.float64, 1),
        lora_B=tensor((14, 6), torch.float64, 2),
    ),
    "equal singular values": lambda: module(
        lora_A=torch.eye(6, 10, dtype=torch.float64), lora_B=torch.eye(14, 6, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ILL_CONDITIONED)
def test_ill_conditioned_factors_reach_the_optimum_as_well(name: str, rank: int) -> None:
    old = ILL_CONDITIONED[name]()
    done = truncate(Adapter(modules=(old,)), rank=rank)
    new = done.adapter.modules[0]
    norm, least = float(products(old).norm()), optimum(old, rank)
    assert float((products(new) - products(old)).norm()) == pytest.approx(least, abs=1e-6 * norm)
    assert done.relative_error == pytest.approx(least / norm, abs=1e-6)
    assert torch.isfinite(new.lora_A).all()
    assert torch.isfinite(new.lora_B).all()


def test_directions_that_change_nothing_are_not_stored() -> None:
    done = truncate(Adapter(modules=(ILL_CONDITIONED["rank-deficient factors"](),)), rank=5)
    assert done.adapter.modules[0].rank == 3
    assert done.energy == 1.0
    assert done.relative_error == 0.0


@pytest.mark.parametrize("rule", [{"rank": 4}, {"energy": 0.9}, {"energy": 1.0}, {"error": 0.1}, {"size": "60%"}])
def test_an_untrained_module_becomes_rank_one_without_an_error(rule: dict[str, Any]) -> None:
    untrained = module("k", rank=64, n_out=100, n_in=100, lora_B=torch.zeros(100, 64))
    done = truncate(Adapter(modules=(untrained,)), **rule)
    (row,) = done.rows
    assert (row.rank_after, row.energy, row.relative_error, row.rounding_error) == (1, 1.0, 0.0, 0.0)
    assert (done.energy, done.relative_error, done.rounding_error) == (1.0, 0.0, 0.0)
    assert not products(done.adapter.modules[0]).any()


def test_an_untrained_module_of_small_rank_is_left_alone() -> None:
    untrained = module(rank=4, lora_B=torch.zeros(14, 4))
    done = truncate(Adapter(modules=(untrained,)), rank=4)
    assert done.adapter.modules[0] is untrained


def test_a_scaling_of_zero_is_a_delta_weight_of_zero() -> None:
    done = truncate(Adapter(modules=(module(alpha=0.0), module("v"))), rank=2)
    assert [row.rank_after for row in done.rows] == [1, 2]
    assert done.rows[0].energy == 1.0
    assert done.adapter.modules[0].scaling == 0.0


@settings(max_examples=40, deadline=None)
@given(adapter=adapters(EVERYTHING))
def test_full_rank_changes_nothing(adapter: Adapter) -> None:
    if not adapter.modules:
        return
    most = max(m.nominal_rank for m in adapter.modules)
    for rule in ({"rank": most}, {"size": "100%"}, {"size": 10**9}):
        done = truncate(adapter, **rule)
        assert all(new is old for new, old in pairs(done.adapter, adapter))
        assert (done.energy, done.relative_error, done.rounding_error) == (1.0, 0.0, 0.0)
        assert done.adapter.full_weights == adapter.full_weights
        assert done.adapter.row_weights == adapter.row_weights


@settings(max_examples=40, deadline=None)
@given(adapter=adapters(EVERYTHING), rank=st.integers(1, 4))
def test_the_error_falls_with_the_rank_is_that_of_the_dense_weights_and_the_input_stays(
    adapter: Adapter, rank: int
) -> None:
    kept = {name: t.clone() for name, t in adapter.named_tensors.items()}
    lower, higher = truncate(adapter, rank=rank), truncate(adapter, rank=rank + 1)
    assert higher.relative_error <= lower.relative_error
    assert higher.energy >= lower.energy
    for done in (lower, higher):
        norm = total(adapter)
        allowed = (done.rounding_error + 1e-12) * norm
        assert distance(done.adapter, adapter) == pytest.approx(done.relative_error * norm, abs=allowed)
    for old, new in pairs(adapter, lower.adapter):
        assert new.nominal_rank <= max(rank, 1)
        assert new is old or old.nominal_rank > rank
        assert new.scaling == pytest.approx(old.scaling, rel=3e-16)
        assert new.lora_bias is old.lora_bias
        assert new.magnitude is old.magnitude
    assert all(torch.equal(t, kept[name]) for name, t in adapter.named_tensors.items())


MIXED = Adapter(
    modules=(
        module("q", seed=1),
        module("k", seed=2, n_out=4, scale_rule=ROOT, alpha=2.0),
        module("v", seed=3, alpha=-30.0),
        *slots(),
        module("e", kind=Kind.PARAMETER, lora_A=tensor((2, 5, 6), torch.float32, 8), lora_B=torch.ones(2, 3, 5)),
    ),
    full_weights={"head.weight": FullWeight(weight=torch.ones(3, 3))},
    bases={"": Base(id="tiny/llama")},
)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.999999])
def test_energy_is_the_smallest_rank_of_each_module_that_keeps_it(share: float) -> None:
    done = truncate(MIXED, energy=share)
    for old, row in zip(MIXED.modules, done.rows, strict=True):
        if old.target.rows:
            continue
        energies = singular_values(old).square().sum(dim=0)
        kept = energies.cumsum(0) / energies.sum()
        assert row.rank_after == int((kept < share).sum()) + 1
        assert row.energy >= share
    joint = sum(singular_values(slot).square().sum(dim=0) for slot in slots())
    ranks = {row.rank_after for row in done.rows if row.target.startswith("c_attn")}
    assert ranks == {int((joint.cumsum(0) / joint.sum() < share).sum()) + 1}, "all slots have one rank"


@pytest.mark.parametrize("error", [0.02, 0.1, 0.3, 0.5])
def test_an_error_holds_over_all_modules_together(error: float) -> None:
    done = truncate(MIXED, error=error)
    assert done.relative_error <= error
    found = distance(done.adapter, MIXED) / total(MIXED)
    assert found == pytest.approx(done.relative_error, rel=1e-6)
    assert len({row.rank_after for row in done.rows}) > 1
    for index, row in enumerate(done.rows):
        if row.rank_after > 1 and not MIXED.modules[index].target.rows:
            more = optimum(MIXED.modules[index], row.rank_after - 1) / total(MIXED)
            less = optimum(MIXED.modules[index], row.rank_after) / total(MIXED)
            assert math.sqrt(done.relative_error**2 - less**2 + more**2) > error, "one direction fewer would be too few"


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_ranks_of_their_own_beat_one_rank_for_all_at_the_same_bytes(rank: int) -> None:
    uniform = truncate(MIXED, rank=rank)
    spent = sum(row.nbytes for row in uniform.rows)
    filled = truncate(MIXED, size=spent, measure=lambda a, _: sum(m.lora_A.nbytes + m.lora_B.nbytes for m in a.modules))
    assert sum(row.nbytes for row in filled.rows) <= spent
    assert filled.relative_error <= uniform.relative_error
    assert rank == 1 or filled.relative_error < 0.9 * uniform.relative_error


def test_a_cap_wins_over_the_error_and_is_said() -> None:
    free, capped = truncate(MIXED, error=0.05), truncate(MIXED, error=0.05, max_rank=2)
    assert max(row.rank_after for row in free.rows) > 2
    assert max(row.rank_after for row in capped.rows) == 2
    assert any(
        f"at most rank 2 keeps the relative error at {capped.relative_error:.4g}" in note for note in capped.notes
    )
    assert capped.notes[0] in capped.adapter.notes
    assert not free.notes


def test_a_cap_wins_over_the_energy_and_is_said() -> None:
    done = truncate(MIXED, energy=0.999, max_rank=2)
    least = min(row.energy for row in done.rows if not row.target.startswith("c_attn"))
    assert f"{least:.4g}" in done.notes[0]
    assert not truncate(MIXED, energy=0.999).notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given_dtype", [True, False])
def test_the_rounding_error_is_that_of_the_stored_product(dtype: torch.dtype, given_dtype: bool) -> None:
    before = Adapter(modules=(module("q"), module("v", seed=5, scale_rule=ROOT)))
    if not given_dtype:
        before = before.map_modules(lambda m: replace(m, lora_A=m.lora_A.to(dtype), lora_B=m.lora_B.to(dtype)))
    done = truncate(before, rank=3, dtype=dtype if given_dtype else None)
    exact = truncate(before, rank=3, dtype="f64")
    assert {m.lora_A.dtype for m in done.adapter.modules} == {dtype}
    assert done.rounding_error == pytest.approx(distance(done.adapter, exact.adapter) / total(before), rel=1e-6)
    assert 1e-4 < done.rounding_error < 1e-2
    assert done.relative_error == exact.relative_error
    for one, other in pairs(done.adapter, exact.adapter):
        assert torch.equal(one.lora_A, other.lora_A.to(dtype)), "computed in float64, rounded once"
        assert torch.equal(one.lora_B, other.lora_B.to(dtype))


def test_what_a_cast_will_do_to_modules_that_stay_is_counted_as_rounding() -> None:
    before = Adapter(modules=(module("q"), module("v", rank=2)))
    done = truncate(before, rank=2, dtype="bf16")
    assert done.adapter.modules[1] is before.modules[1]
    stored = done.adapter.map_modules(lambda m: replace(m, lora_A=m.lora_A.bfloat16(), lora_B=m.lora_B.bfloat16()))
    exact = truncate(before, rank=2, dtype=torch.float64)
    assert done.rows[1].rounding_error > 1e-4
    assert done.rounding_error == pytest.approx(distance(stored, exact.adapter) / total(before), rel=1e-6)
    assert exact.rounding_error < 1e-15


def test_an_error_counts_the_rounding_where_finer_ranks_make_up_for_it() -> None:
    before = Adapter(modules=(module("q"), module("v", seed=5)))
    limit = truncate(before, rank=3).relative_error * (1 + 1e-6)
    plain, rounded = truncate(before, error=limit), truncate(before, error=limit, dtype="bf16")
    assert plain.relative_error + rounded.rounding_error > limit, "else the test would show nothing"
    assert rounded.relative_error + rounded.rounding_error <= limit
    assert distance(rounded.adapter.map_modules(as_bfloat16), before) <= limit * total(before)
    assert not rounded.notes
    assert rounded.choice == f"error {limit}"


@pytest.mark.parametrize("error", [0.001, 0.0002])
def test_an_error_that_no_rank_keeps_after_rounding_is_said(error: float) -> None:
    before = Adapter(modules=(module("q"), module("v", seed=5)))
    done = truncate(before, error=error, dtype="bf16")
    assert done.relative_error <= error < done.rounding_error
    together = done.relative_error + done.rounding_error
    assert f"with the rounding to bf16 at most {together:.4g}, above the {error:g} that was asked for" in done.notes[0]
    assert done.notes[0] in done.adapter.notes
    stored = done.adapter.map_modules(as_bfloat16)
    assert error * total(before) < distance(stored, before) <= together * (1 + 1e-9) * total(before)


def as_bfloat16(module: LoraModule) -> LoraModule:
    return replace(module, lora_A=module.lora_A.bfloat16(), lora_B=module.lora_B.bfloat16())


def test_a_value_too_large_for_the_dtype_is_an_error() -> None:
    huge = module(lora_B=tensor((14, 6), torch.float32, 1) * 1e12)
    with pytest.raises(NonFiniteError, match="too large for f16"):
        truncate(Adapter(modules=(huge,)), rank=2, dtype="f16")


def test_modules_that_share_lora_a_go_on_sharing_it() -> None:
    shared = tensor((6, 10), torch.float32, 1)
    before = Adapter(
        modules=(
            module("k", lora_A=shared),
            module("o"),
            module("v", lora_A=shared, lora_B=tensor((9, 6), torch.float32, 4)),
        )
    )
    done = truncate(before, rank=2)
    key, _, value = done.adapter.modules
    assert key.lora_A is value.lora_A
    assert [row.target for row in done.rows] == ["k, v", "o"]
    stacked = replace(before.modules[0], lora_B=torch.cat([before.modules[0].lora_B, before.modules[2].lora_B]))
    norm = float(products(stacked).norm())
    assert done.rows[0].relative_error == pytest.approx(optimum(stacked, 2) / norm, rel=1e-9)
    both = torch.cat([products(key)[0], products(value)[0]])
    assert float((both - products(stacked)[0]).norm()) == pytest.approx(optimum(stacked, 2), abs=1e-6 * norm)
    assert done.rows[0].nbytes == 4 * 2 * (10 + 14 + 9)


def test_slots_of_different_rank_are_lowered_to_the_same_one() -> None:
    one, other = slots()
    before = Adapter(modules=(one, replace(other, lora_A=other.lora_A[:4], lora_B=other.lora_B[:, :4])))
    assert [row.rank_after for row in truncate(before, rank=3).rows] == [3, 3]
    assert [row.rank_after for row in truncate(before, rank=5).rows] == [5, 4]


def test_loralib_convolutions_are_lowered_by_whole_nominal_ranks() -> None:
    before = Adapter(modules=MODULES["loralib conv"])
    done = truncate(before, energy=0.5)
    (new,) = done.adapter.modules
    assert new.rank == 2 * new.nominal_rank == 2 * done.rows[0].rank_after
    assert new.scaling == before.modules[0].scaling


@pytest.mark.parametrize("rule", [ScaleRule.ALPHA_OVER_RANK, ROOT, ScaleRule.DIRECT])
@pytest.mark.parametrize("alpha", [16.0, 0.3, 11.3137, -7.0])
def test_alpha_follows_the_rank_so_that_the_scaling_stays(rule: ScaleRule, alpha: float) -> None:
    old = module(scale_rule=rule, alpha=alpha)
    for rank in (1, 2, 3, 5):
        new = truncate(Adapter(modules=(old,)), rank=rank).adapter.modules[0]
        assert new.scale_rule is rule
        assert new.scaling == pytest.approx(old.scaling, rel=2.3e-16)
        expected = {ROOT: math.sqrt(rank / 6), ScaleRule.DIRECT: 1.0}.get(rule, rank / 6)
        assert new.alpha == pytest.approx(alpha * expected, rel=1e-15)


def test_dora_is_said_to_be_measured_by_its_direction() -> None:
    done = truncate(Adapter(modules=MODULES["dora"]), rank=2)
    assert "DoRA in 1 module: the direction was truncated and the magnitude kept" in done.notes[0]


def test_an_adapter_for_some_tokens_is_truncated_like_any() -> None:
    done = truncate(replace(MIXED, invocation_tokens=(1, 2)), rank=2)
    assert done.adapter.invocation_tokens == (1, 2)


def test_the_history_says_what_was_asked_for_and_what_it_cost() -> None:
    done = truncate(MIXED, energy=0.9, max_rank=3)
    entry = done.adapter.history[-1]
    assert entry.operation == "truncate"
    assert entry.details == {
        "choice": "energy 0.9, at most rank 3",
        "energy": done.energy,
        "relative_error": done.relative_error,
        "rounding_error": done.rounding_error,
    }


BAD: list[dict[str, Any]] = [
    {},
    {"max_rank": 4},
    {"rank": 4, "energy": 0.9},
    {"error": 0.1, "size": "50%"},
    {"rank": 0},
    {"rank": -1},
    {"rank": 2.5},
    {"rank": True},
    {"rank": "4"},
    {"energy": 0},
    {"energy": 1.5},
    {"energy": math.nan},
    {"energy": "much"},
    {"error": 0},
    {"error": 1},
    {"error": 2},
    {"error": -0.1},
    {"error": math.nan},
    {"size": "abc"},
    {"size": 0},
    {"size": "0%"},
    {"size": "120%"},
    {"size": "-5"},
    {"size": 1.5},
    {"size": "20 parsecs"},
    {"size": ""},
    {"size": 10},
    {"rank": 4, "max_rank": 0},
    {"rank": 4, "device": "tpu"},
    {"rank": 4, "dtype": "int8"},
]


@pytest.mark.parametrize("given_options", BAD, ids=str)
def test_options_that_make_no_sense_are_errors(given_options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        truncate(MIXED, **given_options)


def test_a_changed_base_is_refused_by_name() -> None:
    changed = replace(MIXED, bases={"": Base(id="org/model", change="pissa")})
    with pytest.raises(UnsupportedFeatureError, match="trained with pissa initialisation"):
        truncate(changed, rank=2)


def test_an_adapter_without_factors_has_no_rank_to_lower() -> None:
    whole = Adapter(full_weights={"head.weight": FullWeight(weight=torch.ones(3, 3))})
    with pytest.raises(UnsupportedFeatureError, match="no rank to lower"):
        truncate(whole, rank=2)


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    bad = module("layers.3.q", lora_A=torch.full((6, 10), math.nan))
    with pytest.raises(NonFiniteError, match=r"layers\.3\.q\.lora_A"):
        truncate(Adapter(modules=(module(), bad)), rank=2)


def test_with_nan_what_may_stay_is_kept_bit_for_bit_and_the_rest_truncated() -> None:
    bad = module("k", rank=2, lora_B=torch.full((14, 2), math.nan))
    before = Adapter(modules=(module(), bad, module("v", seed=5)))
    healthy = Adapter(modules=(before.modules[0], before.modules[2]))
    for rule in ({"rank": 2}, {"rank": 3}, {"error": 0.3}, {"energy": 0.8}, {"size": "95%"}):
        done, alone = truncate(before, **rule, allow_nonfinite=True), truncate(healthy, **rule)
        assert done.adapter.modules[1] is bad
        assert [row.target for row in done.rows] == ["q", "v"]
        assert "NaN or infinity in k: 1 module is kept bit for bit" in done.notes[0]
        if "size" not in rule:
            assert done.rows == alone.rows
            assert (done.energy, done.relative_error) == (alone.energy, alone.relative_error)
        assert done.rows[0].rank_after < 6
    table = truncation_table(before, allow_nonfinite=True)
    assert [row.choice for row in table] == ["rank 2", "rank 4", "rank 6"]
    for row in table:
        assert truncate(before, rank=row.ranks[0], allow_nonfinite=True).energy == row.energy


@pytest.mark.parametrize("rule", [{"rank": 1}, {"energy": 0.9, "max_rank": 1}], ids=str)
def test_nan_that_would_have_to_be_truncated_is_an_error_with_advice_that_works(rule: dict[str, Any]) -> None:
    before = Adapter(modules=(module(), module("k", rank=2, lora_A=torch.full((2, 10), math.inf))))
    for allow in (False, True):
        with pytest.raises(NonFiniteError, match=r"k\.lora_A holds .* no nearest delta weight of rank 1") as caught:
            truncate(before, **rule, allow_nonfinite=allow)
        assert "allow" not in str(caught.value).replace("allow for its rank 2", "")
        assert "--exclude" in str(caught.value)


def test_nan_that_may_stay_is_an_error_that_names_the_option() -> None:
    before = Adapter(modules=(module(), module("k", rank=2, lora_A=torch.full((2, 10), math.nan))))
    with pytest.raises(NonFiniteError, match=r"k\.lora_A holds .*--allow-nonfinite"):
        truncate(before, rank=2)
    assert truncate(before, rank=2, allow_nonfinite=True).rows[0].rank_after == 2


def test_slots_beside_a_damaged_one_stay_as_they_are() -> None:
    one, other = slots()
    before = Adapter(modules=(replace(one, lora_A=one.lora_A * math.nan), other, module("v")))
    done = truncate(before, energy=0.8, allow_nonfinite=True)
    assert all(new is old for new, old in zip(done.adapter.modules[:2], before.modules[:2], strict=True))
    assert done.adapter.modules[2].rank < 6
    assert truncate(Adapter(modules=before.modules[:2]), size=10**6, allow_nonfinite=True).rows == ()


@pytest.mark.parametrize("share", [20, 40, 60, 80])
def test_where_nothing_is_to_be_kept_a_size_gives_rank_one_everywhere(share: int) -> None:
    zero = Adapter(modules=tuple(module(name, lora_B=torch.zeros(14, 6)) for name in "qkvo"))
    factors = sum(m.lora_A.nbytes + m.lora_B.nbytes for m in zero.modules)
    done = truncate(zero, size=factors * share // 100, measure=lambda a, _: factor_bytes(a))
    assert [row.rank_after for row in done.rows] == [1, 1, 1, 1]


def factor_bytes(adapter: Adapter) -> int:
    return sum(m.lora_A.nbytes + m.lora_B.nbytes for m in adapter.modules)


@pytest.mark.parametrize("call", [truncate, truncation_table])
def test_what_is_no_adapter_is_an_error_that_says_how_to_get_one(call: Callable[..., Any]) -> None:
    rule = {"rank": 2} if call is truncate else {}
    with pytest.raises(OptionError, match=r"found str: read it first: adaptertools\.read\('some/adapter'\)"):
        call("some/adapter", **rule)
    with pytest.raises(OptionError, match=r"found Truncation: give its \.adapter"):
        call(truncate(MIXED, rank=2), **rule)
    with pytest.raises(OptionError, match=r"found NoneType: adaptertools\.read gives one"):
        call(None, **rule)


def test_writing_what_is_no_adapter_is_an_error_that_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"give its \.adapter"):
        adaptertools.write(truncate(MIXED, rank=2), tmp_path / "a", format="peft")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="read it first"):
        adaptertools.write("some/adapter", tmp_path / "a", format="peft")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="read it first"):
        adaptertools.stored_size(tmp_path, format="peft")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="read it first"):
        adaptertools.to_state_dict("some/adapter", format="peft")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [lambda given: adaptertools.rescale(given, 8), adaptertools.summarize])
def test_so_it_is_where_it_is_rescaled_or_summed_up(call: Callable[[Any], object]) -> None:
    with pytest.raises(OptionError, match=r"found str: read it first: adaptertools\.read\('some/adapter'\)"):
        call("some/adapter")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rank": 4, "size": "30kB"}, "found rank and size. max_rank (--max-rank) is what caps the rank"),
        ({"max_rank": 4}, "found max_rank (--max-rank), which only caps another one"),
        ({"rank": 4, "max_rank": 0}, "max_rank (--max-rank) is 0"),
        ({"energy": 0.5, "error": 0.1}, "found energy and error"),
    ],
    ids=str,
)
def test_messages_name_options_as_python_and_the_command_line_do(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        truncate(MIXED, **rule)


def test_whether_anything_changed_is_told() -> None:
    small = Adapter(modules=(module(rank=2), module("v", rank=2, lora_A=tensor((2, 10), torch.bfloat16, 1))))
    assert truncate(small, rank=2).exact
    assert truncate(small, rank=2, dtype="f64").exact
    assert not truncate(small, rank=2, dtype="bf16").exact
    assert not truncate(small, rank=1).exact
    deficient = Adapter(modules=(ILL_CONDITIONED["rank-deficient factors"](),))
    assert not truncate(deficient, rank=3).exact, "no direction is lost, but the factors are new"


def test_the_table_says_what_truncating_would_give() -> None:
    rows = truncation_table(MIXED)
    assert [row.choice for row in rows] == ["rank 1", "rank 2", "rank 4", "rank 6"]
    for row, rank in zip(rows, (1, 2, 4, 6), strict=True):
        done = truncate(MIXED, rank=rank)
        assert (row.energy, row.relative_error) == (done.energy, done.relative_error)
        assert done.nbytes_on_disk <= row.nbytes_on_disk <= done.nbytes_on_disk + 100
    assert rows[-1].energy == 1.0
    assert [row.choice for row in truncation_table(MIXED, ranks=(3,))] == ["rank 3"]


def test_progress_is_told_module_by_module() -> None:
    told: list[tuple[int, int]] = []
    truncate(MIXED, rank=2, device="cpu", on_progress=lambda done, of: told.append((done, of)))
    assert told == [(i, 6) for i in range(1, 7)]


class Shapes(TorchDispatchMode):
    """The shape of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.made.append(item.shape)
        return result


@contextmanager
def on_this_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A dispatch mode sees its own thread alone, so that the work of the others is brought here."""
    with monkeypatch.context() as patched:
        patched.setattr(spectra, "in_parallel", map)
        patched.setattr(truncate_module, "in_parallel", map)
        yield


@pytest.mark.parametrize("rule", [{"rank": 3}, {"size": "50%"}, {"error": 0.3, "dtype": "bf16"}], ids=str)
def test_no_tensor_as_large_as_the_weight_is_ever_made(rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Adapter(
        modules=tuple(module(name, rank=8, n_out=3000, n_in=2000, seed=i) for i, name in enumerate(("q", "k")))
    )
    with on_this_thread(monkeypatch), Shapes() as seen:
        truncate(wide, **rule)
    factor = 8 * 3000
    assert len(seen.made) > 50
    assert max(shape.numel() for shape in seen.made) <= 2 * factor
    assert not any({3000, 2000} <= set(shape) for shape in seen.made)
    assert sum(shape.numel() for shape in seen.made) < 3000 * 2000, "not even all of them together"
    with Shapes() as formed:
        wide.modules[0].delta_weight()
    assert max(shape.numel() for shape in formed.made) == 3000 * 2000, "the test would see it"


def test_threads_give_the_same_as_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    threaded = truncate(MIXED, error=0.2)
    with on_this_thread(monkeypatch):
        serial = truncate(MIXED, error=0.2)
    assert threaded.rows == serial.rows
    for one, other in pairs(threaded.adapter, serial.adapter):
        assert torch.allclose(one.lora_A, other.lora_A)


def test_it_is_one_call_from_python() -> None:
    done = adaptertools.truncate(MIXED, rank=2)
    assert isinstance(done, adaptertools.Truncation)
    assert isinstance(done, Truncation)
    assert done.to_json()["choice"] == "rank 2"
    assert done.outlook.ranks == tuple(row.rank_after for row in done.rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rule", [{"rank": 2}, {"error": 0.2}, {"size": "90%"}, {"rank": 2, "dtype": "bf16"}], ids=str)
def test_a_gpu_gives_what_a_cpu_gives(rule: dict[str, Any]) -> None:
    ours, theirs = (truncate(MIXED, device=device, **rule) for device in ("cpu", "cuda"))
    assert [row.rank_after for row in ours.rows] == [row.rank_after for row in theirs.rows]
    assert theirs.relative_error == pytest.approx(ours.relative_error, rel=1e-9)
    for one, other in pairs(ours.adapter, theirs.adapter):
        assert other.lora_A.device.type == "cpu", "factors come back to where they were"
        allowed = 1e-2 if "dtype" in rule else 1e-6
        assert torch.allclose(products(one), products(other), rtol=0, atol=allowed * float(products(one).abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ILL_CONDITIONED)
def test_ill_conditioned_factors_reach_the_optimum_on_a_gpu(name: str) -> None:
    old = ILL_CONDITIONED[name]()
    done = truncate(Adapter(modules=(old,)), rank=2, device="cuda")
    norm, least = float(products(old).norm()), optimum(old, 2)
    error = float((products(done.adapter.modules[0]) - products(old)).norm())
    assert error == pytest.approx(least, abs=1e-6 * norm)
    assert done.relative_error == pytest.approx(least / norm, abs=1e-6)
