"""diffusers: pytorch_lora_weights.safetensors, or a file of kohya's, which it converts.

Read in huggingface/diffusers, release 0.42.1, and run there: src/diffusers/loaders/; of 0.39.0 and 0.40.0 only
utils/peft_utils.py, for mixed ranks.
"""

from adaptertools.adapter import Feature
from adaptertools.consumers.conditions import (
    attention_of_other_alpha,
    changed_base,
    heads_but,
    holds,
    misshapen,
    mixed_ranks,
    names_of_language_model,
    rank_over_cap,
    unmatched,
    without_alpha_key,
)
from adaptertools.consumers.rule import CHANGES, FAILS, Consumer, Rule

_CONVERSION = "src/diffusers/loaders/lora_conversion_utils.py"
_PEFT = "src/diffusers/utils/peft_utils.py"
_PIPELINE = "src/diffusers/loaders/lora_pipeline.py"

CONSUMER = Consumer(
    name="diffusers",
    title="diffusers",
    repository="huggingface/diffusers",
    versions=("0.39.0", "0.40.0", "0.42.1"),
    formats=("diffusers", "kohya"),
    writes="diffusers",
    keeps=("diffusers", "kohya"),
    rules=(
        Rule("rank", rank_over_cap, FAILS, "above the rank asked for", _PEFT),
        Rule(
            "mixed ranks",
            mixed_ranks,
            CHANGES,
            "without alphas, modules of another rank than most are scaled wrongly",
            _PEFT,
            until="0.40.0",
            formats=("diffusers",),
        ),
        Rule(
            ".alpha for every module",
            without_alpha_key,
            CHANGES,
            "it is given the alpha that most have",
            _CONVERSION,
            formats=("kohya",),
        ),
        Rule(
            "alphas of attention",
            attention_of_other_alpha,
            CHANGES,
            "modules of attention are given the alpha that most have",
            _CONVERSION,
            formats=("kohya",),
        ),
        Rule(
            "DoRA of kohya",
            holds(Feature.DORA),
            CHANGES,
            "left out with a warning, so the direction is added alone",
            _CONVERSION,
            formats=("kohya",),
        ),
        Rule("heads", heads_but(), FAILS, "no key that it takes", _PIPELINE),
        Rule("bias", holds(Feature.BIAS), FAILS, "no key that it takes", _PIPELINE),
        Rule("token rows", holds(Feature.TOKEN_ROWS), FAILS, "no key that it takes", _PIPELINE),
        Rule("aLoRA", holds(Feature.ALORA), CHANGES, "the adapter would act on every token", _PIPELINE),
        Rule("changed base", changed_base(), CHANGES, "added to the unchanged base", _PIPELINE),
        Rule(
            "names of a language model",
            names_of_language_model,
            FAILS,
            "no UNet, transformer or text encoder has them",
            _PIPELINE,
        ),
        Rule("names in the base", unmatched, FAILS, "no such module to adapt", _PIPELINE),
        Rule("sizes in the base", misshapen, FAILS, "of another size there, so it is refused", _PIPELINE),
    ),
)
