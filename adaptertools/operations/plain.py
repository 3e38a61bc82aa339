"""Plain adapters, as every program reads them: one rank, scaling 1 with alpha = rank, nothing beside the factors.

The delta weights stay what they are but for what a cap on the rank takes, and rounding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptertools.adapter import Adapter, LoraModule, ScaleRule, Target, WeightRole
from adaptertools.errors import OptionError, UnsupportedFeatureError
from adaptertools.operations.align import by_parameter, whole
from adaptertools.operations.low_rank import LowRank, low_rank
from adaptertools.operations.rescale import rescale
from adaptertools.operations.truncate import truncate
from adaptertools.operations.truncation import Truncation

_CARRIED = ("task_type", "auto_mapping")
"""What a plain adapter still says in a PEFT configuration."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plain:
    """A plain adapter and what was done to make it one. `truncation` and `decomposed` are None where not needed.

    `meant` is what it was made of, with DoRA as LoRA already: `diff` of both says what the rest has cost.
    """

    adapter: Adapter
    meant: Adapter
    rank: int
    padded: int = 0
    """modules that were given a higher rank, filled up with zeros"""
    filled: tuple[Target, ...] = ()
    """modules of zeros that were added"""
    left_out: tuple[str, ...] = ()
    """weights that were stored untrained"""
    truncation: Truncation | None = None
    decomposed: "Decomposed | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed:
    """DoRA modules that became LoRA: the relative error of all of them together, in the Frobenius norm of ΔW."""

    modules: int
    rank: int
    relative_error: float
    error: float
    """‖ΔW' − ΔW‖, not relative"""


def plain(
    adapter: Adapter,
    *,
    max_rank: int | None = None,
    least_rank: int = 1,
    multiple: int = 1,
    fill: Sequence[LoraModule] = (),
    base_weight: Callable[[LoraModule], Tensor] | None = None,
    allow_nonfinite: bool = False,
) -> Plain:
    """Give every module one rank and the scaling 1, and leave out what is not trained.

    The rank is the highest one, at most `max_rank`, at least `least_rank`, above that a multiple of `multiple`: higher
    ranks are truncated to the nearest delta weight, lower ones filled up with zeros. Slots of a fused projection become
    one module. `fill` are modules with the targets and shapes of those to add with zeros. DoRA becomes LoRA where
    `base_weight` gives the weights that it renormalises: the nearest delta weight of rank `max_rank`, else of its own.
    Everything else that a plain adapter has no room for stays, for the writer to refuse.

    Memory: all factors twice; for DoRA a base weight and its delta weight in float32
    Raises: UnsupportedFeatureError for an adapter without modules, or on a changed base if its rank is too high;
            NonFiniteError
    """
    if not adapter.modules:
        raise UnsupportedFeatureError("the adapter holds whole weights alone: there are no factors to make plain")
    if max_rank is not None and max_rank < 1:
        raise OptionError(f"max_rank is {max_rank}, expected a number from 1 on")
    behind = tuple(name for name, weight in adapter.full_weights.items() if weight.role is WeightRole.BASE)
    kept = {name: weight for name, weight in adapter.full_weights.items() if name not in behind}
    adapter = replace(adapter, full_weights=kept, metadata=_metadata(adapter))
    adapter, decomposed = _decomposed(adapter, max_rank, base_weight)
    meant, adapter = adapter, joined(adapter)
    adapter, truncation = _truncated(adapter, max_rank, allow_nonfinite)
    rank = _rank(adapter, max_rank, least_rank, multiple)
    padded = sum(module.nominal_rank < rank for module in adapter.modules)
    adapter = adapter.map_modules(lambda module: _direct(_padded(module, rank)))
    adapter = rescale(adapter, float(rank), allow_nonfinite=allow_nonfinite)
    zeros = tuple(hollow(module, rank) for module in fill)
    return Plain(
        adapter=replace(adapter, modules=(*adapter.modules, *zeros)),
        meant=meant,
        rank=rank,
        padded=padded,
        filled=tuple(module.target for module in zeros),
        left_out=behind,
        truncation=truncation,
        decomposed=decomposed,
    )


def _metadata(adapter: Adapter) -> dict[str, object]:
    stated = adapter.metadata.get("peft", {})
    return {**adapter.metadata, "peft": {key: stated[key] for key in _CARRIED if key in stated}}


def _decomposed(
    adapter: Adapter, max_rank: int | None, base_weight: Callable[[LoraModule], Tensor] | None
) -> tuple[Adapter, Decomposed | None]:
    """The adapter with DoRA modules as LoRA ones; as it is where the base weights are not known."""
    held = [module for module in adapter.modules if module.magnitude is not None]
    if not held or base_weight is None:
        return adapter, None
    rank = max_rank or max(module.nominal_rank for module in held)
    made: dict[Target, LowRank] = {}
    for module in held:
        made[module.target] = low_rank(module, base_weight(module), rank)
    error, norm = (math.hypot(*(getattr(each, name) for each in made.values())) for name in ("error", "norm"))
    reached = max(each.module.nominal_rank for each in made.values())
    done = Decomposed(modules=len(held), rank=reached, relative_error=error / norm if norm else 0.0, error=error)
    return adapter.map_modules(lambda module: made[module.target].module if module.target in made else module), done


def joined(adapter: Adapter) -> Adapter:
    """Slots of a fused projection as modules of the whole weight."""
    if not any(module.target.rows for module in adapter.modules):
        return adapter
    return replace(adapter, modules=tuple(whole(slots) for slots in by_parameter(adapter).values()))


def _truncated(adapter: Adapter, max_rank: int | None, allow_nonfinite: bool) -> tuple[Adapter, Truncation | None]:
    if max_rank is None or all(module.nominal_rank <= max_rank for module in adapter.modules):
        return adapter, None
    done = truncate(adapter, rank=max_rank, allow_nonfinite=allow_nonfinite)
    return done.adapter, done


def _rank(adapter: Adapter, max_rank: int | None, least_rank: int, multiple: int) -> int:
    highest = max(module.nominal_rank for module in adapter.modules)
    wanted = least_rank if highest <= least_rank else math.ceil(highest / multiple) * multiple
    return wanted if max_rank is None else min(wanted, max_rank)


def _padded(module: LoraModule, rank: int) -> LoraModule:
    """The module at a higher rank, filled up with zeros; its scaling stays."""
    missing = rank * module.kernel_fold - module.rank
    if not missing:
        return module
    return replace(
        module,
        lora_A=torch.nn.functional.pad(module.lora_A, (0, 0, 0, missing)),
        lora_B=torch.nn.functional.pad(module.lora_B, (0, missing)),
        alpha=module.scaling,
        scale_rule=ScaleRule.DIRECT,
    )


def _direct(module: LoraModule) -> LoraModule:
    """The module with its scaling stated as it is; one that is scaled by 0 gets zeros, which any scaling keeps."""
    if module.scaling == 0:
        silent = None if module.lora_bias is None else torch.zeros_like(module.lora_bias)
        module = replace(module, lora_B=torch.zeros_like(module.lora_B), lora_bias=silent)
        return replace(module, alpha=1.0, scale_rule=ScaleRule.DIRECT)
    return replace(module, alpha=module.scaling, scale_rule=ScaleRule.DIRECT)


def hollow(like: LoraModule, rank: int = 1) -> LoraModule:
    """A module that adds nothing, with the target and the shapes of this one."""
    experts = like.lora_A.shape[:-2]
    inner = rank * like.kernel_fold
    return replace(
        like,
        lora_A=like.lora_A.new_zeros((*experts, inner, like.in_features)),
        lora_B=like.lora_B.new_zeros((*experts, like.out_features, inner)),
        alpha=float(rank),
        scale_rule=ScaleRule.ALPHA_OVER_RANK,
        magnitude=None,
        lora_bias=None,
    )
