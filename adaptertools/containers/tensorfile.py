"""What every container gives: named tensors, and the strings that its header holds beside them."""

import math
import mmap
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from adaptertools.errors import (
    AdapterToolsError,
    DamagedFileError,
    EmptyFileError,
    LfsPointerError,
    SourceNotFoundError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from adaptertools.tensors import NamedTensors

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 1_000_000
MAX_DEPTH = 64
MAX_ELEMENTS = 1 << 48
MAX_DIMENSIONS = 32

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
"""As Linux has it; Python names it only in later versions."""

_MAX_GROWTH = 100
_ALWAYS_ALLOWED = 64 << 20

_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
_LFS_PREFIX = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorFile:
    """The tensors of one file by name, mapped from disk where the container allows it.

    Nested containers join their keys with `/`.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    container: str
    label: str
    nbytes: int = 0
    offsets: Mapping[str, int] = field(default_factory=dict)
    """The byte of the file at which each tensor begins that lies in it as it is."""


def read_head(path: Path, size: int = 512) -> bytes:
    """The first bytes of a file, enough to tell containers apart.

    Raises: EmptyFileError, LfsPointerError
    """
    with path.open("rb") as file:
        head = file.read(size)
    if not head:
        raise EmptyFileError(f"{path}: the file is empty. Download or save it again")
    if head.startswith(_LFS_PREFIX):
        raise LfsPointerError(
            f"{path}: this is a Git LFS pointer, not the weights themselves. Run `git lfs pull` in its repository, "
            "or download the file from the Hub"
        )
    return head


def check_name(label: str, name: object) -> str:
    """A tensor name that is safe to print and to use.

    Raises: UnsafeFileError for control characters and halves of characters; DamagedFileError if it is no text
    """
    if not isinstance(name, str) or not name:
        raise DamagedFileError(f"{label}: a tensor is named {name!r}, expected text")
    if _CONTROL.search(name):
        raise UnsafeFileError(f"{label}: the tensor name {name!a:.200} holds control characters")
    return name


def check_count(label: str, count: int) -> None:
    """Raises: UnsafeFileError for more tensors than any adapter has."""
    if count > MAX_TENSORS:
        raise UnsafeFileError(f"{label}: {count} tensors, more than the {MAX_TENSORS} that are accepted")


def is_shape(value: object) -> TypeGuard[Sequence[int]]:
    """Whether these are dimensions that a tensor may have; empty tensors of absurd shape are none."""
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(size) is int and size >= 0 for size in value) and math.prod(s or 1 for s in value) <= MAX_ELEMENTS


def file_size(path: Path) -> int:
    """The bytes of a file."""
    return path.stat().st_size


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, read from disk where they are touched; changes to them stay in memory.

    No memory is set aside for such changes: a file may be larger than all there is.
    """
    with path.open("rb") as file:
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=prot)


def view(mapped: mmap.mmap | bytearray, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    """The tensor that lies at `offset`, without a copy.

    It need not be aligned: the processors that torch runs on load unaligned numbers, and its kernels expect them.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).reshape(shape)


def check_growth(label: str, expanded: int, size: int) -> None:
    """Raises: UnsafeFileError if compressed content claims to be far larger than its file."""
    limit = max(_ALWAYS_ALLOWED, _MAX_GROWTH * size)
    if expanded > limit:
        raise UnsafeFileError(
            f"{label}: {size} bytes claim to expand to {expanded}. At most {_MAX_GROWTH} times the size "
            f"(or {_ALWAYS_ALLOWED >> 20} MiB) is accepted; save it again without compression"
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system reports into an error of ours.

    Raises: SourceNotFoundError
    """
    try:
        yield
    except AdapterToolsError:
        raise
    except OSError as error:
        raise SourceNotFoundError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Around a library that parses the file: whatever it raises means that the bytes are damaged.

    Raises: DamagedFileError
    """
    try:
        yield
    except AdapterToolsError:
        raise
    except Exception as error:
        raise DamagedFileError(
            f"{path}: {_first_line(error)}. It was cut off or damaged: download or save it again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def flatten(label: str, tree: Mapping[object, object]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a nested structure, and everything else as strings, under keys joined with `/`.

    Raises: DamagedFileError if two values get the same name; UnsafeFileError for endless nesting
    """
    tensors: dict[str, Tensor] = {}
    strings: dict[str, str] = {}
    pending: list[tuple[str, int, object]] = [("", 0, tree)]
    visited = 0
    while pending:
        name, depth, value = pending.pop()
        visited += 1
        check_count(label, visited)
        if isinstance(value, Mapping | list | tuple):
            if depth == MAX_DEPTH:
                raise UnsafeFileError(f"{label}: {name:.80} … is nested deeper than {MAX_DEPTH} levels")
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            children = [(f"{name}/{key}" if depth else str(key), depth + 1, child) for key, child in items]
            pending += reversed(children)
            continue
        check_name(label, name)
        if name in tensors or name in strings:
            raise DamagedFileError(f"{label}: two values are named {name}; which one is meant?")
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            strings[name] = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return tensors, strings


def nested(label: str, tensors: NamedTensors) -> dict[str, Any]:
    """The tensors as a tree of dicts, their names split at `/`.

    Raises: UnsupportedFeatureError if a name is another's folder, or has an empty part
    """
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *folders, leaf = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                break
        if not isinstance(place, dict) or leaf in place or not all((leaf, *folders)):
            raise UnsupportedFeatureError(f"{label}: {name!r} has no place in a tree beside the other names")
        place[leaf] = tensor
    return tree
