"""What the base model must say: its family, layers and heads. From its config.json, or as we noted it in the file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adaptertools.dialects.gguf.families import CONVERTER, FAMILIES, Family
from adaptertools.dialects.peft.base import Checkpoint
from adaptertools.errors import ConfigError, UnsupportedFeatureError

_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How classes of transformers end that llama.cpp turns into what their model_type says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """What decides names and the order of rows; `tied` says that the embedding is the head too.

    The heads are None where they decide nothing, and some configurations leave them out.
    """

    model_type: str
    layers: int
    tied: bool
    heads: int | None = None
    kv_heads: int | None = None

    @property
    def family(self) -> Family:
        """How llama.cpp treats models of this type."""
        return FAMILIES[self.model_type]

    def to_json(self) -> dict[str, Any]:
        """As they are noted in a file."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def facts_of(checkpoint: Checkpoint) -> BaseFacts:
    """The facts in a base's config.json.

    Raises: ConfigError if it lacks one; UnsupportedFeatureError for a family that is not in the list
    """
    config = checkpoint.config
    if not config:
        raise ConfigError("the base model has no config.json, which says its model_type, layers and heads")
    model_type = str(config.get("model_type"))
    _check_family(model_type, config)
    text = config.get("text_config")
    said = {**config, **text} if isinstance(text, Mapping) else config
    heads = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    if said.get("num_key_value_heads") is None:
        heads["kv_heads"] = heads["heads"]
    return BaseFacts(
        model_type=model_type,
        layers=_number(said, "num_hidden_layers"),
        tied=_is_tied(FAMILIES[model_type], checkpoint, said),
        **({key: _number(said, name) for key, name in heads.items()} if FAMILIES[model_type].permuted else {}),
    )


def facts_from_json(label: str, said: object) -> BaseFacts | None:
    """The facts as `to_json` gives them; None where they were not noted.

    Raises: ConfigError if they are malformed
    """
    if said is None:
        return None
    known = isinstance(said, Mapping) and said.get("model_type") in FAMILIES and isinstance(said.get("tied"), bool)
    if not isinstance(said, Mapping) or not known:
        raise ConfigError(f"{label}: what it says of its base model is malformed: {said!r:.120}. Give --base")
    wanted = ("layers", "heads", "kv_heads") if FAMILIES[said["model_type"]].permuted else ("layers",)
    numbers = {key: _number(said, key, label) for key in wanted}
    return BaseFacts(model_type=said["model_type"], tied=said["tied"], **numbers)


def _is_tied(family: Family, checkpoint: Checkpoint, said: Mapping[str, Any]) -> bool:
    tied = checkpoint.config.get("tie_word_embeddings", said.get("tie_word_embeddings"))
    if not family.head or isinstance(tied, bool):
        return tied is True or not family.head
    if not checkpoint.shapes:
        return family.tied
    return not any(name.endswith("lm_head.weight") for name in checkpoint.shapes)


def _check_family(model_type: str, config: Mapping[str, Any]) -> None:
    if model_type not in FAMILIES:
        raise UnsupportedFeatureError(
            f"the base is a {model_type!r} model, whose tensors llama.cpp may store in another order; known are "
            f"{', '.join(FAMILIES)}. For others there is {CONVERTER}: write PEFT, and give it that"
        )
    classes = config.get("architectures")
    named = str(classes[0]) if isinstance(classes, list) and classes else _GENERATORS[0]
    if not named.endswith(_GENERATORS):
        raise UnsupportedFeatureError(
            f"the base is a {named}, which llama.cpp does not store as a {model_type} model; expected a "
            f"{' or '.join(_GENERATORS)}. There is {CONVERTER}: write PEFT, and give it that"
        )


def _number(said: Mapping[str, Any], key: str, label: str = "the base's config.json") -> int:
    value = said.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{label}: {key} is {value!r:.40}, expected a positive whole number")
    return value
