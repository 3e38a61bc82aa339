"""Tensors by name: dtypes, values that are computed only when written, and checks on values."""

import functools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from adaptertools.errors import NonFiniteError, OptionError

Item = TypeVar("Item")
Result = TypeVar("Result")

DTYPES: Mapping[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
"""The short dtype names of the command line and of reports."""

_SHORT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """A tensor known by shape and dtype, computed at the moment it is written.

    It lets a writer lay out a file of any size while holding one tensor in memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


NamedTensors = Mapping[str, Tensor | Deferred]


def materialize(tensor: Tensor | Deferred) -> Tensor:
    """The tensor itself, computed now if it was deferred."""
    if not isinstance(tensor, Deferred):
        return tensor
    computed = tensor.compute()
    promised, found = (tensor.shape, tensor.dtype), (tuple(computed.shape), computed.dtype)
    assert promised == found, f"a tensor of {promised} was promised, {found} was computed"
    return computed


def computed(tensors: Iterable[Tensor | Deferred]) -> Iterator[Tensor]:
    """The tensors themselves, in order; the next one is computed while the caller writes the one before.

    Memory: two tensors
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for tensor in tensors:
            waiting.append(pool.submit(materialize, tensor))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of every item, in order, on one thread a core; within it torch itself keeps to that thread.

    Many small tasks side by side beat threads within each: those wait for one another at every operation.

    Memory: the results of twice as many items as there are cores
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with threads_kept(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def threads_kept() -> Iterator[None]:
    """Afterwards torch has as many threads as before: what a thread sets for itself, later ones begin with."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dtype_name(dtype: torch.dtype) -> str:
    """`f32`, `bf16` …; torch's own name for dtypes without a short one."""
    return _SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def parse_dtype(name: str) -> torch.dtype:
    """The dtype with this short name.

    Raises: OptionError for any other name
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise OptionError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}") from None


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single element of a view keeps a stride of its own, and is contiguous
    return flat.view(torch.uint8).numpy().data


def as_bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers, by which -0 is not 0 and a NaN is what it is."""
    return tensor.view(_BITS[tensor.itemsize])


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass and without a temporary of the tensor's size."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # torch has no aminmax for float8
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CARRIED = "; --allow-nonfinite carries them along"


def check_finite(name: str, tensor: Tensor, *, may_pass: bool = True) -> None:
    """Raises: NonFiniteError that names the tensor and counts the bad values, and what lets them pass if anything."""
    if not all_finite(tensor):
        nan = int(torch.isnan(tensor).sum())
        inf = int(torch.isinf(tensor).sum())
        raise NonFiniteError(
            f"{name}: {nan} NaN and {inf} infinite of {tensor.numel()} values. "
            f"The adapter is damaged or its training diverged{_CARRIED if may_pass else ''}"
        )


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which `layers.2` stands before `layers.10`."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def combine(
    parts: Sequence[Tensor | Deferred], shape: tuple[int, ...], join: Callable[[list[Tensor]], Tensor]
) -> Deferred:
    """Several tensors made into one of `shape` by `join`, when it is written; the widest dtype of the parts wins."""
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return Deferred(
        shape=shape,
        dtype=dtype,
        compute=lambda: join([materialize(part).to(dtype) for part in parts]).contiguous(),
    )
