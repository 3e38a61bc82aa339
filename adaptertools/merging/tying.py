"""Output heads that are the input embedding: told by names and configuration, since headers do not say it.

A model that ties them has one tensor for both. A change trained on one of them alone is no change of that tensor, so it
needs a head of its own, which is written where the caller allows it.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import UnsupportedFeatureError
from adaptertools.merging.match import Names

_EMBEDDINGS = (
    "shared",
    "embed_tokens",
    "wte",
    "embeddings.word_embeddings",
    "word_embeddings",
    "embed_in",
    "tokens_embed",
    "tok_embeddings",
    "embeddings",
)
"""Input embeddings, as `Names.canonical` gives their names."""

_HEADS = ("lm_head", "cls.predictions.decoder", "lm_head.decoder", "proj_out", "vocab_projector")
_HEAD_OF_TYPE = {
    "gpt_neox": "embed_out",
    "bert": "cls.predictions.decoder",
    "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder",
    "distilbert": "vocab_projector",
    "whisper": "proj_out",
}
_SCALED = ("longt5", "mt5", "switch_transformers", "t5", "udop", "umt5")
"""Models that compute another output once their head is their own."""

_WITH_HEAD = re.compile(r"ForCausalLM|LMHead|ForMaskedLM|ForConditionalGeneration|ForPreTraining|ForImageTextToText")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """The input embedding and the output head of a base model. `stored` says that the head has a tensor of its own."""

    embedding: str
    head: str
    stored: bool
    tied: bool


def is_head(names: Names, parameter: str) -> bool:
    """Whether a name is that of a language model's output head."""
    return names.canonical(parameter) in _HEADS


def is_embedding(names: Names, parameter: str) -> bool:
    """Whether a name is that of an input embedding."""
    return names.canonical(parameter) in _EMBEDDINGS


def find_tie(base: Checkpoint, names: Names, wanted: Collection[str]) -> Tie | None:
    """The embedding and the head; None where there is no such pair. `wanted` are the adapters' names for heads."""
    embeddings = [name for known in _EMBEDDINGS for name in names.like(known) if len(base.shapes[name]) == 2]
    if not embeddings:
        return None
    embedding = embeddings[0]
    heads = [name for known in _HEADS for name in names.like(known) if len(base.shapes[name]) == 2]
    stated = tie_stated(base.config)
    if heads:
        same = base.shapes[heads[0]] == base.shapes[embedding]
        shared = heads[0] in base.shared or embedding in base.shared
        return Tie(embedding=embedding, head=heads[0], stored=True, tied=same and (stated is True or shared))
    architectures = base.config.get("architectures")
    known = " ".join(map(str, architectures)) if isinstance(architectures, list) else ""
    if stated is False or not (wanted or _WITH_HEAD.search(known)):
        return None
    asked = sorted(name.removesuffix(".weight") for name in wanted)
    head = asked[0] if asked else _HEAD_OF_TYPE.get(str(base.config.get("model_type")), "lm_head")
    return Tie(embedding=embedding, head=f"{head}.weight", stored=False, tied=True)


def tie_stated(config: Mapping[str, Any]) -> bool | None:
    """What a configuration says about tied embeddings, if it does."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def refuse_tied(base: Checkpoint, tie: Tie, changed: str, source: str) -> UnsupportedFeatureError:
    """The error of a change of one of two tied weights."""
    way_out = (
        f"`merge --untie` (plan_merge with untie=True) writes {tie.head} as a tensor of its own and sets "
        "tie_word_embeddings to false"
    )
    if base.opened is None:
        way_out = f"Give the model a {tie.head} of its own first, or merge its files by plan_merge with untie=True"
    return UnsupportedFeatureError(
        f"{source} changes {changed}, and {base.label} ties its output head to {tie.embedding}: the change was trained "
        f"on one of the two and would change both. {way_out}"
    )


def check_untying(base: Checkpoint) -> None:
    """Raises: UnsupportedFeatureError for models that compute another output once they are untied"""
    kind = base.config.get("model_type")
    if kind in _SCALED:
        raise UnsupportedFeatureError(
            f"{base.label}: a model of type {kind} scales its output where the head is tied, and not where it is not: "
            "it cannot be untied"
        )
