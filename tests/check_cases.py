"""For each rule of each consumer: what breaks it, on top of an adapter that keeps them all."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from adaptertools import consumers
from adaptertools.adapter import Adapter, Base, FullWeight, RowWeights, WeightRole
from adaptertools.consumers.subject import Subject
from adaptertools.module import Kind, LoraModule, RowSlice, ScaleRule, Target

Change = Callable[[Subject], Subject]

SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "peft": {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": [*SPLIT], "bias": "none"},
    "mlx": {
        "num_layers": -1,
        "lora_parameters": {"rank": 16, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.o_proj"]},
    },
}
FILES = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "mlx": ("adapter_config.json", "adapters.safetensors"),
}


def module(parameter: str, rank: int = 16, **changes: Any) -> LoraModule:
    """A linear module of 24 inputs and 20 outputs with the scaling 1."""
    generator = torch.Generator().manual_seed(len(parameter))
    given: dict[str, Any] = {
        "target": Target(parameter=parameter),
        "lora_A": torch.randn(rank, 24, generator=generator),
        "lora_B": torch.randn(20, rank, generator=generator),
        "alpha": float(rank),
    }
    return LoraModule(**{**given, **changes})


def kept(consumer: str, format: str | None = None) -> Subject:
    """An adapter of two layers that keeps every rule of a consumer, as it stands in the consumer's own files."""
    stands_as = format or consumers.get(consumer).writes
    names = ("o_proj",) if consumer == "ollama" else ("q_proj",) if stands_as == "mlx" else SPLIT
    layers = "text_model.encoder.layers" if consumer in ("comfyui", "diffusers") else "model.layers"
    modules = tuple(module(f"{layers}.{layer}.self_attn.{name}") for layer in (0, 1) for name in names)
    chosen = consumers.get(consumer)
    return Subject(
        adapter=Adapter(modules=modules, bases={"": Base(id="tiny/llama")}),
        format=stands_as,
        cap=chosen.max_rank,
        files=FILES.get(stands_as, ()),
        config=CONFIGS.get(stands_as, {}),
        unmatched=(),
        misshapen=(),
        model_type="llama",
        num_layers=2,
    )


def with_modules(change: Callable[[LoraModule], LoraModule]) -> Change:
    """Every module changed."""
    return lambda subject: replace(subject, adapter=subject.adapter.map_modules(change))


def with_first(change: Callable[[LoraModule], LoraModule]) -> Change:
    """The first module changed."""

    def apply(subject: Subject) -> Subject:
        first, *others = subject.adapter.modules
        return replace(subject, adapter=replace(subject.adapter, modules=(change(first), *others)))

    return apply


def with_more(*modules: LoraModule) -> Change:
    """Further modules."""

    def apply(subject: Subject) -> Subject:
        return replace(subject, adapter=replace(subject.adapter, modules=(*subject.adapter.modules, *modules)))

    return apply


def without(*names: str) -> Change:
    """Without these modules."""

    def apply(subject: Subject) -> Subject:
        left = tuple(m for m in subject.adapter.modules if m.target.parameter not in names)
        return replace(subject, adapter=replace(subject.adapter, modules=left))

    return apply


def with_config(**fields: Any) -> Change:
    """Fields of the configuration; None takes one out."""

    def apply(subject: Subject) -> Subject:
        config = {**subject.config, **fields}
        return replace(subject, config={key: value for key, value in config.items() if value is not None})

    return apply


def with_adapter(**fields: Any) -> Change:
    """Fields of the adapter."""
    return lambda subject: replace(subject, adapter=replace(subject.adapter, **fields))


def with_subject(**fields: Any) -> Change:
    """What is known beside the adapter."""
    return lambda subject: replace(subject, **fields)


def together(*changes: Change) -> Change:
    """One change after the other."""

    def apply(subject: Subject) -> Subject:
        for change in changes:
            subject = change(subject)
        return subject

    return apply


def ranked(rank: int, scaling: float = 1.0) -> Callable[[LoraModule], LoraModule]:
    """The module at another rank."""
    return lambda m: module(m.target.parameter, rank, alpha=rank * scaling)


def whole(name: str, role: WeightRole = WeightRole.MODULE) -> Change:
    """A whole weight beside the modules."""
    return with_adapter(full_weights={name: FullWeight(weight=torch.ones(3, 24), role=role)})


DORA = with_modules(lambda m: replace(m, magnitude=torch.ones(20)))
BIASED = with_modules(lambda m: replace(m, lora_bias=torch.ones(20)))
HIGHER = with_modules(ranked(96))
OTHER_ALPHA = with_first(lambda m: replace(m, alpha=32.0))
RSLORA = together(
    with_modules(lambda m: replace(m, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK)), with_config(use_rslora=True)
)
EMBEDDING = with_more(module("model.embed_tokens", kind=Kind.EMBEDDING, transposed=True))
CONV = with_more(
    module("model.layers.0.self_attn.conv", kind=Kind.CONV, shape=(20, 6, 2, 2)),
    module("model.layers.1.self_attn.conv", kind=Kind.CONV, shape=(20, 6, 2, 2)),
)
STACKS = with_more(
    *(
        module(
            f"model.layers.{layer}.mlp.experts.down_proj",
            kind=Kind.PARAMETER,
            lora_A=torch.ones(2, 16, 24),
            lora_B=torch.ones(2, 20, 16),
        )
        for layer in (0, 1)
    )
)
SLOTS = with_first(lambda m: replace(m, target=replace(m.target, rows=RowSlice(start=0, stop=20, total=60))))
OPAQUE = with_more(module("unet", target=Target(parameter="lora_unet_some_layer", opaque=True)))
ROWS = with_adapter(row_weights={"model.embed_tokens.weight": RowWeights(indices=(1,), rows=torch.ones(1, 24))})
PISSA = with_adapter(bases={"": Base(id="tiny/llama", change="pissa")})
LORA_GA = with_adapter(bases={"": Base(id="tiny/llama", change="lora_ga")})
REPLICATED = with_adapter(bases={"": Base(id="tiny/llama", layer_replication=((0, 2), (1, 2)))})
ALORA = with_adapter(invocation_tokens=(1, 2))
TRAINED_BIAS = whole("model.layers.0.self_attn.q_proj.bias", WeightRole.BIAS)
STORED = whole("lm_head.weight", WeightRole.BASE)
HEAD = whole("qa_outputs.weight")
RESIZED = with_subject(misshapen=("model.layers.0.self_attn.q_proj has shape (8, 8) there, (20, 24) here",))
ABSENT = with_subject(unmatched=("model.layers.7.self_attn.q_proj",))
NO_RANK = with_config(r=None)

GPT2 = with_modules(
    lambda m: replace(m, target=Target(parameter=m.target.parameter.replace("model.layers", "transformer.h")))
)
LLAMA = with_first(lambda m: replace(m, target=Target(parameter="model.layers.0.self_attn.q_proj")))
GPT2_NAMES = together(GPT2, with_subject(model_type="gpt2"))

_BEYOND: dict[str, Change] = {
    "rank": together(HIGHER, with_config(r=96, lora_alpha=96), with_subject(cap=64)),
    "lora_bias": BIASED,
    "bias": TRAINED_BIAS,
    "heads": HEAD,
    "token rows": ROWS,
    "aLoRA": ALORA,
    "changed base": PISSA,
    "names in the base": ABSENT,
    "sizes in the base": RESIZED,
}
TIED = together(EMBEDDING, with_subject(tied=True))
FLAT = together(OPAQUE, with_subject(format="kohya", config={}, files=()))

_OF_MODELS = {"DoRA": DORA, "layer replication": REPLICATED, "convolutions": CONV, "module names": FLAT}
_SERVED: dict[str, Change] = {
    **_BEYOND,
    **_OF_MODELS,
    "module names": OPAQUE,
    "configuration": NO_RANK,
    "rank_pattern": together(with_modules(ranked(8)), with_config(lora_alpha=8)),
    "alpha_pattern": OTHER_ALPHA,
    "stored embeddings": STORED,
    "embeddings": EMBEDDING,
    "expert stacks": STACKS,
    "fused slots": SLOTS,
}

BREAKING: dict[str, dict[str, Change]] = {
    "vllm": {
        **_SERVED,
        "file names": with_subject(files=("adapter_config.json", "adapter_model-00001-of-00002.safetensors")),
        "rsLoRA": RSLORA,
        "LoRA-GA": LORA_GA,
        "QALoRA, BD-LoRA": with_config(use_qalora=True),
        "embeddings": with_more(module("model.wte", kind=Kind.EMBEDDING, transposed=True)),
    },
    "sglang": {
        **_SERVED,
        "target_modules": with_config(target_modules=".*_proj"),
        "rsLoRA": RSLORA,
        "q and v": without("model.layers.0.self_attn.v_proj"),
    },
    "lorax": {
        **_SERVED,
        "file names": with_subject(files=("adapter_config.json", "adapter_model.bin")),
        "custom kernels": together(with_modules(ranked(256)), with_config(r=256, lora_alpha=256)),
        "rank that is padded": together(with_modules(ranked(12)), with_config(r=12, lora_alpha=12)),
        "one rank a layer type": with_first(ranked(32)),
        "rank_pattern": together(with_modules(ranked(32)), with_config(lora_alpha=32)),
        "every layer": without("model.layers.1.self_attn.o_proj"),
    },
    "tensorrt-llm": {
        **{rule: change for rule, change in _SERVED.items() if rule not in ("rank_pattern", "embeddings")},
        "file names": with_subject(files=("adapter_config.json", "adapter_model-00001-of-00002.safetensors")),
        "list of modules": with_more(module("model.layers.0.mlp.fc1")),
        "head, embedding": with_more(module("lm_head")),
        "module names": with_first(lambda m: replace(m, target=Target(parameter="q_proj", opaque=True))),
        "expert stacks": with_more(
            module(
                "model.layers.0.mlp.experts.down_proj",
                kind=Kind.PARAMETER,
                lora_A=torch.ones(2, 16, 24),
                lora_B=torch.ones(2, 20, 16),
            )
        ),
        "convolutions": with_more(module("model.layers.0.o_proj", kind=Kind.CONV, shape=(20, 6, 2, 2))),
    },
    "llama.cpp": {
        **{rule: change for rule, change in _BEYOND.items() if rule != "aLoRA"},
        **_OF_MODELS,
        "stored embeddings": STORED,
        "tied embedding": TIED,
    },
    "mlx": {
        **_BEYOND,
        **{rule: change for rule, change in _OF_MODELS.items() if rule != "DoRA"},
        "stored embeddings": STORED,
        "file names": with_subject(files=("adapter_config.json", "adapters.npz")),
        "configuration": with_config(lora_parameters={"rank": 16, "scale": 1.0, "keys": ["self_attn.q_proj"]}),
        "keys": with_config(lora_parameters={"rank": 16, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}),
        "convolutions": with_first(lambda m: replace(m, kind=Kind.CONV, shape=(20, 6, 2, 2))),
        "names of GPT-2": GPT2_NAMES,
        "number of layers": with_config(num_layers=None),
        "stated rank": with_config(
            lora_parameters={"rank": 8, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
        ),
        "rank": together(
            HIGHER,
            with_config(lora_parameters={"rank": 96, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}),
            with_subject(cap=64),
        ),
    },
    "ollama": {
        **_BEYOND,
        **_OF_MODELS,
        "stored embeddings": STORED,
        "tied embedding": TIED,
        "architecture": with_subject(model_type="qwen2"),
        "integer alpha": with_config(lora_alpha=16.0),
        "rsLoRA": RSLORA,
        "alpha_pattern": OTHER_ALPHA,
        "scale of MLX": with_modules(lambda m: replace(m, alpha=2.0, scale_rule=ScaleRule.DIRECT)),
        "order of q and k": with_more(module("model.layers.0.self_attn.q_proj")),
        "ranks": with_first(lambda m: module(m.target.parameter, 8, alpha=16.0)),
    },
    "comfyui": {
        **_BEYOND,
        "names of a language model": LLAMA,
        "scaling in metadata": together(
            with_modules(lambda m: replace(m, alpha=8.0)), with_subject(keys=frozenset({"unet.x.lora_A.weight"}))
        ),
    },
    "diffusers": {
        **{rule: change for rule, change in _BEYOND.items() if rule != "lora_bias"},
        "names of a language model": LLAMA,
        "mixed ranks": with_first(ranked(8)),
        ".alpha for every module": with_subject(
            keys=frozenset({"lora_unet_a.lora_down.weight", "lora_unet_a.alpha", "lora_unet_b.lora_down.weight"})
        ),
        "alphas of attention": with_more(module("down_blocks.0.attn1.to_q", alpha=8.0)),
        "DoRA of kohya": DORA,
    },
}
"""By consumer and rule."""

ALSO = {
    ("lorax", "one rank a layer type"): ["rank_pattern", "alpha_pattern"],
    ("llama.cpp", "module names"): ["format"],
    ("mlx", "module names"): ["format"],
    ("ollama", "module names"): ["format"],
}
"""What else is broken by what breaks a rule, where the one does not come without the other."""
