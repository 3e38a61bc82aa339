"""Where a merged model may be put: never into its base, and never over anything but an earlier merge."""

import glob
from collections.abc import Iterable
from pathlib import Path

from adaptertools.containers.atomic import check_elsewhere, check_links
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.jsonfile import read_json
from adaptertools.errors import DestinationExistsError, FileError
from adaptertools.merging.record import NAME

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".index.json")
"""Files that would be taken for a part of the model if they stood beside it."""


def check_apart(base: Checkpoint, dst: Path, adapters: Iterable[Path] = ()) -> None:
    """Make sure that writing `dst` cannot touch the base model, nor put it into one of the adapters' folders.

    Raises: DestinationExistsError
    """
    check_links(dst)
    place, folder = dst.resolve(), base.folder.resolve()
    if not place.name:
        raise DestinationExistsError(f"{dst} is the root of the file system: give the name of a folder")
    if place == folder or folder in place.parents:
        raise DestinationExistsError(f"{dst} lies in the base model {base.label}, which is never written to")
    for adapter in adapters:
        if adapter.is_dir() and adapter.resolve() in place.parents:
            raise DestinationExistsError(f"{dst} lies in {adapter}, an adapter that is merged: give a place outside it")
    if place in folder.parents:
        raise DestinationExistsError(f"{dst} holds the base model {base.label}: give another name")
    check_elsewhere(dst)


def check_free(dst: Path, overwrite: bool) -> None:
    """Make sure that nothing but an earlier merge stands at `dst`, and that one only where it may be replaced.

    Raises: DestinationExistsError
    """
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not dst.is_dir():
        raise DestinationExistsError(f"{dst} is a file, and a merged model is a folder: give another name")
    if not (dst / NAME).is_file():
        raise DestinationExistsError(
            f"{dst} exists and holds no {NAME}, so it is not replaced: give another name for the result"
        )
    theirs = set(_written(dst))
    foreign = sorted(entry.name for entry in dst.iterdir() if entry.name.endswith(WEIGHTS))
    foreign = [name for name in foreign if name not in theirs]
    if foreign:
        raise DestinationExistsError(
            f"{dst} holds {foreign[0]}, which the merge there did not write, so it is not replaced: give another name"
        )
    if not overwrite:
        raise DestinationExistsError(f"{dst} exists. overwrite=True (--overwrite) replaces an earlier merge")


def replaced_files(dst: Path) -> tuple[str, ...]:
    """Patterns of the files of an earlier merge, which go when a new one takes its place; others stay."""
    return tuple(glob.escape(name) for name in _written(dst))


def _written(dst: Path) -> list[str]:
    """The files that the record of a merge names as its own."""
    try:
        files = read_json(dst / NAME).get("files")
    except (FileError, OSError):
        return []
    return [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
