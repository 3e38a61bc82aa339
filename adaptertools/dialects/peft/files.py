"""Where a PEFT adapter lies: one file, shards with an index, or sub-folders with one adapter each."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptertools.containers.source import Source
from adaptertools.dialects.peft import config as peft_config
from adaptertools.dialects.peft.leftovers import refuse_unread_checkpoint
from adaptertools.dialects.torchtune import keys as torchtune_keys
from adaptertools.errors import (
    AdapterToolsError,
    AmbiguousFormatError,
    DamagedFileError,
    DuplicateTargetError,
    FileError,
    SourceNotFoundError,
    count,
)

STEM = "adapter_model"
SIDECAR = "adaptertools.json"

PATTERNS = (
    peft_config.FILE,
    SIDECAR,
    f"{STEM}.safetensors",
    f"{STEM}.bin",
    f"{STEM}-*-of-*.safetensors",
    f"{STEM}-*-of-*.bin",
    f"{STEM}.safetensors.index.json",
    f"{STEM}.bin.index.json",
)
"""The files of an adapter in its folder."""

_SUFFIXES = ("safetensors", "bin")
"""In the order in which PEFT prefers them."""

_PISSA_CONVERTED = "pissa_converted"
_PISSA = (
    "pissa_converted in it is the same adapter for the published base weights, as LLaMA-Factory converted it; the one "
    "that is read belongs to the base weights that PiSSA changed"
)

_SHARD = re.compile(rf"{STEM}-(\d+)-of-(\d+)\.(safetensors|bin)")


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors of one adapter and what stands beside them."""

    source: Source
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    container: str
    notes: tuple[str, ...]

    @property
    def config_label(self) -> str:
        return self.source.label_of(peft_config.FILE)


def open_adapter(source: Source, adapter_name: str | None) -> tuple[Found, bool]:
    """The adapter at a place, and whether `adapter_name` chose a sub-folder.

    Raises: SourceNotFoundError, AmbiguousFormatError, DamagedFileError and what the containers raise
    """
    home, notes, chosen = _settle_folder(source, adapter_name)
    variants = weight_files(home)
    if not variants:
        refuse_unread_checkpoint(home)
        raise SourceNotFoundError(
            f"{home.label}: no {STEM}.safetensors and no {STEM}.bin. The download is not whole, or the adapter was "
            "saved without its weights"
        )
    if len(variants) > 1:
        others = ", ".join(files[0] for files in variants[1:])
        notes = (*notes, f"{variants[0][0]} is read; {others} stands beside it and is not, as in PEFT")
    return Found(home, *_read_files(home, variants[0]), notes), chosen


def weight_files(source: Source) -> list[tuple[str, ...]]:
    """The files that hold the weights, once for each way in which they are stored, the preferred one first.

    Raises: DamagedFileError if a shard is missing
    """
    if source.path is None or not source.is_folder:
        (name,) = source.file_names
        shard = _SHARD.fullmatch(name)
        return [_shards(source.beside(), shard[3])] if shard and source.path else [(name,)]
    found: list[tuple[str, ...]] = []
    for suffix in _SUFFIXES:
        if source.has(f"{STEM}.{suffix}"):
            found.append((f"{STEM}.{suffix}",))
        if shards := _shards(source, suffix):
            found.append(shards)
    return found


def differences(source: Source, adapter_name: str | None = None) -> tuple[str, ...]:
    """The tensors in which the variants of the weights (.safetensors and .bin) differ, where there are several.

    Memory: what the containers map of both
    """
    home, _, _ = _settle_folder(source, adapter_name)
    variants = [_read_files(home, files)[0] for files in weight_files(home)]
    found: dict[str, None] = {}
    for other in variants[1:]:
        for name in (*variants[0], *other):
            one, two = variants[0].get(name), other.get(name)
            if one is None or two is None or one.dtype != two.dtype or not torch.equal(one, two):
                found[name] = None
    return tuple(found)


def compare_variants(source: Source, adapter_name: str | None = None) -> tuple[str, ...]:
    """Whether weights that are stored in several ways are the same; nothing where they are stored once.

    Memory: what the containers map of both
    """
    home, _, _ = _settle_folder(source, adapter_name)
    names = [files[0] for files in weight_files(home)]
    if len(names) < 2:
        return ()
    try:
        found = differences(source, adapter_name)
    except AdapterToolsError as error:
        return (f"{' and '.join(names)} cannot be compared: {error}",)
    if not found:
        return (f"{' and '.join(names)} hold the same tensors, bit by bit",)
    return (f"{' and '.join(names)} differ in {count(len(found), 'tensor')}, of which one is {found[0]}",)


def is_adapter_folder(source: Source) -> bool:
    """Whether a folder holds the configuration of a PEFT adapter of whatever type."""
    document = source.document(peft_config.FILE)
    return document is not None and document.get("peft_type") is not None


def lacks_type(source: Source) -> bool:
    """Whether a folder has a configuration that is PEFT's but for its type, as Tinker writes it."""
    document = source.document(peft_config.FILE) or {}
    return "peft_type" not in document and {"r", "lora_alpha"} <= document.keys()


def adapter_folders(source: Source) -> list[str]:
    """The sub-folders that hold an adapter each. One with a damaged configuration counts: reading it will say so."""
    return [name for name in source.folders if _may_be_adapter(source.sub(name))]


def _may_be_adapter(source: Source) -> bool:
    try:
        return is_adapter_folder(source) and not (torchtune_keys.adapter_files(source) and not weight_files(source))
    except FileError:
        return True


def _settle_folder(source: Source, adapter_name: str | None) -> tuple[Source, tuple[str, ...], bool]:
    """The folder to read from: the one given, or the one below it that is meant."""
    if not source.is_folder:
        return source, (), False
    below = adapter_folders(source)
    if adapter_name in below:
        return source.sub(adapter_name), (), True
    if source.document(peft_config.FILE) is not None or weight_files(source):
        others = f"{source.label} also holds the adapters {', '.join(below)}; a name behind the path picks one"
        return source, (_PISSA,) if _PISSA_CONVERTED in below else (others,) if below else (), False
    if len(below) > 1:
        example = f"{source.label}/{below[0]}"
        raise AmbiguousFormatError(f"{source.label} holds the adapters {', '.join(below)}. Name one: {example}")
    if below:
        return source.sub(below[0]), (f"{source.label} holds one adapter, {below[0]}, which is read",), False
    return source, (), False


def _shards(source: Source, suffix: str) -> tuple[str, ...]:
    """The shards of one kind, all of them.

    Raises: DamagedFileError if one is missing
    """
    index = source.document(f"{STEM}.{suffix}.index.json")
    matches = [match for name in source.file_names if (match := _SHARD.fullmatch(name)) and match[3] == suffix]
    present = {match[0] for match in matches}
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DamagedFileError(f"{source.label}/{STEM}.{suffix}.index.json: no weight_map that names the shards")
        wanted = {str(name) for name in weight_map.values()}
    elif matches:
        total = matches[0][2]
        if len(matches) != int(total):
            raise DamagedFileError(
                f"{source.label}: {len(matches)} of {int(total)} shards are there. Download or save the adapter again"
            )
        wanted = {f"{STEM}-{number:0{len(total)}d}-of-{total}.{suffix}" for number in range(1, int(total) + 1)}
    else:
        return ()
    missing = sorted(name for name in wanted if name not in source.file_names)
    if missing or not present <= wanted:
        odd = missing or sorted(present - wanted)
        what = "is missing" if missing else "belongs to no set of shards"
        raise DamagedFileError(f"{source.label}: the shard {odd[0]} {what}. Download or save the adapter again")
    return tuple(sorted(wanted))


def _read_files(source: Source, files: Sequence[str]) -> tuple[dict[str, Tensor], Mapping[str, str], str]:
    """The tensors of one variant, the metadata of its first file, and its container."""
    home = source if source.path is None or source.is_folder or len(files) == 1 else source.beside()
    tensors: dict[str, Tensor] = {}
    for name in files:
        for key, tensor in home.tensors(name).tensors.items():
            if key in tensors:
                raise DuplicateTargetError(f"{source.label}: {key} stands in two shards")
            tensors[key] = tensor
    first = home.tensors(files[0])
    return tensors, first.metadata, first.container
