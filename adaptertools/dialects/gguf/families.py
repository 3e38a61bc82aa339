"""The model families whose adapters llama.cpp takes as they are, or with the rows of q and k in another order.

transformers rotates the two halves of a head, llama.cpp's `llama` pairs of neighbouring rows: for such a family its
converter reorders the rows of q and k in the base, and so must an adapter. Families that it changes in another way
(GPT-NeoX, BLOOM, Falcon, DeepSeek …) and stacks of experts are not here, and are refused by name.

Source: ggml-org/llama.cpp 0c1e570, conversion/<family>.py, class by class: `undo_permute`, `permute`, `modify_tensors`;
every family below is compared with convert_lora_to_gguf.py, tensor by tensor, in tests/test_gguf_consumer.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

CONVERTER = "llama.cpp's convert_lora_to_gguf.py"

EMBEDDING, HEAD = "token_embd", "output"

_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ATTENTION = {name: path for name, path in _BLOCK.items() if name.startswith("attn")}
_NO_GATE = {name: path for name, path in _BLOCK.items() if name != "ffn_gate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How GGUF calls a family of models, and what its tensors are called by transformers.

    `block` are those within `layers.N` of the `root`, which is the language model's place in a multimodal one.
    `permuted` says that llama.cpp has the rows of q and k in another order. `tied` says whether the embedding is the
    head too where the base's configuration leaves that open, `head` whether GGUF knows any but the embedding.
    """

    architecture: str
    permuted: bool = False
    root: str = "model"
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    tied: bool = False
    head: bool = True

    @property
    def top(self) -> dict[str, str]:
        """The tensors outside the blocks, and what transformers calls them."""
        return {EMBEDDING: f"{self.root}.embed_tokens"} | ({HEAD: "lm_head"} if self.head else {})


_LLAMA = Family(architecture="llama", permuted=True)
_OLMO2 = Family(architecture="olmo2")

FAMILIES: Mapping[str, Family] = {
    # LlamaModel.permute, in llama.py, granite.py and olmo.py
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Family(architecture="llama", permuted=True, block=_ATTENTION),
    "arcee": Family(architecture="arcee", permuted=True, block=_NO_GATE),
    "granite": Family(architecture="granite", permuted=True),
    "granitemoe": Family(architecture="granitemoe", permuted=True, block=_ATTENTION),
    "smollm3": Family(architecture="smollm3", permuted=True),
    "olmo": Family(architecture="olmo", permuted=True),
    # as they are: qwen.py, gemma.py, phi.py, olmo.py, starcoder.py, command_r.py, stablelm.py, nemotron.py, lfm2.py,
    # exaone.py, ernie.py, hunyuan.py, gpt_oss.py, and ApertusModel of llama.py
    "qwen2": Family(architecture="qwen2"),
    "qwen3": Family(architecture="qwen3"),
    "qwen2_moe": Family(architecture="qwen2moe", block=_ATTENTION),
    "qwen3_moe": Family(architecture="qwen3moe", block=_ATTENTION),
    "gemma": Family(architecture="gemma", tied=True, head=False),
    "gemma2": Family(architecture="gemma2", tied=True, head=False),
    "gemma3_text": Family(architecture="gemma3", tied=True),
    "gemma3": Family(architecture="gemma3", root="model.language_model", tied=True),
    "phi": Family(
        architecture="phi2",
        block=_ATTENTION | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    ),
    "phi3": Family(
        architecture="phi3",
        block={
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "starcoder2": Family(
        architecture="starcoder2", block=_ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, tied=True
    ),
    "cohere": Family(architecture="command-r", tied=True, head=False),
    "cohere2": Family(architecture="cohere2", tied=True, head=False),
    "stablelm": Family(architecture="stablelm"),
    "nemotron": Family(architecture="nemotron", block=_NO_GATE),
    "apertus": Family(architecture="apertus", block=_NO_GATE),
    "seed_oss": Family(architecture="seed_oss"),
    "lfm2": Family(
        architecture="lfm2",
        block={
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.out_proj",
            "ffn_gate": "feed_forward.w1",
            "ffn_up": "feed_forward.w3",
            "ffn_down": "feed_forward.w2",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.out_proj": "conv.out_proj",
        },
        tied=True,
    ),
    "exaone4": Family(architecture="exaone4"),
    "ernie4_5": Family(architecture="ernie4_5", tied=True),
    "hunyuan_v1_dense": Family(architecture="hunyuan-dense"),
    "gpt_oss": Family(architecture="gpt-oss", block=_ATTENTION),
}
"""By the `model_type` of the base's config.json."""

BY_ARCHITECTURE: Mapping[str, Family] = {family.architecture: family for family in reversed(list(FAMILIES.values()))}
"""By GGUF's `general.architecture`; the first family in the table where several share one."""

PERMUTED_TENSORS = ("attn_q", "attn_k")
