"""safetensors: an 8-byte length, a JSON header, and the tensors' bytes, which are mapped and not read.

Stricter than the safetensors library 0.8: duplicate keys, control characters in names, oversized headers and empty
tensors of absurd shape are refused. As lenient as it must be: MLX writes a null `__metadata__`, headers out of offset
order and data that is not aligned.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from adaptertools.containers.atomic import allocated
from adaptertools.containers.jsonfile import parse_object
from adaptertools.containers.tensorfile import (
    MAX_HEADER_BYTES,
    TensorFile,
    check_count,
    check_name,
    file_size,
    is_shape,
    map_file,
    view,
)
from adaptertools.errors import DamagedFileError, EmptyFileError, UnsafeFileError, UnsupportedFeatureError
from adaptertools.tensors import NamedTensors, computed, tensor_bytes

NAME = "safetensors"
SUFFIX = ".safetensors"

_METADATA = "__metadata__"
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def sniff(path: Path, head: bytes) -> bool:
    """Whether the file starts like a safetensors header."""
    return path.is_file() and len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def read(path: Path) -> TensorFile:
    """Map the tensors of a file. Only the header is read.

    Raises: DamagedFileError, UnsafeFileError, EmptyFileError
    """
    label = str(path)
    header, start = read_header(path)
    size = file_size(path)
    metadata = header.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict):
        raise DamagedFileError(f"{label}: {_METADATA} is no object")
    check_count(label, len(header))
    if not header:
        raise EmptyFileError(f"{label}: the file holds no tensor")
    spans = {check_name(label, name): _span(label, name, entry) for name, entry in header.items()}
    _check_coverage(label, spans, size - start)
    mapped = map_file(path)
    tensors = {name: view(mapped, span.dtype, span.shape, start + span.begin) for name, span in spans.items()}
    strings = {str(key): str(value) for key, value in metadata.items()}
    offsets = {name: start + span.begin for name, span in spans.items()}
    return TensorFile(tensors=tensors, metadata=strings, container=NAME, label=label, nbytes=size, offsets=offsets)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file and the offset of its data.

    Raises: DamagedFileError, UnsafeFileError
    """
    size = file_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DamagedFileError(
                f"{path}: the header claims {length} bytes, the file has {size}. "
                "It was cut off: download or save it again"
            )
        if length > MAX_HEADER_BYTES:
            raise UnsafeFileError(f"{path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted")
        text = file.read(length)
    return parse_object(f"{path} (header)", text), 8 + length


class _Span:
    """Where a tensor lies in the data, in bytes from its start."""

    __slots__ = ("begin", "dtype", "end", "shape")

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> None:
        self.dtype, self.shape, self.begin, self.end = dtype, shape, begin, end


def _span(label: str, name: str, entry: object) -> _Span:
    where = f"{label}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedFileError(f"{where}: expected dtype, shape and data_offsets in the header, found {entry!r:.80}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise DamagedFileError(f"{where}: unknown dtype {entry['dtype']!r:.40}, expected one of {', '.join(_DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not is_shape(shape) or not _is_span(offsets):
        raise DamagedFileError(f"{where}: shape {shape!r:.80} and offsets {offsets!r:.80} are impossible")
    dtype = _DTYPES[entry["dtype"]]
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise DamagedFileError(
            f"{where}: shape {shape} in {entry['dtype']} takes {nbytes} bytes, "
            f"its offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    return _Span(dtype, tuple(shape), offsets[0], offsets[1])


def _is_span(offsets: object) -> bool:
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)


def _check_coverage(label: str, spans: Mapping[str, _Span], size: int) -> None:
    """The tensors must cover the data without gap, overlap or rest."""
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != end:
            what = "overlaps the tensor before it" if span.begin < end else "leaves a gap before it"
            raise DamagedFileError(f"{label}: tensor {name} at byte {span.begin} {what}, which ends at {end}")
        end = span.end
    if end != size:
        what = "was cut off" if size < end else "has bytes after its last tensor"
        raise DamagedFileError(
            f"{label}: the file {what}: {end} bytes of data expected, {size} found. Download or save it again"
        )


class Sized(Protocol):
    """What must be known of a tensor to give it a place in a file."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def nbytes(self) -> int: ...


def lay_out(label: str, tensors: Mapping[str, Sized], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a file of these tensors, and where in the file each begins, in the order of their bytes.

    Wide dtypes stand first, so that every tensor is aligned.

    Raises: UnsupportedFeatureError for dtypes and names that cannot be stored
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES or check_name(label, name) == _METADATA:
            raise UnsupportedFeatureError(f"{label}: safetensors cannot store {name} in {tensor.dtype}")
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    begins = {}
    for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
        tensor = tensors[name]
        begins[name], end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}


def write(
    path: Path, tensors: NamedTensors, metadata: Mapping[str, str], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write the tensors in the order that `lay_out` gives them, each computed when its turn comes.

    Memory: two tensors
    Raises: DestinationError; UnsupportedFeatureError for dtypes and names that cannot be stored
    """
    header, offsets = lay_out(str(path), tensors, metadata)
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    with allocated(path, size) as file:
        file.write(header)
        for tensor in computed(tensors[name] for name in offsets):
            file.write(tensor_bytes(tensor))
            advance(tensor.nbytes)


def size(tensors: NamedTensors, metadata: Mapping[str, str]) -> int:
    """The bytes of the file that `write` makes.

    Raises: UnsupportedFeatureError for dtypes and names that cannot be stored
    """
    header, _ = lay_out(NAME, tensors, metadata)
    return len(header) + sum(tensor.nbytes for tensor in tensors.values())
