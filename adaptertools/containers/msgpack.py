"""msgpack as flax.serialization writes it: maps of names, with arrays in extension 1 and numpy scalars in extension 3.

The payload of both is a msgpack document of its own: `[shape, dtype name, raw bytes in C order]`. Extension 2 is a
complex number. Arrays above 2^30 bytes are a map of flat chunks marked `__msgpack_chunked_array__`. Read in flax
0.12.8, flax/serialization.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from adaptertools.containers.atomic import allocated
from adaptertools.containers.msgpack_walker import Extension, Span, Walker
from adaptertools.containers.tensorfile import (
    TensorFile,
    check_name,
    file_size,
    flatten,
    is_shape,
    map_file,
    nested,
    view,
)
from adaptertools.errors import DamagedFileError, EmptyFileError, UnsupportedFeatureError
from adaptertools.tensors import Deferred, NamedTensors, computed, tensor_bytes

NAME = "msgpack"
SUFFIX = ".msgpack"

MAX_CHUNK_BYTES = 1 << 30
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_BINARY_CODES = (0xC4, 0xC5, 0xC6)
_EXTENSION_CODES = (0xC7, 0xC8, 0xC9)
_FIXED_EXTENSIONS = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def sniff(path: Path, head: bytes) -> bool:
    """Whether the file starts like a map of names. msgpack has no magic bytes."""
    if not head or not (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return False
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(head)
    try:
        unpacker.read_map_header()
        key = unpacker.unpack()
        if isinstance(key, int):  # flax keeps whole numbers as keys, but not of bare numbers
            unpacker.read_map_header()
    except Exception:  # the library raises all sorts of errors on bytes that are not msgpack
        return False
    return isinstance(key, int) or (isinstance(key, str) and key.isprintable())


def read(path: Path) -> TensorFile:
    """The arrays of a file, mapped from disk. Whatever else it holds becomes metadata.

    Memory: none, but for arrays above 2^30 bytes, whose chunks are joined
    Raises: DamagedFileError, UnsafeFileError, EmptyFileError
    """
    mapped = map_file(path)
    content = _Decoder(str(path), mapped).decode(Walker(str(path), mapped).document(), "")
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path}: expected a map of arrays, found {type(content).__name__}")
    tensors, strings = flatten(str(path), content)
    if not tensors:
        raise EmptyFileError(f"{path}: the file holds no array")
    return TensorFile(tensors=tensors, metadata=strings, container=NAME, label=str(path), nbytes=file_size(path))


class _Decoder:
    """Turns what flax encodes into tensors and numbers."""

    def __init__(self, label: str, data: mmap) -> None:
        self._label = label
        self._data = data

    def decode(self, value: object, name: str = "") -> object:
        """The value with its extensions decoded and its chunks joined."""
        if isinstance(value, dict):
            content = {key: self.decode(child, f"{name}/{key}" if name else str(key)) for key, child in value.items()}
            return self._joined(name, content) if _CHUNKED in content else content
        if isinstance(value, list):
            return [self.decode(child, f"{name}/{index}") for index, child in enumerate(value)]
        if isinstance(value, Extension):
            return self._extension(name, value)
        if isinstance(value, Span):
            return self._data[value.start : value.stop]
        return value

    def _extension(self, name: str, span: Extension) -> Tensor | complex:
        if span.code not in (_ARRAY, _COMPLEX, _SCALAR):
            raise self._damaged(name, f"extension type {span.code}", "1, 2 or 3, which flax uses")
        match Walker(f"{self._label}: {name}", self._data, span.start, span.stop).document():
            case [list(shape), str(dtype), Span() as raw] if span.code != _COMPLEX:
                return self._tensor(name, shape, dtype, raw)
            case [int() | float() as real, int() | float() as imaginary] if span.code == _COMPLEX:
                return complex(real, imaginary)
            case _:
                raise self._damaged(name, "an array of unknown make", "shape, dtype and bytes")

    def _tensor(self, name: str, shape: list[object], dtype_name: str, raw: Span) -> Tensor:
        if dtype_name not in _DTYPES:
            raise self._damaged(name, f"dtype {dtype_name!r:.40}", ", ".join(_DTYPES))
        sizes = self._sizes(name, shape)
        dtype = _DTYPES[dtype_name]
        if prod(sizes) * dtype.itemsize != raw.stop - raw.start:
            found = f"{raw.stop - raw.start} bytes for shape {sizes} in {dtype_name}"
            raise self._damaged(name, found, str(prod(sizes) * dtype.itemsize))
        return view(self._data, dtype, sizes, raw.start)

    def _sizes(self, name: str, shape: list[object]) -> tuple[int, ...]:
        if not is_shape(shape):
            raise self._damaged(name, f"shape {shape!r:.80}", "whole numbers that a tensor may have")
        return tuple(shape)

    def _joined(self, name: str, content: dict[Any, object]) -> Tensor:
        shape, chunks = content.get("shape"), content.get("chunks")
        if not isinstance(shape, dict) or not isinstance(chunks, dict):
            raise self._damaged(name, "a chunked array without shape or chunks", "both")
        sizes = self._sizes(name, self._in_order(name, shape))
        parts = [chunk for chunk in self._in_order(name, chunks) if isinstance(chunk, Tensor)]
        if len(parts) != len(chunks) or not parts or len({part.dtype for part in parts}) > 1:
            raise self._damaged(name, "chunks of several kinds", "arrays of one dtype")
        if sum(part.numel() for part in parts) != prod(sizes):
            raise self._damaged(name, f"chunks of {sum(part.numel() for part in parts)} elements", f"shape {sizes}")
        return torch.cat([part.reshape(-1) for part in parts]).reshape(sizes)

    def _in_order(self, name: str, content: Mapping[Any, object]) -> list[object]:
        keys = [str(index) for index in range(len(content))]
        if set(keys) != set(content):
            raise self._damaged(name, f"chunks numbered {sorted(map(str, content))!r:.80}", f"0 to {len(keys) - 1}")
        return [content[key] for key in keys]

    def _damaged(self, name: str, found: str, expected: str) -> DamagedFileError:
        return DamagedFileError(f"{self._label}: {name or 'the document'} holds {found}; expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Bytes of structure, and the span of a tensor's bytes that follows them."""

    head: bytes
    name: str = ""
    start: int = 0
    stop: int = 0


def write(
    path: Path, tensors: NamedTensors, metadata: Mapping[str, str], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write the tensors as a tree, byte for byte as `flax.serialization.msgpack_serialize` does.

    Names are split at `/`; keys are sorted, as flax sorts them. A msgpack file has no header, so `metadata` is not
    written.

    Memory: two tensors
    Raises: DestinationError; UnsupportedFeatureError for dtypes and names that cannot be stored
    """
    pieces = _lay_out(str(path), tensors)
    with allocated(path, _length(pieces)) as file:
        names = dict.fromkeys(piece.name for piece in pieces if piece.name)
        coming = computed(tensors[name] for name in names)
        current, data = "", memoryview(b"")
        for piece in pieces:
            file.write(piece.head)
            if piece.name and piece.name != current:
                current, data = piece.name, tensor_bytes(next(coming))
            file.write(data[piece.start : piece.stop])
            advance(piece.stop - piece.start)


def size(tensors: NamedTensors, metadata: Mapping[str, str]) -> int:
    """The bytes of the file that `write` makes.

    Raises: UnsupportedFeatureError for dtypes and names that cannot be stored
    """
    return _length(_lay_out(NAME, tensors))


def _lay_out(label: str, tensors: NamedTensors) -> list[_Piece]:
    for name, tensor in tensors.items():
        check_name(label, name)
        if tensor.dtype not in _DTYPE_NAMES:
            raise UnsupportedFeatureError(
                f"{label}: msgpack cannot store {name} in {tensor.dtype}; choose another dtype"
            )
    return list(_tree_layout(nested(label, tensors), ""))


def _length(pieces: Sequence[_Piece]) -> int:
    return sum(len(piece.head) + piece.stop - piece.start for piece in pieces)


def _tree_layout(tree: Mapping[str, Any], prefix: str) -> Iterator[_Piece]:
    yield _Piece(head=_map_header(len(tree)))
    for key in sorted(tree):
        yield _Piece(head=msgpack.packb(key))
        name, child = f"{prefix}{key}", tree[key]
        if isinstance(child, dict):
            yield from _tree_layout(child, f"{name}/")
        elif child.nbytes > MAX_CHUNK_BYTES:
            yield from _chunked_layout(name, child)
        else:
            yield _array_piece(name, child.dtype, child.shape, 0, child.nbytes)


def _chunked_layout(name: str, tensor: Tensor | Deferred) -> Iterator[_Piece]:
    shape = {str(axis): size for axis, size in enumerate(tensor.shape)}
    step = max(1, MAX_CHUNK_BYTES // tensor.dtype.itemsize) * tensor.dtype.itemsize
    starts = range(0, tensor.nbytes, step)
    marker = msgpack.packb(_CHUNKED) + msgpack.packb(True)
    yield _Piece(head=_map_header(3) + marker + msgpack.packb("shape") + msgpack.packb(shape))
    yield _Piece(head=msgpack.packb("chunks") + _map_header(len(starts)))
    for index, start in enumerate(starts):
        stop = min(start + step, tensor.nbytes)
        yield _Piece(head=msgpack.packb(str(index)))
        yield _array_piece(name, tensor.dtype, [(stop - start) // tensor.dtype.itemsize], start, stop)


def _array_piece(name: str, dtype: torch.dtype, shape: Sequence[int], start: int, stop: int) -> _Piece:
    length = stop - start
    inner = msgpack.packb([list(shape), _DTYPE_NAMES[dtype]])
    inner = b"\x93" + inner[1:] + _sized_header(_BINARY_CODES, length)
    total = len(inner) + length
    if total in _FIXED_EXTENSIONS:
        head = bytes([_FIXED_EXTENSIONS[total], _ARRAY])
    else:
        head = _sized_header(_EXTENSION_CODES, total) + bytes([_ARRAY])
    return _Piece(head=head + inner, name=name, start=start, stop=stop)


def _map_header(length: int) -> bytes:
    return bytes(msgpack.Packer().pack_map_header(length))


def _sized_header(codes: tuple[int, int, int], length: int) -> bytes:
    """The shortest of the three headers, with lengths of one, two and four bytes."""
    width = 1 if length < 1 << 8 else 2 if length < 1 << 16 else 4
    return bytes([codes[width.bit_length() - 1]]) + length.to_bytes(width, "big")
