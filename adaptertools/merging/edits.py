"""What a merge does to one tensor of a model: the terms that are added to it, and what it is made of before.

Every weight is seen as a matrix (rows, columns) of the same bytes: (E·out, in) for a stack of experts, (out, in·k·k)
for a convolution, (n, 1) for a vector. An edit therefore knows neither orientation nor experts nor slots: factors stand
as the weight is stored, left = B and right = A where that is (out, in), left = Aᵀ and right = Bᵀ where it is (in, out),
and an expert or a slot of a fused projection is a block of rows or of columns.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from adaptertools.errors import ShapeError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """A low-rank addition to a block of a matrix: `scale` · left · right, from (`row`, `column`) on.

    `source` is the place of its adapter among those that are merged, `target` the name that the adapter gives it.
    `scale` is weight · scaling. A vector is added as left (n, 1) with right (1, 1) of one.

    Shapes: left (m, r), right (r, n)
    """

    source: int
    target: str
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    scale: float
    row: int = 0
    column: int = 0

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise ShapeError(
                f"{self.target}: factors of shape {tuple(self.left.shape)} and {tuple(self.right.shape)} do not "
                "multiply"
            )

    @property
    def block(self) -> tuple[slice, slice]:
        """The rows and columns that change."""
        return (
            slice(self.row, self.row + self.left.shape[0]),
            slice(self.column, self.column + self.right.shape[1]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Renormalization:
    """DoRA: weight · (m ⊙ V/‖V‖ − W), with V = W + update over the update's block of the unmerged W.

    `update.scale` is the scaling alone, without the weight. `axis` says along which axis of the stored matrix
    `magnitude` runs: it has an entry for every row, and norms are over the columns, or the reverse.

    Shapes: magnitude (m,) or (n,)
    """

    update: Update
    weight: float
    magnitude: Tensor = field(repr=False)
    axis: Literal["row", "column"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edit:
    """All that happens to one tensor, in this order.

    1. It is the base's tensor `source`, or `replacement`, which an adapter brings: a head, a resized embedding.
    2. `rows` replace rows of it: trained tokens.
    3. Updates and renormalizations are added in float32 at least, all to what 1 and 2 gave, and rounded once to
       `dtype`.

    `shape` and `dtype` are those of the result, `matrix` the rows and columns that it is seen as.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    dtype: torch.dtype
    updates: tuple[Update, ...] = ()
    renormalizations: tuple[Renormalization, ...] = ()
    replacement: Tensor | None = field(default=None, repr=False)
    rows: tuple[tuple[tuple[int, ...], Tensor], ...] = field(default=(), repr=False)
    """(indices, rows (len(indices), columns)), the later ones over the earlier"""

    def __post_init__(self) -> None:
        if (self.source is None) != (self.replacement is not None):
            raise ShapeError(f"{self.name}: it is made of a tensor of the base, or of one that replaces it")
        rows, columns = self.matrix
        if rows * columns != math.prod(self.shape):
            raise ShapeError(f"{self.name}: {self.shape} is no matrix of {rows} by {columns}")
        for update in self.changes:
            down, across = update.block
            if down.stop > rows or across.stop > columns:
                raise ShapeError(
                    f"{update.target}: a change of {tuple(update.left.shape)} by {tuple(update.right.shape)} at row "
                    f"{update.row}, column {update.column} does not lie in {self.name} {self.shape}"
                )

    @property
    def changes(self) -> tuple[Update, ...]:
        """All that is added, DoRA's included."""
        return (*self.updates, *(each.update for each in self.renormalizations))

    @property
    def adapters(self) -> frozenset[int]:
        """The places of the adapters that add to it."""
        return frozenset(update.source for update in self.changes)

    @property
    def shares_dora(self) -> bool:
        """Whether an adapter with DoRA changes elements that another adapter changes too."""
        return len(self.adapters) > 1 and any(
            _meet(each.update, other)
            for each in self.renormalizations
            for other in self.changes
            if other.source != each.update.source
        )

    @property
    def computes(self) -> bool:
        """Whether there is arithmetic to do, not only bytes to move."""
        return bool(self.updates or self.renormalizations)


def _meet(one: Update, other: Update) -> bool:
    """Whether two blocks have elements in common."""
    pairs = zip(one.block, other.block, strict=True)
    return all(mine.start < theirs.stop and theirs.start < mine.stop for mine, theirs in pairs)
