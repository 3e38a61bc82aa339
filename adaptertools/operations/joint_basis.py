"""An orthonormal basis of what several factors span together, found from small matrices and never formed whole."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptertools.linalg import triangle
from adaptertools.operations.consensus import NEGLIGIBLE

_PIVOTS_ALIKE = 1e-6
"""Rows whose lengths differ by less than this share are equally good pivots: the first is taken."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointBasis:
    """The left singular vectors U of a tall matrix F = U·S·Zᵀ, by what they are to its columns.

    F·`combination` = U, and `coordinates` = Uᵀ·F. Both are small and on the CPU.

    Shapes: F (n, p); combination (p, R), coordinates (R, p), with R the rank of F
    """

    combination: Tensor
    coordinates: Tensor

    @property
    def rank(self) -> int:
        return self.coordinates.shape[0]


def joint_basis(columns: Tensor) -> JointBasis:
    """The left singular vectors of the columns, by falling singular value, up to their signs.

    They depend on F·Fᵀ alone. Singular values below 1e-9 of the largest count as zero. Where several are equal to that
    share, any basis of their space would do: it is then the one that Gram–Schmidt gives to the projections of the unit
    vectors on it, the longest first, which depends on the space alone.

    Shapes: (n, p)
    Memory: two copies of the columns
    Source: QR of the columns, then SVD of a p by p matrix
    """
    _, values, Zh = torch.linalg.svd(triangle(columns).cpu(), full_matrices=False)
    rank = int((values > NEGLIGIBLE * values[0]).sum())
    values, Zh = values[:rank], Zh[:rank]
    combination, coordinates = Zh.mT / values, values.unsqueeze(1) * Zh
    for start, stop in _equal(values.tolist()):
        vectors = (columns @ combination[:, start:stop].to(columns.device)).cpu()
        rotation = _settled(vectors)
        combination[:, start:stop] = combination[:, start:stop] @ rotation
        coordinates[start:stop] = rotation.mT @ coordinates[start:stop]
    return JointBasis(combination=combination, coordinates=coordinates)


def _equal(values: list[float]) -> Iterator[tuple[int, int]]:
    """The stretches of two or more values, falling, of which each is equal to the next."""
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] < values[stop - 1] * (1 - NEGLIGIBLE):
            if stop - start > 1:
                yield start, stop
            start = stop


def _settled(vectors: Tensor) -> Tensor:
    """The rotation that turns orthonormal vectors into the basis of their space that pivoted Gram–Schmidt picks.

    Shapes: (n, d) -> (d, d)
    """
    rest, picked = vectors, []
    for _ in range(vectors.shape[1]):
        lengths = torch.linalg.vector_norm(rest, dim=1)
        pivot = int((lengths >= lengths.max() * (1 - _PIVOTS_ALIKE)).nonzero()[0])
        direction = rest[pivot] / lengths[pivot]
        rest = rest - torch.outer(rest @ direction, direction)
        picked.append(direction)
    return torch.stack(picked, dim=1)
