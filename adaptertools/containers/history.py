"""The operations that made an adapter, as they stand on disk: in the header of safetensors or GGUF, else a sidecar."""

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
