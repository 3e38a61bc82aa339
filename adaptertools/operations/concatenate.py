"""The weighted sum of several modules' delta weights as one module: Σ cᵢ·Bᵢ·Aᵢ = [c₁B₁ c₂B₂ …]·[A₁; A₂; …].

A coefficient c is weight · scaling. What the coefficients of a module have in common goes into alpha, so that factors
keep their bits; powers of two fold without loss; only the rest is rounded, once, and its error measured. Sources with
the same lora_A, or the same lora_B, add up in the other factor and take no rank of their own.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Self, TypeVar

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule, ScaleRule
from adaptertools.errors import ConfigError
from adaptertools.operations.sum_error import EXACT, SumError, delta_error
from adaptertools.operations.weighted_sum import Part, plain, same_values, side_by_side
from adaptertools.tensors import all_finite

Item = TypeVar("Item")

_STATED = 2.0**-52
"""The relative error up to which an alpha counts as stating a scaling: that of float64's rounding."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contribution:
    """What one source adds to a weight: `weight` times the delta weight of `module`."""

    source: str
    module: LoraModule
    weight: float

    @property
    def coefficient(self) -> Fraction:
        """What lora_B · lora_A is multiplied by, without rounding."""
        return Fraction(self.weight) * Fraction(self.module.scaling)

    def part(self, name: str, factor: Fraction = Fraction(1)) -> Part:
        """One of the module's tensors, to be multiplied by `factor`."""
        label = f"{self.source}: {self.module.target}.{name}"
        return Part(name=label, tensor=plain(self.module.tensors[name]), factor=factor)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sum:
    """A module that holds the sum, and what rounding made of it."""

    module: LoraModule
    error: SumError = EXACT


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """One term, (Σ of the parts of B)·(Σ of the parts of A): one of them is a single part with the factor 1."""

    lora_A: tuple[Part, ...]
    lora_B: tuple[Part, ...]

    @property
    def rank(self) -> int:
        return self.lora_A[0].tensor.shape[-2]

    @property
    def factors(self) -> tuple[Fraction, ...]:
        """The coefficients, whichever side they are on."""
        return tuple(part.factor for part in (self.lora_B if len(self.lora_A) == 1 else self.lora_A))

    def over(self, common: Fraction) -> "_Block":
        """The block with every coefficient divided by what goes into alpha."""
        if len(self.lora_A) == 1:
            return replace(self, lora_B=tuple(replace(part, factor=part.factor / common) for part in self.lora_B))
        return replace(self, lora_A=tuple(replace(part, factor=part.factor / common) for part in self.lora_A))


class Terms:
    """What a sum will consist of, so that its rank is known before it is computed.

    `contributions` are of one target and one layout, one at least; those that add nothing take no rank: of coefficient
    0, or with a lora_B of zeros.
    """

    def __init__(self, contributions: Sequence[Contribution]) -> None:
        self.contributions = [one for one in contributions if one.coefficient] or list(contributions[:1])
        self.first = self.contributions[0].module
        self.device = self.first.lora_A.device
        acting = [one for one in self.contributions if one.coefficient and not _is_idle(one.module)]
        self._blocks = _blocks(acting or self.contributions)
        self.cancel = bool(acting) and not self._blocks

    @property
    def rank(self) -> int:
        """The rank of the sum; 1 where all terms cancel."""
        if len(self.contributions) == 1:
            return self.first.rank
        return sum(block.rank for block in self._blocks) or self.first.kernel_fold

    def add(self, rank: int, *, dtype: torch.dtype | None = None, allow_nonfinite: bool = False) -> Sum:
        """The sum, padded with zeros to `rank`. What one source has alone keeps its bits, its weight going into alpha.

        Factors that cannot hold their part of the sum exactly in half precision become float32, unless `dtype` says
        what all are to be. They are made on the CPU, and go where those of the first contribution are.

        Memory: the new factors
        Raises: NonFiniteError; OptionError for weights that leave the range of float64
        """
        if len(self.contributions) == 1 and rank == self.rank:
            scaled = _scaled(self.contributions[0])
            return scaled if dtype is None else _cast(scaled, dtype, allow_nonfinite)
        common, alpha, slip = _common(self._blocks, rank // self.first.kernel_fold)
        blocks = [block.over(common) for block in self._blocks]
        shape_A, shape_B = list(self.first.lora_A.shape), list(self.first.lora_B.shape)
        shape_A[-2] = shape_B[-1] = rank
        wanted = dtype if blocks else dtype or self.first.lora_A.dtype
        sides = ([block.lora_A for block in blocks], shape_A, -2), ([block.lora_B for block in blocks], shape_B, -1)
        (lora_A, error_A), (lora_B, error_B) = (
            side_by_side(*side, dtype=wanted, allow_nonfinite=allow_nonfinite) for side in sides
        )
        delta, estimated = slip, False
        if error_A or error_B:
            meant_A, meant_B = (
                side_by_side(*side, dtype=torch.float64, allow_nonfinite=True)[0] if error else stored
                for side, error, stored in zip(sides, (error_A, error_B), (lora_A, lora_B), strict=True)
            )
            off, estimated = delta_error(meant_A, meant_B, lora_A, lora_B)
            delta += off
        lora_bias, error_bias = self._bias(common, dtype, allow_nonfinite)
        module = replace(
            self.first,
            lora_A=lora_A.to(self.device),
            lora_B=lora_B.to(self.device),
            alpha=alpha,
            scale_rule=ScaleRule.ALPHA_OVER_RANK,
            lora_bias=None if lora_bias is None else lora_bias.to(self.device),
        )
        element = max(_product_error(error_A, error_B), error_bias) + slip
        return Sum(module=module, error=SumError(element=element, delta=delta, estimated=estimated))

    def _bias(self, common: Fraction, dtype: torch.dtype | None, allow_nonfinite: bool) -> tuple[Tensor | None, float]:
        holders = [one for one in self.contributions if one.module.lora_bias is not None]
        if not holders:
            return None, 0.0
        terms = [_Term.of(ones) for ones in _alike(holders, lambda one: one.module.lora_bias)]
        parts = tuple(t.contribution.part("lora_bias", t.coefficient / common) for t in terms if t.coefficient)
        if not parts:
            return torch.zeros(self.first.out_features, dtype=dtype or self.first.lora_B.dtype), 0.0
        return side_by_side([parts], [self.first.out_features], 0, dtype=dtype, allow_nonfinite=allow_nonfinite)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Term:
    """What contributions with the same tensors add up to."""

    contribution: Contribution
    coefficient: Fraction

    @classmethod
    def of(cls, alike: Sequence[Contribution]) -> Self:
        return cls(contribution=alike[0], coefficient=sum((one.coefficient for one in alike), start=Fraction()))


def _blocks(contributions: Sequence[Contribution]) -> list[_Block]:
    """The terms, those with the same lora_A or the same lora_B made one, without those that cancel."""
    families = []
    for family in _alike(contributions, lambda one: one.module.lora_A):
        terms = [_Term.of(ones) for ones in _alike(family, lambda one: one.module.lora_B)]
        families.append([term for term in terms if term.coefficient])
    families = [family for family in families if family]
    return [
        _block(group)
        for group in _alike(families, lambda terms: terms[0].contribution.module.lora_B if len(terms) == 1 else None)
    ]


def _block(families: Sequence[Sequence[_Term]]) -> _Block:
    """One family with the same lora_A, or several of a single term with the same lora_B."""
    first = families[0][0].contribution
    if len(families) == 1:
        parts = tuple(term.contribution.part("lora_B", term.coefficient) for term in families[0])
        return _Block(lora_A=(first.part("lora_A"),), lora_B=parts)
    parts = tuple(term.contribution.part("lora_A", term.coefficient) for (term,) in families)
    return _Block(lora_A=parts, lora_B=(first.part("lora_B"),))


def _alike(items: Sequence[Item], tensor: Callable[[Item], Tensor | None]) -> list[list[Item]]:
    """The items by their tensor's values, in the order of the first of each; those without a tensor on their own."""
    groups: list[tuple[Tensor | None, list[Item]]] = []
    for item in items:
        own = tensor(item)
        found = (group for other, group in groups if own is not None and other is not None and same_values(own, other))
        group = next(found, None)
        if group is None:
            groups.append((own, [item]))
        else:
            group.append(item)
    return [group for _, group in groups]


def _common(blocks: Sequence[_Block], rank: int) -> tuple[Fraction, float, float]:
    """What to divide all coefficients by, the alpha that states it, and that alpha's relative error.

    Where they differ by powers of two alone, that is the first; else 1, and every factor is folded.
    """
    factors = [abs(factor) for block in blocks for factor in block.factors]
    if factors and all(_is_power_of_two(factor / factors[0]) for factor in factors):
        stated = _alpha(factors[0], rank)
        if stated is not None:
            return factors[0], *stated
    return Fraction(1), float(rank), 0.0


def _alpha(scaling: Fraction, rank: int) -> tuple[float, float] | None:
    """The alpha that gives the scaling at this rank, and its relative error; None where float64 has none."""
    try:
        alpha = ScaleRule.ALPHA_OVER_RANK.alpha(float(scaling), rank)
    except (OverflowError, ConfigError):
        return None
    error = abs(Fraction(alpha / rank) / scaling - 1)
    return (alpha, float(error)) if error <= _STATED and alpha >= sys.float_info.min else None


def _is_power_of_two(ratio: Fraction) -> bool:
    return all(number & (number - 1) == 0 for number in (ratio.numerator, ratio.denominator))


def _scaled(only: Contribution) -> Sum:
    """One source's module: as it is, or with the weight in alpha and its sign in lora_B."""
    module, weight = only.module, Fraction(only.weight)
    if weight == 1:
        return Sum(module=module)
    alpha = Part(
        name=f"{only.source}: {module.target}", tensor=module.lora_B, factor=Fraction(module.alpha) * abs(weight)
    )
    changed = replace(module, alpha=alpha.number)
    if weight < 0:
        bias = module.lora_bias
        changed = replace(changed, lora_B=_negative(module.lora_B), lora_bias=None if bias is None else _negative(bias))
    meant = abs(only.coefficient)
    slip = float(abs(abs(Fraction(changed.scaling)) / meant - 1)) if meant else 0.0
    return Sum(module=changed, error=SumError(element=slip, delta=slip))


def _negative(tensor: Tensor) -> Tensor:
    return -plain(tensor).to(tensor.device)


def _cast(done: Sum, dtype: torch.dtype, allow_nonfinite: bool) -> Sum:
    """The same with every tensor rounded to the dtype."""

    def rounded(name: str) -> tuple[Tensor, float]:
        tensor = done.module.tensors[name]
        if tensor.dtype == dtype:
            return tensor, 0.0
        sums = [(Part(name=f"{done.module.target}.{name}", tensor=plain(tensor)),)]
        made, error = side_by_side(sums, tensor.shape, 0, dtype=dtype, allow_nonfinite=allow_nonfinite)
        return made.to(tensor.device), error

    (lora_A, error_A), (lora_B, error_B) = rounded("lora_A"), rounded("lora_B")
    lora_bias, error_bias = rounded("lora_bias") if done.module.lora_bias is not None else (None, 0.0)
    changed = replace(done.module, lora_A=lora_A, lora_B=lora_B, lora_bias=lora_bias)
    delta, estimated = done.error.delta, False
    if error_A or error_B:
        factors = (done.module.lora_A, done.module.lora_B, lora_A, lora_B)
        off, estimated = delta_error(*(plain(factor) for factor in factors))
        delta += off
    element = done.error.element + max(_product_error(error_A, error_B), error_bias)
    return Sum(module=changed, error=SumError(element=element, delta=delta, estimated=estimated))


def _is_idle(module: LoraModule) -> bool:
    """Whether the delta weight is zero since lora_B is, as before training; looked at closely only if it begins so."""
    beginning = module.lora_B[..., :1, :]
    return not (_any(beginning) or _any(module.lora_B)) and all_finite(module.lora_A)


def _any(tensor: Tensor) -> bool:
    return bool(plain(tensor).any())


def _product_error(error_A: float, error_B: float) -> float:
    return error_A + error_B + error_A * error_B
