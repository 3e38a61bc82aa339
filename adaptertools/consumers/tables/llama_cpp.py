"""llama.cpp, and what is built on it (LM Studio, llamafile): one GGUF file.

Read in ggml-org/llama.cpp at 0c1e570, as llama-cpp-python 0.3.36 carries it, and run there: src/llama-adapter.cpp,
tools/export-lora. One state was read.
"""

from adaptertools.adapter import Feature
from adaptertools.consumers.conditions import (
    bias_trained,
    changed_base,
    heads_but,
    holds,
    misshapen,
    opaque_unless,
    rank_over_cap,
    tied_modules,
    travelling_weights,
    unmatched,
)
from adaptertools.consumers.rule import CHANGES, FAILS, NOTE, Consumer, Rule

_ADAPTER = "src/llama-adapter.cpp"
_GRAPH = "src/llama-graph.cpp"

CONSUMER = Consumer(
    name="llama.cpp",
    title="llama.cpp",
    repository="ggml-org/llama.cpp",
    versions=("0c1e570",),
    formats=("gguf",),
    writes="gguf",
    rules=(
        Rule("rank", rank_over_cap, FAILS, "above the rank asked for", _ADAPTER),
        Rule("DoRA", holds(Feature.DORA), FAILS, "GGUF holds lora_a and lora_b alone", _ADAPTER),
        Rule("bias", bias_trained, FAILS, "GGUF holds lora_a and lora_b alone", _ADAPTER),
        Rule("lora_bias", holds(Feature.LORA_BIAS), FAILS, "GGUF holds lora_a and lora_b alone", _ADAPTER),
        Rule("heads", heads_but(), FAILS, "GGUF holds lora_a and lora_b alone; norms are passed over", _ADAPTER),
        Rule("token rows", holds(Feature.TOKEN_ROWS), FAILS, "GGUF holds lora_a and lora_b alone", _ADAPTER),
        Rule("stored embeddings", travelling_weights, NOTE, "left out: the base model's own are used", _ADAPTER),
        Rule("changed base", changed_base(), CHANGES, "added to the unchanged base", _ADAPTER),
        Rule("layer replication", holds(Feature.LAYER_REPLICATION), FAILS, "the base has no such layers", _ADAPTER),
        Rule("tied embedding", tied_modules, FAILS, "a base whose head is its embedding takes neither", _GRAPH),
        Rule("convolutions", holds(Feature.CONV), FAILS, "only matrices are adapted", _ADAPTER),
        Rule("module names", opaque_unless("gguf"), FAILS, "no tensor of the base is called so", _ADAPTER),
        Rule("names in the base", unmatched, FAILS, "no such tensor, so the adapter is refused", _ADAPTER),
        Rule("sizes in the base", misshapen, FAILS, "of another size there, so the adapter is refused", _ADAPTER),
    ),
)
