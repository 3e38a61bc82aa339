"""Convolutions in the layout of loralib, and in that of the others."""

from dataclasses import replace

from adaptertools.errors import UnsupportedFeatureError
from adaptertools.module import LoraModule, ScaleRule


def unfolded(module: LoraModule) -> LoraModule:
    """A convolution of loralib in the layout of the others: ΔW of (out, in·k·k); any other module as it is.

    loralib views B·A of (k·out, k·in) as the weight, so k of its rows, one after the other, are one row of ΔW: the k
    parts of that row have factors of their own, and every part the same `lora_A`.

    Shapes: lora_A (k·r, k·in), lora_B (k·out, k·r) -> (k·k·r, in·k·k), (out, k·k·r)
    Memory: k·k times lora_A
    Raises: UnsupportedFeatureError for a magnitude or a lora_bias, which loralib does not have
    """
    fold = module.kernel_fold
    if fold == 1:
        return module
    if module.magnitude is not None or module.lora_bias is not None:
        held = "magnitude" if module.magnitude is not None else "lora_bias"
        raise UnsupportedFeatureError(f"{module.target}: a convolution laid out as loralib does has no {held}")
    parts = module.lora_A.new_zeros(fold, module.rank, fold, module.in_features)
    for part in range(fold):
        parts[part, :, part] = module.lora_A
    return replace(
        module,
        lora_A=parts.reshape(fold * module.rank, fold * module.in_features),
        lora_B=module.lora_B.reshape(module.out_features // fold, fold * module.rank),
        alpha=module.scaling,
        scale_rule=ScaleRule.DIRECT,
    )
