"""Addresses on the Hub.

org/name                               the default branch of a repository, unless there is such a path here
org/name@rev                           a branch, a tag, a commit, or refs/pr/N
hf://org/name@rev/sub/folder           a folder or a file in it; a slash in the name of a branch is %2F
https://huggingface.co/org/name/…      what the browser shows; the host of HF_ENDPOINT counts too
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from adaptertools.errors import OptionError

_SCHEME = "hf://"
_WEB_SCHEMES = ("http://", "https://")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_BARE = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^@\s]+))?")
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})?")
_REFS = re.compile(r"refs/(?:pr|convert)/[^/]+")
_NO_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-./]|/\.|[./]$|\.lock$")
"""What git allows in the name of no branch and no tag."""
_MOST = 96
"""The longest name of a repository."""
_WEB = ("huggingface.co", "www.huggingface.co", "hf.co")
_OTHERS = ("datasets", "spaces", "buckets", "kernels", "api", "docs", "papers", "collections", "blog", "settings")
_PLACES = ("tree", "blob", "resolve", "raw", "commit")
_EXPECTED = "expected org/name, org/name@revision, hf://org/name@revision/sub/folder, or a web address of the Hub"


@dataclass(frozen=True, slots=True)
class Address:
    """A repository of a model or an adapter on the Hub, and a place in it."""

    repo_id: str
    revision: str | None = None
    """A branch, a tag or a commit; None is the default branch."""
    inside: str = ""
    """A folder or a file in the repository, without a leading slash; empty for the repository itself."""
    bare: bool = field(default=False, compare=False, repr=False)
    """Whether it was given as `org/name`, which could have been a path on this machine, where there is none."""

    def __str__(self) -> str:
        revision = self.revision or ""
        if revision and not _REFS.fullmatch(revision):
            revision = quote(revision, safe="")
        return f"{_SCHEME}{self.repo_id}" + (f"@{revision}" if revision else "") + (self.inside and f"/{self.inside}")


def as_address(given: object) -> Address | None:
    """The Hub address that a caller means; None for a path on this machine, which wins wherever it exists.

    Raises: OptionError for what says that it is a Hub address and is none
    """
    if not isinstance(given, str):
        return given if isinstance(given, Address) else None
    if given.startswith((_SCHEME, *_WEB_SCHEMES)):
        return parse_address(given)
    return parse_address(given) if _BARE.fullmatch(given) and not _exists(given) else None


def parse_address(text: str) -> Address:
    """Read an address.

    Raises: OptionError
    """
    if text.startswith(_SCHEME):
        address = _from_uri(text.removeprefix(_SCHEME))
    elif text.startswith(_WEB_SCHEMES):
        address = _from_web(text)
    else:
        match = _BARE.fullmatch(text)
        address = Address(match["repo"], match["revision"], bare=True) if match else None
    if address is None or not _plausible(address):
        raise OptionError(f"{_shown(text)!r} is no address on the Hub: {_EXPECTED}{_meant(text)}")
    return address


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except PermissionError:  # in a folder that may not be looked into
        return True
    except OSError:  # a name too long
        return False


def _from_uri(rest: str) -> Address | None:
    head, at, tail = rest.removeprefix("models/").partition("@")
    parts = head.rstrip("/").split("/")
    if not at:
        return Address("/".join(parts[:2]), None, "/".join(parts[2:]))
    refs = _REFS.match(tail)
    revision = refs[0] if refs else tail.partition("/")[0]
    return Address(head, unquote(revision), tail[len(revision) :].strip("/")) if revision else None


def _from_web(text: str) -> Address | None:
    try:
        url, endpoint = urlsplit(text), urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError:  # brackets that hold no IPv6 address
        return None
    mirrored = bool(endpoint.netloc) and url.netloc == endpoint.netloc
    if url.netloc not in _WEB and not mirrored:
        return None
    path = url.path.removeprefix(endpoint.path.rstrip("/")) if mirrored else url.path
    parts = [unquote(part) for part in path.split("/") if part]
    repo_id, rest = "/".join(parts[:2]), parts[2:]
    if len(parts) < 2 or (rest and (rest[0] not in _PLACES or len(rest) < 2)):
        return None
    if not rest:
        return Address(repo_id)
    refs = _REFS.match("/".join(rest[1:]))
    if refs:
        return Address(repo_id, refs[0], "/".join(rest[1:])[len(refs[0]) :].strip("/"))
    return Address(repo_id, rest[1], "/".join(rest[2:]))


def _plausible(address: Address) -> bool:
    """Whether the Hub could know it; a place in it must not lead out of it."""
    name = address.repo_id
    if not _REPOSITORY.fullmatch(name) or len(name) > _MOST or "--" in name or ".." in name or name.endswith(".git"):
        return False
    if name.partition("/")[0] in _OTHERS or (address.revision is not None and _NO_REVISION.search(address.revision)):
        return False
    parts = address.inside.split("/") if address.inside else []
    return not any(part in ("", ".", "..") or re.search(r"[\\\x00-\x1f\x7f]", part) for part in parts)


def _meant(text: str) -> str:
    """A word on a folder of a repository that was given without `hf://`."""
    address = _from_uri(text) if re.fullmatch(rf"{_PART}(/{_PART}){{2,}}", text) else None
    return f". Is {address} meant?" if address is not None and _plausible(address) else ""


def _shown(text: str) -> str:
    """The text without what may be secret in a web address: who asks, and the query."""
    return re.sub(r"//[^/@]*@", "//…@", text).partition("?")[0] if text.startswith(_WEB_SCHEMES) else text
