"""Element-wise merges of adapters, on small matrices in a basis that depends on their delta weights alone.

Raw factors are no place for TIES or DARE: (B·G)·(G⁻¹·A) is the same adapter for every invertible G, with other entries.
Here every contribution is first balanced, wₜ·sₜ·Bₜ·Aₜ = (Uₜ·√Σₜ)·(√Σₜ·Vₜᵀ), and U, V are the left singular vectors of
[U₁√Σ₁ … U_T√Σ_T] and [V₁√Σ₁ … V_T√Σ_T]. The core matrices Mₜ = Uᵀ·(wₜ·sₜ·Bₜ·Aₜ)·V, at most Σr by Σr, hold all there
is of the contributions, and depend on the products alone: refactoring a source, padding its rank, or moving a number
between factors, alpha and weight changes nothing. The rule makes one M of them, and the merge is U·M·Vᵀ. The signs of
singular vectors are a matter of chance, and no matter to the rules; equal singular values are settled in `joint_basis`.

    ties         each Mₜ trimmed to its largest entries; per entry, the sign of the sum; mean of those that have it
    dare-linear  entries of each Mₜ dropped at random, the rest divided by the density; sum
    dare-ties    dropped and divided likewise; sign of the sum; mean of those that have it
    knots-ties   TIES on Σ·Vₜᵀ (R, in) instead, with [w₁s₁B₁A₁ … w_T s_T B_T A_T] = U·Σ·[V₁ᵀ … V_Tᵀ]; U·(…) is the merge

The weights are part of the task vectors, and so of trimming, election and mean: equal weights λ give λ times the merge
of the paper, a weight of 0 is an absent source, a negative one votes for the opposite. (PEFT elects on the unweighted
values, which is the same for equal weights.) TIES and its kin give a mean: of two equal sources with weights of 1 the
merge is that source, where `sum` gives twice it. A source without the parameter does not vote.

This is not TIES or DARE on the entries of ΔW. The entries here are coordinates in the sources' joint singular basis,
where a few large ones hold most of each source; density counts those R by R' entries (R by in for knots-ties), for each
parameter and expert on its own, where the code of TIES and KnOTS counts the entries of the whole model at once; and the
merge has rank R or less, where TIES on ΔW has full rank. Density 1 of `dare-linear` is the exact weighted sum in both.

Source: Core Space, arXiv 2509.17786, there on stacks of unbalanced factors; TIES, arXiv 2306.01708; DARE, arXiv
        2311.03099; KnOTS, arXiv 2410.19735, with Σ on Vₜ before the merge, as its authors' code has it
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule
from adaptertools.errors import NonFiniteError, OptionError
from adaptertools.linalg import svd_of_product
from adaptertools.operations.consensus import (
    NEGLIGIBLE,
    check_density,
    consensus,
    drop_and_rescale,
    ties,
    without_rounding,
)
from adaptertools.operations.joint_basis import JointBasis, joint_basis
from adaptertools.operations.spectra import decompose

Method = Literal["ties", "dare-linear", "dare-ties", "knots-ties"]

METHODS: tuple[Method, ...] = get_args(Method)

DEFAULT_DENSITY = MappingProxyType({"ties": 0.2, "dare-linear": 0.5, "dare-ties": 0.5, "knots-ties": 0.2})
"""The top 20 % of TIES' and KnOTS' experiments. DARE drops up to 90 % of a large model; core matrices have too few
entries for that, so half of them stay."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Balanced:
    """One source's w·s·B·A as lora_B·lora_A = (U·√Σ)·(√Σ·Vᵀ), a negative sign in lora_A; sources count from 0.

    Shapes: lora_A (p, in), lora_B (out, p), singular_values (p,)
    """

    source: int
    lora_A: Tensor
    lora_B: Tensor
    singular_values: Tensor


def combine_in_core_space(
    contributions: Sequence[tuple[LoraModule | None, float]],
    method: Method,
    *,
    density: float | None = None,
    seed: int = 0,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the merge of one parameter: B·A is the merged delta weight, split evenly over both.

    `contributions` holds module and weight of every source in order, None where a source lacks the parameter. The
    modules are in one layout (`align.in_common_layout`); what they hold beside factors and scaling is left aside.
    `density` is that of DEFAULT_DENSITY where None. What DARE drops depends on seed, target, expert and the number of
    the source, not on the device or on other parameters.

    Shapes: lora_A (…, k, in), lora_B (…, out, k), with k the rank of the merge (the largest of the experts), 1 at least
    Memory: the factors of all sources twice, in float64; for knots-ties 5 matrices (R, in) a source
    Raises: OptionError for a method that is not known and for a density outside (0, 1]
            NonFiniteError that names the target
    """
    if method not in METHODS:
        raise OptionError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    kept = DEFAULT_DENSITY[method] if density is None else check_density(density)
    present = [(source, module, weight) for source, (module, weight) in enumerate(contributions) if module is not None]
    if not present:
        raise OptionError("no source has the parameter: there is nothing to merge")
    target = present[0][1].target
    merged = []
    for expert, sources in enumerate(_balanced(present, device)):
        if method == "knots-ties":
            merged.append(_combine_right_parts(sources, kept))
        else:
            merged.append(_combine_cores(sources, method, kept, f"{seed}\0{target}\0{expert}"))
    rank = max(lora_A.shape[0] for lora_A, _ in merged)
    lora_A = torch.stack([_widened(lora_A, rank, dim=0) for lora_A, _ in merged])
    lora_B = torch.stack([_widened(lora_B, rank, dim=1) for _, lora_B in merged])
    if not bool(torch.isfinite(lora_A).all() & torch.isfinite(lora_B).all()):
        raise NonFiniteError(f"{target}: the merge is beyond the range of float64")
    return (lora_A, lora_B) if present[0][1].experts is not None else (lora_A[0], lora_B[0])


def _balanced(contributions: Sequence[tuple[int, LoraModule, float]], device: torch.device) -> list[list[_Balanced]]:
    """The contributions to each expert, with singular values split evenly; a plain module counts as one expert."""
    decompositions = decompose([module for _, module, _ in contributions], device)
    experts: list[list[_Balanced]] = [[] for _ in range(contributions[0][1].experts or 1)]
    for (source, module, weight), decomposition in zip(contributions, decompositions, strict=True):
        strength = weight * module.scaling
        values = decomposition.singular_values.to(device)
        root = math.sqrt(abs(strength))
        lora_A, lora_B = decomposition.factors(module.lora_A.to(device), module.lora_B.to(device), values.shape[-1])
        lora_A *= math.copysign(root, strength)
        lora_B *= root
        parts = zip(*(_by_expert(part, module) for part in (lora_A, lora_B, abs(strength) * values)), strict=True)
        for expert, (one_A, one_B, one_values) in zip(experts, parts, strict=True):
            expert.append(_Balanced(source=source, lora_A=one_A, lora_B=one_B, singular_values=one_values))
    return experts


def _by_expert(part: Tensor, module: LoraModule) -> Tensor:
    return part if module.experts is not None else part.unsqueeze(0)


def _combine_cores(sources: Sequence[_Balanced], method: Method, density: float, key: str) -> tuple[Tensor, Tensor]:
    """The merge by the R by R' core matrices, as factors of its own rank."""
    stacked_A = torch.cat([source.lora_A for source in sources])
    stacked_B = torch.cat([source.lora_B for source in sources], dim=1)
    left, right = joint_basis(stacked_B), joint_basis(stacked_A.mT)
    if not left.rank or not right.rank:
        return torch.zeros_like(stacked_A[:1]), torch.zeros_like(stacked_B[:, :1])
    cores = torch.stack(
        [ours @ theirs.mT for ours, theirs in zip(_each(left, sources), _each(right, sources), strict=True)]
    )
    cores = without_rounding(cores)
    if method == "ties":
        core = ties(cores, density)
    else:
        dropped = drop_and_rescale(cores, density, _chances(cores, [source.source for source in sources], key))
        core = dropped.sum(dim=0) if method == "dare-linear" else consensus(dropped)
    U, values, Vh = torch.linalg.svd(core, full_matrices=False)
    rank = _rank(values)
    half = values[:rank].sqrt()
    # U_joint·(U·√S) = stacked_B·combination·(U·√S), and likewise on the other side
    lora_A = (half.unsqueeze(1) * Vh[:rank] @ right.combination.mT).to(stacked_A.device) @ stacked_A
    lora_B = stacked_B @ (left.combination @ (U[:, :rank] * half)).to(stacked_B.device)
    return lora_A, lora_B


def _combine_right_parts(sources: Sequence[_Balanced], density: float) -> tuple[Tensor, Tensor]:
    """The merge by TIES on Σ·Vₜᵀ, as factors of its own rank.

    U and Σ are those of [U₁Σ₁ … U_TΣ_T], since the Vₜ of the sources are orthonormal; Σ·Vₜᵀ is Uᵀ·(w·s·Bₜ·Aₜ).
    """
    halves = [source.singular_values.sqrt() for source in sources]
    columns = torch.cat([source.lora_B * half for source, half in zip(sources, halves, strict=True)], dim=1)
    left = joint_basis(columns)
    if not left.rank:
        return torch.zeros_like(sources[0].lora_A[:1]), torch.zeros_like(columns[:, :1])
    right_parts = torch.stack(
        [
            coordinates.to(columns.device) @ (source.lora_A * torch.where(half > 0, 1 / half, 0.0).unsqueeze(1))
            for coordinates, source, half in zip(_each(left, sources), sources, halves, strict=True)
        ]
    )
    combined = ties(without_rounding(right_parts), density)
    basis = columns @ left.combination.to(columns.device)
    decomposition = svd_of_product(combined, basis)
    return decomposition.factors(combined, basis, _rank(decomposition.singular_values))


def _rank(singular_values: Tensor) -> int:
    return max(1, int((singular_values > NEGLIGIBLE * singular_values[0]).sum()))


def _each(basis: JointBasis, sources: Sequence[_Balanced]) -> Sequence[Tensor]:
    """The coordinates of each source's columns."""
    return torch.split(basis.coordinates, [source.singular_values.shape[0] for source in sources], dim=1)


def _chances(cores: Tensor, sources: Sequence[int], key: str) -> Tensor:
    """Uniform numbers for each entry of each core matrix, the same for the same key and number of the source."""
    drawn = []
    for source in sources:
        digest = hashlib.sha256(f"{key}\0{source}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        drawn.append(torch.rand(cores.shape[1:], generator=generator, dtype=cores.dtype))
    return torch.stack(drawn)


def _widened(factor: Tensor, rank: int, *, dim: int) -> Tensor:
    """The factor with zeros up to this rank."""
    missing = rank - factor.shape[dim]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing) if dim == 0 else (0, missing))
