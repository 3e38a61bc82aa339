# ruff: noqa: ANN001, ANN202 -- Gluon reads the annotations of a kernel as its own
"""The plain sum of triton_kernel.py, to the same bits, with the instructions of Hopper GPUs (H100, H200).

One warp has the copy engine fetch tiles of W and of the right factor well ahead. Two groups of four warps each keep 64
rows of the left factor in registers; while the matrix units multiply for the next tile, a group adds the last product
to W in place and has the copy engine store it. So loads, products and stores all run at once, which Triton's own
pipelines do not bring about: 81 % of the bandwidth of a copy at rank 32 where those reach 75, 60 % at 128 for 43.

Written in Gluon, Triton's language a level below, which is experimental and changes from release to release.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from adaptertools.merging.triton_kernel import Split

_ROWS = 64
"""The rows of a group, which is what an instruction multiplies; a program has two groups."""

_TILES = {32: (128, 5, 3), 64: (128, 4, 2), 128: (64, 6, 4)}
"""By rank, the columns of a tile, and how many tiles of W and of the right factor have room: the fastest of an H200."""

_COST_OF_A_START = 4
"""What a program takes before its first tile is done, in tiles."""


def add_product(weight: Tensor, split: Split, out: Tensor) -> bool:
    """out = W + left · right, rounded once, if the kernel takes these shapes and dtypes; `out` may be `weight`.

    Shapes: weight (m, n), out (m, n)
    Memory: nothing
    """
    rows, columns = weight.shape
    rank = split.left.shape[2]
    if rank not in _TILES or not all(_is_taken(each) for each in (weight, out)):
        return False
    across, room, factor_room = _TILES[rank]
    if rows % (2 * _ROWS) or columns % across:
        return False
    chain = _chain(columns // across, rows // (2 * _ROWS), weight.device)
    _add_product[(columns // across // chain, rows // (2 * _ROWS))](
        _described(weight, [2 * _ROWS, across]),
        _described(out, [_ROWS, across]),
        *split.left,
        _described(split.right.view(2 * rank, -1), [2 * rank, across]),
        split.left_scale,
        split.right_scale,
        chain,
        ACROSS=across,
        RANK=rank,
        ROWS=_ROWS,
        ROOM=room,
        FACTOR_ROOM=factor_room,
        num_warps=4,
    )
    return True


def _is_taken(matrix: Tensor) -> bool:
    """Whether the copy engine can reach it, and the tiles are as large as there is room for."""
    is_aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 8 == 0 and matrix.stride(1) == 1
    return matrix.dtype == torch.bfloat16 and is_aligned and bool(matrix.numel())


def _described(matrix: Tensor, tile: list[int]) -> TensorDescriptor:
    """The matrix as the copy engine knows it."""
    dtype = gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(matrix, tile, gl.NVMMASharedLayout.get_default_for(tile, dtype))


def _chain(across: int, down: int, device: torch.device) -> int:
    """The tiles of a program: so many that all multiprocessors are busy to the end, one program on each."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    lengths = [length for length in range(1, across + 1) if across % length == 0]
    return min(lengths, key=lambda length: -(-across // length * down // processors) * (length + _COST_OF_A_START))


@gluon.jit  # type: ignore[untyped-decorator]
def _add_product(  # type: ignore[no-untyped-def]
    weight,
    out,
    LEFT_HIGH,
    LEFT_LOW,
    right,
    LEFT_SCALE,
    RIGHT_SCALE,
    chain,
    ACROSS: gl.constexpr,
    RANK: gl.constexpr,
    ROWS: gl.constexpr,
    ROOM: gl.constexpr,
    FACTOR_ROOM: gl.constexpr,
    num_warps: gl.constexpr,
):
    row = gl.program_id(1) * (2 * ROWS)
    first = gl.program_id(0) * chain * ACROSS
    tiles = gl.allocate_shared_memory(weight.dtype, [ROOM, 2 * ROWS, ACROSS], weight.layout)
    factors = gl.allocate_shared_memory(right.dtype, [FACTOR_ROOM, 2 * RANK, ACROSS], right.layout)
    tile_full = gl.allocate_shared_memory(gl.int64, [ROOM, 1], mbarrier.MBarrierLayout())
    tile_free = gl.allocate_shared_memory(gl.int64, [ROOM, 1], mbarrier.MBarrierLayout())
    factor_full = gl.allocate_shared_memory(gl.int64, [FACTOR_ROOM, 1], mbarrier.MBarrierLayout())
    factor_free = gl.allocate_shared_memory(gl.int64, [FACTOR_ROOM, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(ROOM):
        mbarrier.init(tile_full.index(place), count=1)
        mbarrier.init(tile_free.index(place), count=2)
    for place in gl.static_range(FACTOR_ROOM):
        mbarrier.init(factor_full.index(place), count=1)
        mbarrier.init(factor_free.index(place), count=2)
    fence_async_shared()
    buffers = (tiles, factors, tile_full, tile_free, factor_full, factor_free)
    given = (out, LEFT_HIGH, LEFT_LOW, LEFT_SCALE, RIGHT_SCALE)
    gl.warp_specialize(
        [
            (_compute, (given, buffers, row, first, chain, ACROSS, RANK, ROWS, ROOM, FACTOR_ROOM, 0)),
            (_compute, (given, buffers, row, first, chain, ACROSS, RANK, ROWS, ROOM, FACTOR_ROOM, ROWS)),
            (_fetch, (weight, right, buffers, row, first, chain, ACROSS, RANK, ROWS, ROOM, FACTOR_ROOM)),
        ],
        [4, 1],
        [216, 24],
    )


@gluon.jit  # type: ignore[untyped-decorator]
def _fetch(  # type: ignore[no-untyped-def]
    weight,
    right,
    buffers,
    row,
    first,
    chain,
    ACROSS: gl.constexpr,
    RANK: gl.constexpr,
    ROWS: gl.constexpr,
    ROOM: gl.constexpr,
    FACTOR_ROOM: gl.constexpr,
):
    tiles, factors, tile_full, tile_free, factor_full, factor_free = buffers
    for tile in range(chain):
        column = first + tile * ACROSS
        place = tile % FACTOR_ROOM
        mbarrier.wait(factor_free.index(place), (tile // FACTOR_ROOM) & 1 ^ 1)
        mbarrier.expect(factor_full.index(place), 2 * RANK * ACROSS * 2)
        tma.async_copy_global_to_shared(right, [0, column], factor_full.index(place), factors.index(place))
        place = tile % ROOM
        mbarrier.wait(tile_free.index(place), (tile // ROOM) & 1 ^ 1)
        mbarrier.expect(tile_full.index(place), 2 * ROWS * ACROSS * 2)
        tma.async_copy_global_to_shared(weight, [row, column], tile_full.index(place), tiles.index(place))


@gluon.jit  # type: ignore[untyped-decorator]
def _compute(  # type: ignore[no-untyped-def]
    given,
    buffers,
    row,
    first,
    chain,
    ACROSS: gl.constexpr,
    RANK: gl.constexpr,
    ROWS: gl.constexpr,
    ROOM: gl.constexpr,
    FACTOR_ROOM: gl.constexpr,
    BELOW: gl.constexpr,
):
    """The rows of one group, `BELOW` so many of the program's."""
    out, LEFT_HIGH, LEFT_LOW, LEFT_SCALE, RIGHT_SCALE = given
    tiles, factors, tile_full, tile_free, factor_full, factor_free = buffers
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ACROSS, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PRODUCT, k_width=2)
    row += BELOW
    i = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LEFT))
    k = gl.arange(0, RANK, layout=gl.SliceLayout(0, LEFT))
    left = gl.expand_dims(i, 1) * RANK + gl.expand_dims(k, 0)
    left_high = gl.load(LEFT_HIGH + left)
    left_low = gl.load(LEFT_LOW + left)
    left_scale = gl.load(LEFT_SCALE + row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, PRODUCT)))
    zero = gl.zeros([ROWS, ACROSS], gl.float32, PRODUCT)
    mbarrier.wait(factor_full.index(0), 0)
    product = warpgroup_mma_wait(0, deps=[_begin_product(left_high, left_low, factors.index(0), zero, RANK)])
    mbarrier.arrive(factor_free.index(0))
    for tile in range(chain - 1):
        ahead = (tile + 1) % FACTOR_ROOM
        mbarrier.wait(factor_full.index(ahead), ((tile + 1) // FACTOR_ROOM) & 1)
        coming = _begin_product(left_high, left_low, factors.index(ahead), zero, RANK)
        place = tile % ROOM
        mbarrier.wait(tile_full.index(place), (tile // ROOM) & 1)
        column = first + tile * ACROSS
        _add(product, left_scale, RIGHT_SCALE, out, tiles.index(place).slice(BELOW, ROWS), row, column, PRODUCT)
        tma.store_wait(pendings=1)
        mbarrier.arrive(tile_free.index((tile + ROOM - 1) % ROOM), pred=tile > 0)  # of the tile before
        product = warpgroup_mma_wait(0, deps=[coming])
        mbarrier.arrive(factor_free.index(ahead))
    place = (chain - 1) % ROOM
    mbarrier.wait(tile_full.index(place), ((chain - 1) // ROOM) & 1)
    column = first + (chain - 1) * ACROSS
    _add(product, left_scale, RIGHT_SCALE, out, tiles.index(place).slice(BELOW, ROWS), row, column, PRODUCT)
    tma.store_wait(pendings=0)


@gluon.jit  # type: ignore[untyped-decorator]
def _begin_product(left_high, left_low, right, zero, RANK: gl.constexpr):  # type: ignore[no-untyped-def]
    """The three products that count, the smaller ones first; they go on while other things are done."""
    right_high = right.slice(0, RANK)
    right_low = right.slice(RANK, RANK)
    product = warpgroup_mma(left_high, right_low, zero, use_acc=False, is_async=True)
    product = warpgroup_mma(left_low, right_high, product, is_async=True)
    return warpgroup_mma(left_high, right_high, product, is_async=True)


@gluon.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    product, left_scale, RIGHT_SCALE, out, tile, row, column, PRODUCT: gl.constexpr
):
    """Add it to W where that lies, and begin to store the sum."""
    j = column + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, PRODUCT))
    right_scale = gl.load(RIGHT_SCALE + j)
    wide = tile.load(PRODUCT).to(gl.float32)
    delta = product * gl.expand_dims(left_scale, 1) * gl.expand_dims(right_scale, 0)
    tile.store((wide + delta).to(tile.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], tile)
