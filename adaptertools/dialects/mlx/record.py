"""What our own files say of themselves in their safetensors header, under `adaptertools`: how to read them back.

    ranks          module: its rank, where zeros were added to reach that of the file
    embeddings     modules that are embeddings; stated where names alone would mislead
    experts        module of a stack: `names` with {} for the expert's number, and `ranks`, 0 where there is no module
    gate_up        parameter: the two modules that hold its halves
    names          module: the parameter that it was written from, where that has another name
    revision       that of the base model

mlx-lm reads none of it and does not keep it: what it trains on is a file of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from adaptertools.containers.history import HEADER_KEY
from adaptertools.containers.jsonfile import parse_object
from adaptertools.errors import ConfigError

_NAME = "mlx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of one file; empty for files of others."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    embeddings: tuple[str, ...] | None = None
    experts: Mapping[str, "Experts"] = field(default_factory=dict)
    gate_up: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Only what is said."""
        said: dict[str, Any] = {
            "ranks": dict(self.ranks),
            "experts": {name: {"names": e.names, "ranks": list(e.ranks)} for name, e in self.experts.items()},
            "gate_up": {name: list(halves) for name, halves in self.gate_up.items()},
            "names": dict(self.names),
            "revision": self.revision,
        }
        kept = {key: value for key, value in said.items() if value}
        return kept if self.embeddings is None else {**kept, "embeddings": list(self.embeddings)}

    @classmethod
    def read(cls, metadata: Mapping[str, str], label: str) -> Self:
        """The record in a header; empty where there is none.

        Raises: ConfigError if it is malformed
        """
        if HEADER_KEY not in metadata:
            return cls()
        where = f"{label}: header entry {HEADER_KEY!r}"
        said = parse_object(where, metadata[HEADER_KEY]).get(_NAME) or {}
        try:
            embeddings = said.get("embeddings")
            return cls(
                ranks={_text(name): _count(rank) for name, rank in said.get("ranks", {}).items()},
                embeddings=None if embeddings is None else tuple(map(_text, embeddings)),
                experts={_text(name): Experts.parse(entry) for name, entry in said.get("experts", {}).items()},
                gate_up={_text(name): _two(halves) for name, halves in said.get("gate_up", {}).items()},
                names={_text(name): _text(parameter) for name, parameter in said.get("names", {}).items()},
                revision=None if said.get("revision") is None else _text(said["revision"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where}: the record of how the file was written is malformed ({error})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The modules that one stack stands for."""

    names: str
    ranks: tuple[int, ...]

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Self:
        """Raises: KeyError, TypeError, ValueError if it is malformed"""
        names = _text(entry["names"])
        if names.count("{}") != 1:
            raise ValueError(f"names is {names!r:.80}")
        return cls(names=names, ranks=tuple(_count(rank, least=0) for rank in entry["ranks"]))

    def name(self, expert: int) -> str:
        """The name of one expert's module."""
        return self.names.replace("{}", str(expert))


def header(record: Record) -> dict[str, Any]:
    """The record as it stands in the header's entry, beside the history."""
    said = record.to_json()
    return {_NAME: said} if said else {}


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r:.40} is no name")
    return value


def _count(value: object, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r:.40} is no rank")
    return value


def _two(halves: Any) -> tuple[str, str]:
    gate, up = halves
    return _text(gate), _text(up)
