"""The keys of a loralib file: which file it is, what wraps its names, and which keys make a pair."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from adaptertools.containers.source import Source
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.dialects.litgpt import keys as litgpt_keys
from adaptertools.errors import (
    AmbiguousFormatError,
    DuplicateTargetError,
    UnclaimedTensorError,
    UnknownFormatError,
    UnpairedFactorError,
    count,
)
from adaptertools.names import STATE_DICT_KEYS, strip_wrappers

CONTAINERS = ("torch", "safetensors")

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])")
_FOREIGN_FACTOR = re.compile(r"(.*\.)?lora_[^.]*(\.[^.]+)?")
_PEFT_KEY = re.compile(r"(.*\.)?(base_model\.model\..+|lora_E(\..+)?)")
_TRAINING_STATE = re.compile(r"(optim|lr_sched|sched|scaler|rng|amp)", re.IGNORECASE)

_RELATIVES = {
    "minLoRA": re.compile(r".*\.parametrizations\.[^.]+\.\d+\.lora_[AB]"),
    "AdapterHub": re.compile(r".*\.loras\.[^.]+\.lora_[AB]"),
    "OpenDelta": re.compile(r".*\.lora\.lora_[AB]"),
    "LitGPT": re.compile(r"(transformer\.)?h\.\d+\.attn\.qkv\.lora_[AB]"),
}
"""Formats that name their factors as loralib does and mean something else by them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The tensors of a file: pairs of lora_A and lora_B by layer, whole weights by name, and what was set aside."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    weights: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def adapter_file(source: Source) -> str:
    """The name of the one file to read.

    Raises: UnknownFormatError, AmbiguousFormatError
    """
    names = source.file_names
    if source.is_folder:
        names = tuple(name for name in names if name not in source.folders and source.is_sound(name, CONTAINERS))
        if len(names) > 1:
            names = tuple(name for name in names if is_adapter(source.tensors(name)))
    if len(names) > 1:
        raise AmbiguousFormatError(f"{source.label} holds {', '.join(names)}: name the file to read")
    if not names:
        raise UnknownFormatError(f"{source.label} holds no torch or safetensors file with loralib factors")
    return names[0]


def adapter_files(source: Source) -> list[str]:
    """The names of all files that hold loralib factors.

    Raises: what is wrong with the bytes of a file that was named; in a folder such a file is passed over
    """
    if not source.is_folder:
        (name,) = source.file_names
        known = source.path is None or source.container(name) in CONTAINERS
        return [name] if known and is_adapter(source.tensors(name)) else []
    return [
        name
        for name in source.file_names
        if name not in source.folders and source.is_sound(name, CONTAINERS) and is_adapter(source.tensors(name))
    ]


def is_adapter(file: TensorFile) -> bool:
    """Whether the keys are those of loralib: bare factors, and none that a relative of it would name so."""
    if file.metadata.get("format") == "flax":
        return False
    names = [_unwrapped(name) for name in file.tensors]
    if any(_PEFT_KEY.fullmatch(name) for name in names):  # AdaLoRA of PEFT has bare factors too
        return False
    if any(map(litgpt_keys.is_own, names)):
        return False
    return any(_FACTOR.fullmatch(name) for name in names) and relative(names) is None


def relative(names: Iterable[str]) -> str | None:
    """The format of a relative whose factors these are, None if they may be loralib's."""
    for name in names:
        for known, pattern in _RELATIVES.items():
            if pattern.fullmatch(name):
                return known
    return None


def sort_keys(file: TensorFile, *, keep_names: bool) -> Keys:
    """Tell pairs from whole weights. `keep_names`: names are what they should be, as the sidecar says.

    Raises: UnknownFormatError for a relative's file; UnpairedFactorError, UnclaimedTensorError, DuplicateTargetError
    """
    known = relative(map(_unwrapped, file.tensors))
    if known is not None:
        raise UnknownFormatError(
            f"{file.label}: these are factors of {known}, which names them as loralib does but means other things; "
            f"{'the format litgpt reads them' if known == 'LitGPT' else f'{known} adapters are not read'}"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    aside: list[str] = []
    origins: dict[str, str] = {}
    for key, tensor in file.tensors.items():
        name = key if keep_names else _unwrapped(key)
        if "/" in name:
            if not _TRAINING_STATE.match(name):
                raise UnclaimedTensorError(f"{file.label}: {key!r} lies beside the state dict and is not known")
            aside.append(key)
            continue
        if name in origins:
            raise DuplicateTargetError(
                f"{file.label}: {origins[name]!r} and {key!r} are both {name}; which one is meant?"
            )
        origins[name] = key
        match = _FACTOR.fullmatch(name)
        if match:
            factors.setdefault(match["layer"], {})[match["side"]] = tensor
        elif _FOREIGN_FACTOR.fullmatch(name):
            raise UnclaimedTensorError(
                f"{file.label}: {key!r} is no key of loralib, whose factors end in .lora_A and .lora_B"
            )
        else:
            weights[name] = tensor
    if not factors:
        raise UnknownFormatError(f"{file.label}: no key ends in .lora_A or .lora_B, so this is no loralib file")
    for layer, sides in factors.items():
        if len(sides) == 1:
            (side,) = sides
            missing = "B" if side == "A" else "A"
            raise UnpairedFactorError(
                f"{file.label}: {layer}.lora_{side} stands alone, {layer}.lora_{missing} is not in the file. "
                "It was saved or cut incompletely: save it again with lora_state_dict(model)"
            )
    notes = (f"left aside: {count(len(aside), 'tensor')} of the training state, such as {aside[0]}",) if aside else ()
    return Keys(
        pairs={layer: (sides["A"], sides["B"]) for layer, sides in factors.items()}, weights=weights, notes=notes
    )


def _unwrapped(key: str) -> str:
    parts = key.split("/")
    while len(parts) > 1 and parts[0] in STATE_DICT_KEYS:
        del parts[0]
    return strip_wrappers("/".join(parts)) if len(parts) == 1 else "/".join(parts)
