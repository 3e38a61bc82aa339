"""loralib (microsoft/LoRA): the state dict that `lora_state_dict` picks, in a torch file or a safetensors file.

    X.lora_A, X.lora_B          bare parameters beside X.weight, which usually stays behind
    any other key               rides along: a head, and with bias="all" or "lora_only" X.bias (X.conv.bias)

    class         base weight                 lora_A        lora_B            ΔW
    Linear        (out, in)                   (r, in)       (out, r)          s·B·A
    MergedLinear  (out, in), L equal slots    (n·r, in)     (n·out/L, r)      s·B_g·A_g in each of the n adapted slots
    Embedding     (V, d)                      (r, V)        (d, r)            s·(B·A)ᵀ
    Conv2d        (out, in, k, k)             (k·r, k·in)   (k·out, k·r)      s·(B·A) viewed as the weight

With `fan_in_fan_out` the base weight is (in, out) and ΔW transposed; A and B are not. s = alpha / r. The file states
neither alpha nor class, slots or orientation: `alpha` must be given, and the options of `read` say the rest. The
sidecar that is written beside the file, or into its header if it is safetensors, says all of it.

    slots          PRESET or PATTERN=MASK[:transposed], several with commas: gpt2, c_attn=TFT:transposed,qkv=TTF
                   MASK has a letter for each equal slot of the fused weight: T where `enable_lora` is True, else F
    embeddings     PATTERN, several with commas: layers that are loralib.Embedding
    convolutions   PATTERN=KERNEL, several with commas: layers that are loralib.Conv2d, and their kernel size
    transposed     PATTERN, several with commas: layers built with fan_in_fan_out=True
    own_weights    what X.weight beside X.lora_A is. loralib adds ΔW to it in eval() and nothing tells whether it did,
                   so it must be said. drop: leave it to the base model; unmerged: keep it; merged: keep it less ΔW

PATTERN is a glob on a layer's name, whole or its last parts; the first that fits counts, and one that fits none is
an error. Training loops wrap the state dict in `model_state_dict` and the like and put `module.` in front of names;
both go.

Writing keeps the factors where one alpha gives every layer its scaling. Else the scaling is folded into lora_B, and
alpha is each layer's r. loralib's constructors default to lora_alpha=1, so the alpha to build with is said.

Source: microsoft/LoRA c4593f0, loralib 0.1.2: loralib/layers.py, loralib/utils.py
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from adaptertools.adapter import (
    Adapter,
    Feature,
    FullWeight,
    Kind,
    LoraModule,
    Origin,
    ScaleRule,
    WeightRole,
    merge_notes,
)
from adaptertools.containers import sidecar
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.history import read_history, unread_entries
from adaptertools.containers.jsonfile import parse_object
from adaptertools.containers.source import Source
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.dialects.loralib.keys import adapter_file, adapter_files, sort_keys
from adaptertools.dialects.loralib.layers import cut, slots_of
from adaptertools.dialects.loralib.layout import Layout, LayoutOptions, settle
from adaptertools.dialects.loralib.record import (
    LayerRecord,
    Record,
    building_notes,
    layer_json,
    parse_record,
    record_json,
)
from adaptertools.dialects.peft.base import BaseModel, Checkpoint
from adaptertools.encoding import Encoder
from adaptertools.errors import (
    ConfigError,
    DuplicateTargetError,
    MissingAlphaError,
    UnsupportedFeatureError,
    count,
)
from adaptertools.module import check_alpha
from adaptertools.stating import common_alpha
from adaptertools.tensors import Deferred, combine

SUMMARY = "microsoft/LoRA: the state dict of lora_state_dict"
CONTAINERS = ("torch", "safetensors")
FOLDER = False
CONFIG = sidecar.SUFFIX
FILES = (f"*{sidecar.SUFFIX}",)
CARRIES = frozenset({Feature.CONV, Feature.EMBEDDING, Feature.FUSED_ROWS, Feature.FULL_WEIGHTS, Feature.BIAS})
KEEPS_SETTINGS = True

OwnWeights = Literal["drop", "unmerged", "merged"]

_HEADER_KEY = "loralib"


def detect(source: Source) -> bool:
    """Whether it is one torch or safetensors file with bare factors, or a folder that holds one such file."""
    if source.is_folder and source.document("adapter_config.json") is not None:
        return False
    return len(adapter_files(source)) == 1


def read(
    source: Source,
    *,
    alpha: float | None = None,
    slots: str | None = None,
    base: Checkpoint | None = None,
    embeddings: str | None = None,
    convolutions: str | None = None,
    transposed: str | None = None,
    own_weights: OwnWeights | None = None,
) -> Adapter:
    """Read a loralib file. The sidecar, where there is one, answers all that the options ask; `base` most of it.

    The grammar of the options stands at the top of this file. They count before the sidecar, and it before the base.

    Memory: headers only; with own_weights=merged the weights of the adapted layers
    Raises: MissingAlphaError; ConfigError if the slots of a fused projection stay open; OptionError for a pattern that
            fits no layer; and others of the tree
    """
    alpha = None if alpha is None else check_alpha(alpha)
    options = LayoutOptions.parse(slots, embeddings, convolutions, transposed)
    name = adapter_file(source)
    file = source.tensors(name)
    document, record_notes = _find_record(source, name, file)
    record = parse_record(f"{source.label}: sidecar", document or {})
    keys = sort_keys(file, keep_names=bool(record.layers))
    if absent := sorted(record.layers.keys() - keys.pairs.keys()):
        raise ConfigError(f"{source.label}: the sidecar describes {absent[0]}, whose factors are not in the file")
    model = BaseModel(base)
    recorded = {name: said.layout for name, said in record.layers.items()}
    layouts, layout_notes = settle(keys.pairs, keys.weights, options, recorded, model)
    weights = _plain_names(keys.weights, layouts)
    own = _own_weights(file.label, weights, layouts, record, own_weights)
    label = f"{file.label} ({'; '.join(record_notes)})" if record_notes else file.label
    modules, alpha_notes = _modules(label, keys.pairs, layouts, record, alpha)
    full_weights, weight_notes = _full_weights(weights, own, modules, record, own_weights)
    return Adapter(
        modules=tuple(module for group in modules.values() for module in group),
        full_weights=full_weights,
        bases=record.bases,
        history=read_history(file.metadata, document),
        metadata=record.metadata,
        notes=merge_notes(
            record_notes,
            keys.notes,
            layout_notes,
            alpha_notes,
            weight_notes,
            unread_entries(file.metadata, "loralib", _HEADER_KEY),
        ),
        origin=Origin(
            format="loralib", container=file.container, label=source.label, path=source.path, name=source.name
        ),
    )


def _find_record(source: Source, name: str, file: TensorFile) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    if _HEADER_KEY in file.metadata and file.container == "safetensors":
        return parse_object(f"{file.label}: header entry {_HEADER_KEY!r}", file.metadata[_HEADER_KEY]), ()
    return sidecar.load(source, name)


def _modules(
    label: str,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    layouts: Mapping[str, Layout],
    record: Record,
    alpha: float | None,
) -> tuple[dict[str, tuple[LoraModule, ...]], list[str]]:
    """The modules of each layer, with the alpha that was given, else that of the sidecar."""
    modules: dict[str, tuple[LoraModule, ...]] = {}
    overruled: list[str] = []
    for name, (lora_A, lora_B) in pairs.items():
        said = record.layers.get(name)
        if said is None and record.lora_alpha is not None:
            said = LayerRecord(layout=layouts[name], alpha=record.lora_alpha, scale_rule=ScaleRule.ALPHA_OVER_RANK)
        stated = said and cut(name, lora_A, lora_B, layouts[name], said.alpha, said.scale_rule)
        given = alpha is not None and cut(name, lora_A, lora_B, layouts[name], alpha, ScaleRule.ALPHA_OVER_RANK)
        if stated and given and stated[0].scaling != given[0].scaling:
            overruled.append(name)
            stated = given
        found = stated or given
        if not found:
            raise MissingAlphaError(
                f"{label}: alpha is never in a loralib file, and it decides how strong the adapter is. Give the "
                "lora_alpha that the model was built with: alpha=A in Python, --source-alpha A on the command line (on "
                "convert also --alpha). Customary are 16 at r 8 for RoBERTa base, 32 at r 16 for DeBERTa XXL (for NLU "
                "alpha = 2r), and 128 at r 4 for GPT-2 NLG, where its README has 32"
            )
        modules[name] = found
    note = f"alpha {alpha} was given and taken for {count(len(overruled), 'layer')} whose sidecar says otherwise"
    return modules, [note] if overruled else []


def _plain_names(weights: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Weights under the names of a model without loralib, whose convolutions have no `conv` inside."""
    named: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        layer, _, last = key.rpartition(".conv.")
        name = f"{layer}.{last}" if layer in layouts and layouts[layer].kind is Kind.CONV else key
        if name in named and not torch.equal(named[name], tensor):  # newer versions register both names for one tensor
            raise DuplicateTargetError(f"{name} stands twice, as {name} and as {key}, with different values")
        named[name] = tensor
    return named


def _own_weights(
    label: str,
    weights: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    record: Record,
    own_weights: OwnWeights | None,
) -> list[str]:
    """The weights of adapted layers that no sidecar explains."""
    own = [name for name in weights if name.removesuffix(".weight") in layouts and name not in record.weights]
    if own and own_weights is None:
        raise ConfigError(
            f"{label}: {own[0]} stands beside its lora_A{f', and {len(own) - 1} more' if len(own) > 1 else ''}. "
            "loralib adds ΔW to the weight in eval() and takes it off in train(), and nothing tells in which state it "
            "was saved. Say own_weights=drop to leave these weights to the base model, own_weights=unmerged to keep "
            "them as base weights, or own_weights=merged to keep them less ΔW (--in own_weights=…)"
        )
    return own


def _full_weights(
    weights: Mapping[str, Tensor],
    own: list[str],
    modules: Mapping[str, tuple[LoraModule, ...]],
    record: Record,
    own_weights: OwnWeights | None,
) -> tuple[dict[str, FullWeight], list[str]]:
    """What rides along, and what becomes of the weights of adapted layers."""
    full: dict[str, FullWeight] = {}
    for name, tensor in weights.items():
        if name not in own:
            full[name] = FullWeight(weight=tensor, role=record.weights.get(name) or _role(name, weights, own))
        elif own_weights != "drop":
            kept = _unmerged(tensor, modules[name.removesuffix(".weight")]) if own_weights == "merged" else tensor
            full[name] = FullWeight(weight=kept, role=WeightRole.BASE)
    done = {"drop": "left out", "unmerged": "kept as they are", "merged": "kept less ΔW"}.get(own_weights or "", "")
    return full, [f"the weights of {count(len(own), 'adapted layer')} were in the file and {done}"] if own else []


def _role(name: str, weights: Mapping[str, Tensor], own: list[str]) -> WeightRole:
    """A bias whose weight was not saved belongs to a layer of the base; the rest are modules trained in full."""
    weight = f"{name.removesuffix('.bias')}.weight"
    alone = name.endswith(".bias") and (weight not in weights or weight in own)
    return WeightRole.BIAS if alone else WeightRole.MODULE


def _unmerged(weight: Tensor, modules: tuple[LoraModule, ...]) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = sum((module.delta_weight(dtype=wide) for module in modules), start=torch.zeros((), dtype=wide))
    return (weight.to(wide) - delta).to(weight.dtype)


def write(adapter: Adapter, encoder: Encoder, *, container: str) -> Artifact:
    """Write the state dict that `load_state_dict(strict=False)` takes, and the sidecar that says what it cannot.

    Raises: UnsupportedFeatureError for what no layer of loralib is: unequal slots, PEFT's convolutions, several models
    """
    layers = _layers(adapter)
    lora_alpha = common_alpha(adapter.modules)
    tensors: dict[str, Deferred] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, modules in layers.items():
        slots = slots_of(name, modules)
        ordered = sorted(modules, key=lambda module: module.target.rows.start if module.target.rows else 0)
        described[name] = layer_json(ordered, lora_alpha, slots)
        rows_a, rows_b = [], []
        for module in ordered:
            factor = module.scaling if lora_alpha is None else 1.0
            rows_a.append(encoder.keep(f"{name}.lora_A", module.lora_A))
            rows_b.append(encoder.fold(f"{name}.lora_B", module.lora_B, factor))
        tensors[f"{name}.lora_A"] = _joined(rows_a)
        tensors[f"{name}.lora_B"] = _joined(rows_b)
    for name, weight in adapter.full_weights.items():
        key = _written_name(name, layers)
        if key in tensors:
            raise UnsupportedFeatureError(f"{name} would be written as {key}, which stands for another tensor already")
        tensors[key] = encoder.keep(key, weight.weight)
    record = record_json(adapter, lora_alpha, described)
    in_header = container == "safetensors"
    return Artifact(
        tensors=tensors,
        stem="lora",
        metadata={"format": "pt", _HEADER_KEY: json.dumps(record, sort_keys=True)} if in_header else {},
        documents={} if in_header else {CONFIG: record},
        sidecar=CONFIG,
        notes=(*_component_notes(adapter), *building_notes(described)),
    )


def _layers(adapter: Adapter) -> dict[str, list[LoraModule]]:
    if not adapter.modules:
        raise UnsupportedFeatureError("the adapter holds whole weights alone, and a loralib file has factors")
    layers: dict[str, list[LoraModule]] = {}
    adapter.check_one_model("a loralib file")
    for module in adapter.modules:
        if module.target.opaque:
            raise UnsupportedFeatureError(
                f"{module.target}: a loralib file is the state dict of one model, by the names of its layers. "
                f"{adapter.naming_advice}"
            )
        layers.setdefault(module.target.parameter, []).append(module)
    return layers


def _component_notes(adapter: Adapter) -> tuple[str, ...]:
    component = adapter.modules[0].target.component
    return (f"the adapter is for {component!r}; a loralib file does not record that",) if component else ()


def _joined(parts: list[Deferred]) -> Deferred:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return combine(parts, shape, torch.cat)


def _written_name(name: str, layers: Mapping[str, list[LoraModule]]) -> str:
    """A convolution of loralib holds the layer itself as `conv`."""
    layer, _, last = name.rpartition(".")
    return f"{layer}.conv.{last}" if layer in layers and layers[layer][0].kind is Kind.CONV else name
