"""The client of the Hub: how it is set up, when a call is repeated, and what its errors mean.

The environment is read at every call, not when a module is imported: HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HOME and
HF_HUB_OFFLINE. Works with huggingface_hub 0.36 to 2.4, whose HTTP libraries (requests, httpx, httpx2) raise different
errors.
"""

import importlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from adaptertools.errors import AdapterToolsError, OptionError
from adaptertools.hub.address import Address
from adaptertools.hub.cache import cache_folder
from adaptertools.hub.faults import explain, is_passing, retry_after

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["cache_folder", "connect", "endpoint", "explained", "known_tokens", "offline", "retried"]

T = TypeVar("T")

FIRST_WAIT = 1.0
"""Seconds before a call is repeated for the first time; each wait after it is twice as long."""
LONGEST_WAIT = 30.0
"""The longest wait that a server's Retry-After may ask for."""
PATIENCE = 40.0
"""Seconds after which a call that goes on failing is given up."""

_HUB = "https://huggingface.co"
_TRUE = ("1", "ON", "YES", "TRUE")
_TOKEN = re.compile(r"[!-~]+")


def endpoint() -> str:
    """Where the Hub is: HF_ENDPOINT, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in _TRUE


def connect(token: str | None = None) -> "HfApi":
    """The client for the Hub at `endpoint()`; with the caller's own token where none is given: HF_TOKEN, or `hf auth`.

    Raises: OptionError for what cannot be a token
    """
    from huggingface_hub import HfApi

    if token is not None and not _TOKEN.fullmatch(token := token.strip()):
        raise OptionError("the token that was given is none: it is empty, or has spaces or control characters in it")
    return HfApi(endpoint=endpoint(), token=token, library_name="adaptertools")


def known_tokens(token: str | None = None) -> tuple[str, ...]:
    """The tokens in use, which no message may show."""
    from huggingface_hub import get_token

    found = (token, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), get_token())
    return tuple(dict.fromkeys(text.strip() for text in found if text and text.strip()))


@contextmanager
def explained(address: Address, *, token: str | None = None) -> Iterator[None]:
    """Turn what the client raises about a repository into our errors, which say what to do and show no token.

    Raises: HubError and what stands below it; DestinationError if the disk is at fault; OptionError
    """
    try:
        with _quiet():
            yield
    except AdapterToolsError:
        raise
    except Exception as error:
        explanation = explain(error, address, endpoint())
        if explanation is None:
            raise
        # Without the client's own error as its cause: its text may hold what was sent.
        raise type(explanation)(redacted(str(explanation), token)) from None


def redacted(text: str, token: str | None = None) -> str:
    """The text without any token that is in use."""
    for secret in known_tokens(token):
        text = text.replace(secret, "hf_…")
    return text


def retried(call: Callable[[], T]) -> T:
    """The result of the call, which is repeated for a while as long as the network or the server fails for now.

    Raises: what the call raises in the end, or at once if no repetition would help
    """
    began, wait = time.monotonic(), FIRST_WAIT
    while True:
        try:
            return call()
        except Exception as error:
            asked = retry_after(error) or 0.0
            pause = max(wait, asked)
            late = time.monotonic() - began + pause > PATIENCE
            if late or asked > LONGEST_WAIT or not is_passing(error):
                raise
        time.sleep(pause)
        wait *= 2


_quieting = threading.Lock()
_quiet_calls = 0
_before: tuple[int, bool] = (logging.NOTSET, False)
"""The level at which the client logs, and whether it shows progress bars, outside of our calls."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client from logging its own repetitions, and from drawing bars: what comes of it all is said once."""
    global _quiet_calls, _before
    utils = _client_utils()
    logger = logging.getLogger("huggingface_hub")
    with _quieting:
        if not _quiet_calls:
            _before = logger.level, _shows_bars()
            if not os.environ.get("HF_HUB_VERBOSITY"):
                logger.setLevel(logging.ERROR)
            if _before[1]:
                utils.disable_progress_bars()
        _quiet_calls += 1
    try:
        yield
    finally:
        with _quieting:
            _quiet_calls -= 1
            if not _quiet_calls:
                logger.setLevel(_before[0])
                if _before[1]:
                    utils.enable_progress_bars()


def _client_utils() -> Any:
    """The client's own switches; importing them sets the level at which it logs."""
    return importlib.import_module("huggingface_hub.utils")


def _shows_bars() -> bool:
    """Whether the client draws bars that may be switched off; where the environment settles it, they may not."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS

    return HF_HUB_DISABLE_PROGRESS_BARS is None and not _client_utils().are_progress_bars_disabled()
