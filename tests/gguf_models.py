"""Tiny models of every family that the format gguf takes, and adapters for them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from adaptertools.dialects.gguf.families import FAMILIES

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TWO_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 2}
_MORE: dict[str, dict[str, Any]] = {
    "mixtral": _TWO_EXPERTS,
    "granitemoe": _TWO_EXPERTS,
    "gpt_oss": _TWO_EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "qwen2_moe": {
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]},
    "cohere2": {"rotary_pct": 1.0},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 256},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
_TIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2")
"""Families of which llama.cpp knows no head of its own."""


def make_model(model_type: str, folder: Path, **options: Any) -> PreTrainedModel:
    """A model with values as after training, saved in the folder."""
    torch.manual_seed(0)
    given = TINY | _MORE.get(model_type, {}) | {"tie_word_embeddings": model_type in _TIED} | options
    if model_type == "gemma3":
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Gemma3Config(text_config=given, vision_config=vision | {"image_size": 28, "patch_size": 14})
        model = Gemma3ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.05 if parameter.ndim == 1 else 0.15
            parameter.add_(torch.randn(parameter.shape) * (0.0 if "vision" in name else spread))
    model.eval().save_pretrained(folder)
    vocabulary = {"model": {"vocab": {str(n): n for n in range(TINY["vocab_size"])}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))  # which the converter counts for Gemma 3
    return model


def targets(model_type: str) -> list[str]:
    """The modules of the family that GGUF takes, without embedding and head."""
    paths = FAMILIES[model_type].block.values()
    return [f"model.{'language_model.' * (model_type == 'gemma3')}layers.{n}.{path}" for n in (0, 1) for path in paths]


def patterns(model_type: str) -> dict[str, Any]:
    """Ranks and alphas of their own for some modules of the family."""
    leaves = [path.rpartition(".")[2] for path in FAMILIES[model_type].block.values()]
    return {"rank_pattern": {leaves[0]: 2, leaves[2]: 7}, "alpha_pattern": {leaves[1]: 3.0, leaves[2]: 1.0}}


def make_adapter(model: PreTrainedModel, model_type: str, folder: Path, **options: Any) -> PeftModel:
    """PEFT's adapter on these modules, with values as after training, saved in the folder."""
    names = {name for name, _ in model.named_modules()}
    given = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [name for name in targets(model_type) if name in names],
    } | options
    wrapped = get_peft_model(model, LoraConfig(**given)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped
