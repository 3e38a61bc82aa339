"""A base model by its headers: names, shapes, dtypes and places of its weights, and its configuration.

Opening reads no weight. They are mapped from disk and read where they are touched.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Self

import torch
from torch import Tensor

from adaptertools import containers
from adaptertools.containers import safetensors
from adaptertools.containers.jsonfile import read_json
from adaptertools.containers.source import Located, located
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.errors import (
    AmbiguousFormatError,
    DamagedFileError,
    ShapeError,
    SourceNotFoundError,
    UnknownFormatError,
    UnsafeFileError,
)

CONFIG = "config.json"
"""What makes a model of a folder of weights."""
_INDEX = ".index.json"
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""The names under which model libraries store weights, the preferred first."""
_SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a tensor lie in a safetensors file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weights of a base model, known by shape and dtype, and where they lie.

    Memory: headers; safetensors and torch's zip files are mapped, torch files of before 1.6 are read
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    config: Mapping[str, Any] = field(default_factory=dict)
    label: str
    shared: frozenset[str] = frozenset()
    """Tensors whose bytes are those of one before: tied weights, as torch files keep them."""
    container: str = safetensors.NAME
    """`safetensors` or `torch`"""
    files: tuple[Path, ...] = ()
    index: Path | None = None
    """The file that says which shard holds which tensor, where there are several."""
    tensors_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The tensors in each file, by the file's name, in the order in which their bytes stand there."""
    places: Mapping[str, Place | None] = field(default_factory=dict)
    """None for tensors of torch files that do not lie there in one piece, or whose place cannot be told."""
    mapped: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    opened: Located | None = None
    """Where it was opened; None for weights in memory."""

    @classmethod
    def open(cls, given: str | Path | Located) -> Self:
        """A folder with a model, an index of shards, or one file of weights.

        Raises: SourceNotFoundError, UnknownFormatError, DamagedFileError and the like
        """
        opened = located(given)
        with opened.naming():
            return cls._open(opened)

    @classmethod
    def of_config(cls, given: Located) -> Self:
        """A model of which only the configuration is at hand: a folder with a config.json, or that file. No shapes.

        Raises: DamagedFileError
        """
        path = given.path / CONFIG if given.path.is_dir() else given.path
        with given.naming():
            return cls(shapes={}, dtypes={}, config=read_json(path), label=given.label, opened=given)

    @classmethod
    def _open(cls, opened: Located) -> Self:
        path = opened.path
        if not path.exists():
            raise SourceNotFoundError(f"{opened.label}: there is no such base model")
        weights = _find_weights(path) if path.is_dir() else path
        indexed = weights.name.endswith(_INDEX)
        files = _read_shards(weights) if indexed else [_read_weights(weights)]
        if len({file.container for file in files}) > 1:
            raise DamagedFileError(f"{weights}: some of its shards are safetensors, others torch files")
        mapped: dict[str, Tensor] = {}
        places: dict[str, Place | None] = {}
        shared: set[str] = set()
        for file in files:
            shared |= _shared(file)
            here = opened.described(file, Path(file.label)).tensors
            for name, tensor in file.tensors.items():
                if name in mapped:
                    raise DamagedFileError(f"{file.label}: {name} stands in another shard too; which one is meant?")
                mapped[name] = here[name]
                offset = file.offsets.get(name)
                place = Place(Path(file.label), offset, tensor.nbytes) if offset is not None else None
                places[name] = place
        config = weights.parent / CONFIG
        return cls(
            shapes={name: tuple(tensor.shape) for name, tensor in mapped.items()},
            dtypes={name: tensor.dtype for name, tensor in mapped.items()},
            config=read_json(config) if config.is_file() else {},
            label=opened.label,
            opened=opened,
            shared=frozenset(shared),
            container=files[0].container,
            files=tuple(Path(file.label) for file in files),
            index=weights if indexed else None,
            tensors_of={Path(file.label).name: _in_file_order(file) for file in files},
            places=places,
            mapped=mapped,
        )

    @property
    def name(self) -> str:
        """What records call it: `org/name@sha` for a model of the Hub, else the last part of its path."""
        return self.opened.name if self.opened else PurePath(self.label).name

    @property
    def folder(self) -> Path:
        """Where the weights, the configuration and the tokenizer stand."""
        return self.files[0].parent

    def tensor(self, name: str) -> Tensor:
        """A weight, mapped from disk: its bytes are read where they are touched. It must not be changed.

        Raises: KeyError if the model has no such tensor
        """
        return self.mapped[name]

    def header(self, path: Path) -> bytes:
        """The header of one of its safetensors files as it stands there, with the 8 bytes of its length.

        Raises: DamagedFileError, UnsafeFileError
        """
        _, start = safetensors.read_header(path)
        with path.open("rb") as file:
            return file.read(start)

    def shape_of(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter, whose name may lack its final `.weight`.

        Raises: ShapeError if the model has no such parameter
        """
        for name in (f"{parameter}.weight", parameter):
            if name in self.shapes:
                return self.shapes[name]
        near = difflib.get_close_matches(f"{parameter}.weight", self.shapes, n=3, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else f"its names are like {next(iter(self.shapes))}"
        raise ShapeError(
            f"{self.label}: the base model has no parameter {parameter}; {hint}. Is it the right base model?"
        )


def _find_weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if not others and (of_llama_cpp := sorted(folder.glob("*.gguf"))):
        raise _gguf_refused(of_llama_cpp[0])
    if not others:
        alone = f" beside its {CONFIG}, and what is asked needs them" if (folder / CONFIG).is_file() else ""
        raise UnknownFormatError(f"{folder}: no weights of a base model{alone}; expected one of {', '.join(WEIGHTS)}")
    if shards := [other for other in others if (found := _SHARD.search(other.name)) and int(found[1]) > 1]:
        raise AmbiguousFormatError(
            f"{folder}: {shards[0].name} is a part of a model, and the index that names all of them, {WEIGHTS[0]}, is "
            "missing: download it too"
        )
    if len(others) > 1:
        names = ", ".join(other.name for other in others[:5])
        raise AmbiguousFormatError(f"{folder}: several weight files and no index ({names}); name one of them")
    return others[0]


def _read_shards(index: Path) -> list[TensorFile]:
    """The shards that an index names. It must agree with them about every tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise DamagedFileError(f"{index}: no weight_map that names a file for each tensor")
    shards = []
    for name in dict.fromkeys(weight_map.values()):
        if PurePath(name).name != name or name in ("", ".", ".."):
            raise UnsafeFileError(f"{index}: the shard {name!r:.80} would lie outside the folder")
        shard = index.parent / name
        if not shard.is_file():
            raise SourceNotFoundError(f"{shard}: the shard is missing, which {index.name} names. Download it too")
        file = _read_weights(shard)
        expected = {tensor for tensor, place in weight_map.items() if place == name}
        if expected != set(file.tensors):
            odd = sorted(expected ^ set(file.tensors))
            raise DamagedFileError(f"{shard}: {index.name} and the shard disagree about {', '.join(odd[:3])}")
        shards.append(file)
    return shards


def _in_file_order(file: TensorFile) -> tuple[str, ...]:
    return tuple(sorted(file.tensors, key=lambda name: file.offsets.get(name, 0)))


def _shared(file: TensorFile) -> set[str]:
    """The tensors of a file that lie where one before them lies."""
    seen: set[tuple[int, torch.Size]] = set()
    found = set()
    for name, tensor in file.tensors.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place in seen and tensor.numel():
            found.add(name)
        seen.add(place)
    return found


def _gguf_refused(path: Path) -> UnknownFormatError:
    return UnknownFormatError(
        f"{path}: a GGUF file cannot be the base model here: its names, and the order of the rows of q and k, are "
        "llama.cpp's. Give the Hugging Face folder that it was made from"
    )


def _read_weights(path: Path) -> TensorFile:
    container = containers.identify(path)
    if container is not None and container.NAME == "gguf":
        raise _gguf_refused(path)
    if container is None or container.NAME not in ("safetensors", "torch"):
        raise UnknownFormatError(
            f"{path}: expected the weights of a base model, as safetensors or a torch file, found "
            f"{container.NAME if container else 'another beginning; if it was one of these, download or save it again'}"
        )
    return container.read(path)
