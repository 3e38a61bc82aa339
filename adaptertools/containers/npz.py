"""npz: a zip of npy arrays. Stored members are mapped from disk; deflated ones are expanded within a bound.

numpy knows no bfloat16 and writes it as two void bytes, `|V2`; that is how it is read and written here.
"""

import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from adaptertools.containers import ziparchive
from adaptertools.containers.tensorfile import TensorFile, check_name, file_size, is_shape, map_file, parsing, view
from adaptertools.containers.ziparchive import Member
from adaptertools.errors import DamagedFileError, EmptyFileError, UnsafeFileError, UnsupportedFeatureError
from adaptertools.tensors import Deferred, NamedTensors, computed, tensor_bytes

NAME = "npz"
SUFFIX = ".npz"

_MEMBER_SUFFIX = ".npy"
_LONGEST_HEADER = 1 << 16
_DTYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype("V2"): torch.bfloat16,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.uint64): torch.uint64,
    np.dtype(np.uint32): torch.uint32,
    np.dtype(np.uint16): torch.uint16,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.bool_): torch.bool,
}
_NUMPY_DTYPES = {dtype: numpy_dtype for numpy_dtype, dtype in _DTYPES.items()}
_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def sniff(path: Path, head: bytes) -> bool:
    """Whether the file is a zip whose first member is an npy array."""
    if not head.startswith(ziparchive.MAGIC):
        return False
    stop = 30 + int.from_bytes(head[26:28], "little")
    if stop > len(head):
        with path.open("rb") as file:
            head = file.read(stop)
    return head[30:stop].endswith(_MEMBER_SUFFIX.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What an npy header says, and where the numbers begin behind it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    length: int


def read(path: Path) -> TensorFile:
    """The arrays of a file. Texts among them become metadata.

    Memory: none for stored members; the expanded size of deflated ones, at most 100 times that of the file
    Raises: DamagedFileError, EmptyFileError; UnsafeFileError for pickled objects and for sizes out of bound
    """
    members = ziparchive.read_directory(path)
    mapped = map_file(path)
    tensors: dict[str, Tensor] = {}
    strings: dict[str, str] = {}
    with parsing(path), zipfile.ZipFile(path) as archive:
        for member in members.values():
            name = check_name(str(path), member.name.removesuffix(_MEMBER_SUFFIX))
            if name == member.name:
                raise DamagedFileError(f"{path}: member {name} is no {_MEMBER_SUFFIX} array")
            data, begin = (mapped, member.offset) if member.stored else (_expanded(archive, member), 0)
            header = _parse_header(f"{path}: {name}", data[begin : begin + _LONGEST_HEADER], member.size)
            if header.dtype.kind in "US":
                raw = data[begin + header.length : begin + member.size]
                strings[name] = str(np.frombuffer(raw, header.dtype).reshape(header.shape).tolist())
            else:
                tensors[name] = _tensor(f"{path}: {name}", header, data, begin)
    if not tensors:
        raise EmptyFileError(f"{path}: the file holds no numeric array")
    return TensorFile(tensors=tensors, metadata=strings, container=NAME, label=str(path), nbytes=file_size(path))


def _expanded(archive: zipfile.ZipFile, member: Member) -> bytearray:
    data = bytearray()
    with archive.open(member.name) as stream:
        while piece := stream.read(1 << 20):
            data += piece
    if len(data) != member.size:
        raise DamagedFileError(f"{member.name} expands to {len(data)} bytes, {member.size} expected")
    return data


def _parse_header(where: str, head: bytes | bytearray, size: int) -> _Header:
    stream = BytesIO(head)
    version = npy.read_magic(stream)
    if version not in _HEADER_READERS:
        raise DamagedFileError(
            f"{where}: npy version {version}, expected one of {', '.join(map(str, _HEADER_READERS))}"
        )
    shape, fortran, dtype = _HEADER_READERS[version](stream)
    if dtype.hasobject:
        raise UnsafeFileError(f"{where} holds pickled Python objects, which could run code. Save numeric arrays only")
    header = _Header(dtype=dtype, shape=shape, fortran=fortran, length=stream.tell())
    expected = header.length + dtype.itemsize * math.prod(shape)
    if expected != size or not is_shape(shape):
        raise DamagedFileError(
            f"{where}: shape {shape} in {dtype} takes {expected} bytes with its header, found {size}"
        )
    return header


def _tensor(where: str, header: _Header, data: mmap | bytearray, begin: int) -> Tensor:
    native = header.dtype.newbyteorder("=")
    if native not in _DTYPES:
        raise DamagedFileError(
            f"{where}: dtype {header.dtype} is not supported; expected {', '.join(map(str, _DTYPES))}"
        )
    stored_shape = header.shape[::-1] if header.fortran else header.shape
    tensor = view(data, _DTYPES[native], stored_shape, begin + header.length)
    if not header.dtype.isnative:
        swapped = np.frombuffer(
            tensor.view(torch.uint8).numpy() if tensor.ndim else tensor.reshape(1).view(torch.uint8).numpy(),
            header.dtype,
        )
        tensor = torch.from_numpy(swapped.astype(native)).reshape(stored_shape)
    return tensor.permute(*reversed(range(tensor.ndim))) if header.fortran else tensor


def write(
    path: Path, tensors: NamedTensors, metadata: Mapping[str, str], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write the tensors as `np.savez` would, each computed when its turn comes.

    An npz file has no header, so `metadata` is not written.

    Memory: two tensors
    Raises: DestinationError; UnsupportedFeatureError for a dtype that numpy does not have
    """
    headers = _headers(str(path), tensors)
    sizes = _sizes(headers, tensors)
    with ziparchive.create(path, sizes) as archive:
        for name, tensor in zip(tensors, computed(tensors.values()), strict=True):
            with archive.member(name + _MEMBER_SUFFIX, sizes[name + _MEMBER_SUFFIX]) as append:
                append(headers[name])
                append(tensor_bytes(tensor))
            advance(tensor.nbytes)


def size(tensors: NamedTensors, metadata: Mapping[str, str]) -> int:
    """The bytes of the file that `write` makes.

    Raises: UnsupportedFeatureError for a dtype that numpy does not have
    """
    return ziparchive.size(_sizes(_headers(NAME, tensors), tensors))


def _headers(label: str, tensors: NamedTensors) -> dict[str, bytes]:
    return {check_name(label, name): _format_header(label, name, tensor) for name, tensor in tensors.items()}


def _sizes(headers: Mapping[str, bytes], tensors: NamedTensors) -> dict[str, int]:
    """The bytes of every member."""
    return {name + _MEMBER_SUFFIX: len(headers[name]) + tensor.nbytes for name, tensor in tensors.items()}


def _format_header(label: str, name: str, tensor: Tensor | Deferred) -> bytes:
    if tensor.dtype not in _NUMPY_DTYPES:
        raise UnsupportedFeatureError(
            f"{label}: npz cannot store {name} in {tensor.dtype}; choose another container or dtype"
        )
    description = npy.dtype_to_descr(_NUMPY_DTYPES[tensor.dtype])
    stream = BytesIO()
    npy.write_array_header_1_0(stream, {"descr": description, "fortran_order": False, "shape": tuple(tensor.shape)})
    return stream.getvalue()
