"""LitGPT (Lightning-AI): the adapter that `litgpt finetune_lora` saves. Read, not written.

    lit_model.pth.lora         torch file, the factors under "model" or at the top
    hyperparameters.yaml       lora_r, lora_alpha, lora_query, lora_key, lora_value, … of the run
    model_config.yaml          name, n_embd, n_head, n_query_groups, head_size, mlp_class_name, … of the model

    transformer.h.N.attn.qkv.lora_A    (n·r, in)       n of q, k and v are adapted, each with its own r rows
    transformer.h.N.attn.qkv.lora_B    (rows, r)       the rows of those, all of q, then of k, then of v
    transformer.h.N.attn.proj.lora_A|B (r, in), (out, r)
    transformer.h.N.mlp.fc_1|fc_2|proj.lora_A|B        LLaMAMLP and GemmaMLP; fc and proj of GptNeoxMLP
    transformer.h.N.mlp.gate.lora_A|B                  LLaMAMoE, with mlp.experts.E.fc_1|fc_2|proj
    lm_head.lora_A|B

Scaling is lora_alpha / lora_r. q has n_head · head_size rows, k and v n_query_groups · head_size. Names become those of
Hugging Face's model, as LitGPT's own conversion gives them: q_proj, k_proj and v_proj of Llama and its like; rows of
qkv_proj and gate_up_proj of Phi 3 and 4; the interleaved query_key_value of GPT-NeoX and Falcon, where the slots become
one module of rank n·r.

Up to 0.5.4 the projection was `attn.attn` and its rows were interleaved; those files are refused by name.

Source: Lightning-AI/litgpt 0.5.13: litgpt/lora.py, litgpt/scripts/merge_lora.py and convert_lit_checkpoint.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adaptertools.adapter import Adapter, Base, Feature, LoraModule, Origin, Target
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.source import Source
from adaptertools.dialects.litgpt.attention import Slots, adapted_slots, split
from adaptertools.dialects.litgpt.keys import FORMER_QKV, LAYER, QKV, adapter_file, adapter_files, sort_keys
from adaptertools.dialects.litgpt.names import Family, family_of, hugging_face_name
from adaptertools.dialects.litgpt.settings import HYPERPARAMETERS, MODEL, Model, settings, stated_alpha, stated_slots
from adaptertools.encoding import Encoder
from adaptertools.errors import ConfigError, MissingAlphaError, OptionError, UnsupportedFeatureError
from adaptertools.module import RowSlice, check_alpha
from adaptertools.tensors import natural_order

SUMMARY = "LitGPT: lit_model.pth.lora with hyperparameters.yaml and model_config.yaml"
CONTAINERS: tuple[str, ...] = ()
FOLDER = True
CONFIG = HYPERPARAMETERS
FILES = ("lit_model.pth.lora", HYPERPARAMETERS, MODEL)
CARRIES = frozenset({Feature.FUSED_ROWS})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """What is known beyond the tensors themselves."""

    label: str
    alpha: float
    slots: Slots | None
    model: Model
    family: Family
    settings: Mapping[str, Any]
    notes: tuple[str, ...]


def detect(source: Source) -> bool:
    """Whether it is a folder with lit_model.pth.lora, or one file with such keys."""
    return bool(adapter_files(source))


def read(source: Source, *, alpha: float | None = None, slots: str | None = None) -> Adapter:
    """Read a folder of LitGPT, or its lit_model.pth.lora with the two YAML files beside it.

    `alpha` and `slots`, a T or an F for each of q, k and v, stand in where hyperparameters.yaml is not there.

    Memory: headers; of interleaved projections lora_B
    Raises: MissingAlphaError; ConfigError without model_config.yaml; UnsupportedFeatureError for models that LitGPT's
            own conversion does not know, and for files of LitGPT up to 0.5.4
    """
    name = adapter_file(source)
    file = source.tensors(name)
    pairs = sort_keys(file)
    reading = _settle(source, file.label, alpha, slots)
    modules = [module for key, factors in pairs.items() for module in _modules(key, *factors, reading)]
    return Adapter(
        modules=tuple(sorted(modules, key=lambda module: natural_order(str(module.target)))),
        bases={"": Base(id=reading.model.id)},
        metadata=reading.settings,
        notes=reading.notes,
        origin=Origin(
            format="litgpt", container=file.container, label=source.label, path=source.path, name=source.name
        ),
    )


def write(adapter: Adapter, encoder: Encoder, *, container: str) -> Artifact:
    """Not written: its names and sizes would be those of LitGPT's own model files.

    Raises: OptionError
    """
    raise OptionError("litgpt can be read, not written")


def _settle(source: Source, label: str, alpha: float | None, slots: str | None) -> _Reading:
    run, model_document = _documents(source)
    given = None if alpha is None else check_alpha(alpha)
    scale = stated_alpha(run, source.label_of(HYPERPARAMETERS), given)
    if scale is None:
        raise MissingAlphaError(
            f"{label}: alpha is in {HYPERPARAMETERS} as lora_alpha, and that is not there. Give it: alpha=A in Python, "
            "--source-alpha A on the command line; LitGPT's own default is 16 at lora_r 8"
        )
    if model_document is None:
        raise ConfigError(
            f"{label}: {MODEL} is not there, which says what q, k and v are and how the model is called. LitGPT saves "
            "it beside the adapter and beside the base model: copy it there"
        )
    model = Model.parse(model_document, source.label_of(MODEL))
    family = family_of(model)
    if family is None:
        raise UnsupportedFeatureError(
            f"{source.label_of(MODEL)}: the model {model.name or 'without a name'} with {model.mlp} is none whose "
            "names in Hugging Face's model LitGPT's conversion knows. Merge it with `litgpt merge_lora`"
        )
    said, notes = settings(run, source.label_of(HYPERPARAMETERS))
    return _Reading(
        label=label,
        alpha=scale,
        slots=stated_slots(run, source.label_of(HYPERPARAMETERS), slots),
        model=model,
        family=family,
        settings={"litgpt": said} if said else {},
        notes=notes,
    )


def _documents(source: Source) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The two documents; tensors in memory have one configuration with the keys of both."""
    run = source.document(HYPERPARAMETERS)
    if source.path is None:
        return run or {}, run if run is not None and "n_head" in run else None
    return run or {}, source.document(MODEL)


def _modules(name: str, lora_A: Tensor, lora_B: Tensor, reading: _Reading) -> list[LoraModule]:
    match = LAYER.fullmatch(name)
    if match and match["module"] == FORMER_QKV:
        raise UnsupportedFeatureError(
            f"{reading.label}: {name} is of LitGPT up to 0.5.4, which interleaved the rows of q, k and v. Merge it "
            "with that version (litgpt merge_lora)"
        )
    if match and match["module"] == QKV:
        slots = adapted_slots(name, lora_A, lora_B, reading.model, reading.slots)
        return split(match["layer"], lora_A, lora_B, slots, reading.alpha, model=reading.model, family=reading.family)
    return [_plain(name, lora_A, lora_B, reading)]


def _plain(name: str, lora_A: Tensor, lora_B: Tensor, reading: _Reading) -> LoraModule:
    target = _half_of_gate_up(name, lora_B, reading.family)
    if target is None:
        parameter = hugging_face_name(name, reading.family)
        if parameter is None:
            raise UnsupportedFeatureError(
                f"{reading.label}: {name} has no name in Hugging Face's model of {reading.model.name}, by LitGPT's own "
                "conversion"
            )
        target = Target(parameter=parameter)
    return LoraModule(target=target, lora_A=lora_A, lora_B=lora_B, alpha=reading.alpha, transposed=False)


def _half_of_gate_up(name: str, lora_B: Tensor, family: Family) -> Target | None:
    """The rows of a fused gate_up_proj that fc_1 or fc_2 is; None for anything else."""
    match = LAYER.fullmatch(name)
    if family.gate_up is None or match is None or match["module"] not in ("mlp.fc_1", "mlp.fc_2") or lora_B.ndim != 2:
        return None
    size = lora_B.shape[0]
    start = 0 if match["module"] == "mlp.fc_1" else size
    rows = RowSlice(start=start, stop=start + size, total=2 * size)
    return Target(parameter=f"{family.layers}.{match['layer']}.{family.gate_up}", rows=rows)
