"""Whether the modules of an adapter fit a base model, read from GGUF or to be written there: in the same words.

The shapes are those of the base's weights. Where only its config.json is at hand, or the weights are packed by a
quantisation, they are what that says of them, as far as it does.
"""

from collections.abc import Mapping
from typing import Any

from adaptertools.adapter import LoraModule
from adaptertools.dialects.gguf.base import BaseFacts
from adaptertools.dialects.gguf.families import EMBEDDING, HEAD, PERMUTED_TENSORS, Family
from adaptertools.dialects.gguf.names import by_tensor, kind_of
from adaptertools.dialects.gguf.rows import check_heads
from adaptertools.dialects.peft.base import Checkpoint
from adaptertools.errors import MatchError, ShapeError

_GROWN = ("lfm2",)
"""Architectures whose layers make of intermediate_size another one."""


def check_fit(modules: Mapping[str, LoraModule], facts: BaseFacts, base: Checkpoint | None) -> None:
    """Make sure that every module, by GGUF's name of its weight, is one for this base.

    Raises: MatchError, ShapeError
    """
    shapes = base.shapes if base is not None else {}
    config = base.config if base is not None else {}
    known = by_tensor(facts.family, shapes, modules)
    for tensor, module in modules.items():
        heads = None if module.target.opaque else heads_of(tensor, facts)
        if heads is not None:
            check_heads(str(module.target), module.out_features, heads)
        if shapes and tensor not in known:
            raise MatchError(f"{module.target}: the base model has no such parameter. Is it the right base model?")
        if shapes and "quantization_config" not in config:
            shape: tuple[int | None, ...] = tuple(shapes[f"{known[tensor]}.weight"])
        else:
            shape = _stated_shape(kind_of(tensor), facts.family, config)
        _check_shape(module, shape)


def heads_of(tensor: str, facts: BaseFacts | None) -> int | None:
    """By how many heads the rows of a tensor are in another order; None where they are not."""
    if facts is None or not facts.family.permuted or kind_of(tensor) not in PERMUTED_TENSORS:
        return None
    return facts.heads if kind_of(tensor) == "attn_q" else facts.kv_heads


def _check_shape(module: LoraModule, shape: tuple[int | None, ...]) -> None:
    """Raises: ShapeError if the module is for another shape; None in it is a size that is not known"""
    wanted = module.weight_shape
    fits = len(shape) == len(wanted) and all(size in (None, here) for size, here in zip(shape, wanted, strict=True))
    if not fits:
        found = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(
            f"{module.target}: the base has it in shape ({found}), the adapter is for {wanted}. Is it the right base "
            "model?"
        )


def _stated_shape(kind: str, family: Family, config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The shape of a weight (out, in) by the base's config.json."""
    text = config.get("text_config")
    said = {**config, **text} if isinstance(text, Mapping) else config
    hidden = _size(said, "hidden_size")
    mlp = None if family.architecture in _GROWN else _size(said, "intermediate_size")
    heads = _size(said, "num_attention_heads")
    head = _size(said, "head_dim")
    if head is None and family.permuted and hidden and heads:
        head = hidden // heads  # of other families it may be a number of their own
    q, kv = _product(heads, head), _product(_size(said, "num_key_value_heads") or heads, head)
    gate_and_up = family.block.get("ffn_up", "").endswith("gate_up_proj")
    shapes = {
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_qkv": (None if q is None or kv is None else q + 2 * kv, hidden),
        "attn_output": (hidden, q),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (_product(mlp, 2) if gate_and_up else mlp, hidden),
        "ffn_down": (hidden, mlp),
        EMBEDDING: (None, hidden),
        HEAD: (None, hidden),
    }
    return shapes.get(kind, (None, None))


def _size(said: Mapping[str, Any], key: str) -> int | None:
    value = said.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _product(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one * other
