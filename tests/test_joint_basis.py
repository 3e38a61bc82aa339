"""The basis of several factors' common space: orthonormal, of the right rank, and the same however they are written."""

import pytest
import torch
from torch import Tensor

from adaptertools.operations.joint_basis import joint_basis


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vectors(columns: Tensor) -> Tensor:
    return columns @ joint_basis(columns).combination


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (1, 3), (7, 1)])
def test_the_basis_is_that_of_a_dense_svd_up_to_signs(shape: tuple[int, int]) -> None:
    columns = random(*shape)
    basis = joint_basis(columns)
    U, _, _ = torch.linalg.svd(columns, full_matrices=False)
    assert basis.rank == min(shape)
    assert torch.allclose((U.mT @ vectors(columns)).abs(), torch.eye(basis.rank, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(basis.coordinates, vectors(columns).mT @ columns, atol=1e-12)
    assert torch.allclose(vectors(columns) @ basis.coordinates, columns, atol=1e-12)


def test_dependent_columns_add_no_rank_and_zeros_have_none() -> None:
    columns = random(8, 3)
    assert joint_basis(torch.cat([columns, columns, columns @ random(3, 2)], dim=1)).rank == 3
    nothing = joint_basis(torch.zeros(8, 3, dtype=torch.float64))
    assert (nothing.rank, nothing.combination.shape, nothing.coordinates.shape) == (0, (3, 0), (0, 3))


def test_equal_singular_values_leave_nothing_to_chance() -> None:
    """Every rotation of the columns has the same F·Fᵀ, and so must have the same basis."""
    orthonormal = torch.linalg.qr(random(10, 4)).Q * torch.tensor([2.0, 2.0, 2.0, 0.5], dtype=torch.float64)
    wanted = vectors(orthonormal)
    assert torch.allclose(wanted.mT @ wanted, torch.eye(4, dtype=torch.float64), atol=1e-12)
    for seed in range(5):
        rotation = torch.linalg.qr(random(4, 4, seed=seed)).Q
        assert torch.allclose((wanted.mT @ vectors(orthonormal @ rotation)).abs(), torch.eye(4).double(), atol=1e-9)


def test_the_basis_of_unit_vectors_is_the_unit_vectors() -> None:
    columns = torch.eye(6, dtype=torch.float64)[:, [4, 1, 2]]
    assert torch.allclose(vectors(columns).abs(), torch.eye(6, dtype=torch.float64)[:, [1, 2, 4]], atol=1e-14)
