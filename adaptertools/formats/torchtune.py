"""torchtune: the raw adapter file that its recipes save beside an export to PEFT. Read, not written.

    epoch_N/adapter_model.pt               the factors, under torchtune's own names; before 0.5 adapter_N.pt
    epoch_N/adapter_config.json            r, lora_alpha and target_modules as PEFT names them; not for Phi
    epoch_N/config.json                    of the base model
    epoch_N/adapter_model.safetensors      the export, which the format peft reads; before 0.5 or where asked .bin

    layers.N.attn.q_proj.lora_a.weight     (r, in)        model.layers.N.self_attn.q_proj; k_proj, v_proj alike
    layers.N.attn.q_proj.lora_b.weight     (out, r)
    layers.N.attn.q_proj.magnitude         (out,)         with DoRA, for any module
    layers.N.attn.output_proj              …              model.layers.N.self_attn.o_proj
    layers.N.mlp.w1, w2, w3                …              model.layers.N.mlp.gate_proj, down_proj, up_proj
    output                                 …              lm_head; score of a model for rewards

Scaling is lora_alpha / r. The raw file states neither, so alpha must be given where adapter_config.json is not there.

Rows of q and k, of lora_b and magnitude alike, stand in the order of torchtune's base weights. For Llama, Mistral and
Gemma the rows that a rotary embedding turns together are neighbours there; Hugging Face has them half a head apart.
Qwen's and Phi's stand as Hugging Face has them. So the base model's family and its heads are needed wherever q or k is
adapted: `base`, else the config.json beside the file, says them. Phi's q, k, v, gate and up become rows of Hugging
Face's qkv_proj and gate_up_proj.

The export reorders lora_b for every family, so that of Qwen is wrong, and never magnitude, so with DoRA that of the
others is wrong too. In a folder with both files the export is what is read, with a note; `--from torchtune` reads the
raw file.

Source: pytorch/torchtune bd2a0fc: torchtune/modules/peft/lora.py, dora.py, torchtune/models/convert_weights.py,
torchtune/training/checkpointing/_checkpointer.py
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from adaptertools.adapter import Adapter, Feature, LoraModule, Origin, Target, merge_notes
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.source import Source
from adaptertools.dialects.peft import config as peft_config
from adaptertools.dialects.peft.base import Checkpoint
from adaptertools.dialects.peft.config import PeftConfig
from adaptertools.dialects.peft.files import weight_files
from adaptertools.dialects.torchtune.families import Family, Rows, in_halves
from adaptertools.dialects.torchtune.keys import (
    MAGNITUDE,
    adapted,
    adapter_file,
    adapter_files,
    adapter_folders,
    sort_keys,
)
from adaptertools.encoding import Encoder
from adaptertools.errors import ConfigError, OptionError, UnsupportedFeatureError
from adaptertools.names import join
from adaptertools.tensors import natural_order

SUMMARY = "torchtune: the raw adapter_model.pt or adapter_N.pt of its recipes"
CONTAINERS: tuple[str, ...] = ()
FOLDER = True
CONFIG = peft_config.FILE
FILES = ("adapter_model.pt", "adapter_[0-9]*.pt", CONFIG)
CARRIES = frozenset({Feature.DORA, Feature.FUSED_ROWS})

_QKV = ("q_proj", "k_proj", "v_proj")
_WITH_BIAS = ("qwen2",)
"""Models whose projections of attention have a bias."""

_MODEL_CONFIG = "config.json"
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


def detect(source: Source) -> bool:
    """Whether it is one raw file, or a folder with one and without an export to PEFT beside it.

    A folder of such folders counts: reading it will say which to give.
    """
    if not source.is_folder:
        return bool(adapter_files(source))
    if adapter_files(source):
        return not weight_files(source)
    return any(not weight_files(source.sub(name)) for name in adapter_folders(source))


def read(source: Source, *, alpha: float | None = None, base: Checkpoint | None = None) -> Adapter:
    """Read the raw file of a torchtune run.

    `alpha` stands in for a lora_alpha that no adapter_config.json says. `base` says which family of models it is and
    how many heads they have, where no config.json stands beside the file and q or k is adapted.

    Memory: headers, and the factors of q and k, whose rows are reordered
    Raises: MissingAlphaError; ConfigError where the family is needed and not known; UnsupportedFeatureError for models
            that are not read, such as those with vision
    """
    name = adapter_file(source)
    file = source.tensors(name)
    modules = sort_keys(file)
    config = peft_config.parse(source.document(CONFIG), source.label_of(CONFIG), alpha)
    family = _family(source, base)
    _check_known(file.label, modules, family)
    read = [_module(module, parts, config, family) for module, parts in modules.items()]
    return Adapter(
        modules=tuple(sorted(read, key=lambda module: natural_order(str(module.target)))),
        bases={"": config.base},
        metadata=_settings(config),
        notes=merge_notes(config.notes, _naming_notes(config, family), _bias_notes(read, family)),
        origin=Origin(
            format="torchtune", container=file.container, label=source.label, path=source.path, name=source.name
        ),
    )


def write(adapter: Adapter, encoder: Encoder, *, container: str) -> Artifact:
    """Not written: torchtune itself loads nothing but what it saved, and PEFT's format is read by everything else.

    Raises: OptionError
    """
    raise OptionError("torchtune can be read, not written")


def _settings(config: PeftConfig) -> dict[str, Any]:
    """What the configuration says beyond the adapter model, in PEFT's own words."""
    said = {key: value for key, value in config.carried().items() if key != "target_modules"}
    return {"peft": said} if config.stated and said else {}


def _family(source: Source, base: Checkpoint | None) -> Family | None:
    """The family of the base model, of `base` or of the config.json beside the file; None where neither is there."""
    if base is not None and base.config.get("model_type"):
        return Family.of(base.config, "the base model's config.json")
    beside = source.document(_MODEL_CONFIG)
    return None if beside is None else Family.of(beside, source.label_of(_MODEL_CONFIG))


def _check_known(label: str, modules: Mapping[str, Mapping[str, Tensor]], family: Family | None) -> None:
    """Raises: UnsupportedFeatureError for modules of other models; ConfigError if q or k needs a family"""
    for module in modules:
        if _hugging_face_name(module, family) is None:
            kind = "has vision" if module.startswith(("decoder.", "encoder", "vision")) else "is of another kind"
            raise UnsupportedFeatureError(
                f"{label}: {module} belongs to a model that {kind}; read are those of layers.N.attn, layers.N.mlp and "
                "output, which are Llama, Mistral, Gemma, Qwen and Phi"
            )
    turned = adapted(modules, "q_proj", "k_proj")
    if turned and family is None:
        raise ConfigError(
            f"{label}: the order of the rows of {turned[0]} depends on the base model, and {_MODEL_CONFIG} does not "
            "stand beside the file. Give the base model, or a folder with its config.json: --base BASE"
        )


def _module(name: str, parts: Mapping[str, Tensor], config: PeftConfig, family: Family | None) -> LoraModule:
    parameter = _hugging_face_name(name, family)
    assert parameter is not None
    lora_A, lora_B, magnitude = parts["lora_a"], parts["lora_b"], parts.get(MAGNITUDE)
    module = LoraModule(  # checked before its rows are touched
        target=Target(parameter=parameter),
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=config.alpha_of(parameter),
        transposed=False,
        magnitude=magnitude,
    )
    if config.rank_of(parameter) not in (None, module.rank):
        config.notes.append(f"{config.label}: claims other ranks than the tensors have, which are used")
    if family is None or family.rows is Rows.HALVES:
        return module
    return _fused(name, module, family) if family.rows is Rows.FUSED else _in_halves(name, module, family)


def _in_halves(name: str, module: LoraModule, family: Family) -> LoraModule:
    heads = family.heads_of(name)
    if heads is None:
        return module
    turned = {
        part: in_halves(tensor, heads, family.head_dim, f"{name}.{part}")
        for part, tensor in (("lora_B", module.lora_B), ("magnitude", module.magnitude))
        if tensor is not None
    }
    return replace(module, **turned)  # type: ignore[arg-type]


def _fused(name: str, module: LoraModule, family: Family) -> LoraModule:
    place = family.fused_rows(name, module.out_features)
    if place is None:
        return module
    last, rows = place
    path = module.target.parameter.rpartition(".")[0].rpartition(".")[0]
    return replace(module, target=Target(parameter=join(path, last), rows=rows))


def _hugging_face_name(module: str, family: Family | None) -> str | None:
    """The module's name in Hugging Face's model, Phi's fused projections apart; None for one that is not known."""
    if module == "output":
        return "score" if family is not None and family.reward else "lm_head"
    match = _LAYER.fullmatch(module)
    if match is None or match[2] not in _NAMES:
        return None
    return f"model.layers.{match[1]}.{_NAMES[match[2]]}"


def _naming_notes(config: PeftConfig, family: Family | None) -> tuple[str, ...]:
    """torchtune saves adapter_config.json for all families that are read but Phi, whose projections are fused."""
    if family is not None or config.stated:
        return ()
    return (
        f"neither {_MODEL_CONFIG} nor {CONFIG} stands beside the file: the names are those of Llama, Mistral, Gemma "
        "and Qwen; if it is of Phi, give the base model (--base BASE)",
    )


def _bias_notes(modules: Sequence[LoraModule], family: Family | None) -> tuple[str, ...]:
    """torchtune's DoRA multiplies a layer's bias along with its rows; its own merging leaves the bias as it is."""
    if family is None or family.name not in _WITH_BIAS:
        return ()
    found = [str(m.target) for m in modules if m.magnitude is not None and m.target.parameter.endswith(_QKV)]
    if not found:
        return ()
    return (
        f"{found[0]} has a bias in the base model, which torchtune's DoRA scales in training and nobody else does, its "
        "own merging included: outputs differ slightly from those of the training",
    )
