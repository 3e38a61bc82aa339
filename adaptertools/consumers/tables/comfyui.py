"""ComfyUI: one safetensors file with the keys of kohya, LyCORIS or diffusers. What it does not know is warned of alone.

Read in Comfy-Org/ComfyUI at 17358c8 (comfy/lora.py) and 6f98b15 (comfy/weight_adapter/lora.py), of 2026. Not run. One
state was read.
"""

from adaptertools.adapter import Feature
from adaptertools.consumers.conditions import (
    changed_base,
    heads_but,
    holds,
    misshapen,
    names_of_language_model,
    rank_over_cap,
    scaling_beside_keys,
    unmatched,
)
from adaptertools.consumers.rule import CHANGES, FAILS, Consumer, Rule

_LORA = "comfy/lora.py"
_ADAPTER = "comfy/weight_adapter/lora.py"

CONSUMER = Consumer(
    name="comfyui",
    title="ComfyUI",
    repository="Comfy-Org/ComfyUI",
    versions=("17358c8",),
    formats=("kohya", "diffusers", "lycoris"),
    writes="kohya",
    keeps=("kohya", "diffusers"),
    rules=(
        Rule("rank", rank_over_cap, FAILS, "above the rank asked for", _ADAPTER),
        Rule(
            "scaling in metadata",
            scaling_beside_keys,
            CHANGES,
            "metadata is unread: without .alpha the scaling is 1",
            _ADAPTER,
            formats=("diffusers",),
        ),
        Rule("lora_bias", holds(Feature.LORA_BIAS), CHANGES, "key not loaded", _LORA),
        Rule("heads", heads_but(), CHANGES, "key not loaded", _LORA),
        Rule("bias", holds(Feature.BIAS), CHANGES, "key not loaded", _LORA),
        Rule("token rows", holds(Feature.TOKEN_ROWS), CHANGES, "key not loaded", _LORA),
        Rule("aLoRA", holds(Feature.ALORA), CHANGES, "the adapter would act on every token", _LORA),
        Rule("changed base", changed_base(), CHANGES, "added to the unchanged base", _LORA),
        Rule(
            "names of a language model",
            names_of_language_model,
            CHANGES,
            "no image or video model has them: key not loaded",
            _LORA,
        ),
        Rule("names in the base", unmatched, CHANGES, "key not loaded", _LORA),
        Rule("sizes in the base", misshapen, CHANGES, "of another size there: left out, with an error", _ADAPTER),
    ),
)
