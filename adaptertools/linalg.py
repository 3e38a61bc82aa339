"""Factor algebra: what can be said of B·A without forming it.

Everything here is batched over leading dimensions and computed in float64 on the device of the factors.
"""

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule


def delta_norm(module: LoraModule) -> float:
    """‖s·B·A‖ in the Frobenius norm; over all experts of a stack. DoRA's magnitude, which needs the base, is left out.

    Memory: one factor in float64; the (out, in) delta weight is never formed
    """
    return abs(module.scaling) * float(torch.linalg.vector_norm(product_norm(module.lora_A, module.lora_B)))


def product_norm(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """‖B·A‖ in the Frobenius norm, one for each pair of a batch; NaN where a factor is not finite.

    With B = Q·R and Aᵀ = P·S it is ‖R·Sᵀ‖, since Q and P keep lengths: r by r matrices, whatever the weight's size.
    Unlike a trace of Gram matrices it loses no digits where the product is small beside its factors.

    Shapes: lora_A (…, r, in), lora_B (…, out, r) -> (…)
    Memory: two copies of one factor in float64
    """
    right, right_exponents = _balanced(lora_A.transpose(-1, -2))
    right = triangle(right)
    left, left_exponents = _balanced(lora_B)
    left = triangle(left)
    exponents = left_exponents + right_exponents
    largest = exponents.amax(dim=-1, keepdim=True)
    core = (left * torch.exp2(exponents - largest).unsqueeze(-2)) @ right.transpose(-1, -2)
    norm: Tensor = torch.ldexp(torch.linalg.matrix_norm(core), largest.squeeze(-1))
    return norm


def triangle(factor: Tensor) -> Tensor:
    """The upper triangle R of a thin QR factorisation.

    Shapes: (…, n, r) -> (…, min(n, r), r)
    """
    r: Tensor = torch.linalg.qr(factor, mode="r").R
    return r


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
