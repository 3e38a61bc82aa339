"""A commit of a repository: an address is resolved to its sha first, and nothing but that sha is used from then on."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptertools.errors import HubError, HubNotFoundError, HubUnavailableError, OptionError, UnsafeFileError
from adaptertools.hub import client
from adaptertools.hub.address import Address, parse_address
from adaptertools.hub.cache import DEFAULT_REVISION, SHA, CachedRepository, RemoteFile

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """A commit of a repository and all files in it. The names are safe: none leads out of a folder."""

    address: Address
    """As the caller gave it."""
    sha: str
    files: Mapping[str, RemoteFile] = field(repr=False)
    offline: bool = False
    """Whether the cache said so, not the Hub."""
    complete: bool = True
    """Whether `files` is known to be all that the commit has; offline it may be what is here."""
    token: str | None = field(default=None, repr=False)

    @property
    def repo_id(self) -> str:
        return self.address.repo_id

    @property
    def cached(self) -> CachedRepository:
        return CachedRepository(self.repo_id)

    @property
    def snapshot(self) -> Path:
        """The folder in the shared cache for files of this commit."""
        return self.cached.snapshot(self.sha)

    @property
    def label(self) -> str:
        """What messages call it: its address, with the beginning of the sha."""
        return self.label_at(self.address.inside)

    def label_at(self, inside: str) -> str:
        """What messages call a place in it."""
        return f"hf://{self.repo_id}@{self.sha[:12]}{f'/{inside}' if inside else ''}"

    def name_at(self, inside: str) -> str:
        """What records call a place in it: `org/name@sha/sub/folder`."""
        return f"{self.repo_id}@{self.sha}{f'/{inside}' if inside else ''}"

    def below(self, folder: str) -> list[str]:
        """The names of the files in a folder and further below; of all files for ""."""
        return [name for name in self.files if not folder or name.startswith(f"{folder}/")]


def as_given(address: Address | str, revision: str | None = None) -> Address:
    """The address with the revision that an option names.

    Raises: OptionError for what is no address, or names another revision
    """
    found = parse_address(address) if isinstance(address, str) else address
    if revision is None or found.revision == revision:
        return found
    if found.revision is not None:
        raise OptionError(f"{found} names the revision {found.revision}, and --revision {revision}: give one of them")
    return replace(parse_address(str(replace(found, revision=revision))), bare=found.bare)


def resolve(address: Address | str, *, token: str | None = None) -> Revision:
    """The commit that an address means now; offline the one that it meant when the cache last saw it.

    Raises: HubError and what stands below it; UnsafeFileError for a repository with path-like names; OptionError
    """
    found = as_given(address)
    if client.offline():
        return _from_cache(found, token)
    api = client.connect(token)
    try:
        with client.explained(found, token=token):
            info = client.retried(lambda: api.model_info(found.repo_id, revision=found.revision, files_metadata=True))
    except HubUnavailableError as error:
        raise HubUnavailableError(f"{error}{_hint(found)}") from None
    if info.sha is None or not SHA.fullmatch(info.sha):
        raise HubError(f"{found}: {client.endpoint()} names no commit. Is HF_ENDPOINT right?")
    files = _listed(info)
    check_names(found, files)
    return Revision(address=found, sha=info.sha, files=files, token=token)


def check_names(address: Address, names: Mapping[str, object]) -> None:
    """Make sure that every file of a repository lands in its folder.

    Raises: UnsafeFileError
    """
    for name in names:
        parts = re.split(r"[/\\]", name)
        if any(part in ("", ".", "..") for part in parts) or _CONTROL.search(name) or _DRIVE.match(name):
            raise UnsafeFileError(
                f"{address}: the repository has a file named {name!r:.100}, which would lie outside its folder or "
                "hides something. Nothing of it was read"
            )


def _listed(info: "ModelInfo") -> dict[str, RemoteFile]:
    found = {}
    for entry in info.siblings or ():
        sha256 = getattr(entry.lfs, "sha256", None) if entry.lfs is not None else None
        found[entry.rfilename] = RemoteFile(entry.size, sha256)
    return found


def _from_cache(address: Address, token: str | None) -> Revision:
    cached = CachedRepository(address.repo_id)
    sha = cached.sha_of(address.revision)
    if sha is None or not cached.snapshot(sha).is_dir():
        raise HubNotFoundError(
            f"{address}: HF_HUB_OFFLINE is set, and the cache does not have "
            f"{address.revision or DEFAULT_REVISION} of it. Unset HF_HUB_OFFLINE to fetch it"
        )
    listing = cached.listing(sha)
    files = cached.present(sha) if listing is None else listing
    check_names(address, files)
    return Revision(address=address, sha=sha, files=files, offline=True, complete=listing is not None, token=token)


def _hint(address: Address) -> str:
    """That an older copy is at hand, which is never taken unasked."""
    cached = CachedRepository(address.repo_id)
    sha = cached.sha_of(address.revision)
    if sha is None or not cached.snapshot(sha).is_dir():
        return ""
    return f". With HF_HUB_OFFLINE=1 the cache would be used, which has {sha[:12]}"
