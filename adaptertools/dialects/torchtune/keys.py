"""The keys of torchtune's raw adapter files: which file it is, and which tensors belong to which module."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from adaptertools.containers.source import Source
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.errors import (
    AdapterToolsError,
    AmbiguousFormatError,
    DuplicateTargetError,
    UnclaimedTensorError,
    UnknownFormatError,
    UnpairedFactorError,
    UnsupportedFeatureError,
)
from adaptertools.names import strip_state_dict, strip_wrappers
from adaptertools.tensors import natural_order

MAGNITUDE = "magnitude"

_CONTAINERS = ("torch", "safetensors", "memory")
_FILE = re.compile(r"adapter_(model|\d+)\.pt")
"""What torchtune calls the raw file: adapter_model.pt in epoch_N or step_N, before 0.5 adapter_N.pt."""
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<leaf>lora_a\.weight|lora_b\.weight|magnitude)")
_OWN = re.compile(r"(.+\.)?(layers\.\d+\.(attn|mlp)\.[^.]+|output)\.lora_[ab]\.weight")
_EXPERTS = re.compile(r".+\.experts\.lora_(gate|up|down)_[ab]")


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether some keys are factors as torchtune alone names them."""
    return any(_OWN.fullmatch(_bare(key)) for key in keys)


def adapter_files(source: Source) -> list[str]:
    """The raw files of a folder, known by their names and keys; of a single file, that file by its keys.

    Raises: what is wrong with the bytes of a file that was named; in a folder such a file is passed over
    """
    if not source.is_folder:
        (name,) = source.file_names
        return [name] if source.container(name) in _CONTAINERS and is_adapter(source.tensors(name).tensors) else []
    return [name for name in source.file_names if _FILE.fullmatch(name) and _is_sound_adapter(source, name)]


def adapter_folders(source: Source) -> list[str]:
    """The sub-folders that hold a raw file each, one for every epoch; none for a single file."""
    return [name for name in source.folders if adapter_files(source.sub(name))] if source.is_folder else []


def _one_of(source: Source, folders: Sequence[str]) -> str:
    last = sorted(folders, key=natural_order)[-1]
    return f"that, {source.label}/{last}" if len(folders) == 1 else f"one of them, such as {source.label}/{last}"


def _is_sound_adapter(source: Source, name: str) -> bool:
    try:
        return source.container(name) in _CONTAINERS and is_adapter(source.tensors(name).tensors)
    except AdapterToolsError:
        return False


def adapter_file(source: Source) -> str:
    """The name of the one file to read.

    Raises: UnknownFormatError, AmbiguousFormatError
    """
    names = list(source.file_names)
    if source.is_folder:
        names = adapter_files(source) or [name for name in names if _FILE.fullmatch(name)]
    if len(names) > 1:
        raise AmbiguousFormatError(f"{source.label} holds {', '.join(names)}, one for each epoch: name the file")
    if not names and (folders := adapter_folders(source)):
        raise UnknownFormatError(f"{source.label} holds {', '.join(folders)}: give {_one_of(source, folders)}")
    if not names:
        raise UnknownFormatError(
            f"{source.label} holds no adapter_model.pt and no adapter_N.pt, the raw files of torchtune"
        )
    return names[0]


def sort_keys(file: TensorFile) -> dict[str, dict[str, Tensor]]:
    """`lora_a`, `lora_b` and `magnitude` of each module, by torchtune's name of it.

    Raises: UnknownFormatError, UnpairedFactorError, UnclaimedTensorError, DuplicateTargetError
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        name = _bare(key)
        if _EXPERTS.fullmatch(name):
            raise UnsupportedFeatureError(
                f"{file.label}: {key!r} adapts a stack of experts, as torchtune has in Llama 4"
            )
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise UnclaimedTensorError(
                f"{file.label}: {key!r} is no key of a torchtune adapter, which end in .lora_a.weight, .lora_b.weight "
                "and .magnitude"
            )
        parts = modules.setdefault(match["module"], {})
        leaf = match["leaf"].removesuffix(".weight")
        if leaf in parts:
            raise DuplicateTargetError(f"{file.label}: {key!r} stands twice once its prefixes are taken off")
        parts[leaf] = tensor
    if not any("lora_a" in parts for parts in modules.values()):
        raise UnknownFormatError(f"{file.label}: no key ends in .lora_a.weight, so this is no adapter of torchtune")
    for module, parts in modules.items():
        if missing := {"lora_a", "lora_b"} - parts.keys():
            raise UnpairedFactorError(
                f"{file.label}: {module} has {', '.join(sorted(parts))} and no {', '.join(sorted(missing))}. "
                "The file was cut or filtered: save the adapter again"
            )
    return modules


def adapted(modules: Mapping[str, Mapping[str, Tensor]], *leaves: str) -> list[str]:
    """The modules whose last part is one of these."""
    return [name for name in modules if name.rpartition(".")[2] in leaves]


def _bare(key: str) -> str:
    return strip_wrappers(strip_state_dict(key))
