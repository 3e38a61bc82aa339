"""W + Σ s·B·A on blocks of rows: against float64, rounded once, on the CPU and on CUDA."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import EPSILON, SMALLEST, edit_of, exact, normal, share_correct, update
from torch import Tensor

from adaptertools.errors import NonFiniteError
from adaptertools.merging import kernels, tiles
from adaptertools.merging.edits import Edit, Renormalization, Update
from adaptertools.merging.kernels import full_precision, prepare

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
FALLBACK = pytest.param("cuda without Triton", marks=CUDA.marks)

ARITHMETIC_ERROR = 2.0**-20
"""Of float32, over a few dozen terms of either sign, relative to the sum of their sizes."""


@pytest.fixture(params=["cpu", CUDA, FALLBACK])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda without Triton":
        monkeypatch.setattr(kernels, "has_triton", lambda: False)
    return torch.device(request.param.split()[0])


def merge(
    edit: Edit, weight: Tensor, device: torch.device, edges: tuple[int, ...] = (), in_place: bool = False
) -> Tensor:
    """The whole result, from blocks between these rows."""
    prepared = prepare(edit, device)
    blocks = [(start, stop) for start, stop in pairwise(sorted({0, *edges, len(weight)}))]
    there = weight.to(device, copy=True)
    if prepared.wants_norms:
        for start, stop in reversed(blocks):
            prepared.measure(there[start:stop], start)
        prepared.settle()
    parts = [
        prepared.merged(there[start:stop], start, there[start:stop] if in_place else None) for start, stop in blocks
    ]
    merged = torch.cat(parts).cpu()
    check_statistics(prepared.statistics, edit, weight, merged)
    return merged


def check_statistics(found: kernels.Statistics, edit: Edit, weight: Tensor, merged: Tensor) -> None:
    total, size = exact(edit, weight)
    wide, result = weight.double(), merged.double()
    noise = ARITHMETIC_ERROR * float(size.square().sum().sqrt())
    assert math.sqrt(found.delta) == pytest.approx(float((total - wide).norm()), rel=1e-4, abs=noise)
    assert math.sqrt(found.weight) == pytest.approx(float(wide.norm()), rel=1e-4)
    assert math.sqrt(found.lost) == pytest.approx(float((result - total).norm()), rel=1e-3, abs=noise)
    assert found.unchanged == int((merged == weight.to(merged.dtype)).sum())
    assert found.elements == weight.numel()


def check(edit: Edit, weight: Tensor, merged: Tensor) -> None:
    """Every entry is one rounding and float32's error away from the exact one."""
    total, size = exact(edit, weight)
    bound = EPSILON[edit.dtype] * total.abs() + SMALLEST[edit.dtype] + ARITHMETIC_ERROR * size
    assert merged.dtype == edit.dtype
    assert bool(((merged.double() - total).abs() <= bound).all())


@st.composite
def edits(draw: st.DrawFn) -> tuple[Edit, Tensor]:
    rows, columns = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    seed = draw(st.integers(0, 1000))
    weight_dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    factor_dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))

    def one(place: int) -> Update:
        row, column = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
        if draw(st.booleans()):
            row = column = 0
        down = rows - row if draw(st.booleans()) else draw(st.integers(1, rows - row))
        across = columns - column if draw(st.booleans()) else draw(st.integers(1, columns - column))
        made = update(
            down,
            across,
            draw(st.sampled_from([1, 3, 8, 16, 40])),
            seed=seed + 10 * place,
            source=place,
            scale=draw(st.sampled_from([1.0, -0.5, 1.7, 0.0])),
            row=row,
            column=column,
            dtype=factor_dtype,
            size=0.1,
        )
        if draw(st.booleans()):  # as a transposed weight has it
            made = replace(made, left=made.left.mT.contiguous().mT, right=made.right.mT.contiguous().mT)
        return made

    updates = tuple(one(place) for place in range(draw(st.integers(0, 3))))
    renormalizations = []
    for place in range(draw(st.integers(0, 2))):
        axis = draw(st.sampled_from(["row", "column"]))
        changed = one(place + 3)
        size = changed.left.shape[0] if axis == "row" else changed.right.shape[1]
        magnitude = normal(size, seed=seed + 500 + place).abs() + 0.5
        weight = draw(st.sampled_from([1.0, 0.5]))
        renormalizations.append(Renormalization(update=changed, weight=weight, magnitude=magnitude, axis=axis))
    # away from 0, where a norm would be 0 and float16 would lose the weight
    weight = (normal(rows, columns, seed=seed + 900) + 0.01).to(weight_dtype)
    result = draw(st.sampled_from([weight_dtype, torch.float32]))
    return edit_of(weight, *updates, renormalizations=tuple(renormalizations), dtype=result), weight


@given(case=edits(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_edit_of_any_shape_in_any_blocks_is_that_of_float64(case: tuple[Edit, Tensor], data: st.DataObject) -> None:
    edit, weight = case
    edges = tuple(data.draw(st.lists(st.integers(0, len(weight)), max_size=3)))
    check(edit, weight, merge(edit, weight, torch.device("cpu"), edges))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@given(case=edits(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_edit_on_the_gpu_is_that_of_float64(case: tuple[Edit, Tensor], data: st.DataObject) -> None:
    edit, weight = case
    edges = tuple(data.draw(st.lists(st.integers(0, len(weight)), max_size=3)))
    check(edit, weight, merge(edit, weight, torch.device("cuda"), edges))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [1, 4])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-4])
def test_nearly_every_entry_is_the_correctly_rounded_one(
    device: torch.device, dtype: torch.dtype, factors: torch.dtype, adapters: int, size: float
) -> None:
    """`size` is that of the delta weight, relative to the weight."""
    weight = normal(768, 1024, seed=0, size=0.02, dtype=dtype)
    each = size * 0.02 / math.sqrt(32 * adapters)
    updates = [
        update(768, 1024, 32, seed=10 * place + 1, source=place, scale=1.0, dtype=factors, size=each)
        for place in range(adapters)
    ]
    edit = edit_of(weight, *updates)
    merged = merge(edit, weight, device, edges=(256, 300))
    check(edit, weight, merged)
    assert share_correct(merged, exact(edit, weight)[0]) >= 0.9999


@pytest.mark.parametrize("rank", [1, 8, 16, 32, 64, 128, 200, 320])
def test_float32_weights_have_the_error_of_a_float32_product(device: torch.device, rank: int) -> None:
    weight = torch.zeros(300, 520)
    edit = edit_of(weight, update(300, 520, rank, scale=0.7))
    total, size = exact(edit, weight)
    worst = float(((merge(edit, weight, device).double() - total).abs() / size).max())
    plain = float(((edit.updates[0].left * 0.7 @ edit.updates[0].right).double() - total).abs().div(size).max())
    assert worst <= 2 * max(plain, 3e-7)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (4096, 1), (129, 127), (128, 256), (256, 8200), (70, 12000)])
@pytest.mark.parametrize("rank", [1, 32, 128])
def test_every_shape_is_covered_to_its_last_row_and_column(
    device: torch.device, shape: tuple[int, int], rank: int
) -> None:
    weight = normal(*shape, seed=3, dtype=torch.bfloat16)
    edit = edit_of(weight, update(*shape, rank, size=0.01))
    check(edit, weight, merge(edit, weight, device))
    assert torch.equal(merge(edit, weight, device, in_place=True), merge(edit, weight, device))


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_in_blocks_is_that_of_float64(device: torch.device, axis: str, dtype: torch.dtype) -> None:
    weight = normal(700, 600, seed=5, size=0.02, dtype=dtype)
    plain, other = update(700, 600, 16, size=0.001), update(200, 600, 8, seed=7, source=1, row=300, size=0.002)
    changes = [
        Renormalization(
            update=each,
            weight=share,
            magnitude=torch.linalg.vector_norm(weight.float()[each.block], dim=1 if axis == "row" else 0) * 1.1,
            axis=axis,  # type: ignore[arg-type]
        )
        for each, share in ((plain, 1.0), (other, 0.5))
    ]
    edit = edit_of(weight, update(700, 600, 32, seed=20, source=2, size=0.001), renormalizations=tuple(changes))
    merged = merge(edit, weight, device, edges=(100, 350, 351))
    check(edit, weight, merged)
    if dtype == torch.bfloat16:
        assert share_correct(merged, exact(edit, weight)[0]) >= 0.9999


@pytest.mark.parametrize("axis", ["row", "column"])
def test_a_norm_that_nearly_cancels_keeps_its_digits(device: torch.device, axis: str) -> None:
    """W + s·B·A is a millionth of W, so that a sum of squares would have lost everything."""
    left, right = normal(40, 1, seed=1), normal(1, 50, seed=2)
    weight = (left.double() @ right.double() * 1.000001).float()
    changed = Update(source=0, target="q", left=left, right=right, scale=-1.0)
    dense = (weight.double() - left.double() @ right.double()).norm(dim=1 if axis == "row" else 0)
    edit = edit_of(
        weight,
        renormalizations=(Renormalization(update=changed, weight=1.0, magnitude=dense.float(), axis=axis),),  # type: ignore[arg-type]
    )
    merged = merge(edit, weight, device)
    lost = 3e-7 * float(weight.abs().max())
    assert float((merged.double() - exact(edit, weight)[0]).abs().max()) < lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_made_elsewhere_are_added_as_those_made_here(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of MPS, and of CPUs without oneDNN, with the CPU in the place of the other device."""
    weight = normal(300, 5000, seed=5, size=0.02, dtype=dtype)
    magnitude = torch.linalg.vector_norm(weight.float(), dim=1) * 1.1
    change = Renormalization(update=update(300, 5000, 16, size=0.001), weight=1.0, magnitude=magnitude, axis="row")
    edit = edit_of(weight, update(300, 5000, 140, seed=20, source=2, size=0.001), renormalizations=(change,))
    found = merge(edit, weight, torch.device("cpu"))
    packed = tiles.pack(torch.ones(140, 6), dtype, torch.device("cpu"))
    monkeypatch.setattr(tiles, "_has_onednn", lambda: False)
    assert tiles.pack(torch.ones(140, 6), dtype, torch.device("cpu")) is None
    plain = merge(edit, weight, torch.device("cpu"))
    monkeypatch.setattr(tiles, "pack", lambda right, *_: [right[:100].mT.contiguous(), right[100:].mT.contiguous()])
    elsewhere = merge(edit, weight, torch.device("cpu"))
    for each in (found, plain, elsewhere):
        check(edit, weight, each)
    if packed is not None:
        assert [len(part[0]) for part in packed] == ([128, 12] if dtype == torch.bfloat16 else [32, 32, 32, 32, 12])


def test_float64_weights_or_factors_are_merged_in_float64(device: torch.device) -> None:
    for dtype, factors in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        weight = normal(60, 70, seed=1, dtype=dtype)
        edit = edit_of(weight, update(60, 70, 8, dtype=factors, scale=0.3), dtype=torch.float64)
        total, _ = exact(edit, weight)
        assert float((merge(edit, weight, device) - total).abs().max()) < 1e-13


def test_what_no_update_covers_keeps_every_bit(device: torch.device) -> None:
    weight = normal(96, 64, seed=1, dtype=torch.bfloat16)
    weight[:, ::3] = -0.0
    edit = edit_of(weight, update(32, 64, 8, row=0), update(32, 64, 8, row=64))
    merged = merge(edit, weight, device)
    assert torch.equal(merged[32:64].view(torch.int16), weight[32:64].view(torch.int16))
    assert not torch.equal(merged[:32], weight[:32])


@pytest.mark.parametrize("scale", [1e-30, 1e30, 2.0**-120, 2.0**100])
def test_scales_of_any_size_meet_factors_of_any_size(device: torch.device, scale: float) -> None:
    weight = normal(40, 50, seed=1)
    usual = update(40, 50, 8, size=0.01)
    odd = replace(update(40, 50, 8, seed=9), right=normal(8, 50, seed=3).double().div(scale).float(), scale=scale)
    edit = edit_of(weight, usual, odd)
    check(edit, weight, merge(edit, weight, device))


def test_ranks_of_very_different_size_do_not_drown_one_another(device: torch.device) -> None:
    """Huge columns of B meet tiny rows of A, and a column of zeros meets a huge row."""
    sizes = torch.tensor([1e12, 1.0, 1e-12, 0.0])
    left, right = normal(50, 4, seed=1) * sizes, normal(4, 60, seed=2) / sizes.clamp(min=1e-20).unsqueeze(1)
    weight = normal(50, 60, seed=3)
    edit = edit_of(weight, Update(source=0, target="q", left=left, right=right, scale=1.0))
    check(edit, weight, merge(edit, weight, device))


@pytest.mark.parametrize("factor", ["left", "right"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_is_an_error_that_names_its_adapter(
    device: torch.device, factor: str, value: float
) -> None:
    weight = normal(40, 50, seed=1, dtype=torch.bfloat16)
    bad = update(40, 50, 4, seed=9, source=1)
    getattr(bad, factor)[1, 2] = value
    prepared = prepare(edit_of(weight, update(40, 50, 4), bad), device, sources=("one", "two"))
    with pytest.raises(NonFiniteError, match=r"^two: q_proj: its factors hold NaN or infinity"):
        prepared.merged(weight.to(device), 0) is None or prepared.statistics


def test_a_weight_that_is_not_finite_is_an_error_that_names_it(device: torch.device) -> None:
    weight = normal(40, 50, seed=1)
    weight[3, 4] = math.nan
    prepared = prepare(edit_of(weight, update(40, 50, 4)), device)
    with pytest.raises(NonFiniteError, match=r"^model.q_proj.weight: .*the base weight holds NaN or infinity"):
        prepared.merged(weight.to(device), 0) is None or prepared.statistics


def test_a_result_beyond_its_dtype_is_an_error(device: torch.device) -> None:
    weight = normal(40, 50, seed=1, dtype=torch.float16)
    prepared = prepare(edit_of(weight, update(40, 50, 4, scale=1e6)), device)
    with pytest.raises(NonFiniteError, match=r"leaves the range of torch\.float16"):
        prepared.merged(weight.to(device), 0) is None or prepared.statistics


@pytest.mark.parametrize("axis", ["row", "column"])
def test_a_norm_of_zero_is_an_error(device: torch.device, axis: str) -> None:
    weight = normal(40, 40, seed=1)
    weight[3], weight[:, 3] = 0.0, 0.0
    changed = replace(update(40, 40, 4), scale=0.0)
    change = Renormalization(update=changed, weight=1.0, magnitude=torch.ones(40), axis=axis)  # type: ignore[arg-type]
    prepared = prepare(edit_of(weight, renormalizations=(change,)), device)
    there = weight.to(device)
    if prepared.wants_norms:
        prepared.measure(there, 0)
        prepared.settle()
    with pytest.raises(NonFiniteError, match="has norm 0"):
        prepared.merged(there, 0) is None or prepared.statistics


def test_statistics_do_not_depend_on_the_order_of_the_blocks() -> None:
    weight = normal(900, 300, seed=1, dtype=torch.bfloat16)
    edit = edit_of(weight, update(900, 300, 8, size=0.001))
    found = []
    for starts in ([0, 100, 200, 300, 400, 500, 600, 700, 800], [300, 800, 0, 500, 200, 100, 700, 400, 600]):
        prepared = prepare(edit, torch.device("cpu"))
        for start in starts:
            prepared.merged(weight[start : start + 100], start)
        found.append(prepared.statistics)
    assert found[0] == found[1]


def test_statistics_hold_for_weights_whose_squares_float32_cannot_hold() -> None:
    weight = normal(40, 50, seed=1, size=1e25)
    prepared = prepare(edit_of(weight, update(40, 50, 4)), torch.device("cpu"))
    prepared.merged(weight, 0)
    assert math.sqrt(prepared.statistics.weight) == pytest.approx(float(weight.double().norm()), rel=1e-6)


def test_a_process_that_allows_itself_less_precision_gets_float32_all_the_same(device: torch.device) -> None:
    weight = torch.zeros(256, 256)
    edit = edit_of(weight, update(256, 256, 64))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            merged = merge(edit, weight, device)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    total, size = exact(edit, weight)
    assert float(((merged.double() - total).abs() / size).max()) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [32, 128])
def test_cpu_and_cuda_agree(dtype: torch.dtype, rank: int) -> None:
    weight = normal(1000, 1500, seed=1, size=0.02, dtype=dtype)
    edit = edit_of(weight, update(1000, 1500, rank, size=1e-4))
    here, there = (merge(edit, weight, torch.device(name)) for name in ("cpu", "cuda"))
    if dtype == torch.bfloat16:
        assert float((here == there).double().mean()) >= 0.9999
    _, size = exact(edit, weight)
    apart = (here.double() - there.double()).abs()
    assert bool((apart <= 2 * EPSILON[dtype] * here.double().abs() + 2e-6 * size).all())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)
@pytest.mark.parametrize("rank", [20, 32, 33, 64, 100, 128])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 384), (1024, 4096), (128, 14336), (14336, 1152)])
def test_the_kernel_for_hopper_gives_the_bits_of_the_portable_one(
    rows: int, columns: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, from one part of a matrix into a part of another, and on a block of rows."""
    from adaptertools.merging import hopper_kernel, triton_kernel

    wide = normal(rows, columns + 256, seed=1, size=0.02, dtype=torch.bfloat16).cuda()
    left, right = normal(rows, rank, seed=2, size=1e-4).cuda(), normal(rank, columns, seed=3).cuda()
    split = triton_kernel.split(left, right)
    weight = wide[:, 128 : 128 + columns]
    total = weight.double() + left.double() @ right.double()
    fast = torch.zeros_like(wide)[:, 64 : 64 + columns]
    assert hopper_kernel.add_product(weight, split, fast)
    assert float((fast == total.bfloat16()).double().mean()) >= 0.9999
    in_place = wide.clone()
    triton_kernel.add_product(
        in_place[:, 128 : 128 + columns], split, None, None, in_place[:, 128 : 128 + columns], False
    )
    assert torch.equal(in_place[:, 128 : 128 + columns], fast)
    assert torch.equal(in_place[:, :128], wide[:, :128])
    assert torch.equal(in_place[:, 128 + columns :], wide[:, 128 + columns :])
    block = torch.zeros_like(weight[-128:])
    assert hopper_kernel.add_product(weight[-128:], split.rows(rows - 128, 128), block)
    assert torch.equal(block, fast[-128:])
    monkeypatch.setattr(triton_kernel, "_hopper_kernel", lambda device: None)
    portable = torch.zeros_like(weight)
    triton_kernel.add_product(weight, split, None, None, portable, False)
    assert torch.equal(portable, fast)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)
@pytest.mark.parametrize("rank", [32, 64, 128])
def test_the_kernel_for_hopper_gives_these_bits_over_and_over(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty times with nothing between, each on the result of the one before."""
    from adaptertools.merging import hopper_kernel, triton_kernel

    weight = normal(4096, 4096, seed=1, size=0.02, dtype=torch.bfloat16).cuda()
    left, right = normal(4096, rank, seed=2, size=1e-4).cuda(), normal(rank, 4096, seed=3).cuda()
    splits = [triton_kernel.split(left, right), triton_kernel.split(left, -right)] * 20
    fast, portable = weight.clone(), weight.clone()
    for split in splits:
        assert hopper_kernel.add_product(fast, split, fast)
    monkeypatch.setattr(triton_kernel, "_hopper_kernel", lambda device: None)
    for split in splits:
        triton_kernel.add_product(portable, split, None, None, portable, False)
    assert not torch.equal(portable, weight)
    assert torch.equal(portable, fast)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "dtype"),
    [
        (100, 128, 32, torch.bfloat16),
        (128, 100, 32, torch.bfloat16),
        (128, 128, 16, torch.bfloat16),
        (128, 128, 300, torch.bfloat16),
        (128, 128, 32, torch.float32),
    ],
)
def test_what_the_kernel_for_hopper_does_not_take_it_leaves_to_the_portable_one(
    rows: int, columns: int, rank: int, dtype: torch.dtype
) -> None:
    from adaptertools.merging import hopper_kernel, triton_kernel

    weight = normal(rows, columns, seed=1, size=0.02, dtype=dtype).cuda()
    left, right = normal(rows, rank, seed=2, size=1e-3).cuda(), normal(rank, columns, seed=3).cuda()
    split, out = triton_kernel.split(left, right), torch.zeros_like(weight)
    assert not hopper_kernel.add_product(weight, split, out)
    assert not out.any()
    triton_kernel.add_product(weight, split, None, None, out, False)
    torch.testing.assert_close(out.double(), weight.double() + left.double() @ right.double(), rtol=5e-3, atol=1e-6)
