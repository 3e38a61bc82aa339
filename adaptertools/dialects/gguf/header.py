"""The keys of a GGUF adapter's header, read into what they mean and made from it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptertools.adapter import Base
from adaptertools.containers.history import HEADER_KEY
from adaptertools.containers.jsonfile import parse_object
from adaptertools.dialects.gguf.base import BaseFacts, facts_from_json
from adaptertools.errors import ConfigError, NotLoraError

_ALPHA = "adapter.lora.alpha"
_TOKENS = "adapter.alora.invocation_tokens"
_KEPT = re.compile(
    r"general\.(name|author|version|organization|finetune|basename|description|size_label|license|license\.name"
    r"|license\.link|url|doi|uuid|repo_url|quantized_by)|adapter\.lora\.(task_name|prompt_prefix)"
)
"""Text about the adapter that means nothing to us and is written again."""
_UNDERSTOOD = re.compile(
    r"general\.(architecture|type|alignment|file_type|base_model\.0\.(name|organization|repo_url))|adapter\.type"
    rf"|{re.escape(_ALPHA)}|{re.escape(_TOKENS)}|{HEADER_KEY}"
)
_HUB = "https://huggingface.co/"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a GGUF adapter says beside its tensors.

    `alpha` 0 means that nothing is scaled. `facts` are what we note of the base, `names` those parameters that it calls
    otherwise than its family does; both are absent from other programs' files.
    """

    architecture: str
    alpha: float
    invocation_tokens: tuple[int, ...] | None = None
    base: Base = field(default_factory=Base)
    facts: BaseFacts | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, str] = field(default_factory=dict)
    """What is not written again."""
    notes: tuple[str, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """The header's keys, as the container takes them."""
        said = {
            "general.architecture": self.architecture,
            "general.type": "adapter",
            "adapter.type": "lora",
            _ALPHA: json.dumps(self.alpha),
            **self.about,
            **_base_keys(self.base),
        }
        if self.invocation_tokens is not None:
            said[_TOKENS] = json.dumps(list(self.invocation_tokens))
        record = {
            "base": self.facts.to_json() if self.facts else None,
            "names": dict(self.names),
            "revision": self.base.revision,
        }
        record = {key: value for key, value in record.items() if value}
        return said | ({HEADER_KEY: json.dumps(record, sort_keys=True)} if record else {})


def parse(label: str, metadata: Mapping[str, str]) -> Header:
    """The header of an adapter.

    Raises: NotLoraError for models and other kinds of adapter; ConfigError for what llama.cpp would not take either
    """
    kind = metadata.get("general.type")
    if kind != "adapter":
        raise NotLoraError(
            f"{label}: general.type is {kind!r}, expected 'adapter': this is {_other(kind, metadata)}, no LoRA adapter"
        )
    if metadata.get("adapter.type") != "lora":
        raise NotLoraError(f"{label}: adapter.type is {metadata.get('adapter.type')!r:.40}, expected 'lora'")
    architecture = metadata.get("general.architecture")
    if not architecture:
        raise ConfigError(f"{label}: general.architecture is missing, which says what model the adapter is for")
    record = parse_object(f"{label}: {HEADER_KEY}", metadata.get(HEADER_KEY, "{}"))
    facts = facts_from_json(label, record.get("base"))
    if facts is not None and facts.family.architecture != architecture:
        raise ConfigError(f"{label}: its base is noted as {facts.model_type!r}, its architecture is {architecture!r}")
    names = record.get("names", {})
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"{label}: what it says of the names of its parameters is malformed")
    missing = () if _ALPHA in metadata else (f"{_ALPHA} is missing: nothing is scaled then, as llama.cpp has it",)
    revision = record.get("revision")
    return Header(
        architecture=architecture,
        alpha=_alpha(label, metadata.get(_ALPHA, "0")),
        invocation_tokens=_tokens(label, metadata),
        base=Base(id=_base_id(metadata), revision=revision if isinstance(revision, str) else None),
        facts=facts,
        names=names,
        about={key: text for key, text in metadata.items() if _KEPT.fullmatch(key)},
        other={key: text for key, text in metadata.items() if not (_KEPT.fullmatch(key) or _understood(key, text))},
        notes=missing,
    )


def _understood(key: str, text: str) -> bool:
    return bool(_UNDERSTOOD.fullmatch(key)) or (key == "general.base_model.count" and text in ("0", "1"))


def _other(kind: str | None, metadata: Mapping[str, str]) -> str:
    if kind in (None, "model"):
        return f"a {metadata.get('general.architecture', 'base')} model"
    return f"a file of another kind ({kind})"


def _alpha(label: str, text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise ConfigError(f"{label}: {_ALPHA} is {text:.40}, expected a finite number")
    return alpha


def _tokens(label: str, metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    if _TOKENS not in metadata:
        return None
    try:
        tokens: Any = json.loads(metadata[_TOKENS])
    except ValueError:
        tokens = None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ConfigError(f"{label}: {_TOKENS} is no list of token ids")
    return tuple(tokens)


def _base_keys(base: Base) -> dict[str, str]:
    if base.id is None:
        return {}
    keys = {"general.base_model.count": "1", "general.base_model.0.name": base.id}
    if _REPOSITORY.fullmatch(base.id):
        organization, name = base.id.split("/")
        keys["general.base_model.0.name"] = name
        keys["general.base_model.0.organization"] = organization
        keys["general.base_model.0.repo_url"] = f"{_HUB}{base.id}"
    return keys


def _base_id(metadata: Mapping[str, str]) -> str | None:
    url = metadata.get("general.base_model.0.repo_url", "")
    if url.startswith(_HUB):
        return url.removeprefix(_HUB).rstrip("/")
    return metadata.get("general.base_model.0.name")
