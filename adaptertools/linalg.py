"""Factor algebra: what can be said of B·A, and done to it, without forming it.

Everything here is batched over leading dimensions, on the device of the factors. Factors are balanced by powers of two
and taken to float64: on a CPU their triangles come from Householder QR, on a GPU from matrix products (CholeskyQR2).
The r by r cores go to the CPU either way, where LAPACK on a few threads beats a GPU's batched SVD beyond 32 by 32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule
from adaptertools.errors import OptionError
from adaptertools.tensors import in_parallel

_EPSILON = torch.finfo(torch.float64).eps

_ORTHOGONAL_ENOUGH = 1e-2
"""How far the Gram matrix of CholeskyQR's first pass may be from the identity, so that the second makes it exact."""

_WELL_CONDITIONED = 1e-12
"""How far it is at most where multiplying by the inverse of the triangle is as exact as solving with it."""

_ONE_STEP = 1000
"""Exponents below this have a power of two whose reciprocal float64 holds; others are divided out in two steps."""

_DEVICES = "auto, cpu, cuda, cuda:N or mps"

_CORES_AT_ONCE = 4
"""Cores of a GPU's batch that one thread of the CPU takes at a time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProductSVD:
    """The singular value decomposition B·A = U·Σ·Vᵀ, held as small matrices that apply to the factors it was made of.

    `left` and `right` split Σ evenly: B·left = U·√Σ and right·A = √Σ·Vᵀ, so that no tall basis is kept. Directions
    whose singular value is lost in the rounding of float64 are zero in both.

    Shapes: singular_values (…, p), left (…, r, p), right (…, p, r), with p = min(out, in, r)
    """

    singular_values: Tensor
    left: Tensor
    right: Tensor

    def factors(self, lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of the product of at most this rank that is nearest to B·A, in float64; both of norm √Σσ.

        Shapes: lora_A (…, r, in), lora_B (…, out, r) -> (…, k, in), (…, out, k) with k = min(rank, p)
        Memory: both factors and the results in float64
        """
        left = self.left[..., :rank].to(lora_B.device)
        right = self.right[..., :rank, :].to(lora_A.device)
        return right @ lora_A.to(torch.float64), lora_B.to(torch.float64) @ left

    def __getitem__(self, index: int) -> Self:
        """One decomposition of a batch."""
        return type(self)(singular_values=self.singular_values[index], left=self.left[index], right=self.right[index])


def svd_of_product(lora_A: Tensor, lora_B: Tensor) -> ProductSVD:
    """The singular value decomposition of B·A, one for each pair of a batch; NaN where a factor is not finite.

    With B = Q·R and Aᵀ = P·S the singular values are those of the r by r core R·Sᵀ = U·Σ·Vᵀ, and Q·U·Σ = B·Sᵀ·V:
    neither Q nor P is needed. Every singular value is right to float64's epsilon times ‖B‖·‖A‖, both balanced.

    Shapes: lora_A (…, r, in), lora_B (…, out, r)
    Memory: two copies of one factor in float64
    Source: Eckart & Young 1936; QR of each factor, then SVD of an r by r matrix
    """
    return svds_of_products([(lora_A, lora_B)])[0]


def svds_of_products(batches: Iterable[tuple[Tensor, Tensor]]) -> list[ProductSVD]:
    """`svd_of_product` of several batches of pairs, whose cores share the threads of the CPU.

    Memory: two copies of one batch of factors in float64
    """
    triangles = [_Triangles.of(lora_A, lora_B) for lora_A, lora_B in batches]
    found = _core_svds([pair.core for pair in triangles])
    return [pair.decomposed(*svd) for pair, svd in zip(triangles, found, strict=True)]


def product_norm(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """‖B·A‖ in the Frobenius norm, one for each pair of a batch; NaN where a factor is not finite.

    With B = Q·R and Aᵀ = P·S it is ‖R·Sᵀ‖, since Q and P keep lengths: r by r matrices, whatever the weight's size.
    Unlike a trace of Gram matrices it loses no digits where the product is small beside its factors.

    Shapes: lora_A (…, r, in), lora_B (…, out, r) -> (…)
    Memory: two copies of one factor in float64
    """
    triangles = _Triangles.of(lora_A, lora_B)
    norm: Tensor = torch.ldexp(torch.linalg.matrix_norm(triangles.core), triangles.largest.squeeze(-1))
    return norm


def spectral_norm(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The largest singular value of B·A, one for each pair of a batch; NaN where a factor is not finite.

    Shapes: lora_A (…, r, in), lora_B (…, out, r) -> (…)
    Memory: two copies of one factor in float64
    """
    return svd_of_product(lora_A, lora_B).singular_values[..., 0]


def inner_product(lora_A: Tensor, lora_B: Tensor, other_A: Tensor, other_B: Tensor) -> Tensor:
    """⟨B·A, B'·A'⟩, the sum over all elements of one product times the other, from r by r' matrices.

    Shapes: lora_A (…, r, in), lora_B (…, out, r), other_A (…, r', in), other_B (…, out, r') -> (…)
    Memory: the factors in float64
    """
    rights = lora_A.to(torch.float64) @ other_A.to(torch.float64).mT
    lefts = lora_B.to(torch.float64).mT @ other_B.to(torch.float64)
    return (lefts * rights).sum(dim=(-2, -1))


def delta_norm(module: LoraModule) -> float:
    """‖s·B·A‖ in the Frobenius norm; over all experts of a stack. DoRA's magnitude, which needs the base, is left out.

    Memory: one factor in float64; the (out, in) delta weight is never formed
    """
    return abs(module.scaling) * float(torch.linalg.vector_norm(product_norm(module.lora_A, module.lora_B)))


def triangle(factor: Tensor) -> Tensor:
    """An upper triangle R with FᵀF = RᵀR, as in a thin QR factorisation.

    Shapes: (…, n, r) -> (…, min(n, r), r) on a CPU, (…, r, r) on a GPU
    """
    if factor.device.type == "cpu":
        r: Tensor = torch.linalg.qr(factor, mode="r").R
        return r
    return cholesky_triangle(factor)


def cholesky_triangle(factor: Tensor) -> Tensor:
    """The triangle by CholeskyQR2: matrix products alone, which is what a GPU does fast.

    Where a Gram matrix is not safely positive definite (dependent columns, a condition beyond 1e7), those of the batch
    are done again by Householder QR.

    Shapes: (…, n, r) -> (…, r, r)
    Memory: one copy of the factor
    Source: Yamamoto, Nakatsukasa, Yanagisawa & Fukaya 2015
    """
    batch = factor.reshape(-1, *factor.shape[-2:])
    first, failed = torch.linalg.cholesky_ex(batch.mT @ batch, upper=True)
    identity = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    inverse = torch.linalg.solve_triangular(first, identity.expand_as(first), upper=True)
    basis = batch @ inverse
    gram = basis.mT @ basis
    off = (gram - identity).abs().amax(dim=(-2, -1))
    if bool((rough := off >= _WELL_CONDITIONED).any()):
        better = basis[rough] + (batch[rough] - basis[rough] @ first[rough]) @ inverse[rough]
        gram[rough] = better.mT @ better
    second, failed_again = torch.linalg.cholesky_ex(gram, upper=True)
    unsafe = (failed != 0) | (failed_again != 0) | ~(off < _ORTHOGONAL_ENOUGH)
    result: Tensor = second @ first
    if bool(unsafe.any()):
        exact = torch.linalg.qr(batch[unsafe], mode="r").R
        result[unsafe] = torch.nn.functional.pad(exact, (0, 0, 0, result.shape[-2] - exact.shape[-2]))
    return result.reshape(*factor.shape[:-2], *result.shape[-2:])


def balanced(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The columns in float64, each divided by the power of two that brings it to size 1, and those powers' exponents.

    Dividing by powers of two loses no bit. It keeps a huge column of one factor, which meets a tiny row of the other,
    from drowning the rest, and squares from leaving the range of float64. The exponent of a column that is not finite
    is NaN.

    Shapes: (…, n, r) -> (…, n, r), (…, r)
    Memory: a copy in float64
    """
    wide = columns.to(torch.float64, copy=True)
    return wide, balance_(wide)


def balance_(wide: Tensor) -> Tensor:
    """The same in place, for columns in float64; the exponents alone are handed back."""
    size = torch.maximum(wide.amax(dim=-2), -wide.amin(dim=-2))
    exponents = torch.frexp(size).exponent.to(torch.float64)
    exponents += 0.0 * size  # NaN where it is not finite: LAPACK may lose that
    steps = [-exponents]
    if not bool((exponents.abs() < _ONE_STEP).all()):
        half = torch.trunc(exponents / 2)
        steps = [-half, half - exponents]
    for power in steps:
        wide *= torch.exp2(power).unsqueeze(-2)
    return exponents


def parse_device(name: str | torch.device, *, has_float64: bool = True) -> torch.device:
    """The device with this name; `auto` is the first CUDA device, else the CPU.

    `mps`, which is untested, has no float64: what needs that is computed on the CPU, and so this says.

    Raises: OptionError for a device that is not there, or that nothing here computes on
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise OptionError(f"device {name!r}: expected {_DEVICES}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise OptionError(f"device {name!r}: expected {_DEVICES}")
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise OptionError(f"device {name!r}: there is no such device, torch finds no MPS here")
        return torch.device("cpu" if has_float64 else "mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {name!r}: there is no such device, {torch.cuda.device_count()} of CUDA were found")
    return device


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Triangles:
    """The triangles of B and of Aᵀ, each balanced on its own, and the exponents of what their columns were divided by.

    `left` is weighted by both exponents, so that its product with `rightᵀ` is a core times 2 to the `largest`.
    """

    left: Tensor
    left_exponents: Tensor
    right: Tensor
    right_exponents: Tensor
    rank: int

    @classmethod
    def of(cls, lora_A: Tensor, lora_B: Tensor) -> Self:
        right, right_exponents = balanced(lora_A.mT)
        right = triangle(right)
        left, left_exponents = balanced(lora_B)
        return cls(
            left=triangle(left),
            left_exponents=left_exponents,
            right=right,
            right_exponents=right_exponents,
            rank=min(lora_A.shape[-2:] + lora_B.shape[-2:]),
        )

    @property
    def largest(self) -> Tensor:
        return (self.left_exponents + self.right_exponents).amax(dim=-1, keepdim=True)

    @property
    def weighted(self) -> Tensor:
        exponents = self.left_exponents + self.right_exponents - self.largest
        return self.left * torch.exp2(exponents).unsqueeze(-2)

    @property
    def core(self) -> Tensor:
        """B·A in the bases of both factors, divided by 2 to the `largest`."""
        return self.weighted @ self.right.mT

    def decomposed(self, U: Tensor, S: Tensor, Vh: Tensor) -> ProductSVD:
        """The decomposition of B·A from that of the core."""
        U, S, Vh = U[..., : self.rank], S[..., : self.rank], Vh[..., : self.rank, :]
        noise = _EPSILON * torch.linalg.matrix_norm(self.weighted) * torch.linalg.matrix_norm(self.right)
        lost = noise.unsqueeze(-1) >= S
        half = torch.where(lost, 0.0, S.rsqrt())
        root = torch.exp2(self.largest / 2)
        # B = B̃·2^e with B̃ the balanced columns, so that B̃·X = B·2^(-e)·X; likewise for A
        to_left = torch.exp2(self.right_exponents - self.largest) * root
        to_right = torch.exp2(self.left_exponents - self.largest) * root
        return ProductSVD(
            singular_values=torch.where(lost, 0.0, S) * torch.exp2(self.largest),
            left=to_left.unsqueeze(-1) * (self.right.mT @ Vh.mT) * half.unsqueeze(-2),
            right=half.unsqueeze(-1) * (U.mT @ self.left) * to_right.unsqueeze(-2),
        )


def _core_svds(cores: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """U, Σ and Vᵀ of batches of r by r matrices; Σ is NaN for those that are not finite, which LAPACK would refuse.

    Those of a GPU travel to the CPU: batched SVDs of cuSOLVER take 320 ms for 224 of 64 by 64 on an H200, threads 14.
    """
    sound = [torch.isfinite(core).flatten(-2).all(dim=-1) for core in cores]
    whole = [torch.where(ok[..., None, None], core, 0.0) for core, ok in zip(cores, sound, strict=True)]
    found = _svds_on_host(whole) if any(core.is_cuda for core in cores) else [_thin_svd(core) for core in whole]
    return [(U, torch.where(ok.unsqueeze(-1), S, torch.nan), Vh) for (U, S, Vh), ok in zip(found, sound, strict=True)]


def _svds_on_host(cores: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The same of matrices of a GPU, by all threads of the CPU; through page-locked memory, which copies faster."""
    hosts = [torch.empty(core.shape, dtype=core.dtype, pin_memory=True).copy_(core) for core in cores]
    pieces = [torch.split(host.reshape(-1, *host.shape[-2:]), _CORES_AT_ONCE) for host in hosts]
    done = in_parallel(_thin_svd, [piece for group in pieces for piece in group])
    svds = []
    for core, group in zip(cores, pieces, strict=True):
        U, S, Vh = (_gathered(part).to(core.device) for part in zip(*islice(done, len(group)), strict=True))
        batch = core.shape[:-2]
        svds.append((U.reshape(*batch, *U.shape[1:]), S.reshape(*batch, -1), Vh.reshape(*batch, *Vh.shape[1:])))
    return svds


def _gathered(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a batch as one, in page-locked memory."""
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    return torch.cat(list(parts), out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=True))


def _thin_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return U, S, Vh
