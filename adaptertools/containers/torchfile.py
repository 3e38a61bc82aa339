"""Torch files: a zip of one pickle and the raw storages, or the pickles in a row that torch wrote before 1.6.

Pickles are read by `torch.load(weights_only=True)` alone, and only after the zip's directory was checked: nothing in it
is compressed, and all sizes fit into the file. The storages of a zip are mapped from disk and compared with what the
pickle says of them.
"""

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptertools.containers import ziparchive
from adaptertools.containers.tensorfile import TensorFile, check_name, file_size, flatten, parsing, read_head
from adaptertools.containers.ziparchive import Member
from adaptertools.errors import (
    DamagedFileError,
    EmptyFileError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from adaptertools.tensors import Deferred, NamedTensors, materialize, tensor_bytes

NAME = "torch"
SUFFIX = ".bin"

_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE_PROTOCOLS = range(2, 6)
_TAR_MAGIC, _TAR_MAGIC_OFFSET = b"ustar", 257
_PAGE = 4096

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
"""Dtypes that have a storage class of their own. The newer ones name the dtype beside an untyped storage."""


def sniff(path: Path, head: bytes) -> bool:
    """Whether the file starts like a zip, a pickle or a tar."""
    return _is_zip(head) or _is_pickle(head) or _is_tar(head)


def _is_zip(head: bytes) -> bool:
    return head.startswith((ziparchive.MAGIC, ziparchive.EMPTY_MAGIC))


def _is_pickle(head: bytes) -> bool:
    return len(head) > 2 and head[0] == 0x80 and head[1] in _PICKLE_PROTOCOLS


def _is_tar(head: bytes) -> bool:
    return head[_TAR_MAGIC_OFFSET:].startswith(_TAR_MAGIC)


def read(path: Path) -> TensorFile:
    """The tensors of a file, mapped from disk where it is a zip. Numbers and strings among them become metadata.

    Memory: the file, for the old format; none for a zip
    Raises: UnsafeFileError if it would run code or expand; DamagedFileError, EmptyFileError
    """
    head = read_head(path)
    if _is_tar(head):
        raise UnsafeFileError(
            f"{path}: a tar file as torch wrote before 0.1.10, which cannot be read safely. "
            "Load it in a sandbox with torch and save it again, best as safetensors"
        )
    storages = _check_zip(path) if _is_zip(head) else None
    content = _load(path, mapped=storages is not None)
    if not isinstance(content, Mapping):
        raise DamagedFileError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    tensors, strings = flatten(str(path), content)
    if not tensors:
        raise EmptyFileError(f"{path}: the file holds no tensor")
    tensors = {name: _checked(path, name, tensor) for name, tensor in tensors.items()}
    if storages is not None:
        _check_storages(path, tensors, storages)
    return TensorFile(tensors=tensors, metadata=strings, container=NAME, label=str(path), nbytes=file_size(path))


def _check_zip(path: Path) -> list[Member]:
    """The members that hold storages."""
    members = ziparchive.read_directory(path, compressed=False)
    if any(name.rpartition("/")[2] == "constants.pkl" for name in members):
        raise UnsafeFileError(f"{path}: a TorchScript program, not weights. Save its state_dict() instead")
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise DamagedFileError(
            f"{path}: expected a zip file with one data.pkl, as torch.save writes; found {len(pickles)}"
        )
    folder = pickles[0].removesuffix("data.pkl") + "data/"
    return [member for name, member in members.items() if name.startswith(folder)]


def _load(path: Path, *, mapped: bool) -> object:
    try:
        with parsing(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except DamagedFileError as error:
        cause = error.__cause__
        if isinstance(cause, pickle.UnpicklingError):
            raise _refusal(path, str(cause)) from None
        raise


def _refusal(path: Path, message: str) -> UnsafeFileError | DamagedFileError:
    wanted = re.search(r"GLOBAL (\S+)", message) or re.search(r"unrecognized function (.+)", message)
    if wanted is None:
        return DamagedFileError(
            f"{path}: not a pickle of tensors ({_reason(message)}). "
            "It was cut off or damaged: download or save it again"
        )
    return UnsafeFileError(
        f"{path}: its pickle wants to call {wanted[1]}, so loading it could run code. Ask for a safetensors file, "
        "or load it in a sandbox with torch.load(weights_only=False) and save its state dict again"
    )


def _reason(message: str) -> str:
    lines = [line for line in message.split("\n\n") if line and not line.startswith(("Weights only", "Check the"))]
    return (lines or [message])[0].splitlines()[0][:200]


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    where = f"{path}: {name}"
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise UnsupportedFeatureError(f"{where} is a {tensor.layout} tensor on {tensor.device}, expected a dense one")
    if tensor.numel() * tensor.dtype.itemsize > file_size(path):
        raise UnsafeFileError(
            f"{where} claims shape {tuple(tensor.shape)}, which is more than the whole file of {file_size(path)} bytes"
        )
    return tensor.detach().resolve_conj().resolve_neg()


def _check_storages(path: Path, tensors: Mapping[str, Tensor], members: list[Member]) -> None:
    """Every mapped storage must be a whole member of the zip: the pickle states their sizes and may lie.

    torch does not say which member a storage came from. All lie in one map, so their distances tell.
    """
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors.values()) if s.nbytes()}
    spans = {member.offset: member.size for member in members}
    first = min(storages, default=0)
    for offset in spans:
        base = first - offset
        if base % _PAGE == 0 and all(spans.get(start - base) == size for start, size in storages.items()):
            return
    if storages:
        raise DamagedFileError(
            f"{path}: the sizes that its pickle states are not those of the data beside it. Download or save it again"
        )


class _Storage:
    """Stands for a tensor's bytes in the pickle."""

    def __init__(self, key: str, tensor: Tensor | Deferred) -> None:
        self.key, self.dtype, self.nbytes = key, tensor.dtype, tensor.nbytes

    @property
    def persistent_id(self) -> tuple[str, type, str, str, int]:
        storage_type = _STORAGES.get(self.dtype, torch.UntypedStorage)
        unit = self.dtype.itemsize if self.dtype in _STORAGES else 1
        return ("storage", storage_type, self.key, "cpu", self.nbytes // unit)


class _Entry:
    """Stands for a tensor in the pickle."""

    def __init__(self, key: str, tensor: Tensor | Deferred) -> None:
        self.storage = _Storage(key, tensor)
        self.shape = (*tensor.shape,)  # a new object each time: pickle refers back to those that it has seen

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= max(size, 1)
        arguments: tuple[Any, ...] = (self.storage, 0, self.shape, tuple(reversed(strides)), False, OrderedDict())
        if self.storage.dtype in _STORAGES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, self.storage.dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.persistent_id if isinstance(obj, _Storage) else None


def _pickled(tensors: NamedTensors) -> bytes:
    buffer = BytesIO()
    entries = OrderedDict((name, _Entry(str(index), tensor)) for index, (name, tensor) in enumerate(tensors.items()))
    _Pickler(buffer, protocol=2).dump(entries)
    return buffer.getvalue()


def write(
    path: Path, tensors: NamedTensors, metadata: Mapping[str, str], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write the tensors as the state dict of a torch zip, each computed when its turn comes.

    A torch file has no header, so `metadata` is not written.

    Memory: one tensor
    Raises: DestinationError
    """
    for name in tensors:
        check_name(str(path), name)
    folder = "archive"
    documents = {
        f"{folder}/data.pkl": _pickled(tensors),
        f"{folder}/byteorder": b"little",
        f"{folder}/version": b"3\n",
    }
    sizes = {name: len(content) for name, content in documents.items()}
    sizes |= {f"{folder}/data/{index}": tensor.nbytes for index, tensor in enumerate(tensors.values())}
    with ziparchive.create(path, sizes) as archive:
        for name, content in documents.items():
            with archive.member(name, len(content)) as append:
                append(content)
        for index, tensor in enumerate(tensors.values()):
            with archive.member(f"{folder}/data/{index}", tensor.nbytes) as append:
                append(tensor_bytes(materialize(tensor)))
            advance(tensor.nbytes)
