"""The in-memory adapter: what a LoRA adapter is, whatever file it came from.

A module changes one base parameter by ΔW = scaling · B · A. Alpha and rank belong to the module, never to the adapter.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, Self

import torch
from torch import Tensor

from adaptertools.errors import (
    AdapterError,
    ConfigError,
    DuplicateTargetError,
    EmptyFactorError,
    OptionError,
    ShapeError,
    UnsupportedFeatureError,
)


class ScaleRule(StrEnum):
    """How `alpha` becomes the scaling of a module."""

    ALPHA_OVER_RANK = "alpha/r"
    ALPHA_OVER_SQRT_RANK = "alpha/sqrt(r)"
    """rsLoRA"""
    DIRECT = "direct"
    """`alpha` is the scaling itself, as formats without an alpha state it"""

    def scaling(self, alpha: float, rank: int) -> float:
        match self:
            case ScaleRule.ALPHA_OVER_RANK:
                return alpha / rank
            case ScaleRule.ALPHA_OVER_SQRT_RANK:
                return alpha / math.sqrt(rank)
            case ScaleRule.DIRECT:
                return alpha

    def alpha(self, scaling: float, rank: int) -> float:
        """The alpha that gives exactly this scaling, or the nearest one where no float does."""
        match self:
            case ScaleRule.ALPHA_OVER_RANK:
                guess = scaling * rank
            case ScaleRule.ALPHA_OVER_SQRT_RANK:
                guess = scaling * math.sqrt(rank)
            case ScaleRule.DIRECT:
                return scaling
        neighbours = (guess, round(guess), math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
        return min((float(alpha) for alpha in neighbours), key=lambda alpha: abs(self.scaling(alpha, rank) - scaling))


class Kind(StrEnum):
    """What sort of parameter a module changes; it settles orientation and how formats name the factors."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONV = "conv"
    PARAMETER = "parameter"
    """a bare `nn.Parameter`: two-dimensional, or a stack of experts"""


class Feature(StrEnum):
    """What an adapter may hold beyond plain linear factors, and a format may be unable to carry."""

    DORA = "dora"
    LORA_BIAS = "lora-bias"
    CONV = "conv"
    EMBEDDING = "embedding"
    PARAMETER = "parameter"
    FUSED_ROWS = "fused-rows"
    FULL_WEIGHTS = "full-weights"
    BIAS = "bias"
    TOKEN_ROWS = "token-rows"
    CHANGED_BASE = "changed-base"
    ALORA = "alora"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSlice:
    """Rows `start` to `stop` of a fused weight with `total` output rows."""

    start: int
    stop: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.total:
            raise ShapeError(f"rows {self.start}:{self.stop} do not lie in a weight of {self.total} rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The base parameter that a module changes.

    `parameter` has no trailing `.weight`; `component` names the model in files that hold several; `rows` selects a
    slice of a fused projection; an `opaque` name could not be turned back into a module path.
    """

    parameter: str
    component: str = ""
    rows: RowSlice | None = None
    opaque: bool = False

    def __str__(self) -> str:
        rows = f"[{self.rows.start}:{self.rows.stop}]" if self.rows else ""
        return f"{self.component}{':' if self.component else ''}{self.parameter}{rows}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraModule:
    """One adapted base parameter.

    `shape` is the weight's own shape where B·A has to be reshaped to it (convolutions, einsum kernels).
    `transposed` says that the base weight is stored (in, out); None where unknown, then (out, in) is assumed.
    `magnitude` makes it DoRA; its axis is that of the (out, in) matrix. `lora_bias` is scaled like B·A.

    Shapes: lora_A (r, in), lora_B (out, r); for a stack of experts (E, r, in), (E, out, r)
            magnitude (out,) or (in,); lora_bias (out,)
    Raises: ShapeError, EmptyFactorError, ConfigError, each naming the target
    """

    target: Target
    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    scale_rule: ScaleRule = ScaleRule.ALPHA_OVER_RANK
    kind: Kind = Kind.LINEAR
    shape: tuple[int, ...] | None = None
    transposed: bool | None = None
    magnitude: Tensor | None = None
    magnitude_axis: Literal["out", "in"] = "out"
    lora_bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name, factor in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            if factor.numel() == 0 or factor.ndim < 2:
                raise EmptyFactorError(
                    f"{self.target}: {name} has shape {tuple(factor.shape)}, expected two or three dimensions and no "
                    "zero. DeepSpeed ZeRO-3 saves such empty shards when the parameters were not gathered: "
                    "save again with zero_to_fp32.py or stage3_gather_16bit_weights_on_model_save"
                )
            if not factor.is_floating_point():
                raise ShapeError(f"{self.target}: {name} has dtype {factor.dtype}, expected a floating-point one")
        shapes = f"lora_A {tuple(self.lora_A.shape)} and lora_B {tuple(self.lora_B.shape)}"
        if self.lora_A.ndim != self.lora_B.ndim or self.lora_A.ndim > 3:
            raise ShapeError(f"{self.target}: {shapes} must both have two dimensions, or three for a stack of experts")
        if self.lora_A.shape[-2] != self.lora_B.shape[-1]:
            raise ShapeError(
                f"{self.target}: {shapes} disagree about the rank: {self.lora_A.shape[-2]} and {self.lora_B.shape[-1]}"
            )
        if self.lora_A.ndim == 3 and self.lora_A.shape[0] != self.lora_B.shape[0]:
            raise ShapeError(f"{self.target}: {shapes} disagree about the number of experts")
        if self.shape is not None and math.prod(self.shape) != self.out_features * self.in_features:
            raise ShapeError(f"{self.target}: {shapes} do not give a weight of shape {self.shape}")
        if self.target.rows and self.target.rows.stop - self.target.rows.start != self.out_features:
            raise ShapeError(f"{self.target}: lora_B has {self.out_features} rows, the slice is of another size")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha):
            raise ConfigError(f"{self.target}: alpha is {self.alpha!r}, expected a finite number")
        features = {"out": self.out_features, "in": self.in_features}
        for name, vector, size in (
            ("magnitude", self.magnitude, features[self.magnitude_axis]),
            ("lora_bias", self.lora_bias, self.out_features),
        ):
            if vector is not None and tuple(vector.shape) != (size,):
                raise ShapeError(f"{self.target}: {name} has shape {tuple(vector.shape)}, expected ({size},)")

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def scaling(self) -> float:
        return self.scale_rule.scaling(self.alpha, self.rank)

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[-1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[-2]

    @property
    def experts(self) -> int | None:
        """The number of experts of a stack, else None."""
        return self.lora_A.shape[0] if self.lora_A.ndim == 3 else None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the base weight, fused rows and orientation included."""
        if self.shape is not None:
            return self.shape
        out = self.target.rows.total if self.target.rows else self.out_features
        matrix = (self.in_features, out) if self.transposed else (out, self.in_features)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The module's tensors by field name."""
        named = {
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "magnitude": self.magnitude,
            "lora_bias": self.lora_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def features(self) -> frozenset[Feature]:
        held = {
            Feature.DORA: self.magnitude is not None,
            Feature.LORA_BIAS: self.lora_bias is not None,
            Feature.CONV: self.kind is Kind.CONV,
            Feature.EMBEDDING: self.kind is Kind.EMBEDDING,
            Feature.PARAMETER: self.kind is Kind.PARAMETER,
            Feature.FUSED_ROWS: self.target.rows is not None,
        }
        return frozenset(feature for feature, present in held.items() if present)

    def delta_weight(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        base_weight: Tensor | None = None,
    ) -> Tensor:
        """What the module adds to the base weight, in the orientation of the base weight.

        A slice of a fused projection gives the whole fused weight, zero outside its rows. DoRA depends on the base
        weight: ΔW = m · V/‖V‖ − W with V = W + s·B·A.

        Memory: one weight in float32 (float64 where asked for); two for DoRA
        Raises: UnsupportedFeatureError for DoRA without `base_weight`
        """
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        lora_A, lora_B = (factor.to(device=device, dtype=compute) for factor in (self.lora_A, self.lora_B))
        delta = (lora_B @ lora_A) * self.scaling
        if self.magnitude is not None:
            delta = self._dora_delta(delta, base_weight)
        return self._as_base_weight(delta).to(dtype)

    def _dora_delta(self, delta: Tensor, base_weight: Tensor | None) -> Tensor:
        if base_weight is None:
            raise UnsupportedFeatureError(
                f"{self.target}: DoRA renormalises the base weight, so its delta weight needs `base_weight`"
            )
        assert self.magnitude is not None
        weight = base_weight.to(delta)
        weight = (weight.T if self.transposed else weight).reshape(delta.shape)
        axis = 1 if self.magnitude_axis == "out" else 0
        direction = weight + delta
        magnitude = self.magnitude.to(delta).unsqueeze(axis)
        return magnitude * direction / direction.norm(dim=axis, keepdim=True) - weight

    def _as_base_weight(self, delta: Tensor) -> Tensor:
        if self.target.rows:
            whole = delta.new_zeros(self.target.rows.total, self.in_features)
            whole[self.target.rows.start : self.target.rows.stop] = delta
            delta = whole
        if self.shape is not None:
            return delta.reshape(self.shape)
        return delta.transpose(-1, -2) if self.transposed else delta


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

    weight: Tensor
    role: WeightRole = WeightRole.MODULE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowWeights:
    """Trained token rows, which replace rows of an embedding.

    Shapes: rows (len(indices), d)
    """

    indices: tuple[int, ...]
    rows: Tensor

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape[0] != len(self.indices):
            raise ShapeError(f"trained token rows of shape {tuple(self.rows.shape)} for {len(self.indices)} indices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base model that an adapter belongs to.

    `change` names what an initialisation such as PiSSA did to the base weights before training: the factors then
    belong to the changed weights, not to the published ones.
    """

    id: str | None = None
    revision: str | None = None
    change: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One operation that made an adapter, with its source, settings and the error that it reported."""

    operation: str
    source: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        entry = {"operation": self.operation, "source": self.source, **self.details}
        return {key: value for key, value in entry.items() if value is not None}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        details = {key: value for key, value in entry.items() if key not in ("operation", "source")}
        return cls(operation=str(entry.get("operation", "unknown")), source=entry.get("source"), details=details)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an adapter was read from, so that a command can write what it read.

    `options` are the writer options that give the same layout again.
    """

    format: str
    container: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)


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
            if key in seen or any(a.stop > b.start for a, b in zip(slices, slices[1:], strict=False)):
                raise DuplicateTargetError(f"two modules change the same rows of {key[1]}")

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
                return [f"{base.id or 'base model'} ({base.change})" for base in self.bases.values() if base.change]
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
