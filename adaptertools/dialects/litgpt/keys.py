"""The keys of LitGPT's adapters: which file it is, and which tensors make a pair."""

import re
from collections.abc import Iterable

from torch import Tensor

from adaptertools.containers.source import Source
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.errors import (
    AdapterToolsError,
    DuplicateTargetError,
    UnclaimedTensorError,
    UnknownFormatError,
    UnpairedFactorError,
)
from adaptertools.names import strip_state_dict, strip_wrappers

FILE = "lit_model.pth.lora"
QKV = "attn.qkv"
FORMER_QKV = "attn.attn"
"""What LitGPT up to 0.5.4 called the fused projection, whose rows it interleaved."""

LAYER = re.compile(r"transformer\.h\.(?P<layer>\d+)\.(?P<module>.+)")

_CONTAINERS = ("torch", "safetensors", "memory")
_FACTOR = re.compile(r"(?P<name>.+)\.lora_(?P<side>[AB])")
_MODULE = r"attn\.(qkv|attn|proj)|mlp\.(fc|fc_1|fc_2|proj|gate|(experts\.\d+|shared_experts)\.(fc_1|fc_2|proj))"
_OWN = re.compile(rf"transformer\.h\.\d+\.({_MODULE})\.lora_[AB]")
"""GPT-2's `transformer.h.N.attn.c_attn`, Falcon's and BLOOM's names of Hugging Face are none of these."""


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether some keys are factors as LitGPT alone names them."""
    return any(is_own(_bare(key)) for key in keys)


def is_own(name: str) -> bool:
    """Whether a name without wrappers is one of LitGPT's factors, and of no other library."""
    return _OWN.fullmatch(name) is not None


def adapter_files(source: Source) -> list[str]:
    """The adapter of a folder, known by its name and its keys; of a single file, that file by its keys.

    Raises: what is wrong with the bytes of a file that was named; in a folder such a file is passed over
    """
    if not source.is_folder:
        (name,) = source.file_names
        return [name] if source.container(name) in _CONTAINERS and is_adapter(source.tensors(name).tensors) else []
    return [FILE] if source.has(FILE) and _is_sound_adapter(source) else []


def _is_sound_adapter(source: Source) -> bool:
    try:
        return source.container(FILE) in _CONTAINERS and is_adapter(source.tensors(FILE).tensors)
    except AdapterToolsError:
        return False


def adapter_file(source: Source) -> str:
    """The name of the one file to read.

    Raises: UnknownFormatError
    """
    if not source.is_folder:
        return source.file_names[0]
    if not source.has(FILE):
        raise UnknownFormatError(f"{source.label} holds no {FILE}, the adapter of LitGPT. Name the file")
    return FILE


def sort_keys(file: TensorFile) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B of each module, by LitGPT's name of it.

    Raises: UnknownFormatError, UnpairedFactorError, UnclaimedTensorError, DuplicateTargetError
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        match = _FACTOR.fullmatch(_bare(key))
        if match is None:
            raise UnclaimedTensorError(
                f"{file.label}: {key!r} is no key of a LitGPT adapter, which end in .lora_A and .lora_B. A merged "
                "model (lit_model.pth) holds no adapter any more"
            )
        sides = modules.setdefault(match["name"], {})
        if match["side"] in sides:
            raise DuplicateTargetError(f"{file.label}: {key!r} stands twice once its prefixes are taken off")
        sides[match["side"]] = tensor
    if not modules:
        raise UnknownFormatError(f"{file.label}: no key ends in .lora_A or .lora_B, so this is no adapter of LitGPT")
    for name, sides in modules.items():
        if len(sides) == 1:
            raise UnpairedFactorError(
                f"{file.label}: {name}.lora_{next(iter(sides))} stands alone. The file was cut or filtered: save it "
                "again"
            )
    return {name: (sides["A"], sides["B"]) for name, sides in modules.items()}


def _bare(key: str) -> str:
    return strip_wrappers(strip_state_dict(key))
