"""What LitGPT's two YAML files say: alpha and the adapted slots, and the sizes of the model.

hyperparameters.yaml   the arguments of the training run: lora_r, lora_alpha, lora_query, lora_key, lora_value …
model_config.yaml      the model: name, n_embd, n_head, n_query_groups, head_size, mlp_class_name …
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptertools.containers.jsonfile import is_json
from adaptertools.errors import ConfigError, OptionError, UnsupportedFeatureError

HYPERPARAMETERS = "hyperparameters.yaml"
MODEL = "model_config.yaml"

_STRUCTURE = frozenset(
    {f"lora_{name}" for name in ("alpha", "head", "key", "mlp", "projection", "query", "r", "value")}
)
"""What the adapter model holds. Tensors in memory have the model's configuration in the same document."""

SLOTS = ("query", "key", "value")

_MOST_ROWS = 1 << 24
"""More than the projections of any attention have; nothing is laid out beyond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The sizes of a model's attention, and what tells its family."""

    name: str
    org: str | None
    hf_name: str | None
    mlp: str
    heads: int
    groups: int
    head_size: int

    @property
    def slots(self) -> tuple[int, int, int]:
        """The rows of q, k and v."""
        return self.heads * self.head_size, self.groups * self.head_size, self.groups * self.head_size

    @property
    def id(self) -> str | None:
        """The model's name on the Hub."""
        return f"{self.org}/{self.hf_name}" if self.org and self.hf_name else None

    @classmethod
    def parse(cls, document: Mapping[str, Any], label: str) -> "Model":
        """Raises: ConfigError; UnsupportedFeatureError for attention that is not one fused projection"""
        if document.get("latent_attention"):
            raise UnsupportedFeatureError(f"{label}: latent_attention is set; its projections are not fused q, k and v")
        heads = _size(document, "n_head", label)
        stated = document.get("hf_config")
        hf_config = stated if isinstance(stated, Mapping) else {}
        if document.get("head_size") is None:
            width = _size(document, "n_embd", label)
            if width % heads:
                raise ConfigError(
                    f"{label}: n_embd {width} is no multiple of n_head {heads}, and head_size is not there"
                )
            head_size = width // heads
        else:
            head_size = _size(document, "head_size", label)
        groups = heads if document.get("n_query_groups") is None else _size(document, "n_query_groups", label)
        if heads % groups:
            raise ConfigError(f"{label}: n_head {heads} is no multiple of n_query_groups {groups}")
        if (heads + 2 * groups) * head_size > _MOST_ROWS:
            raise ConfigError(f"{label}: {heads} heads of size {head_size} are more than any model has")
        return cls(
            name=str(document.get("name") or hf_config.get("name") or ""),
            org=_text(hf_config.get("org")),
            hf_name=_text(hf_config.get("name")),
            mlp=str(document.get("mlp_class_name") or "GptNeoxMLP"),
            heads=heads,
            groups=groups,
            head_size=head_size,
        )


def settings(run: Mapping[str, Any], label: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments of the run that say nothing of the factors, and a note on those that JSON cannot say."""
    said = {str(key): value for key, value in run.items() if key not in _STRUCTURE and value is not None}
    kept = {key: value for key, value in said.items() if is_json(value)}
    lost = sorted(said.keys() - kept.keys())
    return kept, (f"{label}: {', '.join(lost)} cannot be kept",) if lost else ()


def stated_alpha(document: Mapping[str, Any], label: str, given: float | None) -> float | None:
    """lora_alpha of the run, `given` where it is not known.

    Raises: ConfigError; OptionError if both are there and differ
    """
    alpha = document.get("lora_alpha")
    if alpha is None:
        return given
    if type(alpha) not in (int, float) or abs(alpha) > sys.float_info.max:
        raise ConfigError(f"{label}: lora_alpha is {alpha!r:.40}, expected a finite number")
    if given is not None and given != alpha:
        raise OptionError(
            f"{label} states lora_alpha {alpha}; {given:g} was given. A value may be given where there is none; to "
            "change the alpha of an adapter, rescale it"
        )
    return float(alpha)


def stated_slots(document: Mapping[str, Any], label: str, given: str | None) -> tuple[bool, bool, bool] | None:
    """Whether q, k and v are adapted: as `given` in letters, else as the run says; None where neither does.

    Raises: ConfigError, OptionError
    """
    if given is not None:
        if len(given) != len(SLOTS) or not set(given) <= set("TF") or "T" not in given:
            raise OptionError(f"slots is {given!r:.40}, expected a T or an F for each of q, k and v, such as TFT")
        return given[0] == "T", given[1] == "T", given[2] == "T"
    flags = [document.get(f"lora_{slot}") for slot in SLOTS]
    if all(flag is None for flag in flags):
        return None
    for slot, flag in zip(SLOTS, flags, strict=True):
        if not isinstance(flag, bool):
            raise ConfigError(f"{label}: lora_{slot} is {flag!r:.40}, expected true or false")
    return bool(flags[0]), bool(flags[1]), bool(flags[2])


def _size(document: Mapping[str, Any], key: str, label: str) -> int:
    value = document.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{label}: {key} is {value!r:.40}, expected a whole number from 1 on")
    return value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
