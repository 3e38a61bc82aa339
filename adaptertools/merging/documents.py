"""The small files of a merged model: configuration, index, record, and what travels along from the base."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptertools.containers.atomic import explained, sync
from adaptertools.containers.checkpoint import CONFIG
from adaptertools.containers.jsonfile import format_json, read_json
from adaptertools.containers.tensorfile import reading
from adaptertools.merging.plan import MergePlan
from adaptertools.merging.record import NAME
from adaptertools.merging.resume import PART
from adaptertools.merging.shards import index_file
from adaptertools.merging.workers import copy_range


def beside(plan: MergePlan) -> tuple[str, ...]:
    """The names of the small files, without the record."""
    return tuple(dict.fromkeys([*_moved(plan), *_made(plan)]))


def write_documents(plan: MergePlan, folder: Path, record: Mapping[str, Any], *, flush: bool) -> None:
    """Write them into the folder; what makes a model of it, the configuration, at the very end.

    A configuration that a killed run left goes first, so that there is none beside a file in the making.

    Raises: DestinationError
    """
    with explained(folder):
        (folder / CONFIG).unlink(missing_ok=True)
    moved = {name: plan.base.folder / name for name in _moved(plan)}
    contents = {**_made(plan), NAME: format_json(record).encode()}
    for name in sorted({**moved, **contents}, key=lambda name: name == CONFIG):
        target = folder / name
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + PART)
            if name in contents:
                part.write_bytes(contents[name])
            else:
                _copy(moved[name], part)
            if flush:
                sync(part)
            part.replace(target)


def _moved(plan: MergePlan) -> list[str]:
    """The files that are the base's own."""
    return [name for name in plan.copied if name not in _made(plan)]


def _made(plan: MergePlan) -> dict[str, bytes]:
    """The configuration where it changes, and the index where there is one."""
    made = {}
    if index := index_file(plan):
        name, document = index
        made[name] = _base_index(plan) if document is None else _in_order(document)
    if plan.config:
        made[CONFIG] = _in_order({**read_json(plan.base.folder / CONFIG), **plan.config})
    return made


def _base_index(plan: MergePlan) -> bytes:
    assert plan.base.index is not None
    with reading(plan.base.index):
        return plan.base.index.read_bytes()


def _in_order(document: Mapping[str, Any]) -> bytes:
    """JSON in the order of the base's own file."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _copy(source: Path, target: Path) -> None:
    with reading(source):
        handle = os.open(source, os.O_RDONLY)
    try:
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            copy_range(handle, source, 0, out, 0, os.fstat(handle).st_size)
        finally:
            os.close(out)
    finally:
        os.close(handle)
