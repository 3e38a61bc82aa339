"""GGUF: a head of typed key/value pairs and tensor descriptions, and the tensors' bytes, which are mapped and not read.

Plain numbers are views of the file. Quantised tensors (Q8_0, Q4_K …) become float32 by the gguf package when one is
asked for: `pip install adaptertools[gguf]`.

    ggml type    0 F32   1 F16   30 BF16   28 F64   24-27 I8, I16, I32, I64   any other: quantised in blocks

Source: ggml-org/ggml docs/gguf.md; gguf 0.19.0, gguf/constants.py and gguf/quants.py
"""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adaptertools.containers import gguf_header
from adaptertools.containers.atomic import allocated
from adaptertools.containers.gguf_header import MAGIC, Entry, Head, padded
from adaptertools.containers.tensorfile import TensorFile, file_size, map_file, view
from adaptertools.errors import DamagedFileError, EmptyFileError, MissingExtraError, UnsupportedFeatureError
from adaptertools.tensors import NamedTensors, computed, tensor_bytes

NAME = "gguf"
SUFFIX = ".gguf"

_DTYPES = {
    0: torch.float32,
    1: torch.float16,
    30: torch.bfloat16,
    28: torch.float64,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
}
_TYPES = {dtype: number for number, dtype in _DTYPES.items()}


def sniff(path: Path, head: bytes) -> bool:
    """Whether the file begins like GGUF."""
    return path.is_file() and head.startswith(MAGIC)


def read(path: Path) -> TensorFile:
    """Map the tensors of a file. Only the header is read.

    Raises: DamagedFileError, UnsafeFileError, EmptyFileError; MissingExtraError for quantised tensors without gguf
    """
    label = str(path)
    mapped = map_file(path)
    head = gguf_header.parse(label, memoryview(mapped))
    if not head.entries:
        raise EmptyFileError(f"{label}: the file holds no tensor")
    _check_coverage(label, head, file_size(path))
    offsets = {entry.name: head.start + entry.offset for entry in head.entries if entry.type in _DTYPES}
    return TensorFile(
        tensors=_Mapped(head, mapped),
        metadata=head.metadata,
        container=NAME,
        label=label,
        nbytes=file_size(path),
        offsets=offsets,
    )


class _Mapped(Mapping[str, Tensor]):
    """The tensors of a mapped file; a quantised one is dequantised when it is asked for, and kept."""

    def __init__(self, head: Head, mapped: mmap.mmap) -> None:
        self._entries = {entry.name: entry for entry in head.entries}
        self._start = head.start
        self._mapped = mapped
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if name not in self._made:
            self._made[name] = self._make(entry)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _make(self, entry: Entry) -> Tensor:
        offset = self._start + entry.offset
        if entry.type in _DTYPES:
            return view(self._mapped, _DTYPES[entry.type], entry.shape, offset)
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        kind = GGMLQuantizationType(entry.type)
        blocks = np.frombuffer(self._mapped, np.uint8, _nbytes("", entry), offset)
        try:
            values = dequantize(blocks.reshape(quant_shape_to_byte_shape(entry.shape, kind)), kind)
        except NotImplementedError:
            raise UnsupportedFeatureError(
                f"{entry.name}: {kind.name} is not read by the gguf package. Take an adapter in F32, F16, BF16 or Q8_0"
            ) from None
        return torch.from_numpy(np.array(values, np.float32)).reshape(entry.shape)


def _check_coverage(label: str, head: Head, size: int) -> None:
    """The tensors must stand in the order of their descriptions, with nothing between them but padding."""
    expected = 0
    end = 0
    for entry in head.entries:
        if entry.offset != expected:
            raise DamagedFileError(
                f"{label}: tensor {entry.name} at offset {entry.offset}, expected {expected}: the header lies"
            )
        end = expected + _nbytes(label, entry)
        expected = padded(end, head.alignment)
    found = size - head.start
    if found not in range(end, expected + 1):
        what = "was cut off" if found < end else "has bytes after its last tensor"
        raise DamagedFileError(
            f"{label}: the file {what}: {end} bytes of data expected, {max(found, 0)} found. Download or save it again"
        )


def _nbytes(label: str, entry: Entry) -> int:
    count = math.prod(entry.shape)
    if entry.type in _DTYPES:
        return count * _DTYPES[entry.type].itemsize
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingExtraError(
            f"{label}: {entry.name} is quantised, which needs the gguf package: pip install adaptertools[gguf]"
        ) from error
    if entry.type not in {kind.value for kind in GGML_QUANT_SIZES}:
        raise DamagedFileError(f"{label}: tensor {entry.name} has the unknown type {entry.type}")
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(entry.type)]
    if not entry.shape or entry.shape[-1] % block:
        raise DamagedFileError(f"{label}: tensor {entry.name} of shape {entry.shape} is no whole number of its blocks")
    return count // block * nbytes


def write(
    path: Path, tensors: NamedTensors, metadata: Mapping[str, str], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write the tensors in the order given, each computed when its turn comes.

    Keys of `gguf_header.KEY_TYPES` are written in their type, all others as text.

    Memory: two tensors
    Raises: DestinationError; UnsupportedFeatureError for dtypes, names and values that cannot be stored
    """
    head = _head(str(path), tensors, metadata)
    total = len(head) + sum(padded(tensor.nbytes) for tensor in tensors.values())
    with allocated(path, total) as file:
        file.write(head)
        for tensor in computed(tensors.values()):
            file.write(tensor_bytes(tensor))
            file.write(bytes(padded(tensor.nbytes) - tensor.nbytes))
            advance(tensor.nbytes)


def size(tensors: NamedTensors, metadata: Mapping[str, str]) -> int:
    """The bytes of the file that `write` makes.

    Raises: UnsupportedFeatureError for dtypes, names and values that cannot be stored
    """
    return len(_head(NAME, tensors, metadata)) + sum(padded(tensor.nbytes) for tensor in tensors.values())


def _head(label: str, tensors: NamedTensors, metadata: Mapping[str, str]) -> bytes:
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise UnsupportedFeatureError(f"{label}: GGUF cannot store {name} in {tensor.dtype}")
    entries = {name: (tuple(tensor.shape), _TYPES[tensor.dtype], tensor.nbytes) for name, tensor in tensors.items()}
    return gguf_header.build(label, entries, metadata)
