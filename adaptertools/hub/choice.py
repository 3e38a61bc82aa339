"""Which files of a repository an adapter or a model needs: one format, one kind of weights, and nothing of training."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

from adaptertools import formats
from adaptertools.containers import sidecar
from adaptertools.errors import AmbiguousFormatError, HubNotFoundError, UnknownFormatError, UnsafeFileError, few
from adaptertools.hub.revision import Revision

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pth.lora")
TENSORS = (".safetensors", ".msgpack", ".npz", ".gguf", *PICKLES)
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model"
_ORBAX = "_METADATA"
_RAW = re.compile(r"lit_model\.pth\.lora|adapter_(model|\d+)\.pt")
"""What LitGPT and torchtune call their weights."""
_BESIDE_RAW = ("hyperparameters.yaml", "model_config.yaml", "config.json")
_OF_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|global_step|random_states|zero_pp|mp_rank)"
)
_OF_A_MODEL = re.compile(
    r"consolidated[.\-_]|(model|pytorch_model|diffusion_pytorch_model|flax_model)[.\-_].*(safetensors|bin|msgpack|npz)$"
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The files to fetch, by their names in the repository, and the folder or file among them that is read."""

    names: tuple[str, ...]
    at: str
    """A folder ("" for the repository itself), or a file."""
    left_out: tuple[str, ...] = ()
    """Other files of the folder."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def folder(self) -> str:
        """The folder relative to which the files keep their names elsewhere."""
        return parent(self.at) if self.at in self.names else self.at


def choose_adapter_files(revision: Revision, *, allow_pickle: bool = False) -> Choice:
    """The files of the one adapter at an address.

    Raises: HubNotFoundError, UnknownFormatError if there is none; AmbiguousFormatError if there are several;
            UnsafeFileError if it is a pickle, unless those are allowed
    """
    choice = _adapter(revision)
    if choice is None:
        raise UnknownFormatError(f"{revision.label}: no adapter in it ({_contents(revision)})")
    pickles = [name for name in choice.names if name.endswith(PICKLES)]
    if pickles and not allow_pickle:
        raise UnsafeFileError(pickle_refusal(revision, pickles[0], "adapter"))
    rest = [name for name in revision.below(choice.folder) if name not in choice.names]
    return Choice(choice.names, choice.at, tuple(rest))


def pickle_refusal(revision: Revision, name: str, what: str) -> str:
    """Why a torch file from elsewhere is not fetched unasked, and what to do."""
    return (
        f"{revision.label}: the only weights of this {what} are {name}, a pickle, which can hold code. It would "
        f"be read without running any: adaptertools pull {revision.address} DST --allow-pickle fetches it, and DST can "
        "then be used"
    )


def has_adapter(revision: Revision) -> bool:
    """Whether an adapter stands directly at the address, by the names that a format gives its files."""
    return _in_folder(revision, revision.address.inside) is not None


def _adapter(revision: Revision) -> Choice | None:
    at = revision.address.inside
    if at in revision.files:
        return _one_file(revision, at)
    if at and not revision.below(at):
        raise HubNotFoundError(f"{revision.address}: the repository has no file and no folder {at}")
    return _in_folder(revision, at) or _below(revision, at) or _single(revision, at)


def _in_folder(revision: Revision, folder: str) -> Choice | None:
    """An adapter whose format keeps it in a folder of its own, by the names that it gives its files."""
    names = directly(revision, folder)
    weights = [*_weights(names), *_mlx_weights(names), *_diffusers_weights(names)]
    raw = [] if weights else sorted(filter(_RAW.fullmatch, names), key=lambda name: (len(name), name))[-1:]
    if _CONFIG in names or weights or raw:
        if not weights and not raw:
            return None
        beside = (_CONFIG, formats_sidecar(), *(_BESIDE_RAW if raw else ()))
        wanted = [name for name in names if name in beside or name in weights or name in raw]
        return Choice(tuple(join(folder, name) for name in wanted), folder)
    stem = _flax(names, revision, folder)
    return Choice(stem, folder) if stem else None


def formats_sidecar() -> str:
    """The name of the JSON beside a PEFT adapter in which its history stands."""
    from adaptertools.dialects.peft.files import SIDECAR

    return SIDECAR


def _weights(names: Collection[str]) -> list[str]:
    """The weights of a PEFT adapter in one of the ways in which they are stored, with an index if there is one."""
    for suffix in ("safetensors", "bin"):
        if f"{_WEIGHTS}.{suffix}" in names:
            return [f"{_WEIGHTS}.{suffix}"]
        shards = [name for name in names if fnmatch(name, f"{_WEIGHTS}-*-of-*.{suffix}")]
        if shards:
            return [*shards, *(name for name in names if name == f"{_WEIGHTS}.{suffix}.index.json")]
    return []


def _mlx_weights(names: Collection[str]) -> list[str]:
    """The last weights of an MLX adapter; the checkpoints of its run count for nothing beside them."""
    from adaptertools.dialects.mlx.files import WEIGHTS

    return [name for name in WEIGHTS if name in names][:1]


def _diffusers_weights(names: Collection[str]) -> list[str]:
    """The weights under the name that diffusers gives them, in the safe one of two kinds of file."""
    from adaptertools.dialects.diffusers.files import NAMES

    return [name for name in NAMES if name in names][:1]


def _flax(names: Collection[str], revision: Revision, folder: str) -> tuple[str, ...]:
    """The files of a Flax adapter that is written as such, a folder of Orbax's with all that stands in it."""
    for pattern in formats.get("flax").FILES:
        found = [name for name in revision.below(folder) if fnmatch(_relative(name, folder).split("/")[0], pattern)]
        if found:
            return tuple(found)
    return ()


def _below(revision: Revision, folder: str) -> Choice | None:
    """The one adapter in a folder below this one; training checkpoints count for nothing where there is another."""
    homes = dict.fromkeys(
        parent(_relative(name, folder))
        for name in revision.below(folder)
        if _names_a_home(PurePosixPath(name).name) and parent(_relative(name, folder))
    )
    found = [home for home in sorted(homes) if _in_folder(revision, join(folder, home)) is not None]
    if len(found) > 1:
        example = join(folder, found[0])
        raise AmbiguousFormatError(
            f"{revision.label} holds the adapters {few(found, 4)}. Name one: "
            f"hf://{revision.repo_id}@{revision.address.revision or 'main'}/{example}"
        )
    return _in_folder(revision, join(folder, found[0])) if found else None


def _names_a_home(name: str) -> bool:
    """Whether an adapter stands in the folder of a file with this name."""
    return name == _CONFIG or _RAW.fullmatch(name) is not None


def _single(revision: Revision, folder: str) -> Choice | None:
    """The one file of tensors in a folder, or the one checkpoint of Orbax's; of two kinds of file the safe one."""
    names = directly(revision, folder)
    trees = [name for name in revision.below(folder) if PurePosixPath(name).name == _ORBAX]
    files = [name for name in names if may_hold_an_adapter(name, names)]
    safe = [name for name in files if not name.endswith(PICKLES)]
    files = safe or files
    found = [*(join(folder, name) for name in files), *(parent(name) for name in trees)]
    if len(found) > 1:
        raise AmbiguousFormatError(
            f"{revision.label}: {few(found, 4)} may each be the adapter. Name one: "
            f"hf://{revision.repo_id}@{revision.address.revision or 'main'}/{found[0]}"
        )
    if not found:
        return None
    return _one_file(revision, found[0]) if files else _tree(revision, found[0])


def may_hold_an_adapter(name: str, names: Collection[str]) -> bool:
    """Whether a file is one of tensors, by its suffix or its sidecar, and neither a model's nor left by a training."""
    tensors = name.endswith(TENSORS) or f"{name}{sidecar.SUFFIX}" in names
    return tensors and not _OF_TRAINING.match(name) and not _OF_A_MODEL.match(name)


def _tree(revision: Revision, folder: str) -> Choice:
    return Choice(tuple(revision.below(folder)), folder)


def _one_file(revision: Revision, name: str) -> Choice:
    """A file, with what belongs to it: its sidecar, the configuration beside it, and the other shards."""
    folder = parent(name)
    names = directly(revision, folder)
    leaf = PurePosixPath(name).name
    beside = [leaf, f"{leaf}{sidecar.SUFFIX}", _CONFIG, formats_sidecar(), "flax_adapter.json"]
    shards = re.fullmatch(rf"({_WEIGHTS})-\d+-of-\d+\.(safetensors|bin)", leaf)
    if _RAW.fullmatch(leaf):
        beside += _BESIDE_RAW
    if shards:
        beside += [other for other in names if fnmatch(other, f"{_WEIGHTS}-*-of-*.{shards[2]}")]
        beside += [f"{_WEIGHTS}.{shards[2]}.index.json"]
    return Choice(tuple(join(folder, other) for other in names if other in beside), name)


def directly(revision: Revision, folder: str) -> list[str]:
    """The files directly in a folder, by their own names."""
    found = [_relative(name, folder) for name in revision.below(folder)]
    return [name for name in found if "/" not in name]


def _relative(name: str, folder: str) -> str:
    return name[len(folder) + 1 :] if folder else name


def parent(name: str) -> str:
    """The folder in which a file or folder stands, "" for the repository itself."""
    return name.rpartition("/")[0]


def join(folder: str, name: str) -> str:
    """The name in the repository of a file in a folder."""
    return f"{folder}/{name}" if folder and name else folder or name


def _contents(revision: Revision) -> str:
    names = revision.below(revision.address.inside)
    return f"its files are {few(sorted(names), 4)}" if names else "it is empty"
