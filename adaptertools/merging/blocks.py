"""Row blocks: the pieces in which a tensor is read, computed and written.

Their size depends on the kind of device alone, never on how many workers there are or how much memory they may take:
a matrix product over other rows may round otherwise, so that the blocks are part of what the result is.
"""

from collections.abc import Mapping

import torch

from adaptertools.merging.edits import Edit
from adaptertools.merging.plan import MergePlan

BLOCK_BYTES: Mapping[str, int] = {"cpu": 2 << 20, "cuda": 32 << 20}
"""The most that a block takes, by kind of device: what a core's cache holds, what keeps a bus busy. A row at least."""


def source_dtype(plan: MergePlan, edit: Edit) -> torch.dtype:
    """The dtype of what an edit begins with."""
    if edit.source is not None:
        return plan.base.dtypes[edit.source]
    assert edit.replacement is not None
    return edit.replacement.dtype


def block_rows(edit: Edit, source: torch.dtype, device: torch.device) -> list[slice]:
    """The rows of each block of a tensor whose source is of this dtype."""
    rows, columns = edit.matrix
    limit = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cpu"])
    step = max(1, limit // max(1, _row_bytes(edit, source)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows if columns else 0, step)]


def largest_block(edit: Edit, source: torch.dtype, device: torch.device) -> int:
    """The bytes of the largest block, in the wider of its two dtypes."""
    blocks = block_rows(edit, source, device)
    return max((block.stop - block.start for block in blocks), default=0) * _row_bytes(edit, source)


def _row_bytes(edit: Edit, source: torch.dtype) -> int:
    return edit.matrix[1] * max(source.itemsize, edit.dtype.itemsize)
