"""Every tensor of a merge against what it has to be, by pieces that several threads share."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.merging.coefficients import Moments
from adaptertools.merging.edits import Edit
from adaptertools.merging.plan import MergePlan
from adaptertools.merging.reference import BLOCK_ELEMENTS, ExactRows, Reference
from adaptertools.merging.scratch import scratch
from adaptertools.tensors import as_bits, in_parallel

_EXPONENT = 0x7FF0000000000000
"""The bits of a float64 that make the power of two at or below it."""

_CHUNK = 16 << 20
"""Bytes of an untouched tensor that are compared at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCheck:
    """What was found of one tensor, or of a block of it.

    `wrong` counts the elements that are not what they have to be: another bit where nothing was to change, beyond the
    roundings allowed where something was. `roundings` is the farthest that any is off, in halves of the distance to
    the next number of its dtype; `max_abs` the same as a number. `computed` tells a merged tensor from a copied one.
    """

    name: str
    computed: bool
    elements: int = 0
    wrong: int = 0
    roundings: float = 0.0
    max_abs: float = 0.0

    def joined(self, other: "TensorCheck") -> "TensorCheck":
        return replace(
            self,
            elements=self.elements + other.elements,
            wrong=self.wrong + other.wrong,
            roundings=max(self.roundings, other.roundings),
            max_abs=max(self.max_abs, other.max_abs),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Bytes `start` to `stop` of an untouched tensor, or such rows of one that changed."""

    name: str
    start: int
    stop: int
    nbytes: int
    check: Callable[[int, int], tuple[TensorCheck, Moments | None]]


class Comparison:
    """All tensors of a merge against what they have to be."""

    def __init__(self, plan: MergePlan, merged: Checkpoint, device: torch.device, ours: bool) -> None:
        self._plan = plan
        self._merged = merged
        self._device = device
        self._ours = ours

    def run(
        self, names: Sequence[str], on_progress: Callable[[int, int], None] | None
    ) -> tuple[tuple[TensorCheck, ...], Moments]:
        total = sum(_nbytes(self._merged, name) for name in names)
        done = 0
        checks: dict[str, TensorCheck] = {}
        moments = Moments.zero(len(self._plan.sources))
        pieces = (piece for name in names for piece in self._pieces(name))
        for piece, (check, found) in in_parallel(_checked, pieces):
            before = checks.get(piece.name)
            checks[piece.name] = before.joined(check) if before else check
            moments = moments + found if found else moments
            done += piece.nbytes
            if on_progress:
                on_progress(done, total)
        return tuple(checks.values()), moments

    def _pieces(self, name: str) -> Iterator[_Piece]:
        found = self._merged.tensor(name)
        edit = self._plan.edits.get(name)
        if edit is None:
            return _copied(name, self._plan.base.tensor(name), found)
        weight = self._plan.base.tensor(edit.source) if edit.source is not None else None
        if edit.computes:
            return self._computed(edit, weight, found)
        return _replaced(edit, weight, found)

    def _computed(self, edit: Edit, weight: Tensor | None, found: Tensor) -> Iterator[_Piece]:
        reference = Reference(edit, weight, self._device)
        matrix = found.reshape(edit.matrix)

        def check(start: int, stop: int) -> tuple[TensorCheck, Moments]:
            return self._compare(edit, reference.rows(start, stop), matrix[start:stop].to(self._device))

        return _by_rows(edit, reference.block_rows, check)

    def _compare(self, edit: Edit, exact: ExactRows, found: Tensor) -> tuple[TensorCheck, Moments]:
        rounded = scratch("rounded", exact.value, edit.dtype).copy_(exact.value)
        suspects = _differing(found, rounded)
        check, change = self._unsuspected(edit, exact, suspects, found)
        if len(suspects):
            check = check.joined(self._suspected(edit, exact, suspects, found))
        return check, self._moments(exact, change, suspects, rounded)

    def _unsuspected(self, edit: Edit, exact: ExactRows, suspects: Tensor, found: Tensor) -> tuple[TensorCheck, Tensor]:
        """What the elements are off that are the rounded value, and what the merge added to all of them."""
        wide = scratch("found", exact.value, torch.float64).copy_(found)
        change = torch.sub(wide, exact.before, out=scratch("change", wide, torch.float64))
        off = wide.sub_(exact.value).abs_()
        max_abs = float(off.amax())
        if not math.isfinite(max_abs):
            change.nan_to_num_(0.0, 0.0, 0.0)
            max_abs = float(off.nan_to_num_(0.0, 0.0).amax())
        size = scratch("size", off, torch.float64)
        beyond = off.sub_(torch.abs(exact.value, out=size), alpha=exact.epsilon)
        beyond.div_(_half_step(exact.value, edit.dtype, size))
        beyond.view(-1)[suspects] = 0.0
        roundings = float(beyond.amax())
        if not math.isfinite(roundings):
            roundings = float(beyond.nan_to_num_(0.0, 0.0, 0.0).amax())
        check = TensorCheck(
            name=edit.name,
            computed=True,
            elements=found.numel(),
            roundings=max(roundings, 0.0),
            max_abs=max_abs,
        )
        return check, change

    def _suspected(self, edit: Edit, exact: ExactRows, suspects: Tensor, found: Tensor) -> TensorCheck:
        """Elements that are not the rounded value: within what arithmetic may be off, or wrong."""
        rows, columns = suspects // found.shape[1], suspects % found.shape[1]
        found, value = found[rows, columns], exact.value[rows, columns]
        doubt = exact.doubt(rows, columns)
        roomy = doubt if self._ours else doubt + _roundings_between(exact, rows, columns, edit.dtype)
        right = ((value - roomy).to(edit.dtype) <= found) & (found <= (value + roomy).to(edit.dtype))
        right |= found.isnan() & value.isnan()
        off = (found.to(torch.float64) - value).abs()
        beyond = (off - doubt).clamp_min(0.0) / _half_step(value, edit.dtype)
        return TensorCheck(
            name=edit.name,
            computed=True,
            wrong=int((~right).sum()),
            roundings=_largest(beyond, right),
            max_abs=_largest(off, right),
        )

    def _moments(self, exact: ExactRows, change: Tensor, suspects: Tensor, rounded: Tensor) -> Moments:
        """A right merge adds what this one adds, but at the elements that are not the rounded value."""
        moments = Moments.zero(len(self._plan.sources))
        places = torch.tensor(exact.sources, dtype=torch.int64)
        deltas, change = exact.stack.view(len(places), change.numel()), change.view(-1)
        due = (rounded.view(-1)[suspects] - exact.before.view(-1)[suspects]).nan_to_num_(0.0, 0.0, 0.0)
        added = deltas @ change
        missed = deltas[:, suspects] @ (due - change[suspects])
        moments.found[places] = added.cpu()
        moments.expected[places] = (added + missed).cpu()
        moments.gram[places.unsqueeze(1), places] = exact.gram.cpu()
        return moments


@torch.no_grad()
def _checked(piece: _Piece) -> tuple[_Piece, tuple[TensorCheck, Moments | None]]:
    return piece, piece.check(piece.start, piece.stop)


def _nbytes(checkpoint: Checkpoint, name: str) -> int:
    return torch.Size(checkpoint.shapes[name]).numel() * checkpoint.dtypes[name].itemsize


def _by_rows(
    edit: Edit, rows: int, check: Callable[[int, int], tuple[TensorCheck, Moments | None]]
) -> Iterator[_Piece]:
    """Blocks of rows of a changed tensor."""
    for start in range(0, edit.matrix[0], rows):
        stop = min(start + rows, edit.matrix[0])
        nbytes = (stop - start) * edit.matrix[1] * edit.dtype.itemsize
        yield _Piece(name=edit.name, start=start, stop=stop, nbytes=nbytes, check=check)


def _copied(name: str, expected: Tensor, found: Tensor) -> Iterator[_Piece]:
    """A tensor that nothing changed: its bytes."""
    one, other = _bytes(expected), _bytes(found)

    def check(start: int, stop: int) -> tuple[TensorCheck, None]:
        return _same_bits(name, one[start:stop], other[start:stop], found.dtype.itemsize), None

    for start in range(0, len(other), _CHUNK):
        stop = min(start + _CHUNK, len(other))
        yield _Piece(name=name, start=start, stop=stop, nbytes=stop - start, check=check)


def _replaced(edit: Edit, weight: Tensor | None, found: Tensor) -> Iterator[_Piece]:
    """A tensor that was replaced, cast or given rows, without arithmetic: the bits that the cast gives."""
    source = edit.replacement if edit.replacement is not None else weight
    assert source is not None
    old, new = source.reshape(edit.matrix), found.reshape(edit.matrix)

    def check(start: int, stop: int) -> tuple[TensorCheck, None]:
        expected = old[start:stop].to(edit.dtype, copy=True)
        for indices, trained in edit.rows:
            for row, values in zip(indices, trained, strict=True):
                if start <= row < stop:
                    expected[row - start] = values.to(expected)
        return _same_bits(edit.name, _bytes(expected), _bytes(new[start:stop]), edit.dtype.itemsize), None

    return _by_rows(edit, max(1, BLOCK_ELEMENTS // max(1, edit.matrix[1])), check)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _same_bits(name: str, expected: Tensor, found: Tensor, itemsize: int) -> TensorCheck:
    wrong = 0
    if not _are_equal(expected.numpy(), found.numpy()):
        wrong = int((expected != found).reshape(-1, itemsize).any(dim=1).sum())
    return TensorCheck(name=name, computed=False, elements=len(found) // itemsize, wrong=wrong)


def _are_equal(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Eight bytes at a time, wherever they begin: eight times as fast."""
    words = len(one) // 8 * 8
    return np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64)) and np.array_equal(
        one[words:], other[words:]
    )


def _differing(found: Tensor, rounded: Tensor) -> Tensor:
    """The places, in row order, of elements that are other bits; numpy finds the few ten times as fast."""
    one, other = as_bits(found.contiguous().view(-1)), as_bits(rounded.view(-1))
    if one.device.type != "cpu":
        return (one != other).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(one.numpy() != other.numpy()))


def _largest(off: Tensor, right: Tensor) -> float:
    """The largest; infinite where a wrong one is no number."""
    if not off.numel():
        return 0.0
    return float(torch.where(off.isnan(), torch.where(right, 0.0, torch.inf), off).max())


def _half_step(value: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Half the distance to the next number of the dtype: what one rounding may cost."""
    limits = torch.finfo(dtype)
    step = torch.empty_like(value) if out is None else out
    torch.bitwise_and(value.view(torch.int64), _EXPONENT, out=step.view(torch.int64))
    return step.clamp_min_(limits.smallest_normal).mul_(limits.eps / 2)


def _roundings_between(exact: ExactRows, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """What the roundings before the last one may cost: of each delta weight, and of each sum but the final one.

    With DoRA: of s·B·A, of V = W + it, and relative ones of the elements that ‖V‖ is of, of ‖V‖ and of m/‖V‖.
    """
    size = exact.before[rows, columns].abs()
    steps = torch.zeros_like(size)
    plain = torch.ones_like(size)
    for each in exact.renormalized:
        within, product, new, gain = each.at(rows, columns)
        plain[within] = 0.0
        steps[within] += gain.abs() * (_half_step(product, dtype) + _half_step(new, dtype))
        steps[within] += 3 * torch.finfo(dtype).eps / 2 * (gain * new).abs()
    for number, whole in enumerate(exact.stack):
        delta = whole[rows, columns]
        if number:
            steps += _half_step(size, dtype)
        steps += plain * _half_step(delta, dtype)
        size += delta.abs()
    return steps
