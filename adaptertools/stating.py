"""How formats state a scaling: in a field of their own where that says it exactly, else folded into lora_B.

A format with one alpha or one scale for a whole file asks here whether there is one that fits every module, bit for
bit. Where there is none, its writer folds each scaling into lora_B by `Encoder.fold`, which reports what rounding took.
"""

from collections.abc import Sequence

from adaptertools.module import LoraModule, ScaleRule


def common_alpha(modules: Sequence[LoraModule]) -> float | None:
    """The one alpha that, divided by each module's r, is exactly its scaling; None if there is none."""
    rule = ScaleRule.ALPHA_OVER_RANK
    alpha = rule.alpha(modules[0].scaling, modules[0].nominal_rank)
    fits = all(rule.scaling(alpha, module.nominal_rank) == module.scaling for module in modules)
    return alpha if fits else None


def common_scaling(modules: Sequence[LoraModule]) -> float | None:
    """The one scaling that all modules have; None if they differ."""
    scaling = modules[0].scaling
    return scaling if all(module.scaling == scaling for module in modules) else None
