"""Where a result goes: whether it may stand there, and how its files get there whole."""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from adaptertools import containers, formats
from adaptertools.adapter import Origin
from adaptertools.containers import sidecar
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.atomic import (
    check_elsewhere,
    check_links,
    publish_files,
    publish_folder,
    staged,
    write_text,
)
from adaptertools.containers.history import IN_HEADER, header_strings
from adaptertools.containers.jsonfile import format_json
from adaptertools.containers.source import Source
from adaptertools.errors import AdapterToolsError, AmbiguousFormatError, DestinationError, DestinationExistsError
from adaptertools.formats import Format

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def check_destination(dst: Path, module: Format, overwrite: bool) -> None:
    """Make sure that a result of this format may stand at `dst`.

    Raises: DestinationExistsError
    """
    check_links(dst)
    check_elsewhere(dst)
    if not dst.exists() or (module.FOLDER and dst.is_dir() and not any(dst.iterdir())):
        return
    if dst.is_dir() != module.FOLDER:
        wanted, found = ("folder", "file") if module.FOLDER else ("file", "folder")
        give = "another name" if module.FOLDER or not module.CONTAINERS else f"another name, or {dst / _usual(module)}"
        raise DestinationExistsError(f"{dst} is a {found}, and this format is written as a {wanted}: give {give}")
    _check_replaceable(dst, module)
    if not overwrite:
        raise DestinationExistsError(f"{dst} exists. overwrite=True (--overwrite) replaces it")


def _check_replaceable(dst: Path, module: Format) -> None:
    """Make sure that what stands at `dst` is an adapter, since nothing else is replaced.

    Raises: DestinationExistsError
    """
    if module.FOLDER and not any(any(dst.glob(pattern)) for pattern in _folder_patterns()):
        raise DestinationExistsError(f"{dst} holds no file of an adapter, so it is not replaced: give another name")
    try:
        formats.detect(Source(dst))
    except AmbiguousFormatError:
        return
    except AdapterToolsError as error:
        raise DestinationExistsError(f"{dst} is no adapter, so it is not replaced: {error}") from error


def check_named(given: object, module: Format) -> None:
    """Make sure that a file has a name: a path that ends with a slash names a folder.

    Raises: DestinationError
    """
    if isinstance(given, str) and given.endswith("/") and not module.FOLDER and module.CONTAINERS:
        raise DestinationError(
            f"{given} names a folder, and this format is written as a file: give {given}{_usual(module)}"
        )


def unusual_name(dst: Path, module: Format, container: str) -> list[str]:
    """A word on the name of a file by which programs do not tell what it is."""
    if module.FOLDER or dst.suffix:
        return []
    return [f"{dst.name} has no suffix, and programs look for one: {dst.name}{containers.get(container).SUFFIX}"]


def _usual(module: Format) -> str:
    return f"adapter{containers.get(module.CONTAINERS[0]).SUFFIX}"


def check_beside(dst: Path, module: Format, origin: Origin | None) -> None:
    """Make sure that a folder `dst` does not lie inside the folder of the adapter that it is made from.

    Raises: DestinationError
    """
    if not module.FOLDER or origin is None or origin.path is None:
        return
    source = origin.path
    if source.resolve() in dst.resolve().parents and any(any(source.glob(pattern)) for pattern in _folder_patterns()):
        raise DestinationError(
            f"{dst} lies inside {source}, the adapter that it is made from, which would then hold two: give a place "
            "outside it"
        )


def left_behind(dst: Path, origin: Origin | None) -> list[str]:
    """A word on what stands beside an adapter in its folder and does not go along: a model card, a checkpoint …"""
    source = origin.path if origin is not None else None
    if origin is None or source is None or not source.is_dir() or (dst.exists() and dst.samefile(source)):
        return []
    if origin.container == "orbax":  # the folder is the checkpoint
        return []
    own = (*formats.get(origin.format).FILES, *_read_from(source, origin))
    beside = (entry for entry in source.iterdir() if not entry.name.startswith(".") and entry != dst)
    names = sorted((entry.is_dir(), entry.name) for entry in beside)
    foreign = [(is_dir, name) for is_dir, name in names if not any(fnmatch(name, pattern) for pattern in own)]
    below = len(foreign) == len(names)  # the adapter stands in one of the folders
    others = [f"{name}/" if is_dir else name for is_dir, name in foreign if not (is_dir and below)]
    shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    return [f"not carried along from {origin.label}: {shown}"] if others else []


def _read_from(source: Path, origin: Origin) -> list[str]:
    """The tensor files of a folder whose format names none of its own: they are the adapter if there is just one."""
    if formats.get(origin.format).FOLDER:
        return []
    held = Source(source).tensor_names
    return [name + suffix for name in held for suffix in ("", sidecar.SUFFIX)] if len(held) == 1 else []


def default_container(module: Format, dst: Path) -> str:
    """The container that the name of a one-file destination asks for, else the format's first."""
    named = (name for name in module.CONTAINERS if not module.FOLDER and dst.suffix == containers.get(name).SUFFIX)
    return next(named, next(iter(module.CONTAINERS), "none"))


def _folder_patterns() -> list[str]:
    """The names of the files that belong to an adapter in a folder of its own, whatever its format."""
    modules = [formats.get(name) for name in formats.names()]
    return [pattern for module in modules if module.FOLDER for pattern in module.FILES]


def store(
    artifact: Artifact,
    module: Format,
    container: str,
    dst: Path,
    history: list[dict[str, Any]],
    on_progress: Progress | None,
) -> int:
    """Write the files of an artifact beside `dst` and move them there. Returns the bytes of these files."""
    total = sum(tensor.nbytes for tensor in artifact.tensors.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    metadata, documents = _with_history(artifact, container, history)
    metadata |= artifact.hashes() if artifact.hashes else {}
    with staged(dst) as staging:
        weights = staging / (artifact.stem + containers.get(container).SUFFIX if module.FOLDER else dst.name)
        containers.get(container).write(weights, artifact.tensors, metadata, advance)
        if module.FOLDER:
            for name, document in documents.items():
                write_text(staging / name, format_json(document))
            stored = files_size(staging)
            publish_folder(staging, dst, _folder_patterns())
        else:
            for suffix, document in documents.items():
                write_text(staging / (dst.name + suffix), format_json(sidecar.bind(document, weights, dst)))
            stored = files_size(staging)
            publish_files(staging, dst, [*(dst.name + suffix for suffix in documents), dst.name])
    return stored


def foreseen_size(
    artifact: Artifact, module: Format, container: str, dst: Path | None, history: list[dict[str, Any]]
) -> int:
    """The bytes of the files that `store` would write, to the byte; at no place in particular if `dst` is None."""
    metadata, documents = _with_history(artifact, container, history)
    if not module.FOLDER:
        documents = {suffix: sidecar.foreseen(document, dst) for suffix, document in documents.items()}
    described = sum(len(format_json(document).encode()) for document in documents.values())
    return described + containers.get(container).size(artifact.tensors, metadata)


def _with_history(
    artifact: Artifact, container: str, history: list[dict[str, Any]]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The metadata and the documents of an artifact, one of which carries the history."""
    metadata, documents = dict(artifact.metadata), {name: dict(doc) for name, doc in artifact.documents.items()}
    if history and container in IN_HEADER:
        metadata |= header_strings(history, metadata)
    elif history:
        documents.setdefault(artifact.sidecar, {})["history"] = history
    return metadata, documents


def files_size(folder: Path) -> int:
    """The bytes of all files in a folder and below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def source_size(origin: Origin) -> int | None:
    """The bytes of the files that an adapter was read from; None where they cannot be told from others."""
    path, module = origin.path, formats.get(origin.format)
    if path is None:
        return None
    if path.is_file() and not module.FOLDER:
        beside = path.with_name(path.name + sidecar.SUFFIX)
        return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
    if not path.is_dir() or not module.FOLDER:
        return None
    found = {entry for pattern in module.FILES for entry in path.glob(pattern)}
    return sum(files_size(entry) if entry.is_dir() else entry.stat().st_size for entry in found) or None
