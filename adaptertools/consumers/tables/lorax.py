"""LoRAX: PEFT folders in safetensors; all layers of one type are stacked into one tensor.

Read in predibase/lorax at a7394ba of May 2026, server/lorax_server/. One state was read. Ranks are
those of one GPU; with several its kernels pad to 8 times as many.
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
    missing_layers,
    mixed_ranks_in_layer_type,
    opaque,
    rank_over,
    rank_over_cap,
    rank_padded,
    ranks_unlike_r,
    travelling_weights,
    unmatched,
    untold,
)
from adaptertools.consumers.rule import CHANGES, FAILS, NOTE, UNCHECKED, Consumer, Layers, Rule

_LORA = "server/lorax_server/adapters/lora.py"
_PUNICA = "server/lorax_server/utils/punica.py"
_SOURCE = "server/lorax_server/utils/sources/local.py"
_EVERY = Layers(every=True)
_UNREAD = "unread, so the adapter is loaded as a plain one"
_ONE_SCALE = "unread: one scaling, from lora_alpha and r, counts for every module"

CONSUMER = Consumer(
    name="lorax",
    title="LoRAX",
    repository="predibase/lorax",
    versions=("a7394ba",),
    formats=("peft",),
    writes="peft",
    least_rank=8,
    multiple=16,
    layers=_EVERY,
    rules=(
        Rule("file names", files_but("adapter_model.safetensors"), FAILS, "only .safetensors is loaded", _SOURCE),
        Rule("configuration", fields_missing("r", "lora_alpha", "peft_type"), FAILS, "required", _LORA),
        Rule("rank", rank_over_cap, FAILS, "above the rank asked for", _LORA),
        Rule("custom kernels", rank_over(128), NOTE, "slower: its kernels go up to rank 128", _PUNICA),
        Rule(
            "rank that is padded",
            rank_padded(8, 16),
            CHANGES,
            "with its kernels r is padded and then divides lora_alpha for the layer types that follow",
            _LORA,
        ),
        Rule("one rank a layer type", mixed_ranks_in_layer_type, FAILS, "its layers are stacked", _LORA),
        Rule("rank_pattern", ranks_unlike_r, CHANGES, _ONE_SCALE, _LORA),
        Rule("alpha_pattern", alphas_unlike_lora_alpha, CHANGES, _ONE_SCALE, _LORA),
        Rule("every layer", missing_layers(_EVERY), CHANGES, "a type that is not in every layer is left out", _LORA),
        Rule("DoRA", holds(Feature.DORA), CHANGES, "unread, so the direction is added alone", _LORA),
        Rule("bias", bias_trained, CHANGES, "unread: base layers keep their biases", _LORA),
        Rule("lora_bias", holds(Feature.LORA_BIAS), CHANGES, "unread", _LORA),
        Rule("aLoRA", holds(Feature.ALORA), CHANGES, _UNREAD, _LORA),
        Rule("layer replication", holds(Feature.LAYER_REPLICATION), CHANGES, _UNREAD, _LORA),
        Rule("changed base", changed_base(), CHANGES, _UNREAD, _LORA),
        Rule("heads", heads_but(), CHANGES, "left out: only factors are loaded", _LORA),
        Rule("token rows", holds(Feature.TOKEN_ROWS), CHANGES, "left out: only factors are loaded", _LORA),
        Rule("stored embeddings", travelling_weights, NOTE, "left out: the base model's own are used", _LORA),
        Rule("embeddings", holds(Feature.EMBEDDING), CHANGES, "left out: no layer type of it", _LORA),
        Rule("expert stacks", holds(Feature.PARAMETER), CHANGES, "left out: no layer type of it", _LORA),
        Rule("fused slots", holds(Feature.FUSED_ROWS), FAILS, "lora_B of PEFT before 0.3 is no matrix", _LORA),
        Rule("convolutions", holds(Feature.CONV), CHANGES, "left out: no layer type of it", _LORA),
        Rule("architecture", untold, UNCHECKED, UNTOLD_FAMILY, _LORA),
        Rule("module names", opaque, CHANGES, "left out with a warning: no module path of the model", _LORA),
        Rule("names in the base", unmatched, CHANGES, "left out with a warning: no such module", _LORA),
        Rule("sizes in the base", misshapen, FAILS, "of another size there", _LORA),
    ),
)
