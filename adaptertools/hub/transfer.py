"""Files of one commit come into the shared cache, several at a time, and are checked once they are there."""

import inspect
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from adaptertools.errors import DestinationError, HubNotFoundError, HubUnavailableError
from adaptertools.hub import client
from adaptertools.hub.cache import cache_folder
from adaptertools.hub.revision import Revision

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

_AT_ONCE = 8


def download(revision: Revision, names: Iterable[str], *, on_progress: Progress | None = None) -> Path:
    """Bring files of a commit into the shared cache; those that are there already cost no request.

    Returns the folder of the commit, in which every file then has the size that the Hub states and lies in the cache.

    Raises: HubUnavailableError if it stopped half-way: the same call goes on; HubError and what stands below it;
            DestinationError if the disk is full; UnsafeFileError for a link that leads out of the cache
    """
    wanted = list(dict.fromkeys(names))
    _check_listed(revision, wanted)
    missing = [name for name in wanted if not _is_here(revision, name)]
    if missing and revision.offline:
        raise HubNotFoundError(
            f"{revision.label}: HF_HUB_OFFLINE is set, and the cache lacks {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ". Unset HF_HUB_OFFLINE to fetch what is missing"
        )
    if missing:
        _check_room(revision, missing)
        _fetch(revision, wanted, missing, on_progress)
        _check_all(revision, missing)
    if not revision.offline:
        revision.cached.remember(revision.address.revision, revision.sha, revision.files)
    return revision.snapshot


def missing_bytes(revision: Revision, names: Iterable[str]) -> int:
    """The bytes of these files that are not in the cache yet."""
    return sum(revision.files[name].size or 0 for name in names if not _is_here(revision, name))


def _check_listed(revision: Revision, names: Iterable[str]) -> None:
    for name in names:
        if name not in revision.files:
            raise HubNotFoundError(f"{revision.label}: the repository has no file {name}")


def _is_here(revision: Revision, name: str) -> bool:
    """Whether a file is in the cache, whole.

    Raises: UnsafeFileError for a link that leads out of the cache
    """
    path, size = revision.snapshot / name, revision.files[name].size
    revision.cached.check_inside(path)
    return path.is_file() and size in (None, path.stat().st_size)


def _check_room(revision: Revision, names: Iterable[str]) -> None:
    """A full disk is found before anything is fetched."""
    folder = cache_folder()
    with client.explained(revision.address, token=revision.token):
        folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(revision.files[name].size or 0 for name in names), shutil.disk_usage(folder).free
    if needed > free:
        raise DestinationError(
            f"cannot write {folder}: {needed:,} bytes are needed and {free:,} are free. Free some space, or name "
            "another folder with HF_HUB_CACHE"
        )


def _fetch(revision: Revision, wanted: list[str], missing: list[str], on_progress: Progress | None) -> None:
    total = sum(revision.files[name].size or 0 for name in wanted)
    there = total - sum(revision.files[name].size or 0 for name in missing)
    count = _Count(there, total, on_progress)
    api = client.connect(revision.token)

    def one(name: str) -> None:
        try:
            with client.explained(revision.address, token=revision.token):
                client.retried(lambda: _fetch_one(api, revision, name, count))
        except BaseException:
            count.begin_no_more()
            raise

    with ThreadPoolExecutor(min(_AT_ONCE, len(missing))) as pool:
        jobs = [pool.submit(one, name) for name in missing]
        try:
            errors = [error for job in jobs if (error := job.exception()) is not None]
        except BaseException:  # Ctrl-C
            count.stop()
            raise
    if errors:
        raise next((error for error in errors if not isinstance(error, _StoppedError)), errors[0])


def _fetch_one(api: "HfApi", revision: Revision, name: str, count: "_Count") -> None:
    begun = count.begin()
    damaged = (revision.snapshot / name).exists()  # what is there is not what the Hub states
    options: dict[str, Any] = {"tqdm_class": begun} if _takes_bar(api.hf_hub_download) else {}
    try:
        api.hf_hub_download(
            revision.repo_id,
            name,
            revision=revision.sha,
            cache_dir=cache_folder(),
            force_download=damaged,
            **options,
        )
    except BaseException:
        begun.undo()
        raise
    begun.finish(revision.files[name].size or 0)


def _takes_bar(call: Callable[..., Any]) -> bool:
    """Whether this version of the client reports progress; older ones are told of whole files."""
    return "tqdm_class" in inspect.signature(call).parameters


def _check_all(revision: Revision, names: Iterable[str]) -> None:
    """Make sure that what was fetched is what the Hub lists."""
    for name in names:
        path, size = revision.snapshot / name, revision.files[name].size
        revision.cached.check_inside(path)
        found = path.stat().st_size if path.is_file() else None
        if found is None or size not in (None, found):
            what = "is missing" if found is None else f"has {found:,} bytes"
            raise HubUnavailableError(
                f"{revision.label}: {name} {what} after the download, and the Hub states {size:,}. Repeat the command"
            )


class _StoppedError(Exception):
    """Another file failed, so this one is not gone on with."""


class _Count:
    """The bytes that all files together have so far."""

    def __init__(self, there: int, total: int, on_progress: Progress | None) -> None:
        self._done, self._total, self._tell = there, total, on_progress
        self._lock = threading.Lock()
        self._no_more = threading.Event()
        self._stopping = threading.Event()

    def begin_no_more(self) -> None:
        """A file failed. Those that are under way are let finish: the next call then finds them in the cache."""
        self._no_more.set()

    def stop(self) -> None:
        """Give up those that are under way too."""
        self._no_more.set()
        self._stopping.set()

    def check(self) -> None:
        if self._stopping.is_set():
            raise _StoppedError

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._tell is not None:
                self._tell(max(0, min(self._done, self._total)), self._total)

    def begin(self) -> "_Begun":
        if self._no_more.is_set():
            raise _StoppedError
        return _Begun(self)


class _Begun:
    """One attempt at one file. The client takes it for a class of progress bars and makes its bars by calling it."""

    def __init__(self, count: _Count) -> None:
        self._count, self._counted = count, 0
        self.n = self.total = 0
        self.format_dict: dict[str, Any] = {}  # what Xet asks its bars for

    def __call__(self, *_: object, **__: object) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, nbytes: float | None = 1) -> None:
        self._count.check()
        self._counted += int(nbytes or 0)
        self._count.add(int(nbytes or 0))

    def undo(self) -> None:
        """It failed: its bytes do not count."""
        self._count.add(-self._counted)
        self._counted = 0

    def finish(self, size: int) -> None:
        """It is whole, whatever was reported of it."""
        self._count.add(size - self._counted)
        self._counted = size

    def __getattr__(self, name: str) -> Callable[..., None]:
        """What else a bar can do, none of which matters here."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None
