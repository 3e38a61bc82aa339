"""W + left · right by torch, in tiles that stay in a cache, and sums over them."""

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

Sums = tuple[float, float, float, float]
"""Σ δ², Σ W², Σ (W' − W − δ)², and the count of elements that stay as they are"""

_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
_TILE_COLUMNS = {"cpu": 4096, "cuda": 1 << 24}
"""On a CPU four tiles of float32 fill a second-level cache: a wider one, or rows of fewer, took up to half longer."""

_RANKS_AT_ONCE = 32

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_BELOW_F16, _HALF_F16 = (1 << 13) - 1, 1 << 12
"""The bits of a float32 that float16 has no room for, and what they are halfway between two of its numbers."""

_local = threading.local()


def add_product(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    out: Tensor,
    has_statistics: bool,
) -> Sums | Tensor:
    """out = W + left · right + W ⊙ (row + column), rounded once; `out` may be `weight`.

    Shapes: weight (m, n), left (m, r), right (r, n), row (m,), column (n,), out (m, n)
    Memory: a tile, three times in the dtype of the factors and once in that of the result
    """
    rows, columns = weight.shape
    kind = weight.device.type if weight.device.type in _TILE_ELEMENTS else "cpu"
    across = min(columns, _TILE_COLUMNS[kind])
    down = max(1, min(rows, _TILE_ELEMENTS[kind] // max(1, across)))
    found: list[Any] = []
    for i in range(0, rows, down):
        for j in range(0, columns, across):
            here = (slice(i, i + down), slice(j, j + across))
            tile = _Tile(weight[here], left.dtype, out.dtype)
            tile.add(left[here[0]], right[:, here[1]], None if row is None else row[here[0]], column, here[1])
            if has_statistics:
                found.append(tile.sums())
            out[here].copy_(tile.rounded)
    if weight.device.type != "cpu":
        return torch.stack(found).sum(dim=0) if found else torch.zeros(4, dtype=torch.float64, device=weight.device)
    return tuple(math.fsum(values) for values in zip(*found, strict=True)) if found else (0.0,) * 4  # type: ignore[return-value]


class _Tile:
    """One tile in buffers of the thread's own, which its next tile takes over."""

    def __init__(self, weight: Tensor, arithmetic: torch.dtype, dtype: torch.dtype) -> None:
        self._weight = weight
        self._wide = _buffer("wide", weight, arithmetic).copy_(weight)
        self._delta = _buffer("delta", weight, arithmetic)
        self._sum = _buffer("sum", weight, arithmetic)
        self.rounded = _buffer("rounded", weight, dtype)

    def add(self, left: Tensor, right: Tensor, row: Tensor | None, column: Tensor | None, across: slice) -> None:
        if not left.shape[1]:
            self._delta.zero_()
            self._sum.copy_(self._wide)  # W + 0 would turn -0 into 0
        else:
            self._multiply(left, right)
            if row is not None:
                self._delta.addcmul_(self._wide, row.unsqueeze(1))
            if column is not None:
                self._delta.addcmul_(self._wide, column[across])
            torch.add(self._wide, self._delta, out=self._sum)
        self.rounded.copy_(self._sum)
        if self.rounded.dtype == torch.float16 and self._sum.dtype == torch.float32:
            self._mend_ties()

    def _mend_ties(self) -> None:
        """Where the sum in float32 lies halfway between two float16 numbers, what it lost itself says which is nearer.

        That is one sum in 8192, half of which the second rounding takes the wrong way. Of bfloat16 it is one in 65536.
        """
        total, wide, delta = self._sum.view(-1), self._wide.view(-1), self._delta.view(-1)
        ties = _equal(total.view(torch.int32), _BELOW_F16, _HALF_F16)
        found = total[ties]
        lost = wide[ties].to(torch.float64) + delta[ties].to(torch.float64) - found.to(torch.float64)
        towards = torch.where(lost == 0, found, torch.copysign(torch.full_like(found, math.inf), lost.to(found.dtype)))
        self.rounded.view(-1)[ties] = torch.nextafter(found, towards).to(self.rounded.dtype)

    def _multiply(self, left: Tensor, right: Tensor) -> None:
        """Sums of few ranks each: a sum of all in one chain, of 128 say, has twice the error and saves no time."""
        for first in range(0, left.shape[1], _RANKS_AT_ONCE):
            part = slice(first, first + _RANKS_AT_ONCE)
            torch.addmm(self._delta, left[:, part], right[part], beta=float(first > 0), out=self._delta)

    def sums(self) -> Sums | Tensor:
        """Spends the tile's sum."""
        plain = self._weight if self._weight.dtype == self.rounded.dtype else self._weight.to(self.rounded.dtype)
        bits = _BITS[plain.itemsize]
        if self.rounded.dtype == self._sum.dtype:
            # W' − W is exact where δ is the smaller, and what it lacks of δ is what the addition lost
            lost = self._sum.sub_(self._wide).sub_(self._delta)
        else:
            lost = self._sum.sub_(self.rounded)
        values = (self._delta, self._wide, lost)
        if self._weight.device.type != "cpu":
            same = (plain.view(bits) == self.rounded.view(bits)).sum(dtype=torch.float64)
            return torch.stack([*(torch.linalg.vector_norm(each, dtype=torch.float64) ** 2 for each in values), same])
        unchanged = float(np.count_nonzero(plain.view(bits).numpy() == self.rounded.view(bits).numpy()))
        return (*(_square(each) for each in values), unchanged)  # type: ignore[return-value]


def _equal(bits: Tensor, mask: int, pattern: int) -> Tensor:
    """Where the masked bits have this pattern; numpy finds the few places ten times as fast."""
    if bits.device.type != "cpu":
        return (bits & mask == pattern).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero((bits.numpy() & mask) == pattern))


def _square(values: Tensor) -> float:
    """The sum of the squares; once more in float64 where float32 does not hold it."""
    flat = values.view(-1)
    total = float(torch.dot(flat, flat))
    return total if math.isfinite(total) else float(flat.to(torch.float64).square().sum())


def _buffer(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor of this shape; on a CPU in memory that the thread has had before."""
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    buffers = _local.__dict__
    key = f"{name} {dtype}"
    if key not in buffers or buffers[key].numel() < like.numel():
        buffers[key] = torch.empty(like.numel(), dtype=dtype)
    found: Tensor = buffers[key][: like.numel()].view(like.shape)
    return found
