"""A place an adapter is read from: a file, a folder, or tensors in memory, seen the same way by every format."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from adaptertools import containers
from adaptertools.containers.jsonfile import read_json
from adaptertools.containers.tensorfile import TensorFile, reading
from adaptertools.errors import EmptyFileError, OptionError, SourceNotFoundError

_MEMORY = "memory"


def as_path(given: str | Path) -> Path:
    """The path that a caller means.

    Raises: OptionError for an empty string, which would mean the current folder
    """
    if str(given) == "":
        raise OptionError("an empty path is given; the current folder is .")
    return Path(given)


class Source:
    """Tensor files and JSON documents under names, opened once and only when asked for.

    A path to a file offers that file's tensors, and the documents beside it. A path to a folder offers what stands
    directly in it. `folders` are the sub-folders, for formats that keep several adapters side by side.
    """

    def __init__(self, path: Path) -> None:
        with reading(path):
            if not path.exists():
                raise SourceNotFoundError(f"{path}: there is no such file or folder")
        self.path: Path | None = path
        self.label = str(path)
        self._tensors: dict[str, TensorFile] = {}
        self._documents: dict[str, dict[str, Any] | None] = {}

    @classmethod
    def in_memory(
        cls, tensors: Mapping[str, Tensor], documents: Mapping[str, Mapping[str, Any]], label: str = "<tensors>"
    ) -> "Source":
        """Tensors and documents that stand in no file; `file_names` then is the one name `memory`."""
        if not tensors:
            raise EmptyFileError(f"{label}: there is no tensor")
        source = cls.__new__(cls)
        source.path = None
        source.label = label
        source._tensors = {_MEMORY: TensorFile(tensors=tensors, container=_MEMORY, label=label)}
        source._documents = {name: dict(document) for name, document in documents.items()}
        return source

    @property
    def is_folder(self) -> bool:
        return self.path is not None and self.path.is_dir() and not self._is_tensor_folder

    @cached_property
    def _is_tensor_folder(self) -> bool:
        """Whether the path itself is a container that is a folder (Orbax)."""
        return self.path is not None and self.path.is_dir() and containers.identify(self.path) is not None

    @cached_property
    def root(self) -> Path | None:
        """The folder in which the names stand."""
        if self.path is None:
            return None
        return self.path if self.is_folder else self.path.parent

    @cached_property
    def file_names(self) -> tuple[str, ...]:
        """The names that may hold tensors: all files (and Orbax folders) of a folder, or the one file given."""
        if self.path is None:
            return tuple(self._tensors)
        if not self.is_folder:
            return (self.path.name,)
        assert self.root is not None
        return tuple(sorted(entry.name for entry in self.root.iterdir() if not entry.name.startswith(".")))

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """The names of the sub-folders of a folder."""
        if not self.is_folder:
            return ()
        assert self.root is not None
        return tuple(name for name in self.file_names if (self.root / name).is_dir())

    def has(self, name: str) -> bool:
        """Whether tensors may be read under this name."""
        return name in self.file_names

    def container(self, name: str) -> str | None:
        """The container of a file, told by its first bytes; None if it is no tensor file.

        Raises: EmptyFileError, LfsPointerError
        """
        if self.root is None:
            return _MEMORY
        found = containers.identify(self.root / name)
        return found.NAME if found else None

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """The names under which tensors stand, told by their first bytes; empty files count for nothing.

        Raises: LfsPointerError
        """
        return tuple(name for name in self.file_names if name not in self.folders and self._holds_tensors(name))

    def _holds_tensors(self, name: str) -> bool:
        try:
            return self.container(name) is not None
        except EmptyFileError:
            return False

    def tensors(self, name: str) -> TensorFile:
        """The tensors of one file.

        Raises: DamagedFileError and the like
        """
        if name not in self._tensors:
            assert self.root is not None
            self._tensors[name] = containers.read(self.root / name)
        return self._tensors[name]

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON document beside the tensors, or None if there is none.

        Raises: DamagedFileError
        """
        if name not in self._documents:
            path = self.root / name if self.root is not None else None
            self._documents[name] = read_json(path) if path is not None and path.is_file() else None
        return self._documents[name]

    def sub(self, name: str) -> "Source":
        """A sub-folder as a source of its own."""
        assert self.root is not None
        return Source(self.root / PurePosixPath(name))
