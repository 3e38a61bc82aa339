"""Where a path or an address on the Hub leads: a file or folder on this machine, with the name that it has there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from adaptertools.containers.source import Located, located
from adaptertools.destination import Progress
from adaptertools.errors import OptionError
from adaptertools.hub.address import Address, as_address, parse_address

Given = str | Path | Located | Address
"""What a caller may name a place by."""

_SCHEMES = ("hf://", "http://", "https://")

What = Literal["adapter", "model"]


def as_destination(given: Given) -> Path | Address:
    """Where a result is to go: to the Hub where `hf://` or a web address says so; `org/name` is a path here.

    Raises: OptionError for an empty path, and for what says that it is a Hub address and is none
    """
    if isinstance(given, Address):
        return given
    if isinstance(given, str) and given.startswith(_SCHEMES):
        return parse_address(given)
    return located(given).path


def localize(
    given: Given,
    what: What = "adapter",
    *,
    revision: str | None = None,
    token: str | None = None,
    headers: bool = False,
    on_progress: Progress | None = None,
) -> Located:
    """The files that a place holds, on this machine. Those of an address are downloaded to the shared cache.

    Of an address, `headers` fetches no values, but those of tensors of a few bytes: using others is an error.

    Raises: HubError for an address; OptionError for what is no path, and for a revision of what is none on the Hub
    """
    address = None if isinstance(given, Located) else as_address(given)
    if address is None:
        assert not isinstance(given, Address)
        if revision is not None and not isinstance(given, Located):
            raise OptionError(f"a revision is given, {revision}, and {given} is a path on this machine: it has none")
        return located(given)
    if headers:
        from adaptertools.hub.headers import fetch_headers

        return fetch_headers(address, what, revision=revision, token=token, on_progress=on_progress)
    from adaptertools.hub.download import fetch

    return fetch(address, what, revision=revision, token=token, on_progress=on_progress)


def localize_all(
    given: Sequence[Given], *, token: str | None = None, on_progress: Progress | None = None
) -> list[Located]:
    """The files of several adapters, in order; an address that is given twice is resolved once.

    Raises: HubError for an address; OptionError for an empty path
    """
    found: dict[Given, Located] = {}
    named = [as_address(each) or each for each in given]
    for each in named:
        if each not in found:
            found[each] = localize(each, token=token, on_progress=on_progress)
    return [found[each] for each in named]
