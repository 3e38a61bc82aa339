"""The keys of kohya's and LyCORIS's files: `<flat name>.<part>`, and which file of a source has such keys.

A flat name is a module path with `_` for `.`, so that the first dot of a key ends it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adaptertools.containers.source import Source
from adaptertools.errors import AmbiguousFormatError, UnknownFormatError

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
ALPHA, DORA = "alpha", "dora_scale"

LORA = frozenset({DOWN, UP, MID})
LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})
LOKR = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})

OTHER_METHODS: Mapping[str, str] = {
    "diff": "a whole difference of the weight (LyCORIS's full)",
    "diff_b": "a difference of the bias (LyCORIS's full)",
    "w_norm": "a trained norm (LyCORIS's train_norm)",
    "b_norm": "a trained norm (LyCORIS's train_norm)",
    "oft_blocks": "OFT or BOFT",
    "oft_diag": "Diag-OFT",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "bm.weight": "GLoRA",
    "on_input": "(IA)³",
    "lambda_layer": "T-LoRA",
    "base_lambda": "T-LoRA",
    "q_layer.weight": "T-LoRA",
    "p_layer.weight": "T-LoRA",
    "set_weight": "a replaced weight of ComfyUI",
    "reshape_weight": "a reshaped weight of ComfyUI",
}
"""Parts that belong to something else than a low-rank product, by which a file is told to hold it."""

CONTAINERS = ("safetensors", "torch")


@dataclass(slots=True)
class Group:
    """The tensors of one module by the part of the key behind the flat name."""

    name: str
    parts: dict[str, Tensor] = field(default_factory=dict)


def split(key: str) -> tuple[str, str] | None:
    """The flat name and the part of a key; None where the key is not of this kind.

    >>> split("lora_unet_mid_block_conv.lora_down.weight")
    ('lora_unet_mid_block_conv', 'lora_down.weight')
    """
    name, dot, part = key.partition(".")
    return (name, part) if name and dot and part else None


def groups(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Group], list[str]]:
    """The modules by flat name, and the keys that are no module's."""
    found: dict[str, Group] = {}
    others: list[str] = []
    for key, tensor in tensors.items():
        parts = split(key)
        if parts is None:
            others.append(key)
        else:
            found.setdefault(parts[0], Group(parts[0])).parts[parts[1]] = tensor
    return found, others


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are kohya's: flat names with lora_down and lora_up."""
    return any(parts[1] in (DOWN, UP) for parts in map(split, keys) if parts)


def is_lycoris(keys: Iterable[str]) -> bool:
    """Whether these are of LyCORIS beyond LoCon: LoHa, LoKr, or a method that is refused by name."""
    return any(parts[1] in LOHA | LOKR or other_method(*parts) for parts in map(split, keys) if parts)


def other_method(name: str, part: str) -> str | None:
    """What a part belongs to that is no low-rank product; None for all others.

    A few of these words are common: they count only behind the prefixes that adapters have.
    """
    return OTHER_METHODS.get(part) if name.startswith(("lora_", "lycoris_")) else None


def adapter_files(source: Source, holds: Callable[[Iterable[str]], bool]) -> list[str]:
    """The names of the files whose keys `holds` takes for its own.

    Raises: what is wrong with the bytes of a file that was named; in a folder such a file is passed over
    """
    if not source.is_folder:
        (name,) = source.file_names
        known = source.path is None or source.container(name) in CONTAINERS
        return [name] if known and holds(source.tensors(name).tensors) else []
    names = (name for name in source.file_names if name not in source.folders and source.is_sound(name, CONTAINERS))
    return [name for name in names if holds(source.tensors(name).tensors)]


def adapter_file(source: Source, holds: Callable[[Iterable[str]], bool], what: str) -> str:
    """The name of the one file to read; a file that was named is taken whatever its keys are.

    Raises: UnknownFormatError, AmbiguousFormatError
    """
    names = list(source.file_names) if not source.is_folder else adapter_files(source, holds)
    if len(names) > 1:
        raise AmbiguousFormatError(f"{source.label} holds {', '.join(names)}: name the file to read")
    if not names:
        raise UnknownFormatError(f"{source.label} holds no torch or safetensors file with {what}")
    return names[0]
