# ruff: noqa: ANN001, ANN202 -- Triton reads the annotations of a kernel as its own
"""W + left · right in one pass over W on a GPU, as exact as float32 at the speed of float16's matrix units.

A float32 number is a float16 number and a float16 remainder, up to 2^-22 of it, once rows, columns and ranks are scaled
by powers of two (which lose no bit) into float16's range. Of the four products of two such pairs three count. They are
summed in float32. The largest error seen, relative to |left|·|right|, is 6e-7, where a float32 product's is 3.5e-7.

A program keeps its rows of left and goes over tiles of columns, so that the tile of W that comes next is on its way
while one is computed. Imported on use: Triton comes with torch for CUDA alone.
"""

import functools
import threading
from dataclasses import dataclass
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

_HALF_BITS = 12
"""Rows are scaled to below 2^12: the products of two, over thousands of ranks, stay far inside float32."""

_NO_RANK = -20000.0
"""The exponent of a rank that adds nothing."""

_CHUNK = 64
"""Ranks beyond the widest panel are summed in chunks of so many."""

_launching = threading.Lock()
"""Held so that one thread compiles a variant of the kernel, or finds it in Triton's cache, and not all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """left · right, each as float16 numbers and their remainders, and powers of two by which rows and columns count.

    Shapes: left (2, m, r), right (2, r, n'), left_scale (m,), right_scale (n,); r and n' are filled up with zeros
    """

    left: Tensor
    left_scale: Tensor
    right: Tensor
    right_scale: Tensor

    def rows(self, start: int, count: int) -> "Split":
        """That of some rows alone."""
        part = slice(start, start + count)
        return Split(self.left[:, part], self.left_scale[part], self.right, self.right_scale)


def split(left: Tensor, right: Tensor) -> Split:
    """Factors in float32, ready for the kernel.

    Shapes: left (m, r), right (r, n)
    Memory: both in float64 meanwhile
    """
    wide_left, wide_right = left.to(torch.float64), right.to(torch.float64)
    sizes = (wide_left.abs().amax(dim=0), wide_right.abs().amax(dim=1)) if left.shape[1] else (left[0], right[:, 0])
    exponents = [torch.frexp(size).exponent.to(torch.float64) for size in sizes]
    together = torch.where((sizes[0] == 0) | (sizes[1] == 0), _NO_RANK, exponents[0] + exponents[1])
    top = together.amax() if len(together) else torch.zeros((), dtype=torch.float64, device=left.device)
    # both factors of a rank are brought to size 1, and half of what it lacks of the largest rank is given to each
    half = torch.floor((together - top) / 2)
    wide_left = wide_left * torch.exp2(half - exponents[0])
    wide_right = wide_right * torch.exp2(together - top - half - exponents[1]).unsqueeze(1)
    rank = _padded(left.shape[1])
    columns = -(-right.shape[1] // 16) * 16
    left_halves, rows = _halves(wide_left, (0, rank - left.shape[1]))
    right_halves, across = _halves(
        wide_right.mT, (0, rank - left.shape[1], 0, columns - right.shape[1]), transposed=True
    )
    upper = torch.ceil(top / 2)
    left_scale = torch.exp2(rows + upper).to(torch.float32)
    right_scale = torch.exp2(across + (top - upper)).to(torch.float32)
    return Split(left_halves, left_scale, right_halves, right_scale)


def add_product(
    weight: Tensor, split: Split, row: Tensor | None, column: Tensor | None, out: Tensor, has_statistics: bool
) -> Tensor:
    """out = W + left · right + W ⊙ (row + column), rounded once; `out` may be `weight`.

    Returns the sums of `tiles.Sums`, on the device; without statistics zeros, which take it no work.

    Shapes: weight (m, n), row (m,), column (n,), out (m, n)
    Memory: nothing but the sums
    """
    if (fast := _hopper_kernel(weight.device)) and row is None and column is None and not has_statistics:
        with _launching, torch.cuda.device(weight.device):
            if fast.add_product(weight, split, out):
                return torch.zeros(4)
    rows, columns = weight.shape
    rank = split.left.shape[2]
    down, across, warps, chain, stages = configuration(rank, has_statistics)
    while chain > 1 and triton.cdiv(columns, across * chain) * triton.cdiv(rows, down) < 512:
        chain //= 2
    grid = (triton.cdiv(columns, across * chain), triton.cdiv(rows, down))
    parts = torch.empty((grid[0] * grid[1] if has_statistics else 1, 4), dtype=torch.float32, device=weight.device)
    with _launching, torch.cuda.device(weight.device):
        _add_product[grid](
            weight,
            out,
            *split.left,
            *split.right,
            split.left_scale,
            split.right_scale,
            weight if row is None else row,
            weight if column is None else column,
            parts,
            rows,
            columns,
            weight.stride(0),
            out.stride(0),
            split.right.stride(1),
            rank,
            PANEL=min(rank, _CHUNK if rank > _WIDEST else rank),
            IS_CHUNKED=rank > _WIDEST,
            HAS_ROW=row is not None,
            HAS_COLUMN=column is not None,
            HAS_STATISTICS=has_statistics,
            IS_EVEN=rows % down == 0 and columns % (across * chain) == 0,
            DOWN=down,
            ACROSS=across,
            CHAIN=chain,
            STAGES=stages,
            num_warps=warps,
        )
    return parts.sum(dim=0, dtype=torch.float64) if has_statistics else torch.zeros(4)


def warm_up(device: torch.device) -> None:
    """Have torch and Triton load what the first product needs, whatever its shape."""
    with torch.cuda.device(device):
        ones = torch.ones(16, 16, device=device)
        split(ones, ones)
        _nothing[(1,)]()


@functools.cache
def _hopper_kernel(device: torch.device) -> ModuleType | None:
    """The kernel for the GPUs that it is made for, in the releases of Triton that it is known to compile in."""
    if not triton.__version__.startswith("3.6.") or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    from adaptertools.merging import hopper_kernel

    return hopper_kernel


_WIDEST = 128
"""The most ranks that a program keeps at hand."""


def configuration(rank: int, has_statistics: bool) -> tuple[int, int, int, int, int]:
    """Rows and columns of a tile, warps, tiles a program, and tiles on their way; the fastest found on an H200."""
    if rank > _WIDEST:
        return 128, 128, 8, 1, 1
    if has_statistics:  # more to keep in registers
        return (128, 32, 4, 8, 3) if rank <= 64 else (64, 64, 4, 8, 2)
    if rank <= 32:
        return 64, 128, 4, 4, 3
    return (64, 128, 4, 4, 2) if rank <= 64 else (128, 64, 8, 16, 3)


def _padded(rank: int) -> int:
    """The rank as the kernel takes it: a power of two from 16 on, then whole chunks."""
    if rank > _WIDEST:
        return -(-rank // _CHUNK) * _CHUNK
    return max(16, 1 << (rank - 1).bit_length())


def _halves(wide: Tensor, padding: tuple[int, ...], transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Rows as float16 numbers and their remainders, filled up with zeros, and the exponents they were divided by."""
    size = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(len(wide))
    exponents = torch.frexp(size).exponent.to(torch.float64) - _HALF_BITS
    scaled = torch.nn.functional.pad(wide * torch.exp2(-exponents).unsqueeze(1), padding)
    scaled = scaled.mT if transposed else scaled
    high = scaled.to(torch.float16)
    return torch.stack([high, (scaled - high).to(torch.float16)]), exponents


@triton.jit  # type: ignore[untyped-decorator]
def _nothing() -> None:
    pass


@triton.jit  # type: ignore[untyped-decorator]
def _add_product(  # type: ignore[no-untyped-def]
    WEIGHT,
    OUT,
    LEFT_HIGH,
    LEFT_LOW,
    RIGHT_HIGH,
    RIGHT_LOW,
    LEFT_SCALE,
    RIGHT_SCALE,
    ROW,
    COLUMN,
    PARTS,
    rows,
    columns,
    weight_stride,
    out_stride,
    right_stride,
    rank,
    PANEL: tl.constexpr,
    IS_CHUNKED: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    CHAIN: tl.constexpr,
    STAGES: tl.constexpr,
):
    down = tl.arange(0, DOWN)
    i = tl.program_id(1) * DOWN + down
    k = tl.arange(0, PANEL)
    in_rows = i < rows
    top = (tl.program_id(1) * DOWN).to(tl.int64)  # places within a tile fit into 32 bits, those of tiles may not
    left = top * rank + down[:, None] * rank + k[None, :]
    left_scale = tl.load(LEFT_SCALE + i, mask=in_rows, other=0.0)
    if not IS_CHUNKED:
        if IS_EVEN:
            left_high = tl.load(LEFT_HIGH + left)
            left_low = tl.load(LEFT_LOW + left)
        else:
            left_high = tl.load(LEFT_HIGH + left, mask=in_rows[:, None], other=0.0)
            left_low = tl.load(LEFT_LOW + left, mask=in_rows[:, None], other=0.0)
    if HAS_ROW:
        row = tl.load(ROW + i, mask=in_rows, other=0.0)
    # a sum for each row, which a warp's own threads hold: over all rows at once, warps would wait at every tile
    delta_sum = tl.zeros((DOWN,), dtype=tl.float32)
    weight_sum = tl.zeros((DOWN,), dtype=tl.float32)
    lost_sum = tl.zeros((DOWN,), dtype=tl.float32)
    same_sum = tl.zeros((DOWN,), dtype=tl.float32)
    first = tl.program_id(0) * (ACROSS * CHAIN)
    for tile in tl.range(0, CHAIN, num_stages=STAGES):
        j = first + tile * ACROSS + tl.arange(0, ACROSS)
        in_columns = j < columns
        inside = in_rows[:, None] & in_columns[None, :]
        right = k[:, None] * right_stride + j[None, :]
        if IS_CHUNKED:
            product = tl.zeros((DOWN, ACROSS), dtype=tl.float32)
            for chunk in tl.range(0, rank, PANEL, num_stages=3):
                part_high = tl.load(LEFT_HIGH + left + chunk, mask=in_rows[:, None], other=0.0)
                part_low = tl.load(LEFT_LOW + left + chunk, mask=in_rows[:, None], other=0.0)
                below = chunk * right_stride.to(tl.int64)
                right_high = tl.load(RIGHT_HIGH + below + right, mask=in_columns[None, :], other=0.0)
                right_low = tl.load(RIGHT_LOW + below + right, mask=in_columns[None, :], other=0.0)
                product = tl.dot(part_high, right_low, product)
                product = tl.dot(part_low, right_high, product)
                product = tl.dot(part_high, right_high, product)
        else:
            if IS_EVEN:
                right_high = tl.load(RIGHT_HIGH + right)
                right_low = tl.load(RIGHT_LOW + right)
            else:
                right_high = tl.load(RIGHT_HIGH + right, mask=in_columns[None, :], other=0.0)
                right_low = tl.load(RIGHT_LOW + right, mask=in_columns[None, :], other=0.0)
            product = tl.dot(left_high, right_low)
            product = tl.dot(left_low, right_high, product)
            product = tl.dot(left_high, right_high, product)
        # W comes after the product: held through it, it would leave too few registers
        at = down[:, None] * weight_stride + j[None, :]
        if IS_EVEN:
            weight = tl.load(WEIGHT + top * weight_stride + at)
            right_scale = tl.load(RIGHT_SCALE + j)
        else:
            weight = tl.load(WEIGHT + top * weight_stride + at, mask=inside, other=0.0)
            right_scale = tl.load(RIGHT_SCALE + j, mask=in_columns, other=0.0)
        wide = weight.to(tl.float32)
        delta = product * left_scale[:, None] * right_scale[None, :]
        if HAS_ROW:
            delta += wide * row[:, None]
        if HAS_COLUMN:
            column = tl.load(COLUMN + j, mask=in_columns, other=0.0)
            delta += wide * column[None, :]
        rounded = (wide + delta).to(OUT.dtype.element_ty)
        if HAS_STATISTICS:
            plain = wide.to(OUT.dtype.element_ty)
            lost = (rounded.to(tl.float32) - wide) - delta
            delta_sum += tl.sum(delta * delta, axis=1)
            weight_sum += tl.sum(wide * wide, axis=1)
            lost_sum += tl.sum(lost * lost, axis=1)
            same = plain == rounded
            same_sum += tl.sum((same if IS_EVEN else same & inside).to(tl.float32), axis=1)
        to = down[:, None] * out_stride + j[None, :]
        if IS_EVEN:
            tl.store(OUT + top * out_stride + to, rounded)
        else:
            tl.store(OUT + top * out_stride + to, rounded, mask=inside)
    if HAS_STATISTICS:
        part = PARTS + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 4
        tl.store(part, tl.sum(delta_sum))
        tl.store(part + 1, tl.sum(weight_sum))
        tl.store(part + 2, tl.sum(lost_sum))
        tl.store(part + 3, tl.sum(same_sum))
