"""The files of a result before they are written: their headers, and where each of their bytes comes from."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adaptertools.containers import safetensors
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.jsonfile import read_json
from adaptertools.containers.tensorfile import file_size
from adaptertools.errors import UnsafeFileError
from adaptertools.merging.plan import MergePlan, OutputShard

CHUNK_BYTES = 32 << 20
"""What is copied at a time."""

_NUMBERED = re.compile(r"-\d{5}-of-\d{5}$")
_PYTORCH = {"format": "pt"}
"""What model libraries ask a header for, to know whose tensors these are."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of the base that stand in the result as they are: `nbytes` from `begin` of `source` to `offset`."""

    source: Path
    begin: int
    offset: int
    nbytes: int

    def chunks(self) -> Iterator["Copy"]:
        """The same in pieces of bounded size."""
        for done in range(0, self.nbytes, CHUNK_BYTES):
            nbytes = min(CHUNK_BYTES, self.nbytes - done)
            yield Copy(self.source, self.begin + done, self.offset + done, nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A file of the result, settled to the byte.

    `header` is written first, unless it is the base's own and among the `copies`. `edited` are the tensors that an edit
    makes, `moved` those of the base that do not lie in one piece of a file, each with its offset.
    """

    name: str
    size: int
    header: bytes = field(default=b"", repr=False)
    copies: tuple[Copy, ...] = ()
    edited: Mapping[str, int] = field(default_factory=dict)
    moved: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    """A tensor of the result by what its header says."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


def lay_out(plan: MergePlan, shard: OutputShard) -> Layout:
    """Where the bytes of one file of the result come from.

    Raises: UnsupportedFeatureError for a dtype that safetensors does not know
    """
    if shard.name != Path(shard.name).name or shard.name in ("", ".", ".."):
        raise UnsafeFileError(f"{plan.base.label}: the shard {shard.name!r:.80} would lie outside its folder")
    return _patched(plan, shard) if shard.patches else _new(plan, shard)


def sources_of(plan: MergePlan, layout: Layout) -> tuple[Path, ...]:
    """The files of the base that a file of the result is made of."""
    found = [copy.source for copy in layout.copies]
    for name in (*layout.moved, *layout.edited):
        source = plan.edits[name].source if name in plan.edits else name
        if source is not None:
            place = plan.base.places[source]
            holding = (file for file in plan.base.files if source in plan.base.tensors_of[file.name])
            found.append(place.path if place is not None else next(holding))
    return tuple(dict.fromkeys(found))


def changes_in_place(plan: MergePlan, layout: Layout) -> bool:
    """Whether a file of the result is one of the base, but for tensors that are made of what stands in their place."""
    made_of_themselves = all(plan.edits[name].source in (name, None) for name in layout.edited)
    return not layout.header and not layout.moved and made_of_themselves


def _patched(plan: MergePlan, shard: OutputShard) -> Layout:
    """The base's file, with other bytes where edits are."""
    base = plan.base
    path = next(path for path in base.files if path.name == shard.name)
    size = file_size(path)
    spans = {name: place for name in shard.tensors if name in plan.edits and (place := base.places[name]) is not None}
    copies = []
    end = 0
    for place in sorted(spans.values(), key=lambda place: place.offset):
        copies.append(Copy(path, end, end, place.offset - end))
        end = place.offset + place.nbytes
    copies.append(Copy(path, end, end, size - end))
    edited = {name: place.offset for name, place in spans.items()}
    return Layout(name=shard.name, size=size, copies=tuple(copy for copy in copies if copy.nbytes), edited=edited)


def _new(plan: MergePlan, shard: OutputShard) -> Layout:
    """A file with a header of its own."""
    base = plan.base
    described = {name: _describe(plan, name) for name in shard.tensors}
    header, offsets = safetensors.lay_out(shard.name, described, _metadata(base, shard))
    copies, moved = [], {}
    for name, offset in offsets.items():
        place = base.places.get(name)
        if name in plan.edits:
            continue
        if place is None:
            moved[name] = offset
        elif place.nbytes:
            copies.append(Copy(place.path, place.offset, offset, place.nbytes))
    return Layout(
        name=shard.name,
        size=len(header) + sum(tensor.nbytes for tensor in described.values()),
        header=header,
        copies=tuple(copies),
        edited={name: offset for name, offset in offsets.items() if name in plan.edits},
        moved=moved,
    )


def _describe(plan: MergePlan, name: str) -> _Described:
    edit = plan.edits.get(name)
    shape, dtype = (edit.shape, edit.dtype) if edit else (plan.base.shapes[name], plan.base.dtypes[name])
    return _Described(shape=shape, dtype=dtype, nbytes=math.prod(shape) * dtype.itemsize)


def _metadata(base: Checkpoint, shard: OutputShard) -> dict[str, str]:
    """What the header of the base's file of this name says beside tensors."""
    own = next((path for path in base.files if path.name == shard.name and base.container == safetensors.NAME), None)
    if own is None:
        return dict(_PYTORCH)
    metadata = safetensors.read_header(own)[0].get("__metadata__") or {}
    return {**_PYTORCH, **{str(key): str(value) for key, value in metadata.items()}}


def weight_map(plan: MergePlan) -> dict[str, str]:
    """The file of each tensor."""
    return {name: shard.name for shard in plan.shards for name in shard.tensors}


def index_file(plan: MergePlan) -> tuple[str, dict[str, object] | None] | None:
    """The name of the result's index and its content, None for content that is the base's, byte for byte.

    A result of one file has an index only where the base has one.
    """
    base = plan.base
    if len(plan.shards) == 1 and not (base.index and plan.shards[0].patches):
        return None
    total = plan.bytes_written
    mapped = weight_map(plan)
    old = read_json(base.index) if base.index else {}
    own = base.container == safetensors.NAME and base.index is not None
    name = base.index.name if own and base.index else f"{_stem(plan.shards[0].name)}.safetensors.index.json"
    stated = old.get("metadata")
    said: dict[str, object] = stated if isinstance(stated, dict) else {}
    if own and old.get("weight_map") == mapped and said.get("total_size") == total:
        return name, None
    kept = {key: value for key, value in said.items() if key not in ("total_size", "total_parameters")}
    if "total_parameters" in said:
        kept["total_parameters"] = sum(
            math.prod(_describe(plan, name).shape) for shard in plan.shards for name in shard.tensors
        )
    ordered = dict(sorted(mapped.items()))
    return name, {**old, "metadata": {**kept, "total_size": total}, "weight_map": ordered}


def _stem(name: str) -> str:
    return _NUMBERED.sub("", name.removesuffix(".safetensors"))
