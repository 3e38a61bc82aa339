"""Torch files: a zip of one pickle and the raw storages, or the pickles in a row that torch wrote before 1.6.

Pickles are read by `torch.load(weights_only=True)` alone, and only after the zip's directory was checked: nothing in it
is compressed, and all sizes fit into the file. The storages of a zip are mapped from disk and compared with what the
pickle says of them.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from adaptertools.containers import ziparchive
from adaptertools.containers.tensorfile import (
    MAX_HEADER_BYTES,
    TensorFile,
    check_name,
    file_size,
    flatten,
    parsing,
    read_head,
)
from adaptertools.containers.torch_pickle import DTYPES, dump, foreign_globals
from adaptertools.containers.ziparchive import Member
from adaptertools.errors import (
    DamagedFileError,
    EmptyFileError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from adaptertools.tensors import NamedTensors, computed, tensor_bytes

NAME = "torch"
SUFFIX = ".bin"

_PICKLE_PROTOCOLS = range(2, 6)
_TAR_MAGIC, _TAR_MAGIC_OFFSET = b"ustar", 257
_PAGE = 4096
_FOLDER = "archive"


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
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    origin = _check_storages(path, tensors, storages) if storages is not None else None
    tensors = {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in tensors.items()}
    return TensorFile(
        tensors=tensors,
        metadata=strings,
        container=NAME,
        label=str(path),
        nbytes=file_size(path),
        offsets=_offsets(tensors, origin, file_size(path)) if origin is not None else {},
    )


def _check_zip(path: Path) -> list[Member]:
    """The members that hold storages."""
    members = ziparchive.read_directory(path)
    files = [name.rpartition("/")[2] for name in members]
    if "constants.pkl" in files:
        raise UnsafeFileError(f"{path}: a TorchScript program, not weights. Save its state_dict() instead")
    if files.count("data.pkl") != 1:
        raise DamagedFileError(
            f"{path}: expected a zip file with one data.pkl, as torch.save writes; found {files.count('data.pkl')}"
        )
    for member in members.values():
        if not member.stored:
            raise UnsafeFileError(
                f"{path}: member {member.name} is compressed, which torch never does: it may expand without bound. "
                "If you trust it, unpack it and zip it again without compression (zip -0)"
            )
    folder = _pickle_name(members).removesuffix("data.pkl") + "data/"
    return [member for name, member in members.items() if name.startswith(folder)]


def _pickle_name(members: Iterable[str]) -> str:
    return next(name for name in members if name.rpartition("/")[2] == "data.pkl")


def _load(path: Path, *, mapped: bool) -> object:
    try:
        with parsing(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dtypes that torch is about to retire
            if mapped:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
                end = file.tell()
    except DamagedFileError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise _refusal(path, str(error.__cause__)) from None
        raise
    if end != file_size(path):
        raise DamagedFileError(f"{path}: {file_size(path) - end} bytes follow the last tensor. Save it again")
    return content


def _refusal(path: Path, message: str) -> UnsafeFileError | DamagedFileError:
    """What to say of a pickle that torch does not load."""
    blocked = re.search(r"GLOBAL (\S+)", message) or re.search(r"unrecognized function (.+)", message)
    wanted = [blocked[1]] if blocked else foreign_globals(_pickle_bytes(path))
    if wanted:
        return UnsafeFileError(
            f"{path}: its pickle wants to call {wanted[0]}, so loading it could run code. Ask for a safetensors file, "
            "or load it in a sandbox with torch.load(weights_only=False) and save its state dict again"
        )
    known = re.search(r"WeightsUnpickler error:\s*(.+)", message)
    reason = (known[1] if known else message)[:200]
    return DamagedFileError(
        f"{path}: not a pickle that torch loads safely ({reason}). Is it damaged, or saved by other means than "
        "torch.save with its default pickle_protocol? Save it again"
    )


def _pickle_bytes(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return file.read(MAX_HEADER_BYTES)
    with parsing(path), zipfile.ZipFile(path) as archive:
        return archive.read(_pickle_name(archive.namelist()))


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    where = f"{path}: {name}"
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise UnsupportedFeatureError(
            f"{where} is {tensor.dtype} in layout {tensor.layout} on device {tensor.device}; expected a dense tensor"
        )
    if tensor.numel() * tensor.dtype.itemsize > file_size(path):
        raise UnsafeFileError(
            f"{where} claims shape {tuple(tensor.shape)}, which is more than the whole file of {file_size(path)} bytes"
        )


def _offsets(tensors: Mapping[str, Tensor], origin: int, size: int) -> dict[str, int]:
    """Where in the file each tensor lies that lies in it in one piece; `origin` is the address of its first byte."""
    offsets = {name: tensor.data_ptr() - origin for name, tensor in tensors.items()}
    return {
        name: offset
        for name, offset in offsets.items()
        if tensors[name].is_contiguous() and 0 <= offset < offset + tensors[name].nbytes <= size
    }


def _check_storages(path: Path, tensors: Mapping[str, Tensor], members: list[Member]) -> int | None:
    """Every mapped storage must be a whole member of the zip: the pickle states their sizes and may lie.

    torch does not say which member a storage came from. All lie in one map, so their distances tell. The address of the
    file's first byte is handed back where every member is a storage, so that no other one could be meant.
    """
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors.values()) if s.nbytes()}
    spans = {member.offset: member.size for member in members}
    first = min(storages, default=0)
    for offset in spans:
        base = first - offset
        if base % _PAGE == 0 and all(spans.get(start - base) == size for start, size in storages.items()):
            return base if len(storages) == sum(size > 0 for size in spans.values()) else None
    if storages:
        raise DamagedFileError(
            f"{path}: the sizes that its pickle states are not those of the data beside it. Download or save it again"
        )
    return None


def write(
    path: Path, tensors: NamedTensors, metadata: Mapping[str, str], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write the tensors as the state dict of a torch zip, each computed when its turn comes.

    A torch file has no header, so `metadata` is not written.

    Memory: two tensors
    Raises: DestinationError; UnsupportedFeatureError for dtypes that cannot be stored
    """
    documents = _documents(str(path), tensors)
    sizes = _sizes(documents, tensors)
    with ziparchive.create(path, sizes) as archive:
        for name, content in documents.items():
            with archive.member(name, len(content)) as append:
                append(content)
        for index, tensor in enumerate(computed(tensors.values())):
            with archive.member(f"{_FOLDER}/data/{index}", tensor.nbytes) as append:
                append(tensor_bytes(tensor))
            advance(tensor.nbytes)


def size(tensors: NamedTensors, metadata: Mapping[str, str]) -> int:
    """The bytes of the file that `write` makes.

    Raises: UnsupportedFeatureError for dtypes that cannot be stored
    """
    return ziparchive.size(_sizes(_documents(NAME, tensors), tensors))


def _documents(label: str, tensors: NamedTensors) -> dict[str, bytes]:
    """The members that hold no storage."""
    for name, tensor in tensors.items():
        check_name(label, name)
        if tensor.dtype not in DTYPES:
            raise UnsupportedFeatureError(f"{label}: cannot store {name} in {tensor.dtype}; choose another dtype")
    return {
        f"{_FOLDER}/data.pkl": dump(tensors),
        f"{_FOLDER}/byteorder": b"little",
        f"{_FOLDER}/version": b"3\n",
    }


def _sizes(documents: Mapping[str, bytes], tensors: NamedTensors) -> dict[str, int]:
    """The bytes of every member."""
    storages = {f"{_FOLDER}/data/{index}": tensor.nbytes for index, tensor in enumerate(tensors.values())}
    return {name: len(content) for name, content in documents.items()} | storages
