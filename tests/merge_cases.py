"""Edits of every kind, and what they come to in float64: dense, and apart from the kernels."""

import torch
from torch import Tensor

from adaptertools.merging.edits import Edit, Renormalization, Update

EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
"""Half the distance of 1 from the next number, doubled below 2: the largest relative error of one rounding."""

SMALLEST = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150, torch.float64: 0.0}


def normal(*shape: int, seed: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype)


def update(
    rows: int,
    columns: int,
    rank: int,
    *,
    seed: int = 1,
    source: int = 0,
    scale: float = 1.0,
    row: int = 0,
    column: int = 0,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> Update:
    return Update(
        source=source,
        target="q_proj",
        left=normal(rows, rank, seed=seed, size=size, dtype=dtype),
        right=normal(rank, columns, seed=seed + 1, dtype=dtype),
        scale=scale,
        row=row,
        column=column,
    )


def edit_of(
    weight: Tensor,
    *updates: Update,
    renormalizations: tuple[Renormalization, ...] = (),
    dtype: torch.dtype | None = None,
) -> Edit:
    rows, columns = weight.shape
    return Edit(
        name="model.q_proj.weight",
        source="model.q_proj.weight",
        shape=(rows, columns),
        matrix=(rows, columns),
        dtype=dtype or weight.dtype,
        updates=updates,
        renormalizations=renormalizations,
    )


def exact(edit: Edit, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The result in float64 before any rounding, and the size of the numbers that were added up for it."""
    wide = weight.to(torch.float64)
    total, size = wide.clone(), wide.abs()
    for each in edit.updates:
        left, right = each.left.to(torch.float64) * each.scale, each.right.to(torch.float64)
        total[each.block] += left @ right
        size[each.block] += left.abs() @ right.abs()
    for change in edit.renormalizations:
        each = change.update
        left, right = each.left.to(torch.float64) * each.scale, each.right.to(torch.float64)
        dense = wide[each.block] + left @ right
        axis = 1 if change.axis == "row" else 0
        gain = (change.magnitude.to(torch.float64) / torch.linalg.vector_norm(dense, dim=axis)).unsqueeze(axis)
        total[each.block] += change.weight * (gain * dense - wide[each.block])
        parts = wide[each.block].abs() + left.abs() @ right.abs()
        size[each.block] += abs(change.weight) * (gain.abs() * parts + wide[each.block].abs())
    return total, size


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of a half-precision dtype to those of float64.

    torch goes by float32, which rounds twice; what float32 cuts off is kept in its last bit here, so that it does not.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return total.to(dtype)
    single = total.to(torch.float32)
    beyond = single.double().abs() > total.abs()
    cut = torch.where(beyond, torch.nextafter(single, torch.zeros_like(single)), single)
    odd = cut.view(torch.int32) | (cut.double() != total).to(torch.int32)
    return odd.view(torch.float32).to(dtype)


def share_correct(found: Tensor, total: Tensor) -> float:
    """The share of entries that are the nearest number of their dtype."""
    return float((found == rounded(total, found.dtype)).double().mean())
