"""What a merge has done so far: a file of JSON objects, a line each, that only grows.

One file, since on a disk that is busy with a whole model every file that is made, renamed or removed waits for a tenth
of a second. A line that a kill or a full disk cut off counts as not written.
"""

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adaptertools.containers.atomic import explained
from adaptertools.containers.jsonfile import parse_object
from adaptertools.errors import DamagedFileError
from adaptertools.merging.workers import write_from


class Journal:
    """The lines of a file, as this process alone reads and adds to them, from any of its threads."""

    def __init__(self, path: Path, *, flush: bool) -> None:
        self.path, self._flush = path, flush
        self._lock = threading.Lock()
        self._entries, self._end = _whole_lines(path)

    @property
    def entries(self) -> tuple[Mapping[str, Any], ...]:
        """What stands in it, the oldest first."""
        return tuple(self._entries)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Put a line at the end, on disk when this returns if the journal is flushed.

        Raises: DestinationError; what stood there before stands
        """
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        with self._lock, explained(self.path):
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(handle, self._end)  # a line that was cut off
                write_from(handle, self._end, line)
                if self._flush:
                    os.fsync(handle)
            finally:
                os.close(handle)
            self._entries.append(entry)
            self._end += len(line)

    def remove(self) -> None:
        """Forget everything."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._entries, self._end = [], 0


def _whole_lines(path: Path) -> tuple[list[Mapping[str, Any]], int]:
    """The objects up to the first line that is none, and where they end."""
    try:
        content = path.read_bytes()
    except OSError:
        return [], 0
    entries: list[Mapping[str, Any]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = parse_object(str(path), line)
        except DamagedFileError:
            break
        if not line.endswith(b"\n"):
            break
        entries.append(entry)
        end += len(line)
    return entries, end
