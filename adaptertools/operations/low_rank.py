"""A DoRA module as a LoRA one: the nearest delta weight of a rank to what renormalising the base weight adds to it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptertools.errors import UnsupportedFeatureError
from adaptertools.module import LoraModule, ScaleRule

_WHOLE = 1024
"""Up to this many rows or columns all singular vectors are computed; beyond, only those wanted, nearly as good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The LoRA module, ‖ΔW‖ of the DoRA module, and ‖ΔW' − ΔW‖."""

    module: LoraModule
    norm: float
    error: float


def low_rank(module: LoraModule, base_weight: Tensor, rank: int) -> LowRank:
    """The LoRA module of at most this rank that is nearest to a DoRA module on its base weight, in Frobenius norm.

    ΔW = m · V/‖V‖ − W with V = W + s·B·A has the full rank of W as a rule, so that the error, which is measured against
    the factors as they are stored, may be large.

    Shapes: base_weight as the model stores it
    Memory: the delta weight in float32, three times; in float64 where it is small
    Raises: UnsupportedFeatureError for a slice of a fused weight; ShapeError for a weight of another shape
    Source: Eckart & Young 1936; beyond 1,024 rows and columns Halko et al. 2011, with six passes
    """
    if module.target.rows is not None:
        raise UnsupportedFeatureError(
            f"{module.target}: DoRA on a slice of a fused weight has no LoRA of its own; merge it"
        )
    small = min(module.in_features, module.out_features) <= _WHOLE
    delta = module.delta_weight(dtype=torch.float64 if small else torch.float32, base_weight=base_weight)
    matrix = delta.T if module.transposed else delta.reshape(module.out_features, module.in_features)
    count = min(rank, *matrix.shape)
    if small:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        V = Vh.T
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, q=min(count + 16, *matrix.shape), niter=6)
    root = S[:count].sqrt()
    made = replace(
        module,
        lora_A=(V[:, :count] * root).T.contiguous().to(module.lora_A.dtype),
        lora_B=(U[:, :count] * root).contiguous().to(module.lora_B.dtype),
        alpha=1.0,
        scale_rule=ScaleRule.DIRECT,
        magnitude=None,
        magnitude_axis="out",
    )
    left = made.lora_B.to(matrix) @ made.lora_A.to(matrix) - matrix
    return LowRank(module=made, norm=float(matrix.norm()), error=float(left.norm()))
