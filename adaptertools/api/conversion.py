"""An adapter of one format becomes one of another."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptertools.adapter import HistoryEntry
from adaptertools.api.places import Given
from adaptertools.api.reading import read
from adaptertools.api.writing import WriteReport, write
from adaptertools.operations.select import left_out, select


def convert(
    src: Given,
    dst: Given,
    *,
    to: str,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    read_options: Mapping[str, Any] | None = None,
    **write_options: Any,
) -> WriteReport:
    """Read an adapter and write it in another format; both places may be addresses on the Hub.

    `only`, `exclude` and `rename` are those of `select`. A base model among `read_options` counts for writing too.

    Raises: AdapterToolsError
    """
    adapter = read(src, **(read_options or {}))
    assert adapter.origin is not None
    chosen = select(adapter, only=only, exclude=exclude, rename=rename) if only or exclude or rename else adapter
    details = {"from": adapter.origin.format, "to": to}
    entry = HistoryEntry(operation="convert", source=adapter.origin.name, details=details)
    base = (read_options or {}).get("base")
    report = write(chosen, dst, format=to, operation=entry, **{"base": base, **write_options})
    return replace(
        report,
        source_format=adapter.origin.format,
        left_out=left_out(adapter, only=only, exclude=exclude),
    )
