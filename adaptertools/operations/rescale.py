"""Another alpha, with the weights kept consistent with it, module by module."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from adaptertools.adapter import Adapter, Feature, HistoryEntry, LoraModule, ScaleRule, expect_adapter
from adaptertools.encoding import Encoder
from adaptertools.errors import OptionError, UnsupportedFeatureError
from adaptertools.module import check_alpha
from adaptertools.tensors import materialize

Keep = Literal["delta", "ratio", "weights"]

_WHOLE = 1e-9
"""How near to a whole number a rank must come: stated alphas such as 11.3137 are rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rescaled:
    """One module with its new alpha, and how far its s·B·A is from what was meant."""

    module: LoraModule
    exact: bool = True
    error: float = 0.0


def rescale(adapter: Adapter, alpha: float, keep: Keep = "delta", *, allow_nonfinite: bool = False) -> Adapter:
    """Give every module the new alpha, and keep what `keep` names.

    `delta`: the rank stays and `lora_B` (and `lora_bias`) absorb old scaling / new scaling, so that the adapter acts as
    before. `ratio`: the scaling stays, so the rank follows alpha (r' = r·alpha'/alpha, for rsLoRA r·(alpha'/alpha)²),
    and the factors are padded with zeros. `weights`: only the number changes; the adapter becomes stronger or weaker.
    A module whose scaling is stated directly has no alpha: it counts as one with the rule alpha/r, alpha = r·scaling.

    The last entry of the history says `exact` and `max_relative_error`, and for `weights` `strength`, new scaling / old
    scaling: a number, or the smallest and the largest. Whether no bit was lost is checked bit by bit. A half-precision
    factor that would lose one becomes float32.

    Memory: the factors that change
    Raises: OptionError for an alpha that is no positive number, and for what is no adapter
            UnsupportedFeatureError for `weights` on DoRA, for anything but `delta` on a changed base, for `delta` on a
            scaling of 0, and where `ratio` gives a rank that is no whole number, smaller, or beyond the weight's
    """
    _check(adapter, alpha, keep)
    change: Callable[[LoraModule], _Rescaled] = {
        "delta": lambda module: _keep_delta(module, alpha, Encoder(allow_nonfinite=allow_nonfinite)),
        "ratio": lambda module: _keep_ratio(module, alpha),
        "weights": lambda module: _Rescaled(module=_with_alpha(module, alpha)),
    }[keep]
    results = [change(module) for module in adapter.modules]
    details: dict[str, Any] = {"alpha": alpha, "keep": keep}
    if keep == "weights":
        details["strength"] = _strength(adapter.modules, [result.module for result in results])
    else:
        details["exact"] = all(result.exact for result in results)
        details["max_relative_error"] = max(result.error for result in results)
    rescaled = replace(adapter, modules=tuple(result.module for result in results))
    source = adapter.origin.name if adapter.origin else None
    return rescaled.then(HistoryEntry(operation="rescale", source=source, details=details))


def _check(adapter: Adapter, alpha: float, keep: str) -> None:
    if keep not in ("delta", "ratio", "weights"):
        raise OptionError(f"keep is {keep!r}, expected delta, ratio or weights")
    check_alpha(alpha)
    expect_adapter(adapter)
    if not adapter.modules:
        raise UnsupportedFeatureError("the adapter holds whole weights alone: there is no alpha to change")
    changed = adapter.holders(Feature.CHANGED_BASE)
    if changed and keep != "delta":
        raise UnsupportedFeatureError(
            f"keep={keep} is refused: the adapter was trained with {changed[0]}, so that its factors belong to base "
            "weights that are derived again at loading, and would come out otherwise. keep=delta is safe"
        )
    if keep == "weights" and (holders := adapter.holders(Feature.DORA)):
        raise UnsupportedFeatureError(
            f"keep=weights is refused for DoRA ({holders[0]}{' and more' if len(holders) > 1 else ''}): its magnitude "
            "was trained with the old scaling, so that the change is no change of strength. keep=delta is exact"
        )


def _keep_delta(module: LoraModule, alpha: float, encoder: Encoder) -> _Rescaled:
    if module.scaling == 0:
        raise UnsupportedFeatureError(
            f"{module.target}: its scaling is 0, so that keep=delta would make lora_B zero for good. An alpha of 0 "
            "usually means that the trainer did not record it: give the true one when reading (--source-alpha, for "
            "PEFT), or give it this one with keep=weights"
        )
    wanted = _exact_alpha(module) / Fraction(alpha)
    try:
        factor = float(wanted)
    except OverflowError:
        raise OptionError(
            f"{module.target}: alpha {alpha!r} is too small for a factor of alpha {module.alpha!r}"
        ) from None
    if factor == 0:
        raise OptionError(f"{module.target}: alpha {alpha!r} is too large for a factor of alpha {module.alpha!r}")

    def absorb(name: str, tensor: Tensor) -> Tensor:
        return tensor if factor == 1.0 else materialize(encoder.fold(f"{module.target}.{name}", tensor, factor))

    changed = replace(
        _with_alpha(module, alpha),
        lora_B=absorb("lora_B", module.lora_B),
        lora_bias=None if module.lora_bias is None else absorb("lora_bias", module.lora_bias),
    )
    folded = max((loss.max_relative_error for loss in encoder.losses), default=0.0)
    return _Rescaled(
        module=changed,
        exact=factor == wanted and all(loss.exact for loss in encoder.losses),
        error=folded + _relative_error(Fraction(factor), wanted),
    )


def _keep_ratio(module: LoraModule, alpha: float) -> _Rescaled:
    before = _exact_alpha(module)
    if before <= 0:
        raise UnsupportedFeatureError(f"{module.target}: alpha is {module.alpha}, so no rank keeps the scaling")
    growth = Fraction(alpha) / before
    wanted = module.nominal_rank * (growth**2 if module.scale_rule is ScaleRule.ALPHA_OVER_SQRT_RANK else growth)
    rank = round(wanted)
    if abs(wanted - rank) > _WHOLE * wanted or rank < 1:
        raise UnsupportedFeatureError(
            f"{module.target}: keeping the scaling of rank {module.nominal_rank}, alpha {float(before):g} with alpha "
            f"{alpha:g} needs rank {float(wanted):g}, which is no whole number. Choose another alpha, or keep delta"
        )
    if rank < module.nominal_rank:
        raise UnsupportedFeatureError(
            f"{module.target}: keeping the scaling with alpha {alpha:g} lowers the rank from {module.nominal_rank} to "
            f"{rank}, which loses part of the weights: use truncate for that (adaptertools truncate --rank {rank}). "
            "keep=delta changes alpha alone"
        )
    if rank * module.kernel_fold > max(module.in_features, module.out_features, module.rank):
        raise UnsupportedFeatureError(
            f"{module.target}: keeping the scaling with alpha {alpha:g} needs rank {rank}, beyond the full rank of the "
            f"weight, {min(module.in_features, module.out_features) // module.kernel_fold}. keep=delta changes alpha "
            "without that"
        )
    missing = (rank - module.nominal_rank) * module.kernel_fold
    padded = replace(
        _with_alpha(module, alpha),
        lora_A=torch.nn.functional.pad(module.lora_A, (0, 0, 0, missing)) if missing else module.lora_A,
        lora_B=torch.nn.functional.pad(module.lora_B, (0, missing)) if missing else module.lora_B,
    )
    error = _relative_error(Fraction(padded.scaling), Fraction(module.scaling))
    return _Rescaled(module=padded, exact=error == 0.0, error=error)


def _with_alpha(module: LoraModule, alpha: float) -> LoraModule:
    rule = ScaleRule.ALPHA_OVER_RANK if module.scale_rule is ScaleRule.DIRECT else module.scale_rule
    return replace(module, alpha=float(alpha), scale_rule=rule)


def _exact_alpha(module: LoraModule) -> Fraction:
    """Alpha as it stands, or r·scaling where the scaling is stated directly; with no rounding."""
    alpha = Fraction(module.alpha)
    return alpha * module.nominal_rank if module.scale_rule is ScaleRule.DIRECT else alpha


def _relative_error(got: Fraction, wanted: Fraction) -> float:
    return float(abs(got - wanted) / abs(wanted)) if wanted else 0.0


def _strength(before: tuple[LoraModule, ...], after: list[LoraModule]) -> Any:
    """New scaling / old scaling: one number, the smallest and largest, or None where the old scaling was zero."""
    pairs = [(old.scaling, new.scaling) for old, new in zip(before, after, strict=True)]
    ratios = {new / old for old, new in pairs if old}
    if len(ratios) < 2:
        return next(iter(ratios), None)
    return {"smallest": min(ratios), "largest": max(ratios)}
