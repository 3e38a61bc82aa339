"""Orbax checkpoints: a folder with `_METADATA`, which names the leaves of a tree, and one zarr array a leaf.

Read through tensorstore, without jax: zarr 2 or 3, in an OCDBT database or in plain folders. Written without either:
zarr 2, uncompressed, one chunk an array, in plain folders. Read in orbax-checkpoint 0.12.8 (metadata/tree.py,
serialization/tensorstore_utils.py), whose StandardCheckpointer, PyTreeCheckpointer and v1 restore what is written.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptertools.containers.atomic import allocated, explained, sync_tree
from adaptertools.containers.jsonfile import format_json, read_json
from adaptertools.containers.tensorfile import TensorFile, check_count, check_growth, check_name, nested, parsing
from adaptertools.errors import (
    AmbiguousFormatError,
    DamagedFileError,
    EmptyFileError,
    MissingExtraError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from adaptertools.tensors import Deferred, NamedTensors, computed, tensor_bytes

NAME = "orbax"
SUFFIX = ".orbax"

_TREE = "_METADATA"
_CHECKPOINT = "_CHECKPOINT_METADATA"
_STRINGS = "_strings.json"
_ITEMS = ("model_params", "items", "default", "state", "params")
_ARRAY_TYPES = ("jax.Array", "np.ndarray")
_DICT_KEY = 2

_ZARR_DTYPES = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int16: "<i2",
    torch.int8: "|i1",
    torch.uint64: "<u8",
    torch.uint32: "<u4",
    torch.uint16: "<u2",
    torch.uint8: "|u1",
    torch.bool: "|b1",
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _ZARR_DTYPES}


def sniff(path: Path, head: bytes) -> bool:
    """Whether the path is an Orbax folder, or one that holds such a folder in its usual place."""
    return path.is_dir() and bool(_candidates(path))


def read(path: Path) -> TensorFile:
    """The arrays of a checkpoint. Its scalars, texts and custom metadata become metadata, as JSON where it is no text.

    Memory: every array
    Raises: MissingExtraError without tensorstore; AmbiguousFormatError for several steps; DamagedFileError and the like
    """
    folder = _locate(path)
    tree = read_json(folder / _TREE)
    label = str(path)
    leaves = list(_leaves(folder, tree))
    check_count(label, len(leaves))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    arrays = _read_arrays(folder, [leaf for leaf in leaves if leaf.type not in ("string", "None")], tree, size)
    tensors = {leaf.name: arrays[leaf.name] for leaf in leaves if leaf.type in _ARRAY_TYPES}
    if not tensors:
        raise EmptyFileError(f"{path}: the checkpoint holds no array")
    strings = {leaf.name: str(arrays[leaf.name].item()) for leaf in leaves if leaf.type == "scalar"}
    strings |= _texts(folder, leaves) | _custom_metadata(folder)
    return TensorFile(tensors=tensors, metadata=strings, container=NAME, label=label, nbytes=size)


def _candidates(path: Path) -> list[Path]:
    """The folders that hold a tree: the path itself, an item of it, or those of its steps."""
    if (path / _TREE).is_file():
        return [path]
    items = [path / item for item in _ITEMS if (path / item / _TREE).is_file()]
    if items:
        return items[:1]
    steps = sorted(
        (step for step in path.iterdir() if step.name.isdecimal() and step.is_dir()), key=lambda s: int(s.name)
    )
    return [folder for step in steps for folder in _candidates(step)]


def _locate(path: Path) -> Path:
    found = _candidates(path)
    if not found:
        raise DamagedFileError(f"{path}: no {_TREE} in it, nor in {', '.join(_ITEMS)} or a step of it")
    if len(found) > 1:
        steps = ", ".join(str(folder.relative_to(path)) for folder in found)
        raise AmbiguousFormatError(f"{path}: several checkpoints stand in it: {steps}. Give the path of one")
    return found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leaf:
    """A leaf of the tree. `array` is the name of its array in the store."""

    name: str
    array: str
    type: str


def _leaves(folder: Path, tree: Mapping[str, Any]) -> Iterator[_Leaf]:
    label = str(folder / _TREE)
    entries = tree.get("tree_metadata")
    if not isinstance(entries, dict):
        raise DamagedFileError(f"{label}: no tree_metadata in it")
    seen: set[str] = set()
    for path, entry in entries.items():
        match entry:
            case {"key_metadata": [*parts], "value_metadata": {"value_type": str(kind)} as value}:
                keys = [str(part.get("key", "")) if isinstance(part, dict) else "" for part in parts]
            case _:
                raise DamagedFileError(f"{label}: entry {path!r:.80} lacks keys or a value type")
        _check_keys(label, keys, in_folders=not tree.get("use_ocdbt"))
        name = check_name(label, "/".join(keys))
        if name in seen:
            raise DamagedFileError(f"{label}: two leaves are named {name}; which one is meant?")
        seen.add(name)
        if value.get("skip_deserialize") or kind in ("Dict", "List", "None"):
            continue
        if kind not in (*_ARRAY_TYPES, "scalar", "string"):
            raise DamagedFileError(f"{label}: {name} is a {kind!r:.40}, expected one of {', '.join(_ARRAY_TYPES)}")
        yield _Leaf(name=name, array=".".join(keys), type=kind)


def _check_keys(label: str, keys: Sequence[str], *, in_folders: bool) -> None:
    """In plain folders the keys form paths."""
    for key in keys:
        if not key or (in_folders and ("/" in key or "\0" in key or key in (".", ".."))):
            raise UnsafeFileError(f"{label}: key {key!r:.80} would lead out of the folder")


def _tensorstore() -> ModuleType:
    try:
        import tensorstore
    except ImportError as error:
        raise MissingExtraError(
            "reading Orbax checkpoints needs tensorstore: pip install adaptertools[orbax]"
        ) from error
    return tensorstore


def _read_arrays(folder: Path, leaves: Sequence[_Leaf], tree: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    tensorstore = _tensorstore()
    with parsing(folder):
        pending = [tensorstore.open(_spec(folder, leaf, tree), read=True, open=True) for leaf in leaves]
        stores = {leaf.name: future.result() for leaf, future in zip(leaves, pending, strict=True)}
        chunks = (store.chunk_layout.read_chunk.shape or () for store in stores.values())
        largest = max((math.prod(chunk) * 8 for chunk in chunks), default=0)
        check_growth(
            str(folder),
            max(largest, sum(store.size * store.dtype.numpy_dtype.itemsize for store in stores.values())),
            size,
        )
        for name, store in stores.items():
            if store.dtype.name not in _DTYPES:
                raise DamagedFileError(f"{folder}: {name} has dtype {store.dtype.name}, expected {', '.join(_DTYPES)}")
        reads = {name: store.read() for name, store in stores.items()}
        return {name: _tensor(future.result(), stores[name].dtype.name) for name, future in reads.items()}


def _spec(folder: Path, leaf: _Leaf, tree: Mapping[str, Any]) -> dict[str, Any]:
    root = folder.absolute()
    kvstore = (
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{root}/"}, "path": f"{leaf.array}/"}
        if tree.get("use_ocdbt")
        else {"driver": "file", "path": f"{root}/{leaf.array}/"}
    )
    return {
        "driver": "zarr3" if tree.get("use_zarr3") else "zarr",
        "kvstore": kvstore,
        "fill_missing_data_reads": not tree.get("store_array_data_equal_to_fill_value", False),
    }


def _tensor(array: np.ndarray[Any, Any], dtype: str) -> Tensor:
    """numpy's bfloat16 is a foreign dtype that torch does not take: its bytes are handed over."""
    if array.size == 0:
        return torch.empty(array.shape, dtype=_DTYPES[dtype])
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return torch.from_numpy(raw).view(_DTYPES[dtype]).reshape(array.shape)


def _texts(folder: Path, leaves: Sequence[_Leaf]) -> dict[str, str]:
    wanted = [leaf for leaf in leaves if leaf.type == "string"]
    if not wanted:
        return {}
    if not (folder / _STRINGS).is_file():
        raise DamagedFileError(f"{folder}: {_STRINGS} is missing, which holds {wanted[0].name}")
    texts = read_json(folder / _STRINGS)
    return {leaf.name: str(texts[leaf.array]) for leaf in wanted if leaf.array in texts}


def _custom_metadata(folder: Path) -> dict[str, str]:
    """What the writer said of the checkpoint: in its own folder, or in that of the step which it is an item of."""
    found: dict[str, Any] = {}
    for place in (folder.parent, folder):
        if (place / _CHECKPOINT).is_file():
            found |= read_json(place / _CHECKPOINT).get("custom_metadata") or {}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


def write(
    path: Path, tensors: NamedTensors, metadata: Mapping[str, str], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write a checkpoint folder; names are split at `/`, metadata becomes the checkpoint's custom metadata.

    Memory: one tensor
    Raises: DestinationError; UnsupportedFeatureError for names and dtypes that cannot be stored
    """
    arrays, documents = _lay_out(str(path), tensors, metadata)
    with explained(path):
        path.mkdir()
        for array, tensor in zip(arrays, computed(tensors[name] for name in arrays.values()), strict=True):
            _write_array(path / array, tensor)
            advance(tensor.nbytes)
        for name, document in documents.items():
            _write_json(path / name, document)
        sync_tree(path)


def size(tensors: NamedTensors, metadata: Mapping[str, str]) -> int:
    """The bytes of all files in the folder that `write` makes.

    Raises: UnsupportedFeatureError for names and dtypes that cannot be stored
    """
    _, documents = _lay_out(NAME, tensors, metadata)
    described = [*documents.values(), *map(_description, tensors.values())]
    return sum(tensor.nbytes for tensor in tensors.values()) + sum(
        len(format_json(document).encode()) for document in described
    )


def _lay_out(
    label: str, tensors: NamedTensors, metadata: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The tensor of every array by the array's name, and the documents beside the arrays.

    Raises: UnsupportedFeatureError for names and dtypes that cannot be stored
    """
    nested(label, tensors)
    entries: dict[str, Any] = {}
    arrays: dict[str, str] = {}
    for name, tensor in tensors.items():
        keys = check_name(label, name).split("/")
        array = ".".join(keys)
        if tensor.dtype not in _ZARR_DTYPES or tensor.nbytes == 0 or {".", ".."} & set(keys) or array in arrays:
            raise UnsupportedFeatureError(
                f"{label}: Orbax cannot store {name}, {tuple(tensor.shape)} in {tensor.dtype}"
            )
        arrays[array] = name
        entries[repr(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    tree = {
        "tree_metadata": entries,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
    }
    return arrays, {_TREE: tree, _CHECKPOINT: {"custom_metadata": dict(metadata)}}


def _description(tensor: Tensor | Deferred) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": list(tensor.shape),
        "chunks": list(tensor.shape),
        "dtype": _ZARR_DTYPES[tensor.dtype],
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }


def _write_array(folder: Path, tensor: Tensor) -> None:
    folder.mkdir()
    _write_json(folder / ".zarray", _description(tensor))
    chunk = ".".join("0" for _ in tensor.shape) or "0"
    with allocated(folder / chunk, tensor.nbytes, flush=False) as file:
        file.write(tensor_bytes(tensor))


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    data = format_json(document).encode()
    with allocated(path, len(data), flush=False) as file:
        file.write(data)
