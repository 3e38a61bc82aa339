"""The headers of what an address on the Hub holds, by range requests: a few kilobytes of a file of any size.

They come as files like any other: sparse ones, with the header in its place and the size that the Hub states. Whoever
reads them sees names, shapes and dtypes. The values of tensors of a few bytes, such as alphas, are fetched too; no
other value is there, and using one is an error, so that no zero passes for a weight.
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptertools.containers import safetensors
from adaptertools.containers.atomic import explained as disk_explained
from adaptertools.containers.source import Located
from adaptertools.containers.tensorfile import MAX_HEADER_BYTES
from adaptertools.errors import HubError
from adaptertools.hub import client
from adaptertools.hub.address import Address
from adaptertools.hub.choice import Choice
from adaptertools.hub.download import choose, located_at
from adaptertools.hub.revision import Revision, as_given, resolve
from adaptertools.hub.transfer import Progress, download, missing_bytes

if TYPE_CHECKING:
    from adaptertools.hub.download import What

_FIRST = 16 << 10
"""Bytes that are asked for at once: the header of most files."""
_SMALL = 64
"""Bytes of a tensor whose values are fetched too."""
_NEAR = 4 << 10
"""Bytes between two such tensors up to which one request brings both."""
_MOST_REQUESTS = 512
"""Requests for such tensors of one file; where more would be needed, their values are left away too."""
_AT_ONCE = 8
_LENGTH = 8
_SECONDS = 30.0
"""How long to wait for a server that says nothing."""
_MODEL_FILES = ("config.json", ".index.json")
"""What of a base model is read beside the headers of its weights."""

Range = tuple[int, int]


def fetch_headers(
    address: Address | str,
    what: "What" = "adapter",
    *,
    token: str | None = None,
    revision: str | None = None,
    on_progress: Progress | None = None,
) -> Located:
    """An adapter or a base model of the Hub with its headers alone, as a place on this machine.

    Files that are in the cache are taken as they are. Containers other than safetensors keep no header in one place, so
    that their files are downloaded. `Located.here` says which files have headers alone.

    Raises: HubError and what stands below it; UnsafeFileError for a header that is too large; OptionError
    """
    found = resolve(as_given(address, revision), token=token)
    choice = choose(found, what)
    names = [name for name in choice.names if what != "model" or _is_read(name)]
    far = [] if found.offline else [name for name in names if _is_far(found, name)]
    download(found, [name for name in names if name not in far], on_progress=on_progress)
    if not far:
        return located_at(found, choice)
    home = Home()
    for name in names:
        place = home.path / name
        with disk_explained(home.path):
            place.parent.mkdir(parents=True, exist_ok=True)
            if name not in far:
                place.symlink_to((found.snapshot / name).resolve())
    with ThreadPoolExecutor(min(_AT_ONCE, len(far))) as pool:
        here = pool.map(lambda name: _hollow(found, name, home.path / name, what == "adapter"), far)
        known = dict(zip((home.path / name for name in far), here, strict=True))
    return _at(found, choice, home, known)


def _at(revision: Revision, choice: Choice, home: "Home", known: dict[Path, frozenset[str]]) -> Located:
    return replace(located_at(revision, choice), path=home.path / choice.at, here=known, holder=home)


def _is_read(name: str) -> bool:
    return name.endswith((safetensors.SUFFIX, *_MODEL_FILES))


def _is_far(revision: Revision, name: str) -> bool:
    return name.endswith(safetensors.SUFFIX) and missing_bytes(revision, [name]) > 0


class Home:
    """A temporary folder that is removed when nobody holds this any more."""

    def __init__(self) -> None:
        with disk_explained(Path(tempfile.gettempdir())):
            self.path = Path(tempfile.mkdtemp(prefix="adaptertools-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _hollow(revision: Revision, name: str, place: Path, small: bool) -> frozenset[str]:
    """Make the sparse file of a safetensors file. Returns the tensors whose values it has.

    Raises: HubError; DestinationError
    """
    size = revision.files[name].size or 0
    remote = _Remote(revision, name, size)
    header = remote.read(0, min(_FIRST, size))
    length = int.from_bytes(header[:_LENGTH], "little")
    start = _LENGTH + length
    if len(header) < start <= size and length <= MAX_HEADER_BYTES:  # else reading it says what is wrong
        header += remote.read(len(header), start)
    spans = _small_spans(header[_LENGTH:start], start) if small else {}
    pieces = {0: header[:start]} | {begin: remote.read(begin, end) for begin, end in _joined(list(spans.values()))}
    with disk_explained(place), place.open("wb") as file:
        file.truncate(size)
        for begin, data in pieces.items():
            file.seek(begin)
            file.write(data)
    return frozenset(spans)


def _small_spans(header: bytes, start: int) -> dict[str, Range]:
    """Where the tensors of a few bytes lie in a file, by name; none for a header that is no good."""
    try:
        entries = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        small = {name: (start + begin, start + end) for name, (begin, end) in entries.items() if end - begin <= _SMALL}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return small if len(_joined(list(small.values()))) <= _MOST_REQUESTS else {}


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """The ranges in order, those near each other as one."""
    ordered = sorted(ranges)
    cuts = [index for index, (one, other) in enumerate(pairwise(ordered), 1) if other[0] - one[1] > _NEAR]
    groups = [ordered[first:last] for first, last in pairwise([0, *cuts, len(ordered)])] if ordered else []
    return [(group[0][0], max(end for _, end in group)) for group in groups]


@dataclass(frozen=True, slots=True)
class _Remote:
    """A file of a commit, of which parts can be read."""

    revision: Revision
    name: str
    size: int

    def read(self, begin: int, end: int) -> bytes:
        """The bytes of a range.

        Raises: HubError and what stands below it
        """
        if begin >= end:
            return b""
        with client.explained(self.revision.address, token=self.revision.token):
            return client.retried(lambda: self._read(begin, end))

    def _read(self, begin: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url

        utils = _utilities()
        url = hf_hub_url(self.revision.repo_id, self.name, revision=self.revision.sha, endpoint=client.endpoint())
        headers = utils.build_hf_headers(token=self.revision.token, library_name="adaptertools")
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with _streamed(url, headers) as (response, chunks):
            utils.hf_raise_for_status(response)
            if response.status_code != 206 and begin:
                raise HubError(f"{self.revision.label}: {client.endpoint()} takes no range requests. Pull it instead")
            found = bytearray()
            for chunk in chunks:  # a server that sends more than was asked for is not listened to any longer
                found += chunk
                if len(found) >= end - begin:
                    break
        if len(found) < end - begin:
            raise ConnectionError(f"{self.name}: {len(found)} bytes came of {end - begin}")
        return bytes(found[: end - begin])


@contextmanager
def _streamed(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """The answer to a GET whose body is not read yet, by whichever HTTP library the client uses."""
    session = _utilities().get_session()
    if callable(getattr(session, "stream", None)):  # httpx and httpx2; to requests it is a setting
        with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=_SECONDS) as response:
            if response.status_code >= 400:
                response.read()
            yield response, response.iter_bytes()
    else:
        with session.get(url, headers=headers, stream=True, timeout=_SECONDS) as response:
            yield response, response.iter_content(_FIRST)


def _utilities() -> Any:
    """What the client offers to those who make requests of their own."""
    from huggingface_hub import utils

    return utils
