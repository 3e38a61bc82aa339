"""JSON documents: small, without duplicate keys, and always an object."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptertools.containers.tensorfile import MAX_HEADER_BYTES, file_size, reading
from adaptertools.errors import DamagedFileError, UnsafeFileError, UnsupportedFeatureError


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
    _check_text(label, text, value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises: DamagedFileError, UnsafeFileError if the file is larger than any configuration
    """
    with reading(path):
        if file_size(path) > MAX_HEADER_BYTES:
            raise UnsafeFileError(f"{path}: {file_size(path)} bytes are more than any configuration needs")
        return parse_object(str(path), path.read_bytes())


def format_json(document: Mapping[str, Any]) -> str:
    """JSON as it is written: sorted, indented, with a final newline.

    Raises: UnsupportedFeatureError for NaN and infinity, which JSON does not know
    """
    try:
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        odd = ", ".join(key for key, value in document.items() if not is_json(value))
        raise UnsupportedFeatureError(f"JSON holds no NaN and no infinity; one stands under {odd}") from error


def is_json(value: object) -> bool:
    """Whether JSON can say it, which knows no NaN and no infinity, and of Python's types the plain ones."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _check_text(label: str, text: str | bytes, value: dict[str, Any]) -> None:
    """Half a surrogate pair is valid JSON and no text: it could be neither shown nor written again."""
    escaped = b"\\ud" in text.lower() if isinstance(text, bytes) else "\\ud" in text.lower()
    if escaped:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DamagedFileError(f"{label}: holds half a surrogate pair, which is no text") from None


def _unique(label: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        twice = [repr(key)[:80] for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise DamagedFileError(f"{label}: duplicate keys {', '.join(twice[:5])}; which one is meant?")
    return mapping
