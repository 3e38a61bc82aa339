"""TensorRT-LLM, PyTorch backend: PEFT folders.

Read in NVIDIA/TensorRT-LLM at 007e181 (lora_manager.py) and 037d4ba (lora_helper.py): one set
of rules.
"""

from adaptertools.adapter import Feature
from adaptertools.consumers.conditions import (
    UNTOLD_FAMILY,
    alphas_unlike_lora_alpha,
    bias_trained,
    changed_base,
    fields_missing,
    files_but,
    heads_but,
    holds,
    misshapen,
    modules_but,
    modules_named,
    opaque,
    rank_over_cap,
    travelling_weights,
    unmatched,
    untold,
)
from adaptertools.consumers.rule import CHANGES, FAILS, NOTE, UNCHECKED, Consumer, Rule

_MANAGER = "tensorrt_llm/lora_manager.py"
_HELPER = "tensorrt_llm/lora_helper.py"
_SKIPPED = ("lm_head", "embed_tokens")
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj", "gate_up_proj")
_EXPERTS = ("w1", "w2", "w3", "gate")
_UNREAD = "unread, so the adapter is loaded as a plain one"

CONSUMER = Consumer(
    name="tensorrt-llm",
    title="TensorRT-LLM",
    repository="NVIDIA/TensorRT-LLM",
    versions=("037d4ba", "007e181"),
    formats=("peft",),
    writes="peft",
    max_rank=64,
    cap_option="max_lora_rank",
    rules=(
        Rule(
            "file names",
            files_but("adapter_model.safetensors", "adapter_model.bin"),
            FAILS,
            "it opens no other weights",
            _MANAGER,
        ),
        Rule("configuration", fields_missing("r", "lora_alpha"), FAILS, "required", _MANAGER),
        Rule("rank", rank_over_cap, FAILS, "above max_lora_rank of LoraConfig (--max-rank here)", _HELPER),
        Rule("alpha_pattern", alphas_unlike_lora_alpha, CHANGES, "unread: lora_alpha counts everywhere", _MANAGER),
        Rule(
            "list of modules",
            modules_but(*_MODULES, *_EXPERTS, *_SKIPPED),
            FAILS,
            "not in its list of modules, unless lora_target_modules and a mapping name them",
            _HELPER,
        ),
        Rule("head, embedding", modules_named(*_SKIPPED), CHANGES, "their factors are passed over", _MANAGER),
        Rule("DoRA", holds(Feature.DORA), CHANGES, "magnitudes have to be divided by ‖W + ΔW‖ beforehand", _MANAGER),
        Rule("bias", bias_trained, FAILS, "no key that it takes", _MANAGER),
        Rule("lora_bias", holds(Feature.LORA_BIAS), FAILS, "no key that it takes", _MANAGER),
        Rule("aLoRA", holds(Feature.ALORA), CHANGES, _UNREAD, _MANAGER),
        Rule("layer replication", holds(Feature.LAYER_REPLICATION), CHANGES, _UNREAD, _MANAGER),
        Rule("changed base", changed_base(), CHANGES, _UNREAD, _MANAGER),
        Rule(
            "heads", heads_but(), FAILS, "no key that it takes, and lm_head and embed_tokens are passed over", _MANAGER
        ),
        Rule("token rows", holds(Feature.TOKEN_ROWS), FAILS, "no key that it takes", _MANAGER),
        Rule("stored embeddings", travelling_weights, NOTE, "passed over: the base model's own are used", _MANAGER),
        Rule("expert stacks", holds(Feature.PARAMETER), FAILS, "no key that it takes", _MANAGER),
        Rule("fused slots", holds(Feature.FUSED_ROWS), FAILS, "lora_B of PEFT before 0.3 is no matrix", _MANAGER),
        Rule("convolutions", holds(Feature.CONV), FAILS, "only linear layers are adapted", _MANAGER),
        Rule("architecture", untold, UNCHECKED, UNTOLD_FAMILY, _MANAGER),
        Rule("module names", opaque, FAILS, "no module path of the model", _MANAGER),
        Rule("names in the base", unmatched, CHANGES, "no layer takes them", _MANAGER),
        Rule("sizes in the base", misshapen, FAILS, "of another size there", _MANAGER),
    ),
)
