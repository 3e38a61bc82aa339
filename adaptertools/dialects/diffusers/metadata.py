"""What says the scaling of a diffusers file: lora_adapter_metadata in its header, else alphas beside the factors.

lora_adapter_metadata is JSON, the fields of PEFT's LoraConfig under `<component>.<field>`, or bare in a file of one
model without prefixes. Where it is there, diffusers builds `LoraConfig(**fields)` from it and looks at nothing else: a
component of which it says nothing gets PEFT's defaults, rank 8 and alpha 8.

Read in huggingface/diffusers 58eb52c: `loaders/peft.py`, `utils/peft_utils.py` (`_create_lora_config`).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adaptertools.containers.jsonfile import parse_object
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.dialects.diffusers.keys import Contents
from adaptertools.dialects.peft import config as peft_config
from adaptertools.dialects.peft.config import PeftConfig
from adaptertools.dialects.peft.factors import Layer, settle_alpha
from adaptertools.dialects.peft.keys import MAGNITUDE, Group
from adaptertools.dialects.peft.patterns import anchored
from adaptertools.encoding import Encoder
from adaptertools.errors import ConfigError, ShapeError, count
from adaptertools.module import ScaleRule
from adaptertools.tensors import natural_order

KEY = "lora_adapter_metadata"

_FURTHER = ("auto_mapping", "init_lora_weights", "lora_dropout", "megatron_config", "megatron_core", "task_type")

_DEFAULT_RANK = 8
"""r and lora_alpha of a LoraConfig that is told neither."""


def stated(file: TensorFile) -> dict[str, Any] | None:
    """The metadata of a file, None where it has none. diffusers takes an empty entry for none.

    Raises: DamagedFileError
    """
    text = file.metadata.get(KEY)
    return parse_object(f"{file.label}: header entry {KEY!r}", text) if text else None


def component_config(
    metadata: Mapping[str, Any] | None, component: str, contents: Contents, label: str, *, prefixed: bool
) -> PeftConfig:
    """The configuration of one component, as diffusers makes it of metadata or of alphas and ranks.

    Raises: ConfigError where both metadata and alphas stand, as diffusers does, and where ranks disagree
    """
    if metadata is None:
        return _inferred(contents, label)
    if contents.alphas:
        raise ConfigError(
            f"{label}: the header has {KEY} and {next(iter(contents.alphas))} has an alpha; diffusers refuses such a "
            "file, since they may disagree. Remove one of them"
        )
    dot = f"{component}."
    fields = {k.removeprefix(dot): v for k, v in metadata.items() if k.startswith(dot)} if prefixed else dict(metadata)
    name = f"{label}: {KEY} of {component}" if prefixed else f"{label}: {KEY}"
    defaults = {"peft_type": "LORA", "r": _DEFAULT_RANK, "lora_alpha": _DEFAULT_RANK}
    config = peft_config.parse({**defaults, **fields}, name, None)
    for path, group in contents.groups.items():
        claimed, rank = config.rank_of(path), _rank(group)
        if rank is not None and claimed != rank:
            raise ConfigError(
                f"{name}: gives {path} rank {claimed}, but its factors have rank {rank}. diffusers builds the layer by "
                "the metadata and cannot load them. Save the adapter again, or remove the metadata"
            )
    return config


def further_fields(config: PeftConfig) -> dict[str, Any]:
    """What the metadata of a component says beyond the adapter model, where that is not what PEFT says by itself."""
    said = {key: value for key, value in config.carried().items() if key in _FURTHER}
    if said.get("init_lora_weights") not in (False, "gaussian"):  # others count for training alone, or change the base
        said.pop("init_lora_weights", None)
    return {key: value for key, value in said.items() if value != peft_config.DEFAULTS[key]}


def _rank(group: Group) -> int | None:
    lora_A = group.tensors.get("lora_A")
    return lora_A.shape[0] if lora_A is not None and lora_A.ndim > 1 else None


def _inferred(contents: Contents, label: str) -> PeftConfig:
    """Alphas by module; one without has its rank, and so the scaling 1."""
    alphas = {path: number(f"{label}: the alpha of {path}", alpha) for path, alpha in contents.alphas.items()}
    ranks = {path: _rank(group) for path, group in contents.groups.items()}
    pattern = {anchored(path): alphas.get(path, float(rank or 1)) for path, rank in ranks.items()}
    held = {name for group in contents.groups.values() for name in group.tensors}
    config = peft_config.parse(
        {
            "peft_type": "LORA",
            "lora_alpha": 1,
            "alpha_pattern": pattern,
            "use_dora": MAGNITUDE in held,
            "lora_bias": "lora_bias" in held,
        },
        label,
        None,
    )
    without = sorted(ranks.keys() - alphas.keys(), key=natural_order)
    if alphas and without:
        config.notes.append(
            f"{label}: {count(len(without), 'module', ('has', 'have'))} no alpha, such as {without[0]}: the scaling is "
            "1; diffusers takes the alpha that most others have"
        )
    return config


def number(where: str, tensor: Tensor) -> float:
    """The value of an alpha.

    Raises: ShapeError if it is no single number; ConfigError if its value is not on this machine
    """
    if tensor.numel() != 1:
        raise ShapeError(f"{where} has shape {tuple(tensor.shape)}, expected a single number")
    if tensor.device.type == "meta":
        raise ConfigError(
            f"{where} is not on this machine, only the header is. Download the file and read it from disk"
        )
    return float(tensor)


def component_fields(
    component: str, layers: Sequence[Layer], alphas: Mapping[str, float], rule: ScaleRule
) -> dict[str, Any]:
    """The fields of LoraConfig that give these layers their ranks and alphas: those of most, and patterns for the rest.

    Only fields that every version of PEFT knows which diffusers takes metadata with.
    """
    ranks = {layer.parameter: layer.rank for layer in layers}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dora, bias = (any(name in layer.extra for layer in layers) for name in ("magnitude", "lora_bias"))
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {_pattern(component, path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(component, path): _plain(value) for path, value in alphas.items() if value != alpha},
        "target_modules": sorted((_inner(component, path) for path in ranks), key=natural_order),
        "use_dora": dora,
        "use_rslora": rule is ScaleRule.ALPHA_OVER_SQRT_RANK,
        **({"lora_bias": True} if bias else {}),
    }


def _inner(component: str, path: str) -> str:
    """A module's path; in text encoders without `text_model`, which transformers 5 takes off the model and the keys."""
    return path.removeprefix("text_model.") if component.startswith("text_encoder") else path


def _pattern(component: str, path: str) -> str:
    """The expression that matches this module, with and without what `_inner` takes off."""
    inner = _inner(component, path)
    return anchored(path) if inner == path else re.escape(inner)


def layer_alphas(layers: Sequence[Layer], rule: ScaleRule, encoder: Encoder) -> dict[str, float]:
    """The alpha that gives each layer its scaling under the rule."""
    return {
        layer.parameter: settle_alpha(layer.parameter, layer.scaling, layer.rank, rule, encoder)
        if layer.alpha is None
        else layer.alpha
        for layer in layers
    }


def _plain(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() and abs(alpha) < 2**53 else alpha
