"""The cache that all Hugging Face tools share: where it is, and what it has of a repository.

    models--ORG--NAME/refs/REVISION          the sha that a branch or tag had when it was last looked at
    models--ORG--NAME/snapshots/SHA/…        links to the files of that commit that are here
    models--ORG--NAME/blobs/…                their contents
    models--ORG--NAME/adaptertools/SHA.json  all files of that commit, so that offline what is missing is noticed

Layout as huggingface_hub documents it ("Understand caching"); the last line is ours, and other tools pass over it.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adaptertools.errors import UnsafeFileError

SHA = re.compile(r"[0-9a-f]{40}")
DEFAULT_REVISION = "main"

_OURS = "adaptertools"


def cache_folder() -> Path:
    """Where the cache is: HF_HUB_CACHE, or the folder `hub` in HF_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = f"{os.environ.get('HF_HOME') or f'{home}/huggingface'}/hub"
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or hub
    return Path(os.path.expandvars(given)).expanduser()


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: its size, and its hash where it is kept in large file storage."""

    size: int | None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class CachedRepository:
    """What the cache has of one repository."""

    repo_id: str

    @property
    def folder(self) -> Path:
        return cache_folder() / f"models--{self.repo_id.replace('/', '--')}"

    def snapshot(self, sha: str) -> Path:
        """The folder of a commit, whether or not it is there."""
        return self.folder / "snapshots" / sha

    def sha_of(self, revision: str | None) -> str | None:
        """The sha that a branch, a tag or a commit had when it was last seen."""
        name = revision or DEFAULT_REVISION
        if SHA.fullmatch(name):
            return name if self.snapshot(name).is_dir() else None
        ref = self.folder / "refs" / name
        if ref.is_file() and SHA.fullmatch(said := ref.read_text(errors="replace").strip()):
            return said
        return self._commit(name)

    def _commit(self, start: str) -> str | None:
        """The one commit that is here and whose sha begins like this."""
        if not re.fullmatch(r"[0-9a-f]{7,39}", start):
            return None
        found = [path.name for path in self.folder.glob(f"snapshots/{start}*")]
        return found[0] if len(found) == 1 and SHA.fullmatch(found[0]) else None

    def remember(self, revision: str | None, sha: str, files: Mapping[str, RemoteFile]) -> None:
        """Note which sha a branch or tag had and which files it has, for the time without a network.

        A cache that cannot be written to remembers nothing, which is no error.
        """
        name = revision or DEFAULT_REVISION
        listing = {path: [file.size, file.sha256] for path, file in files.items()}
        with suppress(OSError):
            _put(self.folder / _OURS / f"{sha}.json", json.dumps({"files": listing}))
            if not SHA.fullmatch(name) and self._commit(name) != sha:
                _put(self.folder / "refs" / name, sha)

    def listing(self, sha: str) -> dict[str, RemoteFile] | None:
        """All files of a commit, as far as they were noted; None if they were not."""
        try:
            document = json.loads((self.folder / _OURS / f"{sha}.json").read_text())
            return {str(path): RemoteFile(size, sha256) for path, (size, sha256) in document["files"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def present(self, sha: str) -> dict[str, RemoteFile]:
        """The files of a commit that are here."""
        snapshot = self.snapshot(sha)
        return {
            path.relative_to(snapshot).as_posix(): RemoteFile(path.stat().st_size)
            for path in sorted(snapshot.rglob("*"))
            if path.is_file()
        }

    def check_inside(self, path: Path) -> None:
        """Make sure that a file of the cache lies in it, wherever links lead.

        Raises: UnsafeFileError
        """
        real, homes = path.resolve(), (cache_folder().resolve(), self.folder.resolve())
        if not any(real.is_relative_to(home) for home in homes):
            raise UnsafeFileError(
                f"{path}: the link leads out of the cache, to {real}. Remove {self.folder} and repeat the command"
            )


def _put(path: Path, text: str) -> None:
    """Write a small file in one step, unless it says that already."""
    if path.is_file() and path.read_text(errors="replace") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
