"""The names of LitGPT's modules in Hugging Face's models, as LitGPT's own conversion gives them.

Source: Lightning-AI/litgpt 0.5.13, litgpt/scripts/convert_lit_checkpoint.py
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from adaptertools.dialects.litgpt.keys import LAYER
from adaptertools.dialects.litgpt.settings import Model


class Attention(Enum):
    """How Hugging Face's model stores what LitGPT fuses as rows of q, of k and of v."""

    SEPARATE = auto()
    FUSED = auto()
    """one projection, in the same order"""
    INTERLEAVED = auto()
    """one projection; for each group of queries its q, its k and its v"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How Hugging Face names the modules of a family of models."""

    layers: str
    attention: Attention
    qkv: str
    """The fused projection, or the module that q_proj, k_proj and v_proj stand in."""
    modules: Mapping[str, str]
    """The other modules, by LitGPT's name; E stands for the number of an expert."""
    head: str = "lm_head"
    gate_up: str | None = None
    """The projection that fc_1 and fc_2 are the halves of."""


_LLAMA_MLP = {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
_MIXTRAL = {
    "mlp.gate": "block_sparse_moe.gate",
    "mlp.experts.E.fc_1": "block_sparse_moe.experts.E.w1",
    "mlp.experts.E.fc_2": "block_sparse_moe.experts.E.w3",
    "mlp.experts.E.proj": "block_sparse_moe.experts.E.w2",
}
_QWEN_EXPERTS = {
    "mlp.gate": "mlp.gate",
    "mlp.experts.E.fc_1": "mlp.experts.E.gate_proj",
    "mlp.experts.E.fc_2": "mlp.experts.E.up_proj",
    "mlp.experts.E.proj": "mlp.experts.E.down_proj",
}


def _llama(mlp: Mapping[str, str]) -> Family:
    modules = {"attn.proj": "self_attn.o_proj", **mlp}
    return Family(layers="model.layers", attention=Attention.SEPARATE, qkv="self_attn", modules=modules)


LLAMA = _llama(_LLAMA_MLP)
MIXTRAL = _llama(_MIXTRAL)
QWEN3_MOE = _llama(_QWEN_EXPERTS)
PHI = Family(
    layers="model.layers",
    attention=Attention.SEPARATE,
    qkv="self_attn",
    modules={"attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"},
)
PHI3 = Family(
    layers="model.layers",
    attention=Attention.FUSED,
    qkv="self_attn.qkv_proj",
    modules={"attn.proj": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"},
    gate_up="mlp.gate_up_proj",
)
_DENSE_4H = {"mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}
FALCON = Family(
    layers="transformer.h",
    attention=Attention.INTERLEAVED,
    qkv="self_attention.query_key_value",
    modules={"attn.proj": "self_attention.dense", **_DENSE_4H},
)
GPT_NEOX = Family(
    layers="gpt_neox.layers",
    attention=Attention.INTERLEAVED,
    qkv="attention.query_key_value",
    modules={"attn.proj": "attention.dense", **_DENSE_4H},
    head="embed_out",
)


def family_of(model: Model) -> Family | None:
    """The family of a model, by its name and the class of its MLP as LitGPT chooses; None for one that it lacks."""
    name = model.name.lower()
    if "falcon" in model.name:
        return FALCON if model.mlp == "GptNeoxMLP" else None
    if name.startswith(("phi-3", "phi-4")):
        return PHI3 if model.mlp == "LLaMAMLP" else None
    if name.startswith("phi"):
        return PHI if model.mlp == "GptNeoxMLP" else None
    if name.startswith("qwen3"):
        return {"LLaMAMoE": QWEN3_MOE, "LLaMAMLP": LLAMA}.get(model.mlp)
    return {"LLaMAMLP": LLAMA, "GemmaMLP": LLAMA, "LLaMAMoE": MIXTRAL, "GptNeoxMLP": GPT_NEOX}.get(model.mlp)


def hugging_face_name(module: str, family: Family) -> str | None:
    """The name of any module but the fused projection; None for one that the family does not have."""
    if module == "lm_head":
        return family.head
    match = LAYER.fullmatch(module)
    if match is None:
        return None
    expert = re.search(r"experts\.(\d+)", match["module"])
    name = family.modules.get(re.sub(r"experts\.\d+", "experts.E", match["module"]))
    if name is None:
        return None
    return f"{family.layers}.{match['layer']}.{name.replace('.E.', f'.{expert[1]}.') if expert else name}"
