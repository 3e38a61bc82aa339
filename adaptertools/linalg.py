"""Factor algebra: what can be said of B·A, and done to it, without forming it.

Everything here is batched over leading dimensions, on the device of the factors. Factors are balanced by powers of two
and taken to float64: on a CPU their triangles come from Householder QR, on a GPU from matrix products (CholeskyQR2).
The r by r cores go to the CPU either way, where LAPACK on a few threads beats a GPU's batched SVD beyond 32 by 32.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule
from adaptertools.errors import OptionError
from adaptertools.tensors import in_parallel

_EPSILON = torch.finfo(torch.float64).eps

_ORTHOGONAL_ENOUGH = 1e-2
"""How far the Gram matrix of CholeskyQR's first pass may be from the identity, so that the second makes it exact."""

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
    right, right_exponents, left, left_exponents = _triangles(lora_A, lora_B)
    exponents = left_exponents + right_exponents
    largest = exponents.amax(dim=-1, keepdim=True)
    weights = torch.exp2(exponents - largest)
    weighted = left * weights.unsqueeze(-2)
    U, S, Vh = _core_svd(weighted @ right.mT)
    size = min(lora_A.shape[-2:] + lora_B.shape[-2:])
    U, S, Vh = U[..., :size], S[..., :size], Vh[..., :size, :]
    noise = _EPSILON * torch.linalg.matrix_norm(weighted) * torch.linalg.matrix_norm(right)
    lost = noise.unsqueeze(-1) >= S
    half = torch.where(lost, 0.0, S.rsqrt())
    root = torch.exp2(largest / 2)
    # B = B̃·2^e with B̃ the balanced columns, so that B̃·X = B·2^(-e)·X; likewise for A
    to_left = torch.exp2(exponents - largest - left_exponents) * root
    to_right = torch.exp2(exponents - largest - right_exponents) * root
    return ProductSVD(
        singular_values=torch.where(lost, 0.0, S) * torch.exp2(largest),
        left=to_left.unsqueeze(-1) * (right.mT @ Vh.mT) * half.unsqueeze(-2),
        right=half.unsqueeze(-1) * (U.mT @ left) * to_right.unsqueeze(-2),
    )


def product_norm(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """‖B·A‖ in the Frobenius norm, one for each pair of a batch; NaN where a factor is not finite.

    With B = Q·R and Aᵀ = P·S it is ‖R·Sᵀ‖, since Q and P keep lengths: r by r matrices, whatever the weight's size.
    Unlike a trace of Gram matrices it loses no digits where the product is small beside its factors.

    Shapes: lora_A (…, r, in), lora_B (…, out, r) -> (…)
    Memory: two copies of one factor in float64
    """
    right, right_exponents, left, left_exponents = _triangles(lora_A, lora_B)
    exponents = left_exponents + right_exponents
    largest = exponents.amax(dim=-1, keepdim=True)
    core = (left * torch.exp2(exponents - largest).unsqueeze(-2)) @ right.mT
    norm: Tensor = torch.ldexp(torch.linalg.matrix_norm(core), largest.squeeze(-1))
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
    basis = torch.linalg.solve_triangular(first, batch, upper=True, left=False)
    gram = basis.mT @ basis
    second, failed_again = torch.linalg.cholesky_ex(gram, upper=True)
    off = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax(dim=(-2, -1))
    unsafe = (failed != 0) | (failed_again != 0) | ~(off < _ORTHOGONAL_ENOUGH)
    result: Tensor = second @ first
    if bool(unsafe.any()):
        exact = torch.linalg.qr(batch[unsafe], mode="r").R
        result[unsafe] = torch.nn.functional.pad(exact, (0, 0, 0, result.shape[-2] - exact.shape[-2]))
    return result.reshape(*factor.shape[:-2], *result.shape[-2:])


def parse_device(name: str | torch.device) -> torch.device:
    """The device with this name; `auto` is the first CUDA device, else the CPU.

    Raises: OptionError for a device that is not there, or that has no float64
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device {name!r}: expected auto, cpu, cuda or cuda:N; {device.type} has no float64 here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {name!r}: there is no such device, {torch.cuda.device_count()} of CUDA were found")
    return device


def _core_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, Σ and Vᵀ of r by r matrices; NaN for those that are not finite, which LAPACK would refuse.

    Those of a GPU travel to the CPU: batched SVDs of cuSOLVER take 320 ms for 224 of 64 by 64 on an H200, threads 14.
    """
    sound = torch.isfinite(core).all(dim=-1).all(dim=-1)[..., None, None]
    cores = torch.where(sound, core, 0.0)
    if core.is_cuda:
        flat = cores.cpu().reshape(-1, *core.shape[-2:])
        found = in_parallel(torch.linalg.svd, torch.split(flat, _CORES_AT_ONCE))
        joined = (torch.cat(parts).to(core.device) for parts in zip(*found, strict=True))
        U, S, Vh = (part.reshape(*core.shape[:-2], *part.shape[1:]) for part in joined)
    else:
        U, S, Vh = torch.linalg.svd(cores, full_matrices=False)
    nothing = torch.tensor(torch.nan, dtype=S.dtype, device=S.device)
    return U, torch.where(sound.squeeze(-1), S, nothing), Vh


def _triangles(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The triangle of Aᵀ with its exponents, and that of B with its own; each factor is balanced on its own."""
    right, right_exponents = _balanced(lora_A.mT)
    right = triangle(right)
    left, left_exponents = _balanced(lora_B)
    return right, right_exponents, triangle(left), left_exponents


def _balanced(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The columns in float64, each divided by the power of two that brings it to size 1, and those powers' exponents.

    Dividing by powers of two loses no bit. It keeps a huge column of one factor, which meets a tiny row of the other,
    from drowning the rest, and squares from leaving the range of float64.
    """
    wide = columns.to(torch.float64, copy=True)
    size = wide.abs().amax(dim=-2)
    exponents = torch.frexp(size).exponent.to(torch.float64)
    exponents += 0.0 * size  # NaN where it is not finite: LAPACK may lose that
    half = torch.trunc(exponents / 2)
    for power in (-half, half - exponents):  # in two steps: 2**-1074 has no reciprocal
        wide *= torch.exp2(power).unsqueeze(-2)
    return wide, exponents
