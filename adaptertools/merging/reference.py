"""What a merged tensor has to be: W + Σ ΔW in float64, by blocks of rows, with how far float32 arithmetic may be off.

It shares no arithmetic with kernels.py, so that it can judge it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptertools.merging.edits import Edit, Renormalization, Update
from adaptertools.merging.scratch import scratch

_DOUBT = 8
"""Epsilons of ‖row of left‖·‖column of right‖ that a product may be off: twice what float32 GEMMs are seen to be."""

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block of rows; each worker holds about ten such blocks in float64. Products of fewer rows are slow."""

_DEVICE_ELEMENTS = 1 << 23
"""The same for a GPU, where each operation on a block costs a launch."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Doubt:
    """What bounds the rounding of a product in a part of the block: |product| + _DOUBT · left · right.

    `left` has a number for each row and `right` one for each column, or the two are one matrix and None.
    `is_whole` says that the part is all of the block.
    """

    inside: tuple[slice, slice]
    is_whole: bool
    product: Tensor | None
    left: Tensor
    right: Tensor | None

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """For these elements of the block, zero for those outside the part."""
        if self.is_whole:
            return self._within(rows, columns)
        found = torch.zeros(len(rows), dtype=self.left.dtype, device=self.left.device)
        within, row, column = _within(self.inside, rows, columns)
        found[within] = self._within(row, column)
        return found

    def _within(self, row: Tensor, column: Tensor) -> Tensor:
        bound = self.left[row, column] if self.right is None else self.left[row] * self.right[column]
        return _DOUBT * bound + (0.0 if self.product is None else self.product[row, column].abs())


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
    """Rows of a tensor as they have to be, in float64. They stand until the thread asks for the next.

    `before` is what the delta weights are added to, `stack` what each adapter of `sources` adds, `value` the sum, and
    `gram` the inner products of what they add.

    Shapes: before (m, n), stack (k, m, n), value (m, n), gram (k, k)
    """

    before: Tensor
    sources: Sequence[int]
    stack: Tensor
    value: Tensor
    gram: Tensor
    doubts: Sequence[Doubt]
    renormalized: Sequence[Renormalized]
    epsilon: float
    """Of the arithmetic that makes a merge: float32, or float64 where a weight or a factor is."""

    def doubt(self, rows: Tensor, columns: Tensor) -> Tensor:
        """How far a merge may be from the value of these elements before it is rounded."""
        total = self.before[rows, columns].abs()
        for each in self.doubts:
            total += each.at(rows, columns)
        return total * self.epsilon


class Reference:
    """An edit, ready to say what any block of rows has to be. It may be asked from several threads.

    Memory: the right factors in float64, and their inner products
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

        self._cross = self._cross_products()

    @property
    def block_rows(self) -> int:
        elements = BLOCK_ELEMENTS if self._device.type == "cpu" else _DEVICE_ELEMENTS
        return max(1, elements // max(1, self.edit.matrix[1]))

    def rows(self, start: int, stop: int) -> ExactRows:
        """Rows `start` to `stop`.

        Memory: some blocks of these rows in float64
        """
        before = self._before(start, stop)
        changes = Counter(each.source for each in self.edit.changes if _meets(each, start, stop))
        stack = scratch("delta weights", before.expand(len(changes), *before.shape), torch.float64)
        deltas = dict(zip(changes, stack, strict=True))
        sole = {
            each.source for each in self.edit.updates if changes[each.source] == 1 and self._covers(each, start, stop)
        }
        for source in deltas.keys() - sole:
            deltas[source].zero_()
        doubts, renormalized, lefts = [], [], []
        for update in self.edit.updates:
            if _meets(update, start, stop):
                delta = deltas[update.source]
                out = delta if update.source in sole else None
                inside, product, left, right = self._product(update, start, stop, out)
                lefts.append(left)
                if out is None:
                    delta[inside] += product
                is_whole = self._covers(update, start, stop)
                doubts.append(
                    Doubt(inside=inside, is_whole=is_whole, product=product, left=left.norm(dim=1), right=right)
                )
        for index, each in enumerate(self.edit.renormalizations):
            if _meets(each.update, start, stop):
                part, change, off = self._renormalized(index, each, before, start, stop)
                deltas[each.update.source][part.inside] += change
                is_whole = off.shape == before.shape
                doubts.append(Doubt(inside=part.inside, is_whole=is_whole, product=None, left=off, right=None))
                renormalized.append(part)
        value = scratch("value", before, torch.float64).copy_(before)
        for delta in stack:
            value += delta
        return ExactRows(
            before=before,
            sources=tuple(changes),
            stack=stack,
            value=value,
            gram=self._gram(lefts, stack),
            doubts=doubts,
            renormalized=renormalized,
            epsilon=self._epsilon,
        )

    def _cross_products(self) -> Tensor | None:
        """Of the rows of all right factors, where each adapter has one that covers the whole tensor; else None."""
        updates, rows = self.edit.updates, self.edit.matrix[0]
        is_plain = not self.edit.renormalizations and len(self.edit.adapters) == len(updates)
        if not is_plain or not all(self._covers(each, 0, rows) for each in updates):
            return None
        right = torch.cat([self._right[id(each)][0] for each in updates])
        return right @ right.mT

    def _gram(self, lefts: Sequence[Tensor], stack: Tensor) -> Tensor:
        """The inner products of what each adapter adds: from factors where that is enough, which takes a tenth."""
        if self._cross is None:
            return (
                torch.stack([stack.flatten(1) @ each.flatten() for each in stack]) if len(stack) else stack.view(0, 0)
            )
        left = torch.cat(list(lefts), dim=1)
        ranks = torch.tensor([each.shape[1] for each in lefts], device=left.device)
        share = torch.eye(len(lefts)).to(left).repeat_interleave(ranks, dim=1)
        gram: Tensor = share @ (left.mT @ left).mul_(self._cross) @ share.mT
        return gram

    def _before(self, start: int, stop: int) -> Tensor:
        """Rows of W in float64, trained rows in their place."""
        source = self._source[start:stop].to(self._device)
        rows = scratch("weight", source, torch.float64).copy_(source)
        for indices, trained in self.edit.rows:
            for row, values in zip(indices, trained, strict=True):
                if start <= row < stop:
                    rows[row - start] = values.to(rows)
        return rows

    def _covers(self, update: Update, start: int, stop: int) -> bool:
        """Whether it changes every element of these rows."""
        down, across = update.block
        return down.start <= start and stop <= down.stop and across == slice(0, self.edit.matrix[1])

    def _product(
        self, update: Update, start: int, stop: int, out: Tensor | None = None
    ) -> tuple[tuple[slice, slice], Tensor, Tensor, Tensor]:
        """Where these rows of scale · left · right stand in the block, they, scale · left, the norms of right."""
        down, across = update.block
        first, last = max(start, down.start), min(stop, down.stop)
        left = update.left[first - update.row : last - update.row].to(self._device, torch.float64) * update.scale
        right, size = self._right[id(update)]
        inside = (slice(first - start, last - start), across)
        return inside, torch.mm(left, right, out=out), left, size

    def _renormalized(
        self, index: int, each: Renormalization, before: Tensor, start: int, stop: int
    ) -> tuple[Renormalized, Tensor, Tensor]:
        """The same of weight · (m ⊙ V/‖V‖ − W), with what bounds the rounding of each element."""
        inside, product, left, right = self._product(each.update, start, stop)
        old = before[inside]
        new = old + product
        magnitude = each.magnitude.to(self._device, torch.float64)
        if each.axis == "row":
            first = start + inside[0].start - each.update.row
            gain = magnitude[first : first + len(new)].unsqueeze(1) / new.norm(dim=1, keepdim=True)
        else:
            gain = magnitude / self._norms[index]
        off = gain.abs() * (old.abs() + torch.outer(left.norm(dim=1), right)) + old.abs()
        part = Renormalized(inside=inside, weight=each.weight, product=product, new=new, gain=gain)
        return part, each.weight * (gain * new - old), abs(each.weight) * off

    def _column_norms(self, each: Renormalization) -> Tensor:
        """‖V‖ of each column, from a pass over all rows."""
        squares = torch.zeros(each.update.right.shape[1], dtype=torch.float64, device=self._device)
        for start in range(0, self.edit.matrix[0], self.block_rows):
            stop = min(start + self.block_rows, self.edit.matrix[0])
            if _meets(each.update, start, stop):
                inside, product, _, _ = self._product(each.update, start, stop)
                squares += product.add_(self._before(start, stop)[inside]).square_().sum(dim=0)
        return squares.sqrt()


def _meets(update: Update, start: int, stop: int) -> bool:
    """Whether it changes any of these rows."""
    return update.row < stop and start < update.row + len(update.left)


def _within(inside: tuple[slice, slice], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which elements lie in a part of the block, and the rows and columns of those there."""
    down, across = inside
    within = (rows >= down.start) & (rows < down.stop) & (columns >= across.start) & (columns < across.stop)
    return within, rows[within] - down.start, columns[within] - across.start


def _arithmetic(edit: Edit, weight: torch.dtype) -> torch.dtype:
    """The dtype that a merge computes in."""
    updates = (*edit.updates, *(each.update for each in edit.renormalizations))
    dtypes = {weight, *(update.left.dtype for update in updates), *(update.right.dtype for update in updates)}
    return torch.float64 if torch.float64 in dtypes else torch.float32
