"""How far two adapters are: against dense float64, through every gauge, and for all that is no factor."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import adapters, tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adaptertools
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
)
from adaptertools.errors import NonFiniteError, OptionError, ShapeError
from adaptertools.operations import diff as diff_module

EPSILON = torch.finfo(torch.float64).eps

FACTORS_ALONE = [Feature.CONV, Feature.EMBEDDING, Feature.PARAMETER, Feature.FUSED_ROWS]
EVERYTHING = [*FACTORS_ALONE, Feature.DORA, Feature.LORA_BIAS, Feature.FULL_WEIGHTS, Feature.BIAS, Feature.TOKEN_ROWS]


def module(name: str = "x.q_proj", seed: int = 0, rank: int = 4, alpha: float = 8.0, **fields: Any) -> LoraModule:
    given: dict[str, Any] = {
        "target": Target(parameter=name),
        "lora_A": tensor((rank, 6), torch.float32, seed),
        "lora_B": tensor((5, rank), torch.float32, seed + 1),
    }
    return LoraModule(alpha=alpha, **{**given, **fields})


def adapter(*modules: LoraModule, **fields: Any) -> Adapter:
    return Adapter(modules=modules, **fields)


def dense(held: Adapter) -> dict[str, torch.Tensor]:
    """ΔW of every parameter in float64, as (out, in); slots in their place."""
    deltas: dict[str, torch.Tensor] = {}
    for one in held.modules:
        delta = one.lora_B.double() @ one.lora_A.double() * one.scaling
        if rows := one.target.rows:
            delta = torch.nn.functional.pad(delta, (0, 0, rows.start, rows.total - rows.stop))
        name = f"{one.target.component}:{one.target.parameter}"
        delta = delta.reshape(-1)
        deltas[name] = deltas[name] + delta if name in deltas else delta
    return deltas


def stretched(one: Adapter, other: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """The delta weights of both adapters as one long vector each, zero where a parameter is not adapted."""
    ours, theirs = dense(one), dense(other)
    names = sorted({*ours, *theirs})
    zero = torch.zeros_like
    left = [ours[name] if name in ours else zero(theirs[name]) for name in names]
    right = [theirs[name] if name in theirs else zero(ours[name]) for name in names]
    return torch.cat(left), torch.cat(right)


def size_of_factors(held: Adapter) -> float:
    """The norm of |s|·|B|·|A| over all modules, of which rounding errors are a share."""
    parts = (m.lora_B.double().abs() @ m.lora_A.double().abs() * m.scaling for m in held.modules)
    return math.hypot(*(float(part.norm()) for part in parts))


def other_factors(one: LoraModule, seed: int, rank: int, alpha: float) -> LoraModule:
    """A module of the same weight with factors that have nothing to do with the first."""
    *experts, _, n_in = one.lora_A.shape
    return replace(
        one,
        lora_A=tensor((*experts, rank, n_in), torch.float32, seed),
        lora_B=tensor((*experts, one.out_features, rank), torch.float32, seed + 1),
        alpha=alpha,
        scale_rule=ScaleRule.ALPHA_OVER_RANK,
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Adapter, Adapter]:
    """Two adapters of one model: some modules the same, some with factors of their own, some on one side only."""
    one = draw(adapters(FACTORS_ALONE))
    kept: list[LoraModule] = []
    mine: list[LoraModule] = []
    for seed, held in enumerate(one.modules):
        match draw(st.sampled_from(("same", "other", "other", "mine", "yours"))):
            case "same":
                kept.append(held)
                mine.append(held)
            case "other":
                kept.append(other_factors(held, 50 + seed, draw(st.integers(1, 6)), draw(st.sampled_from((3.0, -1.0)))))
                mine.append(held)
            case "mine":
                mine.append(held)
            case "yours":
                kept.append(held)
    assume(kept and mine)
    return replace(one, modules=tuple(mine)), replace(one, modules=tuple(reversed(kept)))


@settings(max_examples=150, deadline=None)
@given(pair=pairs())
def test_distance_norms_and_cosine_are_those_of_the_dense_delta_weights(pair: tuple[Adapter, Adapter]) -> None:
    found = adaptertools.diff(*pair, norms=True)
    one, other = stretched(*pair)
    noise = 100 * EPSILON * sum(map(size_of_factors, pair))
    assert found.norm == pytest.approx(float(one.norm()), abs=noise)
    assert found.other_norm == pytest.approx(float(other.norm()), abs=noise)
    assert found.distance == pytest.approx(float((one - other).norm()), abs=noise)
    assert found.relative_distance == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-10, abs=1e-12)
    assert found.cosine == pytest.approx(float(one @ other / (one.norm() * other.norm())), abs=1e-10)
    assert found.same == (found.distance == 0)


@settings(max_examples=60, deadline=None)
@given(pair=pairs())
def test_each_module_has_its_own_distance_and_all_of_them_one(pair: tuple[Adapter, Adapter]) -> None:
    found = adaptertools.diff(*pair, norms=True)
    modules = [{str(m.target): m for m in held.modules} for held in pair]
    assert [str(row.target) for row in found.modules if row.only_in != "B"] == sorted(
        modules[0], key=[str(row.target) for row in found.modules].index
    )
    for row in found.modules:
        ours, theirs = (side.get(str(row.target)) for side in modules)
        left, right = ((m.lora_B.double() @ m.lora_A.double() * m.scaling) if m else None for m in (ours, theirs))
        assert (left is None, right is None) == (row.only_in == "B", row.only_in == "A")
        left, right = (torch.zeros(1) if side is None else side for side in (left, right))
        assert row.distance == pytest.approx(float((left - right).norm()), rel=1e-10, abs=1e-12)
        assert row.norm == pytest.approx(float(left.norm()), rel=1e-10)
        assert row.other_norm == pytest.approx(float(right.norm()), rel=1e-10)
        if row.only_in is None:
            cosine = float((left * right).sum() / (left.norm() * right.norm()))
            assert row.cosine == pytest.approx(cosine, abs=1e-10)
        if row.identical:
            assert row.distance == 0
    assert found.distance == pytest.approx(math.hypot(*(row.distance for row in found.modules)))


@settings(max_examples=60, deadline=None)
@given(pair=pairs())
def test_the_distance_is_the_same_from_either_side(pair: tuple[Adapter, Adapter]) -> None:
    there, back = adaptertools.diff(*pair, norms=True), adaptertools.diff(*reversed(pair), norms=True)
    assert there.distance == pytest.approx(back.distance, rel=1e-12, abs=1e-12)
    assert (there.norm, there.other_norm) == pytest.approx((back.other_norm, back.norm), rel=1e-12)
    assert there.cosine == pytest.approx(back.cosine, abs=1e-12)
    assert there.same == back.same


@settings(max_examples=40, deadline=None)
@given(first=pairs(), seed=st.integers(0, 99))
def test_no_way_round_is_shorter(first: tuple[Adapter, Adapter], seed: int) -> None:
    one, two = first
    three = one.map_modules(lambda held: other_factors(held, seed, 2, 4.0))
    direct = adaptertools.diff(one, three).distance
    assert direct <= adaptertools.diff(one, two).distance + adaptertools.diff(two, three).distance + 1e-9


def refactored(one: LoraModule, seed: int, condition: float) -> LoraModule:
    """Other factors of the same product: B·G and G⁻¹·A, in float64, for a G of this condition."""
    rank = one.rank
    left, right = (torch.linalg.qr(tensor((rank, rank), torch.float64, seed + k)).Q for k in range(2))
    values = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    mixing, inverse = left * values @ right, right.T @ (left / values).T
    return replace(one, lora_A=inverse @ one.lora_A.double(), lora_B=one.lora_B.double() @ mixing)


@settings(max_examples=80, deadline=None)
@given(held=adapters(FACTORS_ALONE), seed=st.integers(0, 99), condition=st.sampled_from((1.0, 1e3, 1e6)))
def test_refactored_factors_are_the_same_adapter(held: Adapter, seed: int, condition: float) -> None:
    again = held.map_modules(lambda one: refactored(one, seed, condition))
    found = adaptertools.diff(held, again, norms=True)
    rounding = 100 * EPSILON * condition * size_of_factors(held)  # of storing the new factors, which G⁻¹ enlarges
    assert found.distance <= rounding
    assert found.relative_distance == found.distance / (found.norm or 1)
    assert found.cosine == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("exponent", [-20, -40, -50])
def test_a_change_in_the_last_bits_is_measured_right(exponent: int) -> None:
    before = module(lora_A=tensor((4, 6), torch.float64, 1), lora_B=tensor((5, 4), torch.float64, 2), alpha=1.2)
    factor = before.lora_B.clone()
    factor[2, 1] *= 1 + 2.0**exponent
    found = adaptertools.diff(adapter(before), adapter(replace(before, lora_B=factor)), tolerance=0)
    step = (factor - before.lora_B)[2, 1].abs() * before.lora_A[1].norm() * before.scaling
    delta = before.lora_B @ before.lora_A * before.scaling
    assert found.relative_distance == pytest.approx(float(step / delta.norm()), rel=1e-13)
    assert not found.same


@settings(max_examples=40, deadline=None)
@given(held=adapters(FACTORS_ALONE), weight=st.sampled_from((0.5, 2.0, -1.0, 1.25, 1 + 2.0**-30)))
def test_a_weighted_adapter_is_as_far_as_its_weight_is_from_one(held: Adapter, weight: float) -> None:
    weighted = held.map_modules(lambda one: replace(one, alpha=one.scaling * weight, scale_rule=ScaleRule.DIRECT))
    found = adaptertools.diff(held, weighted)
    assert found.relative_distance == pytest.approx(abs(weight - 1), rel=1e-9, abs=100 * EPSILON)
    assert found.cosine == pytest.approx(math.copysign(1, weight), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(held=adapters([*FACTORS_ALONE, Feature.LORA_BIAS, Feature.DORA]), alpha=st.sampled_from((1.0, 3.0, 32.0, 0.1)))
def test_rescaling_that_keeps_the_delta_is_no_difference(held: Adapter, alpha: float) -> None:
    rescaled = adaptertools.rescale(held, alpha)
    said = rescaled.history[-1].details
    found = adaptertools.diff(held, rescaled, tolerance=1e-6)
    share = size_of_factors(held) / float(stretched(held, held)[0].norm())
    assert found.relative_distance <= (said["max_relative_error"] + 10 * EPSILON) * share
    assert all(weight.relative_distance <= said["max_relative_error"] + EPSILON for weight in found.weights)
    if said["exact"] and all(
        m.scale_rule is not ScaleRule.ALPHA_OVER_SQRT_RANK and m.nominal_rank.bit_count() == 1 for m in held.modules
    ):  # else alpha / r is rounded, before and after
        assert (found.distance, found.weights) == (0, ())


def test_rescaling_that_keeps_the_weights_alone_is_a_difference() -> None:
    held = adapter(module(), module("x.v_proj", 7))
    found = adaptertools.diff(held, adaptertools.rescale(held, 12, keep="weights"))
    assert found.relative_distance == pytest.approx(0.5, rel=1e-12)
    assert not found.same


def test_padding_permuting_and_widening_the_factors_is_no_difference() -> None:
    one = module()
    order = torch.tensor([3, 1, 0, 2])
    permuted = replace(one, lora_A=one.lora_A[order], lora_B=one.lora_B[:, order])
    padded = replace(
        one,
        lora_A=torch.nn.functional.pad(one.lora_A, (0, 0, 0, 4)),
        lora_B=torch.nn.functional.pad(one.lora_B, (0, 4)),
        alpha=16.0,
    )
    wider = replace(one, lora_A=one.lora_A.double(), lora_B=one.lora_B.double())
    assert adaptertools.diff(adapter(one), adapter(permuted)).relative_distance <= 20 * EPSILON
    for other in (padded, wider):
        found = adaptertools.diff(adapter(one), adapter(other), tolerance=0)
        assert (found.distance, found.same, found.modules[0].identical) == (0, True, False)


def test_opposite_adapters_have_cosine_minus_one() -> None:
    one = module()
    found = adaptertools.diff(adapter(one), adapter(replace(one, lora_B=-one.lora_B)))
    assert found.cosine == pytest.approx(-1, rel=1e-15)
    assert found.relative_distance == pytest.approx(2, rel=1e-15)


SLOTS = [RowSlice(start=3 * k, stop=3 * k + 3, total=9) for k in range(3)]


def slots(*places: int) -> list[LoraModule]:
    """Slots of a fused projection of nine rows, each with factors of its own."""
    return [
        module("qkv", k, lora_B=tensor((3, 4), torch.float32, 9 + k), target=Target(parameter="qkv", rows=SLOTS[k]))
        for k in places
    ]


def test_slots_meet_the_whole_of_their_projection() -> None:
    q, v = slots(0, 2)
    apart, whole = adapter(q, v), adapter(put_together(q, v))
    assert adaptertools.diff(apart, whole, tolerance=1e-14).same
    without = adaptertools.diff(apart, adapter(q))
    assert [(str(row.target), row.identical, row.only_in) for row in without.modules] == [
        ("qkv[0:3]", True, None),
        ("qkv[6:9]", False, "A"),
    ]
    halved = adapter(replace(q, alpha=4.0), v)
    for other in (whole, apart):
        expected = 0.5 * float(dense(adapter(q))[":qkv"].norm())
        assert adaptertools.diff(halved, other).distance == pytest.approx(expected, rel=1e-12)


def put_together(*slots: LoraModule) -> LoraModule:
    """The slots as one module, put together here by hand."""
    rows = [slot.target.rows for slot in slots]
    padded = [
        torch.nn.functional.pad(slot.lora_B, (0, 0, r.start, r.total - r.stop))
        for slot, r in zip(slots, rows, strict=True)
        if r
    ]
    return replace(
        slots[0],
        target=Target(parameter="qkv"),
        lora_A=torch.cat([slot.lora_A for slot in slots]),
        lora_B=torch.cat(padded, dim=1),
        alpha=slots[0].scaling,
        scale_rule=ScaleRule.DIRECT,
    )


def test_a_convolution_of_loralib_meets_one_of_peft() -> None:
    folded = module(
        "c",
        lora_A=tensor((2, 6), torch.float32, 1),
        lora_B=tensor((8, 2), torch.float32, 2),
        kind=Kind.CONV,
        shape=(4, 3, 2, 2),
    )
    weight = folded.delta_weight(dtype=torch.float64).reshape(4, 12)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    plain = replace(folded, lora_A=Vh, lora_B=U * S, alpha=1.0, scale_rule=ScaleRule.DIRECT)
    found = adaptertools.diff(adapter(folded), adapter(plain), tolerance=1e-14)
    assert found.same
    assert not adaptertools.diff(adapter(folded), adapter(replace(plain, alpha=1.01))).same


def test_modules_on_one_side_only_count_with_their_whole_norm() -> None:
    q, v = module(), module("x.v_proj", 7)
    found = adaptertools.diff(adapter(q), adapter(q, v))
    length = float((v.lora_B.double() @ v.lora_A.double() * v.scaling).norm())
    assert [(str(row.target), row.only_in) for row in found.modules] == [("x.q_proj", None), ("x.v_proj", "B")]
    assert found.distance == pytest.approx(length)
    assert found.modules[1].relative_distance == math.inf
    assert found.modules[1].cosine is None
    assert not found.same
    assert not adaptertools.diff(adapter(q), adapter(q, v), tolerance=1e6).same
    assert adaptertools.diff(adapter(q, v), adapter(q)).modules[1].only_in == "A"


def test_a_module_of_zeros_on_one_side_only_is_said_and_changes_nothing() -> None:
    q, idle = module(), module("x.v_proj", lora_B=torch.zeros(5, 4))
    found = adaptertools.diff(adapter(q), adapter(q, idle))
    assert [row.only_in for row in found.modules] == [None, "B"]
    assert (found.distance, found.same) == (0, True)


def test_from_nothing_to_something_is_infinitely_far() -> None:
    idle, active = module(lora_B=torch.zeros(5, 4)), module()
    there, back = adaptertools.diff(adapter(idle), adapter(active)), adaptertools.diff(adapter(active), adapter(idle))
    assert (there.relative_distance, there.cosine, there.same) == (math.inf, None, False)
    assert back.relative_distance == pytest.approx(1, rel=1e-15)
    nothing = adaptertools.diff(adapter(idle), adapter(replace(idle, lora_A=tensor((4, 6), torch.float32, 3))))
    assert (nothing.relative_distance, nothing.cosine, nothing.same) == (0, None, True)


def test_components_are_not_mixed_up() -> None:
    text, image = (replace(module(), target=Target(parameter="q", component=name)) for name in ("text", "unet"))
    assert adaptertools.diff(adapter(text, image), adapter(image, text)).same
    assert [row.only_in for row in adaptertools.diff(adapter(text), adapter(image)).modules] == ["A", "B"]


HEAD = {"head.weight": FullWeight(weight=tensor((3, 2), torch.float32, 1))}


def head(weight: torch.Tensor) -> dict[str, FullWeight]:
    return {"head.weight": FullWeight(weight=weight)}


def test_full_weights_that_differ_are_measured() -> None:
    weight = HEAD["head.weight"].weight
    changed = weight.clone()
    changed[1, 1] += 0.5
    found = adaptertools.diff(adapter(module(), full_weights=HEAD), adapter(module(), full_weights=head(changed)))
    (difference,) = found.weights
    assert (difference.name, difference.kind, difference.only_in) == ("head.weight", "full weight", None)
    assert difference.max_abs == pytest.approx(0.5)
    assert difference.relative_distance == pytest.approx(float((changed - weight).norm() / weight.norm()))
    assert (found.distance, found.same) == (0, False)
    near = adaptertools.diff(
        adapter(module(), full_weights=HEAD), adapter(module(), full_weights=head(weight * (1 + 1e-7)))
    )
    assert (near.same, len(near.weights)) == (True, 1)
    wide = adaptertools.diff(
        adapter(module(), full_weights=HEAD), adapter(module(), full_weights=head(weight.double()))
    )
    assert (wide.same, wide.weights) == (True, ())


def test_a_large_full_weight_is_measured_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptertools.operations.values._CHUNK", 5)
    one, other = tensor((7, 4), torch.float32, 1).double(), tensor((4, 7), torch.float32, 2).double().T
    (difference,) = adaptertools.diff(Adapter(full_weights=head(one)), Adapter(full_weights=head(other))).weights
    assert difference.relative_distance == pytest.approx(float((one - other).norm() / one.norm()))
    assert difference.max_abs == float((one - other).abs().max())


def test_full_weights_of_other_shapes_or_on_one_side_only_are_said() -> None:
    one, other = adapter(module(), full_weights=HEAD), adapter(module(), full_weights=head(torch.ones(4, 2)))
    (shapes,) = adaptertools.diff(one, other).weights
    assert shapes.note == "shape (3, 2) in A, (4, 2) in B"
    for pair, side in (((one, adapter(module())), "A"), ((adapter(module()), one), "B")):
        found = adaptertools.diff(*pair, tolerance=1e6)
        assert [(weight.name, weight.only_in) for weight in found.weights] == [("head.weight", side)]
        assert not found.same


def token_rows(indices: tuple[int, ...], rows: torch.Tensor) -> dict[str, RowWeights]:
    return {"embed.weight": RowWeights(indices=indices, rows=rows)}


def test_token_rows_are_compared_whatever_their_order() -> None:
    rows = tensor((2, 3), torch.float32, 1)
    one = adapter(module(), row_weights=token_rows((5, 1), rows))
    assert adaptertools.diff(one, adapter(module(), row_weights=token_rows((1, 5), rows.flip(0)))).weights == ()
    (other,) = adaptertools.diff(one, adapter(module(), row_weights=token_rows((1, 5), rows))).weights
    assert (other.name, other.kind) == ("embed.weight", "token rows")
    assert other.max_abs == pytest.approx(float((rows - rows.flip(0)).abs().max()))
    (apart,) = adaptertools.diff(one, adapter(module(), row_weights=token_rows((5, 2), rows))).weights
    assert (apart.note, apart.relative_distance) == ("rows 1, 5 in A, 2, 5 in B", math.inf)
    (alone,) = adaptertools.diff(one, adapter(module())).weights
    assert alone.only_in == "A"


def test_dora_magnitudes_are_compared_beside_the_direction() -> None:
    dora = module(magnitude=tensor((5,), torch.float32, 1).abs())
    assert dora.magnitude is not None
    found = adaptertools.diff(adapter(dora), adapter(replace(dora, magnitude=dora.magnitude * 2)))
    assert [(w.name, w.kind) for w in found.weights] == [("x.q_proj.magnitude", "magnitude")]
    assert found.weights[0].relative_distance == pytest.approx(1)
    assert (found.distance, found.same) == (0, False)
    plain = adaptertools.diff(adapter(dora), adapter(replace(dora, magnitude=None)))
    assert ([w.only_in for w in plain.weights], plain.same) == (["A"], False)
    over = adaptertools.diff(adapter(module(magnitude=torch.ones(6), magnitude_axis="in")), adapter(module()))
    assert [w.name for w in over.weights] == ["x.q_proj.magnitude of inputs"]


def test_the_magnitudes_of_slots_are_those_of_the_whole() -> None:
    magnitude = tensor((9,), torch.float32, 4).abs()
    bare = slots(0, 1, 2)
    apart = [replace(slot, magnitude=magnitude[3 * k : 3 * k + 3]) for k, slot in enumerate(bare)]
    whole = replace(put_together(*bare), magnitude=magnitude)
    assert adaptertools.diff(adapter(*apart), adapter(whole), tolerance=1e-14).same
    assert adaptertools.diff(adapter(*apart), adapter(*reversed(apart))).weights == ()
    assert not adaptertools.diff(adapter(*apart), adapter(replace(whole, magnitude=magnitude * 1.1))).same
    (missing,) = adaptertools.diff(adapter(*apart), adapter(*apart[:1], *bare[1:])).weights
    assert missing.note.startswith("rows 0, 1, 2, 3, 4, 5 … (9) in A, 0, 1, 2 in B")


def test_biases_are_compared_times_their_scaling() -> None:
    bias = tensor((5,), torch.float32, 1)
    one = module(alpha=8.0, lora_bias=bias)
    halved = replace(one, alpha=4.0, lora_B=one.lora_B * 2, lora_bias=bias * 2)
    assert adaptertools.diff(adapter(one), adapter(halved), tolerance=0).same
    (found,) = adaptertools.diff(adapter(one), adapter(replace(halved, lora_bias=bias))).weights
    assert (found.name, found.kind) == ("x.q_proj.lora_bias", "lora_bias")
    assert found.relative_distance == pytest.approx(0.5)
    (gone,) = adaptertools.diff(adapter(one), adapter(replace(one, lora_bias=None))).weights
    assert gone.relative_distance == 1
    assert adaptertools.diff(adapter(module(lora_bias=torch.zeros(5))), adapter(module())).same


def test_invocation_tokens_and_a_changed_base_count() -> None:
    plain = adapter(module(), bases={"": Base(id="org/model")})
    alora = replace(plain, invocation_tokens=(1, 2))
    pissa = replace(plain, bases={"": Base(id="org/model", change="pissa")})
    found = adaptertools.diff(plain, alora)
    assert (found.others, found.same) == (("invocation tokens: none in A, [1, 2] in B",), False)
    found = adaptertools.diff(pissa, plain)
    assert (found.others, found.same) == (("base: changed by pissa in A, unchanged in B",), False)
    assert adaptertools.diff(pissa, pissa).same


def test_the_name_of_the_base_is_noted_and_does_not_count() -> None:
    one, other, unknown = (adapter(module(), bases={"": Base(id=name)}) for name in ("org/a", "org/b", None))
    found = adaptertools.diff(one, other)
    assert (found.notes, found.same) == (("base model: org/a in A, org/b in B",), True)
    assert adaptertools.diff(one, unknown).notes == ()
    revised = replace(one, bases={"": Base(id="org/a", revision="2")})
    before = replace(one, bases={"": Base(id="org/a", revision="1")})
    assert adaptertools.diff(before, revised).notes == ("base model: revision 1 in A, 2 in B",)
    slashed = adapter(module(), bases={"": Base(id="org/a/", revision="1")})
    assert adaptertools.diff(before, slashed).notes == ()


@pytest.mark.parametrize(("a", "b"), [("a", "b"), (adapter(module()), None)])
def test_what_is_no_adapter_is_refused_with_advice(a: Any, b: Any) -> None:
    with pytest.raises(OptionError, match=r"expected an Adapter, found .*adaptertools\.read"):
        adaptertools.diff(a, b)


@settings(max_examples=40, deadline=None)
@given(held=adapters(EVERYTHING))
def test_an_adapter_is_the_same_as_itself_and_as_a_copy_of_itself(held: Adapter) -> None:
    copied = replace(
        held,
        modules=tuple(replace(m, **{name: t.clone() for name, t in m.tensors.items()}) for m in held.modules),
        full_weights={name: replace(w, weight=w.weight.clone()) for name, w in held.full_weights.items()},
        row_weights={name: replace(w, rows=w.rows.clone()) for name, w in held.row_weights.items()},
    )
    for other in (held, copied):
        found = adaptertools.diff(held, other, tolerance=0)
        assert found.same
        assert all(row.identical for row in found.modules)
        assert (found.relative_distance, found.cosine, found.weights) == (0, 1, ())


@pytest.fixture
def no_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed with")

    monkeypatch.setattr(diff_module, "compare_products", refuse)
    monkeypatch.setattr(diff_module, "delta_norm", refuse)


@pytest.mark.usefixtures("no_arithmetic")
def test_modules_that_are_equal_bit_for_bit_need_no_arithmetic() -> None:
    held, copied = (adapter(module(), module("x.v_proj", 7)) for _ in range(2))
    found = adaptertools.diff(held, copied)
    assert (found.same, found.norm, found.modules[0].norm) == (True, None, None)
    with pytest.raises(AssertionError, match="computed with"):
        adaptertools.diff(held, copied, norms=True)


def test_norms_are_measured_when_asked_for_or_needed() -> None:
    q, v = module(), module("x.v_proj", 7)
    lengths = [float(m.delta_weight(dtype=torch.float64).norm()) for m in (q, v)]
    asked = adaptertools.diff(adapter(q, v), adapter(q, v), norms=True)
    assert [row.norm for row in asked.modules] == pytest.approx(lengths)
    assert asked.norm == pytest.approx(math.hypot(*lengths))
    needed = adaptertools.diff(adapter(q, v), adapter(q, replace(v, alpha=16.0)))
    assert [row.norm for row in needed.modules] == pytest.approx(lengths)
    assert needed.relative_distance == pytest.approx(lengths[1] / math.hypot(*lengths))


def spoiled(bad: float = math.nan) -> LoraModule:
    lora_A = tensor((4, 6), torch.float32, 0)
    lora_A[1, 2] = bad
    return module(lora_A=lora_A)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_equals_itself_bit_for_bit_and_nothing_else(bad: float) -> None:
    held, copied = adapter(spoiled(bad)), adapter(spoiled(bad))
    assert adaptertools.diff(held, copied).same
    assert adaptertools.diff(held, copied, norms=True).same
    for pair, side in (((held, adapter(module())), "A"), ((adapter(module()), held), "B")):
        with pytest.raises(NonFiniteError, match=rf"^{side}: x\.q_proj\.lora_A: . (NaN|NaN and 1 infinite)"):
            adaptertools.diff(*pair)
    other = module("x.v_proj", 7)
    with pytest.raises(NonFiniteError, match=r"^A and B: x\.q_proj\.lora_A"):
        adaptertools.diff(adapter(spoiled(bad), other), adapter(spoiled(bad), replace(other, alpha=2.0)))
    with pytest.raises(NonFiniteError, match=r"^B: x\.q_proj\.lora_A"):
        adaptertools.diff(adapter(other), adapter(other, spoiled(bad)))


def test_full_weights_that_are_not_finite_are_named() -> None:
    bad = head(torch.tensor([[1.0, math.nan]]))
    assert adaptertools.diff(
        Adapter(full_weights=bad), Adapter(full_weights=head(bad["head.weight"].weight.clone()))
    ).same
    with pytest.raises(NonFiniteError, match=r"^B: head\.weight: 1 NaN"):
        adaptertools.diff(Adapter(full_weights=head(torch.ones(1, 2))), Adapter(full_weights=bad))


def test_a_product_beyond_every_float_is_said_to_be_that() -> None:
    huge = module(lora_A=torch.full((4, 6), 1e300, dtype=torch.float64), lora_B=torch.full((5, 4), 1e30))
    with pytest.raises(NonFiniteError, match="beyond the range of float64"):
        adaptertools.diff(adapter(huge), adapter(module()))


def test_weights_of_other_shapes_are_refused_with_both() -> None:
    with pytest.raises(ShapeError, match=r"x\.q_proj: .*\(5, 6\) in A and \(5, 8\) in B"):
        adaptertools.diff(adapter(module()), adapter(module(lora_A=torch.ones(4, 8))))


@pytest.mark.parametrize("tolerance", [-1e-9, math.nan, math.inf, True, "1e-6", None])
def test_a_tolerance_that_is_none_is_refused(tolerance: Any) -> None:
    with pytest.raises(OptionError, match="tolerance"):
        adaptertools.diff(adapter(module()), adapter(module()), tolerance=tolerance)


def test_progress_counts_parameters_and_stored_weights() -> None:
    seen: list[tuple[int, int]] = []
    held = adapter(module(), module("x.v_proj", 7), full_weights=HEAD)
    adaptertools.diff(held, held, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_nothing_is_changed_in_either_adapter() -> None:
    one, other = adapter(module(), full_weights=HEAD), adapter(module(seed=9), full_weights=head(torch.ones(3, 2)))
    before = [tensor.clone() for held in (one, other) for tensor in held.named_tensors.values()]
    adaptertools.diff(one, other)
    after = [tensor for held in (one, other) for tensor in held.named_tensors.values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


class Sizes(TorchDispatchMode):
    """Notes the size of every tensor that an operation makes, on the thread where it is entered."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen += [
            one.numel() for one in (made if isinstance(made, tuple | list) else [made]) if isinstance(one, torch.Tensor)
        ]
        return made


def test_the_delta_weight_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    in_parallel = diff_module.in_parallel  # a mode holds for one thread, and the work is done on others

    def watched(function: Callable[[Any], Any], items: Any) -> Any:
        def work(item: Any) -> Any:
            with Sizes(seen):
                return function(item)

        return in_parallel(work, items)

    monkeypatch.setattr(diff_module, "in_parallel", watched)
    size, rank = 600, 3
    one, other = (module(lora_A=torch.randn(rank, size), lora_B=torch.randn(size, rank)) for _ in range(2))
    pieces = [
        replace(
            module("qkv", lora_A=torch.randn(rank, size), lora_B=torch.randn(size // 2, rank)),
            target=Target(parameter="qkv", rows=rows),
        )
        for rows in (RowSlice(start=0, stop=size // 2, total=size), RowSlice(start=size // 2, stop=size, total=size))
    ]
    same = module("same", lora_A=torch.randn(rank, size), lora_B=torch.randn(size, rank))
    whole = module("qkv", lora_A=torch.randn(rank, size), lora_B=torch.randn(size, rank))
    with Sizes(seen):
        found = adaptertools.diff(adapter(one, same, *pieces), adapter(other, same, whole))
    assert found.distance > 0
    assert [row.identical for row in found.modules] == [False, True, False]
    assert 3 * size * rank == max(seen) < size * size  # three times for the two slots beside the whole
