"""JSON documents: small, without duplicate keys, and always an object."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptertools.containers.tensorfile import MAX_HEADER_BYTES, file_size
from adaptertools.errors import DamagedFileError, UnsafeFileError


def parse_object(label: str, text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises: DamagedFileError if it is not one, or if a key stands twice
    """
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(label, pairs))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"{label}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DamagedFileError(f"{label}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises: DamagedFileError, UnsafeFileError if the file is larger than any configuration
    """
    if file_size(path) > MAX_HEADER_BYTES:
        raise UnsafeFileError(f"{path}: {file_size(path)} bytes are more than any configuration needs")
    return parse_object(str(path), path.read_bytes())


def format_json(document: Mapping[str, Any]) -> str:
    """JSON as it is written: sorted, indented, with a final newline."""
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _unique(label: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise DamagedFileError(f"{label}: duplicate keys {', '.join(map(repr, twice[:5]))}; which one is meant?")
    return mapping
