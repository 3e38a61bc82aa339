"""SGLang: PEFT folders, with q, k, v and gate, up loaded as one fused layer each.

Read in the releases that `versions` names, in sglang/srt/lora/. Between two of them a rule may begin earlier than its
`since` says.
"""

from adaptertools.adapter import Feature
from adaptertools.consumers.conditions import (
    UNTOLD_FAMILY,
    alphas_unlike_lora_alpha,
    bias_trained,
    changed_base,
    fields_missing,
    heads_but,
    holds,
    misshapen,
    missing_layers,
    opaque,
    rank_over_cap,
    ranks_unlike_r,
    rslora,
    target_modules_as_text,
    travelling_weights,
    unmatched,
    untold,
)
from adaptertools.consumers.rule import CHANGES, FAILS, NOTE, UNCHECKED, Consumer, Layers, Rule

_LORA = "sglang/srt/lora/lora.py"
_CONFIG = "sglang/srt/lora/lora_config.py"
_POOL = "sglang/srt/lora/mem_pool.py"
_MANAGER = "sglang/srt/lora/lora_manager.py"
_QKV = Layers(together=("q_proj", "k_proj", "v_proj"), wanted=("q_proj", "v_proj"))
_UNREAD = "unread, so the adapter is loaded as a plain one"

CONSUMER = Consumer(
    name="sglang",
    title="SGLang",
    repository="sgl-project/sglang",
    versions=("0.4.9", "0.5.6", "0.5.23"),
    formats=("peft",),
    writes="peft",
    cap_option="--max-lora-rank",
    layers=_QKV,
    rules=(
        Rule("configuration", fields_missing("r", "lora_alpha", "target_modules"), FAILS, "required", _CONFIG),
        Rule("target_modules", target_modules_as_text(), FAILS, "has to be a list", _MANAGER, until="0.5.23"),
        Rule(
            "target_modules",
            target_modules_as_text("all", "all-linear"),
            FAILS,
            "has to be a list, all or all-linear",
            "sglang/srt/lora/utils.py",
            since="0.5.23",
        ),
        Rule("rank", rank_over_cap, FAILS, "above --max-lora-rank (--max-rank here)", _POOL),
        Rule("rank_pattern", ranks_unlike_r, FAILS, "the buffer has rank r of the configuration", _POOL),
        Rule("alpha_pattern", alphas_unlike_lora_alpha, CHANGES, "unread: lora_alpha / r counts everywhere", _LORA),
        Rule("rsLoRA", rslora, CHANGES, "use_rslora is unread: the scaling is lora_alpha / r", _LORA),
        Rule("q and v", missing_layers(_QKV), FAILS, "q, k, v become one layer; only k may be left out", _LORA),
        Rule("DoRA", holds(Feature.DORA), CHANGES, "unread, so the direction is added alone", _CONFIG, until="0.5.23"),
        Rule("DoRA", holds(Feature.DORA), FAILS, "refused", _MANAGER, since="0.5.23"),
        Rule("bias", bias_trained, CHANGES, "unread: base layers keep their biases", _LORA),
        Rule("lora_bias", holds(Feature.LORA_BIAS), FAILS, "taken for a factor, whose shape it has not", _LORA),
        Rule("aLoRA", holds(Feature.ALORA), CHANGES, _UNREAD, _CONFIG),
        Rule("layer replication", holds(Feature.LAYER_REPLICATION), CHANGES, _UNREAD, _CONFIG),
        Rule("changed base", changed_base(), CHANGES, _UNREAD, _CONFIG),
        Rule("heads", heads_but(), CHANGES, "left out: only factors are loaded", _LORA),
        Rule("token rows", holds(Feature.TOKEN_ROWS), CHANGES, "left out: only factors are loaded", _LORA),
        Rule("stored embeddings", travelling_weights, NOTE, "left out: the base model's own are used", _LORA),
        Rule(
            "embeddings",
            holds(Feature.EMBEDDING),
            NOTE,
            "only for models that support it, and --lora-target-modules",
            _LORA,
        ),
        Rule("expert stacks", holds(Feature.PARAMETER), NOTE, "for mixture models that it wraps, no others", _LORA),
        Rule("fused slots", holds(Feature.FUSED_ROWS), FAILS, "lora_B of PEFT before 0.3 is no matrix", _POOL),
        Rule("convolutions", holds(Feature.CONV), FAILS, "only linear layers and embeddings are adapted", _LORA),
        Rule("architecture", untold, UNCHECKED, UNTOLD_FAMILY, _MANAGER),
        Rule("module names", opaque, CHANGES, "skipped with a warning: no module path of the model", _POOL),
        Rule("names in the base", unmatched, CHANGES, "skipped with a warning: no such module", _POOL),
        Rule("sizes in the base", misshapen, FAILS, "of another size there: its buffer does not take it", _POOL),
    ),
)
