"""Which file of a source is the Flax adapter, and what its sidecar says."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaptertools.containers.history import HEADER_KEY
from adaptertools.containers.jsonfile import parse_object
from adaptertools.containers.source import Source
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.dialects.flax import sidecar as flax_sidecar
from adaptertools.dialects.flax.sidecar import Sidecar
from adaptertools.dialects.flax.tree import Dialect, certain, recognise
from adaptertools.errors import AmbiguousFormatError, ConfigError, FileError, UnknownFormatError, count

CONTAINERS = ("msgpack", "npz", "safetensors", "orbax")
_MEMORY = "memory"
_MLX_STEM = "adapters"
_MLX_CONFIG_NAME = "adapter_config.json"
_MLX_CONFIG = ("lora_parameters", "fine_tune_type", "adapter_path")
_WRITTEN = (Dialect.NNX, Dialect.QWIX, Dialect.GEMMA)
"""What a sidecar may say. One that says anything else is wrong, and the format `flax` reports it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The adapter's file, its dialect, and its sidecar where it has one."""

    file: TensorFile
    path: Path | None
    dialect: Dialect
    sidecar: Sidecar | None


def detect(source: Source, dialects: Collection[Dialect]) -> bool:
    """Whether the source holds a Flax adapter of one of these dialects, told by its sidecar or by its leaves."""
    if _described(source):
        document = source.document(flax_sidecar.NAME) or {}
        dialect = document.get("dialect")
        return dialect in dialects if dialect in _WRITTEN else Dialect.NNX in dialects
    return bool(_matching(source, dialects))


def find(source: Source, dialects: Collection[Dialect], name: str) -> Found:
    """The one Flax adapter of a source that is to be read as the format `name`.

    Raises: UnknownFormatError, AmbiguousFormatError, ConfigError for a malformed sidecar
    """
    described = _described(source)
    candidates = described or _matching(source, dialects) or _files(source)
    if len(candidates) > 1:
        raise AmbiguousFormatError(
            f"{source.label}: {' and '.join(candidates)} may each be the adapter; name one of them"
        )
    if not candidates:
        raise UnknownFormatError(f"{source.label}: no file in it can hold a Flax adapter")
    file = source.tensors(candidates[0])
    sidecar = _sidecar(source, file, described=bool(described))
    dialect = sidecar.dialect if sidecar else recognise(file)
    if dialect is None:
        raise UnknownFormatError(
            f"{file.label}: none of its {count(len(file.tensors), 'tensor')} is a LoRA factor as Flax's libraries name "
            "them"
        )
    if dialect in (Dialect.NNX, Dialect.LINEN) and not sidecar and not certain(file):
        _refuse_mlx(source, file, candidates[0])
    if dialect not in dialects:
        raise UnknownFormatError(f"{file.label}: its leaves are of the {dialect} dialect, which {name} is not")
    path = source.root / candidates[0] if source.root else None
    return Found(file=file, path=path, dialect=dialect, sidecar=sidecar)


def _refuse_mlx(source: Source, file: TensorFile, name: str) -> None:
    """Dotted names are read where they were asked for, unless what stands around them is MLX's: it has a scale."""
    said = [key for key in _MLX_CONFIG if key in (source.document(_MLX_CONFIG_NAME) or {})]
    if said:
        reason = f"{_MLX_CONFIG_NAME} beside it has {', '.join(said)}"
    elif PurePosixPath(name).stem == _MLX_STEM:
        reason = f"{PurePosixPath(name).name} is MLX's file name, without a header that says format=flax"
    else:
        return
    raise UnknownFormatError(
        f"{file.label}: an MLX adapter, not a Flax one: its names have dots, like {next(iter(file.tensors))}, and "
        f"{reason}. MLX scales by a number that its configuration states, and is not read here; rename or move a file "
        "that is Flax's all the same"
    )


def _files(source: Source) -> list[str]:
    return [name for name in source.file_names if source.container(name) in (*CONTAINERS, _MEMORY)]


def _described(source: Source) -> list[str]:
    """The files that a sidecar beside them speaks of."""
    if source.document(flax_sidecar.NAME) is None:
        return []
    return [
        name
        for name in source.file_names
        if name != flax_sidecar.NAME and (name == _MEMORY or PurePosixPath(name).stem == flax_sidecar.STEM)
    ]


def _matching(source: Source, dialects: Collection[Dialect]) -> list[str]:
    """The files whose leaves are of one of these dialects beyond doubt.

    In a folder, a damaged file may be anybody's; a damaged file that was named itself is an error.
    """
    found = []
    for name in source.file_names:
        try:
            if source.container(name) not in (*CONTAINERS, _MEMORY):
                continue
            file = source.tensors(name)
        except FileError:
            if not source.is_folder:
                raise
            continue
        dialect = recognise(file)
        if dialect in dialects and (dialect not in (Dialect.NNX, Dialect.LINEN) or certain(file)):
            found.append(name)
    return found


def _sidecar(source: Source, file: TensorFile, *, described: bool) -> Sidecar | None:
    """The document beside the file, else the one in its safetensors header."""
    document = source.document(flax_sidecar.NAME) if described else None
    if document is not None:
        return flax_sidecar.parse(f"{source.label}: {flax_sidecar.NAME}", document)
    if HEADER_KEY not in file.metadata:
        return None
    where = f"{file.label}: header entry {HEADER_KEY}"
    document = parse_object(where, file.metadata[HEADER_KEY])
    if "format" not in document:
        return None
    if document["format"] != flax_sidecar.FORMAT:
        raise ConfigError(f"{where}: format {document['format']!r}, expected {flax_sidecar.FORMAT!r}")
    return flax_sidecar.parse(where, document)
