"""Tiny seeded models and adapters that real PEFT trains on them: one case for every kind of layer and setting."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn


class Net(nn.Module):
    """An embedding, two linear layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lin0 = nn.Linear(6, 8)
        self.lin1 = nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.lin1(torch.tanh(self.lin0(self.embed(tokens))))
        return self.head(self.norm(hidden))


class Convolutions(nn.Module):
    """One convolution in each number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(2, 3, (2, 2, 2))
        self.conv2d = nn.Conv2d(3, 4, (2, 3), stride=2)
        self.conv1d = nn.Conv1d(4, 5, 2, padding=1)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv3d(x)).mean(2)
        x = torch.tanh(self.conv2d(x)).mean(2)
        return self.out(torch.tanh(self.conv1d(x)).mean(2))


class Attention(nn.Module):
    """nn.MultiheadAttention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lin(x)
        return self.out(self.attn(hidden, hidden, hidden, need_weights=False)[0])


def _tokens(count: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"input_ids": torch.arange(10).reshape(2, 5) % count}


def _llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "attention_bias": True, **changes}))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=32, n_positions=16))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=32, max_position_embeddings=16, num_labels=3))


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, vocab_size=32, max_position_embeddings=16, num_labels=3)
    return RobertaForSequenceClassification(config)


def _qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    config = Qwen3MoeConfig(**sizes, **heads, vocab_size=32, num_experts=3, num_experts_per_tok=2)
    return Qwen3MoeForCausalLM(config)


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=3, num_experts_per_tok=2))


def _inputs(shape: tuple[int, ...], name: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)}


@dataclass(frozen=True)
class Model:
    """How to make a base model, and what to feed it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]


NET = Model(Net, lambda: {"tokens": torch.arange(11)})
CONVOLUTIONS = Model(Convolutions, _inputs((2, 2, 4, 5, 6), "x"))
ATTENTION = Model(Attention, _inputs((2, 3, 6), "x"))
LLAMA = Model(_llama, _tokens(32))
TIED_LLAMA = Model(lambda: _llama(tie_word_embeddings=True), _tokens(32))
GPT2 = Model(_gpt2, _tokens(32))
BERT = Model(_bert, _tokens(32))
ROBERTA = Model(_roberta, _tokens(32))
QWEN3_MOE = Model(_qwen3_moe, _tokens(32))
GPT_OSS = Model(_gpt_oss, _tokens(32))

ATTENTION_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA_LAYERS = [*ATTENTION_LAYERS, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CAUSAL, CLASSIFY = TaskType.CAUSAL_LM, TaskType.SEQ_CLS

CASES: dict[str, tuple[Model, dict[str, Any]]] = {
    "linear": (NET, {"target_modules": ["lin0", "lin1"], "r": 3, "lora_alpha": 5}),
    "embedding": (NET, {"target_modules": ["embed", "lin0"], "r": 2, "lora_alpha": 3}),
    "rslora": (NET, {"target_modules": ["embed", "lin0", "lin1"], "r": 3, "lora_alpha": 5, "use_rslora": True}),
    "dora": (NET, {"target_modules": ["embed", "lin0", "lin1"], "r": 2, "use_dora": True}),
    "lora_bias": (NET, {"target_modules": ["lin0", "head"], "r": 2, "lora_bias": True}),
    "bias_lora_only": (NET, {"target_modules": ["lin0", "lin1"], "r": 2, "bias": "lora_only"}),
    "bias_all": (NET, {"target_modules": ["lin0"], "r": 2, "bias": "all", "modules_to_save": ["head"]}),
    "tokens": (NET, {"target_modules": ["lin0"], "r": 2, "trainable_token_indices": {"embed": [7, 2, 3]}}),
    "convolutions": (CONVOLUTIONS, {"target_modules": ["conv1d", "conv2d", "conv3d"], "r": 2, "lora_alpha": 3}),
    "convolutions_dora": (CONVOLUTIONS, {"target_modules": ["conv1d", "conv2d", "conv3d"], "r": 2, "use_dora": True}),
    "convolutions_bias": (CONVOLUTIONS, {"target_modules": ["conv1d", "conv2d", "out"], "r": 2, "lora_bias": True}),
    "attention": (ATTENTION, {"target_modules": ["attn", "lin"], "r": 2, "lora_alpha": 3}),
    "attention_patterns": (
        ATTENTION,
        {"target_modules": ["attn", "lin"], "r": 2, "rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 7}},
    ),
    "attention_bias": (ATTENTION, {"target_modules": ["attn"], "r": 2, "bias": "all"}),
    "attention_parameter": (
        ATTENTION,
        {"target_modules": ["out_proj", "lin"], "target_parameters": ["attn.in_proj_weight"], "r": 2},
    ),
    "llama": (LLAMA, {"target_modules": LLAMA_LAYERS, "r": 4, "lora_alpha": 8, "task_type": CAUSAL}),
    "llama_patterns": (
        LLAMA,
        {
            "target_modules": LLAMA_LAYERS,
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 3},
            "alpha_pattern": {r"layers\.1\.self_attn\..*": 5, "gate_proj": 1.5},
            "use_rslora": True,
        },
    ),
    "llama_dora": (LLAMA, {"target_modules": LLAMA_LAYERS, "r": 2, "use_dora": True, "task_type": CAUSAL}),
    "llama_head": (
        LLAMA,
        {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["lm_head", "norm"], "task_type": CAUSAL},
    ),
    "llama_embeddings": (LLAMA, {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 2}),
    "llama_tied": (
        TIED_LLAMA,
        {"target_modules": ["embed_tokens", "q_proj"], "r": 2, "lora_alpha": 3, "ensure_weight_tying": True},
    ),
    "llama_tied_saved": (
        TIED_LLAMA,
        {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "llama_tokens": (TIED_LLAMA, {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": [5, 1]}),
    "llama_layers": (
        LLAMA,
        {"target_modules": ["q_proj", "v_proj"], "r": 2, "layers_to_transform": [1], "bias": "all"},
    ),
    "llama_regex": (LLAMA, {"target_modules": r".*\.layers\.1\..*_proj", "exclude_modules": ["o_proj"], "r": 2}),
    "alora": (
        LLAMA,
        {"target_modules": ["q_proj", "v_proj"], "r": 2, "alora_invocation_tokens": [3, 4], "task_type": CAUSAL},
    ),
    "velora": (LLAMA, {"target_modules": ["q_proj", "v_proj"], "r": 2, "velora_config": {"num_groups": 2}}),
    "monteclora": (
        LLAMA,
        {"target_modules": ["q_proj"], "r": 2, "monteclora_config": {"num_samples": 2}},
    ),
    "mica": (LLAMA, {"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": "mica"}),
    "orthogonal": (LLAMA, {"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": "orthogonal"}),
    "bdlora": (
        LLAMA,
        {
            "target_modules": ["q_proj", "o_proj"],
            "r": 4,
            "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["o_proj"], "nblocks": 2},
        },
    ),
    "gpt2": (GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3, "lora_alpha": 9, "fan_in_fan_out": True}),
    "gpt2_mixed": (GPT2, {"target_modules": ["c_attn", "lm_head"], "r": 2}),
    "gpt2_dora": (GPT2, {"target_modules": ["c_attn", "c_proj"], "r": 2, "use_dora": True, "fan_in_fan_out": True}),
    "bert": (BERT, {"target_modules": ["query", "value", "dense"], "r": 2, "task_type": CLASSIFY}),
    "roberta": (ROBERTA, {"target_modules": ["query", "value"], "r": 2, "task_type": CLASSIFY}),
    "moe": (QWEN3_MOE, {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 2, "lora_alpha": 3}),
    "moe_one": (QWEN3_MOE, {"target_modules": [], "target_parameters": EXPERTS[1:], "r": 2, "lora_alpha": 3}),
    "moe_patterns": (
        QWEN3_MOE,
        {
            "target_modules": ["gate", "q_proj"],
            "target_parameters": EXPERTS,
            "r": 2,
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"experts.gate_up_proj": 5},
        },
    ),
    "moe_transposed": (GPT_OSS, {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 2}),
    "parameter": (NET, {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"], "r": 2, "lora_alpha": 3}),
}


def make_base(case: str) -> nn.Module:
    """The base model of a case, the same on every call."""
    torch.manual_seed(0)
    model = CASES[case][0].build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def make_adapter(case: str, base: nn.Module, **changes: Any) -> PeftModel:
    """A PEFT model in which every trained value differs from its start."""
    with quiet():
        model = get_peft_model(base, LoraConfig(**{**CASES[case][1], **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    trained = ("lora_", "modules_to_save.", "trainable_tokens_delta")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_bias = name.endswith("bias") and CASES[case][1].get("bias", "none") != "none" and parameter.requires_grad
            if any(mark in name for mark in trained) or is_bias:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(parameter + noise if "magnitude" in name else noise)
    return model


def run(case: str, model: nn.Module) -> Tensor:
    """What the model gives for the input of the case."""
    with torch.no_grad():
        result = model(**CASES[case][0].inputs())
    return result if isinstance(result, Tensor) else result.logits


def headers(model: nn.Module) -> Any:
    """The model as `base=` takes it: shapes and configuration."""
    config = getattr(model, "config", None)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return SimpleNamespace(shapes=shapes, config=config.to_dict() if config else {})


class quiet(warnings.catch_warnings):  # noqa: N801
    """PEFT's advice on settings that a case makes on purpose."""

    def __enter__(self) -> None:
        super().__enter__()
        for text in (
            "`is_gradient_checkpointing` is deprecated",
            "fan_in_fan_out is set to",
            "Model has `tie_word_embeddings=True`",
            "Model with `tie_word_embeddings=True`",
            "Setting `save_embedding_layers`",
            "Could not find a config file",
            "aLoRA is currently only supported",
        ):
            warnings.filterwarnings("ignore", message=text)
