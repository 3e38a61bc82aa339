"""What `fix` mends of what breaks a rule, and what to do about what it cannot mend."""

_MERGE = "merge it into the base model (adaptertools merge)"
WAYS_OUT = {
    "finite": "the values are lost: take an earlier checkpoint, or train it again",
    "names of a language model": "serve it with a program for language models: vllm, llama.cpp, mlx …",
    "DoRA": f"--base BASE, weights and all, makes it the nearest LoRA; or {_MERGE}",
    "DoRA of kohya": "diffusers reads it in its own format: adaptertools convert --to diffusers, --base for names; "
    "or --drop dora",
    "heads": f"{_MERGE}, or --drop full-weights",
    "bias": f"{_MERGE}, or --drop bias",
    "lora_bias": f"{_MERGE}, or --drop lora-bias",
    "token rows": f"{_MERGE}, or --drop token-rows",
    "changed base": "PEFT's path_initial_model_for_weight_conversion makes it a plain one; on a base that has the "
    "change already, --drop changed-base",
    "layer replication": f"{_MERGE}",
    "aLoRA": "--drop alora lets it act on every token",
    "names in the base": "is it the right base model? If so, adaptertools convert --rename or --exclude",
    "sizes in the base": "the names fit and the sizes do not: it was trained on another size of this model. Check it "
    "with that as --base, and load it there",
    "module names": "read it with --base, so that its names become module paths",
    "names of GPT-2": "--base a checkpoint that mlx-lm saved",
}
"""What to do about what `fix` cannot mend, by rule."""

MENDED = (
    "rank",
    "rank_pattern",
    "alpha_pattern",
    "rsLoRA",
    "rank that is padded",
    "one rank a layer type",
    "mixed ranks",
    "alphas of attention",
    "q and v",
    "every layer",
    "stored embeddings",
    "fused slots",
)
"""The rules about an adapter in no file yet that `fix` mends."""
