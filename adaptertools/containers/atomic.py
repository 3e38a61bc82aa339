"""Results appear whole or not at all: staged beside the destination, flushed to disk, then renamed into place."""

import ctypes
import errno
import fcntl
import fnmatch
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adaptertools.errors import DestinationError

_STAGING_MARK = ".adaptertools-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def allocated(path: Path, size: int) -> Iterator[BinaryIO]:
    """A new file with room for `size` bytes, so that a full disk is found before any work; flushed to disk on leaving.

    Raises: DestinationError
    """
    with explained(path), path.open("wb") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        yield file
        file.truncate(file.tell())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the operating system reports into a message that says what to do.

    Raises: DestinationError
    """
    try:
        yield
    except DestinationError:
        raise
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full: free some space or choose another destination",
            errno.EDQUOT: "the disk quota is used up: free some space or choose another destination",
            errno.EFBIG: "the file system takes no file of this size",
            errno.EROFS: "the file system is read-only: choose another destination",
            errno.EACCES: "no permission to write there",
            errno.EPERM: "no permission to write there",
            errno.ENOTDIR: "a part of the path is a file, not a folder",
        }.get(error.errno or 0, error.strerror or str(error))
        raise DestinationError(error.errno, f"cannot write {path}: {advice}") from error


@contextmanager
def staged(dst: Path) -> Iterator[Path]:
    """A hidden folder beside `dst` to write into; removed afterwards, also those that a killed process left behind.

    Raises: DestinationError
    """
    with explained(dst):
        dst.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(dst)
        folder = Path(tempfile.mkdtemp(prefix=f".{dst.name}{_STAGING_MARK}", dir=dst.parent))
        lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def publish_folder(staging: Path, dst: Path, replaced: Collection[str] = ()) -> None:
    """Make the staged folder the folder `dst`, in one step.

    Where `dst` exists, its files that match none of the `replaced` patterns stay in it.

    Raises: DestinationError
    """
    with explained(dst):
        os.chmod(staging, 0o777 & ~_umask())
        if dst.is_dir():
            _keep_others(dst, staging, replaced)
        _sync(staging)
        if not dst.exists():
            os.rename(staging, dst)
        elif not _exchange(staging, dst):  # a kill between these renames leaves both folders whole, the old one hidden
            aside = staging.with_name(staging.name + "-old")
            os.rename(dst, aside)
            os.rename(staging, dst)
            shutil.rmtree(aside, ignore_errors=True)
        _sync(dst.parent)


def publish_files(staging: Path, dst: Path, names: Sequence[str]) -> None:
    """Move staged files into the folder of `dst`, one after the other in the order given.

    Raises: DestinationError
    """
    with explained(dst):
        for name in names:
            os.replace(staging / name, dst.parent / name)
        _sync(dst.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file and flush it to disk.

    Raises: DestinationError
    """
    data = text.encode()
    with allocated(path, len(data)) as file:
        file.write(data)


def _keep_others(old: Path, new: Path, replaced: Collection[str]) -> None:
    for entry in old.iterdir():
        if (new / entry.name).exists() or any(fnmatch.fnmatch(entry.name, pattern) for pattern in replaced):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(entry), str(new / entry.name))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _remove_abandoned(dst: Path) -> None:
    """Remove the staging folders of processes that were killed: nobody holds their lock any more."""
    for folder in dst.parent.glob(f".{glob.escape(dst.name)}{_STAGING_MARK}*"):
        if folder.name.endswith("-old") or not folder.is_dir():
            continue
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # another process is writing there now
        finally:
            os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step where the operating system can."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
