"""At most how much a container and the documents beside it add to the bytes of the tensors."""

from collections.abc import Iterable

_NAMES = 3
"""Times that a name may stand in a file."""

_PER_TENSOR = {"msgpack": 100, "safetensors": 150, "torch": 350, "npz": 350, "orbax": 550}
_MOST_PER_TENSOR = 1000
_PER_LEVEL = {"orbax": 90}
"""For each part of a name that a container splits at `/`."""

_FRAME = 1000
"""What every file has of its own, and what writing adds to the history."""

_DOCUMENT = 150
"""Brackets, and a fingerprint of the weights."""


def room_for_tensors(container: str, names: Iterable[str]) -> int:
    """Bytes for the headers of these tensors, and for the frame around them."""
    each, level = _PER_TENSOR.get(container, _MOST_PER_TENSOR), _PER_LEVEL.get(container, 0)
    return _FRAME + sum(each + _NAMES * len(name.encode()) + level * (1 + name.count("/")) for name in names)


def room_for_document(text: str, copies: int = 1) -> int:
    """Bytes for a JSON document; twice its text where it is quoted, or keeps the one that it replaces."""
    return _DOCUMENT + copies * len(text.encode())
