"""The true shape of every parameter of a base model, by its headers: also where the file holds it quantised.

Kept in their own shape: float8 of `fp8` and `fbgemm_fp8`, int8 of bitsandbytes, and experts of `mxfp4`, whose blocks
have 32 values in 16 bytes. Other schemes pack weights so that no header states their shape, and are refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.pipeline import FACTOR
from adaptertools.errors import UnsupportedFeatureError

_KEEP_SHAPES = ("fp8", "fbgemm_fp8")
_PACKED = ("qweight", "qzeros", "weight_packed", "absmax", "nested_absmax", "quant_map")
_SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale", "SCB", "weight_format")
"""What stands beside weights that are quantised in their own shape."""

_VALUES_PER_BYTE = 2
_BUFFERS = (
    "e_score_correction_bias",
    "final_logits_bias",
    "inv_freq",
    "layer_scalar",
    "masked_bias",
    "num_batches_tracked",
    "position_ids",
    "relative_position_index",
    "running_mean",
    "running_var",
    "token_type_ids",
)
"""What models store and do not count among their parameters."""


def true_shapes(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter and its shape; without buffers and the scales of quantised weights.

    Raises: UnsupportedFeatureError if the headers do not state the shapes, or if an adapter is a part of the model
    """
    _check_kind(checkpoint)
    scheme = _scheme(checkpoint)
    for name, shape in checkpoint.shapes.items():
        leaf = name.rpartition(".")[2]
        if scheme == "mxfp4" and leaf.endswith("_blocks") and len(shape) == 4:
            experts, out, blocks, size = shape
            yield name.removesuffix("_blocks"), (experts, blocks * size * _VALUES_PER_BYTE, out)
        elif not _is_beside(name, shape, scheme):
            yield name, shape


def _check_kind(checkpoint: Checkpoint) -> None:
    for name in filter(FACTOR.search, checkpoint.shapes):
        raise UnsupportedFeatureError(
            f"{checkpoint.label}: {name} belongs to an adapter that is a part of the model; expected a model without. "
            "PEFT's unload or merge_and_unload takes it off"
        )


def _scheme(checkpoint: Checkpoint) -> str | None:
    """How the weights are quantised, if they are and keep their shapes all the same."""
    stated = _quantization(checkpoint.config)
    method = stated.get("quant_method")
    scheme = "bitsandbytes in 4 bits" if method == "bitsandbytes" and not stated.get("load_in_8bit") else method
    if method is None:
        scheme = next((_sign(checkpoint, name) for name in checkpoint.shapes if _sign(checkpoint, name)), None)
    if scheme is None or scheme in (*_KEEP_SHAPES, "mxfp4", "bitsandbytes"):
        return scheme
    raise UnsupportedFeatureError(
        f"{checkpoint.label}: the weights are packed ({scheme}), so that the headers do not state their true shapes. "
        "Name the model that was quantised instead: an adapter has the same size on both"
    )


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("quantization_config"), Mapping):
            found: Mapping[str, Any] = part["quantization_config"]
            return found
    return {}


def _sign(checkpoint: Checkpoint, name: str) -> str:
    """What shows that a weight is packed though no configuration says so; empty if nothing does."""
    leaf = name.rpartition(".")[2]
    if leaf in _PACKED:
        return f"there is {name}"
    is_matrix = leaf == "weight" and len(checkpoint.shapes[name]) > 1
    dtype = checkpoint.dtypes[name]
    return f"{name} is {str(dtype).removeprefix('torch.')}" if is_matrix and not dtype.is_floating_point else ""


def _is_beside(name: str, shape: tuple[int, ...], scheme: str | None) -> bool:
    """Whether a tensor is no parameter: a buffer, the mask of GPT-2's attention, or the scale of a quantised weight."""
    leaf = name.rpartition(".")[2]
    mask = leaf == "bias" and len(shape) == 4
    scale = scheme is not None and (leaf in _SCALES or leaf.endswith("_scales"))
    return leaf in _BUFFERS or mask or scale
