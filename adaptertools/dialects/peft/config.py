"""adapter_config.json of PEFT: what it says about scale and layout, checked; the rest is carried along.

Read in huggingface/peft 0.21.2 (`tuners/lora/config.py`, `utils/other.py`).
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptertools.adapter import Base
from adaptertools.containers.jsonfile import is_json
from adaptertools.dialects.peft.patterns import Patterns, compile_pattern
from adaptertools.errors import ConfigError, MissingAlphaError, NotLoraError, OptionError, UnsupportedFeatureError
from adaptertools.module import ScaleRule, check_alpha

FILE = "adapter_config.json"

NEWER_DEFAULTS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "kasa_config": None,
    "lora_bias": False,
    "lora_ga_config": None,
    "monteclora_config": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
"""Fields that PEFT 0.11 did not know, and that are written only where they say something."""

DEFAULTS: Mapping[str, Any] = {
    **NEWER_DEFAULTS,
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": None,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}
"""Every field that PEFT 0.21.2 saves, with its value for a plain adapter."""

_FORMER = {"enable_lora", "merge_weights", "runtime_config"}
"""Fields that earlier versions saved."""

CARRIED = (
    "auto_mapping",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "init_lora_weights",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
)
"""Fields that say more than the adapter model holds; they go along in its metadata."""

_TRAINING = (
    "eva_config",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "monteclora_config",
    "velora_config",
)
"""Fields that say how an adapter was set up or trained; the tensors are what became of them."""

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT adds to modules_to_save by itself."""

_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_STARTS = ("eva", "orthogonal", "mica")
_KEEPS_BASE = ("gaussian", *_STARTS, "true", "false")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """The checked values of one configuration; `stated` is False where there was no file."""

    raw: Mapping[str, Any]
    label: str
    stated: bool
    alpha: float | None
    rank_pattern: Patterns
    alpha_pattern: Patterns
    scale_rule: ScaleRule
    base: Base
    notes: list[str] = field(default_factory=list)

    def flag(self, key: str) -> bool:
        """A yes-or-no field.

        Raises: ConfigError if it is neither
        """
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.label}: {key} is {value!r}, expected true or false")
        return bool(value)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names, empty where it is null.

        Raises: ConfigError
        """
        value = self.raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{self.label}: {key} is {value!r:.80}, expected a list of names")
        return tuple(value)

    def carried(self) -> dict[str, Any]:
        """What is kept for writing the configuration again."""
        kept = {}
        for key in CARRIED:
            value = self.raw.get(key)
            if is_json(value):
                kept[key] = value
            else:
                self.notes.append(f"{self.label}: {key} is {value!r:.40} and is not kept")
        return {key: value for key, value in kept.items() if value is not None}

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """The modules that are stored in full, those that PEFT adds for the task included."""
        return tuple(dict.fromkeys((*self.names("modules_to_save"), *_HEADS.get(str(self.raw.get("task_type")), ()))))

    @property
    def invocation_tokens(self) -> tuple[int, ...] | None:
        """aLoRA: the tokens after which the adapter acts."""
        value = self.raw.get("alora_invocation_tokens")
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
            raise ConfigError(f"{self.label}: alora_invocation_tokens is {value!r:.80}, expected a list of token ids")
        return tuple(value)

    def targets(self, path: str) -> bool:
        """Whether target_modules names the module; PEFT's rule for lists and for regular expressions."""
        wanted = self.raw.get("target_modules")
        if isinstance(wanted, str):
            return compile_pattern(wanted, self.label, "target_modules").fullmatch(path) is not None
        return any(path == name or path.endswith(f".{name}") for name in self.names("target_modules"))

    def rank_of(self, path: str) -> int | None:
        """The rank that the configuration claims for a module; the tensors have the last word.

        Raises: ConfigError
        """
        rank = self.rank_pattern.value(path, self.raw.get("r"))
        if rank is not None and (type(rank) is not int or rank < 1):
            raise ConfigError(f"{self.label}: the rank of {path} is {rank!r}, expected a whole number from 1 on")
        return rank

    def alpha_of(self, path: str) -> float:
        """The alpha of a module.

        Raises: MissingAlphaError, ConfigError
        """
        alpha = self.alpha_pattern.value(path, self.alpha)
        if alpha is None:
            missing = f"{self.label}: no lora_alpha" if self.stated else f"{self.label} is not there"
            raise MissingAlphaError(
                f"{missing}, and the tensors cannot tell alpha. Give it: alpha=… in Python, --source-alpha on the "
                "command line; customary are 16 for rank 8, else the rank or twice the rank"
            )
        return _number(alpha, f"{self.label}: alpha_pattern for {path}")


def parse(document: Mapping[str, Any] | None, label: str, alpha: float | None) -> PeftConfig:
    """Check a configuration. `alpha` stands in where it has none; without a file, alpha/r is assumed.

    Raises: ConfigError, NotLoraError, UnsupportedFeatureError, OptionError
    """
    raw = dict(document or {})
    notes = [] if document is not None else [f"{label}: not there; the scaling is taken as alpha / r"]
    if document is not None:
        _check_type(raw, label)
        _check_variants(raw, label)
        unknown = sorted(raw.keys() - DEFAULTS.keys() - _FORMER)
        if unknown:
            notes.append(f"{label}: unknown keys {', '.join(unknown)}; they are not used")
        if training := [key for key in _TRAINING if raw.get(key) not in (None, [], {})] + _started_apart(raw):
            notes.append(f"{label}: {', '.join(training)} counted for training alone and are not kept")
    config = PeftConfig(
        raw=raw,
        label=label,
        stated=document is not None,
        alpha=_settle_alpha(raw, label, alpha, notes),
        rank_pattern=Patterns.parse(raw, label, "rank_pattern"),
        alpha_pattern=Patterns.parse(raw, label, "alpha_pattern"),
        scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK if raw.get("use_rslora") else ScaleRule.ALPHA_OVER_RANK,
        base=_base(raw, label, notes),
        notes=notes,
    )
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "ensure_weight_tying"):
        config.flag(key)
    return config


def _check_type(raw: Mapping[str, Any], label: str) -> None:
    kind = raw.get("peft_type")
    if kind is None:
        raise ConfigError(
            f"{label}: no peft_type, so it was not written by PEFT. MLX and AdapterHub use the same file name; say "
            "which format it is with --from. tinker_cookbook.weights.build_lora_adapter makes PEFT's of Tinker's"
        )
    if kind != "LORA":
        raise NotLoraError(f"{label}: the adapter is of type {kind!r:.40}, which is another method than LoRA")


def _check_variants(raw: Mapping[str, Any], label: str) -> None:
    for key, name in (("kasa_config", "KaSA truncates the base weights"), ("arrow_config", "Arrow routes by input")):
        if raw.get(key):
            raise UnsupportedFeatureError(f"{label}: {key} is set. {name}, so the adapter has no delta weight")
    for key in raw.keys() - DEFAULTS.keys() - _FORMER:
        if key.startswith("use_") and raw[key]:
            raise UnsupportedFeatureError(
                f"{label}: {key} is {raw[key]!r:.40}, a variant of LoRA that is not known here; "
                "its tensors cannot be trusted to mean B·A"
            )


def _started_apart(raw: Mapping[str, Any]) -> list[str]:
    """init_lora_weights where all that it says is how the factors were drawn that training began with."""
    return ["init_lora_weights"] if str(raw.get("init_lora_weights")).lower() in _STARTS else []


def _settle_alpha(raw: Mapping[str, Any], label: str, given: float | None, notes: list[str]) -> float | None:
    """lora_alpha of the file; `given` only where the file has none that can be used."""
    stated = raw.get("lora_alpha")
    if given is None:
        if stated is None:
            return None
        alpha = _number(stated, f"{label}: lora_alpha")
        if alpha == 0:
            notes.append(f"{label}: lora_alpha is 0, so the adapter changes nothing; some trainers write 0 for unknown")
        return alpha
    given = check_alpha(given)
    if _is_number(stated) and stated not in (0, given):
        raise OptionError(
            f"{label} states lora_alpha {stated}; {given:g} was given. A value may be given where there is none; "
            "to change the alpha of an adapter, rescale it"
        )
    if stated is not None and stated != given:
        notes.append(f"{label}: lora_alpha is {stated!r:.40}; {given:g} was given and is used")
    return given


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _number(value: Any, where: str) -> float:
    if not _is_number(value):
        raise ConfigError(
            f"{where} is {value!r:.40}, expected a finite number; alpha=… in Python and --source-alpha on the command "
            "line stand in for lora_alpha"
        )
    return float(value)


def _base(raw: Mapping[str, Any], label: str, notes: list[str]) -> Base:
    """The base model, and what initialisation and layer replication did to it."""
    change = None
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE):
        change = str(raw["init_lora_weights"])
    elif init not in (*_KEEPS_BASE, "none"):
        change = init
        notes.append(f"{label}: init_lora_weights is {init!r}, not known; it is taken to have changed the base weights")
    name, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    return Base(
        id=str(name) if name else None,
        revision=str(revision) if revision else None,
        change=change,
        layer_replication=_layer_replication(raw.get("layer_replication"), label),
    )


def _layer_replication(ranges: Any, label: str) -> tuple[tuple[int, int], ...]:
    """Raises: ConfigError"""

    def sound(pair: Any) -> bool:
        pair = pair if isinstance(pair, list | tuple) else ()
        return len(pair) == 2 and all(type(layer) is int for layer in pair) and 0 <= pair[0] < pair[1]

    if not ranges:
        return ()
    if not isinstance(ranges, list | tuple) or not all(map(sound, ranges)):
        raise ConfigError(
            f"{label}: layer_replication is {ranges!r:.80}, expected pairs of a first layer and the one after the last"
        )
    return tuple((first, end) for first, end in ranges)
