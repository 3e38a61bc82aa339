"""MLX-LM: a folder with adapters.safetensors and adapter_config.json; one rank and one scale for all modules.

Read in ml-explore/mlx-lm, release 0.32.2, and run there: mlx_lm/tuner/utils.py, lora.py, dora.py.
"""

from adaptertools.adapter import Feature
from adaptertools.consumers.conditions import (
    bias_trained,
    changed_base,
    field_missing_in,
    fields_missing,
    files_but,
    heads_but,
    holds,
    misshapen,
    mlx_left_out,
    mlx_rank,
    names_of_gpt2,
    opaque_unless,
    rank_over_cap,
    travelling_weights,
    unmatched,
)
from adaptertools.consumers.rule import CHANGES, FAILS, NOTE, Consumer, Rule

_UTILS = "mlx_lm/tuner/utils.py"
_LORA = "mlx_lm/tuner/lora.py"
_ALONE = "an MLX adapter is lora_a, lora_b and m alone"
_GPT2_MODEL = "mlx_lm/models/gpt2.py"
_GPT2 = "mlx-lm's GPT-2 calls it model.h…: convert with --base a checkpoint that mlx-lm saved"

CONSUMER = Consumer(
    name="mlx",
    title="MLX-LM",
    repository="ml-explore/mlx-lm",
    versions=("0.32.2",),
    formats=("mlx",),
    writes="mlx",
    rules=(
        Rule("file names", files_but("adapters.safetensors"), FAILS, "it opens no other weights", _UTILS),
        Rule(
            "configuration",
            field_missing_in("lora_parameters", "rank", "scale", "dropout"),
            FAILS,
            "required",
            _UTILS,
            formats=("mlx",),
        ),
        Rule("number of layers", fields_missing("num_layers"), FAILS, "required", _UTILS, formats=("mlx",)),
        Rule("keys", mlx_left_out, FAILS, "no adapter is made for it, so it is refused", _UTILS, formats=("mlx",)),
        Rule("stated rank", mlx_rank, FAILS, "the shape is not that of its model", _UTILS, formats=("mlx",)),
        Rule("rank", rank_over_cap, FAILS, "above the rank asked for", _LORA),
        Rule("bias", bias_trained, FAILS, _ALONE, _UTILS),
        Rule("lora_bias", holds(Feature.LORA_BIAS), FAILS, _ALONE, _UTILS),
        Rule("heads", heads_but(), FAILS, _ALONE, _UTILS),
        Rule("token rows", holds(Feature.TOKEN_ROWS), FAILS, _ALONE, _UTILS),
        Rule("stored embeddings", travelling_weights, NOTE, "left out: the base model's own are used", _UTILS),
        Rule("aLoRA", holds(Feature.ALORA), CHANGES, "the adapter would act on every token", _LORA),
        Rule("changed base", changed_base(), CHANGES, "added to the unchanged base", _LORA),
        Rule("layer replication", holds(Feature.LAYER_REPLICATION), FAILS, "the base has no such layers", _UTILS),
        Rule("convolutions", holds(Feature.CONV), FAILS, "only linear layers and embeddings are adapted", _UTILS),
        Rule("module names", opaque_unless("mlx"), FAILS, "no module path of the model", _UTILS),
        Rule("names of GPT-2", names_of_gpt2, FAILS, _GPT2, _GPT2_MODEL),
        Rule("names in the base", unmatched, FAILS, "no such module, so the tensor is refused", _UTILS),
        Rule("sizes in the base", misshapen, FAILS, "of another size there: its product has no place", _LORA),
    ),
)
