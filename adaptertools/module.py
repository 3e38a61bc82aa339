"""One adapted base parameter: its factors, its scaling, and the delta weight that they make."""

import math
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor

from adaptertools.errors import (
    AdapterError,
    ConfigError,
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
        """The alpha that gives exactly this scaling, or the nearest one where no float does.

        Raises: ConfigError if no finite one does
        """
        match self:
            case ScaleRule.ALPHA_OVER_RANK:
                guess = scaling * rank
            case ScaleRule.ALPHA_OVER_SQRT_RANK:
                guess = scaling * math.sqrt(rank)
            case ScaleRule.DIRECT:
                return scaling
        if not math.isfinite(guess):
            raise ConfigError(f"no finite alpha gives the scaling {scaling} at rank {rank}")
        neighbours = (round(guess), guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
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
    LAYER_REPLICATION = "layer-replication"
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

    def __post_init__(self) -> None:
        if not self.parameter:
            raise AdapterError("a module has no name: expected the path of the base parameter that it changes")

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
            for loralib's convolutions (k·r, k·in), (k·out, k·r)
            magnitude (out,) or (in,); lora_bias (out,); neither goes with a stack of experts
    Raises: ShapeError, EmptyFactorError, ConfigError, each naming the target
    """

    target: Target
    lora_A: Tensor = field(repr=False)
    lora_B: Tensor = field(repr=False)
    alpha: float
    scale_rule: ScaleRule = ScaleRule.ALPHA_OVER_RANK
    kind: Kind = Kind.LINEAR
    shape: tuple[int, ...] | None = None
    transposed: bool | None = None
    magnitude: Tensor | None = field(default=None, repr=False)
    magnitude_axis: Literal["out", "in"] = "out"
    lora_bias: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._check_factors()
        if self.shape is not None and (
            min(self.shape, default=0) < 1 or math.prod(self.shape) != math.prod(self._matrix_shape)
        ):
            raise ShapeError(f"{self.target}: {self._shapes} do not give a weight of shape {self.shape}")
        if self.target.rows and self.target.rows.stop - self.target.rows.start != self.out_features:
            raise ShapeError(f"{self.target}: lora_B has {self.out_features} rows, the slice is of another size")
        if not _is_finite_number(self.alpha):
            raise ConfigError(f"{self.target}: alpha is {self.alpha!r}, expected a finite number")
        features = {"out": self.out_features, "in": self.in_features}
        for name, vector, size in (
            ("magnitude", self.magnitude, features[self.magnitude_axis]),
            ("lora_bias", self.lora_bias, self.out_features),
        ):
            if vector is not None and tuple(vector.shape) != (size,):
                raise ShapeError(f"{self.target}: {name} has shape {tuple(vector.shape)}, expected ({size},)")
            if vector is not None and self.experts is not None:
                raise ShapeError(f"{self.target}: a stack of experts has no {name}")

    def _check_factors(self) -> None:
        for name, factor in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            if factor.numel() == 0 or factor.ndim < 2:
                raise EmptyFactorError(
                    f"{self.target}: {name} has shape {tuple(factor.shape)}, expected two or three dimensions and no "
                    "zero. DeepSpeed ZeRO-3 saves such empty shards when the parameters were not gathered: "
                    "save again with zero_to_fp32.py or stage3_gather_16bit_weights_on_model_save"
                )
            if not factor.is_floating_point():
                raise ShapeError(f"{self.target}: {name} has dtype {factor.dtype}, expected a floating-point one")
        if self.lora_A.ndim != self.lora_B.ndim or self.lora_A.ndim > 3:
            raise ShapeError(
                f"{self.target}: {self._shapes} must both have two dimensions, or three for a stack of experts"
            )
        if self.lora_A.shape[-2] != self.lora_B.shape[-1]:
            ranks = f"{self.lora_A.shape[-2]} and {self.lora_B.shape[-1]}"
            raise ShapeError(f"{self.target}: {self._shapes} disagree about the rank: {ranks}")
        if self.lora_A.ndim == 3 and self.lora_A.shape[0] != self.lora_B.shape[0]:
            raise ShapeError(f"{self.target}: {self._shapes} disagree about the number of experts")

    @property
    def _shapes(self) -> str:
        return f"lora_A {tuple(self.lora_A.shape)} and lora_B {tuple(self.lora_B.shape)}"

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        """The shape of the weight as (out, in), fused rows and experts included."""
        out = self.target.rows.total if self.target.rows else self.out_features
        return (*self.lora_A.shape[:-2], out, self.in_features)

    @property
    def rank(self) -> int:
        """The inner dimension of B·A."""
        return self.lora_A.shape[-2]

    @property
    def kernel_fold(self) -> int:
        """The kernel size k where B·A is (out·k, in·k), as loralib lays out a convolution; else 1."""
        if self.kind is not Kind.CONV or self.shape is None or len(self.shape) != 4:
            return 1
        n_out, n_in, height, width = self.shape
        folded = height == width and (self.out_features, self.in_features) == (n_out * width, n_in * width)
        return width if folded else 1

    @property
    def nominal_rank(self) -> int:
        """The r that alpha is divided by: the rank, but for loralib's convolutions, whose inner dimension is k·r."""
        return self.rank // self.kernel_fold or 1

    @property
    def scaling(self) -> float:
        return self.scale_rule.scaling(self.alpha, self.nominal_rank)

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
        *experts, rows, columns = self._matrix_shape
        return (*experts, columns, rows) if self.transposed else (*experts, rows, columns)

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

        Memory: one weight in float32 (float64 where asked for or stored); two for DoRA
        Raises: UnsupportedFeatureError for DoRA without `base_weight`
        """
        compute = torch.float64 if torch.float64 in (dtype, self.lora_A.dtype, self.lora_B.dtype) else torch.float32
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
        weight = self.as_matrix(base_weight.to(delta))
        if self.target.rows:
            weight = weight[self.target.rows.start : self.target.rows.stop]
        axis = 1 if self.magnitude_axis == "out" else 0
        direction = weight + delta
        magnitude = self.magnitude.to(delta).unsqueeze(axis)
        changed: Tensor = magnitude * direction / direction.norm(dim=axis, keepdim=True)
        return changed - weight

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A base weight as (out, in).

        Raises: ShapeError if it is no weight of this module
        """
        if tuple(weight.shape) != self.weight_shape:
            raise ShapeError(
                f"{self.target}: the base weight has shape {tuple(weight.shape)}, expected {self.weight_shape}"
            )
        rows, columns = self._matrix_shape[-2:]
        return weight.reshape(columns, rows).T if self.transposed else weight.reshape(rows, columns)

    def _as_base_weight(self, delta: Tensor) -> Tensor:
        if self.target.rows:
            whole = delta.new_zeros(self._matrix_shape)
            whole[..., self.target.rows.start : self.target.rows.stop, :] = delta
            delta = whole
        oriented = delta.transpose(-1, -2) if self.transposed else delta
        return oriented if self.shape is None else oriented.reshape(self.shape)


def check_alpha(alpha: Any) -> float:
    """An alpha that a caller gives. Subnormal ones are refused too: divided by a rank they may become 0.

    Raises: OptionError
    """
    if not _is_finite_number(alpha) or alpha < sys.float_info.min:
        raise OptionError(f"alpha is {alpha!r:.40}, expected a positive number")
    return float(alpha)


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
