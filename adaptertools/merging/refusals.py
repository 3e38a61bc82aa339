"""What is never merged, because no merge of it would be right: named, with the reason."""

from collections.abc import Mapping
from typing import Any

import torch

from adaptertools.adapter import Adapter, Feature
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import UnsupportedFeatureError
from adaptertools.module import Kind, LoraModule
from adaptertools.tensors import dtype_name

_METHODS = {
    "aqlm": "AQLM",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FP8 with scales (fbgemm)",
    "fp8": "FP8 with scales",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
}
"""Names of quantisation methods in configurations, as people call them."""

_MERGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


def check_base(base: Checkpoint) -> None:
    """Raises: UnsupportedFeatureError for a quantised base, with the name of the method"""
    found = _stated(base.config) or _shown(base)
    if found:
        raise UnsupportedFeatureError(
            f"{base.label}: the weights are quantised ({found}): what rounding them again takes is more than most "
            "adapters add. Merge into the model that was quantised, or write it out in 16 bits first"
        )


def check_adapter(adapter: Adapter, name: str) -> None:
    """Raises: UnsupportedFeatureError for what no merge can hold"""
    if holders := adapter.holders(Feature.ALORA):
        raise UnsupportedFeatureError(
            f"{name}: the adapter acts after its {holders[0]} alone (aLoRA); merged weights would act on every token"
        )
    if holders := adapter.holders(Feature.CHANGED_BASE):
        raise UnsupportedFeatureError(
            f"{name}: trained on {holders[0]}, an initialisation that changed the base weights: added to the published "
            "ones the result would be wrong. PEFT converts such an adapter when it is saved "
            "(path_initial_model_for_weight_conversion)"
        )
    for component in adapter.bases.values():
        if component.layer_replication:
            ranges = [list(layers) for layers in component.layer_replication]
            raise UnsupportedFeatureError(
                f"{name}: made for a model of the layers {ranges} of the base (layer_replication), where a layer "
                "stands several times. Write the model with these layers first and merge into that"
            )
    try:
        adapter.check_one_model("a base model")
    except UnsupportedFeatureError as error:
        raise UnsupportedFeatureError(f"{name}: {error}") from None


def check_weight_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises: UnsupportedFeatureError unless a delta weight can be added to weights of this dtype"""
    if dtype not in _MERGED:
        raise UnsupportedFeatureError(
            f"{name} is {dtype_name(dtype)}, expected one of {', '.join(map(dtype_name, _MERGED))}"
        )


def check_ungrouped(module: LoraModule, name: str, shape: tuple[int, ...]) -> None:
    """Raises: UnsupportedFeatureError for a grouped convolution"""
    wanted = module.weight_shape
    if module.kind is not Kind.CONV or len(shape) != len(wanted) or shape[1] >= wanted[1]:
        return
    if wanted[1] % shape[1] == 0 and shape[2:] == wanted[2:]:
        raise UnsupportedFeatureError(
            f"{module.target}: {name} {shape} is a grouped convolution. PEFT's lora_A mixes the channels of all "
            "groups, which the grouped weight cannot hold, so there is no delta weight"
        )


def _stated(config: Mapping[str, Any]) -> str:
    """The method that a configuration states, anywhere in it; empty if none does."""
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        stated = part.get("quantization_config")
        if isinstance(stated, Mapping):
            method = str(stated.get("quant_method") or "bitsandbytes")
            return _METHODS.get(method, method)
    return ""


def _shown(base: Checkpoint) -> str:
    """The method that names and dtypes show; empty if none do."""
    leaves = {name.rpartition(".")[2] for name in base.shapes}
    for leaf, method in (
        ("g_idx", "GPTQ"),
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("SCB", "bitsandbytes in 8 bits"),
        ("absmax", "bitsandbytes in 4 bits"),
        ("weight_scale_inv", "FP8 with scales"),
        ("weight_scale", "FP8 with scales"),
    ):
        if leaf in leaves:
            return method
    for name, dtype in base.dtypes.items():
        if dtype in _FLOAT8:
            return "FP8"
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in base.shapes:
            return "MXFP4"
        if name.endswith(".weight") and len(base.shapes[name]) > 1 and not dtype.is_floating_point:
            return f"{name} is {dtype_name(dtype)}"
    return ""
