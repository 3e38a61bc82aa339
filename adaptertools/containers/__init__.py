"""Containers: bytes under names. What the names mean is a format's affair.

A container module has NAME, SUFFIX, `sniff(path, head)`, `read(path) -> TensorFile`,
`write(path, tensors, metadata, advance)` and `size(tensors, metadata)`, the bytes that `write` makes of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from adaptertools.containers import gguf, msgpack, npz, orbax, safetensors, torchfile
from adaptertools.containers.tensorfile import TensorFile, read_head, reading
from adaptertools.errors import OptionError, SourceNotFoundError, UnknownFormatError
from adaptertools.tensors import NamedTensors

__all__ = [
    "CONTAINERS",
    "Container",
    "get",
    "gguf",
    "identify",
    "msgpack",
    "npz",
    "orbax",
    "read",
    "safetensors",
    "torchfile",
]


class Container(Protocol):
    """What a container module offers."""

    NAME: str
    SUFFIX: str

    def sniff(self, path: Path, head: bytes) -> bool: ...

    def read(self, path: Path) -> TensorFile: ...

    def write(
        self, path: Path, tensors: NamedTensors, metadata: Mapping[str, str], advance: Callable[[int], None]
    ) -> None: ...

    def size(self, tensors: NamedTensors, metadata: Mapping[str, str]) -> int: ...


_MODULES: tuple[Container, ...] = (safetensors, gguf, npz, torchfile, orbax, msgpack)
"""In the order of their certainty: msgpack has no magic bytes and comes last."""

CONTAINERS: Mapping[str, Container] = {module.NAME: module for module in _MODULES}


def get(name: str) -> Container:
    """The container with this name.

    Raises: OptionError
    """
    try:
        return CONTAINERS[name]
    except KeyError:
        raise OptionError(f"unknown container {name!r}: expected one of {', '.join(CONTAINERS)}") from None


def identify(path: Path) -> Container | None:
    """The container of a file or folder, told by its first bytes; None if it is none of ours.

    Raises: EmptyFileError, LfsPointerError
    """
    with reading(path):
        if not path.is_dir() and not path.is_file():
            return None  # a socket, a pipe, a link to nothing
        head = b"" if path.is_dir() else read_head(path)
        return next((module for module in _MODULES if module.sniff(path, head)), None)


def read(path: Path) -> TensorFile:
    """The tensors of a file or folder.

    Raises: UnknownFormatError if it is no known container; DamagedFileError and the like if it is a bad one
    """
    with reading(path):
        if not path.exists():
            raise SourceNotFoundError(f"{path}: there is no such file")
        container = identify(path)
        if container is None:
            raise UnknownFormatError(f"{path}: not a tensor file; known are {', '.join(CONTAINERS)}")
        return container.read(path)
