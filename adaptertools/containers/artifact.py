"""What a format hands over to be stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptertools.tensors import NamedTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What a format writes: one tensor file and the JSON documents beside it.

    `stem` is the tensor file's name in a folder, without the container's suffix; it has no meaning for formats that are
    one file. `documents` are keyed by file name, or by what is added to the file's name. `sidecar` is the key of the
    document that carries the history where the container has no header for it. `notes` say what the user has to know
    to use the result. `hashes` computes entries of `metadata` from all tensors when the file is written; until then
    something of the same length stands there.
    """

    tensors: NamedTensors
    stem: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sidecar: str
    notes: tuple[str, ...] = ()
    hashes: Callable[[], Mapping[str, str]] | None = None
