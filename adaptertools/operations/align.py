"""Modules of several adapters laid out alike, so that what changes the same weight can be compared and added.

One adapter may hold the slots of a fused projection, another the whole of it; loralib folds a convolution's kernel into
its factors, PEFT does not. Everything here changes factors alone, never the delta weight.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from adaptertools.adapter import Adapter, LoraModule, ScaleRule
from adaptertools.convolution import unfolded
from adaptertools.encoding import fold_is_exact, scale
from adaptertools.errors import ShapeError, UnsupportedFeatureError

Parameter = tuple[str, str]
"""The component and the name of a base parameter."""


def by_parameter(adapter: Adapter) -> dict[Parameter, tuple[LoraModule, ...]]:
    """The modules of each base parameter: one, or the slots of a fused projection in the order of their rows."""
    found: dict[Parameter, list[LoraModule]] = {}
    for module in adapter.modules:
        found.setdefault((module.target.component, module.target.parameter), []).append(module)
    return {parameter: tuple(sorted(modules, key=_start)) for parameter, modules in found.items()}


def in_common_layout(
    groups: Sequence[Sequence[LoraModule]], names: Sequence[str] | None = None
) -> list[tuple[LoraModule, ...]]:
    """The modules of one parameter, a group for each adapter, made comparable; each group in the order of its rows.

    In what comes out, two modules with the same `target.rows` are of the same shape, and any others change no row in
    common. Modules are handed back as they are where that holds already; folded convolutions are unfolded where others
    are not, and slots that overlap in part become modules of the whole weight. A group may be empty.

    Memory: the factors that change
    Raises: ShapeError if the delta weights have different shapes, with the names of both adapters
            UnsupportedFeatureError as `whole` and `unfolded` do
    """
    aligned = [tuple(sorted(group, key=_start)) for group in groups]
    if len({(module.kernel_fold, module.shape if module.kernel_fold > 1 else None) for module in _all(aligned)}) > 1:
        aligned = [tuple(unfolded(module) for module in group) for group in aligned]
    if _overlap_in_part(aligned):
        aligned = [(whole(group),) if group else () for group in aligned]
    _check_shapes(aligned, names or [f"adapter {number}" for number in range(1, len(groups) + 1)])
    return aligned


def whole(modules: Sequence[LoraModule]) -> LoraModule:
    """The slots of one parameter as one module of the whole weight; a module of the whole weight as it is.

    Each slot's `lora_B` gets zero rows where the others lie. Slots that share `lora_A` share it here too; the ranks of
    the rest add up. Where scalings differ, each is folded into `lora_B` relative to the largest, in the narrowest dtype
    from its own to float64 that holds it exactly, else rounded to float64.

    Shapes: lora_A (rᵢ, in), lora_B (outᵢ, rᵢ) -> (Σrᵢ, in), (out, Σrᵢ)
    Memory: the new factors
    Raises: UnsupportedFeatureError for a DoRA magnitude, which the rows in no slot lack
    """
    first = modules[0]
    if first.target.rows is None and len(modules) == 1:
        return first
    holder = next((module for module in modules if module.magnitude is not None), None)
    if holder is not None:
        raise UnsupportedFeatureError(
            f"{holder.target}: a slot with a DoRA magnitude cannot become part of a module of the whole weight, whose "
            "other rows have none"
        )
    scaling = max((module.scaling for module in modules), key=abs)
    sharing: dict[tuple[object, ...], list[LoraModule]] = {}
    for module in modules:
        sharing.setdefault(_identity(module.lora_A), []).append(_widened(module, scaling))
    biases = [module.lora_bias for module in _all(sharing.values()) if module.lora_bias is not None]
    return replace(
        first,
        target=replace(first.target, rows=None),
        lora_A=torch.cat([group[0].lora_A for group in sharing.values()], dim=-2),
        lora_B=torch.cat([_sum([module.lora_B for module in group]) for group in sharing.values()], dim=-1),
        alpha=scaling,
        scale_rule=ScaleRule.DIRECT,
        lora_bias=_sum(biases) if biases else None,
    )


def _all(groups: Iterable[Sequence[LoraModule]]) -> list[LoraModule]:
    return [module for group in groups for module in group]


def _start(module: LoraModule) -> int:
    return module.target.rows.start if module.target.rows else 0


def _overlap_in_part(groups: Sequence[Sequence[LoraModule]]) -> bool:
    """Whether some rows are changed by two modules that are not of the same rows."""
    slices = {module.target.rows for module in _all(groups)}
    if None in slices:
        return len(slices) > 1
    ordered = sorted((rows for rows in slices if rows), key=lambda rows: (rows.start, rows.stop))
    return any(one.stop > other.start for one, other in pairwise(ordered))


def _check_shapes(groups: Sequence[Sequence[LoraModule]], names: Sequence[str]) -> None:
    """Raises: ShapeError unless all modules belong to a weight of one shape."""
    members = [(name, module) for name, group in zip(names, groups, strict=True) for module in group]
    for name, module in members:
        if _delta_shape(module) != _delta_shape(members[0][1]):
            raise ShapeError(
                f"{module.target.parameter}: the delta weight has shape {_delta_shape(members[0][1])} in "
                f"{members[0][0]} and {_delta_shape(module)} in {name}; they cannot belong to one base weight"
            )


def _delta_shape(module: LoraModule) -> tuple[int, ...]:
    """The shape of the whole parameter's delta weight as (out, in), that of the experts before it."""
    out = module.target.rows.total if module.target.rows else module.out_features
    return (*module.lora_A.shape[:-2], out, module.in_features)


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _widened(module: LoraModule, scaling: float) -> LoraModule:
    """The module with another scaling, and with rows of zeros in `lora_B` and `lora_bias` outside its slot."""
    factor = 1.0 if module.scaling == scaling else module.scaling / scaling
    rows = module.target.rows
    margins = (rows.start, rows.total - rows.stop) if rows else (0, 0)
    bias = module.lora_bias
    return replace(
        module,
        target=replace(module.target, rows=None),
        lora_B=torch.nn.functional.pad(_folded(module.lora_B, factor), (0, 0, *margins)),
        lora_bias=None if bias is None else torch.nn.functional.pad(_folded(bias, factor), margins),
        alpha=scaling,
        scale_rule=ScaleRule.DIRECT,
    )


def _folded(tensor: Tensor, factor: float) -> Tensor:
    wider = torch.promote_types(tensor.dtype, torch.float32)
    dtype = next((dtype for dtype in (tensor.dtype, wider) if fold_is_exact(tensor, factor, dtype)), torch.float64)
    return scale(tensor, factor, dtype)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of which at most one is not zero at any place."""
    return sum(parts[1:], start=parts[0])
