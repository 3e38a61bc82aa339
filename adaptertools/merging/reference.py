"""What a merged tensor has to be: W + Σ ΔW in float64, by blocks of rows, with how far float32 arithmetic may be off.

It shares no arithmetic with kernels.py, so that it can judge it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptertools.merging.edits import Edit, Renormalization, Update

_DOUBT = 8
"""Epsilons of ‖row of left‖·‖column of right‖ that a product may be off: twice what float32 GEMMs are seen to be."""

BLOCK_ELEMENTS = 1 << 16
"""Elements of a block of rows; each worker holds about ten such blocks in float64, and these fit its cache."""

_DEVICE_ELEMENTS = 1 << 23
"""The same for a GPU, where each operation on a block costs a launch."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Doubt:
    """What bounds the rounding of a product in a part of the block: `scale` · (|product| + _DOUBT · left · right).

    `left` has a number for each row and `right` one for each column, or the two are one matrix and None.
    """

    inside: tuple[slice, slice]
    scale: float
    product: Tensor | None
    left: Tensor
    right: Tensor | None

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """For these elements of the block, zero for those outside the part."""
        found = torch.zeros(len(rows), dtype=self.left.dtype, device=self.left.device)
        within, row, column = _within(self.inside, rows, columns)
        bound = self.left[row, column] if self.right is None else self.left[row] * self.right[column]
        size = 0.0 if self.product is None else self.product[row, column].abs()
        found[within] = self.scale * (_DOUBT * bound + size)
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Renormalized:
    """What `weight` · (gain ⊙ V − W) in a part of the block was made of, with V = W + `product`."""

    inside: tuple[slice, slice]
    weight: float
    product: Tensor
    new: Tensor
    gain: Tensor

    def at(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which of these elements of the block lie in the part; product, V and weight · gain of those."""
        within, row, column = _within(self.inside, rows, columns)
        gain = self.gain.expand_as(self.new)[row, column]
        return within, self.product[row, column], self.new[row, column], self.weight * gain


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactRows:
    """Rows of a tensor as they have to be, in float64.

    `before` is what the delta weights are added to, `deltas` what each adapter adds, by its place among them.
    """

    before: Tensor
    deltas: Mapping[int, Tensor]
    doubts: Sequence[Doubt]
    renormalized: Sequence[Renormalized]
    epsilon: float
    """Of the arithmetic that makes a merge: float32, or float64 where a weight or a factor is."""

    @property
    def value(self) -> Tensor:
        total = self.before.clone()
        for delta in self.deltas.values():
            total += delta
        return total

    def doubt(self, rows: Tensor, columns: Tensor) -> Tensor:
        """How far a merge may be from the value of these elements before it is rounded."""
        total = self.before[rows, columns].abs()
        for each in self.doubts:
            total += each.at(rows, columns)
        return total * self.epsilon


class Reference:
    """An edit, ready to say what any block of rows has to be. It may be asked from several threads.

    Memory: the right factors in float64
    """

    def __init__(self, edit: Edit, weight: Tensor | None, device: torch.device) -> None:
        source = edit.replacement if edit.replacement is not None else weight
        assert source is not None
        self.edit = edit
        self._device = device
        self._source = source.reshape(edit.matrix)
        self._epsilon = torch.finfo(_arithmetic(edit, source.dtype)).eps
        updates = (*edit.updates, *(each.update for each in edit.renormalizations))
        wide = [update.right.to(device, torch.float64) for update in updates]
        self._right = {id(update): (right, right.norm(dim=0)) for update, right in zip(updates, wide, strict=True)}
        self._norms = {
            index: self._column_norms(each) for index, each in enumerate(edit.renormalizations) if each.axis == "column"
        }

    @property
    def block_rows(self) -> int:
        elements = BLOCK_ELEMENTS if self._device.type == "cpu" else _DEVICE_ELEMENTS
        return max(1, elements // max(1, self.edit.matrix[1]))

    def rows(self, start: int, stop: int) -> ExactRows:
        """Rows `start` to `stop`.

        Memory: some blocks of these rows in float64
        """
        before = self._before(start, stop)
        deltas: dict[int, Tensor] = {}
        doubts, renormalized = [], []
        for update in self.edit.updates:
            if found := self._product(update, start, stop):
                inside, product, left, right = found
                _zeros(deltas, update.source, before)[inside].add_(product, alpha=update.scale)
                doubts.append(Doubt(inside=inside, scale=abs(update.scale), product=product, left=left, right=right))
        for index, each in enumerate(self.edit.renormalizations):
            if found_too := self._renormalized(index, each, before, start, stop):
                part, change, off = found_too
                _zeros(deltas, each.update.source, before)[part.inside] += change
                doubts.append(Doubt(inside=part.inside, scale=1.0, product=None, left=off, right=None))
                renormalized.append(part)
        return ExactRows(before=before, deltas=deltas, doubts=doubts, renormalized=renormalized, epsilon=self._epsilon)

    def _before(self, start: int, stop: int) -> Tensor:
        """Rows of W in float64, trained rows in their place."""
        rows = self._source[start:stop].to(self._device).to(torch.float64, copy=True)
        for indices, trained in self.edit.rows:
            for row, values in zip(indices, trained, strict=True):
                if start <= row < stop:
                    rows[row - start] = values.to(rows)
        return rows

    def _product(
        self, update: Update, start: int, stop: int
    ) -> tuple[tuple[slice, slice], Tensor, Tensor, Tensor] | None:
        """Where these rows of left · right stand in the block, they themselves, and the norms that bound rounding."""
        down, across = update.block
        first, last = max(start, down.start), min(stop, down.stop)
        inside = (slice(first - start, last - start), across)
        if first >= last:
            return None
        left = update.left[first - update.row : last - update.row].to(self._device, torch.float64)
        right, size = self._right[id(update)]
        return inside, left @ right, left.norm(dim=1), size

    def _renormalized(
        self, index: int, each: Renormalization, before: Tensor, start: int, stop: int
    ) -> tuple[Renormalized, Tensor, Tensor] | None:
        """The same of weight · (m ⊙ V/‖V‖ − W), with what bounds the rounding of each element."""
        found = self._product(each.update, start, stop)
        if found is None:
            return None
        inside, product, left, right = found
        old = before[inside]
        product *= each.update.scale
        new = old + product
        magnitude = each.magnitude.to(self._device, torch.float64)
        if each.axis == "row":
            first = start + inside[0].start - each.update.row
            gain = magnitude[first : first + len(new)].unsqueeze(1) / new.norm(dim=1, keepdim=True)
        else:
            gain = magnitude / self._norms[index]
        off = gain.abs() * (old.abs() + abs(each.update.scale) * torch.outer(left, right)) + old.abs()
        part = Renormalized(inside=inside, weight=each.weight, product=product, new=new, gain=gain)
        return part, each.weight * (gain * new - old), abs(each.weight) * off

    def _column_norms(self, each: Renormalization) -> Tensor:
        """‖V‖ of each column, from a pass over all rows."""
        squares = torch.zeros(each.update.right.shape[1], dtype=torch.float64, device=self._device)
        for start in range(0, self.edit.matrix[0], self.block_rows):
            stop = min(start + self.block_rows, self.edit.matrix[0])
            if found := self._product(each.update, start, stop):
                inside, product, _, _ = found
                value = self._before(start, stop)[inside] + each.update.scale * product
                squares += value.square().sum(dim=0)
        return squares.sqrt()


def _within(inside: tuple[slice, slice], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which elements lie in a part of the block, and the rows and columns of those there."""
    down, across = inside
    within = (rows >= down.start) & (rows < down.stop) & (columns >= across.start) & (columns < across.stop)
    return within, rows[within] - down.start, columns[within] - across.start


def _zeros(deltas: dict[int, Tensor], source: int, like: Tensor) -> Tensor:
    if source not in deltas:
        deltas[source] = torch.zeros_like(like)
    return deltas[source]


def _arithmetic(edit: Edit, weight: torch.dtype) -> torch.dtype:
    """The dtype that a merge computes in."""
    updates = (*edit.updates, *(each.update for each in edit.renormalizations))
    dtypes = {weight, *(update.left.dtype for update in updates), *(update.right.dtype for update in updates)}
    return torch.float64 if torch.float64 in dtypes else torch.float32
