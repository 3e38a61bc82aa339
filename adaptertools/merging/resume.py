"""A merge in the making: a hidden folder beside the destination, which outlives a process that was killed.

It holds the result as far as it is there, and a journal: the recipe first, then what is known of finished files. A file
in the making ends in `.part`, and the configuration comes last, so that nothing in it is taken for a model. The same
recipe goes on from what is finished; any other starts anew. Whoever works in it holds a lock on it.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptertools.containers.atomic import (
    allocated,
    check_writable,
    explained,
    followed,
    publish_folder,
    sync,
    write_text,
)
from adaptertools.containers.checkpoint import CONFIG
from adaptertools.containers.jsonfile import format_json, read_json
from adaptertools.errors import DestinationError, DestinationExistsError
from adaptertools.merging.journal import Journal
from adaptertools.merging.kernels import Statistics
from adaptertools.merging.shards import Layout

_JOURNAL = "journal.jsonl"
_ANNOUNCED, _ANNOUNCING = "announced.json", "announced.new"
_RESULT = "result"
_ASIDE = f"{_RESULT}-old"
_INCOMING = "incoming"

# what the lines of the journal hold: the recipe; of a file, its name with size and time, statistics, or what was sent
_RECIPE, _FILE, _STATE, _STATISTICS, _SENT = "recipe", "file", "state", "statistics", "sent"
_INODE = "inode"
"""That of the finished result, which it keeps where it is put in its place."""

PART = ".part"
"""What the name of a file ends in as long as it is in the making."""


def staging_folder(dst: Path) -> Path:
    """Where a merge into `dst` is in the making: beside the folder itself, where `dst` is a link to it."""
    dst = followed(dst)
    return dst.with_name(f".{dst.name}.merging")


class Staging:
    """The folder of a merge in the making, locked by this process."""

    def __init__(self, folder: Path, dst: Path, *, flush: bool) -> None:
        self.folder, self.dst, self.flush = folder, dst, flush
        self._journal = Journal(folder / _JOURNAL, flush=flush)

    @property
    def result(self) -> Path:
        """Where the files of the result are."""
        return self.dst if self._in_place() else self.folder / _RESULT

    @property
    def incoming(self) -> Path:
        """Where files of the base are that are here for this merge alone."""
        return self.folder / _INCOMING

    def part(self, layout: Layout) -> Path:
        """The file in the making."""
        return self.result / (layout.name + PART)

    def finished(self, layout: Layout) -> dict[str, Statistics] | None:
        """What is known of the tensors of a finished file; None if the file is not finished."""
        known = self._known(layout.name)
        try:
            if known[_STATE][0] != layout.size:
                return None
            if _SENT not in known:
                found = (self.result / layout.name).stat()
                if [found.st_size, found.st_mtime_ns] != known[_STATE]:
                    return None
            return {name: Statistics(**sums) for name, sums in known[_STATISTICS].items()}
        except (OSError, KeyError, TypeError):
            return None

    def sent(self, layout: Layout) -> dict[str, Any] | None:
        """What is known of a finished file that was sent on; it need not be here any more."""
        return self._known(layout.name).get(_SENT)

    def note_sent(self, layout: Layout, sent: Mapping[str, Any]) -> None:
        """Remember that a finished file was sent on.

        Raises: DestinationError
        """
        self._journal.add({_FILE: layout.name, _SENT: dict(sent)})

    def _known(self, name: str) -> dict[str, Any]:
        """All that the journal says of a file."""
        return {
            key: value for entry in self._journal.entries if entry.get(_FILE) == name for key, value in entry.items()
        }

    def anything_finished(self) -> bool:
        """Whether there is a file that need not be made again."""
        return any(_FILE in entry for entry in self._journal.entries)

    def allocate(self, layouts: list[Layout]) -> None:
        """Room for all files that are to be made, so that a full disk is found before any work.

        Raises: DestinationError
        """
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._allocate, layouts))

    def make_room(self, layout: Layout) -> None:
        """Room for one file, unless it was made before.

        Raises: DestinationError
        """
        if not self.part(layout).exists():
            self._allocate(layout)

    def clear_parts(self) -> None:
        """Remove what is half-made."""
        for part in self.result.glob(f"*{PART}"):
            with suppress(OSError):
                part.unlink()

    def _allocate(self, layout: Layout) -> None:
        with allocated(self.part(layout), layout.size, flush=False) as file:
            file.seek(layout.size)

    def finish(self, layout: Layout, statistics: Mapping[str, Statistics]) -> None:
        """Take a file for finished, once it is on disk.

        Raises: DestinationError
        """
        target = self.result / layout.name
        with explained(target):
            if self.flush:
                sync(self.part(layout))
            self.part(layout).replace(target)
            found = target.stat()
        sums = {name: asdict(each) for name, each in statistics.items()}
        self._journal.add({_FILE: layout.name, _STATE: [found.st_size, found.st_mtime_ns], _STATISTICS: sums})

    def publish(self, dropped: tuple[str, ...]) -> None:
        """Make the result the destination in one step; of an old one, the files of these patterns go.

        Raises: DestinationError
        """
        self._journal.add({_INODE: self.result.stat().st_ino})
        publish_folder(self.result, self.dst, dropped)
        self.remove()

    @property
    def announced(self) -> Path:
        """The record of a result that is made visible elsewhere: kept until all else here is gone."""
        return self.folder / _ANNOUNCED

    def announce(self, name: str) -> None:
        """Say that the result is complete, by the file of this name that stands beside the weights.

        Raises: DestinationError
        """
        new = self.folder / _ANNOUNCING
        write_text(new, format_json(read_json(self.result / name)))
        with explained(self.announced):
            new.replace(self.announced)

    def remove(self) -> None:
        """Clear the folder away, the weights first: as long as there is a journal, a killed run can say what it did."""
        for name in (_RESULT, _ASIDE):
            _clear(self.folder / name)
        self._journal.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def published(self, recipe: str) -> bool:
        """Whether a killed run of the recipe got as far as putting the result in its place."""
        return self.is_of(recipe) and self._in_place()

    def is_of(self, recipe: str) -> bool:
        """Whether what is in the making is made by this recipe."""
        return self._said(_RECIPE) == recipe

    def _in_place(self) -> bool:
        inode = self._said(_INODE)
        with suppress(OSError):
            return inode is not None and self.dst.stat().st_ino == inode
        return False

    def give_up(self) -> None:
        """Free the room of what is half-made; keep what is finished, unless all is in its place."""
        for part in (self.folder / _RESULT).glob(f"*{PART}"):
            with suppress(OSError):
                part.unlink()
        if self._said(_RECIPE) is None or not (self.anything_finished() or self.incoming.exists()):
            self.remove()

    def begin(self, recipe: str) -> None:
        """Keep what the same recipe has made; clear away all else.

        Raises: DestinationError
        """
        with explained(self.folder):
            if self._said(_RECIPE) != recipe:
                self._journal.remove()  # first, so that what is left is never taken for another's
                self.announced.unlink(missing_ok=True)
                for name in (_RESULT, _ASIDE):
                    _clear(self.folder / name)
                self._journal.add({_RECIPE: recipe})
            (self.folder / _RESULT).mkdir(exist_ok=True)

    def _said(self, key: str) -> object:
        """The latest word of the journal on what concerns the whole merge."""
        return next((entry[key] for entry in reversed(self._journal.entries) if key in entry), None)


def _clear(folder: Path) -> None:
    """Remove a folder; its configuration first, so that at no moment half a model looks like one."""
    with suppress(OSError):
        (folder / CONFIG).unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def resumable(dst: Path, *, flush: bool = True) -> Iterator[Staging]:
    """The folder of a merge into `dst`, new or left by a run that was killed, for this process alone.

    Raises: DestinationError, also if another merge into `dst` is running
    """
    with explained(dst):
        dst = followed(dst)
        check_writable(dst)
        missing = [parent for parent in dst.parents if not parent.exists()]
        dst.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(dst)
    staging = Staging(staging_folder(dst), dst, flush=flush)
    try:
        yield staging
    finally:
        staging.give_up()
        os.close(lock)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()  # where nothing was made, nothing is left


def _lock(dst: Path) -> int:
    """The folder for a merge into `dst`, made where it is missing, locked until the handle is closed."""
    folder = staging_folder(dst)
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        if folder.is_symlink() or not folder.is_dir() or not _is_ours(folder):
            raise DestinationExistsError(f"{folder} is in the way: the merge is made there. Move it or remove it")
        lock = _opened(folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise DestinationError(f"{dst}: another merge into it is running, in {folder.name}") from None
        except OSError:
            pass  # network file systems may know no locks
        with suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == folder.stat().st_ino:
                return lock
        os.close(lock)


def _opened(folder: Path) -> int:
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:
        with suppress(OSError):
            folder.rmdir()  # a new one is empty
        raise


def _is_ours(folder: Path) -> bool:
    known = {_JOURNAL, _ANNOUNCED, _ANNOUNCING, _RESULT, _ASIDE, _INCOMING}
    try:
        return {entry.name for entry in folder.iterdir()} <= known
    except FileNotFoundError:
        return True  # another process has just finished with it
