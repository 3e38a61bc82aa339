"""What stands in a repository on the Hub: its branches, and the files of one commit, known by their content."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from adaptertools.errors import HubNotFoundError, OptionError, SourceNotFoundError
from adaptertools.hub.address import Address
from adaptertools.hub.cache import SHA
from adaptertools.hub.client import explained, retried

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import GitRefInfo, GitRefs

MAIN = "main"
_PULL_REQUEST = "refs/pr/"
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Standing:
    """A file that stands in the repository."""

    size: int
    blob: str
    """The name that git gives to its content, or to the pointer to it."""
    sha256: str | None
    """Of a large file's content."""

    def is_same(self, content: Path | bytes) -> bool:
        """Whether the content is this file's, told without sending it."""
        if size_of(content) != self.size:
            return False
        return sha256_of(content) == self.sha256 if self.sha256 else _git_blob(content) == self.blob


def asked(api: "HfApi", address: Address, call: Callable[[], _Answer]) -> _Answer:
    """What a call of the client answers; tried again where that may help, and its errors are ours.

    Raises: HubError
    """
    with explained(address, token=given(api)):
        return retried(call)


def given(api: "HfApi") -> str | None:
    """The token that the caller gave, which messages must not show."""
    return api.token if isinstance(api.token, str) else None


def standing(api: "HfApi", address: Address, sha: str | None) -> dict[str, Standing]:
    """The files of a commit in the address's folder, by their paths in it; none where there is no commit.

    Raises: HubError; OptionError where that folder is a file
    """
    from huggingface_hub.hf_api import RepoFile

    if sha is None:
        return {}
    entries = asked(api, address, lambda: list(api.list_repo_tree(address.repo_id, recursive=True, revision=sha)))
    if any(isinstance(entry, RepoFile) and entry.path == address.inside for entry in entries):
        raise OptionError(f"{address} is a file: name the repository, or a folder in it")
    prefix = f"{address.inside}/" if address.inside else ""
    return {
        entry.path.removeprefix(prefix): Standing(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
        for entry in entries
        if isinstance(entry, RepoFile) and entry.path.startswith(prefix)
    }


def refs_of(api: "HfApi", address: Address) -> "GitRefs":
    """The branches, tags and pull requests of a repository.

    Raises: HubNotFoundError, HubError
    """
    return asked(api, address, lambda: api.list_repo_refs(address.repo_id, include_pull_requests=True))


def requests_of(refs: "GitRefs | None") -> "dict[str, GitRefInfo]":
    """The pull requests by the names of their references."""
    return {ref.ref: ref for ref in (refs.pull_requests or [])} if refs else {}


def head_of(refs: "GitRefs | None", branch: str) -> str | None:
    """The newest commit of a branch, or of a pull request `refs/pr/1`; None if there is none."""
    if branch.startswith(_PULL_REQUEST):
        request = requests_of(refs).get(branch)
        return request.target_commit if request else None
    return next((ref.target_commit for ref in (refs.branches if refs else []) if ref.name == branch), None)


def ready(api: "HfApi", address: Address, branch: str, *, private: bool, make: bool) -> "tuple[GitRefs | None, bool]":
    """The references of the repository, with this branch among them; and whether the repository had to be made.

    Where it may not be made, None stands for a repository that does not exist.

    Raises: HubError; OptionError for a tag or a commit, or `private` with a repository that everyone can see
    """
    if SHA.fullmatch(branch):
        raise OptionError(f"{address} names a commit, and a commit is never changed: name a branch")
    try:
        refs, created = refs_of(api, address), False
    except HubNotFoundError:
        if not make:
            return None, True
        asked(api, address, lambda: api.create_repo(address.repo_id, private=private or None, exist_ok=True))
        refs, created = refs_of(api, address), True
    if private and not created and not asked(api, address, lambda: api.model_info(address.repo_id)).private:
        raise OptionError(f"{address}: --private, but this repository exists and everyone can see it: give another")
    if head_of(refs, branch) is not None:
        return refs, created
    if branch.startswith(_PULL_REQUEST):
        raise HubNotFoundError(f"{address}: there is no such pull request")
    if any(tag.name == branch for tag in refs.tags):
        raise OptionError(f"{address} names a tag, and a tag is never moved: name a branch")
    if not make:
        return refs, created
    if branch != MAIN:
        asked(api, address, lambda: api.create_branch(address.repo_id, branch=branch, exist_ok=True))
        refs = refs_of(api, address)
    return refs, created


def size_of(content: Path | bytes) -> int:
    """The bytes of a file, or of what is to be one.

    Raises: SourceNotFoundError
    """
    if isinstance(content, bytes):
        return len(content)
    try:
        return content.stat().st_size
    except OSError as error:
        raise SourceNotFoundError(f"{content}: {error.strerror}") from error


def sha256_of(content: Path | bytes) -> str:
    """The SHA-256 by which the Hub knows a large file."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_blob(content: Path | bytes) -> str:
    """The name that git gives to a file's content; nothing here relies on it for security."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def shown(sha: str | None) -> str:
    """A commit as messages show it."""
    return sha[:12] if sha else "nothing"


def newer(shas: list[str], parent: str | None) -> str | None:
    """The commit that follows `parent` in a branch's commits, the newest first; None where it is no longer there."""
    at = len(shas) if parent is None else shas.index(parent) if parent in shas else 0
    return shas[at - 1] if at else None
