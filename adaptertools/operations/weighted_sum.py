"""Tensors times factors, added up and rounded once into their place in a larger tensor; the rounding is measured."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

import torch
from torch import Tensor

from adaptertools.encoding import fold_is_exact
from adaptertools.errors import NonFiniteError, OptionError
from adaptertools.tensors import all_finite, check_finite, dtype_name

_CHUNK = 1 << 15
"""Elements handled at once: float64 temporaries of this size stay in the processor's cache."""

_FLOAT64 = 2.0**-52
"""What float64 may lose in a factor and its product, relative to it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """A tensor under a name for messages, and what it is multiplied by."""

    name: str
    tensor: Tensor
    factor: Fraction = Fraction(1)

    @property
    def number(self) -> float:
        """The factor as float64.

        Raises: OptionError if it is beyond that
        """
        try:
            number = float(self.factor)
        except OverflowError:
            number = 0.0
        if (number == 0.0) != (self.factor == 0):
            raise OptionError(f"{self.name}: its weight times its scaling leaves the range of float64")
        return number

    @property
    def slack(self) -> float:
        """What float64 may lose in the product: nothing where that has at most 53 bits."""
        if abs(self.factor) == 1:
            return 0.0
        numerator, denominator = abs(self.factor.numerator), self.factor.denominator
        bits = (numerator // (numerator & -numerator)).bit_length() if numerator else 1
        held = {torch.float64: 53, torch.float32: 24}.get(self.tensor.dtype, 11)
        return 0.0 if denominator & (denominator - 1) == 0 and bits + held <= 53 else _FLOAT64


Sums = Sequence[tuple[Part, ...]]
"""Sums of tensors of one shape each, to stand side by side."""


def plain(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; in float32 if it is of one of the float8 dtypes, which torch does not calculate in."""
    return tensor.to("cpu", torch.float32 if tensor.dtype.itemsize == 1 else tensor.dtype)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values, and are on the same device."""
    alike = (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
    return alike and torch.equal(one, other)


def side_by_side(
    sums: Sums, shape: Sequence[int], dim: int, *, dtype: torch.dtype | None = None, allow_nonfinite: bool = False
) -> tuple[Tensor, float]:
    """A tensor of this shape that holds one sum after the other along `dim`, then zeros; and its largest error.

    The error of an element is relative to the sum of the magnitudes of its parts, and 0.0 only where no bit was lost.
    Without `dtype` the widest of the parts is taken, or float32 where a half-precision one cannot hold the sums.

    Memory: the result, and a few chunks in float64
    Raises: NonFiniteError that names the part, unless `allow_nonfinite`; OptionError for a factor beyond float64
    """
    result = torch.empty(*shape, dtype=dtype or holding_dtype(sums))
    start, worst = 0, 0.0
    for parts in sums:
        width = parts[0].tensor.shape[dim]
        worst = max(worst, _write(result.narrow(dim, start, width), parts, allow_nonfinite))
        start += width
    result.narrow(dim, start, result.shape[dim] - start).zero_()
    return result, worst


def holding_dtype(sums: Sums) -> torch.dtype:
    """The widest dtype of the parts; float32 instead of a half-precision one that would lose bits."""
    widest = reduce(torch.promote_types, (part.tensor.dtype for parts in sums for part in parts))
    if widest.itemsize >= 4 or all(len(parts) == 1 and _held(parts[0], widest) for parts in sums):
        return widest
    return torch.float32


def _held(part: Part, dtype: torch.dtype) -> bool:
    return part.number == part.factor and fold_is_exact(part.tensor, part.number, dtype)


def _holds(dtype: torch.dtype, narrower: torch.dtype) -> bool:
    return torch.promote_types(narrower, dtype) == dtype


def _write(place: Tensor, parts: tuple[Part, ...], allow_nonfinite: bool) -> float:
    """Put the sum of the parts into its place. Returns the largest relative error of an element."""
    (first, *others) = parts
    if not others and first.factor == 1 and _holds(place.dtype, first.tensor.dtype):
        place.copy_(first.tensor)
        return 0.0
    numbers = [part.number for part in parts]
    slack = len(parts) * _FLOAT64 if others else first.slack
    worst, finite = 0.0, True
    buffers = torch.empty(3, max(_CHUNK, place.shape[-1]), dtype=torch.float64)
    for where, values in _chunks(place, [part.tensor for part in parts]):
        error, sound = _round_into(where, values, numbers, buffers, slack)
        worst, finite = max(worst, error), finite and sound
    if not finite and not allow_nonfinite:
        _explain(parts, place.dtype)
    return worst


def _explain(parts: Sequence[Part], dtype: torch.dtype) -> None:
    """Raises: NonFiniteError for the part that is at fault, or for the sum of them."""
    for part in parts:
        check_finite(part.name, part.tensor)
    names = " + ".join(f"{part.number:g} · {part.name}" for part in parts)
    raise NonFiniteError(f"{names} is too large for {dtype_name(dtype)}")


def _chunks(place: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Some rows of all of them at a time."""
    if place.ndim == 1:
        yield place.unsqueeze(0), [tensor.unsqueeze(0) for tensor in tensors]
    elif place.ndim > 2:
        for index in range(place.shape[0]):
            yield from _chunks(place[index], [tensor[index] for tensor in tensors])
    else:
        rows = max(1, _CHUNK // place.shape[1])
        for start in range(0, place.shape[0], rows):
            yield place[start : start + rows], [tensor[start : start + rows] for tensor in tensors]


def _round_into(
    place: Tensor, values: Sequence[Tensor], numbers: Sequence[float], buffers: Tensor, slack: float
) -> tuple[float, bool]:
    """Write the sum of one chunk. Returns its largest relative error, and whether all of it is finite.

    An element that is not finite in its source has no error, nor has one that is zero there.
    """
    total, work, magnitude = (buffer[: place.numel()].view(place.shape) for buffer in buffers)
    total.copy_(values[0]).mul_(numbers[0])
    torch.abs(total, out=magnitude)
    for value, number in zip(values[1:], numbers[1:], strict=True):
        work.copy_(value).mul_(number)
        total.add_(work)
        magnitude.add_(work.abs_())
    place.copy_(total)
    work.copy_(place).sub_(total).div_(magnitude)
    error = _largest(work)
    if math.isfinite(error):
        return error + slack, True
    settled = torch.stack([value == 0 for value in values]).all(dim=0) | ~torch.isfinite(total)
    error = _largest(work.masked_fill_(settled, 0.0))
    lost = 1.0 if math.isnan(error) else error  # 0 / 0 of values that are not zero: they were too small for float64
    return lost if bool(settled.all()) else lost + slack, all_finite(place)


def _largest(values: Tensor) -> float:
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))
