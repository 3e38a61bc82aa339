"""`flax_adapter.json`, layout adaptertools-flax/1: what a Flax tree cannot say, so that the adapter comes back whole.

format, version             "adaptertools-flax", 1
dialect, naming             nnx, qwix or gemma; hf, tunix-llama, tunix-gemma, gemma or maxtext
scale_folded                whether lora_b holds the scale, as in nnx and gemma, which have none
r, lora_alpha, scaling      of most modules; scaling is alpha/r, alpha/sqrt(r), or none: lora_alpha is the scale itself
rank_pattern, alpha_pattern of the others, by the module's whole name
scan                        null, or {axis, length, at}
base_model_name_or_path, dtype
layer_prefix, head_dim, arch, bases, metadata, history      where there is something to say
modules                     by name, what else is special about one: see Record
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from adaptertools.adapter import Adapter, Base, ScaleRule
from adaptertools.containers.history import HEADER_KEY
from adaptertools.dialects.flax.names import NAMINGS
from adaptertools.dialects.flax.tree import Dialect
from adaptertools.errors import ConfigError
from adaptertools.tensors import DTYPES, dtype_name

STEM = "flax_adapter"
NAME = f"{STEM}.json"
FORMAT = "adaptertools-flax"
VERSION = 1

_RULES = {
    ScaleRule.ALPHA_OVER_RANK: "alpha/r",
    ScaleRule.ALPHA_OVER_SQRT_RANK: "alpha/sqrt(r)",
    ScaleRule.DIRECT: "none",
}
_RULES_BY_NAME = {name: rule for rule, name in _RULES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What the sidecar says of one module.

    `factor` is what lora_b holds beyond lora_B; `restores` whether dividing by it gives lora_B back bit for bit.
    `rows` are the module's own of its leaf's rank, where modules of different lora_A or rank share a leaf; `absent`
    says that the leaf is only filled up with zeros there. The dtypes are those before the leaf's.
    """

    rank: int
    alpha: float
    rule: ScaleRule
    factor: float = 1.0
    restores: bool = True
    rows: tuple[int, int] | None = None
    absent: bool = False
    lora_A_dtype: torch.dtype | None = None
    lora_B_dtype: torch.dtype | None = None
    transposed: bool | None = None
    shape: tuple[int, ...] | None = None
    component: str = ""
    opaque: bool = False

    @property
    def scaling(self) -> float:
        return self.rule.scaling(self.alpha, self.rank)

    def special(self, folded: bool) -> dict[str, Any]:
        """What the defaults of the document do not say."""
        said: dict[str, Any] = {}
        if self.factor != (self.scaling if folded else 1.0):
            said["factor"] = self.factor
        if self.restores != is_power_of_two(self.factor):
            said["restores"] = self.restores
        if self.rows is not None:
            said["rows"] = list(self.rows)
        for name in ("lora_A_dtype", "lora_B_dtype"):
            if (dtype := getattr(self, name)) is not None:
                said[name] = dtype_name(dtype)
        said |= {name: True for name in ("absent", "opaque") if getattr(self, name)}
        said |= {"transposed": self.transposed} if self.transposed is not None else {}
        said |= {"shape": list(self.shape)} if self.shape is not None else {}
        return said | ({"component": self.component} if self.component else {})


def is_power_of_two(factor: float) -> bool:
    """Whether dividing by it undoes a multiplication bit for bit, short of the ends of the exponent's range."""
    return math.frexp(abs(factor))[0] == 0.5


def build(
    adapter: Adapter, records: Mapping[str, Record], *, dialect: Dialect, folded: bool, dtype: str, **layout: Any
) -> dict[str, Any]:
    """The document for an adapter whose modules were written as `records` say."""
    present = [record for record in records.values() if not record.absent]
    rank, alpha, rule = (
        Counter(getattr(record, name) for record in present).most_common(1)[0][0] for name in ("rank", "alpha", "rule")
    )
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dialect": dialect.value,
        "scale_folded": folded,
        "r": rank,
        "lora_alpha": alpha,
        "scaling": _RULES[rule],
        "rank_pattern": {key: record.rank for key, record in records.items() if record.rank != rank},
        "alpha_pattern": {key: record.alpha for key, record in records.items() if record.alpha != alpha},
        "base_model_name_or_path": adapter.bases[""].id if "" in adapter.bases else None,
        "dtype": dtype,
        "scan": None,
        **{name: value for name, value in layout.items() if value is not None},
    }
    modules = {key: record.special(folded) for key, record in records.items()}
    for key, record in records.items():
        if record.rule is not rule:
            modules[key]["scaling"] = _RULES[record.rule]
    bases = {name: _base_json(base) for name, base in adapter.bases.items()}
    if any(name or base.keys() != {"id"} for name, base in bases.items()):
        document["bases"] = bases
    if adapter.metadata:
        document["metadata"] = dict(adapter.metadata)
    if special := {key: said for key, said in modules.items() if said}:
        document["modules"] = special
    return document


def _base_json(base: Base) -> dict[str, Any]:
    said = {"id": base.id, "revision": base.revision, "change": base.change}
    return {name: value for name, value in said.items() if value is not None}


def header(document: Mapping[str, Any]) -> dict[str, str]:
    """The header of a safetensors file, so that the tree is understood without the document beside it."""
    return {"format": "flax", HEADER_KEY: json.dumps(document, sort_keys=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """A sidecar that was read and found sound."""

    label: str
    document: Mapping[str, Any]
    dialect: Dialect
    naming: str
    folded: bool
    layer_prefix: str | None
    arch: str | None
    head_dim: int | None
    scan_axis: int | None
    scan_at: str | None
    bases: Mapping[str, Base]
    metadata: Mapping[str, Any]
    _modules: Mapping[str, Any] = field(default_factory=dict)

    def record(self, key: str) -> Record:
        """What is said of one module, by its whole name.

        Raises: ConfigError
        """
        said = self._modules.get(key, {})
        where = f"{self.label}: modules: {key}"
        rank = _typed(where, self._pattern("rank_pattern").get(key, self.document.get("r")), int, "rank")
        alpha = _number(where, self._pattern("alpha_pattern").get(key, self.document.get("lora_alpha")), "alpha")
        name = _typed(where, said.get("scaling", self.document.get("scaling", "alpha/r")), str, "scaling")
        if name not in _RULES_BY_NAME or rank < 1:
            raise ConfigError(
                f"{where}: scaling {name!r} at rank {rank}; expected {', '.join(_RULES_BY_NAME)} and a rank above 0"
            )
        rule = _RULES_BY_NAME[name]
        factor = _number(where, said.get("factor", rule.scaling(alpha, rank) if self.folded else 1.0), "factor")
        rows, shape = said.get("rows"), said.get("shape")
        return Record(
            rank=rank,
            alpha=alpha,
            rule=rule,
            factor=factor,
            restores=bool(said.get("restores", is_power_of_two(factor))) and factor != 0,
            rows=_numbers(where, rows, "rows", 2) if rows is not None else None,  # type: ignore[arg-type]
            absent=bool(said.get("absent", False)),
            lora_A_dtype=_dtype(where, said.get("lora_A_dtype")),
            lora_B_dtype=_dtype(where, said.get("lora_B_dtype")),
            transposed=_optional(where, said.get("transposed"), bool, "transposed"),
            shape=_numbers(where, shape, "shape") if shape is not None else None,
            component=_typed(where, said.get("component", ""), str, "component"),
            opaque=bool(said.get("opaque", False)),
        )

    def _pattern(self, name: str) -> Mapping[str, Any]:
        pattern: dict[str, Any] = _typed(self.label, self.document.get(name, {}), dict, name)
        return pattern


def parse(label: str, document: Mapping[str, Any]) -> Sidecar:
    """A sidecar of this layout.

    Raises: ConfigError if it is of another, or malformed
    """
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise ConfigError(
            f"{label}: format {document.get('format')!r} version {document.get('version')!r}; "
            f"expected {FORMAT!r} version {VERSION}"
        )
    dialect = document.get("dialect")
    if dialect not in (Dialect.NNX, Dialect.QWIX, Dialect.GEMMA):
        raise ConfigError(f"{label}: dialect {dialect!r}, expected nnx, qwix or gemma")
    if document.get("naming", "hf") not in ("hf", *NAMINGS):
        raise ConfigError(f"{label}: naming {document['naming']!r}, expected hf, {', '.join(NAMINGS)}")
    scan = _typed(label, document.get("scan") or {}, dict, "scan")
    base = _optional(label, document.get("base_model_name_or_path"), str, "base_model_name_or_path")
    bases = document.get("bases", {"": {"id": base}} if base is not None else {})
    modules = _typed(label, document.get("modules", {}), dict, "modules")
    for key, said in modules.items():
        _typed(label, said, dict, f"modules: {key}")
    return Sidecar(
        label=label,
        document=document,
        dialect=Dialect(dialect),
        naming=document.get("naming", "hf"),
        folded=_typed(label, document.get("scale_folded", dialect != Dialect.QWIX), bool, "scale_folded"),
        layer_prefix=_optional(label, document.get("layer_prefix"), str, "layer_prefix"),
        arch=_optional(label, document.get("arch"), str, "arch"),
        head_dim=_optional(label, document.get("head_dim"), int, "head_dim"),
        scan_axis=_optional(label, scan.get("axis"), int, "scan: axis"),
        scan_at=_optional(label, scan.get("at"), str, "scan: at"),
        metadata=_typed(label, document.get("metadata", {}), dict, "metadata"),
        bases={name: _base(label, said) for name, said in _typed(label, bases, dict, "bases").items()},
        _modules=modules,
    )


def _base(label: str, said: object) -> Base:
    values = _typed(label, said, dict, "bases")
    return Base(
        **{name: _optional(label, values.get(name), str, f"bases: {name}") for name in ("id", "revision", "change")}
    )


def _typed(where: str, value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: {name} is {value!r:.80}, expected {kind.__name__}")
    return value


def _optional(where: str, value: Any, kind: type, name: str) -> Any:
    return None if value is None else _typed(where, value, kind, name)


def _number(where: str, value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: {name} is {value!r:.80}, expected a number")
    return value


def _numbers(where: str, value: Any, name: str, count: int | None = None) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or any(type(n) is not int or n < 0 for n in value)
        or count not in (None, len(value))
    ):
        raise ConfigError(f"{where}: {name} is {value!r:.80}, expected whole numbers")
    return tuple(value)


def _dtype(where: str, name: Any) -> torch.dtype | None:
    if name is None:
        return None
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(f"{where}: dtype {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]
