"""The in-memory adapter: what a LoRA adapter is, whatever file it came from.

A module changes one base parameter by ΔW = scaling · B · A. Alpha and rank belong to the module, never to the adapter.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, Self

from torch import Tensor

from adaptertools.errors import (
    AdapterError,
    DuplicateTargetError,
    OptionError,
    ShapeError,
    UnsupportedFeatureError,
    count,
)
from adaptertools.module import Feature, Kind, LoraModule, RowSlice, ScaleRule, Target

__all__ = [
    "Adapter",
    "Base",
    "Feature",
    "FullWeight",
    "HistoryEntry",
    "Kind",
    "LoraModule",
    "Origin",
    "RowSlice",
    "RowWeights",
    "ScaleRule",
    "Target",
    "WeightRole",
    "expect_adapter",
    "merge_notes",
    "parse_feature",
]


class WeightRole(StrEnum):
    """Why a whole parameter is stored beside the factors."""

    MODULE = "module"
    """its module was trained in full: a head, an embedding, a norm"""
    BIAS = "bias"
    """the bias of a base layer, trained along with the factors"""
    BASE = "base"
    """stored untrained, so that it travels along: a resized embedding"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullWeight:
    """A whole parameter that replaces that of the base model."""

    weight: Tensor = field(repr=False)
    role: WeightRole = WeightRole.MODULE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowWeights:
    """Trained token rows, which replace rows of an embedding.

    Shapes: rows (len(indices), d)
    """

    indices: tuple[int, ...]
    rows: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape[0] != len(self.indices):
            raise ShapeError(f"trained token rows of shape {tuple(self.rows.shape)} for {len(self.indices)} indices")
        if len(set(self.indices)) != len(self.indices) or min(self.indices, default=0) < 0:
            raise AdapterError(
                f"trained token rows: the indices {list(self.indices)[:8]} are not distinct, or negative"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base model that an adapter belongs to.

    `change` names what an initialisation such as PiSSA did to the base weights before training: the factors then
    belong to the changed weights, not to the published ones. `layer_replication` builds the model of published layers:
    ((0, 4), (2, 5)) are layers 0 to 3 and then 2 to 4. Their weights are the published ones, and the modules count the
    layers of the model that is built. Empty, it is the model as published.
    """

    id: str | None = None
    revision: str | None = None
    change: str | None = None
    layer_replication: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One operation that made an adapter, with its source, settings and the error that it reported."""

    operation: str
    source: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        entry = {**self.details, "operation": self.operation, "source": self.source}
        return {key: _plain(value) for key, value in entry.items() if value is not None}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        details = {key: value for key, value in entry.items() if key not in ("operation", "source")}
        return cls(operation=str(entry.get("operation", "unknown")), source=entry.get("source"), details=details)


def _plain(value: Any) -> Any:
    """JSON knows no infinity, and the error of a value that overflowed is infinite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an adapter was read from, so that a command can write what it read.

    `label` is what messages call it, `name` what histories call it: `org/name@sha/sub/folder` for an adapter of the
    Hub, else the last part of its label. `path` is where it stands on this machine. `options` are the writer options
    that give the same layout again. `base` is what messages call the base model that it was read with.
    """

    format: str
    container: str
    label: str
    path: Path | None = None
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or PurePath(self.label).name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA adapter, independent of any file format.

    `full_weights` and `row_weights` are keyed by the whole name of the base parameter. `bases` is keyed by component,
    "" where there is but one. `metadata` holds what formats say beyond this model, under the format's name. `notes`
    are what the reader found odd; they are said, not stored.

    Raises: AdapterError without any module or weight; DuplicateTargetError for two modules on one target
    """

    modules: tuple[LoraModule, ...] = ()
    full_weights: Mapping[str, FullWeight] = field(default_factory=dict)
    row_weights: Mapping[str, RowWeights] = field(default_factory=dict)
    bases: Mapping[str, Base] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] | None = None
    """aLoRA: the adapter acts only after these tokens"""
    history: tuple[HistoryEntry, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if not self.modules and not self.full_weights and not self.row_weights:
            raise AdapterError("the adapter is empty: it holds no module and no weight")
        seen: set[tuple[str, str]] = set()
        rows: dict[tuple[str, str], list[RowSlice]] = {}
        for module in self.modules:
            key = (module.target.component, module.target.parameter)
            if module.target.rows:
                rows.setdefault(key, []).append(module.target.rows)
            elif key in seen:
                raise DuplicateTargetError(f"two modules change {module.target}")
            else:
                seen.add(key)
        for key, slices in rows.items():
            slices.sort(key=lambda piece: piece.start)
            if key in seen or any(a.stop > b.start for a, b in pairwise(slices)):
                raise DuplicateTargetError(f"two modules change the same rows of {key[1]}")
            if len({piece.total for piece in slices}) > 1:
                raise ShapeError(f"{key[1]}: its slices disagree about the rows of the whole weight")

    def __repr__(self) -> str:
        held = ", ".join(sorted(self.features)) or "nothing else"
        where = f" from {self.origin.label} ({self.origin.format})" if self.origin else ""
        return f"<Adapter{where}: {count(len(self.modules), 'module')}, {held}>"

    @property
    def features(self) -> frozenset[Feature]:
        """Everything beyond plain linear factors that the adapter holds."""
        held = {feature for module in self.modules for feature in module.features}
        roles = {weight.role for weight in self.full_weights.values()}
        if WeightRole.BIAS in roles:
            held.add(Feature.BIAS)
        if roles - {WeightRole.BIAS}:
            held.add(Feature.FULL_WEIGHTS)
        if self.row_weights:
            held.add(Feature.TOKEN_ROWS)
        if any(base.change for base in self.bases.values()):
            held.add(Feature.CHANGED_BASE)
        if any(base.layer_replication for base in self.bases.values()):
            held.add(Feature.LAYER_REPLICATION)
        if self.invocation_tokens is not None:
            held.add(Feature.ALORA)
        return frozenset(held)

    def holders(self, feature: Feature) -> list[str]:
        """The names of the modules and weights that hold a feature, for messages."""
        match feature:
            case Feature.FULL_WEIGHTS:
                return [name for name, weight in self.full_weights.items() if weight.role is not WeightRole.BIAS]
            case Feature.BIAS:
                return [name for name, weight in self.full_weights.items() if weight.role is WeightRole.BIAS]
            case Feature.TOKEN_ROWS:
                return list(self.row_weights)
            case Feature.CHANGED_BASE:
                return [f"{base.change} initialisation" for base in self.bases.values() if base.change]
            case Feature.LAYER_REPLICATION:
                return [_rearranged(base) for base in self.bases.values() if base.layer_replication]
            case Feature.ALORA:
                return ["invocation tokens"] if self.invocation_tokens is not None else []
            case _:
                return [str(module.target) for module in self.modules if feature in module.features]

    def without(self, feature: Feature) -> "Adapter":
        """The adapter with one feature given up: DoRA loses its magnitude, an embedding its whole module."""
        match feature:
            case Feature.DORA:
                return self.map_modules(lambda module: replace(module, magnitude=None))
            case Feature.LORA_BIAS:
                return self.map_modules(lambda module: replace(module, lora_bias=None))
            case Feature.FULL_WEIGHTS | Feature.BIAS:
                dropped = self.holders(feature)
                kept = {name: weight for name, weight in self.full_weights.items() if name not in dropped}
                return replace(self, full_weights=kept)
            case Feature.TOKEN_ROWS:
                return replace(self, row_weights={})
            case Feature.CHANGED_BASE:
                return replace(self, bases={name: replace(base, change=None) for name, base in self.bases.items()})
            case Feature.LAYER_REPLICATION:
                bases = {name: replace(base, layer_replication=()) for name, base in self.bases.items()}
                return replace(self, bases=bases)
            case Feature.ALORA:
                return replace(self, invocation_tokens=None)
            case _:
                return replace(self, modules=tuple(m for m in self.modules if feature not in m.features))

    def map_modules(self, change: Callable[[LoraModule], LoraModule]) -> "Adapter":
        """The adapter with every module replaced by `change(module)`."""
        return replace(self, modules=tuple(change(module) for module in self.modules))

    def then(self, entry: HistoryEntry) -> "Adapter":
        """The adapter with one more operation in its history."""
        return replace(self, history=(*self.history, entry))

    @property
    def naming_advice(self) -> str:
        """What to do about names that could not be turned back into module paths, for messages."""
        base = self.origin.base if self.origin else None
        if base is None:
            return "Read the adapter with --base"
        return f"The base given, {base}, has no weight of that name and shape. Is it the right base model?"

    def check_one_model(self, holder: str) -> None:
        """Make sure that the modules are of one model, as `holder`, "a PEFT folder" say, takes them.

        Raises: UnsupportedFeatureError
        """
        components = sorted({module.target.component for module in self.modules})
        if len(components) > 1:
            raise UnsupportedFeatureError(
                f"the adapter is for several models ({', '.join(components)}), {holder} for one. "
                "Write each with --only 'COMPONENT:*'"
            )

    @property
    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor under a name for messages."""
        named = {f"{module.target}.{name}": t for module in self.modules for name, t in module.tensors.items()}
        named |= {name: weight.weight for name, weight in self.full_weights.items()}
        return named | {f"{name} (token rows)": weights.rows for name, weights in self.row_weights.items()}

    def to_state_dict(self, format: str, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the configuration as the format would write them, in memory.

        Raises: UnsupportedFeatureError if the format cannot carry the adapter
        """
        from adaptertools.api import to_state_dict  # the one import upwards: it lets the method stand where users look

        return to_state_dict(self, format=format, **options)


def expect_adapter(given: object) -> Adapter:
    """The adapter itself.

    Raises: OptionError for its path, for a result that holds it, and for anything else
    """
    if isinstance(given, Adapter):
        return given
    if isinstance(given, str | PurePath):
        advice = f"read it first: adaptertools.read({str(given)!r:.80})"
    elif isinstance(getattr(given, "adapter", None), Adapter):
        advice = "give its .adapter"
    else:
        advice = "adaptertools.read gives one"
    raise OptionError(f"expected an Adapter, found {type(given).__name__}: {advice}")


def _rearranged(base: Base) -> str:
    ranges = [list(layers) for layers in base.layer_replication]
    return (
        f"{base.id or 'base model'} built of layers {ranges}; on the published layers, factors meet others than they "
        "were trained on, or none"
    )


def merge_notes(*notes: Iterable[str]) -> tuple[str, ...]:
    """Notes in order, each once."""
    return tuple(dict.fromkeys(note for group in notes for note in group))


def parse_feature(name: str) -> Feature:
    """The feature with this name.

    Raises: OptionError for any other name
    """
    try:
        return Feature(name)
    except ValueError:
        raise OptionError(f"unknown kind {name!r}: expected one of {', '.join(Feature)}") from None
