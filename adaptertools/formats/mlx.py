"""mlx: the folder in which mlx-lm saves a LoRA adapter, and which its `load_adapters` reads.

    adapters.safetensors              the factors; NNNNNNN_adapters.safetensors beside it are checkpoints of the run
    adapter_config.json               all arguments of the run: dialects/mlx/config.py
    adapters.npz                      of before April 2024, without a configuration; read, not written

Keys are the paths of modules in mlx-lm's model + one of

    .lora_a (in, r)      .lora_b (r, out)         Linear                  A = aᵀ, B = bᵀ
    .lora_a (V, r)       .lora_b (r, d)           Embedding               ΔW (V, d) = s · a b
    .lora_a (E, r, in)   .lora_b (E, out, r)      SwitchLinear            A = a, B = b
    .lora_a (E·r, in)    .lora_b (E, out, r)      the same before October 2025; read, not written
    .m (out); of an embedding (V)                 DoRA: norm of each row of the weight

Scaling is `lora_parameters.scale`, one for all modules, as is the rank; there is no alpha. Writing states the scaling
where all modules have the same. Else each is folded into lora_b and scale is 1. Lower ranks are filled up with zeros.
`keys` are whole paths and `num_layers` is -1, which makes mlx-lm adapt exactly these modules, `lm_head` too. What the
format cannot say (ranks before filling up, how experts were named) stands in the safetensors header with the history.

Paths are those of Hugging Face's models in most cases. Experts differ (dialects/mlx/experts.py), and so do models of
several kinds of input and GPT-2 (`model.h.…`): a checkpoint that mlx-lm has saved, given as `base`, tells the names
there; else rename modules. mlx-lm refuses what it has no module for.

An Embedding's pair looks like a Linear's. The shape of the base weight tells them apart (`base`), else the names that
models give to embeddings; the option `embeddings` (globs, several with commas) names others. `scale`, or an alpha,
stands in where the file states none. Writing takes `num_experts`, for adapters that leave experts out.

Source: ml-explore/mlx-lm 0.32.2 and d78bf58: mlx_lm/tuner/{lora,dora,utils,trainer}.py, mlx_lm/models/switch_layers.py;
earlier layouts in the history of these files
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from adaptertools.adapter import Adapter, Feature, Origin, merge_notes
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.history import HEADER_KEY, read_history, read_settings, unread_entries
from adaptertools.containers.source import Source
from adaptertools.dialects.diffusers.paths import with_paths
from adaptertools.dialects.mlx import config as mlx_config
from adaptertools.dialects.mlx import files as mlx_files
from adaptertools.dialects.mlx import keys as mlx_keys
from adaptertools.dialects.mlx import names as mlx_names
from adaptertools.dialects.mlx.config import MlxConfig
from adaptertools.dialects.mlx.keys import Group
from adaptertools.dialects.mlx.layout import Layer, arrange, check_names
from adaptertools.dialects.mlx.modules import Reading, read_modules
from adaptertools.dialects.mlx.record import Record, header
from adaptertools.dialects.mlx.write import is_dora, tensors
from adaptertools.dialects.peft.base import BaseModel
from adaptertools.encoding import Encoder
from adaptertools.errors import count
from adaptertools.module import Kind, LoraModule
from adaptertools.stating import common_scaling
from adaptertools.tensors import natural_order

SUMMARY = "mlx-lm on Apple silicon: adapters.safetensors and adapter_config.json with one scale"
CONTAINERS = ("safetensors",)
FOLDER = True
CONFIG = mlx_files.CONFIG
FILES = (mlx_files.CONFIG, *mlx_files.WEIGHTS)
CARRIES = frozenset({Feature.DORA, Feature.EMBEDDING, Feature.PARAMETER})


def detect(source: Source) -> bool:
    """Whether it is an MLX adapter; a folder that is PEFT's as well is one of both."""
    return mlx_files.detect(source)


def read(
    source: Source,
    *,
    scale: float | None = None,
    alpha: float | None = None,
    base: Checkpoint | None = None,
    embeddings: str | None = None,
) -> Adapter:
    """Read an MLX folder, or one of its weight files with the configuration beside it.

    `scale`, or `alpha` over the rank, stands in for a scale that the configuration lacks. `base` tells embeddings from
    linear layers and gives experts their names there. `embeddings` are patterns of further embeddings.

    Raises: NotLoraError for weights that were trained whole, MissingAlphaError, ConfigError, UnclaimedTensorError,
            UnpairedFactorError, AmbiguousFormatError for several checkpoints, SourceNotFoundError
    """
    name = mlx_files.weight_file(source)
    config = mlx_config.parse(source.document(CONFIG), source.label_of(CONFIG), scale, alpha)
    file = source.tensors(name)
    groups = mlx_keys.parse(file.tensors, file.label)
    record = Record.read(file.metadata, file.label)
    reading = Reading(
        config=config,
        record=record,
        base=BaseModel(base),
        embeddings=tuple(part.strip() for part in (embeddings or "").split(",") if part.strip()),
        label=file.label,
    )
    modules = sorted(read_modules(groups, reading), key=lambda module: natural_order(str(module.target)))
    return Adapter(
        modules=tuple(modules),
        bases={"": replace(config.base, revision=record.revision)},
        history=read_history(file.metadata),
        metadata=read_settings(file.metadata) | ({"mlx": dict(config.metadata)} if config.metadata else {}),
        notes=merge_notes(
            unread_entries(file.metadata, "mlx-lm"),
            config.notes,
            _rank_notes(config, groups),
            _name_notes(modules, reading.base),
        ),
        origin=Origin(format="mlx", container=file.container, label=source.label, path=source.path, name=source.name),
    )


def write(
    adapter: Adapter,
    encoder: Encoder,
    *,
    container: str,
    base: Checkpoint | None = None,
    num_experts: int | None = None,
) -> Artifact:
    """Write the folder that `mlx_lm.tuner.utils.load_adapters` takes, and `--adapter-path` of every mlx-lm command.

    `base` that mlx-lm has saved gives the modules their names there. `num_experts`, or the base, says how many experts
    a model has of which the adapter holds some alone; zeros stand for the others.

    Raises: UnsupportedFeatureError for several models, names that could not be turned back, DoRA on a part of the
            modules or along another axis, and stacks whose name in mlx-lm is not known; MatchError for modules that a
            base of mlx-lm does not have
    """
    adapter.check_one_model("an MLX adapter")
    adapter = replace(adapter, modules=tuple(with_paths(adapter.modules)))
    check_names(adapter)
    layers, record = arrange(adapter.modules, num_experts, mlx_names.experts_of(base) if base else None)
    if base is not None and mlx_names.is_of_mlx(base):
        layers, record = mlx_names.named_as_in(base, layers, record)
    dora = is_dora(adapter.modules)
    rank = max(layer.rank for layer in layers)
    scaling = common_scaling(adapter.modules)
    stored = {name: part for layer in layers for name, part in tensors(layer, encoder, rank, scaling).items()}
    keys = [layer.path for layer in layers]
    belongs = adapter.bases.get("")
    said = header(replace(record, revision=belongs.revision if belongs else None))
    return Artifact(
        tensors=stored,
        stem=mlx_files.STEM,
        metadata={HEADER_KEY: json.dumps(said, sort_keys=True)} if said else {},
        documents={
            CONFIG: mlx_config.build(adapter, keys, rank, 1.0 if scaling is None else scaling, dora=dora),
        },
        sidecar=CONFIG,
        notes=tuple(_written_notes(adapter, layers)),
    )


def _rank_notes(config: MlxConfig, groups: Mapping[str, Group]) -> Iterator[str]:
    other = sorted({group.lora_b.shape[-1 if group.is_stack else 0] for group in groups.values() if group.lora_b.ndim})
    if config.rank is not None and other != [config.rank]:
        yield (
            f"{config.label} says rank {config.rank}, the factors have {', '.join(map(str, other))}, which counts; "
            "mlx-lm refuses such a file since August 2026"
        )


def _name_notes(modules: Sequence[LoraModule], base: BaseModel) -> Iterator[str]:
    stacks = [module.target.parameter for module in modules if module.target.opaque]
    if stacks:
        why = "the base model has no experts of that name and size" if base.known else "--base gives them their names"
        yield f"{count(len(stacks), 'expert stack', ('keeps', 'keep'))} the name of mlx-lm, such as {stacks[0]}: {why}"
    yield from base.notes(module for module in modules if not module.target.opaque)


def _written_notes(adapter: Adapter, layers: Sequence[Layer]) -> Iterator[str]:
    component = adapter.modules[0].target.component
    if component:
        yield f"the adapter is for {component!r}; MLX does not record that"
    tables = [member for layer in layers for member in layer.members if member and member.kind is Kind.EMBEDDING]
    if tables:
        yield (
            f"where a model ties its head to {tables[0].target}, mlx-lm adapts the head with it, as a merged model "
            "does; PEFT without merging does not"
        )
    apart = [layer for layer in layers if layer.apart]
    if apart:
        yield f"experts are written as stacks of {len(apart[0].members)}, such as {apart[0].path}"
