"""Which file of a folder is the adapter, and whether a file is one of diffusers at all."""

import torch

from adaptertools.containers.history import HEADER_KEY
from adaptertools.containers.jsonfile import parse_object
from adaptertools.containers.source import Source
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.dialects.diffusers.keys import is_factor, parse_key
from adaptertools.dialects.diffusers.metadata import KEY
from adaptertools.errors import AdapterToolsError, AmbiguousFormatError, UnknownFormatError

STEM = "pytorch_lora_weights"
NAMES = (f"{STEM}.safetensors", f"{STEM}.bin")
"""The names that diffusers saves under, the one that it prefers first."""

MARK = "diffusers"
"""What the header entry of this package says beyond the history stands under this name."""

_READ_FROM = ("safetensors", "torch", "memory")


def adapter_files(source: Source) -> list[str]:
    """The names of the files that hold an adapter of diffusers: those that it saves under, else all that do.

    Raises: what is wrong with the bytes of a file that was named; in a folder such a file is passed over
    """
    if not source.is_folder:
        (name,) = source.file_names
        return [name] if source.container(name) in _READ_FROM and is_adapter(source.tensors(name), name) else []
    if source.document("adapter_config.json") is not None:
        return []
    found = [name for name in source.tensor_names if name not in source.folders and _holds_adapter(source, name)]
    return [name for name in NAMES if name in found] or found


def adapter_file(source: Source) -> tuple[str, tuple[str, ...]]:
    """The file to read, and what to say about others.

    Raises: AmbiguousFormatError for several files that are not the same adapter; UnknownFormatError for none
    """
    if not source.is_folder:
        return source.file_names[0], ()
    names = adapter_files(source)
    if not names:
        raise UnknownFormatError(f"{source.label} holds no file with keys of diffusers, such as {NAMES[0]}")
    if len(names) == 1:
        return names[0], ()
    if tuple(names) != NAMES:
        raise AmbiguousFormatError(f"{source.label} holds {', '.join(names)}: name the file to read")
    one, other = (source.tensors(name) for name in names)
    different = _difference(one, other)
    if different is not None:
        raise AmbiguousFormatError(
            f"{source.label}: {names[0]} and {names[1]} are not the same adapter ({different}). diffusers loads the "
            "first; name the file that is meant"
        )
    return names[0], (f"{names[0]} is read; {names[1]} beside it holds the same tensors",)


def is_adapter(file: TensorFile, name: str) -> bool:
    """Whether the keys are those of diffusers. Factors of no component need a name or a header that says so."""
    keys = [parse_key(key) for key in file.tensors]
    factors = [key for key in keys if key is not None and is_factor(key)]
    if not factors or any(key.startswith("base_model.") or ".lora_down." in key for key in file.tensors):
        return False
    if any(key.component is not None or key.processor for key in factors):
        return not name.startswith("adapter_model.")
    return name in NAMES or KEY in file.metadata or mark(file) is not None


def mark(file: TensorFile) -> dict[str, object] | None:
    """What this package said of a file that it wrote.

    Raises: DamagedFileError
    """
    text = file.metadata.get(HEADER_KEY) if file.container == "safetensors" else None
    said = parse_object(f"{file.label}: header entry {HEADER_KEY!r}", text).get(MARK) if text else None
    return said if isinstance(said, dict) else None


def _holds_adapter(source: Source, name: str) -> bool:
    try:
        return source.container(name) in _READ_FROM and is_adapter(source.tensors(name), name)
    except AdapterToolsError:
        return False


def _difference(one: TensorFile, other: TensorFile) -> str | None:
    """In what two files differ, None if every tensor is the same bit for bit.

    Memory: what the containers map of both
    """
    names = list(dict.fromkeys((*one.tensors, *other.tensors)))
    if any(file.tensors[name].device.type == "meta" for file in (one, other) for name in file.tensors):
        return "of one of them only the header is on this machine, so that they cannot be compared"
    changed = [
        name
        for name in names
        if name not in one.tensors
        or name not in other.tensors
        or one.tensors[name].dtype != other.tensors[name].dtype
        or not torch.equal(one.tensors[name], other.tensors[name])
    ]
    return f"{len(changed)} of {len(names)} tensors differ, such as {changed[0]}" if changed else None
