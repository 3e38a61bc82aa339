"""A base model on the Hub whose weights arrive while they are merged: planned by its headers alone.

The folder that a merge is planned with has every file of the model in its full size, but of the weights only headers.
Their bytes are read elsewhere: in the shared cache, or in the folder of the merge, where they are deleted after use.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import DestinationError, HubUnavailableError
from adaptertools.hub.cache import cache_folder
from adaptertools.hub.choice import directly
from adaptertools.hub.client import connect, explained, retried
from adaptertools.hub.line import Line
from adaptertools.hub.revision import Revision
from adaptertools.hub.transfer import download, missing_bytes
from adaptertools.merging.route import HaltedError

_AT_ONCE = 4
"""Files that are fetched ahead of those that are being merged; one where disk space is low."""


class Incoming:
    """The weights of one base model."""

    def __init__(self, revision: Revision, folder: str, names: Mapping[Path, str], *, low_disk: bool) -> None:
        """`folder` is the model's in the repository; `names` are the names there of files that have headers alone."""
        self.revision, self.low_disk = revision, low_disk
        self._folder, self._names = folder, dict(names)
        self._own = Path()
        self._ahead = 1 if low_disk else _AT_ONCE
        self._line: Line[Path, Path] = Line("download", self._fetch, threads=self._ahead)

    def stamps(self, base: Checkpoint, copied: Sequence[str]) -> list[list[Any]]:
        """What the files are known by, in any run: the commit that they are of."""
        names = [path.name for path in base.files] + list(copied)
        return [[self.revision.repo_id, self.revision.sha, *names]]

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of the files beside the base's configuration, by name, as far as the Hub knows them."""
        prefix = f"{self._folder}/" if self._folder else ""
        known = {name: self.revision.files[f"{prefix}{name}"].sha256 for name in directly(self.revision, self._folder)}
        return {name: sha256 for name, sha256 in known.items() if sha256 is not None}

    def begin(self, needed: Sequence[Path], own: Path) -> None:
        """Fetch these files in their order; into the folder `own`, to be deleted after use, where disk space is low.

        Raises: DestinationError if they cannot all have room, or three of them where they are deleted after use
        """
        self._own = own
        awaited = [path for path in needed if path in self._names]
        if self.low_disk:
            self._check_room([self._names[path] for path in awaited])
        self._line.begin(awaited)
        self._line.let_through((), ahead=self._ahead)

    def wait(self, needed: Sequence[Path]) -> None:
        """Wait for these files, and let the next ones come.

        Raises: HubError, HaltedError
        """
        awaited = [path for path in needed if path in self._names]
        self._line.let_through(awaited)
        self._line.wait(awaited)
        self._line.let_through(awaited, ahead=self._ahead)

    def place(self, path: Path) -> Path:
        """Where the bytes of a file are."""
        return self._line.result(path) or path

    def give(self, path: Path, target: Path) -> bool:
        """Move a file that nobody else needs to `target`; False for one in the shared cache, which stays there."""
        if not self._is_own(path):
            return False
        self.place(path).replace(target)
        self._line.put(path, target)
        return True

    def spent(self, path: Path) -> None:
        """Delete a file that is here for this merge alone."""
        if self._is_own(path):
            with suppress(OSError):
                self.place(path).unlink(missing_ok=True)

    def halt(self) -> None:
        """Fetch no more."""
        self._line.halt()

    def _is_own(self, path: Path) -> bool:
        return path in self._names and self.place(path).is_relative_to(self._own) and self.low_disk

    def _fetch(self, paths: Sequence[Path]) -> list[Path]:
        return [self._fetch_one(self._names[path]) for path in paths]

    def _fetch_one(self, name: str) -> Path:
        if self.low_disk and missing_bytes(self.revision, [name]):
            return self._fetch_own(name)
        return download(self.revision, [name], on_progress=self._go_on) / name

    def _go_on(self, done: int, total: int) -> None:
        """Stop a download that nobody waits for any more."""
        if self._line.halted:
            raise HaltedError

    def _fetch_own(self, name: str) -> Path:
        """A file in a folder of this merge alone. What a run before fetched of it is not fetched again."""
        revision = self.revision
        api = connect(revision.token)
        with explained(revision.address, token=revision.token):
            got = retried(
                lambda: api.hf_hub_download(
                    revision.repo_id, name, revision=revision.sha, cache_dir=cache_folder(), local_dir=self._own
                )
            )
        path, size = Path(got), revision.files[name].size
        if size not in (None, found := path.stat().st_size):
            path.unlink()
            raise HubUnavailableError(
                f"{revision.label}: {name} has {found:,} bytes after the download, and the Hub states {size:,}. "
                "Repeat the command"
            )
        return path

    def _check_room(self, names: Sequence[str]) -> None:
        needed = 3 * max((self.revision.files[name].size or 0 for name in names), default=0)
        free = shutil.disk_usage(self._own.parent).free
        if needed > free:
            raise DestinationError(
                f"cannot write {self._own.parent}: {needed:,} bytes are needed, three times the largest file, and "
                f"{free:,} are free: free some space or choose another destination"
            )
