"""Merges in the joint singular basis, against the same formulas on dense matrices."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptertools.adapter import Adapter, Kind, LoraModule, ScaleRule, Target
from adaptertools.errors import NonFiniteError, OptionError
from adaptertools.operations.core_space import DEFAULT_DENSITY, METHODS, Method, combine_in_core_space
from adaptertools.operations.stack import stack

CPU = torch.device("cpu")
NAME = "model.layers.0.self_attn.q_proj"
Contributions = Sequence[tuple[LoraModule | None, float]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module(rank: int, seed: int, n_in: int = 11, n_out: int = 9, **fields: Any) -> LoraModule:
    factors = {"lora_A": random(rank, n_in, seed=seed), "lora_B": random(n_out, rank, seed=seed + 1000)}
    return LoraModule(**{"target": Target(parameter=NAME), "alpha": 8.0, **factors, **fields})


def delta(source: LoraModule) -> Tensor:
    return source.scaling * (source.lora_B.double() @ source.lora_A.double())


def merge(contributions: Contributions, method: Method, density: float | None = None, **options: Any) -> Tensor:
    lora_A, lora_B = combine_in_core_space(contributions, method, density=density, device=CPU, **options)
    assert lora_A.dtype == lora_B.dtype == torch.float64
    return lora_B @ lora_A


def weighted_sum(contributions: Contributions) -> Tensor:
    return sum(weight * delta(source) for source, weight in contributions if source is not None)  # type: ignore[return-value]


def assert_same(found: Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= tolerance * float(wanted.norm())


# The formulas of the papers on dense matrices, entry by entry.


def numerical_rank(values: Tensor, cut: float) -> int:
    return int((values > cut * values[0]).sum())


def trimmed(matrix: Tensor, density: float) -> Tensor:
    sizes = sorted(matrix.abs().flatten().tolist(), reverse=True)
    threshold = sizes[max(1, round(density * len(sizes))) - 1]
    return matrix * (matrix.abs() >= threshold * (1 - 1e-9))


def elected_mean(matrices: Sequence[Tensor]) -> Tensor:
    result = torch.zeros_like(matrices[0])
    noise = [1e-9 * float(matrix.abs().max()) for matrix in matrices]
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            pairs = zip(matrices, noise, strict=True)
            values = [float(matrix[i, j]) for matrix, floor in pairs if abs(float(matrix[i, j])) > floor]
            total = math.fsum(values)
            if abs(total) > 1e-9 * math.fsum(abs(value) for value in values):
                agreeing = [value for value in values if value * total > 0]
                result[i, j] = math.fsum(agreeing) / len(agreeing)
    return result


def dropped(matrix: Tensor, density: float, seed: int, target: Target, source: int) -> Tensor:
    """What is dropped is part of the contract: the same seed gives the same merge in every version."""
    key = hashlib.sha256(f"{seed}\0{target}\0{0}\0{source}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    chances = torch.rand(matrix.shape, generator=generator, dtype=torch.float64)
    return torch.where(chances < density, matrix / density, 0.0)


def reference(contributions: Contributions, method: Method, density: float, seed: int = 0) -> Tensor:
    """Core Space TIES and DARE, and KnOTS, from dense delta weights and dense singular value decompositions."""
    numbered = [(number, source, weight) for number, (source, weight) in enumerate(contributions) if source]
    deltas = [weight * delta(source) for _, source, weight in numbered]
    if method == "knots-ties":
        U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
        rank = numerical_rank(S, 1e-9)
        parts = torch.split(S[:rank, None] * Vh[:rank], deltas[0].shape[1], dim=1)
        return U[:, :rank] @ elected_mean([trimmed(part, density) for part in parts])
    lefts, rights = [], []
    for dense in deltas:
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        rank = numerical_rank(S, 1e-9)
        lefts.append(U[:, :rank] * S[:rank].sqrt())
        rights.append(Vh[:rank].T * S[:rank].sqrt())
    left, S, _ = torch.linalg.svd(torch.cat(lefts, dim=1), full_matrices=False)
    left = left[:, : numerical_rank(S, 1e-9)]
    right, S, _ = torch.linalg.svd(torch.cat(rights, dim=1), full_matrices=False)
    right = right[:, : numerical_rank(S, 1e-9)]
    cores = [left.T @ dense @ right for dense in deltas]
    if method == "ties":
        core = elected_mean([trimmed(core, density) for core in cores])
    else:
        pairs = zip(cores, numbered, strict=True)
        rest = [dropped(core, density, seed, source.target, number) for core, (number, source, _) in pairs]
        core = torch.stack(rest).sum(dim=0) if method == "dare-linear" else elected_mean(rest)
    return left @ core @ right.T


CASES: dict[str, Contributions] = {
    "two of rank 3": [(module(3, 1), 1.0), (module(3, 2), 1.0)],
    "different ranks, alphas and weights": [
        (module(1, 3, alpha=2.0), 0.7),
        (module(4, 4, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK), 0.3),
        (module(2, 5, alpha=0.1, scale_rule=ScaleRule.DIRECT), 2.0),
    ],
    "negative and zero weights": [(module(2, 6), 1.0), (module(3, 7), -0.5), (module(2, 8), 0.0)],
    "a negative alpha": [(module(2, 9), 1.0), (module(2, 10, alpha=-3.0), 1.0)],
    "absent sources": [(None, 0.4), (module(2, 11), 1.0), (None, 1.0), (module(3, 12), 0.5)],
    "more rank than the weight has": [(module(4, 13, 5, 6), 1.0), (module(4, 14, 5, 6), 1.0)],
    "a single source": [(module(3, 15), 0.8)],
    "one output": [(module(1, 16, 7, 1), 1.0), (module(1, 17, 7, 1), 0.5)],
}


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_that_of_the_formula_on_dense_matrices(case: str, method: Method, density: float) -> None:
    assert_same(merge(CASES[case], method, density, seed=5), reference(CASES[case], method, density, 5), 1e-9)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from((1.0, 0.5, -0.3, 2.0)), min_size=4, max_size=4),
    shape=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    method=st.sampled_from(METHODS),
    density=st.sampled_from((0.05, 0.2, 0.6, 1.0)),
    seed=st.integers(0, 1 << 16),
)
def test_any_sources_merge_as_the_dense_formula_says(
    ranks: list[int], weights: list[float], shape: tuple[int, int], method: Method, density: float, seed: int
) -> None:
    sources = [(module(rank, seed + k, *shape), weights[k]) for k, rank in enumerate(ranks)]
    error = merge(sources, method, density, seed=seed) - reference(sources, method, density, seed)
    # beside the sources, not the merge: DARE may drop all but the rounding of the reference
    assert error.norm() <= 1e-10 * sum(float(delta(source).norm()) for source, _ in sources)


# What may not change the result.


def refactored(source: LoraModule, gauge: Tensor) -> LoraModule:
    return replace(
        source,
        lora_A=torch.linalg.solve(gauge, source.lora_A.double()),
        lora_B=source.lora_B.double() @ gauge,
    )


def with_condition(rank: int, condition: float, seed: int) -> Tensor:
    """An invertible matrix with this condition number."""
    U, _, Vh = torch.linalg.svd(random(rank, rank, seed=seed))
    return (U * torch.logspace(0, math.log10(condition), rank, dtype=torch.float64)) @ Vh


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e5])
@pytest.mark.parametrize("method", METHODS)
def test_refactoring_a_source_changes_nothing(method: Method, condition: float) -> None:
    sources = [(module(4, 20), 1.0), (module(3, 21), 0.5), (module(4, 22), -0.2)]
    turned = [
        (refactored(source, with_condition(source.rank, condition, k)), weight)
        for k, (source, weight) in enumerate(sources)
    ]
    assert_same(merge(turned, method, 0.3), merge(sources, method, 0.3))


@pytest.mark.parametrize("condition", [1.0, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_more_rank_than_a_source_needs_changes_nothing(method: Method, condition: float) -> None:
    """Its surplus directions hold rounding alone, the more of it the worse the factors are conditioned."""
    first, second = module(2, 18), module(3, 19)
    spread = random(2, 4, seed=20)
    wide = replace(
        first,
        alpha=2 * first.alpha,
        lora_A=torch.linalg.pinv(spread) @ first.lora_A,
        lora_B=first.lora_B @ spread,
    )
    wide = refactored(wide, with_condition(4, condition, 21))
    assert_same(delta(wide), delta(first), 1e-9)
    assert_same(merge([(wide, 1.0), (second, 0.5)], method, 0.3), merge([(first, 1.0), (second, 0.5)], method, 0.3))


@pytest.mark.parametrize("method", METHODS)
def test_neither_alpha_nor_rank_nor_the_place_of_a_factor_matters(method: Method) -> None:
    first, second = module(3, 23), module(2, 24)
    wanted = merge([(first, 0.7), (second, 0.5)], method, 0.4)
    stronger = replace(first, alpha=first.alpha * 0.7)
    padded = replace(
        second,
        alpha=second.alpha * 2.5,
        lora_A=torch.nn.functional.pad(second.lora_A, (0, 0, 0, 3)),
        lora_B=torch.nn.functional.pad(second.lora_B, (0, 3)),
    )
    doubled = replace(
        second,
        lora_A=torch.cat([second.lora_A, second.lora_A]),
        lora_B=torch.cat([second.lora_B, second.lora_B], dim=1),
    )
    unbalanced = replace(first, lora_A=first.lora_A * 1e40, lora_B=first.lora_B * 1e-40)
    for sources in (
        [(stronger, 1.0), (second, 0.5)],
        [(first, 0.7), (padded, 0.5)],
        [(first, 0.7), (doubled, 0.5)],
        [(unbalanced, 0.7), (second, 0.5)],
        [(first, 0.7), (replace(second, lora_A=-second.lora_A), -0.5)],
    ):
        assert_same(merge(sources, method, 0.4), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_does_nothing_is_as_good_as_absent(method: Method) -> None:
    first, second = module(3, 25), module(2, 26)
    wanted = merge([(first, 1.0), (None, 1.0), (second, 1.0)], method, 0.3)
    untrained = replace(module(4, 27), lora_B=torch.zeros(9, 4))
    for nothing in (
        (untrained, 1.0),
        (module(4, 27), 0.0),
        (module(4, 27, alpha=0.0), 1.0),
    ):
        assert_same(merge([(first, 1.0), nothing, (second, 1.0)], method, 0.3), wanted)


@pytest.mark.parametrize("method", ["ties", "knots-ties"])
def test_the_order_of_the_sources_does_not_matter(method: Method) -> None:
    sources = [(module(3, 28), 1.0), (module(2, 29), 0.4), (module(4, 30), -0.7)]
    wanted = merge(sources, method, 0.3)
    for order in permutations(sources):
        assert_same(merge(order, method, 0.3), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_scaling_all_weights_scales_the_merge(method: Method) -> None:
    sources = [(module(3, 31), 1.0), (module(2, 32), 0.4)]
    scaled = [(source, 0.25 * weight) for source, weight in sources]
    assert_same(merge(scaled, method, 0.3), 0.25 * merge(sources, method, 0.3))


# Sources that are alike, opposite, or strangers.


@pytest.mark.parametrize("method", ["ties", "knots-ties", "dare-ties"])
def test_the_consensus_of_equal_sources_is_the_mean_of_what_each_contributes(method: Method) -> None:
    source = module(3, 33)
    turned = refactored(source, with_condition(3, 10.0, 7))
    assert_same(merge([(source, 1.0), (source, 1.0)], method, 1.0), delta(source))
    assert_same(merge([(source, 0.9), (turned, 0.3)], method, 1.0), 0.6 * delta(source))


@pytest.mark.parametrize("method", METHODS)
def test_opposite_sources_cancel(method: Method) -> None:
    source = module(3, 34)
    turned = refactored(source, with_condition(3, 10.0, 8))
    merged = merge([(source, 1.0), (turned, -1.0)], method, 1.0)
    assert float(merged.norm()) <= 1e-8 * float(delta(source).norm())


def apart(values_1: Sequence[float], values_2: Sequence[float], seed: int) -> list[tuple[LoraModule, float]]:
    """Two sources with these singular values that share no direction on either side."""
    rank = len(values_1)
    left, right = (torch.linalg.qr(random(12, 2 * rank, seed=seed + k)).Q for k in (0, 1))
    return [
        (
            LoraModule(
                target=Target(parameter=NAME),
                lora_A=right[:, part].T.contiguous(),
                lora_B=left[:, part] * torch.tensor(values, dtype=torch.float64),
                alpha=float(rank),
            ),
            1.0,
        )
        for part, values in ((slice(0, rank), values_1), (slice(rank, 2 * rank), values_2))
    ]


@pytest.mark.parametrize("method", METHODS)
def test_sources_that_share_no_direction_add_up(method: Method) -> None:
    sources = apart((3.0, 1.0, 0.5), (2.0, 0.9, 0.1), 35)
    assert_same(merge(sources, method, 1.0), weighted_sum(sources))


@pytest.mark.parametrize("method", METHODS)
def test_a_basis_that_singular_values_leave_open_is_settled_by_the_delta_weights(method: Method) -> None:
    sources = apart((2.0, 2.0, 1.0), (2.0, 1.0, 1.0), 36)
    wanted = merge(sources, method, 0.3)
    for seed in range(3):
        turned = [(refactored(source, with_condition(3, 10.0, seed)), weight) for source, weight in sources]
        assert_same(merge(turned, method, 0.3), wanted)
    if method != "dare-linear" and method != "dare-ties":
        assert_same(merge(sources[::-1], method, 0.3), wanted)


def test_whole_unit_vectors_stay_whole() -> None:
    """Equal singular values everywhere: the basis is that of the units, and each source touches its own entries."""
    eye = torch.eye(6, dtype=torch.float64)
    sources = [
        (LoraModule(target=Target(parameter=NAME), lora_A=eye[rows], lora_B=eye[:, rows].clone(), alpha=2.0), 1.0)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    for method in ("ties", "knots-ties"):
        assert_same(merge(sources, method, 0.2), torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64)))


def test_the_shared_lora_A_of_a_family_gives_no_more_rank_on_that_side() -> None:
    first = module(3, 37)
    family = [(first, 1.0), (replace(module(3, 38), lora_A=first.lora_A), 1.0)]
    lora_A, lora_B = combine_in_core_space(family, "ties", density=0.5, device=CPU)
    assert lora_A.shape == (3, 11)
    assert_same(lora_B @ lora_A, reference(family, "ties", 0.5))


# Densities, seeds, shapes of the result.


@pytest.mark.parametrize("method", METHODS)
def test_a_single_source_at_density_1_comes_back(method: Method) -> None:
    source = module(4, 40)
    lora_A, lora_B = combine_in_core_space([(source, 1.0)], method, density=1.0, device=CPU)
    assert lora_A.shape == (4, 11)
    assert_same(lora_B @ lora_A, delta(source), 1e-13)


def test_dare_without_dropping_is_the_exact_weighted_sum() -> None:
    for sources in CASES.values():
        assert_same(merge(sources, "dare-linear", 1.0), weighted_sum(sources), 1e-12)


def test_dare_keeps_the_weighted_sum_on_average() -> None:
    sources = [(module(2, 41), 0.7), (module(3, 42), -0.3)]
    wanted = weighted_sum(sources)
    runs = torch.stack([merge(sources, "dare-linear", 0.5, seed=seed) for seed in range(600)])
    spread = runs.std(dim=0) / math.sqrt(600)
    assert (((runs.mean(dim=0) - wanted) / spread).abs() < 5).all()


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_a_seed_settles_what_is_dropped(method: Method) -> None:
    sources = [(module(3, 43), 1.0), (module(3, 44), 1.0)]
    torch.manual_seed(1)
    first = merge(sources, method, 0.5, seed=7)
    before = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(merge(sources, method, 0.5, seed=7), first)
    torch.manual_seed(1)
    merge(sources, method, 0.5, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.allclose(merge(sources, method, 0.5, seed=8), first)
    elsewhere = [(replace(source, target=Target(parameter="other")), weight) for source, weight in sources]
    assert not torch.allclose(merge(elsewhere, method, 0.5, seed=7), first)
    twice = [(sources[0][0], 1.0), (sources[0][0], 1.0)]
    assert not torch.allclose(merge(twice, "dare-linear", 0.5), 2 * merge(twice[:1], "dare-linear", 0.5))


@pytest.mark.parametrize("method", METHODS)
def test_singular_values_are_split_evenly_and_the_rank_is_that_of_the_merge(method: Method) -> None:
    lora_A, lora_B = combine_in_core_space(CASES["two of rank 3"], method, density=0.5, device=CPU)
    values = torch.linalg.svdvals(lora_B @ lora_A)
    rank = numerical_rank(values, 1e-9)
    assert lora_A.shape[0] == lora_B.shape[1] == rank <= 6
    for gram in (lora_A @ lora_A.T, lora_B.T @ lora_B):
        assert torch.allclose(gram, torch.diag(values[:rank]), rtol=0, atol=1e-10 * float(values[0]))


def test_directions_that_cancel_take_no_rank() -> None:
    first, second = module(3, 45), module(2, 46)
    turned = refactored(first, with_condition(3, 10.0, 9))
    sources = [(first, 1.0), (second, 1.0), (turned, -1.0)]
    lora_A, lora_B = combine_in_core_space(sources, "dare-linear", density=1.0, device=CPU)
    assert lora_A.shape[0] == 2
    assert_same(lora_B @ lora_A, delta(second))


def test_the_rank_is_at_most_that_of_the_weight() -> None:
    for method in METHODS:
        lora_A, lora_B = combine_in_core_space(CASES["more rank than the weight has"], method, density=0.9, device=CPU)
        assert lora_A.shape[0] == lora_B.shape[1] <= 5


@pytest.mark.parametrize("method", METHODS)
def test_the_default_density_is_that_of_the_method(method: Method) -> None:
    sources = CASES["two of rank 3"]
    assert torch.equal(merge(sources, method), merge(sources, method, DEFAULT_DENSITY[method]))


@pytest.mark.parametrize("method", METHODS)
def test_each_expert_is_merged_on_its_own(method: Method) -> None:
    stacks = [
        replace(
            module(rank, seed),
            kind=Kind.PARAMETER,
            lora_A=random(3, rank, 7, seed=seed),
            lora_B=random(3, 5, rank, seed=seed + 1),
        )
        for rank, seed in ((2, 50), (1, 60))
    ]
    stacks[0].lora_B[2] = 0.0
    lora_A, lora_B = combine_in_core_space([(stacks[0], 1.0), (stacks[1], 0.5)], method, density=0.5, device=CPU)
    assert lora_A.shape[0] == lora_B.shape[0] == 3
    for expert in range(3):
        alone = [
            (replace(stack, kind=Kind.LINEAR, lora_A=stack.lora_A[expert], lora_B=stack.lora_B[expert]), weight)
            for stack, weight in zip(stacks, (1.0, 0.5), strict=True)
        ]
        merged = lora_B[expert] @ lora_A[expert]
        if method in ("ties", "knots-ties"):
            assert_same(merged, reference(alone, method, 0.5))
        elif expert == 0:
            assert_same(merged, merge(alone, method, 0.5))
    if method == "dare-linear":
        same = [
            replace(stack, lora_A=stack.lora_A[:1].repeat(2, 1, 1), lora_B=stack.lora_B[:1].repeat(2, 1, 1))
            for stack in stacks
        ]
        lora_A, lora_B = combine_in_core_space([(stack, 1.0) for stack in same], method, density=0.5, device=CPU)
        assert not torch.allclose(lora_B[0] @ lora_A[0], lora_B[1] @ lora_A[1])


# Nothing to merge, and what is refused.


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_zeros_gives_a_zero_of_rank_1(method: Method) -> None:
    nothing = replace(module(3, 70), lora_B=torch.zeros(9, 3))
    for sources in ([(nothing, 1.0)], [(nothing, 1.0), (module(2, 71), 0.0)]):
        lora_A, lora_B = combine_in_core_space(sources, method, device=CPU)
        assert (lora_A.shape, lora_B.shape) == ((1, 11), (9, 1))
        assert not lora_A.any()
        assert not lora_B.any()


@pytest.mark.parametrize("method", METHODS)
def test_sources_of_very_different_strength_merge_without_loss(method: Method) -> None:
    sources = [(module(3, 72), 1.0), (module(2, 73), 1e-6)]
    assert_same(merge(sources, method, 0.4), reference(sources, method, 0.4))
    for scale in (1e-100, 1e100):
        scaled = [(source, scale * weight) for source, weight in sources]
        assert_same(merge(scaled, method, 0.4), scale * merge(sources, method, 0.4))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_sources_are_merged_in_float64(method: Method) -> None:
    sources = [
        (replace(source, lora_A=source.lora_A.to(dtype), lora_B=source.lora_B.to(dtype)), 1.0)
        for source, dtype in ((module(3, 74), torch.bfloat16), (module(2, 75), torch.float16))
    ]
    kept = [source.lora_A.clone() for source, _ in sources]
    assert_same(merge(sources, method, 0.4), reference(sources, method, 0.4))
    assert all(torch.equal(source.lora_A, before) for (source, _), before in zip(sources, kept, strict=True))


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, math.nan])
def test_a_density_outside_0_to_1_is_refused(density: float) -> None:
    with pytest.raises(OptionError, match="density"):
        merge(CASES["two of rank 3"], "ties", density)


def test_a_method_that_is_not_known_is_refused() -> None:
    with pytest.raises(OptionError, match=r"'dare': expected one of ties, dare-linear, dare-ties, knots-ties"):
        merge(CASES["two of rank 3"], "dare")  # type: ignore[arg-type]


def test_a_parameter_that_no_source_has_is_refused() -> None:
    with pytest.raises(OptionError, match="no source"):
        merge([(None, 1.0)], "ties")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_refused_by_name(method: Method) -> None:
    broken = replace(module(2, 76), lora_A=torch.full((2, 11), math.nan))
    with pytest.raises(NonFiniteError, match=f"{NAME}.lora_A"):
        merge([(module(2, 77), 1.0), (broken, 1.0)], method)


# Whole adapters.


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_is_the_merge_of_each_parameter(method: Method) -> None:
    def named(name: str, rank: int, seed: int, **fields: Any) -> LoraModule:
        return module(rank, seed, target=Target(parameter=name), **fields)

    adapters = (
        Adapter(modules=(named("q", 2, 90), named("k", 3, 91, alpha=2.0))),
        Adapter(modules=(named("v", 1, 92), named("q", 4, 93, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK))),
        Adapter(modules=(named("q", 3, 94), named("k", 2, 95), named("v", 2, 96))),
    )
    weights = (1.0, -0.5, 0.7)
    seed = 11 if method.startswith("dare") else None
    stacked = stack(adapters, weights, method=method, density=0.4, seed=seed, device="cpu").adapter
    assert [str(made.target) for made in stacked.modules] == ["q", "k", "v"]
    for made in stacked.modules:
        sources = [
            next((source for source in adapter.modules if source.target == made.target), None) for adapter in adapters
        ]
        contributions = list(zip(sources, weights, strict=True))
        assert made.scaling == 1.0
        assert_same(delta(made), reference(contributions, method, 0.4, seed or 0))
        assert_same(delta(made), merge(contributions, method, 0.4, seed=seed or 0), 1e-14)
    (entry,) = stacked.history
    assert (entry.details["method"], entry.details["density"], entry.details.get("seed")) == (method, 0.4, seed)


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_says_whose_values_are_not_finite(method: Method) -> None:
    broken = replace(module(2, 97), lora_B=torch.full((9, 2), math.inf))
    with pytest.raises(NonFiniteError, match=rf"^source 2 .*{NAME}.lora_B: 0 NaN and 18 infinite"):
        stack((Adapter(modules=(module(2, 98),)), Adapter(modules=(broken,))), method=method, device="cpu")


# How it is computed.


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return result


@pytest.mark.parametrize("method", METHODS)
def test_the_delta_weight_is_never_formed(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptertools.operations.spectra.in_parallel", map)  # a mode sees its own thread alone
    n_in, n_out, rank = 900, 700, 4
    sources = [(module(rank, 80 + k, n_in, n_out), 1.0) for k in range(3)]
    with Sizes() as sizes:
        combine_in_core_space(sources, method, device=CPU)
    assert 0 < sizes.largest <= 3 * (3 * rank) * n_in  # TIES on Σ·Vₜᵀ: one (R, in) for each source


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_the_gpu_gives_what_the_cpu_gives(method: Method) -> None:
    for sources in CASES.values():
        lora_A, lora_B = combine_in_core_space(sources, method, density=0.4, seed=3, device=torch.device("cuda"))
        assert lora_A.device.type == lora_B.device.type == "cuda"
        assert_same((lora_B @ lora_A).cpu(), merge(sources, method, 0.4, seed=3))
