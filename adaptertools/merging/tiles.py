"""W + left · right by torch, in tiles that stay in a cache, and sums over them."""

import functools
import math
import platform
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptertools.merging.scratch import scratch
from adaptertools.tensors import as_bits

Sums = tuple[float, float, float, float]
"""Σ δ², Σ W², Σ (W' − W − δ)², and the count of elements that stay as they are"""

_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
_TILE_COLUMNS = {"cpu": 6144, "cuda": 1 << 24}
"""The most columns of a tile. Tiles of a matrix are equal: with a narrow rest beside them it takes twice as long."""

_RANKS_AT_ONCE = 32
_RANKS_AT_ONCE_FOR_BF16 = 128
"""A chain of that many has an error of 3e-7, which rounding to bfloat16 leaves nothing of, and to float16 too much."""

_BELOW_F16, _HALF_F16 = (1 << 13) - 1, 1 << 12
"""The bits of a float32 that float16 has no room for, and what they are halfway between two of its numbers."""


def add_product(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    out: Tensor,
    has_statistics: bool,
    packed: Sequence[Tensor] | None = None,
) -> Sums | Tensor:
    """out = W + left · right + W ⊙ (row + column), rounded once; `out` may be `weight`. `packed` is `pack(right)`.

    Shapes: weight (m, n), left (m, r), right (r, n), row (m,), column (n,), out (m, n)
    Memory: a tile, two or three times in the dtype of the factors and once in that of the result
    """
    rows, columns = weight.shape
    kind = weight.device.type if weight.device.type in _TILE_ELEMENTS else "cpu"
    across = _equal_part(columns, _TILE_COLUMNS[kind])
    down = _equal_part(rows, max(1, _TILE_ELEMENTS[kind] // across))
    found: list[Any] = []
    tile: _Tile | None = None
    for first in range(0, columns, across):
        beside = slice(first, first + across)
        factors = right[:, beside] if packed is None else [part[beside] for part in packed]
        part_of_column = None if column is None else column[beside]
        parts_of_row = repeat(None) if row is None else torch.split(row, down)
        # cut at once: every call of torch lets go of the interpreter, and waiting for it again is what costs
        cuts = (torch.split(weight[:, beside], down), torch.split(left, down), torch.split(out[:, beside], down))
        for here, ranks, there, part_of_row in zip(*cuts, parts_of_row, strict=False):
            if tile is None or tile.rounded.shape != here.shape:
                tile = _Tile(here, left.dtype, out.dtype, has_statistics)
            tile.add(here, ranks, factors, part_of_row, part_of_column)
            if has_statistics:
                found.append(tile.sums())
            there.copy_(tile.rounded)
    if weight.device.type != "cpu":
        return torch.stack(found).sum(dim=0) if found else torch.zeros(4, dtype=torch.float64, device=weight.device)
    return tuple(math.fsum(values) for values in zip(*found, strict=True)) if found else (0.0,) * 4  # type: ignore[return-value]


def _equal_part(size: int, limit: int) -> int:
    """The size of parts as few as can be, none above the limit, and equal but for what does not divide."""
    return math.ceil(size / math.ceil(size / limit)) if size else 1


def pack(right: Tensor, dtype: torch.dtype, device: torch.device) -> list[Tensor] | None:
    """A right factor as oneDNN takes it, where there is oneDNN, or on MPS: some ranks at a time, each by columns.

    oneDNN is twice as fast as torch's own product, which is MKL's, on an AMD CPU with AVX-512; to the same error.
    `dtype` is that of the result, `device` where to multiply.

    Shapes: (r, n) -> (n, some of r) …
    Memory: a copy of the factor
    """
    if right.device.type != "cpu" or right.dtype != torch.float32 or not right.numel():
        return None
    if device.type == "cpu" and not _has_onednn():
        return None
    ranks = _RANKS_AT_ONCE_FOR_BF16 if dtype == torch.bfloat16 else _RANKS_AT_ONCE
    return [right[first : first + ranks].mT.contiguous().to(device) for first in range(0, len(right), ranks)]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left · rightᵀ on the device of the right one, handed back on that of the left."""
    if right.device.type == "cpu" and _has_onednn():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return found
    return (left.to(right.device) @ right.mT).to(left.device)


@functools.cache
def _has_onednn() -> bool:
    known = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Tile:
    """Tiles of one shape, one after the other, in buffers of the thread's own.

    These are as few as can be: they take more than a core's cache holds, and every one more costs time.
    """

    def __init__(self, like: Tensor, arithmetic: torch.dtype, dtype: torch.dtype, has_statistics: bool) -> None:
        self._has_statistics = has_statistics
        self._wide = scratch("wide", like, arithmetic)
        self.rounded = scratch("rounded", like, dtype)
        self._bits = as_bits(self.rounded)
        self._same = scratch("same", like, torch.bool).numpy() if like.device.type == "cpu" else None

    def add(
        self, weight: Tensor, left: Tensor, right: Tensor | list[Tensor], row: Tensor | None, column: Tensor | None
    ) -> None:
        self._weight = weight
        wide = self._wide.copy_(weight)
        self._terms = [_square(wide)] if self._has_statistics else []  # while it is in the cache
        self._delta = self._sum = wide  # the product of the tile before is let go of: the next one takes its memory
        if not left.shape[1]:
            self._delta = scratch("delta", wide, wide.dtype).zero_()
        else:
            self._delta = self._multiply(left, right) if isinstance(right, Tensor) else _multiply_packed(left, right)
            if row is not None:
                self._delta.addcmul_(wide, row.unsqueeze(1))
            if column is not None:
                self._delta.addcmul_(wide, column)
        if self._has_statistics:
            self._terms.insert(0, _square(self._delta))
        needs_delta = self.rounded.dtype in (wide.dtype, torch.float16)
        self._sum = scratch("sum", wide, wide.dtype) if needs_delta else self._delta
        if left.shape[1]:
            torch.add(wide, self._delta, out=self._sum)
        else:
            self._sum.copy_(wide)  # W + 0 would turn -0 into 0
        self.rounded.copy_(self._sum)
        if self.rounded.dtype == torch.float16 and wide.dtype == torch.float32:
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

    def _multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """Sums of few ranks each: a sum of all in one chain, of 128 say, has twice the error and saves no time."""
        delta = scratch("delta", self._wide, self._wide.dtype)
        for first in range(0, left.shape[1], _RANKS_AT_ONCE):
            part = slice(first, first + _RANKS_AT_ONCE)
            torch.addmm(delta, left[:, part], right[part], beta=float(first > 0), out=delta)
        return delta

    def sums(self) -> Sums | Tensor:
        """Spends the tile's sum, and W where the result is narrower."""
        plain = self._weight if self._weight.dtype == self.rounded.dtype else self._weight.to(self.rounded.dtype)
        if self.rounded.dtype == self._sum.dtype:
            # W' − W is exact where δ is the smaller, and what it lacks of δ is what the addition lost
            lost = self._sum.sub_(self._wide).sub_(self._delta)
        else:
            lost = self._sum.sub_(self._wide.copy_(self.rounded))  # of two dtypes torch would widen one in new memory
        terms: list[Any] = [*self._terms, _square(lost)]
        if self._weight.device.type != "cpu":
            same = (as_bits(plain) == self._bits).sum(dtype=torch.float64)
            return torch.stack([*terms, same])
        same_bits = np.equal(as_bits(plain).numpy(), self._bits.numpy(), out=self._same)
        unchanged = float(np.count_nonzero(same_bits))
        return (*terms, unchanged)


def _multiply_packed(left: Tensor, right: list[Tensor]) -> Tensor:
    if len(right) == 1:
        return _product(left.contiguous(), right[0])
    parts = torch.split(left, [part.shape[1] for part in right], dim=1)
    # oneDNN is slow by thousands where the left one is not contiguous
    products = (_product(ranks.contiguous(), part) for ranks, part in zip(parts, right, strict=True))
    return functools.reduce(Tensor.add_, products)


def _equal(bits: Tensor, mask: int, pattern: int) -> Tensor:
    """Where the masked bits have this pattern; numpy finds the few places ten times as fast."""
    if bits.device.type != "cpu":
        return (bits & mask == pattern).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero((bits.numpy() & mask) == pattern))


def _square(values: Tensor) -> float | Tensor:
    """The sum of the squares; on the CPU once more in float64 where float32 does not hold it."""
    flat = values.view(-1)
    if values.device.type != "cpu":
        squared: Tensor = torch.linalg.vector_norm(flat, dtype=torch.float64) ** 2
        return squared
    total = float(torch.dot(flat, flat))
    return total if math.isfinite(total) else float(flat.to(torch.float64).square().sum())
