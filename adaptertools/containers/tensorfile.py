"""What every container gives: named tensors, and the strings that its header holds beside them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from adaptertools.errors import DamagedFileError, EmptyFileError, LfsPointerError, UnsafeFileError

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 1_000_000

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

    Raises: UnsafeFileError for control characters; DamagedFileError if it is no text
    """
    if not isinstance(name, str) or not name:
        raise DamagedFileError(f"{label}: a tensor is named {name!r}, expected text")
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise UnsafeFileError(f"{label}: the tensor name {name!r} holds control characters")
    return name


def check_count(label: str, count: int) -> None:
    """Raises: UnsafeFileError for more tensors than any adapter has."""
    if count > MAX_TENSORS:
        raise UnsafeFileError(f"{label}: {count} tensors, more than the {MAX_TENSORS} that are accepted")


def file_size(path: Path) -> int:
    return os.stat(path).st_size
