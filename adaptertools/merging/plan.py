"""What happens to which tensor of a base model: complete and checked before a byte of its data is read."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, SupportsFloat

import torch

from adaptertools.adapter import Adapter, merge_notes
from adaptertools.containers.checkpoint import CONFIG, Checkpoint
from adaptertools.containers.pipeline import FACTOR, open_checkpoint
from adaptertools.containers.source import Located
from adaptertools.dialects.peft.base import BaseModel
from adaptertools.errors import MatchError, OptionError, check_flags, count, few
from adaptertools.merging import outputs
from adaptertools.merging.assembly import Assembly, Settings
from adaptertools.merging.edits import Edit
from adaptertools.merging.outputs import OutputShard
from adaptertools.merging.refusals import check_adapter, check_base
from adaptertools.merging.whole import Member
from adaptertools.tensors import DTYPES, dtype_name, parse_dtype

__all__ = ["MergePlan", "OutputShard", "plan_merge"]

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""What the name of a model on the Hub looks like."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergePlan:
    """A merge, settled. `edits` are by the name of the result's tensor; tensors without one are the base's own.

    `config` is what changes in the base's configuration: whole values by their keys at its top. `copied` are the small
    files that travel along, by their paths in the base's folder. `sources` are what messages call the adapters,
    `recorded` what the record calls them, `folders` where they stand. `left_out` are the modules that match nothing,
    which the caller allowed. `notes` are worth saying. Printed, it is a summary.
    """

    base: Checkpoint
    sources: tuple[str, ...]
    recorded: tuple[str, ...]
    weights: tuple[float, ...]
    edits: Mapping[str, Edit]
    shards: tuple[OutputShard, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors of the result."""
        return tuple(name for shard in self.shards for name in shard.tensors)

    @property
    def computed(self) -> tuple[str, ...]:
        """The names of the tensors that something is added to."""
        return tuple(name for name, edit in self.edits.items() if edit.computes)

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of the tensors that adapters change; not those that are only cast."""
        return tuple(name for name, edit in self.edits.items() if edit.computes or edit.rows or edit.source != name)

    @property
    def cast(self) -> tuple[str, ...]:
        """The names of the tensors of which another dtype is all that changes."""
        changed = {*self.changed}
        return tuple(name for name in self.edits if name not in changed)

    def nbytes(self, name: str) -> int:
        """The bytes of one tensor of the result."""
        edit = self.edits.get(name)
        shape = edit.shape if edit else self.base.shapes[name]
        dtype = edit.dtype if edit else self.base.dtypes[name]
        return math.prod(shape) * dtype.itemsize

    @property
    def bytes_read(self) -> int:
        """The bytes of the base's tensors that are read; twice where DoRA's norms run over the rows."""
        total = 0
        for name in self.tensors:
            edit = self.edits.get(name)
            source = name if edit is None else edit.source
            if source is not None:
                passes = 1 + bool(edit and any(each.axis == "column" for each in edit.renormalizations))
                total += passes * math.prod(self.base.shapes[source]) * self.base.dtypes[source].itemsize
        return total

    @property
    def bytes_written(self) -> int:
        """The bytes of the result's tensors."""
        return sum(map(self.nbytes, self.tensors))

    @property
    def adapter_bytes(self) -> int:
        """The memory that factors and whole weights take, each counted once."""
        held = {}
        for edit in self.edits.values():
            tensors = [factor for update in edit.changes for factor in (update.left, update.right)]
            tensors += [each.magnitude for each in edit.renormalizations] + [rows for _, rows in edit.rows]
            tensors += [] if edit.replacement is None else [edit.replacement]
            held.update({(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in tensors})
        return sum(held.values())

    def __repr__(self) -> str:
        merged = f"{count(len(self.sources), 'adapter')} into {self.base.label}"
        return f"<MergePlan: {merged}, {len(self.changed):,} of {count(len(self.tensors), 'tensor')} change>"

    def __str__(self) -> str:
        replaced = [name for name, edit in self.edits.items() if edit.replacement is not None]
        cast = [name for name, edit in self.edits.items() if self._is_cast(edit)]
        held = f"{count(len(self.base.shapes), 'tensor')} in {count(len(self.base.files), 'file')}"
        lines = [
            f"base      {self.base.label}: {held}",
            *(f"adapter   {name}, weight {weight:g}" for name, weight in zip(self.sources, self.weights, strict=True)),
            f"changed   {len(self.changed)} of {len(self.tensors)} tensors",
            f"replaced  {few(replaced)}" if replaced else "",
            f"cast      {count(len(cast), 'tensor')} to {dtype_name(self.edits[cast[0]].dtype)}" if cast else "",
            f"read      {self.bytes_read:,} bytes",
            f"written   {self.bytes_written:,} bytes in {count(len(self.shards), 'file')}",
            f"copied    {count(len(self.copied), 'other file')}",
            f"adapters  {self.adapter_bytes:,} bytes in memory",
            f"config    {few(list(self.config))}" if self.config else "",
            f"left out  {few(self.left_out)}" if self.left_out else "",
            *(f"note      {note}" for note in self.notes),
        ]
        return "\n".join(line for line in lines if line)

    def _is_cast(self, edit: Edit) -> bool:
        return edit.source is not None and edit.dtype != self.base.dtypes[edit.source]


def plan_merge(
    base: str | Path | Located | Checkpoint,
    adapters: Iterable[Adapter],
    weights: Iterable[float] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    allow_unmatched: bool = False,
    untie: bool = False,
    full_weights: int | None = None,
    sources: Sequence[str] | None = None,
) -> MergePlan:
    """Settle what merging adapters into a base model does to each of its tensors.

    Each module is matched to a tensor by name, whatever prefixes and wrappers stand in front, and its orientation told
    by shape. W' = W + Σ weight · scaling · B·A; heads and other whole weights replace those of the base. `dtype` casts
    every floating-point tensor. `allow_unmatched` leaves out what matches nothing. `untie` writes an output head that
    is tied to the embedding as a tensor of its own. `full_weights` is the number of the adapter, from 1 on, whose whole
    weights are taken where several have different ones. `sources` name the adapters in messages.

    Memory: headers of the base; views of the adapters' tensors
    Raises: MatchError for modules that match no tensor, or several; ShapeError, NonFiniteError
            UnsupportedFeatureError for a quantised base and for adapters that no merge can hold
            OptionError for weights that are not one finite number for each adapter, and other dtypes than DTYPES
    """
    if not isinstance(base, str | Path | Located | Checkpoint):
        raise OptionError(
            f"base is {type(base).__name__}, expected the path of a model; merge_into takes weights that are in memory"
        )
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and dtype not in DTYPES.values():
        raise OptionError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    check_flags(allow_unmatched=allow_unmatched, untie=untie)
    opened = open_checkpoint(base)
    members = _members(adapters, weights, sources)
    check_base(opened)
    for member in members:
        check_adapter(member.adapter, member.name)
    settings = Settings(dtype=dtype, allow_unmatched=allow_unmatched, untie=untie, full_weights=full_weights)
    assembly = Assembly(opened, [member for member in members if member.weight], settings)
    assembly.run()
    if assembly.left_out and assembly.draft.is_empty:
        raise MatchError(
            f"{opened.label}: nothing that the adapters hold matches it, such as {assembly.left_out[0]}. Is it the "
            "right base model?"
        )
    edits = assembly.draft.finished()
    config = outputs.configuration(
        opened, untied=assembly.untied, vocabulary=assembly.vocabulary, labels=assembly.labels, dtype=dtype
    )
    copied, left = outputs.copied(opened)
    notes = [f"{member.name} has weight 0 and changes nothing" for member in members if not member.weight]
    notes += _strangers(members, opened)
    if factors := [name for name in opened.shapes if FACTOR.search(name)]:
        notes.append(f"the base holds an adapter of its own, which stays as it is: {few(factors)}")
    notes += [f"left in the base's folder: {few(left)}"] if left else []
    if assembly.labels is not None:
        told = ", as its config.json now says" if "id2label" in config else ""
        notes.append(f"the result's head has {count(assembly.labels, 'label')}{told}: load it as a model for that task")
    if opened.files and CONFIG not in copied:
        notes.append("the base has no config.json: the result is weights alone, and takes one to be loaded as a model")
    if shared := [name for name, edit in edits.items() if edit.shares_dora]:
        notes.append(
            f"an adapter with DoRA and another one change the same weights ({few(shared)}): each delta is taken from "
            "the base's own weight; merged one after another, DoRA is taken from what the adapters before it gave"
        )
    return MergePlan(
        base=opened,
        sources=tuple(member.name for member in members),
        recorded=tuple(_recorded(member) for member in members),
        weights=tuple(member.weight for member in members),
        edits=edits,
        shards=outputs.shards(opened, edits),
        config=config,
        copied=copied,
        left_out=tuple(assembly.left_out),
        folders=tuple(origin.path for member in members if (origin := member.adapter.origin) and origin.path),
        notes=merge_notes(assembly.notes, notes, *(_notes(member, opened, len(members)) for member in members)),
    )


def _strangers(members: Sequence[Member], base: Checkpoint) -> list[str]:
    """A remark on adapters that name another base model: than this one of the Hub, or than the first adapter does."""
    named = [(member.name, name) for member in members for name in _base_names(member.adapter)]
    if not named:
        return []
    source, wanted = named[0]
    other = f"{source} for {wanted}"
    if base.opened and base.opened.is_remote:
        wanted = base.opened.name.partition("@")[0]
        other = f"the base is {wanted}"
    return [
        f"{source} was made for {name}, and {other}: make sure that these are the same weights"
        for source, name in named
        if name.casefold() != wanted.casefold()
    ]


def _base_names(adapter: Adapter) -> list[str]:
    """The models of the Hub that it names as its base; the path of a folder tells nothing."""
    stated = dict.fromkeys(base.id for base in adapter.bases.values())
    return [name for name in stated if name and _REPOSITORY.fullmatch(name)]


def _notes(member: Member, base: Checkpoint, members: int) -> list[str]:
    """What its reader found odd, without what it missed in the base by name, which is matched here."""
    missed = BaseModel(base).notes(member.adapter.modules)
    settled = tuple(note.partition(", such as")[0].partition(":")[0] for note in missed)
    of = f"{member.name}: " if members > 1 else ""
    return [f"{of}{note}" for note in member.adapter.notes if not note.startswith(settled)]


def _members(
    adapters: Iterable[Adapter], weights: Iterable[float] | None, sources: Sequence[str] | None
) -> list[Member]:
    is_list = isinstance(adapters, Iterable) and not isinstance(adapters, str)
    adapters = list(adapters) if is_list else [adapters]  # type: ignore[list-item]
    if not is_list or not all(isinstance(each, Adapter) for each in adapters):
        found = ", ".join(sorted({type(each).__name__ for each in adapters}))
        raise OptionError(f"adapters: found {found}, expected a list of Adapter, as `adaptertools.read` gives them")
    if not adapters:
        raise OptionError("a merge takes one adapter or more, found none")
    if not isinstance(weights, Iterable | None) or isinstance(weights, str | Mapping | Set):
        raise OptionError(f"weights is {weights!r}, expected a list with a number for each adapter")
    given = [1.0] * len(adapters) if weights is None else list(weights)
    if len(given) != len(adapters):
        raise OptionError(f"{count(len(given), 'weight')} for {count(len(adapters), 'adapter')}: expected one for each")
    if not all(map(_is_finite, given)):
        raise OptionError(f"weights are {given}, expected finite numbers")
    labels = [adapter.origin.label if adapter.origin else f"adapter {i}" for i, adapter in enumerate(adapters, 1)]
    named = labels if sources is None else list(sources)
    if len(named) != len(adapters):
        raise OptionError(f"{len(named)} sources are named, there are {len(adapters)} adapters")
    return [
        Member(number=number, name=name, weight=float(weight), adapter=adapter)
        for number, (adapter, weight, name) in enumerate(zip(adapters, given, named, strict=True))
    ]


def _recorded(member: Member) -> str:
    origin = member.adapter.origin
    return origin.name if origin else PurePath(member.name).name


def _is_finite(weight: object) -> bool:
    return isinstance(weight, SupportsFloat) and not isinstance(weight, bool) and math.isfinite(weight)
