"""DoRA: how much longer or shorter each row, or column, of a weight becomes, from norms of W + s·B·A.

‖W_i + L_i·R‖² = ‖W_i‖² + 2⟨W_i·Rᵀ, L_i⟩ + L_i·(R·Rᵀ)·L_iᵀ needs W·Rᵀ, as wide as the rank, and no dense sum.
"""

import torch
from torch import Tensor

from adaptertools.merging.edits import Renormalization

_CANCELLED = 2.0**-10
"""A square this much smaller than what it is the sum of has lost digits: such rows, hardly any, are summed densely."""

_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}
"""The elements that are widened at once, by kind of device."""


def squared_norms(weight: Tensor, left: Tensor, right: Tensor, gram: Tensor) -> Tensor:
    """‖W_i + L_i·R‖² of every row, in float64.

    Shapes: weight (m, n), left (m, r), right (r, n), gram (r, r) -> (m,)
    Memory: (m, r)
    """
    squares = weight.square().sum(dim=1).to(torch.float64)
    wide = left.to(torch.float64)
    cross = ((weight @ right.mT).to(torch.float64) * wide).sum(dim=1)
    added = ((wide @ gram) * wide).sum(dim=1)
    total: Tensor = squares + 2 * cross + added
    cancelled = (total < _CANCELLED * (squares + added)).nonzero().squeeze(1)
    if len(cancelled):
        dense = torch.addmm(weight[cancelled], left[cancelled], right)
        total[cancelled] = dense.to(torch.float64).square().sum(dim=1)
    return total


class Norm:
    """One renormalization, its factors on the device. Along rows it gives gains block by block, along columns once.

    A gain is m/‖V‖ for each row of the block or column of the tensor, and 1 outside of what the update changes.
    """

    def __init__(self, renormalization: Renormalization, arithmetic: torch.dtype, device: torch.device) -> None:
        update = renormalization.update
        self.axis = renormalization.axis
        self.weight = renormalization.weight
        self._down, self._across = update.block
        self._left = (update.left.to(device, torch.float64) * update.scale).to(arithmetic)
        self._right = update.right.to(device, arithmetic)
        self._magnitude = renormalization.magnitude.to(device, torch.float64)
        if self.axis == "row":
            self._gram = self._right.to(torch.float64) @ self._right.to(torch.float64).mT

    def row_gains(self, weight: Tensor, start: int) -> Tensor:
        """The gain of every row of a block that begins at row `start` of the tensor.

        Shapes: weight (n, columns) -> (n,) float64
        """
        gains = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
        for here, there in self._pieces(weight, start):
            wide = weight[here, self._across].to(self._left.dtype)
            total = squared_norms(wide, self._left[there], self._right, self._gram)
            gains[here] = self._magnitude[there] / total.sqrt()
        return gains

    def column_squares(self, weight: Tensor, start: int) -> Tensor:
        """What the rows of a block add to ‖V_j‖² of every column of the update.

        Shapes: weight (n, columns) -> (columns of the update,) float64
        """
        total = torch.zeros(self._right.shape[1], dtype=torch.float64, device=weight.device)
        for here, there in self._pieces(weight, start):
            wide = weight[here, self._across].to(self._left.dtype)
            left = self._left[there]
            gram = left.to(torch.float64).mT @ left.to(torch.float64)
            total += squared_norms(wide.mT, self._right.mT, left.mT, gram)
        return total

    def column_gains(self, squares: Tensor, columns: int) -> Tensor:
        """The gain of every column of the tensor, from the sums over all of its blocks."""
        gains = torch.ones(columns, dtype=torch.float64, device=squares.device)
        gains[self._across] = self._magnitude / squares.sqrt()
        return gains

    def _pieces(self, weight: Tensor, start: int) -> list[tuple[slice, slice]]:
        """The rows of a block that the update changes, in pieces: where they stand in the block, and in the update."""
        first = max(self._down.start - start, 0)
        stop = min(self._down.stop - start, len(weight))
        step = max(1, _AT_ONCE.get(weight.device.type, _AT_ONCE["cpu"]) // max(1, self._right.shape[1]))
        offset = start - self._down.start
        return [
            (slice(row, min(row + step, stop)), slice(row + offset, min(row + step, stop) + offset))
            for row in range(first, stop, step)
        ]
