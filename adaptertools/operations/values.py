"""Plain tensors of two adapters beside one another: whole weights, token rows, magnitudes, biases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adaptertools.adapter import RowWeights
from adaptertools.errors import NonFiniteError
from adaptertools.tensors import all_finite

Side = Literal["A", "B"]

_CHUNK = 1 << 20
"""Elements in float64 at a time."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueDifference:
    """A tensor that is not equal in A and B, in the Frobenius norm; infinitely far where the two cannot be compared."""

    name: str
    kind: str
    relative_distance: float
    max_abs: float | None = None
    only_in: Side | None = None
    note: str = ""
    """why the two cannot be compared"""


def compare_values(kind: str, name: str, one: Tensor | None, other: Tensor | None) -> ValueDifference | None:
    """How far a tensor of B is from that of A; None if they are equal, whatever their dtypes.

    Memory: chunks in float64
    Raises: NonFiniteError, unless they are equal bit for bit
    """
    if one is None or other is None:
        return _alone(kind, name, one is None, other is None)
    if one.shape != other.shape:
        note = f"shape {tuple(one.shape)} in A, {tuple(other.shape)} in B"
        return ValueDifference(name=name, kind=kind, relative_distance=math.inf, note=note)
    if equal_bits(one, other):
        return None
    norm, distance, largest = 0.0, 0.0, 0.0
    chunks = (torch.split(tensor.reshape(-1), _CHUNK) for tensor in (one, other))
    for ours, theirs in zip(*chunks, strict=True):
        wide = ours.to(torch.float64)
        step = wide - theirs.to(wide)
        norm = math.hypot(norm, float(torch.linalg.vector_norm(wide)))
        distance = math.hypot(distance, float(torch.linalg.vector_norm(step)))
        largest = max(largest, float(step.abs().amax()))
    if not math.isfinite(norm + distance):
        raise not_finite({f"A: {name}": one, f"B: {name}": other})
    if distance == 0:
        return None
    return ValueDifference(name=name, kind=kind, relative_distance=relative(distance, norm), max_abs=largest)


def compare_rows(kind: str, name: str, one: RowWeights | None, other: RowWeights | None) -> ValueDifference | None:
    """The same for rows, whose order in the file means nothing."""
    if one is None or other is None:
        return _alone(kind, name, one is None, other is None)
    if one.indices != other.indices:
        one, other = _in_order(one), _in_order(other)
    if one.indices != other.indices:
        note = f"rows {_few(one.indices)} in A, {_few(other.indices)} in B"
        return ValueDifference(name=name, kind=kind, relative_distance=math.inf, note=note)
    return compare_values(kind, name, one.rows, other.rows)


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one shape and dtype and hold the same bits, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    if one.dtype.itemsize not in _INTEGERS or not one.is_floating_point():
        return torch.equal(one, other)
    integers = _INTEGERS[one.dtype.itemsize]
    return torch.equal(one.view(integers), other.view(integers))


def relative(distance: float, norm: float | None) -> float:
    """distance / norm: 0 for no distance, whatever the norm; infinite for one from nothing."""
    if distance == 0:
        return 0.0
    return distance / norm if norm else math.inf


def not_finite(tensors: dict[str, Tensor]) -> NonFiniteError:
    """The error that names what holds NaN or infinity, or says that all are finite and their products are not."""
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
            return NonFiniteError(
                f"{name}: {nan} NaN and {inf} infinite of {tensor.numel()} values, from which nothing has a distance. "
                "The adapter is damaged or its training diverged"
            )
    return NonFiniteError(f"{', '.join(tensors)}: what they make is beyond the range of float64")


def _alone(kind: str, name: str, not_in_a: bool, not_in_b: bool) -> ValueDifference | None:
    if not_in_a and not_in_b:
        return None
    return ValueDifference(name=name, kind=kind, relative_distance=math.inf, only_in="B" if not_in_a else "A")


def _in_order(weights: RowWeights) -> RowWeights:
    order = sorted(range(len(weights.indices)), key=weights.indices.__getitem__)
    return RowWeights(indices=tuple(weights.indices[place] for place in order), rows=weights.rows[order])


def _few(indices: Sequence[int], most: int = 6) -> str:
    shown = ", ".join(map(str, indices[:most]))
    return shown if len(indices) <= most else f"{shown} … ({len(indices)})"
