"""A tensor cut along the edges of its updates, into cells: within one, every update covers all of it.

So the updates of a cell, however many adapters they are from, are one product of factors side by side.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from adaptertools.merging.edits import Edit, Update


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cell:
    """A block of a tensor, and left · right that is added to it, scale and weight in left.

    `renormalized` says which ranks are of which of the edit's renormalizations, by its place there; these ranks want
    their gains still.

    Shapes: left (rows, r), right (r, columns); r is 0 where nothing is added
    """

    rows: slice
    columns: slice
    left: Tensor
    right: Tensor
    renormalized: tuple[tuple[int, slice], ...] = ()


def cut(edit: Edit, arithmetic: torch.dtype, device: torch.device) -> list[Cell]:
    """The cells that an edit's tensor consists of, from top to bottom and from left to right."""
    terms: list[tuple[Update, float, int | None]] = [(update, 1.0, None) for update in edit.updates]
    terms += [(each.update, each.weight, place) for place, each in enumerate(edit.renormalizations)]
    rows, columns = edit.matrix
    cells = []
    for band in _between(rows, [update.block[0] for update, _, _ in terms]):
        inside = [term for term in terms if _covers(term[0].block[0], band)]
        for across in _between(columns, [update.block[1] for update, _, _ in inside]):
            here = [term for term in inside if _covers(term[0].block[1], across)]
            cells.append(_cell(band, across, here, arithmetic, device))
    return cells


def _cell(
    band: slice,
    across: slice,
    terms: list[tuple[Update, float, int | None]],
    arithmetic: torch.dtype,
    device: torch.device,
) -> Cell:
    lefts = [torch.empty(band.stop - band.start, 0, dtype=arithmetic, device=device)]
    rights = [torch.empty(0, across.stop - across.start, dtype=arithmetic, device=device)]
    renormalized = []
    rank = 0
    for update, weight, place in terms:
        left = update.left[band.start - update.row : band.stop - update.row]
        right = update.right[:, across.start - update.column : across.stop - update.column]
        # widened on the device: fewer bytes go there
        lefts.append((left.to(device).to(torch.float64) * (update.scale * weight)).to(arithmetic))
        rights.append(right.to(device).to(arithmetic))
        if place is not None:
            renormalized.append((place, slice(rank, rank + left.shape[1])))
        rank += left.shape[1]
    return Cell(
        rows=band,
        columns=across,
        left=torch.cat(lefts, dim=1),
        right=torch.cat(rights),
        renormalized=tuple(renormalized),
    )


def _between(size: int, blocks: list[slice]) -> list[slice]:
    """From one edge to the next."""
    edges = sorted({0, size, *(block.start for block in blocks), *(block.stop for block in blocks)})
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _covers(block: slice, part: slice) -> bool:
    return bool(block.start <= part.start and part.stop <= block.stop)
