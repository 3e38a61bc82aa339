"""Factors on their way into a file: scale folded in, dtype chosen, finiteness checked, and every loss measured."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptertools.tensors import Deferred, check_finite, dtype_name

_CHUNK = 1 << 20
"""Elements measured at once: the float64 temporaries stay small whatever the tensor's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What one tensor lost on its way: nothing if `exact`.

    `max_relative_error` is the largest over the elements, against the float64 product.
    """

    tensor: str
    factor: float
    dtype: str
    exact: bool
    max_relative_error: float


class Encoder:
    """Makes the tensors that a writer puts into a file.

    A tensor is folded with a scale in float32 at least and rounded once. A fold that its dtype cannot hold exactly
    promotes the tensor to float32, unless `dtype` asks for one. Whether bits were lost is checked, not assumed: halving
    is inexact in float16 subnormals.
    """

    def __init__(self, dtype: torch.dtype | None = None, *, allow_nonfinite: bool = False) -> None:
        self.dtype = dtype
        self.allow_nonfinite = allow_nonfinite
        self.losses: list[Loss] = []

    def keep(self, name: str, tensor: Tensor) -> Deferred:
        """The tensor as it is, or in the dtype asked for."""
        return self.fold(name, tensor, 1.0)

    def fold(self, name: str, tensor: Tensor, factor: float) -> Deferred:
        """`factor` times the tensor, computed when it is written.

        Memory: the values are read once here to measure the loss, in chunks
        """
        dtype = self._choose_dtype(tensor, factor)
        if factor != 1.0 or dtype != tensor.dtype:
            self.losses.append(measure(name, tensor, factor, dtype))

        def compute() -> Tensor:
            if not self.allow_nonfinite:
                check_finite(name, tensor)
            folded = scale(tensor, factor, dtype).contiguous()
            if not self.allow_nonfinite and folded.dtype != tensor.dtype:
                check_finite(f"{name} as {dtype_name(dtype)}", folded)
            return folded

        return Deferred(shape=tuple(tensor.shape), dtype=dtype, compute=compute)

    def _choose_dtype(self, tensor: Tensor, factor: float) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype if tensor.is_floating_point() else tensor.dtype
        if factor == 1.0 or tensor.dtype.itemsize >= 4 or fold_is_exact(tensor, factor, tensor.dtype):
            return tensor.dtype
        return torch.float32


def scale(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """`factor` times the tensor in float32 at least, rounded once to `dtype`."""
    if factor == 1.0:
        return tensor.to(dtype)
    if dtype is torch.float32 and tensor.dtype is not torch.float64 and _bits(factor) <= 24:
        return tensor.to(torch.float32) * factor
    return (tensor.to(torch.float64) * factor).to(dtype)  # torch would round the factor itself to float32


def fold_is_exact(tensor: Tensor, factor: float, dtype: torch.dtype) -> bool:
    """Whether `factor` times the tensor loses no bit in `dtype`, looking at every element."""
    return measure("", tensor, factor, dtype).exact


def measure(name: str, tensor: Tensor, factor: float, dtype: torch.dtype) -> Loss:
    """Compare `scale(tensor, factor, dtype)` with the exact product, element by element.

    Non-finite elements count as kept when they stay what they are.

    Memory: a few float64 chunks
    """
    exact, worst = True, 0.0
    for piece in _chunks(tensor):
        got = scale(piece, factor, dtype)
        if _is_power_of_two(factor):  # then both ways are exact unless bits fell off the end, and no float64 is needed
            wide = torch.promote_types(torch.promote_types(piece.dtype, dtype), torch.float32)
            if torch.equal(got.to(wide) / factor, piece.to(wide)):
                continue
        product = piece.to(torch.float64) * factor
        wrong = (got.to(torch.float64) != product) & ~torch.isnan(product)
        if _bits(factor) + _SIGNIFICAND[piece.dtype if piece.dtype in _SIGNIFICAND else torch.float64] > 53:
            wrong |= (piece != 0) & torch.isfinite(piece)  # the float64 product itself was rounded
        if wrong.any():
            exact = False
            error = ((got.to(torch.float64)[wrong] - product[wrong]) / product[wrong]).abs()
            worst = max(worst, float(error.max()))
    return Loss(tensor=name, factor=factor, dtype=dtype_name(dtype), exact=exact, max_relative_error=worst)


_SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}
"""Bits of a significand, the hidden one included."""


def _bits(factor: float) -> int:
    """Significant bits of a float: 1 for powers of two, 53 for 0.1."""
    numerator = abs(factor.as_integer_ratio()[0])
    return (numerator // (numerator & -numerator)).bit_length() if numerator else 1


def _is_power_of_two(factor: float) -> bool:
    return math.frexp(abs(factor))[0] == 0.5


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.numel() <= _CHUNK:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.reshape(-1).split(_CHUNK)
    else:
        rows = max(1, _CHUNK * tensor.shape[0] // tensor.numel())
        yield from tensor.split(rows)
