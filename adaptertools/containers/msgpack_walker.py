"""Walks the structure of a msgpack document and leaves its payloads where they are.

The msgpack library has no way past a payload but to copy it: reading a file of 1 GB with it takes another gigabyte.
"""

import struct
from dataclasses import dataclass
from mmap import mmap

from adaptertools.containers.tensorfile import MAX_DEPTH, check_count
from adaptertools.errors import DamagedFileError, UnsafeFileError

_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_SIZED = {  # kind, and the bytes of its length
    0xC4: ("binary", 1),
    0xC5: ("binary", 2),
    0xC6: ("binary", 4),
    0xC7: ("extension", 1),
    0xC8: ("extension", 2),
    0xC9: ("extension", 4),
    0xD9: ("text", 1),
    0xDA: ("text", 2),
    0xDB: ("text", 4),
    0xDC: ("array", 2),
    0xDD: ("array", 4),
    0xDE: ("map", 2),
    0xDF: ("map", 4),
}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that stand in the document from `start` to `stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Extension(Span):
    """The payload of an extension type."""

    code: int


class Walker:
    """Reads the one document that fills `data` from `start` to `stop`."""

    def __init__(self, label: str, data: mmap, start: int = 0, stop: int | None = None) -> None:
        self._label = label
        self._data = data
        self._position = start
        self._stop = len(data) if stop is None else stop
        self._visited = 0

    def document(self) -> object:
        """Maps, arrays, numbers and texts as Python objects; binary data and extensions as Spans.

        Raises: DamagedFileError; UnsafeFileError for endless nesting
        """
        value = self._value(0)
        if self._position != self._stop:
            raise self._damaged(f"{self._stop - self._position} bytes follow the end of the document")
        return value

    def _value(self, depth: int) -> object:
        self._visited += 1
        check_count(self._label, self._visited)
        if depth > MAX_DEPTH:
            raise UnsafeFileError(f"{self._label}: nested deeper than {MAX_DEPTH} levels")
        code = self._take(1)[0]
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            form = _NUMBERS[code]
            return struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return self._sized(*self._kind_and_length(code), depth)

    def _kind_and_length(self, code: int) -> tuple[str, int]:
        if code <= 0x8F:
            return "map", code & 0x0F
        if code <= 0x9F:
            return "array", code & 0x0F
        if code <= 0xBF:
            return "text", code & 0x1F
        if code in _FIXED_EXTENSIONS:
            return "extension", _FIXED_EXTENSIONS[code]
        if code not in _SIZED:
            raise self._damaged(f"byte {code:#x} begins no value")
        kind, width = _SIZED[code]
        return kind, int.from_bytes(self._take(width), "big")

    def _sized(self, kind: str, length: int, depth: int) -> object:
        match kind:
            case "map":
                return self._map(length, depth)
            case "array":
                return [self._value(depth + 1) for _ in range(length)]
            case "text":
                return self._text(length)
            case "binary":
                return self._skip(length)
            case _:
                code = struct.unpack("b", self._take(1))[0]
                span = self._skip(length)
                return Extension(span.start, span.stop, code)

    def _map(self, length: int, depth: int) -> dict[object, object]:
        entries: dict[object, object] = {}
        for _ in range(length):
            key = self._value(depth + 1)
            if not isinstance(key, str | int):
                raise self._damaged(f"a key is {key!r:.40}, expected text or a whole number")
            if key in entries:
                raise self._damaged(f"key {key!r:.80} stands twice in one map; which one is meant?")
            entries[key] = self._value(depth + 1)
        return entries

    def _text(self, length: int) -> str:
        raw = self._take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"a text is not UTF-8: {raw!r:.80}") from None

    def _take(self, length: int) -> bytes:
        span = self._skip(length)
        return self._data[span.start : span.stop]

    def _skip(self, length: int) -> Span:
        start, self._position = self._position, self._position + length
        if self._position > self._stop:
            raise self._damaged(f"{length} bytes are announced, {max(0, self._stop - start)} are left")
        return Span(start, self._position)

    def _damaged(self, what: str) -> DamagedFileError:
        return DamagedFileError(
            f"{self._label}, near byte {min(self._position, self._stop)}: {what}. "
            "It was cut off or damaged, or is no msgpack file: download or save it again"
        )
