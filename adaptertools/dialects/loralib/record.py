"""What a loralib file cannot say, as the JSON beside it or in its header says it.

format, version                       "loralib", 1
lora_alpha                            the alpha to build every layer with; null: each layer's own r
layers: {NAME: …}                     by the name of the layer
    layer                             loralib's class: Linear, Embedding, MergedLinear, Conv2d
    r, lora_alpha                     the arguments of its constructor
    fan_in_fan_out, enable_lora       the same; null where unknown or of no meaning
    weight_shape                      of the base weight, where it does not follow from the factors
    alpha, scale_rule                 the adapter's own terms for the same scaling
    folded                            {alpha, scale_rule} before the scaling was folded into lora_B
stored_weights: {NAME: role}          whole weights that ride along: module, bias, base
bases, metadata, history              of the adapter
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptertools.adapter import Adapter, Base, Kind, LoraModule, ScaleRule, WeightRole
from adaptertools.dialects.loralib.layout import Layout
from adaptertools.errors import ConfigError, few

_CLASSES = {"Linear": Kind.LINEAR, "MergedLinear": Kind.LINEAR, "Embedding": Kind.EMBEDDING, "Conv2d": Kind.CONV}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What the record says of one layer."""

    layout: Layout
    alpha: float
    scale_rule: ScaleRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record, read."""

    lora_alpha: float | None = None
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    weights: Mapping[str, WeightRole] = field(default_factory=dict)
    bases: Mapping[str, Base] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def layer_json(modules: list[LoraModule], lora_alpha: float | None, slots: tuple[bool, ...] | None) -> dict[str, Any]:
    """The record of one layer. `lora_alpha` is None where the scaling was folded into lora_B."""
    first = modules[0]
    kinds = {Kind.EMBEDDING: "Embedding", Kind.CONV: "Conv2d"}
    own_terms = {"alpha": float(first.alpha), "scale_rule": first.scale_rule.value}
    terms: dict[str, Any] = own_terms
    if lora_alpha is None and first.scaling != 1.0:
        terms = {"alpha": float(first.nominal_rank), "scale_rule": ScaleRule.ALPHA_OVER_RANK.value, "folded": own_terms}
    return {
        "layer": kinds.get(first.kind, "MergedLinear" if slots else "Linear"),
        "r": first.nominal_rank,
        "lora_alpha": float(first.nominal_rank) if lora_alpha is None else lora_alpha,
        "fan_in_fan_out": None if first.kind in kinds else first.transposed,
        "enable_lora": list(slots) if slots else None,
        "weight_shape": list(first.shape) if first.shape else None,
        **terms,
    }


def record_json(adapter: Adapter, lora_alpha: float | None, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an adapter, without its history."""
    return {
        "format": "loralib",
        "version": 1,
        "lora_alpha": lora_alpha,
        "layers": dict(layers),
        "stored_weights": {name: weight.role.value for name, weight in adapter.full_weights.items()},
        "bases": {name: {"id": base.id, "revision": base.revision} for name, base in adapter.bases.items()},
        "metadata": dict(adapter.metadata),
    }


def parse_record(label: str, document: Mapping[str, Any]) -> Record:
    """Raises: ConfigError that names the entry"""
    lora_alpha = _get(label, document, "lora_alpha", int | float | None)
    layers = _get(label, document, "layers", dict | None) or {}
    weights = _get(label, document, "stored_weights", dict | None) or {}
    bases = _get(label, document, "bases", dict | None) or {}
    try:
        roles = {name: WeightRole(role) for name, role in weights.items()}
    except ValueError as error:
        raise ConfigError(f"{label}: stored_weights: {error}") from None
    return Record(
        lora_alpha=lora_alpha,
        layers={name: _parse_layer(f"{label}: layers: {name}", entry) for name, entry in layers.items()},
        weights=roles,
        bases={name: _parse_base(f"{label}: bases: {name}", entry) for name, entry in bases.items()},
        metadata=_get(label, document, "metadata", dict | None) or {},
    )


def _parse_layer(label: str, entry: Any) -> LayerRecord:
    if not isinstance(entry, dict):
        raise ConfigError(f"{label} is {entry!r}, expected an object")
    name = _get(label, entry, "layer", str)
    if name not in _CLASSES:
        raise ConfigError(f"{label}: layer is {name!r}, expected one of {', '.join(_CLASSES)}")
    kind = _CLASSES[name]
    slots = _get(label, entry, "enable_lora", list | None)
    shape = _get(label, entry, "weight_shape", list | None)
    if slots is not None and (not slots or not all(isinstance(slot, bool) for slot in slots) or not any(slots)):
        raise ConfigError(f"{label}: enable_lora is {slots}, expected a list of true and false")
    if shape is not None and not all(
        isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape
    ):
        raise ConfigError(f"{label}: weight_shape is {shape}, expected positive whole numbers")
    if kind is Kind.CONV and (shape is None or len(shape) != 4):
        raise ConfigError(f"{label}: weight_shape is {shape}, expected the four sizes of a convolution")
    rule = _get(label, entry, "scale_rule", str)
    if rule not in list(ScaleRule):
        raise ConfigError(f"{label}: scale_rule is {rule!r}, expected one of {', '.join(ScaleRule)}")
    layout = Layout(
        kind=kind,
        slots=tuple(slots) if slots else None,
        transposed=True if kind is Kind.EMBEDDING else _get(label, entry, "fan_in_fan_out", bool | None),
        kernel=shape[-1] if kind is Kind.CONV and shape else None,
        shape=tuple(shape) if shape else None,
    )
    return LayerRecord(layout=layout, alpha=_get(label, entry, "alpha", int | float), scale_rule=ScaleRule(rule))


def _parse_base(label: str, entry: Any) -> Base:
    if not isinstance(entry, dict):
        raise ConfigError(f"{label} is {entry!r}, expected an object")
    return Base(id=_get(label, entry, "id", str | None), revision=_get(label, entry, "revision", str | None))


def _get(label: str, document: Mapping[str, Any], key: str, kind: Any) -> Any:
    value = document.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind != bool | None):
        raise ConfigError(f"{label}: {key} is {value!r}, expected {getattr(kind, '__name__', kind)}")
    return value


def building_notes(layers: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What to build the model with, so that it takes the file and acts as the adapter does."""
    alphas = {(entry["lora_alpha"], entry["r"]) for entry in layers.values()}
    if len({alpha for alpha, _ in alphas}) == 1:
        (alpha,) = {alpha for alpha, _ in alphas}
        notes = [f"the file cannot say alpha: build the model with lora_alpha={_number(alpha)}"]
    else:
        pairs = ", ".join(f"{_number(alpha)} at r={r}" for alpha, r in sorted(alphas))
        notes = [f"the file cannot say alpha: build each layer with lora_alpha equal to its r ({pairs})"]
    turned = [name for name, entry in layers.items() if entry["fan_in_fan_out"]]
    if turned:
        notes.append(f"build with fan_in_fan_out=True: {few(turned)}")
    merged: dict[tuple[bool, ...], list[str]] = {}
    for name, entry in layers.items():
        if entry["enable_lora"]:
            merged.setdefault(tuple(entry["enable_lora"]), []).append(name)
    notes += [f"build as MergedLinear with enable_lora={list(slots)}: {few(names)}" for slots, names in merged.items()]
    return tuple(notes)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
