"""vLLM: PEFT folders, one pair of factors for each linear layer.

Read in the releases that `versions` names. Between two of them a rule may begin earlier than its `since` says.
"""

from adaptertools.adapter import Feature
from adaptertools.consumers.conditions import (
    UNTOLD_FAMILY,
    alphas_unlike_lora_alpha,
    bias_trained,
    changed_base,
    changed_base_only,
    embeddings_but,
    field_set,
    fields_missing,
    files_but,
    heads_but,
    holds,
    misshapen,
    opaque,
    rank_over_cap,
    ranks_unlike_r,
    rslora,
    travelling_weights,
    unmatched,
    untold,
)
from adaptertools.consumers.rule import CHANGES, FAILS, NOTE, UNCHECKED, Consumer, Rule

_HELPER = "vllm/lora/peft_helper.py"
_MODEL = "vllm/lora/lora_model.py"
_NAMES = "vllm/lora/utils.py"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_ONE_SCALE = "lora_alpha / r of the configuration counts for every module"
_UNREAD = "unread, so the adapter is loaded as a plain one"
_BIAS_OPTION = "up to 0.11.0 unless started with --enable-lora-bias"
_LORA_BIAS = holds(Feature.LORA_BIAS)
_VARIANTS = field_set("use_qalora", "use_bdlora")
_RANKS = (8, 16, 32, 64, 128, 256)

CONSUMER = Consumer(
    name="vllm",
    title="vLLM",
    repository="vllm-project/vllm",
    versions=("0.6.6", "0.8.5", "0.11.0", "0.20.0", "0.26.0", "0.31.0", "0.32.0", "0.33.0"),
    formats=("peft",),
    writes="peft",
    max_rank=16,
    caps={"0": _RANKS, "0.8.5": (*_RANKS, 320, 512), "0.20.0": (1, *_RANKS, 320, 512)},
    cap_option="--max-lora-rank",
    rules=(
        Rule("file names", files_but(*_WEIGHTS), FAILS, "it opens no other weights", _MODEL),
        Rule("configuration", fields_missing("r", "lora_alpha", "target_modules"), FAILS, "required", _HELPER),
        Rule("rank", rank_over_cap, FAILS, "above max_lora_rank (--max-lora-rank; --max-rank here)", _HELPER),
        Rule("rank_pattern", ranks_unlike_r, CHANGES, f"unread: {_ONE_SCALE}", _HELPER, until="0.32.0"),
        Rule("alpha_pattern", alphas_unlike_lora_alpha, CHANGES, f"unread: {_ONE_SCALE}", _HELPER, until="0.32.0"),
        Rule("rsLoRA", rslora, FAILS, "refused", _HELPER, until="0.8.5"),
        Rule("DoRA", holds(Feature.DORA), FAILS, "refused", _HELPER),
        Rule("bias", bias_trained, FAILS, f"refused, {_BIAS_OPTION}", _HELPER),
        Rule("lora_bias", _LORA_BIAS, FAILS, f"refused, {_BIAS_OPTION}", _NAMES, until="0.31.0"),
        Rule("lora_bias", _LORA_BIAS, FAILS, "taken for lora_B", _NAMES, since="0.31.0", until="0.32.0"),
        Rule("lora_bias", _LORA_BIAS, FAILS, "refused", _HELPER, since="0.32.0"),
        Rule("aLoRA", holds(Feature.ALORA), CHANGES, _UNREAD, _HELPER, until="0.32.0"),
        Rule("aLoRA", holds(Feature.ALORA), FAILS, "refused", _HELPER, since="0.32.0"),
        Rule("layer replication", holds(Feature.LAYER_REPLICATION), CHANGES, _UNREAD, _HELPER, until="0.32.0"),
        Rule("layer replication", holds(Feature.LAYER_REPLICATION), FAILS, "refused", _HELPER, since="0.32.0"),
        Rule("changed base", changed_base(), CHANGES, _UNREAD, _HELPER, until="0.32.0"),
        Rule("changed base", changed_base("lora_ga"), FAILS, "refused", _HELPER, since="0.32.0"),
        Rule("LoRA-GA", changed_base_only("lora_ga"), CHANGES, "added to the unchanged base", _HELPER, since="0.32.0"),
        Rule(
            "QALoRA, BD-LoRA", _VARIANTS, CHANGES, "unread: parts are taken for whole factors", _HELPER, until="0.32.0"
        ),
        Rule("QALoRA, BD-LoRA", _VARIANTS, FAILS, "refused", _HELPER, since="0.32.0"),
        Rule("heads", heads_but(), FAILS, "modules_to_save is refused", _HELPER, until="0.31.0"),
        Rule(
            "heads",
            heads_but("classifier", "score"),
            FAILS,
            "modules_to_save but classifier and score is refused",
            _HELPER,
            since="0.31.0",
        ),
        Rule("token rows", holds(Feature.TOKEN_ROWS), FAILS, "trainable_tokens_delta is no name that it takes", _NAMES),
        Rule("stored embeddings", travelling_weights, NOTE, "left out: the base model's own are used", _NAMES),
        Rule("embeddings", embeddings_but("embed_tokens", "lm_head"), NOTE, "only where the model lists it", _MODEL),
        Rule("expert stacks", holds(Feature.PARAMETER), NOTE, "for mixture models that it wraps, no others", _MODEL),
        Rule("fused slots", holds(Feature.FUSED_ROWS), FAILS, "lora_B of PEFT before 0.3 is no matrix", _MODEL),
        Rule("convolutions", holds(Feature.CONV), FAILS, "only linear layers and embeddings are adapted", _MODEL),
        Rule("architecture", untold, UNCHECKED, UNTOLD_FAMILY, "vllm/model_executor/models/interfaces.py"),
        Rule("module names", opaque, FAILS, "no module path of the model", _MODEL),
        Rule("names in the base", unmatched, FAILS, "no such module, so the adapter is refused", _MODEL),
        Rule("sizes in the base", misshapen, FAILS, "of another size there: refused, or a part is changed", _MODEL),
    ),
)
