"""What goes to the Hub of a file or folder: the adapter's or the model's own files, and what others need beside them.

Whatever is not known to belong there stays here, and is named: checkpoints of training, caches, hidden files.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from adaptertools import formats
from adaptertools.adapter import Adapter
from adaptertools.containers import sidecar
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.jsonfile import read_json
from adaptertools.containers.source import Located, Source, located
from adaptertools.errors import (
    AdapterToolsError,
    AmbiguousFormatError,
    MissingAlphaError,
    UnknownFormatError,
    UnsafeFileError,
)
from adaptertools.hub import card
from adaptertools.merging.record import NAME as MERGE_RECORD

_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.tiktoken", "tekken.json", "spiece.model", "sentencepiece*.model", "chat_template*", "*processor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What is of use beside an adapter as well as beside a model, and must be passed on with it."""
_OF_A_MODEL = ("config.json", "generation_config.json", "*.py", MERGE_RECORD)
_BY_WHICH_IT_IS_READ = {"torchtune": ("config.json",)}
"""What says of the base model how an adapter of a format is to be read; never the adapter's own to replace."""
_TEMPLATES = "additional_chat_templates"
_STALE_OF_A_MODEL = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_OF_TRAINING = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "training_args*", "trainer_state*",
    "global_step*", "zero_pp_rank*", "mp_rank*", "checkpoint-*", "runs", "events.out.tfevents*", "wandb", "*.log",
    "all_results.json", "train_results.json", "eval_results.json",
)  # fmt: skip
_SECOND = ("adapter_model*.bin", "adapter_model*.bin.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
_SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_MOST_TEXT = 1 << 20
_TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".npz", ".gguf", ".pth.lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Files by the paths that they get in the repository, what they are, and what stays here."""

    own: Mapping[str, Path]
    """The adapter's or the model's."""
    beside: Mapping[str, Path] = field(default_factory=dict)
    """A tokenizer, a licence: what others need with it."""
    format: str | None
    """Of an adapter; None for a model."""
    adapter: Adapter | None = None
    """As it is read from them; None for a model, and for an adapter whose file does not state its alpha."""
    record: Mapping[str, Any] | None = None
    """What a merge says of itself."""
    config: Mapping[str, Any] | None = None
    """Of a model."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Names, each with the reason."""
    card: Path | None = None
    """The model card beside them."""
    owned: tuple[str, ...] = ()
    """Patterns of names under which earlier versions of these files may stand, to be replaced by these."""

    @property
    def files(self) -> dict[str, Path]:
        """All that goes, without the card."""
        return {**self.own, **self.beside}


def contents_of(given: Path | Located, format: str | None = None) -> Contents:
    """The files of the adapter, or else of the model, at a place.

    Raises: UnknownFormatError, AmbiguousFormatError, and what reading its headers raises; UnsafeFileError
    """
    place = located(given)
    source = Source(place)
    if format is None and holds_model(source):
        return model_contents(place.path)
    name = format or formats.detect(source)
    try:
        adapter = formats.get(name).read(source)
    except MissingAlphaError:  # it can be sent all the same: whoever reads it there has to know
        adapter = None
    return adapter_contents(source, name, adapter)


def holds_model(source: Source) -> bool:
    """Whether a place holds the weights of a model, and no adapter.

    Raises: FileError
    """
    if source.path is None or not source.is_folder:
        return False
    try:
        formats.detect(source)
    except UnknownFormatError:
        return _is_model(source.path)
    except AmbiguousFormatError:
        return False
    return False


def adapter_contents(source: Source, format: str, adapter: Adapter | None) -> Contents:
    """The files of an adapter and what stands beside it sensibly.

    Raises: UnsafeFileError for a file with a token in it
    """
    module = formats.get(format)
    path = source.path
    assert path is not None
    owned = module.FILES if module.FOLDER else ()
    if not source.is_folder:
        own = _with_sidecar(path)
        return _checked(Contents(own=own, format=format, adapter=adapter, owned=owned))
    entries = _entries(path)
    own = _below(entry for entry in entries if any(fnmatch(entry.name, pattern) for pattern in owned))
    if not own:
        own = {
            name: file for entry in entries if _is_weights(entry, source) for name, file in _with_sidecar(entry).items()
        }
    beside = (*_BESIDE, *_BY_WHICH_IT_IS_READ.get(format, ()))
    return _checked(_gathered(path, own, beside, format=format, adapter=adapter, owned=owned))


def model_contents(folder: Path) -> Contents:
    """The files of a model: its weights, its configuration, its tokenizer and its own code.

    Raises: UnknownFormatError, DamagedFileError and the like; UnsafeFileError for a file with a token in it
    """
    model = Checkpoint.open(folder)
    weights = [*model.files, *([model.index] if model.index else [])]
    own = {path.relative_to(folder).as_posix(): path for path in weights}
    record = folder / MERGE_RECORD
    return _checked(
        _gathered(
            folder,
            own,
            (*_BESIDE, *_OF_A_MODEL),
            format=None,
            record=read_json(record) if record.is_file() else None,
            config=model.config,
            owned=_STALE_OF_A_MODEL,
        )
    )


def _is_model(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except UnknownFormatError:
        return False
    return True


def belongs_beside(name: str) -> bool:
    """Whether a file goes with an adapter that is not one of its own: its card, a tokenizer, a licence."""
    return name == card.NAME or any(fnmatch(name, pattern) for pattern in _BESIDE)


def _gathered(folder: Path, own: Mapping[str, Path], beside: Iterable[str], **about: Any) -> Contents:
    """These files of a folder, and those beside them whose names are on the list; the rest is left out."""
    own, kept = _one_kind(own), {}
    left_out, readme = [], None
    for entry in _entries(folder):
        if any(name == entry.name or name.startswith(f"{entry.name}/") for name in own):
            continue
        if entry.name == card.NAME and entry.is_file():
            readme = entry
        elif entry.is_file() and any(fnmatch(entry.name, pattern) for pattern in beside):
            kept[entry.name] = entry
        elif entry.is_dir() and entry.name == _TEMPLATES:
            kept |= {f"{entry.name}/{path.name}": path for path in sorted(entry.glob("*.jinja"))}
        else:
            left_out.append((f"{entry.name}{'/' if entry.is_dir() else ''}", _reason(entry)))
    return Contents(own=own, beside=kept, left_out=tuple(left_out), card=readme, **about)


def _one_kind(own: Mapping[str, Path]) -> dict[str, Path]:
    """Without a second copy of the weights as a pickle, which readers pass over anyway."""
    safe = any(name.endswith(".safetensors") for name in own)
    return {
        name: path for name, path in own.items() if not safe or not any(fnmatch(name, pattern) for pattern in _SECOND)
    }


def _reason(entry: Path) -> str:
    if entry.name.startswith("."):
        return "hidden"
    if any(fnmatch(entry.name, pattern) for pattern in _OF_TRAINING):
        return "state of training"
    if any(fnmatch(entry.name, pattern) for pattern in _SECOND):
        return "a second copy of the weights"
    return "a cache" if entry.name in ("__pycache__", "cache") else "no part of it"


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _below(entries: Iterable[Path]) -> dict[str, Path]:
    """Files, and all that stands in folders that are containers, by their paths."""
    found: dict[str, Path] = {}
    for entry in entries:
        inside = sorted(path for path in entry.rglob("*") if path.is_file()) if entry.is_dir() else [entry]
        found |= {path.relative_to(entry.parent).as_posix(): path for path in inside}
    return found


def _with_sidecar(path: Path) -> dict[str, Path]:
    """An adapter that is one file (or one folder of Orbax's), with what is said of it in the file beside it."""
    beside = path.with_name(path.name + sidecar.SUFFIX)
    return _below([path, *([beside] if beside.is_file() else [])])


def _is_weights(entry: Path, source: Source) -> bool:
    """Whether a file of a folder that no format owns holds tensors that may be an adapter's."""
    if any(fnmatch(entry.name, pattern) for pattern in _OF_TRAINING) or entry.name.startswith("."):
        return False
    try:
        return source.container(entry.name) is not None
    except AdapterToolsError:
        return False


def _checked(contents: Contents) -> Contents:
    """Raises: UnsafeFileError where a text among the files holds a token"""
    readme = {card.NAME: contents.card} if contents.card else {}
    for name, path in {**contents.files, **readme}.items():
        if not name.endswith(_TENSORS) and path.stat().st_size <= _MOST_TEXT and _SECRET.search(path.read_bytes()):
            raise UnsafeFileError(f"{path} holds what looks like a token of the Hub: take it out, and revoke the token")
    return contents
