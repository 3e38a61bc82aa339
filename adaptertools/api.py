"""One call each: read, write and convert adapters, for a path or for tensors in memory."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptertools import formats
from adaptertools.adapter import Adapter, HistoryEntry, expect_adapter, merge_notes, parse_feature
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.source import Source, as_path
from adaptertools.destination import (
    Progress,
    check_beside,
    check_destination,
    default_container,
    foreseen_size,
    left_behind,
    store,
)
from adaptertools.encoding import Encoder, Loss
from adaptertools.errors import OptionError
from adaptertools.operations.select import left_out, select
from adaptertools.tensors import materialize, parse_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReport:
    """What was written, and what it lost: `losses` has an entry for every tensor that was scaled or cast.

    `nbytes` are those of the tensors, `nbytes_on_disk` those of all files that were written. `dropped` is what the
    caller gave up, `left_out` what a selection left behind.
    """

    path: Path
    format: str
    container: str
    nbytes: int
    nbytes_on_disk: int
    modules: int
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    source_format: str | None = None

    @property
    def exact(self) -> bool:
        """Whether not one bit was lost."""
        return all(loss.exact for loss in self.losses)

    @property
    def max_relative_error(self) -> float:
        """The largest relative error of any element."""
        return max((loss.max_relative_error for loss in self.losses), default=0.0)


def read(
    path: str | Path,
    *,
    format: str | None = None,
    alpha: float | None = None,
    slots: str | None = None,
    base: str | Path | None = None,
    **options: Any,
) -> Adapter:
    """Read an adapter. Its tensors are mapped from disk where the container allows it; values are not looked at.

    `format` is told by the content unless given. `alpha` is for files that cannot state it; `slots` for fused
    projections of loralib files; `base` is a base model whose headers settle names and shapes; `options` are those of
    the format itself.

    Memory: headers only, for safetensors, npz and torch files
    Raises: AdapterToolsError
    """
    source = Source(as_path(path))
    name = format or formats.detect(source)
    given = {"alpha": alpha, "slots": slots, "base": Checkpoint.open(as_path(base)) if base is not None else None}
    return _read(source, name, {key: value for key, value in given.items() if value is not None}, options)


def from_state_dict(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, format: str, **options: Any
) -> Adapter:
    """The adapter that these tensors and this configuration describe, as if read from a file of the format.

    Raises: AdapterToolsError
    """
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise OptionError(f"{key!r} is {type(tensor).__name__}, expected a torch.Tensor")
    module = formats.get(format)
    name = module.CONFIG if module.FOLDER else f"memory{module.CONFIG}"
    source = Source.in_memory(tensors, {name: config} if config is not None else {})
    return _read(source, format, {}, options)


def to_state_dict(
    adapter: Adapter, *, format: str, dtype: str | torch.dtype | None = None, drop: Collection[str] = (), **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration that the format would write.

    Memory: every tensor
    Raises: UnsupportedFeatureError if the format cannot carry the adapter
    """
    module = formats.get(format)
    encoder = Encoder(_dtype(dtype))
    artifact = _encode(without(adapter, drop), format, encoder, container=None, options=options)
    tensors = {name: materialize(tensor) for name, tensor in artifact.tensors.items()}
    return tensors, dict(artifact.documents.get(module.CONFIG, {}))


def write(
    adapter: Adapter,
    path: str | Path,
    *,
    format: str,
    container: str | None = None,
    dtype: str | torch.dtype | None = None,
    drop: Collection[str] = (),
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    operation: HistoryEntry | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> WriteReport:
    """Write an adapter. The result appears whole or not at all.

    `drop` names the features to give up where the format cannot carry them. `operation` is what made this adapter; it
    enters the history together with the error that writing added.

    Memory: two tensors, beside the adapter itself
    Raises: UnsupportedFeatureError, NonFiniteError, DestinationExistsError, DestinationError
    """
    expect_adapter(adapter)
    dst = as_path(path)
    module = formats.get(format)
    check_destination(dst, module, overwrite)
    check_beside(dst, module, adapter.origin)
    encoder = Encoder(_dtype(dtype), allow_nonfinite=allow_nonfinite)
    kept, given_up = without(adapter, drop), [kind for kind in drop if adapter.holders(parse_feature(kind))]
    container = container or default_container(module, dst)
    artifact = _encode(kept, format, encoder, container=container, options=options)
    history = _history(kept, operation, format, given_up, encoder.losses)
    behind = left_behind(dst, module, adapter.origin) if adapter.origin and adapter.origin.format == format else []
    unheld = [f"nothing to drop: the adapter holds no {kind}" for kind in drop if kind not in given_up]
    nbytes_on_disk = store(artifact, module, container, dst, history, on_progress)
    return WriteReport(
        path=dst,
        format=format,
        container=container,
        nbytes=sum(tensor.nbytes for tensor in artifact.tensors.values()),
        nbytes_on_disk=nbytes_on_disk,
        modules=len(kept.modules),
        losses=tuple(encoder.losses),
        notes=merge_notes(adapter.notes, artifact.notes, behind, unheld),
        dropped=tuple(
            f"{feature}: {name}" for feature in map(parse_feature, drop) for name in adapter.holders(feature)
        ),
    )


def stored_size(
    adapter: Adapter,
    *,
    format: str,
    container: str | None = None,
    dtype: str | torch.dtype | None = None,
    drop: Collection[str] = (),
    path: str | Path | None = None,
    **options: Any,
) -> int:
    """How many bytes all files take that `write` makes of the adapter; the options are those of `write`.

    `path` is where it is to stand. It matters where a file with a sidecar is replaced, which keeps a record of it.

    Memory: none; the values of what would be folded are read
    Raises: UnsupportedFeatureError if the format cannot carry the adapter
    """
    expect_adapter(adapter)
    kept, module = without(adapter, drop), formats.get(format)
    given_up = [kind for kind in drop if adapter.holders(parse_feature(kind))]
    dst = None if path is None else as_path(path)
    container = container or default_container(module, dst or Path())
    encoder = Encoder(_dtype(dtype), allow_nonfinite=True)
    artifact = _encode(kept, format, encoder, container=container, options=options)
    history = _history(kept, None, format, given_up, encoder.losses)
    return foreseen_size(artifact, module, container, dst, history)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    read_options: Mapping[str, Any] | None = None,
    **write_options: Any,
) -> WriteReport:
    """Read an adapter and write it in another format. `only`, `exclude` and `rename` are those of `select`.

    Raises: AdapterToolsError
    """
    adapter = read(src, **(read_options or {}))
    assert adapter.origin is not None
    chosen = select(adapter, only=only, exclude=exclude, rename=rename) if only or exclude or rename else adapter
    details = {"from": adapter.origin.format, "to": to}
    entry = HistoryEntry(operation="convert", source=Path(src).name, details=details)
    report = write(chosen, dst, format=to, operation=entry, **write_options)
    return replace(
        report,
        source_format=adapter.origin.format,
        left_out=left_out(adapter, only=only, exclude=exclude),
    )


def without(adapter: Adapter, drop: Collection[str]) -> Adapter:
    """The adapter with the named features given up.

    Raises: OptionError for an unknown name
    """
    for name in drop:
        adapter = adapter.without(parse_feature(name))
    return adapter


def give_up(adapter: Adapter, drop: Collection[str]) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter without the named features that it holds, as its history then says; and what held them, by name.

    For an operation that has to see the adapter as it will be written.

    Raises: OptionError for an unknown name
    """
    held = {kind: names for kind in drop if (names := adapter.holders(parse_feature(kind)))}
    kept = without(adapter, drop)
    if held:
        kept = kept.then(HistoryEntry(operation="drop", details={"dropped": sorted(held)}))
    return kept, tuple(f"{kind}: {name}" for kind, names in held.items() for name in names)


def detect(path: str | Path) -> str:
    """The name of the format of the adapter at `path`, told by its content.

    Raises: SourceNotFoundError, UnknownFormatError, AmbiguousFormatError
    """
    return formats.detect(Source(as_path(path)))


def oddities(path: str | Path, *, format: str, **options: Any) -> tuple[str, ...]:
    """What is odd about the files of an adapter and shows only in values: two copies of the weights that differ.

    Memory: none; the values of the files are read
    Raises: AdapterToolsError
    """
    look = getattr(formats.get(format), "oddities", None)
    if look is None:
        return ()
    known = option_types(look, ())
    found: tuple[str, ...] = look(Source(as_path(path)), **{key: options[key] for key in options if key in known})
    return found


def read_options(format: str) -> dict[str, inspect.Parameter]:
    """The options of a format's reader that are its own: `alpha`, `slots` and `base` are those of every reader."""
    return option_types(formats.get(format).read, ("alpha", "slots", "base"))


def reads_with(format: str, option: str) -> bool:
    """Whether a format's reader takes `alpha`, `slots`, `base`, or an option of its own."""
    return option in option_types(formats.get(format).read, ())


def write_options(format: str) -> dict[str, inspect.Parameter]:
    """The options of a format's writer that are its own."""
    return option_types(formats.get(format).write, ("container",))


def option_types(function: Callable[..., Any], reserved: Collection[str]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a format's `read` or `write` that are its own options."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in reserved}


def _read(source: Source, name: str, given: Mapping[str, Any], options: Mapping[str, Any]) -> Adapter:
    module = formats.get(name)
    accepted = option_types(module.read, ())
    for key in {**given, **options}:
        if key not in accepted and key != "base":
            raise OptionError(f"reading {name} takes no {key!r}; it takes {', '.join(accepted) or 'no option'}")
    return module.read(source, **{key: value for key, value in {**given, **options}.items() if key in accepted})


def _encode(
    adapter: Adapter, name: str, encoder: Encoder, *, container: str | None, options: Mapping[str, Any]
) -> Artifact:
    module = formats.get(name)
    if not module.CONTAINERS:
        raise OptionError(f"{name} can be read, not written")
    if container is not None and container not in module.CONTAINERS:
        raise OptionError(f"{name} is written as {', '.join(module.CONTAINERS)}, not as {container}")
    accepted = option_types(module.write, ("container",))
    for key in options:
        if key not in accepted:
            raise OptionError(f"writing {name} takes no {key!r}; it takes {', '.join(accepted) or 'no option'}")
    formats.check_features(adapter, name)
    return module.write(adapter, encoder, container=container or module.CONTAINERS[0], **options)


def _history(
    adapter: Adapter, operation: HistoryEntry | None, format: str, drop: Collection[str], losses: list[Loss]
) -> list[dict[str, Any]]:
    """The history as it is stored: that of the adapter, and what writing does to it."""
    history = [entry.to_json() for entry in adapter.history]
    if operation is not None or losses or drop:
        history.append(_describe(operation or HistoryEntry(operation="write"), format, drop, losses))
    return history


def _describe(operation: HistoryEntry, format: str, drop: Collection[str], losses: list[Loss]) -> dict[str, Any]:
    details: dict[str, Any] = {"format": format, **operation.details}
    if drop:
        details["dropped"] = sorted(drop)
    if losses:
        details["exact"] = all(loss.exact for loss in losses)
        details["max_relative_error"] = max(loss.max_relative_error for loss in losses)
    return replace(operation, details=details).to_json()


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    return parse_dtype(dtype) if isinstance(dtype, str) else dtype
