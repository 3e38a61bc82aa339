"""Ollama: one GGUF file, which it hands to llama.cpp; or a safetensors folder of PEFT or MLX, which it converts.

Read in ollama/ollama at fb30760, the conversion of folders also at 01cf744 and 0242080: convert/convert.go,
convert/convert_llama_adapter.go. Not run. One set of rules.
"""

from adaptertools.adapter import Feature
from adaptertools.consumers.conditions import (
    alpha_as_float,
    alphas_unlike_lora_alpha,
    bias_trained,
    changed_base,
    heads_but,
    holds,
    misshapen,
    mixed_ranks,
    model_type_but,
    modules_named,
    opaque_unless,
    rank_over_cap,
    rslora,
    scaling_of_mlx,
    tied_modules,
    travelling_weights,
    unmatched,
)
from adaptertools.consumers.rule import CHANGES, FAILS, NOTE, Consumer, Rule

_CONVERT = "convert/convert.go"
_LLAMA = "convert/convert_llama_adapter.go"
_RUNNER = "llama.cpp: src/llama-adapter.cpp"
_FOLDERS = ("peft", "mlx")
_ALONE = "an adapter there is lora_a and lora_b alone"

CONSUMER = Consumer(
    name="ollama",
    title="Ollama",
    repository="ollama/ollama",
    versions=("01cf744", "0242080", "fb30760"),
    formats=("gguf", "peft", "mlx"),
    writes="gguf",
    rules=(
        Rule(
            "architecture",
            model_type_but("llama", "mistral", "gemma2"),
            FAILS,
            "folders are converted for llama and gemma2 alone, GGUF files are not",
            _CONVERT,
            formats=_FOLDERS,
        ),
        Rule("integer alpha", alpha_as_float, FAILS, "lora_alpha is read into a uint32", _CONVERT, formats=("peft",)),
        Rule("rsLoRA", rslora, CHANGES, "use_rslora is unread: the scaling is alpha / r", _CONVERT, formats=("peft",)),
        Rule(
            "alpha_pattern",
            alphas_unlike_lora_alpha,
            CHANGES,
            "unread: lora_alpha counts everywhere",
            _CONVERT,
            formats=("peft",),
        ),
        Rule("scale of MLX", scaling_of_mlx, CHANGES, "unread: it looks for alpha", _CONVERT, formats=("mlx",)),
        Rule(
            "order of q and k",
            modules_named("q_proj", "k_proj"),
            CHANGES,
            "lora_a is permuted where lora_b would have to be; use a GGUF file",
            _LLAMA,
            formats=_FOLDERS,
        ),
        Rule("rank", rank_over_cap, FAILS, "above the rank asked for", _RUNNER),
        Rule("ranks", mixed_ranks, NOTE, "each tensor's own rank divides alpha", _RUNNER, formats=("peft",)),
        Rule("DoRA", holds(Feature.DORA), FAILS, _ALONE, _RUNNER),
        Rule("bias", bias_trained, FAILS, _ALONE, _RUNNER),
        Rule("lora_bias", holds(Feature.LORA_BIAS), FAILS, _ALONE, _RUNNER),
        Rule("heads", heads_but(), FAILS, _ALONE, _RUNNER),
        Rule("token rows", holds(Feature.TOKEN_ROWS), FAILS, _ALONE, _RUNNER),
        Rule("stored embeddings", travelling_weights, FAILS, _ALONE, _RUNNER, formats=("peft",)),
        Rule("aLoRA", holds(Feature.ALORA), CHANGES, "unread in a folder", _CONVERT, formats=("peft",)),
        Rule("changed base", changed_base(), CHANGES, "added to the unchanged base", _RUNNER),
        Rule("layer replication", holds(Feature.LAYER_REPLICATION), FAILS, "the base has no such layers", _RUNNER),
        Rule("tied embedding", tied_modules, FAILS, "a base whose head is its embedding takes neither", _RUNNER),
        Rule("convolutions", holds(Feature.CONV), FAILS, "only matrices are adapted", _RUNNER),
        Rule("module names", opaque_unless("gguf"), FAILS, "no tensor of the base is called so", _RUNNER),
        Rule("names in the base", unmatched, FAILS, "no such tensor, so the adapter is refused", _RUNNER),
        Rule("sizes in the base", misshapen, FAILS, "of another size there, so the adapter is refused", _RUNNER),
    ),
)
