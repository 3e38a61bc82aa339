"""How far a sum is from what was meant after its factors were rounded, against the norm of the sum itself.

Elements of factors are right to an epsilon, but where terms cancel little is left for that rounding to be small beside.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptertools.linalg import triangle
from adaptertools.tensors import all_finite

_EXACT_RANK = 128
"""Rows of lora_A up to which the norms are exact; beyond, the work would outweigh that of the sum itself many times."""

_DIRECTIONS = 32
"""Random directions that norms are estimated from: within 13 % of the norm (one sigma) at worst, for a rank of 1."""

_CHUNK = 1 << 16
"""Elements of lora_B handled at once."""

_FLOAT64 = 2.0**-52
"""What float64 may lose in a factor and its product, relative to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SumError:
    """Errors of one module of a sum: 0.0 only where no bit was lost.

    `element` is the largest of an element of lora_A, lora_B and lora_bias, relative to the magnitudes that went into
    it; in the delta weight it is bounded by `element` times Σ |cᵢ|·|Bᵢ|·|Aᵢ|. `delta` is ‖ΔW' − ΔW‖ / ‖ΔW‖.
    """

    element: float = 0.0
    delta: float = 0.0
    estimated: bool = False
    """whether `delta` is an estimate"""


EXACT = SumError()


def delta_error(meant_A: Tensor, meant_B: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[float, bool]:
    """‖B'·A' − B·A‖ / ‖B·A‖ of stored factors A', B' and those meant, in float64; and whether it is an estimate.

    With dB = B' − B and dA = A' − A the difference is [dB B]·[A'; dA], in which nothing cancels. Its norm is that of
    the lefts times the triangle of the rights, or times the rights in some random directions where they are many rows.
    What float64 may have lost in the factors that were meant is counted; values that are not finite are not.

    Shapes: meant_A, lora_A (…, r, in), meant_B, lora_B (…, out, r); on the CPU
    Memory: a few copies of the factors in float64
    """
    A, near_A = _of_fair_size(meant_A, lora_A)
    rank, rounded = A.shape[-2], not torch.equal(near_A.to(torch.float64), A)
    rights, estimated = _compressed(torch.cat([near_A, near_A - A], dim=-2) if rounded else A)
    near, off = rights[..., :rank, :], rights[..., rank:, :]
    meant = near - off if rounded else near
    distance, norm, columns = 0.0, 0.0, torch.zeros((), dtype=torch.float64)
    for B, near_B in _chunks(*_of_fair_size(meant_B, lora_B)):
        step = (near_B - B) @ near
        distance = math.hypot(distance, float(torch.linalg.vector_norm(step + B @ off if rounded else step)))
        norm = math.hypot(norm, float(torch.linalg.vector_norm(B @ meant)))
        columns = torch.hypot(columns, torch.linalg.vector_norm(B, dim=-2))
    lost = _FLOAT64 * float((columns * torch.linalg.vector_norm(near, dim=-1)).sum())
    norm = max(norm, lost)  # below that, float64 does not tell it from zero
    return (distance + lost) / norm if norm else 0.0, estimated


def _of_fair_size(meant: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with 0 for what is not finite; both times a power of two if float64 might not hold their squares."""
    if not (all_finite(meant) and all_finite(stored)):
        meant, stored = (torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0) for tensor in (meant, stored))
    if stored.dtype != torch.float64:
        return meant.to(torch.float64), stored
    exponent = -torch.frexp(meant.abs().amax()).exponent.clamp(-1000, 1000)
    return torch.ldexp(meant, exponent), torch.ldexp(stored, exponent)


def _chunks(meant: Tensor, stored: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some outputs at a time, in float64: temporaries of this size stay in the processor's cache.

    Shapes: (…, out, r) -> (…, some of out, r)
    """
    some = max(1, _CHUNK * meant.shape[-2] // meant.numel())
    for pair in zip(torch.split(meant, some, dim=-2), torch.split(stored, some, dim=-2), strict=True):
        yield pair[0], pair[1].to(torch.float64)


def _compressed(rows: Tensor) -> tuple[Tensor, bool]:
    """Fewer columns, such that left factors times them have the norms that they have times the rows: exactly, or about.

    Shapes: (…, r, n) -> (…, r, k)
    """
    if rows.shape[-2] <= _EXACT_RANK:
        return triangle(rows.mT).mT, False
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(rows.shape[-1], _DIRECTIONS, dtype=torch.float64, generator=generator)
    return rows @ directions.mul_(_DIRECTIONS**-0.5), True
