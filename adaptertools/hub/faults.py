"""What goes wrong between here and the Hub, told by the errors of the client and of three HTTP libraries."""

import errno
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from adaptertools.containers.atomic import explained as disk_explained
from adaptertools.errors import (
    AdapterToolsError,
    DestinationError,
    HubAccessError,
    HubError,
    HubMovedError,
    HubNotFoundError,
    HubUnavailableError,
    OptionError,
)
from adaptertools.hub.address import Address
from adaptertools.hub.cache import cache_folder

_HTTP_LIBRARIES = ("requests", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "hf_xet")
_PASSING = frozenset((408, 425, 429, 500, 502, 503, 504, 509, 520, 522, 524, 529))
_AGAIN = "The same command goes on from what is there"
_GIVE_TOKEN = "set HF_TOKEN, give --token, or log in with `hf auth login`"


def is_passing(error: BaseException) -> bool:
    """Whether the same call may well succeed in a while: the network fails, or the server is busy or broken."""
    status = _status(error)
    return status in _PASSING if status is not None else _is_network(error)


def retry_after(error: BaseException) -> float | None:
    """The seconds that the server asks to wait."""
    said = _headers(error).get("Retry-After")
    if said is None:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def explain(error: Exception, address: Address, endpoint: str) -> AdapterToolsError | None:
    """Our error for one of the client's, with what to do about it; None for one that is not the client's to raise."""
    from huggingface_hub import errors

    where = f"{address}"
    match error:
        case errors.HFValidationError():
            return OptionError(f"{where}: {_line(error)}")
        case errors.OfflineModeIsEnabled():
            return HubError(f"{where}: HF_HUB_OFFLINE is set, and this needs the Hub. Unset it")
        case errors.GatedRepoError():
            return HubAccessError(
                f"{where}: access to this repository is gated. Ask for it at {endpoint}/{address.repo_id}; then, with "
                f"a token of that account, {_GIVE_TOKEN}"
            )
        case errors.RepositoryNotFoundError():
            return _no_repository(error, address)
        case errors.RevisionNotFoundError():
            named = address.revision or "that name"
            return HubNotFoundError(f"{where}: the repository has no branch, tag or commit {named}")
        case errors.LocalEntryNotFoundError():
            cause = _cause(error)
            return explain(cause, address, endpoint) if cause is not None else _unavailable(where, endpoint, error)
        case errors.EntryNotFoundError():
            return HubNotFoundError(f"{where}: the repository has no such file{_named(error)}")
        case errors.FileMetadataError() | json.JSONDecodeError():
            return HubError(f"{where}: {endpoint} does not answer as the Hub does. Is HF_ENDPOINT right?")
        case errors.HfHubHTTPError():
            return _by_status(error, where, endpoint)
    if _is_network(error):
        return _unavailable(where, endpoint, error)
    if isinstance(error, ValueError) and "hf_xet" in str(error):
        return HubError(f"{where}: a file of more than 50 GB needs the package hf_xet: pip install hf_xet")
    return _disk(error)


def _by_status(error: Exception, where: str, endpoint: str) -> AdapterToolsError:
    status, said = _status(error), _said(error)
    match status:
        case 401 if not _sent_token(error):
            return HubAccessError(f"{where}: this takes a token, and none was given{said}. To give one, {_GIVE_TOKEN}")
        case 401:
            return HubAccessError(f"{where}: the Hub does not accept the token{said}. Give a valid one: {_GIVE_TOKEN}")
        case 403:
            return HubAccessError(f"{where}: this is not allowed{said}. Use a token with that right: {_GIVE_TOKEN}")
        case 404 | 410:
            return HubNotFoundError(f"{where}: there is no such thing on the Hub{said}")
        case 409 | 412:
            return HubMovedError(f"{where}: the repository has changed meanwhile{said}. Repeat the command")
        case 507:
            return HubAccessError(f"{where}: there is no room left for it on the Hub{said}")
    if status in _PASSING:
        return _unavailable(where, endpoint, error)
    return HubError(f"{where}: the Hub answered {status}{said}")


def _no_repository(error: Exception, address: Address) -> AdapterToolsError:
    if _status(error) == 401 and _sent_token(error):
        return HubAccessError(f"{address}: the Hub does not accept the token. Give a valid one: {_GIVE_TOKEN}")
    here = f"there is no {address.repo_id} here, and on the Hub " if address.bare else ""
    return HubNotFoundError(
        f"{address}: {here}there is no such repository, or it is private. Check the name; for a private one "
        f"{_GIVE_TOKEN}"
    )


def _unavailable(where: str, endpoint: str, error: BaseException) -> HubUnavailableError:
    status = _status(error)
    if status is None:
        what = f"the connection to {endpoint} fails ({_line(error)})"
    elif status == 429:
        what = "the Hub answers 429, too many requests"
    else:
        what = f"the Hub answers {status}{_said(error)}"
    wait = retry_after(error)
    later = f" in {wait:.0f} seconds" if wait else " later"
    return HubUnavailableError(f"{where}: {what}. {_AGAIN}: repeat it{later}")


def _disk(error: Exception) -> AdapterToolsError | None:
    """What the operating system says about the cache, in which the client writes."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    try:
        with disk_explained(cache_folder()):
            raise error
    except DestinationError as explanation:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return DestinationError(f"{explanation}{'. HF_HUB_CACHE names another folder' if full else ''}")


def _is_network(error: BaseException) -> bool:
    """Whether it is a failure of the network, or of a transfer that a repetition may complete."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled | errors.HFValidationError):
        return False
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = _cause(error)
        return cause is None or is_passing(cause)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is None and "onsistency check failed" in str(error):
        return True  # what arrived is shorter than what was announced
    if isinstance(error, RuntimeError):
        return any(word in str(error).lower() for word in ("network", "transfer", "cas", "connection", "data process"))
    return any(kind.__module__.partition(".")[0] in _HTTP_LIBRARIES for kind in type(error).__mro__)


def _cause(error: BaseException) -> Exception | None:
    """Why the client looked for a file in the cache: what it got from the Hub."""
    return next((cause for cause in _causes(error) if isinstance(cause, Exception)), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    if cause is not None:
        yield cause


def _response(error: BaseException) -> Any:
    return getattr(error, "response", None)


def _status(error: BaseException) -> int | None:
    """The status that the server answered with; that of the cause where the client hides it."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = _cause(error)
        return _status(cause) if cause is not None else None
    status = getattr(_response(error), "status_code", None)
    return status if isinstance(status, int) else None


def _headers(error: BaseException) -> Any:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and (cause := _cause(error)) is not None:
        return _headers(cause)
    return getattr(_response(error), "headers", None) or {}


def _sent_token(error: BaseException) -> bool:
    headers = getattr(getattr(_response(error), "request", None), "headers", None) or {}
    return "authorization" in {name.lower() for name in headers}


def _said(error: BaseException) -> str:
    """What the server gives as its reason, in brackets."""
    said = _headers(error).get("X-Error-Message") or getattr(error, "server_message", None)
    return f" ({_short(str(said))})" if said else ""


def _named(error: BaseException) -> str:
    """The file that was asked for, by the address of the answer."""
    _, found, name = str(getattr(_response(error), "url", "")).partition("/resolve/")
    return f" as {name.partition('/')[2]}" if found and "/" in name else ""


def _line(error: BaseException) -> str:
    return _short(str(error) or type(error).__name__)


def _short(text: str) -> str:
    """The first line, without the end of what is longer than a line should be."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 200 else f"{line[:200]}…"
