"""A place an adapter is read from: a file, a folder, or tensors in memory, seen the same way by every format."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from adaptertools import containers
from adaptertools.containers.jsonfile import read_json
from adaptertools.containers.tensorfile import TensorFile, reading
from adaptertools.containers.yamlfile import read_yaml
from adaptertools.errors import AdapterToolsError, EmptyFileError, OptionError, SourceNotFoundError

_MEMORY = "memory"


def as_path(given: str | Path) -> Path:
    """The path that a caller means.

    Raises: OptionError for an empty string, which would mean the current folder, and for what is no path
    """
    if not isinstance(given, str | os.PathLike):
        raise OptionError(f"found {type(given).__name__}, expected a path: a string or a pathlib.Path")
    if str(given) == "":
        raise OptionError("an empty path is given; the current folder is .")
    return Path(given)


@dataclass(frozen=True, slots=True)
class Located:
    """A file or folder on this machine, and what it is called: a copy of something on the Hub keeps its name there."""

    path: Path
    label: str
    """What messages call it."""
    name: str
    """What histories and records call it: `org/name@sha/sub/folder`, or the file's own name."""
    here: Mapping[Path, frozenset[str]] = field(default_factory=dict, compare=False, repr=False)
    """Files of which only the header is on this machine, each with the tensors whose values are here all the same."""
    holder: object = field(default=None, compare=False, repr=False)
    """What must live as long as the files are wanted: a folder that is removed with it."""

    @property
    def is_remote(self) -> bool:
        """Whether it is a copy of something on the Hub, and maybe of a part of it."""
        return self.label != str(self.path)

    def at(self, path: Path) -> "Located":
        """A place in it, or around it, called accordingly."""
        if not self.is_remote:
            return located(path)
        home, label, name = self.path, self.label, self.name
        while not path.is_relative_to(home):
            home, label, name = home.parent, label.rpartition("/")[0], name.rpartition("/")[0]
        below = path.relative_to(home).parts
        return replace(self, path=path, label="/".join([label, *below]), name="/".join([name, *below]))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Errors within speak of a copy of something on the Hub by its name there, not by where the copy is."""
        try:
            yield
        except AdapterToolsError as error:
            home = self.at(self.path.parent) if self.path.is_file() else self
            if not self.is_remote or str(home.path) not in str(error):
                raise
            raise type(error)(str(error).replace(str(home.path), home.label)) from error

    def described(self, file: TensorFile, path: Path) -> TensorFile:
        """The tensors of a file in it, called as it is called. Values that are not here raise where they are used."""
        if path in self.here:
            tensors = {
                name: tensor if name in self.here[path] else tensor.to("meta") for name, tensor in file.tensors.items()
            }
            file = replace(file, tensors=tensors)
        return replace(file, label=self.at(path).label)


def located(given: str | Path | Located) -> Located:
    """Where a caller's path leads, called as the caller calls it.

    Raises: OptionError for an empty string, which would mean the current folder
    """
    if isinstance(given, Located):
        return given
    path = as_path(given)
    return Located(path, str(path), path.name or path.resolve().name)


class Source:
    """Tensor files and JSON documents under names, opened once and only when asked for.

    A path to a file offers that file's tensors, and the documents beside it. A path to a folder offers what stands
    directly in it. `folders` are the sub-folders, for formats that keep several adapters side by side.
    """

    def __init__(self, given: Path | Located) -> None:
        self.place: Located | None = located(given)
        path = self.place.path
        with reading(path):
            if not path.exists():
                raise SourceNotFoundError(f"{self.place.label}: there is no such file or folder")
        self.path: Path | None = path
        self.label = self.place.label
        self.name = self.place.name
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
        source.place = source.path = None
        source.label = source.name = label
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
        assert self.place is not None
        with self.place.naming():
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
            assert self.place is not None
            with self.place.naming():
                self._tensors[name] = self.place.described(containers.read(self.root / name), self.root / name)
        return self._tensors[name]

    def is_sound(self, name: str, containers: Collection[str]) -> bool:
        """Whether a file is of one of these containers, and its header can be read."""
        try:
            if self.container(name) not in containers:
                return False
            self.tensors(name)
        except AdapterToolsError:
            return False
        return True

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON document beside the tensors, or a YAML one by its suffix; None if there is none.

        Raises: DamagedFileError
        """
        if name not in self._documents:
            self._documents[name] = self._read_document(name)
        return self._documents[name]

    def _read_document(self, name: str) -> dict[str, Any] | None:
        if self.root is None or self.place is None or not (self.root / name).is_file():
            return None
        with self.place.naming():
            return read_yaml(self.root / name) if name.endswith(".yaml") else read_json(self.root / name)

    def label_of(self, name: str) -> str:
        """What messages call a file that stands in it."""
        return name if self.place is None or self.root is None else self.place.at(self.root / name).label

    def sub(self, name: str) -> "Source":
        """A sub-folder as a source of its own."""
        assert self.root is not None
        assert self.place is not None
        return Source(self.place.at(self.root / PurePosixPath(name)))

    def beside(self) -> "Source":
        """The folder in which a source that is a file stands."""
        assert self.path is not None
        assert self.place is not None
        return Source(self.place.at(self.path.parent))
