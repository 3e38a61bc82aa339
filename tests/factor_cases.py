"""Awkward factors, for the same tests on a CPU and on a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps
ACCURACY = 1e-14
"""How far singular values may be off, relative to the magnitude of what is summed up."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal values in float64, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_condition(condition: float, rows: int = 60, columns: int = 6, seed: int = 0) -> Tensor:
    """A tall matrix whose singular values fall evenly, on a logarithmic scale, from 1 to 1 / condition."""
    left = torch.linalg.qr(normal(rows, columns, seed=seed)).Q
    right = torch.linalg.qr(normal(columns, columns, seed=seed + 1)).Q
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), columns, dtype=torch.float64)
    return (left * values) @ right.mT


def deficient(rows: int = 60, columns: int = 6, rank: int = 2) -> Tensor:
    """A matrix whose columns depend on each other."""
    return normal(rows, rank, seed=3) @ normal(rank, columns, seed=4)


def _with_column(value: float, column: int = 2) -> Tensor:
    matrix = normal(60, 6, seed=5)
    matrix[:, column] = value
    return matrix


COLUMN_SCALES = torch.tensor([1.0, 1e-3, 1e3, 1e-6, 1e6, 1.0], dtype=torch.float64)

TALL = {
    "random": normal(60, 6),
    "a batch": normal(2, 3, 60, 6),
    "one column": normal(60, 1),
    "square": normal(6, 6),
    "fewer rows than columns": normal(4, 6),
    "a condition of 1e6": with_condition(1e6),
    "a condition of 1e9": with_condition(1e9),
    "a condition of 1e12": with_condition(1e12),
    "a condition of 1e15": with_condition(1e15),
    "dependent columns": deficient(),
    "columns that repeat": normal(60, 1).repeat(1, 6),
    "a column of zeros": _with_column(0.0),
    "zero": torch.zeros(60, 6, dtype=torch.float64),
    "columns of other sizes": normal(60, 6) * COLUMN_SCALES,
    "a batch of which some are dependent": torch.stack([normal(60, 6), deficient(), normal(60, 6, seed=7)]),
    "a batch of which one is zero": torch.stack([torch.zeros(60, 6, dtype=torch.float64), normal(60, 6)]),
    "a batch of all sorts": torch.stack([with_condition(10.0**power, seed=power) for power in range(0, 16, 3)]),
}
"""Matrices (…, n, r) for triangles."""


@dataclass(frozen=True)
class Pair:
    """Two factors."""

    lora_A: Tensor
    lora_B: Tensor

    @property
    def dense(self) -> Tensor:
        """Their product in float64."""
        return self.lora_B.double() @ self.lora_A.double()

    @property
    def magnitude(self) -> Tensor:
        """‖|B|·|A|‖, by whose rounding the product is uncertain; it is not small where columns cancel."""
        product = self.lora_B.double().abs() @ self.lora_A.double().abs()
        largest = product.amax(dim=(-2, -1), keepdim=True)
        largest = torch.where(largest == 0, 1.0, largest)  # squares of the product itself may leave float64
        return torch.linalg.matrix_norm(product / largest) * largest[..., 0, 0]


def _regauged(pair: Pair, scales: Tensor) -> Pair:
    """The same product from factors of which one column is huge where its row is tiny."""
    return Pair(pair.lora_A / scales.unsqueeze(-1), pair.lora_B * scales)


_PLAIN = Pair(normal(6, 40), normal(50, 6, seed=1))
_GAUGE = torch.tensor([1e30, 1e-30, 1.0, 1e15, 1e-15, 1e8], dtype=torch.float64)

PAIRS = {
    "random": _PLAIN,
    "float32": Pair(normal(6, 40).float(), normal(50, 6, seed=1).float()),
    "float16": Pair(normal(6, 40).half(), normal(50, 6, seed=1).half()),
    "bfloat16": Pair(normal(6, 40).bfloat16(), normal(50, 6, seed=1).bfloat16()),
    "a batch": Pair(normal(3, 6, 40), normal(3, 50, 6, seed=1)),
    "a batch of batches": Pair(normal(2, 3, 4, 20), normal(2, 3, 10, 4, seed=1)),
    "rank 1": Pair(normal(1, 40), normal(50, 1, seed=1)),
    "full rank": Pair(normal(6, 6), normal(9, 6, seed=1)),
    "out below the rank": Pair(normal(6, 40), normal(4, 6, seed=1)),
    "in below the rank": Pair(normal(6, 3), normal(50, 6, seed=1)),
    "both below the rank": Pair(normal(6, 3), normal(2, 6, seed=1)),
    "a factor of condition 1e10": Pair(with_condition(1e10).mT, normal(50, 6, seed=1)),
    "both factors of condition 1e10": Pair(with_condition(1e10).mT, with_condition(1e10, seed=8)),
    "dependent rows": Pair(deficient().mT, normal(50, 6, seed=1)),
    "dependent rows and columns": Pair(deficient().mT, deficient(50)),
    "a direction that is zero": Pair(_with_column(0.0).mT, normal(50, 6, seed=1)),
    "columns that cancel": Pair(torch.cat([normal(3, 40), -normal(3, 40)]), normal(50, 3, seed=1).repeat(1, 2)),
    "huge columns that meet tiny rows": _regauged(_PLAIN, _GAUGE),
    "all tiny": Pair(normal(6, 40) * 1e-140, normal(50, 6, seed=1) * 1e-140),
    "all huge": Pair(normal(6, 40) * 1e140, normal(50, 6, seed=1) * 1e140),
    "zero": Pair(torch.zeros(6, 40, dtype=torch.float64), normal(50, 6, seed=1)),
    "both zero": Pair(torch.zeros(6, 40, dtype=torch.float64), torch.zeros(50, 6, dtype=torch.float64)),
    "a batch of which some are dependent or zero": Pair(
        torch.stack([normal(6, 40), deficient(40).mT, torch.zeros(6, 40, dtype=torch.float64), normal(6, 40, seed=9)]),
        normal(4, 50, 6, seed=1),
    ),
}
"""Pairs of factors (…, r, in) and (…, out, r)."""


def check_triangle(factor: Tensor, triangle: Tensor) -> None:
    """FᵀF = RᵀR, each entry as near as rounding the columns that it comes from allows; the singular values too."""
    found = triangle.cpu()
    assert found.shape[-1] == factor.shape[-1]
    assert torch.equal(found, found.triu())
    sizes = factor.norm(dim=-2)
    allowed = 40 * factor.shape[-1] * EPSILON * sizes.unsqueeze(-1) * sizes.unsqueeze(-2)
    assert ((found.mT @ found - factor.mT @ factor).abs() <= allowed).all()
    values, expected = (torch.linalg.svdvals(matrix) for matrix in (found, factor))
    count = min(values.shape[-1], expected.shape[-1])
    allowed = 40 * factor.shape[-1] * EPSILON * expected[..., :1]
    assert ((values[..., :count] - expected[..., :count]).abs() <= allowed).all()
    assert (values[..., count:] <= allowed).all()


def check_svd(pair: Pair, values: Tensor, lora_A: Tensor, lora_B: Tensor, rank: int) -> None:
    """Singular values and factors of this rank: those of the dense product, at its smallest possible distance."""
    values, lora_A, lora_B = values.cpu(), lora_A.cpu(), lora_B.cpu()
    unit = torch.where(pair.magnitude == 0, 1.0, pair.magnitude)
    dense = pair.dense / unit[..., None, None]
    expected = torch.linalg.svdvals(dense)
    found = values / unit[..., None]
    count = found.shape[-1]
    assert ((found - expected[..., :count]).abs() <= ACCURACY).all()
    assert (expected[..., count:] <= ACCURACY).all()
    error = torch.linalg.matrix_norm(dense - lora_B / unit[..., None, None] @ lora_A)
    assert (error <= torch.linalg.vector_norm(expected[..., rank:], dim=-1) + ACCURACY).all()
    for lengths in (lora_A.norm(dim=-1), lora_B.norm(dim=-2)):
        assert torch.allclose(lengths**2 / unit[..., None], found[..., :rank], rtol=0, atol=1e-10)
