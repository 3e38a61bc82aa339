"""Where an MLX adapter lies: `adapters.safetensors`, an earlier `adapters.npz`, or a checkpoint with its number."""

import re
from collections.abc import Mapping
from typing import Any

from adaptertools.containers.source import Source
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.errors import AmbiguousFormatError, FileError, SourceNotFoundError

CONFIG = "adapter_config.json"
STEM = "adapters"
WEIGHTS = (f"{STEM}.safetensors", f"{STEM}.npz")
"""In the order in which they are preferred: mlx-lm loads the first alone."""

_CHECKPOINT = re.compile(r"\d+_adapters\.(safetensors|npz)")
_CONTAINERS = ("safetensors", "npz", "memory")
_CONFIG_KEYS = frozenset({"lora_parameters", "fine_tune_type", "lora_layers"})
_FACTOR = re.compile(r"[^/\[\]]+\.lora_[ab](\.\d+)?")


def is_mlx_config(document: Mapping[str, Any] | None) -> bool:
    """Whether a configuration is one of mlx-lm, whatever else may stand in it."""
    return document is not None and not _CONFIG_KEYS.isdisjoint(document)


def detect(source: Source) -> bool:
    """Whether it is an MLX adapter: by its configuration, else by names with dots that no Flax header claims."""
    document = source.document(CONFIG)
    if is_mlx_config(document):
        if _weights(source):
            return True
        if source.is_folder:
            return not source.tensor_names and (document or {}).get("peft_type") is None
    elif document is not None and source.is_folder:
        return False
    return any(_has_factors(source, name) for name in _weights(source) or source.file_names)


def weight_file(source: Source) -> str:
    """The file that holds the factors.

    Raises: SourceNotFoundError; AmbiguousFormatError for several checkpoints alone
    """
    if not source.is_folder:
        return source.file_names[0]
    names = _weights(source) or [name for name in source.file_names if _has_factors(source, name)]
    if not names:
        raise SourceNotFoundError(
            f"{source.label}: no {' and no '.join(WEIGHTS)}. The download is not whole, or nothing was saved yet"
        )
    if names[0] not in WEIGHTS and len(names) > 1:
        raise AmbiguousFormatError(
            f"{source.label}: {', '.join(names[:4])} and no {WEIGHTS[0]}. Name the one that is meant: "
            f"{source.label}/{names[-1]}"
        )
    return names[0]


def _weights(source: Source) -> list[str]:
    """The files with a name of mlx-lm's, the preferred one first."""
    checkpoints = [name for name in source.file_names if _CHECKPOINT.fullmatch(name)]
    return [name for name in WEIGHTS if source.has(name)] + checkpoints


def _has_factors(source: Source, name: str) -> bool:
    """Whether a file's names are those of MLX; in a folder a damaged file may be anybody's."""
    try:
        return source.container(name) in _CONTAINERS and _are_factors(source.tensors(name))
    except FileError:
        if not source.is_folder:
            raise
        return False


def _are_factors(file: TensorFile) -> bool:
    return file.metadata.get("format") != "flax" and any(_FACTOR.fullmatch(name) for name in file.tensors)
