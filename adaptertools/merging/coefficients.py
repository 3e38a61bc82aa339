"""How often a merge applied each adapter: least squares of W' − W over the delta weights of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

Verdict = Literal["once", "twice", "not at all", "another weight", "cannot tell"]

_NEAR = 0.1
"""How far a coefficient may be from 0, 1 or 2 to be called that."""

_PARALLEL = 1e-9
"""The share of a delta weight that has to lie off the others, so that its coefficient says something."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Inner products over the elements of a tensor, of a block of it, or of many tensors.

    Shapes: gram (k, k), found (k,), expected (k,) for k adapters
    """

    gram: Tensor
    """⟨ΔW_i, ΔW_j⟩, each with its weight"""
    found: Tensor
    """⟨W' − W, ΔW_i⟩"""
    expected: Tensor
    """the same of a right merge, with its rounding"""

    @classmethod
    def zero(cls, adapters: int) -> Self:
        return cls(
            gram=torch.zeros(adapters, adapters, dtype=torch.float64),
            found=torch.zeros(adapters, dtype=torch.float64),
            expected=torch.zeros(adapters, dtype=torch.float64),
        )

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            gram=self.gram + other.gram,
            found=self.found + other.found,
            expected=self.expected + other.expected,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficient:
    """How often an adapter was applied, in multiples of its weight.

    `expected` is what the same fit says of a right merge: less than 1 where rounding takes part of a small delta
    weight. Both are None where the adapter adds nothing, or nothing that the others do not add too.
    """

    source: str
    weight: float
    found: float | None
    expected: float | None

    @property
    def verdict(self) -> Verdict:
        if self.found is None or self.expected is None or self.expected < 3 * _NEAR:
            return "cannot tell"
        if abs(self.found - self.expected) <= _NEAR:
            return "once"
        if abs(self.found) <= _NEAR:
            return "not at all"
        return "twice" if abs(self.found - 2) <= _NEAR else "another weight"


def fit(moments: Moments, sources: Sequence[str], weights: Sequence[float]) -> tuple[Coefficient, ...]:
    """The coefficient of each adapter.

    Source: normal equations; a delta weight that lies in the span of the others is told by its Schur complement
    """
    size = moments.gram.diagonal().sqrt()
    live = [index for index in range(len(sources)) if float(size[index]) > 0]
    gram = moments.gram[live][:, live] / torch.outer(size[live], size[live])
    targets = torch.stack([moments.found[live], moments.expected[live]], dim=1) / size[live].unsqueeze(1)
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=_PARALLEL) if live else gram
    solved = (inverse @ targets) / size[live].unsqueeze(1)
    alone = _alone(gram)
    told = {index: row for row, index in enumerate(live) if alone[row]}
    return tuple(
        Coefficient(
            source=source,
            weight=weight,
            found=float(solved[told[index], 0]) if index in told else None,
            expected=float(solved[told[index], 1]) if index in told else None,
        )
        for index, (source, weight) in enumerate(zip(sources, weights, strict=True))
    )


def misapplied(coefficients: Sequence[Coefficient]) -> list[str]:
    """What is wrong although every element is as near as it has to be: small delta weights hide behind roundings."""
    return [
        f"{each.source} has coefficient {each.found:.3g} in the merge, expected {each.expected:.3g}, although each "
        "value by itself is within its roundings"
        for each in coefficients
        if each.verdict not in ("once", "cannot tell")
    ]


def _alone(gram: Tensor) -> list[bool]:
    """Whether each direction, of norm 1, has a part of its own beside the others."""
    found = []
    for index in range(len(gram)):
        others = [other for other in range(len(gram)) if other != index]
        cross = gram[index, others]
        rest = torch.linalg.pinv(gram[others][:, others], hermitian=True, rtol=_PARALLEL) if others else gram[:0, :0]
        found.append(float(1 - cross @ rest @ cross) > _PARALLEL)
    return found
