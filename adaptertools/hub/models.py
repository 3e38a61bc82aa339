"""Which files of a repository a base model needs: its weights in one format, its configuration, and its tokenizer."""

import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import PurePosixPath

from adaptertools.containers.checkpoint import WEIGHTS
from adaptertools.containers.jsonfile import read_json
from adaptertools.errors import DamagedFileError, HubNotFoundError, UnknownFormatError, UnsafeFileError, few
from adaptertools.hub.choice import PICKLES, Choice, directly, join, parent, pickle_refusal
from adaptertools.hub.revision import Revision
from adaptertools.hub.transfer import download

_INDEX = ".index.json"
_BESIDE = (
    "*.json", "*.txt", "*.model", "*.spm", "*.bpe", "*.tiktoken", "*.jinja", "*.py",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Configuration, tokenizer, templates, the model's own code, and what must be passed on with it."""
_NOT_BESIDE = (
    "*.index.json", "adapter_config.json", "adaptertools.json", "trainer_state.json", "all_results.json",
    "train_results.json", "eval_results.json", "requirements*.txt", "flax_adapter.json",
)  # fmt: skip
_MOST_BYTES = 256 << 20
_STAGE = re.compile(r"\d+_[A-Za-z]+")
"""A folder of what sentence-transformers puts behind the model."""


def choose_model_files(revision: Revision, *, allow_pickle: bool = False) -> Choice:
    """The files of the model at an address. Where there is an index of shards, it is fetched and read.

    Raises: HubNotFoundError, UnknownFormatError if there is none; UnsafeFileError if its only weights are pickles,
            unless those are allowed; DamagedFileError for an index that names no shards
    """
    at = revision.address.inside
    if at and at not in revision.files and not revision.below(at):
        raise HubNotFoundError(f"{revision.address}: the repository has no file and no folder {at}")
    folder = parent(at) if at in revision.files else at
    names = directly(revision, folder)
    weights = PurePosixPath(at).name if at in revision.files else model_weights(names)
    if weights is None:
        raise UnknownFormatError(
            f"{revision.label}: no weights of a model in it; expected one of {', '.join(WEIGHTS)}, "
            f"found {few(names, 4)}"
        )
    if weights.removesuffix(_INDEX).endswith(PICKLES) and not allow_pickle:
        raise UnsafeFileError(pickle_refusal(revision, weights, "model"))
    files = [weights]
    if weights.endswith(_INDEX):
        files += _shards(revision, join(folder, weights), names)
    beside = [name for name in names if _belongs(name) and name not in files]
    beside = [name for name in beside if (revision.files[join(folder, name)].size or 0) <= _MOST_BYTES]
    chosen = [*(join(folder, name) for name in (*files, *beside)), *_stages(revision, folder, names)]
    rest = tuple(name for name in revision.below(folder) if name not in chosen)
    return Choice(tuple(chosen), at, rest)


def has_model(revision: Revision) -> bool:
    """Whether weights of a model stand at the address."""
    at = revision.address.inside
    return model_weights(directly(revision, at)) is not None


def model_weights(names: Collection[str]) -> str | None:
    """The weights, or their index, that a model library would take from a folder with these files."""
    found = next((name for name in WEIGHTS if name in names), None)
    if found is None:
        others = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter")]
        found = others[0] if len(others) == 1 else None
    return found


def _shards(revision: Revision, index: str, names: Collection[str]) -> list[str]:
    path = download(revision, [index]) / index
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DamagedFileError(f"{revision.label}: {index} has no weight_map that names a file for each tensor")
    shards = list(dict.fromkeys(weight_map.values()))
    for name in shards:
        if PurePosixPath(name).name != name:
            raise UnsafeFileError(f"{revision.label}: {index} names the shard {name!r:.80}, outside its folder")
        if name not in names:
            raise HubNotFoundError(f"{revision.label}: {index} names the shard {name}, which the repository lacks")
    return shards


def _belongs(name: str) -> bool:
    wanted = any(fnmatch(name, pattern) for pattern in _BESIDE)
    return wanted and not name.startswith(".") and not any(fnmatch(name, pattern) for pattern in _NOT_BESIDE)


def _stages(revision: Revision, folder: str, names: Collection[str]) -> list[str]:
    """What stands behind the model in a pipeline of sentence-transformers."""
    if "modules.json" not in names:
        return []
    found = []
    for name in revision.below(folder):
        stage, _, leaf = (name[len(folder) + 1 :] if folder else name).partition("/")
        safe = f"{name.removesuffix('pytorch_model.bin')}model.safetensors" in revision.files
        if _STAGE.fullmatch(stage) and leaf and not (leaf == "pytorch_model.bin" and safe):
            found.append(name)
    return found
