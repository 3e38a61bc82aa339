"""A base model by its headers: names, shapes and dtypes of its weights, and its configuration. No weight is read."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Self

import torch

from adaptertools import containers
from adaptertools.containers.jsonfile import read_json
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.errors import (
    AmbiguousFormatError,
    DamagedFileError,
    ShapeError,
    SourceNotFoundError,
    UnknownFormatError,
    UnsafeFileError,
)

_CONFIG = "config.json"
_INDEX = ".index.json"
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""The names under which model libraries store weights, the preferred first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weights of a base model, known by shape and dtype alone.

    Memory: headers; torch files are mapped
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    config: Mapping[str, Any] = field(default_factory=dict)
    label: str
    shared: frozenset[str] = frozenset()
    """Tensors whose bytes are those of one before: tied weights, as torch files keep them."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """A folder with a model, an index of shards, or one file of weights.

        Raises: SourceNotFoundError, UnknownFormatError, DamagedFileError and the like
        """
        if not path.exists():
            raise SourceNotFoundError(f"{path}: there is no such base model")
        weights = _find_weights(path) if path.is_dir() else path
        files = _read_shards(weights) if weights.name.endswith(_INDEX) else [_read_weights(weights)]
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        shared: set[str] = set()
        for file in files:
            shared |= _shared(file)
            for name, tensor in file.tensors.items():
                if name in shapes:
                    raise DamagedFileError(f"{file.label}: {name} stands in another shard too; which one is meant?")
                shapes[name], dtypes[name] = tuple(tensor.shape), tensor.dtype
        config = weights.parent / _CONFIG
        return cls(
            shapes=shapes,
            dtypes=dtypes,
            config=read_json(config) if config.is_file() else {},
            label=str(path),
            shared=frozenset(shared),
        )

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
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if not others:
        raise UnknownFormatError(f"{folder}: no weights of a base model; expected one of {', '.join(_WEIGHTS)}")
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


def _read_weights(path: Path) -> TensorFile:
    container = containers.identify(path)
    if container is None or container.NAME not in ("safetensors", "torch"):
        raise UnknownFormatError(f"{path}: expected the weights of a base model, as safetensors or a torch file")
    return container.read(path)
