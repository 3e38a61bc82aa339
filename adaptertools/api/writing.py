"""Write adapters: to a path, to an address on the Hub, or as tensors in memory."""

import inspect
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptertools import formats
from adaptertools.adapter import Adapter, HistoryEntry, expect_adapter, merge_notes, parse_feature
from adaptertools.api.places import Given, as_destination
from adaptertools.api.reading import open_base, option_types
from adaptertools.api.sending import container_there, place_there, send
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.history import HEADER_KEY, IN_HEADER, with_settings
from adaptertools.destination import (
    Progress,
    check_beside,
    check_destination,
    check_named,
    default_container,
    foreseen_size,
    left_behind,
    store,
    unusual_name,
)
from adaptertools.encoding import Encoder, Loss
from adaptertools.errors import OptionError
from adaptertools.hub.address import Address
from adaptertools.tensors import materialize, parse_dtype

_HEADERS = ("header", "about", "other", "fields")
"""Where the metadata of an adapter holds the entries of a file's header, and the fields that stand in one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReport:
    """What was written, and what it lost: `losses` has an entry for every tensor that was scaled or cast.

    `path` is the address for what went to the Hub; `commit` is the one that it became there, `url` its page.

    `nbytes` are those of the tensors, `nbytes_on_disk` those of all files that were written. `dropped` is what the
    caller gave up, `left_out` what a selection left behind.
    """

    path: Path | Address
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
    commit: str | None = None
    url: str | None = None

    @property
    def exact(self) -> bool:
        """Whether not one bit was lost."""
        return all(loss.exact for loss in self.losses)

    @property
    def max_relative_error(self) -> float:
        """The largest relative error of any element."""
        return max((loss.max_relative_error for loss in self.losses), default=0.0)


def write(
    adapter: Adapter,
    path: Given,
    *,
    format: str,
    container: str | None = None,
    dtype: str | torch.dtype | None = None,
    drop: Collection[str] = (),
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    operation: HistoryEntry | None = None,
    base: Given | None = None,
    token: str | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> WriteReport:
    """Write an adapter. The result appears whole or not at all.

    `path` may be an address on the Hub, `hf://org/name[@branch][/sub/folder]`: the files become one commit there, with
    a model card; `token` is for that. `overwrite` replaces an adapter that stands there; older commits of the Hub keep
    it. `drop` names the features to give up where the format cannot carry them. `operation` is what made this adapter;
    it enters the history together with the error that writing added. `base` is the base model, here or on the Hub, for
    formats whose names or layout depend on it.

    Memory: two tensors, beside the adapter itself
    Raises: UnsupportedFeatureError, NonFiniteError, DestinationExistsError, DestinationError
    """
    expect_adapter(adapter)
    module = formats.get(format)
    dst = as_destination(path)
    if isinstance(dst, Address):
        how = {"container": container, "dtype": dtype, "drop": drop, "allow_nonfinite": allow_nonfinite, **options}
        how |= {"format": format, "operation": operation, "base": base, "on_progress": on_progress}
        return _write_there(adapter, dst, overwrite, token, how)
    check_named(path, module)
    check_destination(dst, module, overwrite)
    check_beside(dst, module, adapter.origin)
    encoder = Encoder(_dtype(dtype), allow_nonfinite=allow_nonfinite)
    kept, given_up = without(adapter, drop), [kind for kind in drop if adapter.holders(parse_feature(kind))]
    container = container or default_container(module, dst)
    artifact = _encode(kept, format, encoder, container=container, options=options, base=base, token=token)
    history = _history(kept, operation, format, given_up, encoder.losses)
    behind = [*left_behind(dst, adapter.origin), *unusual_name(dst, module, container)]
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
        notes=merge_notes(adapter.notes, artifact.notes, behind, unheld, _not_carried(kept, artifact)),
        dropped=tuple(
            f"{feature}: {name}" for feature in map(parse_feature, drop) for name in adapter.holders(feature)
        ),
    )


def _write_there(
    adapter: Adapter, address: Address, overwrite: bool, token: str | None, how: dict[str, Any]
) -> WriteReport:
    """Write an adapter to the Hub; `how` are the arguments of `write`."""
    module = formats.get(how["format"])
    how["container"] = how["container"] or container_there(address, module)
    folder, name = place_there(address, module, how["container"])
    made: list[WriteReport] = []

    def make(place: Path) -> None:
        made.append(write(adapter, place, token=token, **how))

    done = adapter.history[-1].operation if adapter.history else "write"
    operation = how["operation"].operation if how["operation"] else done
    message = f"{operation} with adaptertools"
    pushed = send(address, how["format"], how["container"], make, overwrite=overwrite, token=token, message=message)
    return replace(
        made[0],
        path=address if module.FOLDER else replace(address, inside=f"{folder.inside}/{name}".lstrip("/")),
        commit=pushed.sha,
        url=pushed.url,
        notes=merge_notes(made[0].notes, pushed.notes),
    )


def to_state_dict(
    adapter: Adapter,
    *,
    format: str,
    dtype: str | torch.dtype | None = None,
    drop: Collection[str] = (),
    base: Given | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration that the format would write; for files without one, the strings of the header.

    Memory: every tensor
    Raises: UnsupportedFeatureError if the format cannot carry the adapter
    """
    expect_adapter(adapter)
    module = formats.get(format)
    encoder = Encoder(_dtype(dtype))
    artifact = _encode(without(adapter, drop), format, encoder, container=None, options=options, base=base)
    tensors = {name: materialize(tensor) for name, tensor in artifact.tensors.items()}
    header = dict(artifact.metadata) | dict(artifact.hashes() if artifact.hashes else {})
    return tensors, dict(artifact.documents.get(module.CONFIG, header if not module.FOLDER else {}))


def stored_size(
    adapter: Adapter,
    *,
    format: str,
    container: str | None = None,
    dtype: str | torch.dtype | None = None,
    drop: Collection[str] = (),
    path: Given | None = None,
    base: Given | None = None,
    token: str | None = None,
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
    given = None if path is None else as_destination(path)
    dst = given if isinstance(given, Path) else None
    container = container or default_container(module, dst or Path())
    encoder = Encoder(_dtype(dtype), allow_nonfinite=True)
    artifact = _encode(kept, format, encoder, container=container, options=options, base=base, token=token)
    history = _history(kept, None, format, given_up, encoder.losses)
    return foreseen_size(artifact, module, container, dst, history)


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


def write_options(format: str) -> dict[str, inspect.Parameter]:
    """The options of a format's writer that are its own."""
    return option_types(formats.get(format).write, ("container", "base"))


def _encode(
    adapter: Adapter,
    name: str,
    encoder: Encoder,
    *,
    container: str | None,
    options: Mapping[str, Any],
    base: Given | None = None,
    token: str | None = None,
) -> Artifact:
    module = formats.get(name)
    if not module.CONTAINERS:
        raise OptionError(f"{name} can be read, not written: convert it to another format first (convert SRC DST --to)")
    if container is not None and container not in module.CONTAINERS:
        raise OptionError(f"{name} is written as {', '.join(module.CONTAINERS)}, not as {container}")
    accepted = write_options(name)
    for key in options:
        if key not in accepted:
            raise OptionError(f"writing {name} takes no {key!r}; it takes {', '.join(accepted) or 'no option'}")
    formats.check_features(adapter, name)
    given = dict(options)
    if base is not None and "base" in option_types(module.write, ()):
        given["base"] = open_base(base, token, format=name)
    container = container or module.CONTAINERS[0]
    artifact: Artifact = module.write(adapter, encoder, container=container, **given)
    return _with_settings(artifact, name, container, adapter.metadata)


def _with_settings(artifact: Artifact, name: str, container: str, metadata: Mapping[str, Any]) -> Artifact:
    """The artifact with what other formats say of the adapter, beside its history: they can then write it again.

    What its own format says is its writer's business.
    """
    others = {home: _without_nothing(said) for home, said in metadata.items() if home != name}
    settings = {home: said for home, said in others.items() if said}
    if not settings or getattr(formats.get(name), "KEEPS_SETTINGS", False):
        return artifact
    if container in IN_HEADER:
        record = with_settings(json.loads(artifact.metadata.get(HEADER_KEY, "{}")), settings)
        return replace(artifact, metadata={**artifact.metadata, HEADER_KEY: json.dumps(record, sort_keys=True)})
    sidecar = with_settings(artifact.documents.get(artifact.sidecar, {}), settings)
    return replace(artifact, documents={**artifact.documents, artifact.sidecar: sidecar})


def _without_nothing(said: Any) -> Any:
    """What a format says, without what is empty."""
    return {key: value for key, value in said.items() if value not in (None, {}, [])} if isinstance(said, dict) else {}


def _not_carried(adapter: Adapter, artifact: Artifact) -> list[str]:
    """What other programs said of the adapter in the header of its file, and what is written does not say."""
    stored = json.dumps([dict(artifact.metadata), dict(artifact.documents)], default=str)
    notes = []
    for home, said in adapter.metadata.items():
        held = [said.get(part) for part in _HEADERS] if isinstance(said, Mapping) else []
        entries = sorted({key for part in held if isinstance(part, Mapping) for key in part} - {"format"})
        lost = [key for key in entries if not re.search(rf'"{re.escape(key)}\\*":', stored)]
        if lost:
            few = ", ".join(lost[:3]) + (" …" if len(lost) > 3 else "")
            notes.append(
                f"metadata of {home} not carried: {len(lost)} {'entry' if len(lost) == 1 else 'entries'} ({few})"
            )
    return notes


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
