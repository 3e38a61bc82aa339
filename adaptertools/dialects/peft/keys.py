"""Key grammar of PEFT's tensor files: what belongs to which module, once prefixes and adapter names are taken off.

base_model.model.<module path>.<leaf>[.<adapter name>][.weight | .bias]
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adaptertools import names
from adaptertools.errors import (
    AmbiguousFormatError,
    DuplicateTargetError,
    NotLoraError,
    OptionError,
    UnclaimedTensorError,
    UnsupportedFeatureError,
)

PREFIX = "base_model.model."
DEFAULT_ADAPTER = "default"

FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "trainable_tokens_delta"

_LEAVES = (*FACTORS, MAGNITUDE)
_TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler")
"""Buffers of VeLoRA and MonteCLoRA, which take no part in ΔW."""

_OTHER_METHODS = {
    "lora_E": "AdaLoRA",
    "ranknum": "AdaLoRA",
    "ia3_l": "IA3",
    "hada_w1_a": "LoHa",
    "hada_w2_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "oft_r": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
    "fourierft_spectrum": "FourierFT",
    "prompt_embeddings": "prompt tuning",
}


@dataclass(slots=True)
class Group:
    """The LoRA tensors of one module. `path` still has the `base_layer` parts that tell nested wrappers apart."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def module_path(self) -> str:
        """The module's path in the base model."""
        return without_base_layer(self.path)


@dataclass(slots=True)
class Contents:
    """The tensors of a file in their parts: modules, trained token rows, and whole weights."""

    groups: dict[str, Group] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    """whole weights that were stored as trained copies (`.modules_to_save.`)"""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Key:
    path: str
    leaf: str
    adapter: str


def parse(tensors: Mapping[str, Tensor], label: str, adapter_name: str | None) -> Contents:
    """Sort the tensors of a file into modules, token rows and whole weights.

    Raises: NotLoraError, AmbiguousFormatError, DuplicateTargetError, UnclaimedTensorError, UnsupportedFeatureError
    """
    bare = {key: strip(key) for key in tensors}
    parsed = {key: _parse_leaf(name, label) for key, name in bare.items()}
    adapters = {found.adapter for found in parsed.values() if found and found.leaf not in _TRAINING_ONLY}
    adapter = _choose_adapter(adapters, adapter_name, label)
    contents = Contents(notes=_prefix_notes(bare, label))
    for key, tensor in tensors.items():
        found = parsed[key]
        if found is None:
            _sort_plain(contents, bare[key], tensor, {adapter, DEFAULT_ADAPTER}, adapters - {adapter}, label)
        elif found.leaf in _TRAINING_ONLY:
            _skip(contents, f"{found.leaf} (used in training only)", key)
        elif found.adapter != adapter:
            _skip(contents, f"tensors of adapter {found.adapter!r}", key)
        elif found.leaf == TOKENS:
            _put(contents.tokens, found.path, tensor, key, label)
        else:
            group = contents.groups.setdefault(found.path, Group(found.path))
            _put(group.tensors, found.leaf, tensor, key, label)
    contents.notes = _summarise(contents.notes)
    return contents


def strip(key: str) -> str:
    """The key without what saving loops, wrappers and PEFT put in front of the module path."""
    key = names.strip_state_dict(key)
    while True:
        name = names.strip_prefix(names.strip_wrappers(key), PREFIX)
        outer, inside, inner = name.partition(f".{PREFIX}")
        if inside:  # a model that holds the PEFT model as a part of itself
            name = f"{outer}.{inner}"
        if name == key:
            return name
        key = name


def is_peft_key(key: str) -> bool:
    """Whether only PEFT writes such a key."""
    return _is_prefixed(key) and any(f".{leaf}" in key for leaf in _LEAVES)


def _is_prefixed(key: str) -> bool:
    """Whether PEFT's prefix stands in it, which FSDP and torch.compile may take apart."""
    return PREFIX in key or PREFIX in names.strip_wrappers(key)


def without_base_layer(path: str) -> str:
    """The path without the parts that PEFT's wrappers insert."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _parse_leaf(name: str, label: str) -> _Key | None:
    parts = name.split(".")
    for index in range(len(parts) - 1, -1, -1):
        leaf, rest, path = parts[index], parts[index + 1 :], ".".join(parts[:index])
        if not path and leaf.startswith("lora_"):
            raise UnclaimedTensorError(f"{label}: {name} names no module in front of {leaf}")
        if leaf in _OTHER_METHODS:
            raise NotLoraError(f"{label}: {name} belongs to {_OTHER_METHODS[leaf]}, which is not LoRA")
        if leaf in _TRAINING_ONLY:
            return _Key(path, leaf, "")
        if leaf == "lora_diag":
            raise UnsupportedFeatureError(f"{label}: {name} is the diagonal of KaSA, whose base weights are truncated")
        if leaf == TOKENS:
            return _Key(path.removesuffix(".token_adapter"), TOKENS, rest[0] if rest else "")
        if leaf in _LEAVES:
            adapter = "" if not rest or rest[0] in ("weight", "bias") else rest.pop(0)
            if len(rest) > 1 or (rest == ["bias"] and leaf != "lora_B") or rest not in ([], ["weight"], ["bias"]):
                raise UnclaimedTensorError(f"{label}: {name} is no key that PEFT writes after {leaf}")
            return _Key(path, "lora_bias" if rest == ["bias"] else leaf, adapter)
        if leaf.startswith("lora_"):
            raise UnclaimedTensorError(f"{label}: {name} has the unknown part {leaf}; known are {', '.join(_LEAVES)}")
    return None


def _choose_adapter(found: set[str], wanted: str | None, label: str) -> str:
    if wanted is not None and found and found != {""}:
        if wanted not in found:
            raise OptionError(f"{label}: no adapter {wanted!r}; the file holds {', '.join(sorted(map(repr, found)))}")
        return wanted
    if len(found) > 1:
        raise AmbiguousFormatError(
            f"{label}: the file holds the adapters {', '.join(sorted(map(repr, found)))}; choose one with adapter_name"
        )
    return next(iter(found), "")


def _sort_plain(contents: Contents, name: str, tensor: Tensor, own: set[str], others: set[str], label: str) -> None:
    """A whole weight: trained copy, untrained original, or stored as it is."""
    parts = name.split(".")
    if "original_module" in parts:
        _skip(contents, "original_module (the untrained copy beside modules_to_save)", name)
    elif "modules_to_save" in parts:
        index = parts.index("modules_to_save")
        adapter = parts[index + 1] if len(parts) > index + 2 else ""
        if adapter in others:
            _skip(contents, f"tensors of adapter {adapter!r}", name)
            return
        del parts[index : index + (2 if adapter and adapter in own else 1)]
        _put(contents.saved, ".".join(parts), tensor, name, label)
    elif "token_adapter" in parts:
        parts.remove("token_adapter")
        _put(contents.plain, ".".join(parts), tensor, name, label)
    else:
        _put(contents.plain, name, tensor, name, label)


def _put(home: dict[str, Tensor], name: str, tensor: Tensor, key: str, label: str) -> None:
    if name in home:
        raise DuplicateTargetError(f"{label}: {key} stands twice once its prefixes are taken off")
    home[name] = tensor


def _prefix_notes(bare: Mapping[str, str], label: str) -> list[str]:
    without = [key for key in bare if not _is_prefixed(key)]
    if without and len(without) < len(bare):
        raise UnclaimedTensorError(
            f"{label}: {without[0]} has no {PREFIX!r} in front, unlike the other tensors; it belongs to no module"
        )
    if without:
        return [f"{label}: the keys lack {PREFIX!r}; PEFT itself would load none of them, and not say so"]
    if any(key.count(PREFIX) > 1 for key in bare):
        return [f"{label}: {PREFIX!r} stands twice in front of keys and was taken off"]
    return []


def _skip(contents: Contents, what: str, key: str) -> None:
    contents.notes.append(f"left out: {what}\0{key}")


def _summarise(notes: Iterable[str]) -> list[str]:
    """Notes of one kind as one line that counts and names the tensors."""
    keys: dict[str, list[str]] = {}
    for note in notes:
        what, _, key = note.partition("\0")
        keys.setdefault(what, []).append(key)
    return [
        what if found == [""] else f"{what}: {', '.join(found[:3])}{f' and {len(found) - 3} more' * (len(found) > 3)}"
        for what, found in keys.items()
    ]
