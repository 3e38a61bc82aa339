"""How torchtune holds each family of models: under which names, and in which order the rows of q and k stand.

torchtune turns pairs of neighbouring rows by the rotary embedding wherever its model is written after Meta's or
Google's code, and permutes q and k of Hugging Face's weights on loading; Qwen and Phi it writes after Hugging Face's
code and leaves as they are. Phi's fused projections it cuts into their parts.

Source: pytorch/torchtune bd2a0fc, torchtune/training/checkpointing/_checkpointer.py and models/*/_convert_weights.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from adaptertools.errors import ConfigError, ShapeError, UnsupportedFeatureError
from adaptertools.module import RowSlice


class Rows(Enum):
    """The order of the rows of q and k, and of their lora_b and magnitude."""

    PAIRED = auto()
    """neighbours belong together, as Meta stores them; Hugging Face has halves"""
    HALVES = auto()
    """as Hugging Face stores them"""
    FUSED = auto()
    """as Hugging Face stores them, but there q, k and v are one projection, gate and up another"""


FAMILIES: Mapping[str, Rows] = {
    "llama": Rows.PAIRED,
    "mistral": Rows.PAIRED,
    "gemma": Rows.PAIRED,
    "gemma2": Rows.PAIRED,
    "qwen2": Rows.HALVES,
    "qwen3": Rows.HALVES,
    "phi3": Rows.FUSED,
}
"""By `model_type` of config.json. Phi-4 is phi3 there, SmolLM2 llama, Qwen 2.5 qwen2."""


_MOST_ROWS = 1 << 24
"""More than the projections of any attention have; nothing is laid out beyond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A base model as far as its adapters need it: the order of its rows and the sizes of its heads."""

    name: str
    rows: Rows
    heads: int
    kv_heads: int
    head_dim: int
    reward: bool
    """Its output layer is a score, not a vocabulary."""

    @classmethod
    def of(cls, config: Mapping[str, Any], label: str) -> "Family":
        """The family of a model with this config.json.

        Raises: UnsupportedFeatureError for models that torchtune does not train, or whose adapters are not read;
                ConfigError
        """
        name = config.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            raise UnsupportedFeatureError(
                f"{label}: model_type is {name!r:.40}. How torchtune orders the rows of q and k is known for "
                f"{', '.join(FAMILIES)}; for others nothing is guessed"
            )
        heads = _size(config, "num_attention_heads", label)
        stated = config.get("num_key_value_heads")
        kv_heads = heads if stated is None else _size(config, "num_key_value_heads", label)
        whole = config.get("head_dim") is None
        head_dim = _size(config, "hidden_size", label) // heads if whole else _size(config, "head_dim", label)
        if (heads + 2 * kv_heads) * head_dim > _MOST_ROWS:
            raise ConfigError(f"{label}: {heads} heads of size {head_dim} are more than any model has")
        return cls(
            name=name,
            rows=FAMILIES[name],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            reward="SequenceClassification" in str(config.get("architectures")),
        )

    def heads_of(self, module: str) -> int | None:
        """How many heads q or k has; None for other modules."""
        return {"q_proj": self.heads, "k_proj": self.kv_heads}.get(module.rpartition(".")[2])

    def fused_rows(self, module: str, rows: int) -> tuple[str, RowSlice] | None:
        """Hugging Face's fused projection, and the rows of it that a module of `rows` outputs is.

        Raises: ShapeError if it is none of that size
        """
        last = module.rpartition(".")[2]
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        places = {
            "q_proj": ("self_attn.qkv_proj", 0, q, q + 2 * kv),
            "k_proj": ("self_attn.qkv_proj", q, kv, q + 2 * kv),
            "v_proj": ("self_attn.qkv_proj", q + kv, kv, q + 2 * kv),
            "w1": ("mlp.gate_up_proj", 0, rows, 2 * rows),
            "w3": ("mlp.gate_up_proj", rows, rows, 2 * rows),
        }
        if last not in places:
            return None
        name, start, size, total = places[last]
        if rows != size:
            raise ShapeError(f"{module}: lora_b has {rows} rows, the base model has {size} there")
        return name, RowSlice(start=start, stop=start + size, total=total)


def in_halves(rows: Tensor, heads: int, head_dim: int, name: str) -> Tensor:
    """Rows of q or k in Hugging Face's order: of each head first those of even index, then those of odd.

    Shapes: (heads·head_dim, …) -> the same
    Raises: ShapeError if they are not that many
    """
    if rows.shape[0] != heads * head_dim or head_dim % 2:
        raise ShapeError(
            f"{name} has {rows.shape[0]} rows; the base model has {heads} heads of {head_dim} there. Is it the base "
            "model that the adapter was trained on?"
        )
    order = torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).flatten()
    return rows[order]


def _size(config: Mapping[str, Any], key: str, label: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{label}: {key} is {value!r:.40}, expected a whole number from 1 on")
    return value
