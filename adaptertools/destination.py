"""Where a result goes: whether it may stand there, and how its files get there whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptertools import containers, formats
from adaptertools.containers import sidecar
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.atomic import publish_files, publish_folder, staged, write_text
from adaptertools.containers.history import header_strings
from adaptertools.containers.jsonfile import format_json
from adaptertools.containers.source import Source
from adaptertools.errors import AdapterToolsError, AmbiguousFormatError, DestinationExistsError
from adaptertools.formats import Format

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def check_destination(dst: Path, module: Format, overwrite: bool) -> None:
    """Make sure that a result of this format may stand at `dst`.

    Raises: DestinationExistsError
    """
    if dst.resolve() in (here := Path.cwd(), *here.parents):
        raise DestinationExistsError(f"{dst} is, or holds, the current folder and would be swapped: give another name")
    if not dst.exists() or (module.FOLDER and dst.is_dir() and not any(dst.iterdir())):
        return
    if dst.is_dir() != module.FOLDER:
        wanted, found = ("folder", "file") if module.FOLDER else ("file", "folder")
        raise DestinationExistsError(f"{dst} is a {found}, and this format is written as a {wanted}: give another name")
    if not overwrite:
        raise DestinationExistsError(f"{dst} exists. --overwrite replaces it")
    if module.FOLDER and not any(any(dst.glob(pattern)) for pattern in _folder_patterns()):
        raise DestinationExistsError(f"{dst} holds no file of an adapter, so it is not replaced: give another name")
    try:
        formats.detect(Source(dst))
    except AmbiguousFormatError:
        return
    except AdapterToolsError as error:
        raise DestinationExistsError(f"{dst} is no adapter, so it is not replaced: {error}") from error


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
    """Write the files of an artifact beside `dst` and move them there. Returns the bytes of tensors written."""
    total = sum(tensor.nbytes for tensor in artifact.tensors.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    metadata, documents = dict(artifact.metadata), {name: dict(doc) for name, doc in artifact.documents.items()}
    if history and container == "safetensors":
        metadata |= header_strings(history, metadata)
    elif history:
        documents.setdefault(artifact.sidecar, {})["history"] = history
    with staged(dst) as staging:
        weights = staging / (artifact.stem + containers.get(container).SUFFIX if module.FOLDER else dst.name)
        containers.get(container).write(weights, artifact.tensors, metadata, advance)
        if module.FOLDER:
            for name, document in documents.items():
                write_text(staging / name, format_json(document))
            publish_folder(staging, dst, _folder_patterns())
        else:
            for suffix, document in documents.items():
                write_text(staging / (dst.name + suffix), format_json(sidecar.bind(document, weights, dst)))
            publish_files(staging, dst, [*(dst.name + suffix for suffix in documents), dst.name])
    return total
