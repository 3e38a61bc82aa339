"""JSON beside a one-file adapter: what its format cannot say, bound to the very file that it was written for.

Two files cannot be replaced in one step. So the sidecar names the weights that it belongs to by a fingerprint and keeps
what was said of the weights before; whichever file a crash leaves, its own record is found, never another's.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adaptertools.containers.source import Source
from adaptertools.errors import FileError

SUFFIX = ".adaptertools.json"


def fingerprint(path: Path) -> str:
    """A hash over the names, sizes and checksums of a zip file's members, read from its directory alone.

    Raises: zipfile.BadZipFile
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            digest.update(f"{member.filename}\0{member.file_size}\0{member.CRC}\n".encode())
    return digest.hexdigest()


def bind(document: Mapping[str, Any], weights: Path, replaced: Path) -> dict[str, Any]:
    """The document with the fingerprint of its weights, and the record of the weights that they are to replace."""
    return _bound(document, fingerprint(weights), replaced)


def foreseen(document: Mapping[str, Any], replaced: Path | None) -> dict[str, Any]:
    """What `bind` makes of the document as far as its length goes, before the weights are there."""
    return _bound(document, "0" * len(hashlib.sha256().hexdigest()), replaced)


def _bound(document: Mapping[str, Any], weights: str, replaced: Path | None) -> dict[str, Any]:
    bound = {**document, "weights": weights}
    if replaced is None:
        return bound
    with suppress(FileError):  # a damaged sidecar says nothing that could be kept
        previous = load(Source(replaced), replaced.name)[0] if replaced.is_file() else None
        if previous is not None:
            bound["previous"] = {key: value for key, value in previous.items() if key != "previous"}
    return bound


def load(source: Source, name: str) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The record that belongs to the tensor file `name`, and a note where the sidecar speaks of another file."""
    document = source.document(name + SUFFIX)
    if document is None or source.root is None:
        return document, ()
    try:
        found = fingerprint(source.root / name)
    except (zipfile.BadZipFile, OSError):
        return None, (f"{name}{SUFFIX} was not written for {name} and is not used",)
    for record in (document, document.get("previous")):
        if isinstance(record, dict) and record.get("weights") == found:
            return record, ()
    return None, (f"{name}{SUFFIX} was written for other weights than {name} and is not used",)
