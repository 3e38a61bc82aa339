"""LoHa and LoKr as the low-rank products that they are, without their dense weights.

    LoHa    (a₁·b₁)∘(a₂·b₂) = A·B, where a row of A is the Kronecker product of the rows of a₁ and a₂, and a column of B
            that of the columns of b₁ and b₂: rank r²
    LoKr    w₁⊗w₂ = (u₁⊗u₂)·(v₁⊗v₂), where w₁ = u₁·v₁ and w₂ = u₂·v₂: rank r₁·r₂. A half that is stored whole is
            itself times the identity, of the smaller of its sizes

A convolution is the matrix (out, in·k·k). A product whose rank would be beyond the smaller size of the matrix is the
matrix itself, times the identity: no factors of that rank are smaller. Everything is computed in float64.

Source: KohakuBlueleaf/LyCORIS 4.1.3: modules/loha.py, modules/lokr.py, functional/general.py
"""

import math

import torch
from torch import Tensor

from adaptertools.dialects.kohya.factors import Pair, Rounding, check_factor
from adaptertools.dialects.kohya.keys import Group
from adaptertools.errors import ShapeError, UnpairedFactorError

_Factors = tuple[Tensor, Tensor]
"""The left factor (rows, r) and the right one (r, columns)."""


def loha_pair(group: Group, rounding: Rounding) -> Pair:
    """The factors of a LoHa module. Its alpha is divided by r, not by the rank of these.

    Shapes: hada_w*_a (out, r), hada_w*_b (r, in·k·k)
            with a core hada_w*_a (r, out), hada_w*_b (r, in), hada_t* (r, r, k, k)
    Memory: lora_A (r², in·k·k), lora_B (out, r²), or one dense weight where that is smaller
    Raises: UnpairedFactorError, ShapeError
    """
    parts = _floats(group, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2"))
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        raise UnpairedFactorError(f"{group.name}: one of hada_t1 and hada_t2 is missing. The file is not whole")
    core = parts.get("hada_t1")
    left1, right1 = _half(group, parts["hada_w1_a"], parts["hada_w1_b"], core)
    left2, right2 = _half(group, parts["hada_w2_a"], parts["hada_w2_b"], parts.get("hada_t2"))
    rows, columns = left1.shape[0], right1.shape[1]
    if (left2.shape[0], right2.shape[1]) != (rows, columns):
        raise ShapeError(
            f"{group.name}: its halves are {rows} by {columns} and {left2.shape[0]} by {right2.shape[1]}; they are "
            "multiplied element by element and must be alike"
        )
    if left1.shape[1] * left2.shape[1] > min(rows, columns):
        lora_B, lora_A = _trivial((left1 @ right1) * (left2 @ right2))
    else:
        lora_B = (left1[:, :, None] * left2[:, None, :]).flatten(1)
        lora_A = (right1[:, None, :] * right2[None, :, :]).flatten(0, 1)
    kernel = tuple(core.shape[2:]) if core is not None else ()
    return _settled(group, rounding, lora_A, lora_B, kernel, rank=parts["hada_w1_b"].shape[0])


def lokr_pair(group: Group, rounding: Rounding) -> Pair:
    """The factors of a LoKr module. alpha is divided by r, and counts only where a half is stored as factors.

    Shapes: lokr_w1 (a, b) or lokr_w1_a (a, r), lokr_w1_b (r, b); lokr_w2 (c, d[, k, k]) or lokr_w2_a (c, r),
            lokr_w2_b (r, d·k·k), or with a core lokr_w2_a (r, c), lokr_w2_b (r, d), lokr_t2 (r, r, k, k)
            -> a weight of (a·c, b·d[, k, k])
    Memory: lora_A (r₁·r₂, b·d·k·k), lora_B (a·c, r₁·r₂); two whole halves make these as large as a dense weight or two
    Raises: UnpairedFactorError, ShapeError
    """
    left1, right1, rank1 = _stored_half(group, "lokr_w1", None)
    left2, right2, rank2 = _stored_half(group, "lokr_w2", "lokr_t2")
    shaped = group.parts.get("lokr_w2", group.parts.get("lokr_t2"))
    kernel = tuple(shaped.shape[2:]) if shaped is not None else ()
    if left1.shape[1] * left2.shape[1] > min(left1.shape[0] * left2.shape[0], right1.shape[1] * right2.shape[1]):
        lora_B, lora_A = _trivial(torch.kron(left1 @ right1, left2 @ right2))
    else:
        lora_B, lora_A = torch.kron(left1, left2), torch.kron(right1, right2)
    rank = rank2 or rank1
    return _settled(group, rounding, lora_A, lora_B, kernel, rank=rank or 1, scales=rank is not None)


def _settled(
    group: Group,
    rounding: Rounding,
    lora_A: Tensor,
    lora_B: Tensor,
    kernel: tuple[int, ...],
    *,
    rank: int,
    scales: bool = True,
) -> Pair:
    rounding.computed += 1
    stored = tuple(group.parts.values())
    columns = lora_A.shape[1]
    shape = (lora_B.shape[0], columns // math.prod(kernel), *kernel)
    return Pair(
        lora_A=rounding.settle(lora_A, *stored),
        lora_B=rounding.settle(lora_B, *stored),
        shape=shape,
        rank=rank,
        scales=scales,
    )


def _floats(group: Group, needed: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Tensor]:
    """The parts in float64.

    Raises: UnpairedFactorError, EmptyFactorError
    """
    missing = [part for part in needed if part not in group.parts]
    if missing:
        there = ", ".join(group.parts)
        raise UnpairedFactorError(f"{group.name}: {there} is there, {missing[0]} is not. The file is not whole")
    found = {part: group.parts[part] for part in (*needed, *optional) if part in group.parts}
    for part, tensor in found.items():
        check_factor(group.name, part, tensor)
    return {part: tensor.to(torch.float64) for part, tensor in found.items()}


def _half(group: Group, left: Tensor, right: Tensor, core: Tensor | None) -> _Factors:
    """One product of two factors; with a core both are turned, and it joins the right one.

    Shapes: left (rows, r), right (r, columns); with core (p, q, *k): left (p, rows), right (q, in) -> columns in·k
    """
    if left.ndim != 2 or right.ndim != 2:
        raise ShapeError(
            f"{group.name}: factors of shapes {tuple(left.shape)} and {tuple(right.shape)} are no matrices"
        )
    if core is None:
        if left.shape[1] != right.shape[0]:
            raise ShapeError(
                f"{group.name}: factors of shapes {tuple(left.shape)} and {tuple(right.shape)} disagree about the rank"
            )
        return left, right
    if core.ndim < 3 or core.shape[:2] != (left.shape[0], right.shape[0]):
        raise ShapeError(
            f"{group.name}: a core of shape {tuple(core.shape)} does not go with factors of shapes "
            f"{tuple(left.shape)} and {tuple(right.shape)}"
        )
    return left.T.contiguous(), torch.einsum("pq...,qn->pn...", core, right).flatten(1)


def _stored_half(group: Group, name: str, core: str | None) -> tuple[Tensor, Tensor, int | None]:
    """One half of a Kronecker product as two factors, and its r if it is stored as such."""
    if name in group.parts:
        extra = [part for part in (f"{name}_a", f"{name}_b", core) if part in group.parts]
        if extra:
            raise ShapeError(f"{group.name}: {name} stands beside {extra[0]}; which one is meant?")
        whole = _floats(group, (name,), ())[name]
        if core is None and whole.ndim != 2:
            raise ShapeError(f"{group.name}: {name} has shape {tuple(whole.shape)}, expected a matrix")
        return *_trivial(whole.flatten(1)), None
    parts = _floats(group, (f"{name}_a", f"{name}_b"), (core,) if core else ())
    left, right = _half(group, parts[f"{name}_a"], parts[f"{name}_b"], parts.get(core) if core else None)
    return left, right, parts[f"{name}_b"].shape[0]


def _trivial(whole: Tensor) -> _Factors:
    """A matrix as itself times the identity of its smaller size: exact, and of no higher rank than it may have."""
    rows, columns = whole.shape
    if rows < columns:
        return torch.eye(rows, dtype=whole.dtype, device=whole.device), whole
    return whole, torch.eye(columns, dtype=whole.dtype, device=whole.device)
