"""What we say of an adapter on disk, in the header of safetensors or GGUF, else in a sidecar.

history     the operations that made it
metadata    by format: what that one says beyond the model, where the file is of another format
"""

import json
from collections.abc import Mapping
from typing import Any

from adaptertools.adapter import HistoryEntry
from adaptertools.containers.jsonfile import parse_object
from adaptertools.errors import DamagedFileError

HEADER_KEY = "adaptertools"
IN_HEADER = ("safetensors", "gguf")
"""The containers whose header has room for it."""


def header_strings(history: list[dict[str, Any]], metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """The history as header metadata, beside what a format says in the same entry."""
    said = parse_object(HEADER_KEY, (metadata or {}).get(HEADER_KEY, "{}"))
    return {HEADER_KEY: json.dumps({**said, "history": history}, sort_keys=True)}


def with_settings(document: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record with what other formats say of the adapter, unless it says that itself."""
    return {**document, "metadata": {**settings, **document.get("metadata", {})}}


def read_settings(
    metadata: Mapping[str, str], document: Mapping[str, Any] | None = None
) -> dict[str, Mapping[str, Any]]:
    """What other formats said of the adapter, by format, in a header, else in a sidecar.

    Raises: DamagedFileError if it is there and malformed
    """
    record: Mapping[str, Any] = document or {}
    if HEADER_KEY in metadata:
        record = parse_object(f"header entry {HEADER_KEY!r}", metadata[HEADER_KEY])
    settings = record.get("metadata") or {}
    if not isinstance(settings, dict) or not all(isinstance(said, dict) for said in settings.values()):
        raise DamagedFileError("what other formats say of the adapter is no object of objects")
    return dict(settings)


def unread_entries(metadata: Mapping[str, str], whose: str, *own: str) -> list[str]:
    """A note that names the entries of a header that a format does not know; `own` are those that it does."""
    entries = sorted(metadata.keys() - {"format", HEADER_KEY, *own})
    return [f"header entries that {whose} does not know are not carried: {', '.join(entries)}"] if entries else []


def read_history(metadata: Mapping[str, str], document: Mapping[str, Any] | None = None) -> tuple[HistoryEntry, ...]:
    """The history in a header, else in a sidecar, else none.

    Raises: DamagedFileError if it is there and malformed
    """
    entries: Any = []
    if HEADER_KEY in metadata:
        entries = parse_object(f"header entry {HEADER_KEY!r}", metadata[HEADER_KEY]).get("history", [])
    elif document is not None:
        entries = document.get("history", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DamagedFileError("the history of operations is no list of objects")
    return tuple(HistoryEntry.from_json(entry) for entry in entries)
