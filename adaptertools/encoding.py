"""Factors on their way into a file: scale folded in, dtype chosen, finiteness checked, and every loss measured."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adaptertools.errors import NonFiniteError
from adaptertools.tensors import Deferred, all_finite, check_finite, dtype_name

_CHUNK = 1 << 15
"""Elements handled at once: float64 temporaries of this size stay in the processor's cache."""


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
            folded = scale(tensor, factor, dtype).contiguous()
            if not self.allow_nonfinite and not all_finite(folded):
                check_finite(name, tensor)  # if that is finite, the fold or the cast overflowed
                scaled = f" once they are scaled by {factor:g}"
                advice = ": choose another --dtype" if self.dtype is not None else scaled
                raise NonFiniteError(f"{name}: values too large for {dtype_name(dtype)}{advice}")
            return folded

        return Deferred(shape=tuple(tensor.shape), dtype=dtype, compute=compute)

    def _choose_dtype(self, tensor: Tensor, factor: float) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype if tensor.is_floating_point() else tensor.dtype
        if factor == 1.0 or tensor.dtype.itemsize >= 4 or fold_is_exact(tensor, factor, tensor.dtype):
            return tensor.dtype
        return torch.float32


def scale(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """`factor` times the tensor in float32 at least, rounded to `dtype`.

    Memory: the result, and chunks in float64
    """
    if factor == 1.0:
        return tensor.to(dtype)
    if dtype is torch.float32 and tensor.dtype is not torch.float64 and _bits(factor) <= 24:
        return tensor.to(torch.float32) * factor
    dense = _dense(tensor)  # torch would round the factor itself to float32, so float64 it is
    scaled = torch.empty_like(dense, dtype=dtype)
    for source, target in zip(_chunks(dense), _chunks(scaled), strict=True):
        target.copy_(source.to(torch.float64) * factor)
    return scaled


def fold_is_exact(tensor: Tensor, factor: float, dtype: torch.dtype) -> bool:
    """Whether `factor` times the tensor loses no bit in `dtype`, looking at every element."""
    return _proven_exact(tensor, factor, dtype) or all(error == 0.0 for error in _errors(tensor, factor, dtype))


def measure(name: str, tensor: Tensor, factor: float, dtype: torch.dtype) -> Loss:
    """What `scale(tensor, factor, dtype)` loses against the exact product, looking at every element.

    Non-finite elements count as kept when they stay what they are.

    Memory: a few float64 chunks
    """
    worst = 0.0 if _proven_exact(tensor, factor, dtype) else max(_errors(tensor, factor, dtype), default=0.0)
    return Loss(tensor=name, factor=factor, dtype=dtype_name(dtype), exact=worst == 0.0, max_relative_error=worst)


class _Layout(NamedTuple):
    """A floating-point format: bits of its significand, the hidden one included, and the exponent of its last bit."""

    bits: int
    last_bit: int


_LAYOUTS = {
    torch.bfloat16: _Layout(8, -133),
    torch.float16: _Layout(11, -24),
    torch.float32: _Layout(24, -149),
    torch.float64: _Layout(53, -1074),
}


def _proven_exact(tensor: Tensor, factor: float, dtype: torch.dtype) -> bool:
    """Whether the range of the values alone shows that no bit is lost: a fast pass that decides the usual cases.

    The product of a p-bit and a b-bit number has p + b bits (p if b is 1). It is held exactly where the result has that
    many, does not overflow, and either does not reach the subnormals or has last bits as small as any product's.
    """
    if tensor.numel() == 0 or (tensor.dtype == dtype and factor == 1.0):
        return True
    if tensor.dtype not in _LAYOUTS or dtype not in _LAYOUTS:
        return False
    source, target = _LAYOUTS[tensor.dtype], _LAYOUTS[dtype]
    product_bits = source.bits + (_bits(factor) if _bits(factor) > 1 else 0)
    largest = _largest(tensor)
    limits = torch.finfo(dtype)
    if product_bits > target.bits or not largest * abs(factor) <= limits.max:
        return False
    if factor == 0.0 or source.last_bit + _last_bit(factor) >= target.last_bit:
        return True
    return not _any_below(tensor, limits.tiny / abs(factor))


def _any_below(tensor: Tensor, threshold: float) -> bool:
    """Whether an element other than zero has a magnitude below the threshold."""
    buffer = torch.empty(_CHUNK, dtype=tensor.dtype)
    for piece in _chunks(_dense(tensor)):
        magnitudes = torch.abs(piece, out=buffer[: piece.numel()])
        if float(magnitudes.amin()) < threshold and bool(((magnitudes < threshold) & (magnitudes != 0)).any()):
            return True
    return False


def _errors(tensor: Tensor, factor: float, dtype: torch.dtype) -> Iterator[float]:
    """The largest relative error of each chunk; 0.0 only where not a bit was lost."""
    if factor == 0.0:
        return
    inverse = tensor.dtype is torch.float64  # no wider format holds its products, so quotients are compared
    source_bits = _LAYOUTS.get(tensor.dtype, _LAYOUTS[torch.float16]).bits
    rounding = 2.0**-53 if _bits(factor) > 1 and _bits(factor) + source_bits > 53 else 0.0
    buffers = torch.empty(3, _CHUNK, dtype=torch.float64)
    for piece in _chunks(_dense(tensor)):
        values, expected, found = buffers[:, : piece.numel()]
        values.copy_(piece)
        found.copy_(scale(piece, factor, dtype))
        if inverse:
            expected.copy_(values)
            found /= factor
        else:
            torch.mul(values, factor, out=expected)
        yield _largest_error(values, expected, found, rounding)


def _largest_error(values: Tensor, expected: Tensor, found: Tensor, rounding: float) -> float:
    """Works in place. `rounding` is the error that float64 itself may have made."""
    found.sub_(expected).div_(expected)
    error = _largest(found)
    if math.isnan(error):  # of zeros and of non-finite values
        kept = (values == 0) | ~torch.isfinite(values)
        rounding = 0.0 if bool(kept.all()) else rounding
        error = _largest(found.masked_fill_(kept, 0.0))
    return math.inf if math.isnan(error) else error + rounding


def _largest(values: Tensor) -> float:
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def _bits(factor: float) -> int:
    """Significant bits of a float: 1 for powers of two, 53 for 0.1."""
    numerator = abs(factor.as_integer_ratio()[0])
    return (numerator // (numerator & -numerator)).bit_length() if numerator else 1


def _last_bit(factor: float) -> int:
    """The exponent of the last significant bit: 3 for 8.0, -1 for 2.5."""
    return math.frexp(factor)[1] - _bits(factor)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its elements do not fill one stretch of memory in some order of its axes."""
    return tensor if _by_stride(tensor).is_contiguous() else tensor.contiguous()


def _by_stride(tensor: Tensor) -> Tensor:
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def _chunks(dense: Tensor) -> Iterator[Tensor]:
    """The elements in the order of memory, flat, without a copy."""
    flat = _by_stride(dense).view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK]
