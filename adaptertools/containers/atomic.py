"""Results appear whole or not at all: staged beside the destination, flushed to disk, then renamed into place.

A destination that is a link to a folder is followed; a link to a file is replaced by the file, as `mv` does.
"""

import ctypes
import errno
import fcntl
import fnmatch
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adaptertools.errors import AdapterToolsError, DestinationError, DestinationExistsError

_FLUSHERS = 16
_STAGING_MARK = ".adaptertools-"
_ASIDE = "-old"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def allocated(path: Path, size: int, *, flush: bool = True) -> Iterator[BinaryIO]:
    """A new file with room for `size` bytes, so that a full disk is found before any work; flushed to disk on leaving.

    Many small files are flushed faster together, by `sync_tree` in the end.

    Raises: DestinationError
    """
    with explained(path), path.open("wb") as file:
        _reserve(file, size)
        yield file
        file.truncate(file.tell())
        file.flush()
        if flush:
            os.fsync(file.fileno())


def _reserve(file: BinaryIO, size: int) -> None:
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # file systems that cannot reserve
            raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the operating system reports into a message that says what to do.

    Raises: DestinationError
    """
    try:
        yield
    except AdapterToolsError:
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
            errno.EEXIST: "a part of the path is a file, not a folder",
        }.get(error.errno or 0, error.strerror or str(error))
        explanation = DestinationError(f"cannot write {path}: {advice}")
        explanation.errno = error.errno
        raise explanation from error


@contextmanager
def staged(dst: Path) -> Iterator[Path]:
    """A hidden folder beside `dst` to write into; removed afterwards, also those that a killed process left behind.

    Raises: DestinationError
    """
    with explained(dst):
        dst = followed(dst)
        check_writable(dst)
        missing = [parent for parent in dst.parents if not parent.exists()]
        dst.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(dst)
        folder, lock = _locked_folder(dst)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()  # where nothing was published, nothing is left


def check_links(dst: Path) -> None:
    """Make sure that neither `dst` nor a folder above it is a link that leads nowhere, or back to itself.

    Raises: DestinationExistsError
    """
    for place in (dst, *dst.parents):
        if place.is_symlink() and not place.exists():
            raise DestinationExistsError(
                f"{place} is a link to {place.readlink()}, which leads nowhere: remove the link, or give another name"
            )


def check_elsewhere(dst: Path) -> None:
    """Make sure that the current folder is neither `dst` nor below it.

    Raises: DestinationExistsError
    """
    if dst.resolve() in (here := Path.cwd(), *here.parents):
        raise DestinationExistsError(f"{dst} is, or holds, the current folder and would be swapped: give another name")


def check_writable(dst: Path) -> None:
    """Make sure that what stands at `dst` may be changed, if it is a folder: found late, it would be in the way.

    Raises: PermissionError
    """
    if dst.is_dir() and not os.access(dst, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dst))


def followed(dst: Path) -> Path:
    """The folder itself, where `dst` is a link to one or `..` stands for its name."""
    return dst.resolve() if dst.is_dir() and (dst.is_symlink() or dst.name in ("", "..")) else dst


def _locked_folder(dst: Path) -> tuple[Path, int]:
    """A new folder that this process holds a lock on, so that no other takes it for abandoned."""
    while True:
        folder = dst.with_name(f".{dst.name}{_STAGING_MARK}{secrets.token_hex(4)}")
        with suppress(FileExistsError):
            folder.mkdir()
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # network file systems may know no locks; then nobody removes what is abandoned
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def publish_folder(staging: Path, dst: Path, replaced: Collection[str] = ()) -> None:
    """Make the staged folder the folder `dst`, in one step.

    Where `dst` exists, its files that match none of the `replaced` patterns stay in it, and its permissions stay.

    Raises: DestinationError
    """
    with explained(dst):
        dst = followed(dst)
        if not dst.is_dir():
            sync(staging)
            staging.rename(dst)
        else:
            shutil.copymode(dst, staging)
            _keep_others(dst, staging, replaced)
            sync(staging)
            if not _exchange(staging, dst):
                _replace_folder(staging, dst)
        sync(dst.parent)


def _replace_folder(staging: Path, dst: Path) -> None:
    """Where folders cannot be swapped. A kill between the two steps leaves both whole, and the next write restores."""
    aside = staging.with_name(staging.name + _ASIDE)
    dst.rename(aside)
    staging.rename(dst)
    shutil.rmtree(aside, ignore_errors=True)


def publish_files(staging: Path, dst: Path, names: Sequence[str]) -> None:
    """Move staged files into the folder of `dst`, one after the other in the order given.

    Raises: DestinationError
    """
    with explained(dst):
        for name in names:
            (staging / name).replace(dst.parent / name)
        sync(dst.parent)


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
    for folder in sorted(dst.parent.glob(f".{glob.escape(dst.name)}{_STAGING_MARK}*")):
        if folder.name.endswith(_ASIDE) and not dst.exists():
            folder.rename(dst)
        elif folder.is_dir() and not folder.is_symlink():
            with suppress(OSError):  # another process is writing there now, or has just removed it
                _remove_unlocked(folder)


def _remove_unlocked(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
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


def sync_tree(folder: Path) -> None:
    """Flush all that stands in a folder to disk, many files at a time: the file system then writes them together."""
    with ThreadPoolExecutor(_FLUSHERS) as pool:
        for _ in pool.map(sync, (*folder.rglob("*"), folder)):
            pass


def begin_sync(handle: int, offset: int, nbytes: int) -> None:
    """Have bytes of a file that were just written go to disk from now on, while other work is done.

    Where nothing is said, Linux waits until its memory fills up, and the whole file is left to the flush in the end.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            # "not needed" begins to write what is dirty; only pages that are clean already leave the cache
            os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
