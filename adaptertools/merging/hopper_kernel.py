# ruff: noqa: ANN001, ANN202 -- Gluon reads the annotations of a kernel as its own
"""The plain sum of triton_kernel.py, to the same bits, with the instructions of Hopper GPUs (H100, H200).

A program stays on its multiprocessor and takes an equal share of all tiles. One of its warps has the copy engine fetch
tiles of W and of the factors well ahead. Two groups of four warps each keep 64 rows of the left factor in registers;
while the matrix units multiply for the next tile, a group adds the last product to W in place and has the copy engine
store it. So loads, products and stores all run at once, which Triton's own pipelines do not bring about: 81 % of the
bandwidth of a copy at rank 32 where those reach 75, 66 % at rank 128 for 43.

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
    count = columns // across
    tiles = count * (rows // (2 * _ROWS))
    processors = torch.cuda.get_device_properties(weight.device).multi_processor_count
    _add_product[(min(tiles, processors),)](
        _described(weight, [2 * _ROWS, across]),
        _described(out, [_ROWS, across]),
        *(_described(half, [2 * _ROWS, rank]) for half in split.left),
        _described(split.right.view(2 * rank, -1), [2 * rank, across]),
        split.left_scale,
        split.right_scale,
        count,
        tiles,
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


@gluon.jit  # type: ignore[untyped-decorator]
def _add_product(  # type: ignore[no-untyped-def]
    weight,
    out,
    left_high,
    left_low,
    right,
    LEFT_SCALE,
    RIGHT_SCALE,
    count,
    total,
    ACROSS: gl.constexpr,
    RANK: gl.constexpr,
    ROWS: gl.constexpr,
    ROOM: gl.constexpr,
    FACTOR_ROOM: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Of `total` tiles, `count` to a block of rows, each program takes an equal share, in their order."""
    first = gl.program_id(0) * total // gl.num_programs(0)
    stop = (gl.program_id(0) + 1) * total // gl.num_programs(0)
    share = (first, stop, count)
    tiles = gl.allocate_shared_memory(weight.dtype, [ROOM, 2 * ROWS, ACROSS], weight.layout)
    factors = gl.allocate_shared_memory(right.dtype, [FACTOR_ROOM, 2 * RANK, ACROSS], right.layout)
    # the one that fetches fills a place, and both groups free it
    tile_ring = (tiles, _barriers(ROOM, 1), _barriers(ROOM, 2))
    factor_ring = (factors, _barriers(FACTOR_ROOM, 1), _barriers(FACTOR_ROOM, 2))
    fence_async_shared()
    given = (out, left_high, LEFT_SCALE, RIGHT_SCALE)
    gl.warp_specialize(
        [
            (_compute, (given, tile_ring, factor_ring, share, ACROSS, RANK, ROWS, ROOM, FACTOR_ROOM, 0)),
            (_compute, (given, tile_ring, factor_ring, share, ACROSS, RANK, ROWS, ROOM, FACTOR_ROOM, ROWS)),
            (
                _fetch,
                (weight, left_high, left_low, right, tile_ring, factor_ring, share, ACROSS, ROWS, ROOM, FACTOR_ROOM),
            ),
        ],
        [4, 1],
        [216, 24],
    )


@gluon.jit  # type: ignore[untyped-decorator]
def _barriers(ROOM: gl.constexpr, COUNT: gl.constexpr):  # type: ignore[no-untyped-def]
    """One for each place of a ring, which `COUNT` have to arrive at."""
    barriers = gl.allocate_shared_memory(gl.int64, [ROOM, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(ROOM):
        mbarrier.init(barriers.index(place), count=COUNT)
    return barriers


@gluon.jit  # type: ignore[untyped-decorator]
def _fetch(  # type: ignore[no-untyped-def]
    weight,
    left_high,
    left_low,
    right,
    tile_ring,
    factor_ring,
    share,
    ACROSS: gl.constexpr,
    ROWS: gl.constexpr,
    ROOM: gl.constexpr,
    FACTOR_ROOM: gl.constexpr,
):
    first, stop, count = share
    turn = 0  # of the factors, where the halves of the left one come before the tiles of a block of rows
    for block in range(first // count, (stop - 1) // count + 1):
        row = block * (2 * ROWS)
        _fetch_one(left_high, row, 0, turn, factor_ring, FACTOR_ROOM)
        _fetch_one(left_low, row, 0, turn + 1, factor_ring, FACTOR_ROOM)
        turn += 2
        for tile in range(max(first, block * count), min(stop, (block + 1) * count)):
            column = (tile - block * count) * ACROSS
            _fetch_one(right, 0, column, turn, factor_ring, FACTOR_ROOM)
            _fetch_one(weight, row, column, tile - first, tile_ring, ROOM)
            turn += 1


@gluon.jit  # type: ignore[untyped-decorator]
def _fetch_one(matrix, row, column, turn, ring, ROOM: gl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of the matrix, into the next place of the ring once that is free."""
    places, full, free = ring
    at = turn % ROOM
    mbarrier.wait(free.index(at), (turn // ROOM) & 1 ^ 1)
    mbarrier.expect(full.index(at), matrix.block_shape[0] * matrix.block_shape[1] * 2)  # bytes
    place = places.index(at)._reinterpret(matrix.dtype, matrix.block_shape, matrix.layout)
    tma.async_copy_global_to_shared(matrix, [row, column], full.index(at), place)


@gluon.jit  # type: ignore[untyped-decorator]
def _compute(  # type: ignore[no-untyped-def]
    given,
    tile_ring,
    factor_ring,
    share,
    ACROSS: gl.constexpr,
    RANK: gl.constexpr,
    ROWS: gl.constexpr,
    ROOM: gl.constexpr,
    FACTOR_ROOM: gl.constexpr,
    BELOW: gl.constexpr,
):
    """What one group does: its `ROWS` rows of every block of rows, which begin `BELOW` rows into the block."""
    out, like, LEFT_SCALE, RIGHT_SCALE = given
    factors, full, free = factor_ring
    first, stop, count = share
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ACROSS, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PRODUCT, k_width=2)
    zero = gl.zeros([ROWS, ACROSS], gl.float32, PRODUCT)
    i = BELOW + gl.arange(0, ROWS, layout=gl.SliceLayout(1, PRODUCT))
    j = gl.arange(0, ACROSS, layout=gl.SliceLayout(0, PRODUCT))
    turn = 0
    for block in range(first // count, (stop - 1) // count + 1):
        row = block * (2 * ROWS)
        left_scale = gl.load(LEFT_SCALE + row + i)
        left_high = _take_left(like, turn, factor_ring, LEFT, ROWS, FACTOR_ROOM, BELOW)
        left_low = _take_left(like, turn + 1, factor_ring, LEFT, ROWS, FACTOR_ROOM, BELOW)
        turn += 2
        begin = max(first, block * count)
        last = min(stop, (block + 1) * count) - 1
        at = turn % FACTOR_ROOM
        mbarrier.wait(full.index(at), (turn // FACTOR_ROOM) & 1)
        product = warpgroup_mma_wait(0, deps=[_begin_product(left_high, left_low, factors.index(at), zero, RANK)])
        mbarrier.arrive(free.index(at))
        turn += 1
        for tile in range(begin, last):
            column = (tile - block * count) * ACROSS
            # asked for before the wait, so that it is here when the product is scaled
            scales = (left_scale, gl.load(RIGHT_SCALE + column + j))
            at = turn % FACTOR_ROOM
            mbarrier.wait(full.index(at), (turn // FACTOR_ROOM) & 1)
            coming = _begin_product(left_high, left_low, factors.index(at), zero, RANK)
            _add(product, scales, tile - first, tile_ring, out, row + BELOW, column, PRODUCT, ROWS, ROOM, BELOW)
            product = warpgroup_mma_wait(0, deps=[coming])
            mbarrier.arrive(free.index(at))
            turn += 1
        column = (last - block * count) * ACROSS
        scales = (left_scale, gl.load(RIGHT_SCALE + column + j))
        _add(product, scales, last - first, tile_ring, out, row + BELOW, column, PRODUCT, ROWS, ROOM, BELOW)
    tma.store_wait(pendings=0)


@gluon.jit  # type: ignore[untyped-decorator]
def _take_left(  # type: ignore[no-untyped-def]
    like, turn, ring, LEFT: gl.constexpr, ROWS: gl.constexpr, ROOM: gl.constexpr, BELOW: gl.constexpr
):
    """The group's rows of a half of the left factor, into registers; the places of both are `like` one of them."""
    places, full, free = ring
    at = turn % ROOM
    mbarrier.wait(full.index(at), (turn // ROOM) & 1)
    half = places.index(at)._reinterpret(like.dtype, like.block_shape, like.layout).slice(BELOW, ROWS).load(LEFT)
    fence_async_shared()  # or the copy engine may write here while it is still being read
    mbarrier.arrive(free.index(at))
    return half


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
    product,
    scales,
    turn,
    ring,
    out,
    row,
    column,
    PRODUCT: gl.constexpr,
    ROWS: gl.constexpr,
    ROOM: gl.constexpr,
    BELOW: gl.constexpr,
):
    """Add the scaled product to W where that lies, begin to store the sum, and free the last place, now stored."""
    places, full, free = ring
    left_scale, right_scale = scales
    delta = product * gl.expand_dims(left_scale, 1) * gl.expand_dims(right_scale, 0)
    at = turn % ROOM
    mbarrier.wait(full.index(at), (turn // ROOM) & 1)
    tile = places.index(at).slice(BELOW, ROWS)
    wide = tile.load(PRODUCT).to(gl.float32)
    tile.store((wide + delta).to(tile.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], tile)
    tma.store_wait(pendings=1)
    mbarrier.arrive(free.index((turn + ROOM - 1) % ROOM), pred=turn > 0)
