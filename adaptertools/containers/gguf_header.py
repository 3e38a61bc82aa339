"""The head of a GGUF file: typed key/value pairs, and where each tensor lies. Little-endian, versions 2 and 3.

    "GGUF", u32 version, u64 tensors, u64 pairs
    pair      name, u32 type, value                     name: u64 length, UTF-8
    tensor    name, u32 axes, u64 size of each axis, the innermost first, u32 type, u64 offset in the data

Stricter than llama.cpp: names without control characters, headers of bounded size, data without gaps.
Source: ggml-org/ggml docs/gguf.md; gguf 0.19.0, gguf/gguf_reader.py
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaptertools.containers.tensorfile import MAX_HEADER_BYTES, check_count, check_name, is_shape
from adaptertools.errors import DamagedFileError, UnsafeFileError, UnsupportedFeatureError

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

_ALIGNMENT_KEY = "general.alignment"
_MOST_AXES = 4
_LONGEST_LIST = 1 << 16
"""Longer lists are vocabularies of base models: passed over."""
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", _UINT32: "I", 5: "i", _FLOAT32: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}

KEY_TYPES: Mapping[str, int] = {
    "adapter.lora.alpha": _FLOAT32,
    "adapter.alora.invocation_tokens": _ARRAY,
    "general.base_model.count": _UINT32,
    "general.quantization_version": _UINT32,
    "general.file_type": _UINT32,
}
"""Keys that are written as something else than text; lists are of uint32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor as the head of a file describes it: its shape outermost axis first, and its type in ggml's numbers."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Everything before the data of a file. Text stands in `metadata` as it is, everything else as JSON."""

    metadata: Mapping[str, str]
    entries: tuple[Entry, ...]
    alignment: int
    start: int
    """The byte at which the data begins."""


def parse(label: str, data: memoryview) -> Head:
    """The head of a file of these bytes.

    Raises: DamagedFileError, UnsafeFileError; UnsupportedFeatureError for big-endian files and version 1
    """
    cursor = _Cursor(label, data)
    _check_version(label, cursor)
    tensors, pairs = cursor.unpack("Q"), cursor.unpack("Q")
    check_count(label, tensors)
    check_count(label, pairs)
    metadata: dict[str, str] = {}
    for _ in range(pairs):
        name = check_name(label, cursor.text())
        if name in metadata:
            raise DamagedFileError(f"{label}: the key {name} stands twice; which one is meant?")
        metadata[name] = _as_text(cursor.value(cursor.unpack("I")))
    alignment = _alignment(label, metadata)
    entries = tuple(_entries(label, cursor, tensors))
    if len({entry.name for entry in entries}) < tensors:
        raise DamagedFileError(f"{label}: two tensors have one name; which one is meant?")
    return Head(metadata=metadata, entries=entries, alignment=alignment, start=padded(cursor.at, alignment))


def build(label: str, entries: Mapping[str, tuple[tuple[int, ...], int, int]], metadata: Mapping[str, str]) -> bytes:
    """The head of a file: for each tensor its shape, type and bytes. Data is aligned to 32 bytes.

    Raises: UnsupportedFeatureError for what GGUF cannot hold
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(metadata))]
    for key, text in metadata.items():
        parts += [_packed_text(check_name(label, key)), *_packed_value(label, key, text)]
    offset = 0
    for name, (shape, kind, nbytes) in entries.items():
        if len(shape) > _MOST_AXES:
            raise UnsupportedFeatureError(f"{label}: {name} has {len(shape)} axes; GGUF holds at most {_MOST_AXES}")
        parts += [_packed_text(check_name(label, name)), struct.pack("<I", len(shape))]
        parts += [struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, offset)]
        offset += padded(nbytes)
    head = b"".join(parts)
    return head.ljust(padded(len(head)), b"\0")


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """The size with what fills it up to the alignment."""
    return size + -size % alignment


class _Cursor:
    """Reads one value after another; what would lie beyond the file, or beyond any header, is an error."""

    def __init__(self, label: str, data: memoryview) -> None:
        self._label, self._data = label, data
        self.at = 0

    def take(self, count: int) -> memoryview:
        end = self.at + count
        if end > len(self._data):
            raise DamagedFileError(
                f"{self._label}: the header reaches to byte {end}, the file has {len(self._data)}. "
                "It was cut off: download or save it again"
            )
        if end > MAX_HEADER_BYTES:
            raise UnsafeFileError(f"{self._label}: a header of more than the {MAX_HEADER_BYTES} bytes accepted")
        taken, self.at = self._data[self.at : end], end
        return taken

    def unpack(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return str(self.take(self.unpack("Q")), "utf-8")
        except UnicodeDecodeError:
            raise DamagedFileError(f"{self._label}: text in the header is no UTF-8 (before byte {self.at})") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._list(self.unpack("I"), self.unpack("Q"))
        return self.unpack(self._code(kind))

    def _list(self, kind: int, count: int) -> list[Any]:
        if kind == _ARRAY:
            raise UnsupportedFeatureError(f"{self._label}: the header holds lists of lists, which no adapter has")
        if kind == _STRING:
            texts = [self.text() for _ in range(count)]
            return texts if count <= _LONGEST_LIST else []
        code = self._code(kind)
        raw = self.take(count * struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{count}{code}", raw)) if count <= _LONGEST_LIST else []

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise DamagedFileError(f"{self._label}: a value of unknown type {kind} in the header (byte {self.at})")
        return _NUMBERS[kind]


def _check_version(label: str, cursor: _Cursor) -> None:
    if bytes(cursor.take(4)) != MAGIC:
        raise DamagedFileError(f"{label}: does not begin with {MAGIC.decode()}")
    version = cursor.unpack("I")
    if version & 0xFFFF == 0:
        raise UnsupportedFeatureError(f"{label}: a big-endian GGUF file. Convert it with gguf_convert_endian.py first")
    if version not in (2, VERSION):
        raise UnsupportedFeatureError(f"{label}: GGUF of version {version}; versions 2 and {VERSION} are read")


def _alignment(label: str, metadata: Mapping[str, str]) -> int:
    text = metadata.get(_ALIGNMENT_KEY, str(ALIGNMENT))
    alignment = int(text) if text.isdecimal() and len(text) < 8 else 0
    if alignment < 1 or alignment & (alignment - 1):
        raise DamagedFileError(f"{label}: {_ALIGNMENT_KEY} is {text:.20}, expected a power of two")
    return alignment


def _entries(label: str, cursor: _Cursor, count: int) -> Iterator[Entry]:
    for _ in range(count):
        name = check_name(label, cursor.text())
        axes = cursor.unpack("I")
        if axes > _MOST_AXES:
            raise DamagedFileError(f"{label}: tensor {name} has {axes} axes; GGUF holds at most {_MOST_AXES}")
        shape = tuple(cursor.unpack("Q") for _ in range(axes))[::-1]
        if not is_shape(shape):
            raise DamagedFileError(f"{label}: tensor {name} has the impossible shape {shape}")
        yield Entry(name=name, shape=tuple(shape), type=cursor.unpack("I"), offset=cursor.unpack("Q"))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed_value(label: str, key: str, text: str) -> Iterator[bytes]:
    kind = KEY_TYPES.get(key, _STRING)
    yield struct.pack("<I", kind)
    if kind == _STRING:
        yield _packed_text(text)
        return
    value = json.loads(text)
    try:
        if kind == _ARRAY:
            yield struct.pack(f"<IQ{len(value)}I", _UINT32, len(value), *value)
        else:
            yield struct.pack(f"<{_NUMBERS[kind]}", value)
    except (struct.error, OverflowError) as error:
        raise UnsupportedFeatureError(f"{label}: {key} cannot be {text:.60} ({error})") from None
