"""PEFT: the folder that Hugging Face PEFT saves a LoRA adapter in.

    adapter_config.json                    peft_type "LORA", lora_alpha, r, patterns, …; sorted keys
    adapter_model.safetensors or .bin      safetensors is preferred; in shards with an index it is read, not written
    NAME/adapter_config.json …             further adapters, one in each sub-folder

Keys are `base_model.model.` + module path + one of

    .lora_A.weight (r, in)                 .lora_B.weight (out, r)                  linear, GPT-2's Conv1D
    .lora_embedding_A (r, V)               .lora_embedding_B (d, r)                 embedding; ΔW = s (B A)ᵀ
    .lora_A.weight (r, in, *k)             .lora_B.weight (out, r, 1, …)            convolution in 1, 2 or 3 dimensions
    .lora_A.weight (r, E)                  .lora_B.weight (3E, r)                   nn.MultiheadAttention, in_proj, and
    .base_layer.out_proj.lora_A.weight     .base_layer.out_proj.lora_B.weight       its out_proj, which counts twice
    [.base_layer].lora_A.weight (E·r, in)  [.base_layer].lora_B.weight (out, r·E)   target_parameters: peft/experts.py
    .lora_A.weight (n·r, in)               .lora_B.weight (n·out/L, c, 1)           enable_lora, before 0.3; read only
    .lora_magnitude_vector (out)           (1, out, 1, …) for convolutions          use_dora; also with `.weight`
    .lora_B.bias (out)                                                              lora_bias
    .base_layer.bias, .bias                                                         bias "lora_only" or "all"
    .weight, .bias, …                      also behind .modules_to_save             modules_to_save
    .base_layer.weight (V, d)                                                       embeddings saved along
    .token_adapter.trainable_tokens_delta  (n, d), rows that replace                trainable_token_indices

What FSDP, torch.compile and activation checkpointing insert into keys goes, and so does the adapter's name. Sharded
checkpoints of FSDP and DeepSpeed, and Tinker's own tensors, are refused with what makes an adapter of them:
peft/leftovers.py.

Scaling is lora_alpha / r, or lora_alpha / √r with use_rslora. Rank and alpha are the module's own: alpha_pattern is a
map of regular expressions, of which the first in the file that matches `^(.*\\.)?(KEY)$` counts; ranks are those of
the tensors. ΔW = s · B A, transposed where the base weight is stored (in, out). With
layer_replication, names count the layers of the model that is built; the adapter carries it in its base.

Reading takes `adapter_name` (one of several adapters, in sub-folders or in keys) and `dora` (whether magnitudes count
that the configuration denies). Writing takes `conv="svd"`, which factors loralib's convolutions anew.

Read in huggingface/peft 0.21.2: `utils/save_and_load.py`, `utils/other.py`, `tuners/lora/`; earlier layouts in the
versions that they belong to.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptertools.adapter import Adapter, Feature, Origin, merge_notes
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.history import read_history, read_settings, unread_entries
from adaptertools.containers.source import Source
from adaptertools.dialects.diffusers.paths import with_paths
from adaptertools.dialects.peft import config as peft_config
from adaptertools.dialects.peft import files as peft_files
from adaptertools.dialects.peft import keys as peft_keys
from adaptertools.dialects.peft.base import BaseModel, Checkpoint
from adaptertools.dialects.peft.config import PeftConfig
from adaptertools.dialects.peft.experts import parameter_groups, read_parameters
from adaptertools.dialects.peft.factors import layers
from adaptertools.dialects.peft.keys import Contents, Group
from adaptertools.dialects.peft.layout import Layout, arrange
from adaptertools.dialects.peft.leftovers import is_unread_checkpoint, refuse_foreign_tensors, settle_base
from adaptertools.dialects.peft.modules import OUT_PROJ, Reading, read_attention, read_module, settle_dora
from adaptertools.dialects.peft.patterns import anchored
from adaptertools.dialects.peft.weights import read_full_weights, read_row_weights, tied_copies
from adaptertools.dialects.peft.write import (
    build_config,
    check_uniform,
    factor_tensors,
    saved_modules,
    tied_tensors,
    weight_tensors,
)
from adaptertools.dialects.torchtune import keys as torchtune_keys
from adaptertools.dialects.torchtune.beside import export_notes
from adaptertools.encoding import Encoder
from adaptertools.errors import OptionError, UnknownFormatError, UnsupportedFeatureError, count
from adaptertools.module import LoraModule, ScaleRule
from adaptertools.names import leaf, parent
from adaptertools.tensors import natural_order

SUMMARY = "Hugging Face PEFT: adapter_config.json with adapter_model.safetensors or .bin"
CONTAINERS = ("safetensors", "torch")
FOLDER = True
CONFIG = peft_config.FILE
FILES = peft_files.PATTERNS
CARRIES = frozenset(Feature)

_READ_FROM = ("safetensors", "torch", "memory")


def detect(source: Source) -> bool:
    if source.is_folder:
        if peft_files.adapter_folders(source):
            return True
        if peft_files.is_adapter_folder(source):  # without weights it is ours only where no other tensors stand there
            found = bool(peft_files.weight_files(source)) or not source.tensor_names
            return found or is_unread_checkpoint(source)
        if source.document(CONFIG) is not None and not peft_files.lacks_type(source):
            return False  # of MLX, AdapterHub and others, which use the same name
    names = [name for files in peft_files.weight_files(source)[:1] for name in files]
    if names and names[0].startswith(f"{peft_files.STEM}.") and peft_files.is_adapter_folder(source):
        return not torchtune_keys.adapter_files(source)
    if not names:
        return is_unread_checkpoint(source)
    return source.container(names[0]) in _READ_FROM and any(
        map(peft_keys.is_peft_key, source.tensors(names[0]).tensors)
    )


def read(
    source: Source,
    *,
    alpha: float | None = None,
    base: Checkpoint | None = None,
    adapter_name: str | None = None,
    dora: bool | None = None,
) -> Adapter:
    """Read a PEFT folder, or one of its weight files with the configuration beside it.

    `alpha` stands in for a lora_alpha that the configuration lacks. `base` settles orientation and the layout of expert
    stacks. `adapter_name` picks one of several adapters in a folder or a file. `dora` says whether magnitudes count
    where use_dora contradicts the file.

    Raises: NotLoraError for other methods, ConfigError, MissingAlphaError, AmbiguousFormatError, UnclaimedTensorError
    """
    found, chosen = peft_files.open_adapter(source, adapter_name)
    refuse_foreign_tensors(found.tensors, source.label)
    config = peft_config.parse(found.source.document(CONFIG), found.config_label, alpha)
    bases = {"": settle_base(config, found.source)}
    contents = peft_keys.parse(found.tensors, source.label, None if chosen else adapter_name)
    if not config.stated and not contents.groups and not contents.tokens:
        raise UnknownFormatError(
            f"{source.label}: none of its {count(len(found.tensors), 'tensor')} is a factor of LoRA, and {CONFIG} is "
            "not there; this is no adapter"
        )
    reading = Reading(
        config=config, base=BaseModel(base, config.base.layer_replication), dora=_dora(contents, config, dora)
    )
    tied = tied_copies(contents.groups, config)
    groups = [group for path, group in contents.groups.items() if path not in tied]
    modules = _read_modules(groups, reading)
    full_weights, row_weights = read_full_weights(contents, config), read_row_weights(contents, config)
    metadata = _metadata(config, tied, modules)
    return Adapter(
        modules=tuple(sorted(modules, key=lambda module: natural_order(str(module.target)))),
        full_weights=full_weights,
        row_weights=row_weights,
        bases=bases,
        invocation_tokens=config.invocation_tokens,
        history=read_history(found.metadata, found.source.document(peft_files.SIDECAR)),
        metadata={**read_settings(found.metadata, found.source.document(peft_files.SIDECAR)), "peft": metadata},
        notes=merge_notes(
            found.notes,
            contents.notes,
            config.notes,
            reading.base.notes(modules),
            export_notes(found.source),
            unread_entries(found.metadata, "PEFT"),
        ),
        origin=Origin(format="peft", container=found.container, label=source.label, path=source.path, name=source.name),
    )


def oddities(source: Source, *, adapter_name: str | None = None) -> tuple[str, ...]:
    """Whether .safetensors and .bin side by side hold the same: reading takes the first and leaves the second alone."""
    return peft_files.compare_variants(source, adapter_name)


def write(adapter: Adapter, encoder: Encoder, *, container: str, conv: str | None = None) -> Artifact:
    """Write a PEFT folder that today's PEFT loads.

    `conv=svd` turns loralib's convolutions, which no PEFT convolution of that rank can hold, into ones of the rank that
    their delta weight has; without it they are refused.

    Raises: UnsupportedFeatureError for what use_dora, use_rslora and the like cannot say of one module alone
    """
    if conv not in (None, "svd"):
        raise OptionError(f'conv is {conv!r}, expected "svd" or nothing')
    if not adapter.modules:
        raise UnsupportedFeatureError("the adapter has no module, and PEFT loads no adapter without a target")
    adapter.check_one_model("a PEFT folder")
    adapter = replace(adapter, modules=tuple(with_paths(adapter.modules)))
    _check_names(adapter)
    carried = adapter.metadata.get("peft", {})
    rule = _rule(adapter.modules)
    orders = _names_lists(carried.get("parameter_orders"))
    layout = arrange(layers(adapter.modules, encoder, rule, conv), orders, carried.get("target_parameters") or ())
    check_uniform(layout)
    saved = saved_modules(adapter, layout, carried.get("modules_to_save") or ())
    tied = tied_tensors(layout, carried.get("tied_copies") or {})
    config = build_config(adapter, layout, rule, saved, tied, encoder)
    tensors = factor_tensors(layout) | tied | weight_tensors(adapter, layout, saved, encoder)
    return Artifact(
        tensors=tensors,
        stem=peft_files.STEM,
        metadata={"format": "pt"},
        documents={CONFIG: config},
        sidecar=peft_files.SIDECAR,
        notes=(*_component_notes(adapter), *_fused_notes(adapter, layout), *_pattern_notes(layout, config)),
    )


def _read_modules(groups: Sequence[Group], reading: Reading) -> list[LoraModule]:
    by_path = {group.path: group for group in groups}
    parameters = parameter_groups(groups, reading.config, reading.base)
    modules = read_parameters(parameters, by_path, reading)
    for path, group in by_path.items():
        if path in parameters:
            continue
        outer, inner = by_path.get(f"{path}{OUT_PROJ}"), by_path.get(path.removesuffix(OUT_PROJ))
        if outer is not None:
            modules += read_attention(group, outer, reading)
        elif inner in (None, group) or path.removesuffix(OUT_PROJ) in parameters:
            modules += read_module(group, reading)
    return modules


def _metadata(config: PeftConfig, tied: Mapping[str, str], modules: Sequence[LoraModule]) -> dict[str, Any]:
    """What the configuration says beyond the adapter model, for writing it again."""
    kept = config.carried()
    orders: dict[str, list[str]] = {}
    for module in modules:
        if module.kind == "parameter":
            orders.setdefault(parent(module.target.parameter), []).append(leaf(module.target.parameter))
    several = sorted({tuple(order) for order in orders.values() if len(order) > 1})
    return {
        **kept,
        **({"tied_copies": {peft_keys.without_base_layer(k): v for k, v in tied.items()}} if tied else {}),
        **({"parameter_orders": [list(order) for order in several]} if several else {}),
    }


def _rule(modules: Sequence[LoraModule]) -> ScaleRule:
    """use_rslora holds for all layers or none."""
    root = all(module.scale_rule is ScaleRule.ALPHA_OVER_SQRT_RANK for module in modules)
    return ScaleRule.ALPHA_OVER_SQRT_RANK if modules and root else ScaleRule.ALPHA_OVER_RANK


def _check_names(adapter: Adapter) -> None:
    opaque = [module.target.parameter for module in adapter.modules if module.target.opaque]
    if opaque:
        raise UnsupportedFeatureError(
            f"{opaque[0]} is a name that could not be turned back into a module path, which PEFT needs. "
            f"{adapter.naming_advice}"
        )
    if any(base.change for base in adapter.bases.values()) and any(module.target.rows for module in adapter.modules):
        raise UnsupportedFeatureError(
            "slices of a fused projection become one pair of higher rank, which breaks an adapter on a changed base"
        )


def _component_notes(adapter: Adapter) -> tuple[str, ...]:
    component = adapter.modules[0].target.component
    return (f"the adapter is for {component!r}; PEFT does not record that",) if component else ()


def _fused_notes(adapter: Adapter, layout: Layout) -> tuple[str, ...]:
    slots = Counter(module.target.parameter for module in adapter.modules if module.target.rows)
    ranks = {place.layer.parameter: place.layer.rank for place in layout.places}
    kinds = Counter((count, ranks[name]) for name, count in slots.items())
    return tuple(
        f"{number} fused projection{'s' * (number > 1)} of {count} slots became one pair each, of rank {rank}; "
        "as loralib they would no longer be MergedLinear"
        for (count, rank), number in kinds.items()
        if count > 1
    )


def _pattern_notes(layout: Layout, config: Mapping[str, Any]) -> Iterator[str]:
    """PEFT checks patterns against modules alone, and applies them to parameters too."""
    expressions = {anchored(name) for name in layout.target_parameters}
    fields = [field for field in ("rank_pattern", "alpha_pattern") if not expressions.isdisjoint(config[field])]
    if fields:
        yield (
            f"PEFT 0.21 warns at loading that keys of {' and '.join(fields)} were ignored: those of target_parameters "
            "are not, and the warning means nothing"
        )


def _names_lists(value: Any) -> list[list[str]]:
    return [[str(name) for name in names] for names in value or () if isinstance(names, list)]


def _dora(contents: Contents, config: PeftConfig, wanted: bool | None) -> bool:
    stated = config.flag("use_dora") if config.stated else None
    fate = "PEFT then ignores without a word"
    return settle_dora(config, contents.groups.values(), wanted, stated=stated, fate=fate)
