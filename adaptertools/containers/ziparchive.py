"""Zip files as tensor containers use them: members stored as they are, so that each can be mapped from disk.

Central directories are checked before anything is read: no member twice, none encrypted, none outside the file, and
none that grows beyond what the file's size allows.
"""

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adaptertools.containers.atomic import allocated
from adaptertools.containers.tensorfile import check_count, check_growth, file_size, parsing
from adaptertools.errors import DamagedFileError, EmptyFileError, UnsafeFileError

MAGIC = b"PK\x03\x04"
EMPTY_MAGIC = b"PK\x05\x06"

_ALIGNMENT = 64
_LOCAL_HEADER = 30
_ZIP64_FIELD = 20
_DATE = (1980, 1, 1, 0, 0, 0)
_DIRECTORY_ENTRY = 46
_END_RECORD = 22
_ZIP64_END_RECORDS = 56 + 20
_ENCRYPTED = 0x1
_UTF8 = 0x800
_PADDING_FIELD = b"FB"
"""The tag that torch gives to the field of the local header that pads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A member of a zip file; its bytes stand at `offset`, as they are where `stored`."""

    name: str
    offset: int
    size: int
    stored: bool


def read_directory(path: Path) -> dict[str, Member]:
    """The members of a zip file by name, where they lie, in the order of the directory.

    Raises: EmptyFileError, DamagedFileError; UnsafeFileError for encrypted members and sizes that the file cannot hold
    """
    with parsing(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        infos = archive.infolist()
        check_count(str(path), len(infos))
        if not infos:
            raise EmptyFileError(f"{path}: a zip file without any member")
        _check_ends(path, file, len(archive.comment))
        members: dict[str, Member] = {}
        for info in infos:
            if info.filename in members:
                raise DamagedFileError(f"{path}: two members are named {info.filename}; which one is meant?")
            _check_member(path, info)
            members[info.filename] = Member(
                name=info.filename,
                offset=_data_offset(path, file, info),
                size=info.file_size,
                stored=info.compress_type == zipfile.ZIP_STORED,
            )
    size = file_size(path)
    check_growth(str(path), sum(member.size for member in members.values()), size)
    stored = sum(member.size for member in members.values() if member.stored)
    if stored > size:
        raise UnsafeFileError(f"{path}: its members claim {stored} bytes, the file has {size}: they overlap")
    return {name: member for name, member in members.items() if not name.endswith("/")}


def _check_ends(path: Path, file: BinaryIO, comment: int) -> None:
    """Nothing may stand before the first member or after the directory: zip readers differ in what they make of it."""
    file.seek(-_END_RECORD - comment, os.SEEK_END)
    if file.read(4) != EMPTY_MAGIC:
        raise DamagedFileError(f"{path}: bytes follow the end of the zip file. Download or save it again")
    file.seek(0)
    if file.read(4) != MAGIC:
        raise DamagedFileError(f"{path}: bytes stand before the beginning of the zip file. Download or save it again")


def _check_member(path: Path, info: zipfile.ZipInfo) -> None:
    where = f"{path}: member {info.filename}"
    if info.flag_bits & _ENCRYPTED:
        raise UnsafeFileError(f"{where} is encrypted; unpack it and save it again without a password")
    if info.compress_type == zipfile.ZIP_STORED:
        if info.compress_size != info.file_size:
            raise DamagedFileError(f"{where} takes {info.compress_size} bytes and claims to hold {info.file_size}")
    elif info.compress_type != zipfile.ZIP_DEFLATED:
        raise UnsafeFileError(f"{where} is compressed with method {info.compress_type}; expected stored or deflated")


def _data_offset(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(MAGIC):
        raise DamagedFileError(f"{path}: member {info.filename} does not stand where the directory says")
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    if file.read(name_length) != info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437"):
        raise DamagedFileError(f"{path}: member {info.filename} has another name in the directory than where it stands")
    offset = info.header_offset + _LOCAL_HEADER + name_length + extra_length
    if offset + info.compress_size > file_size(path):
        raise DamagedFileError(f"{path}: member {info.filename} reaches beyond the end of the file; it was cut off")
    return offset


class Writer:
    """Writes stored members one after the other, their data aligned, the same bytes for the same content."""

    def __init__(self, archive: zipfile.ZipFile, file: BinaryIO) -> None:
        self._archive = archive
        self._file = file

    @contextmanager
    def member(self, name: str, size: int) -> Iterator[Callable[[bytes | memoryview], int]]:
        """A function that appends to the new member `name`, which will have `size` bytes."""
        info = zipfile.ZipInfo(name, date_time=_DATE)
        info.file_size = info.compress_size = size
        info.create_system = 3  # the same on every operating system
        zip64 = _is_large(size)
        info.extra = _padding(self._file.tell() + _local_header(name, size))
        with self._archive.open(info, "w", force_zip64=zip64) as stream:
            yield stream.write
        info.extra = b""  # the padding belongs to the local header alone


def _is_large(size: int) -> bool:
    """Whether a member gets a field for sizes of eight bytes; before it is written zipfile must be told so."""
    return size * 1.05 > zipfile.ZIP64_LIMIT


def _local_header(name: str, size: int) -> int:
    """The bytes before a member, without the padding."""
    return _LOCAL_HEADER + len(name.encode()) + (_ZIP64_FIELD if _is_large(size) else 0)


def _padding(position: int) -> bytes:
    room = -(position + 4) % _ALIGNMENT
    return _PADDING_FIELD + room.to_bytes(2, "little") + b"Z" * room


@contextmanager
def create(path: Path, members: dict[str, int]) -> Iterator[Writer]:
    """A new zip file that will hold members of these names and sizes.

    Raises: DestinationError
    """
    overhead = sum(2 * (len(name.encode()) + 64) + 2 * _ALIGNMENT for name in members) + 256
    with (
        allocated(path, sum(members.values()) + overhead) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        yield Writer(archive, file)


def size(members: Mapping[str, int]) -> int:
    """The bytes of the zip file that `create` and its members of these names and sizes make."""
    position = directory = 0
    for name, length in members.items():
        large = [position > zipfile.ZIP64_LIMIT, *([length > zipfile.ZIP64_LIMIT] * 2)]  # where it stands, two sizes
        directory += _DIRECTORY_ENTRY + len(name.encode()) + (4 + 8 * sum(large) if any(large) else 0)
        position += _local_header(name, length)
        position += len(_padding(position)) + length
    many = len(members) > zipfile.ZIP_FILECOUNT_LIMIT or max(position, directory) > zipfile.ZIP64_LIMIT
    return position + directory + (_ZIP64_END_RECORDS if many else 0) + _END_RECORD
