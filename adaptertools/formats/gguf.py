"""gguf: one .gguf file, as llama.cpp, LM Studio, Ollama and llamafile load it (--lora, ADAPTER).

    <tensor>.weight.lora_a      (r, in); of token_embd (vocabulary, r), transposed
    <tensor>.weight.lora_b      (out, r)

`<tensor>` is the base's name in GGUF: blk.N.attn_q, blk.N.ffn_down, token_embd, output. Shapes are those of torch, the
innermost axis last; GGUF itself lists them the other way round. The header says general.type = adapter, adapter.type =
lora, general.architecture (that of the base), adapter.lora.alpha, and adapter.alora.invocation_tokens where it is
aLoRA.

Scaling: alpha / r of each lora_b; alpha 0 or absent means 1. Written is the one alpha that gives every module its
scaling; the field is a float32, and what that rounds off is reported. Where no alpha fits all, or it is 0, the scaling
is folded into lora_b, and alpha is r if all modules share one, else 0.

Rows: for some families llama.cpp has the rows of q and k interleaved; writing does the same to lora_b, reading undoes
it. Which, and which are refused: dialects/gguf/families.py. Writing needs the base's config.json, which says family,
layers and heads. It is noted in the header under `adaptertools`, so that our files are read without a base. Files of
other programs say no heads: where rows would have to be turned back and no base is given, the names stay GGUF's own,
which inspect, diff, rescale, truncate, stack and writing gguf take as they are.

Refused: stacks of experts; an embedding or a head of a tied base (llama.cpp stops at the one, does not know the other).
A *_norm.weight is an error, as llama.cpp ignores it; quantised factors (Q8_0 …) are read in float32.

Source: ggml-org/llama.cpp 0c1e570: src/llama-adapter.cpp, src/llama-graph.cpp, convert_lora_to_gguf.py; gguf 0.19.0
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptertools.adapter import Adapter, Base, Feature, Kind, LoraModule, Origin, ScaleRule, Target
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.history import read_history, read_settings
from adaptertools.containers.source import Source
from adaptertools.dialects.gguf.base import BaseFacts, facts_from_json, facts_of
from adaptertools.dialects.gguf.families import BY_ARCHITECTURE, EMBEDDING, PERMUTED_TENSORS
from adaptertools.dialects.gguf.fit import check_fit, heads_of
from adaptertools.dialects.gguf.header import Header, parse
from adaptertools.dialects.gguf.names import check_layers, kind_of, parameter_names
from adaptertools.dialects.gguf.pairs import LORA_A, LORA_B, WEIGHT, pair
from adaptertools.dialects.gguf.places import check_ends, check_models, odd_names, tensor_names
from adaptertools.dialects.gguf.rows import in_halves, interleaved
from adaptertools.dialects.peft.base import Checkpoint
from adaptertools.encoding import Encoder, Loss
from adaptertools.errors import AmbiguousFormatError, MatchError, UnknownFormatError, UnsupportedFeatureError, count
from adaptertools.stating import common_alpha
from adaptertools.tensors import Deferred, combine, natural_order

SUMMARY = "GGUF for llama.cpp, LM Studio, Ollama: one .gguf file; needs --base to be written"
CONTAINERS = ("gguf",)
FOLDER = False
CONFIG = ".json"
FILES = ("*.gguf",)
CARRIES = frozenset({Feature.EMBEDDING, Feature.ALORA})
OPAQUE_IS_OWN = True
BASE_ADVICE = "For GGUF adapters its config.json is enough"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROUNDING = 2.0**-24


def detect(source: Source) -> bool:
    """Whether it is a GGUF file, or a folder without another adapter that holds one."""
    if source.is_folder and source.document("adapter_config.json") is not None:
        return False
    return bool(_files(source))


def _files(source: Source) -> list[str]:
    return [name for name in source.tensor_names if source.container(name) == "gguf"]


def read(source: Source, *, base: Checkpoint | None = None, ignore_norms: bool = False) -> Adapter:
    """Read a GGUF adapter. `base` settles names, and the heads by which rows of q and k are turned back; every module
    must fit it.

    `ignore_norms` leaves out norms that were trained along, as llama.cpp does.

    Memory: headers; the rows that are turned back, and quantised factors, are read
    Raises: NotLoraError for models; MatchError and ShapeError if the base is another; UnclaimedTensorError and others
            of the tree
    """
    name, metadata = _open(source)
    file = source.tensors(name)
    header = parse(source.label, metadata)
    pairs = pair(source.label, file.tensors, ignore_norms=ignore_norms)
    facts = _facts(source.label, header, base)
    if facts is not None:
        check_layers(pairs, facts)
    targets = _targets(pairs, header, facts, base)
    found = {tensor: _module(tensor, targets[tensor], *pairs[tensor], header.alpha, facts) for tensor in pairs}
    if facts is not None:
        check_fit(found, facts, base)
    modules = list(found.values())
    ignored = len(file.tensors) - 2 * len(pairs)
    return Adapter(
        modules=tuple(sorted(modules, key=lambda module: natural_order(str(module.target)))),
        bases={"": header.base},
        invocation_tokens=header.invocation_tokens,
        history=read_history(metadata),
        metadata={**read_settings(metadata), "gguf": _carried(header, facts)},
        notes=(
            *header.notes,
            *([f"left out: {count(ignored, 'norm')} that trained along, as asked for"] if ignored else []),
            *_opaque_notes(modules, header, facts),
        ),
        origin=Origin(format="gguf", container="gguf", label=source.label, path=source.path, name=source.name),
    )


def _open(source: Source) -> tuple[str, Mapping[str, str]]:
    """The one file to read, and its header: of tensors in memory, the document beside them."""
    if source.path is None:
        (name,) = source.file_names
        document = source.document(f"{name}{CONFIG}") or {}
        return name, {key: str(value) for key, value in document.items()}
    files = _files(source)
    if len(files) > 1:
        raise AmbiguousFormatError(f"{source.label} holds {', '.join(files)}: name the file to read")
    if not files:
        raise UnknownFormatError(f"{source.label} holds no GGUF file")
    return files[0], source.tensors(files[0]).metadata


def _facts(label: str, header: Header, base: Checkpoint | None) -> BaseFacts | None:
    if base is None:
        return header.facts
    facts = facts_of(base)
    if facts.family.architecture != header.architecture:
        raise MatchError(
            f"{label}: the adapter is for {header.architecture!r}, the base is a {facts.model_type!r} model, in GGUF "
            f"{facts.family.architecture!r}"
        )
    noted = header.facts
    if noted is not None and (noted.heads, noted.kv_heads) != (facts.heads, facts.kv_heads):
        raise MatchError(
            f"{label}: it was made for a base of {noted.heads} heads, {noted.kv_heads} of them for k and v, which "
            f"order the rows of q and k; the base given has {facts.heads} and {facts.kv_heads}. Is it the right base "
            "model?"
        )
    return facts


def _targets(
    tensors: Sequence[str] | Mapping[str, Any], header: Header, facts: BaseFacts | None, base: Checkpoint | None
) -> dict[str, Target]:
    """What each tensor changes. Names stay GGUF's own where nothing says how to turn them and their rows back."""
    family = facts.family if facts else BY_ARCHITECTURE.get(header.architecture)
    turned = any(kind_of(tensor) in PERMUTED_TENSORS for tensor in tensors)
    if family is None or (family.permuted and turned and facts is None):
        return {tensor: Target(parameter=tensor, opaque=True) for tensor in tensors}
    found = parameter_names(tensors, family, base.shapes if base is not None else ())
    noted = header.names if base is None or not base.shapes else {}
    return {tensor: Target(parameter=noted.get(tensor, name)) for tensor, name in found.items()}


def _module(
    tensor: str, target: Target, lora_a: Tensor, lora_b: Tensor, alpha: float, facts: BaseFacts | None
) -> LoraModule:
    embedding = tensor == EMBEDDING
    heads = None if target.opaque else heads_of(tensor, facts)
    if heads is not None and lora_b.ndim == 2:
        lora_b = in_halves(str(target), lora_b, heads)
    return LoraModule(
        target=target,
        lora_A=lora_a.T if embedding and lora_a.ndim == 2 else lora_a,
        lora_B=lora_b,
        alpha=alpha or 1.0,
        scale_rule=ScaleRule.ALPHA_OVER_RANK if alpha else ScaleRule.DIRECT,
        kind=Kind.EMBEDDING if embedding else Kind.LINEAR,
        transposed=embedding,
    )


def _carried(header: Header, facts: BaseFacts | None) -> dict[str, Any]:
    """What writing GGUF again needs, and what it leaves out."""
    said: dict[str, Any] = {
        "architecture": header.architecture,
        "about": dict(header.about),
        "other": dict(header.other),
        "base": facts and facts.to_json(),
    }
    return {key: value for key, value in said.items() if value}


def _opaque_notes(modules: Sequence[LoraModule], header: Header, facts: BaseFacts | None) -> list[str]:
    if not modules or not modules[0].target.opaque:
        return []
    if header.architecture in BY_ARCHITECTURE:
        why = "llama.cpp has its rows of q and k in another order, which the base's heads undo: give --base"
    else:
        why = "how llama.cpp stores such models is not known here"
    return [f"the names are GGUF's own, for {header.architecture!r}: {why}"]


def check(adapter: Adapter) -> None:
    """Raises: UnsupportedFeatureError for adapters of image models, whatever else they hold, and of several"""
    check_models(adapter)


def write(adapter: Adapter, encoder: Encoder, *, container: str, base: Checkpoint | None = None) -> Artifact:
    """Write a GGUF adapter for the base model `base`, of which config.json is enough.

    An adapter that was read from GGUF needs none.

    Raises: OptionError without a base; UnsupportedFeatureError for families, parameters and dtypes that GGUF has no
            place for; MatchError and ShapeError where a module does not fit the base
    """
    if not adapter.modules:
        raise UnsupportedFeatureError("the adapter has no module, and a GGUF adapter is made of pairs of factors")
    check_models(adapter)
    carried = adapter.metadata.get("gguf", {})
    facts = facts_of(base) if base is not None else facts_from_json("the adapter", carried.get("base"))
    architecture = facts.family.architecture if facts else carried.get("architecture")
    tensors = tensor_names(adapter, facts, carried.get("architecture"))
    if facts is not None:
        check_ends(tensors, facts)
        check_fit({tensors[module.target.parameter]: module for module in adapter.modules}, facts, base)
    alpha, folded = _scale(adapter.modules, encoder)
    written: dict[str, Deferred] = {}
    for module in adapter.modules:
        tensor = tensors[module.target.parameter]
        factor = module.scaling if folded else 1.0
        written |= _encoded(tensor, module, factor, encoder, None if module.target.opaque else heads_of(tensor, facts))
    header = Header(
        architecture=str(architecture),
        alpha=alpha,
        invocation_tokens=adapter.invocation_tokens,
        base=adapter.bases.get("", Base()),
        facts=facts,
        names=odd_names(tensors, facts),
        about=carried.get("about", {}),
    )
    component = adapter.modules[0].target.component
    notes = (f"the adapter is for {component!r}; GGUF does not record that",) if component else ()
    return Artifact(tensors=written, stem="adapter", metadata=header.to_metadata(), sidecar=CONFIG, notes=notes)


def _scale(modules: Sequence[LoraModule], encoder: Encoder) -> tuple[float, bool]:
    """The alpha to state, and whether the scaling is folded into lora_b. Alpha 0 would be read as a scaling of 1.

    A float32 that gives every scaling as near as float32 can is no worse than folding, which rounds every element.
    """
    alpha = _as_float32(common_alpha(modules) or modules[0].scaling * modules[0].rank)
    error = max((abs(alpha / module.rank / module.scaling - 1) if module.scaling else 1.0) for module in modules)
    if not alpha or error > _ROUNDING:
        ranks = {module.rank for module in modules}
        return (float(ranks.pop()) if len(ranks) == 1 else 0.0), True
    if any(alpha / module.rank != module.scaling for module in modules):
        loss = Loss(tensor="adapter.lora.alpha", factor=1.0, dtype="f32", exact=False, max_relative_error=error)
        encoder.losses.append(loss)
    return alpha, False


def _as_float32(number: float) -> float:
    """The nearest float32; 0 where that has no full precision, or is infinite."""
    limits = torch.finfo(torch.float32)
    return float(np.float32(number)) if limits.tiny <= abs(number) <= limits.max else 0.0


def _encoded(
    tensor: str, module: LoraModule, factor: float, encoder: Encoder, heads: int | None
) -> dict[str, Deferred]:
    name_a, name_b = f"{tensor}{WEIGHT}{LORA_A}", f"{tensor}{WEIGHT}{LORA_B}"
    lora_a = encoder.keep(name_a, module.lora_A)
    lora_b = encoder.fold(name_b, module.lora_B, factor)
    for name, factor_ in ((name_a, lora_a), (name_b, lora_b)):
        if factor_.dtype not in _DTYPES:
            raise UnsupportedFeatureError(
                f"{name}: llama.cpp takes no adapter in {factor_.dtype}. Give dtype=f32 (--dtype f32), f16 or bf16"
            )
    if tensor == EMBEDDING:
        lora_a = combine([lora_a], lora_a.shape[::-1], lambda parts: parts[0].T)
    if heads is not None:
        lora_b = combine([lora_b], lora_b.shape, lambda parts: interleaved(tensor, parts[0], heads))
    return {name_a: lora_a, name_b: lora_b}
