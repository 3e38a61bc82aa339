"""`pull`: an adapter or a model of the Hub becomes a folder of ordinary files, or is made ready in the shared cache."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adaptertools import formats
from adaptertools.containers.atomic import explained, publish_folder, staged, sync
from adaptertools.containers.checkpoint import WEIGHTS, Checkpoint
from adaptertools.containers.source import Source, as_path
from adaptertools.errors import (
    AdapterToolsError,
    AmbiguousFormatError,
    DestinationExistsError,
    MissingExtraError,
    OptionError,
)
from adaptertools.hub.address import Address
from adaptertools.hub.cache import RemoteFile
from adaptertools.hub.choice import TENSORS, has_adapter
from adaptertools.hub.download import Choice, check_pickles, choose, located_at
from adaptertools.hub.models import has_model
from adaptertools.hub.revision import Revision, as_given, resolve
from adaptertools.hub.transfer import Progress, download

_LINKED = ".safetensors"
_LINKED_FROM = 1_000_000
_READ_ONLY = 0o444
_MODEL_FILES = (*WEIGHTS, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What came from the Hub, and where it stands. `files` are the bytes of each file by its name in the folder."""

    address: Address
    sha: str
    what: Literal["adapter", "model"]
    format: str | None
    """None for a model, and for an adapter whose files fit several formats."""
    path: Path
    files: dict[str, int]
    fetched: int
    """Bytes that were not in the cache before."""
    linked: tuple[str, ...] = ()
    """Files that are hard links into the cache and therefore read-only."""
    left_out: tuple[str, ...] = ()
    """Files of the same folder that were not fetched."""
    offline: bool = False
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


def pull(
    address: Address | str,
    dst: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_pickle: bool = False,
    copy: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> PullReport:
    """Fetch the adapter or the model at an address: to the folder `dst`, or only to the cache that all tools share.

    Large safetensors files become read-only hard links into the cache, so that they take no second place on disk, where
    the file system allows it and `copy` does not forbid it. Everything is checked before anything stands at `dst`.

    Raises: HubUnavailableError if it stopped half-way: the same call goes on; HubError and what stands below it;
            UnknownFormatError, AmbiguousFormatError, UnsafeFileError, DamagedFileError and the like; DestinationError
    """
    given = as_given(address, revision)
    target = as_path(dst) if dst is not None else None
    if target is not None:
        _check_destination(target, overwrite)
    found = resolve(given, token=token)
    model = has_model(found) and not has_adapter(found)
    before = found.cached.present(found.sha)
    choice = choose(found, "model" if model else "adapter", allow_pickle=allow_pickle)
    download(found, choice, on_progress=on_progress)
    check_pickles(found, choice, allow_pickle=allow_pickle)
    kind, notes = _checked(found, choice, model)
    model = model and kind is None
    linked = _place(found, choice, target, copy) if target is not None else ()
    sizes = {name: (found.snapshot / name).stat().st_size for name in sorted(choice)}
    return PullReport(
        address=given,
        sha=found.sha,
        what="model" if model else "adapter",
        format=kind,
        path=target if target is not None else found.snapshot / choice.at,
        files={_inside(name, choice): size for name, size in sizes.items()},
        fetched=sum(size for name, size in sizes.items() if before.get(name) != RemoteFile(size)),
        linked=linked,
        left_out=tuple(_inside(name, choice) for name in choice.left_out),
        offline=found.offline,
        notes=(*notes, *_remarks(found)),
    )


def _checked(revision: Revision, choice: Choice, model: bool) -> tuple[str | None, tuple[str, ...]]:
    """The format of what was fetched. Headers are read, and names, shapes and sizes checked; values are not."""
    place = located_at(revision, choice)
    source = Source(place)
    if model and not _is_adapter(source):
        Checkpoint.open(place)
        return None, ()
    try:
        for name in choice:
            if "/" not in _inside(name, choice) and (name.endswith(TENSORS) or name == choice.at):
                source.tensors(_inside(name, choice))
        return formats.detect(source), ()
    except AmbiguousFormatError as error:
        return None, (str(error),)
    except MissingExtraError as error:
        return None, (f"not checked: {error}",)


def _is_adapter(source: Source) -> bool:
    """Whether weights that by their name could be a model's are an adapter, as a lone file of loralib's is."""
    try:
        formats.detect(source)
    except AdapterToolsError:
        return False
    return True


def _remarks(revision: Revision) -> tuple[str, ...]:
    if not revision.offline:
        return ()
    known = "" if revision.complete else "; which files the commit has beside those in the cache is not known"
    return (f"offline (HF_HUB_OFFLINE): from the cache, which has {revision.sha}{known}",)


def _check_destination(dst: Path, overwrite: bool) -> None:
    """Make sure that a folder of fetched files may stand at `dst`.

    Raises: DestinationExistsError, OptionError
    """
    if str(dst).startswith("hf:"):
        raise OptionError(f"DST is {dst}, and what is pulled goes to a folder on this machine; push sends to the Hub")
    if dst.resolve() in (here := Path.cwd(), *here.parents):
        raise DestinationExistsError(f"{dst} is, or holds, the current folder and would be swapped: give another name")
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not dst.is_dir():
        raise DestinationExistsError(f"{dst} is a file, and what is pulled stands in a folder: give another name")
    if not overwrite:
        raise DestinationExistsError(f"{dst} exists. overwrite=True (--overwrite) replaces it")
    if not any(any(dst.glob(pattern)) for pattern in _replaced()):
        raise DestinationExistsError(f"{dst} holds no file of an adapter or a model: give another name")


def _replaced() -> list[str]:
    """The names of files that belong to an adapter in a folder of its own, or are weights of a model."""
    modules = [formats.get(name) for name in formats.names()]
    return [*_MODEL_FILES, *(pattern for module in modules if module.FOLDER for pattern in module.FILES)]


def _place(revision: Revision, choice: Choice, dst: Path, copy: bool) -> tuple[str, ...]:
    """Put the files into the folder `dst`, which has all of them or does not change. Returns those that are links."""
    linked = []
    with staged(dst) as staging:
        for name in choice:
            inside = _inside(name, choice)
            source, target = (revision.snapshot / name).resolve(), staging / inside
            with explained(dst):
                target.parent.mkdir(parents=True, exist_ok=True)
                if not copy and _link(source, target):
                    linked.append(inside)
                else:
                    shutil.copyfile(source, target)
                    sync(target)
        publish_folder(staging, dst, _replaced())
    return tuple(linked)


def _link(source: Path, target: Path) -> bool:
    """Link a large file where that can be done. It becomes read-only: what writes into it would change the cache."""
    if not source.name.endswith(_LINKED) and not target.name.endswith(_LINKED):
        return False
    if source.stat().st_size < _LINKED_FROM:
        return False
    try:
        os.link(source, target)
        target.chmod(_READ_ONLY)
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def _inside(name: str, choice: Choice) -> str:
    """The name of a file in the folder that is read."""
    return name[len(choice.folder) + 1 :] if choice.folder else name
