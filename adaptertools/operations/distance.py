"""Two products of factors beside one another: norms, distance and cosine, without forming either.

The factors may be of any gauge and rank; they are compared in float64 as B·A, whose digits decide, not those of B or A.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from adaptertools.linalg import balance_, triangle


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """The norms of two products, the norm of their difference, and the cosine between them: NaN where one is zero.

    Shapes: all (…), one for each pair of a batch
    """

    norm: Tensor
    other_norm: Tensor
    distance: Tensor
    cosine: Tensor


@dataclass(slots=True, eq=False)
class _Columns:
    """Columns `values`·2^`exponents`: adapters may hold 1e30 in one factor and 1e-30 in the other.

    Shapes: values (…, n, r), exponents (…, r)
    """

    values: Tensor
    exponents: Tensor

    @classmethod
    def side_by_side(cls, one: Tensor, other: Tensor) -> Self:
        rank, other_rank = one.shape[-1], other.shape[-1]
        transposed = (*one.shape[:-2], rank + other_rank, one.shape[-2])
        values = one.new_empty(transposed, dtype=torch.float64).mT  # columns in a row, as LAPACK takes them
        values[..., :rank], values[..., rank:] = one, other
        return cls(values, balance_(values))

    def __getitem__(self, columns: slice) -> Self:
        """Some columns, of which those here keep the memory."""
        return type(self)(self.values[..., columns], self.exponents[..., columns])

    def minus(self, other: Self) -> Self:
        exponents = torch.maximum(self.exponents, other.exponents)
        step = self.values * torch.exp2(self.exponents - exponents).unsqueeze(-2)
        step.addcmul_(other.values, torch.exp2(other.exponents - exponents).unsqueeze(-2), value=-1)
        return type(self)(step, exponents + balance_(step))

    def replace(self, chosen: Tensor, other: Self) -> None:
        """Put the chosen ones of the other columns in the place of these."""
        if bool(chosen.any()):
            self.values.copy_(torch.where(chosen.unsqueeze(-2), other.values, self.values))
            self.exponents.copy_(torch.where(chosen, other.exponents, self.exponents))

    def scale(self, weight: float, power: int) -> None:
        self.values.mul_(weight)
        self.exponents.add_(power)

    def sizes(self) -> Tensor:
        """The binary logarithm of each column's largest element, rounded up; its square may have no float."""
        largest = torch.maximum(self.values.amax(dim=-2), -self.values.amin(dim=-2))
        return self.exponents.masked_fill(largest == 0, -torch.inf)


class _Core(NamedTuple):
    """A small matrix `values`·2^`exponent`, with the norm and the inner products of the products that it stands for.

    Shapes: values (…, k, k'), exponent (…, 1, 1)
    """

    values: Tensor
    exponent: Tensor

    @classmethod
    def of(cls, lefts: Tensor, rights: Tensor, exponents: Tensor) -> Self:
        """lefts·2^exponents·rightsᵀ."""
        largest = exponents.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
        return cls((lefts * torch.exp2(exponents - largest).unsqueeze(-2)) @ rights.mT, largest.unsqueeze(-1))

    def plus(self, other: Self, sign: int = 1) -> "_Core":
        exponent = torch.maximum(self.exponent, other.exponent)
        ours, theirs = (core.values * torch.exp2(core.exponent - exponent) for core in (self, other))
        return _Core(ours + sign * theirs, exponent)

    def norm_and_direction(self) -> tuple[Tensor, Tensor]:
        """The norm, and the matrix divided by it; NaN for the direction of zero."""
        size = self.values.abs().amax(dim=(-2, -1), keepdim=True)
        ones = self.values / torch.where(size == 0, 1.0, size)  # so that no square underflows
        norm = torch.linalg.matrix_norm(ones, keepdim=True)
        return torch.ldexp(norm * size, self.exponent)[..., 0, 0], ones / norm


def compare_products(
    lora_A: Tensor,
    lora_B: Tensor,
    other_A: Tensor,
    other_B: Tensor,
    *,
    scaling: float = 1.0,
    other_scaling: float = 1.0,
) -> Comparison:
    """s·B·A beside s'·B'·A' in the Frobenius norm, one for each pair of a batch; NaN where a factor is not finite.

    With the QR factorisations [s·B, s'·B'] = Q·L and [Aᵀ, −A'ᵀ] = P·R the difference of the products has the norm of
    L·Rᵀ, and each product that of its blocks: one pair of triangles tells all, whatever the gauge of the factors. Where
    a column b of B and its row a of A lie near those of the other product, (b − b')·a + b'·(a − a') stands for their
    part of the difference, in which nothing cancels. So the distance is right to float64's epsilon times itself for
    factors that nearly agree; for any others to epsilon times ‖B‖·‖A‖, both balanced.

    Shapes: lora_A (…, r, in), lora_B (…, out, r), other_A (…, r', in), other_B (…, out, r')
    Memory: a few copies of the factors in float64
    """
    rank, paired = lora_A.shape[-2], min(lora_A.shape[-2], other_A.shape[-2])
    lefts, rights = _Columns.side_by_side(lora_B, other_B), _Columns.side_by_side(lora_A.mT, other_A.mT)
    left, other_left, right, other_right = lefts[:rank], lefts[rank:], rights[:rank], rights[rank:]
    (weight, power), (other_weight, other_power) = math.frexp(scaling), math.frexp(other_scaling)
    common = 1.0
    if weight == other_weight:  # it waits until the end: products with it would be rounded before they are subtracted
        common, weight, other_weight = abs(weight), 1.0, 1.0
    left.scale(weight, power)
    other_left.scale(other_weight, other_power)

    b, other_b, a, other_a = (columns[:paired] for columns in (left, other_left, right, other_right))
    left_step, right_step = b.minus(other_b), a.minus(other_a)
    one_size, other_size = b.sizes() + a.sizes(), other_b.sizes() + other_a.sizes()
    step_size = torch.maximum(left_step.sizes() + a.sizes(), other_b.sizes() + right_step.sizes())
    near = (step_size < torch.maximum(one_size, other_size)) & torch.isfinite(one_size + other_size)
    between = torch.where(near, other_b.exponents + a.exponents, -torch.inf)
    other_right.scale(-1.0, 0)
    b.replace(near, left_step)
    other_a.replace(near, right_step)

    L, R = triangle(lefts.values), triangle(rights.values)
    exponents = lefts.exponents + rights.exponents
    ours = _Core.of(L[..., :rank], R[..., :rank], exponents[..., :rank])
    theirs = _Core.of(L[..., rank:], R[..., rank:], exponents[..., rank:])
    shared = _Core.of(L[..., rank : rank + paired], R[..., :paired], between)

    norm, direction = ours.plus(shared).norm_and_direction()
    other_norm, other_direction = shared.plus(theirs, sign=-1).norm_and_direction()
    distance, _ = ours.plus(theirs).norm_and_direction()
    norm, other_norm, distance = norm * common, other_norm * common, distance * common
    cosine = (direction * other_direction).sum(dim=(-2, -1)).clamp(-1.0, 1.0)
    return Comparison(
        norm=norm,
        other_norm=other_norm,
        distance=distance,
        cosine=torch.where((norm == 0) | (other_norm == 0), torch.nan, cosine),
    )
