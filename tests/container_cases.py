"""Named tensors for the container tests, and how each container's own library reads and writes them."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import ml_dtypes
import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from adaptertools.containers import CONTAINERS

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
UNSIGNED = (torch.uint64, torch.uint32, torch.uint16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (*FLOATS, *INTEGERS, *UNSIGNED, torch.bool)

_PARTS = st.text(alphabet="abz.019_-é漢", min_size=1, max_size=6).filter(lambda part: part not in (".", ".."))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits: NaNs, infinities and subnormals among them. Booleans are 0 and 1."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ((raw & 1).bool() if dtype is torch.bool else raw.view(dtype)).reshape(shape)


@st.composite
def named_tensors(
    draw: st.DrawFn, *, empty: bool = True, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> dict[str, Tensor]:
    """Up to five tensors of any dtype and shape under names that form a tree when split at `/`."""
    names = draw(st.lists(st.lists(_PARTS, min_size=1, max_size=3).map("/".join), min_size=1, max_size=5, unique=True))
    kept = [name for name in names if not any(other.startswith(name + "/") for other in names)]
    sizes = st.integers(0 if empty else 1, 4)
    return {
        name: random_tensor(
            tuple(draw(st.lists(sizes, max_size=3))), draw(st.sampled_from(dtypes)), draw(st.integers(0, 1000))
        )
        for name in kept
    }


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names with the same dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def write(container: str, folder: Path, tensors: Mapping[str, Any], name: str = "file") -> Path:
    """A file of the container in the folder."""
    path = folder / f"{name}{CONTAINERS[container].SUFFIX}"
    CONTAINERS[container].write(path, tensors, {}, lambda _: None)
    return path


def to_numpy(tensor: Tensor) -> np.ndarray:
    """With the dtypes of ml_dtypes, as JAX has them."""
    foreign = {
        torch.bfloat16: ml_dtypes.bfloat16,
        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
        torch.float8_e5m2: ml_dtypes.float8_e5m2,
    }
    if tensor.dtype not in foreign:
        return tensor.numpy()
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(foreign[tensor.dtype]).reshape(tensor.shape)


def from_numpy(array: np.ndarray) -> Tensor:
    """The reverse of `to_numpy`; two void bytes are a bfloat16."""
    name = "bfloat16" if array.dtype == np.dtype("V2") else array.dtype.name
    if array.size == 0:
        return torch.empty(array.shape, dtype=getattr(torch, name))
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return torch.from_numpy(raw.copy()).view(getattr(torch, name)).reshape(array.shape)


def nest(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dicts, names split at `/`."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = tensor
    return tree


def unnest(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The reverse of `nest`."""
    flat: dict[str, Any] = {}
    for key, child in tree.items():
        flat |= unnest(child, f"{prefix}{key}/") if isinstance(child, dict) else {f"{prefix}{key}": child}
    return flat


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: from_numpy(archive[name]) for name in archive.files}


def _read_msgpack(path: Path) -> dict[str, Tensor]:
    restored = flax.serialization.msgpack_restore(path.read_bytes())
    return {name: from_numpy(array) for name, array in unnest(restored).items()}


REAL_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "safetensors": safetensors.torch.load_file,
    "torch": lambda path: torch.load(path, weights_only=True),
    "npz": _read_npz,
    "msgpack": _read_msgpack,
}

REAL_WRITERS: dict[str, Callable[[Mapping[str, Tensor], Path], None]] = {
    "safetensors": lambda tensors, path: safetensors.torch.save_file(dict(tensors), path),
    "torch": lambda tensors, path: torch.save(dict(tensors), path),
    "npz": lambda tensors, path: np.savez(path, **{name: to_numpy(tensor) for name, tensor in tensors.items()}),
    "msgpack": lambda tensors, path: _write_msgpack(tensors, path),
}


def _write_msgpack(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.write_bytes(flax.serialization.msgpack_serialize(nest({k: to_numpy(t) for k, t in tensors.items()})))


def rewrite_zip(source: Path, target: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """A copy of a zip file with every member changed, or left out where `change` returns None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info.filename))
            if content is not None:
                new.writestr(info.filename, content)
    return target


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut off, flipped, overwritten, repeated or with others put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        piece = draw(st.binary(min_size=1, max_size=9))
        match draw(st.sampled_from(("cut", "flip", "overwrite", "insert", "remove", "repeat"))):
            case "cut":
                del data[at:]
            case "flip":
                if data:
                    data[at] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                data[at : at + len(piece)] = piece
            case "insert":
                data[at:at] = piece
            case "remove":
                del data[at : at + len(piece)]
            case "repeat":
                data[at:at] = data[at : at + 200]
    return bytes(data)


def binary_documents() -> st.SearchStrategy[bytes]:
    """Bytes that begin like a msgpack map of names."""
    return st.binary(max_size=200).map(lambda tail: b"\x81\xa1x" + tail)
