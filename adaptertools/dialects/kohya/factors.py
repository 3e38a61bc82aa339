"""One module's tensors in kohya's layout -> LoraModule, and back.

linear         lora_down (r, in)             lora_up (out, r)
convolution    lora_down (r, in, *k)         lora_up (out, r, 1, …)
Tucker         lora_down (r, in, 1, …)       lora_mid (r, r, *k)      lora_up (out, r, 1, …)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adaptertools.convolution import unfolded
from adaptertools.dialects.kohya.keys import ALPHA, DORA, DOWN, MID, UP, Group
from adaptertools.encoding import Encoder
from adaptertools.errors import (
    ConfigError,
    EmptyFactorError,
    ShapeError,
    UnpairedFactorError,
    UnsupportedFeatureError,
)
from adaptertools.module import Kind, LoraModule, ScaleRule
from adaptertools.tensors import Deferred, dtype_name

Axis = Literal["out", "in"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """The factors of a module as matrices, the shape of its weight, and what alpha is divided by."""

    lora_A: Tensor
    lora_B: Tensor
    shape: tuple[int, ...]
    rank: int
    scales: bool = True
    """False where alpha does not count."""


@dataclass(slots=True)
class Rounding:
    """What factors lost that had to be computed at reading: how many modules, and how many of them were rounded."""

    computed: int = 0
    rounded: int = 0
    worst: float = 0.0
    """The largest error of an element, relative to it."""

    def settle(self, exact: Tensor, *parts: Tensor) -> Tensor:
        """A factor that was computed in float64, in float32 unless one of its parts was float64."""
        dtype = torch.float64 if any(part.dtype is torch.float64 for part in parts) else torch.float32
        kept = exact.to(dtype).contiguous()
        if dtype is torch.float32 and not kept.is_meta and not torch.equal(kept.to(torch.float64), exact):
            self.rounded += 1
            errors = ((kept.to(torch.float64) - exact) / exact)[exact != 0].abs()
            self.worst = max(self.worst, float(errors.amax()))
        return kept


def lora_pair(group: Group, rounding: Rounding) -> Pair:
    """The factors of a LoRA or LoCon module; Tucker's core is folded into lora_down.

    Memory: none; with lora_mid the folded lora_down
    Raises: UnpairedFactorError, ShapeError
    """
    down, up, mid = (group.parts.get(part) for part in (DOWN, UP, MID))
    if down is None or up is None:
        there, missing = (UP, DOWN) if down is None else (DOWN, UP)
        raise UnpairedFactorError(f"{group.name}: {there} is there, {missing} is not. The file is not whole")
    check_factor(group.name, DOWN, down)
    check_factor(group.name, UP, up)
    if up.ndim != down.ndim or any(size != 1 for size in up.shape[2:]):
        raise ShapeError(
            f"{group.name}: lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)}, expected (r, in) and "
            "(out, r), or (r, in, k, k) and (out, r, 1, 1) for a convolution"
        )
    rank = down.shape[0]
    if mid is not None:
        down = _with_core(group.name, down, mid, rounding)
    return Pair(lora_A=down.flatten(1), lora_B=up.flatten(1), shape=(up.shape[0], *down.shape[1:]), rank=rank)


def check_factor(name: str, part: str, factor: Tensor) -> None:
    """Raises: EmptyFactorError for a factor that no low-rank product has."""
    if factor.numel() == 0 or factor.ndim < 2:
        raise EmptyFactorError(
            f"{name}.{part} has shape {tuple(factor.shape)}, expected two dimensions at least, and none of size 0"
        )


def _with_core(name: str, down: Tensor, mid: Tensor, rounding: Rounding) -> Tensor:
    """lora_down with the kernel of lora_mid: what a 1×1 convolution and then lora_mid do is one convolution.

    Shapes: down (n, in, 1, …), mid (m, n, *k) -> (m, in, *k)
    """
    if down.ndim != mid.ndim or mid.shape[1] != down.shape[0] or any(size != 1 for size in down.shape[2:]):
        raise ShapeError(
            f"{name}: lora_mid {tuple(mid.shape)} does not go with lora_down {tuple(down.shape)}: "
            "expected (r, r, k, k) and (r, in, 1, 1)"
        )
    rounding.computed += 1
    folded = torch.einsum("mn...,nj->mj...", mid.to(torch.float64), down.flatten(1).to(torch.float64))
    return rounding.settle(folded, mid, down)


def read_alpha(group: Group) -> float | None:
    """The alpha of a module, None where the file has none.

    Raises: ConfigError for 0, for what is no number, and for more than one
    """
    alpha = group.parts.get(ALPHA)
    if alpha is None:
        return None
    where = f"{group.name}.{ALPHA}"
    if alpha.numel() != 1:
        raise ConfigError(f"{where} has shape {tuple(alpha.shape)}, expected one number")
    if alpha.is_meta:
        raise UnsupportedFeatureError(
            f"{where}: only the header of the file was fetched, and the scaling is in its values. Download it first "
            "(adaptertools pull)"
        )
    value = float(alpha)
    if not math.isfinite(value):
        raise ConfigError(f"{where} is {value}, expected a finite number")
    if value == 0.0:
        raise ConfigError(
            f"{where} is 0: sd-scripts reads that as alpha = rank, ComfyUI as a module without effect. "
            "Set it to the rank, or remove the module"
        )
    return value


def module_of(group: Group, pair: Pair, fields: Mapping[str, object]) -> LoraModule:
    """The module that a pair of factors is, with its alpha and its magnitude."""
    alpha = read_alpha(group)
    if not pair.scales or alpha is None:
        alpha = float(pair.rank)
    own_rank = pair.lora_A.shape[0] == pair.rank
    is_conv = len(pair.shape) > 2
    return LoraModule(
        lora_A=pair.lora_A,
        lora_B=pair.lora_B,
        alpha=alpha if own_rank else alpha / pair.rank,
        scale_rule=ScaleRule.ALPHA_OVER_RANK if own_rank else ScaleRule.DIRECT,
        kind=Kind.CONV if is_conv else Kind.LINEAR,
        shape=pair.shape if is_conv else None,
        **fields,  # type: ignore[arg-type]
    )


def magnitude(group: Group, pair: Pair) -> dict[str, object]:
    """The fields of a module that its `dora_scale` gives.

    Shapes: (out, 1, …) norms of rows, (1, in, 1, …) norms of columns
    Raises: ShapeError where the shape fits neither, or both; UnsupportedFeatureError for norms over a kernel
    """
    scale = group.parts.get(DORA)
    if scale is None:
        return {}
    n_out, columns = pair.lora_B.shape[0], pair.lora_A.shape[1]
    shape = tuple(scale.shape)
    where = f"{group.name}.{DORA}"
    is_vector = len(shape) == 1
    rows = shape == (n_out,) or (not is_vector and shape[0] == n_out and _ones(shape[1:]))
    inputs = is_vector or (shape[:1] == (1,) and _ones(shape[2:]))
    by_column = inputs and shape[-1 if is_vector else 1] == columns
    if rows and by_column and is_vector and shape != (1,):
        raise ShapeError(
            f"{where} has shape {shape}, which may be the norms of the rows or of the columns of a square weight. "
            "Store it as (out, 1) or as (1, in)"
        )
    if not rows and not by_column:
        if not is_vector and inputs and shape[1] > 1 and columns % shape[1] == 0:
            raise UnsupportedFeatureError(
                f"{where} has shape {shape}: norms of the input channels of a convolution, each over its kernel. Only "
                "norms of outputs can be kept, as wd_on_out=True gives; leave the module out of the file"
            )
        raise ShapeError(
            f"{where} has shape {shape}, expected ({n_out}, 1) or (1, {columns}): the weight is {n_out} by {columns}"
        )
    axis: Axis = "out" if rows else "in"  # of a single element both are the same
    return {"magnitude": scale.reshape(-1), "magnitude_axis": axis}


def _ones(shape: tuple[int, ...]) -> bool:
    return all(size == 1 for size in shape)


def _kernel(shape: tuple[int, ...]) -> int:
    return math.prod(shape[2:])


def encode(
    name: str, module: LoraModule, encoder: Encoder, alpha_dtype: torch.dtype | None, wanted_alpha: float | None
) -> dict[str, Tensor | Deferred]:
    """The tensors of one module under its flat name.

    alpha is written in the dtype of the factors where that holds it, else in float32; a scaling that no alpha in
    float32 gives is folded into lora_up, and alpha is the rank. `wanted_alpha` is stated whatever the scaling is, and
    the rest folded.

    Raises: UnsupportedFeatureError for a convolution of unknown kernel, and for magnitudes that have no shape here
    """
    module = unfolded(module)
    rank, n_out = module.rank, module.out_features
    down_shape: tuple[int, ...] = (rank, module.in_features)
    up_shape: tuple[int, ...] = (n_out, rank)
    if module.kind is Kind.CONV:
        if module.shape is None or module.shape[0] != n_out:
            raise UnsupportedFeatureError(f"{module.target}: a convolution whose kernel is not known cannot be written")
        down_shape, up_shape = (rank, *module.shape[1:]), (n_out, rank, *[1] * (len(module.shape) - 2))
    alpha, factor = state(module, wanted_alpha)
    up = encoder.fold(f"{name}.{UP}", module.lora_B.reshape(up_shape), factor)
    down = encoder.keep(f"{name}.{DOWN}", module.lora_A.reshape(down_shape))
    dtype = encoder.dtype or alpha_dtype or down.dtype
    tensors: dict[str, Tensor | Deferred] = {
        f"{name}.{ALPHA}": torch.tensor(alpha, dtype=dtype if holds(alpha, dtype) else torch.float32),
        f"{name}.{DOWN}": down,
        f"{name}.{UP}": up,
    }
    if module.magnitude is not None:
        shape = _magnitude_shape(module, len(down_shape))
        tensors[f"{name}.{DORA}"] = encoder.keep(f"{name}.{DORA}", module.magnitude.reshape(shape))
    return tensors


def state(module: LoraModule, wanted: float | None) -> tuple[float, float]:
    """The alpha to write and the factor to fold: that which says the scaling exactly, and 1; where float32 holds none,
    the rank and the scaling; and with a wanted alpha that, and what it leaves.
    """
    rule = ScaleRule.ALPHA_OVER_RANK
    if wanted is not None:
        stated = rule.scaling(wanted, module.rank)
        return wanted, 1.0 if stated == module.scaling else module.scaling / stated
    alpha = module.alpha if module.scale_rule is rule else rule.alpha(module.scaling, module.rank)
    exact = holds(alpha, torch.float32) and rule.scaling(alpha, module.rank) == module.scaling and alpha != 0
    return (float(alpha), 1.0) if exact else (float(module.rank), module.scaling)


def holds(value: float, dtype: torch.dtype) -> bool:
    """Whether a dtype holds the number exactly."""
    try:
        return float(torch.tensor(value, dtype=torch.float64).to(dtype)) == value
    except RuntimeError as error:
        raise UnsupportedFeatureError(f"alpha {value} cannot be kept in {dtype_name(dtype)}") from error


def _magnitude_shape(module: LoraModule, ndim: int) -> tuple[int, ...]:
    if module.magnitude_axis == "out":
        return (module.out_features, *[1] * (ndim - 1))
    if module.shape is not None and _kernel(module.shape) > 1:
        raise UnsupportedFeatureError(
            f"{module.target}: its DoRA magnitude has a value for each column of a convolution's matrix; kohya's "
            "dora_scale has one for each output. Give it up with --drop dora"
        )
    return (1, module.in_features, *[1] * (ndim - 2))
