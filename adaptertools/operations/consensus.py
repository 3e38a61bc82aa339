"""Element-wise rules that make one matrix of several: TIES and DARE, on a stack of matrices of the same shape.

The rules see entries, so what they give depends on the basis that the matrices are in: `core_space` chooses it. All of
them commute with a change of sign of a row or a column, and with an exchange of two, as long as it is that of every
matrix. Singular vectors, whose sign is a matter of chance, are therefore a fair basis.
"""

from torch import Tensor

from adaptertools.errors import OptionError

NEGLIGIBLE = 1e-9
"""The share of a matrix's largest value up to which another is taken for rounding. Without it, an entry that should be
zero would have a sign by chance, and a vote."""

_ROUNDING = 1e-13
"""The share of the largest value of all matrices up to which one is rounding for certain, in float64."""


def without_rounding(matrices: Tensor) -> Tensor:
    """The matrices with zeros for what float64 cannot tell from zero, beside the largest value of them all.

    In a basis that they have in common, a weak matrix has the rounding of the strongest.

    Shapes: (T, …) -> (T, …)
    """
    return matrices.where(matrices.abs() > _ROUNDING * matrices.abs().max(), 0.0)


def ties(matrices: Tensor, density: float) -> Tensor:
    """Trim each matrix, elect a sign for each entry, and take the mean of the values that have it.

    Shapes: (T, …) -> (…)
    Source: Yadav et al., TIES-Merging, arXiv 2306.01708
    """
    return consensus(trim(matrices, density))


def trim(matrices: Tensor, density: float) -> Tensor:
    """Each matrix with its largest entries alone: the nearest whole number to `density` of them, one at least.

    Entries as large as the smallest of these are kept as well, so that none is preferred by its place.

    Shapes: (T, …) -> (T, …)
    Units:  density is a share of all entries of a matrix, zeros among them
    """
    sizes = matrices.abs().flatten(1)
    entries = sizes.shape[1]
    kept = max(1, round(density * entries))
    smallest = sizes.kthvalue(entries - kept + 1, dim=1, keepdim=True).values
    large = sizes >= smallest * (1 - NEGLIGIBLE)
    return matrices * large.reshape(matrices.shape)


def consensus(matrices: Tensor) -> Tensor:
    """The mean, entry by entry, of the values that have the sign of their sum.

    Zeros do not count, and where the sum is zero so is the result: preferring either sign would make it depend on the
    signs of the basis.

    Shapes: (T, …) -> (…)
    """
    sizes = matrices.abs()
    largest = sizes.flatten(1).amax(dim=1).reshape(-1, *[1] * (matrices.ndim - 1))
    settled = matrices.where(sizes > NEGLIGIBLE * largest, 0.0)
    total = settled.sum(dim=0)
    elected = total.sign().where(total.abs() > NEGLIGIBLE * settled.abs().sum(dim=0), 0.0)
    agreeing = (settled.sign() == elected) & (elected != 0)
    mean: Tensor = (settled * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)
    return mean


def drop_and_rescale(matrices: Tensor, density: float, chances: Tensor) -> Tensor:
    """Each entry dropped where its chance is not below `density`, the others divided by it; unbiased.

    Shapes: matrices and chances (T, …) -> (T, …)
    Units:  chances uniform in [0, 1)
    Source: Yu et al., DARE, arXiv 2311.03099, with density = 1 − p
    """
    return matrices.where(chances < density, 0.0) / density


def check_density(density: float) -> float:
    """Raises: OptionError for a density outside (0, 1]"""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise OptionError(f"density is {density!r:.40}, expected a number above 0 and at most 1")
    return float(density)
