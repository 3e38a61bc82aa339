"""Merging into weights that are in memory, in place: add adapters, swap them for others, take them off again.

Subtracting what was added does not give a weight of bfloat16 back. So the originals of the tensors that change are
kept, where the caller says, and every merge starts from them.
"""

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adaptertools.adapter import Adapter
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.source import Located
from adaptertools.errors import NonFiniteError, OptionError, UnsupportedFeatureError, count
from adaptertools.merging.blocks import block_rows
from adaptertools.merging.edits import Edit
from adaptertools.merging.kernels import Prepared, Statistics, full_precision, prepare
from adaptertools.merging.match import Names
from adaptertools.merging.plan import MergePlan, plan_merge
from adaptertools.tensors import in_parallel

Keep = Literal["device", "host"] | Path | Located
"""Where originals stay: on the weights' own device, in the host's memory, or in the checkpoint that they came from."""


def merge_into(
    target: torch.nn.Module | Mapping[str, Tensor],
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    keep: Keep = "device",
    config: Mapping[str, Any] | None = None,
    allow_unmatched: bool = False,
    full_weights: int | None = None,
    sources: Sequence[str] | None = None,
    has_statistics: bool = False,
) -> "Merged":
    """Add adapters to weights in memory, in place, on whatever device they are: W = round(W + Σ weight · s · B·A).

    Everything is matched and checked before a weight changes, as by `plan_merge`; if the merge fails later, all
    originals are back before the error is raised. `keep` says where the originals of the tensors that change are kept
    for `swap` and `undo`; a path, of the checkpoint that the weights came from, takes no memory, and is refused unless
    it holds these very bits. `config` is the model's configuration where `target` is a state dict.

    Memory: one copy of the tensors that change, on the device or the host; none where `keep` is a path
    Raises: as plan_merge, and UnsupportedFeatureError for changes of a shape or of the set of tensors
            OptionError for a `keep` that does not fit; NonFiniteError
    """
    merged = Merged(target, _config(target) if config is None else config, keep)
    merged.swap(
        adapters,
        weights,
        allow_unmatched=allow_unmatched,
        full_weights=full_weights,
        sources=sources,
        has_statistics=has_statistics,
    )
    return merged


class Merged:
    """Weights in memory with adapters merged into them. `plan` says what was merged; it is None after `undo`."""

    def __init__(
        self, target: torch.nn.Module | Mapping[str, Tensor], config: Mapping[str, Any], keep: Keep = "device"
    ) -> None:
        if not isinstance(target, torch.nn.Module | Mapping):
            raise OptionError(f"target is {type(target).__name__}, expected a torch.nn.Module or its state dict")
        self._target = target
        self._tensors = self._in_target()
        if not self._tensors:
            held = {type(value).__name__ for value in target.values()} if isinstance(target, Mapping) else set()
            found = f"; its values are {', '.join(sorted(held))}" if held else ""
            raise OptionError(f"there is no tensor to merge into, expected a module or its state dict{found}")
        self._base = _in_memory(self._tensors, config)
        self._originals = _Originals(keep)
        self._changed: set[str] = set()
        self._begun = 0
        self.plan: MergePlan | None = None
        self.statistics: Mapping[str, Statistics] = {}
        """What was added to each tensor, and what rounding took of it, by name"""

    def __repr__(self) -> str:
        if self.plan is None:
            return "<Merged: nothing, the originals are in place>"
        merged = ", ".join(
            f"{weight:g} × {name}" for name, weight in zip(self.plan.sources, self.plan.weights, strict=True)
        )
        return f"<Merged: {merged}, in {count(len(self._changed), 'tensor')}>"

    def swap(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None = None,
        *,
        allow_unmatched: bool = False,
        full_weights: int | None = None,
        sources: Sequence[str] | None = None,
        has_statistics: bool = False,
    ) -> None:
        """Merge other adapters in the place of those that are merged, starting from the originals.

        `has_statistics` fills `statistics`; on a GPU that takes about three times as long.

        Raises: as merge_into; what is found before a weight changes leaves everything as it is
        """
        plan = plan_merge(
            self._base,
            adapters,
            weights,
            allow_unmatched=allow_unmatched,
            full_weights=full_weights,
            sources=sources,
        )
        edits = self._distinct(plan)
        self._expect_unchanged(self._changed | {edit.name for edit in edits})
        self._begun = self._begun if self._changed else next(_turns)
        _alive.add(self)
        self._originals.keep({edit.name: self._tensors[edit.name] for edit in edits}, self._changed)
        try:
            with full_precision(), torch.no_grad():
                self._restore(self._changed - {edit.name for edit in edits})
                merged = {edit.name: self._merge(edit, plan, has_statistics) for edit in edits}
                self._check_finite(merged)
                made = {name: prepared for name, prepared in merged.items() if prepared is not None}
                found = {name: each.statistics for name, each in made.items()} if has_statistics else {}
        except BaseException:
            self._take_back()
            raise
        self.plan, self.statistics = plan, found

    def undo(self) -> None:
        """Give every changed tensor the bits back that it had before the adapters were merged.

        Raises: UnsupportedFeatureError where another merge into the same tensors came later, which is to be undone
            first, and where the model has other tensors by now
        """
        self._expect_unchanged(self._changed)
        self._take_back()

    def _take_back(self) -> None:
        with torch.no_grad():
            self._restore(set(self._changed))
        self._originals.forget()
        self.plan, self.statistics = None, {}

    def _in_target(self) -> dict[str, Tensor]:
        """The tensors that the target has now."""
        state = self._target.state_dict() if isinstance(self._target, torch.nn.Module) else self._target
        return {name: tensor.detach() for name, tensor in state.items() if isinstance(tensor, Tensor)}

    def _expect_unchanged(self, names: set[str]) -> None:
        """Raises: UnsupportedFeatureError where originals of these tensors would not be what is to be given back"""
        there = self._in_target()
        places = set()
        for name in names:
            ours, theirs = self._tensors[name], there.get(name)
            if theirs is None or _place(theirs) != _place(ours):
                raise UnsupportedFeatureError(
                    f"{name}: the model has another tensor there by now: it was replaced, cast or moved. Undo before "
                    "that, or load the weights again"
                )
            places.add(ours.data_ptr())
        later = [other for other in _alive if self._changed and other._changed and other._begun > self._begun]
        if any(other._tensors[name].data_ptr() in places for other in later for name in other._changed):
            raise UnsupportedFeatureError(
                "another merge into the same tensors came later: undo that one first, the last one before all others"
            )

    def _distinct(self, plan: MergePlan) -> list[Edit]:
        """The edits, one for each memory: tensors that share theirs change together.

        Raises: UnsupportedFeatureError
        """
        found = []
        seen = set()
        for name, edit in plan.edits.items():
            tensor = self._tensors.get(name)
            if tensor is None or tuple(tensor.shape) != edit.shape or tensor.device.type == "meta":
                there = "there is none" if tensor is None else f"it has {tuple(tensor.shape)}"
                if tensor is not None and tensor.device.type == "meta":
                    there = "it is on the device meta, where there are no values"
                raise UnsupportedFeatureError(
                    f"{name}: the merge needs a tensor of shape {edit.shape}, and {there}; tensors in memory are "
                    "changed in place. Load and resize the model first, or merge its files with run_merge"
                )
            if _place(tensor) not in seen:
                found.append(edit)
            seen.add(_place(tensor))
        return found

    def _check_finite(self, merged: Mapping[str, Prepared | None]) -> None:
        """Raises: NonFiniteError; devices are waited for once, not for every tensor"""
        ends = {name: torch.aminmax(self._tensors[name]) for name in merged if self._tensors[name].numel()}
        sound = [torch.isfinite(low) & torch.isfinite(high) for low, high in ends.values()]
        devices = {each.device for each in sound}
        if all(bool(torch.stack([each for each in sound if each.device == device]).all()) for device in devices):
            return
        name = next(name for name, is_sound in zip(ends, sound, strict=True) if not is_sound)
        prepared = merged[name]
        if prepared is None:
            raise NonFiniteError(f"{name}: NaN, infinity or values too large for {self._tensors[name].dtype}")
        raise prepared.fault()

    def _merge(self, edit: Edit, plan: MergePlan, has_statistics: bool) -> Prepared | None:
        """Fill a tensor with the result of its edit."""
        tensor = self._tensors[edit.name]
        source = tensor
        if edit.name in self._changed:
            source = self._originals.of(edit.name)
            if source.device != tensor.device:
                source = tensor.copy_(source)
        self._changed.add(edit.name)
        if edit.replacement is not None:
            source = edit.replacement.to(tensor.device)
        for indices, rows in edit.rows:
            source = source.to(torch.promote_types(source.dtype, rows.dtype), copy=True)
            source[torch.tensor(indices, device=source.device)] = rows.to(source)
        if not edit.computes:
            tensor.copy_(source)
            return None
        prepared = prepare(edit, tensor.device, sources=plan.sources, has_statistics=has_statistics)
        _compute(prepared, source, tensor)
        return prepared

    def _restore(self, names: set[str]) -> None:
        for name in names:
            self._tensors[name].copy_(self._originals.of(name))
            self._changed.discard(name)


_turns = itertools.count(1)
_alive: "weakref.WeakSet[Merged]" = weakref.WeakSet()
"""What was merged, in turns: of two merges into the same tensors the last one is taken back first."""


def _place(tensor: Tensor) -> tuple[int, torch.Size, torch.dtype]:
    """By which two names are known to be of one tensor."""
    return tensor.data_ptr(), tensor.shape, tensor.dtype


class _Originals:
    """Tensors as they were before anything was merged into them."""

    def __init__(self, where: Keep) -> None:
        if not (where in ("device", "host") or isinstance(where, Path | Located)):
            raise OptionError(f"keep is {where!r}, expected 'device', 'host' or the Path of the weights' checkpoint")
        self._where = where
        self._checkpoint = Checkpoint.open(where) if isinstance(where, Path | Located) else None
        self._names = Names(self._checkpoint) if self._checkpoint else None
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        return self._kept[name]

    def forget(self) -> None:
        self._kept.clear()

    def keep(self, tensors: Mapping[str, Tensor], changed: set[str]) -> None:
        """Keep these, and of others those that have changed.

        Raises: OptionError where the checkpoint does not hold the same bits; nothing more is kept then
        """
        kept = {name: tensor for name, tensor in self._kept.items() if name in changed}
        for name, tensor in tensors.items():
            if name not in kept:
                kept[name] = self._copy(name, tensor)
        self._kept = kept

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if self._checkpoint is not None and self._names is not None:
            stored = self._names.find(name)
            found = None if stored is None else self._checkpoint.tensor(stored)
            if found is None or not _same_bits(found, tensor):
                raise OptionError(
                    f"{self._checkpoint.label}: it does not hold the bits of {name}, which are to be read from it "
                    "again. Give the checkpoint that the weights came from, or keep='host'"
                )
            return found
        if self._where == "host" and tensor.device.type != "cpu":
            is_pinned = tensor.device.type == "cuda"
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned).copy_(tensor)
        return tensor.clone()


def _compute(prepared: Prepared, source: Tensor, tensor: Tensor) -> None:
    """The result of an edit, into the tensor: on the CPU in the blocks of a merge of files, else in one."""
    edit = prepared.edit
    matrix = source.reshape(edit.matrix)
    out = tensor.view(edit.matrix) if tensor.is_contiguous() else torch.empty_like(matrix, dtype=tensor.dtype)
    blocks = [slice(0, len(matrix))]
    if tensor.device.type == "cpu":
        blocks = block_rows(edit, source.dtype, tensor.device)

    def in_blocks(work: Callable[[slice], object]) -> None:
        for _ in in_parallel(work, blocks) if len(blocks) > 1 else map(work, blocks):
            pass

    if prepared.wants_norms:
        in_blocks(lambda rows: prepared.measure(matrix[rows], rows.start))
        prepared.settle()
    in_blocks(lambda rows: prepared.merged(matrix[rows], rows.start, out[rows]))
    if not tensor.is_contiguous():
        tensor.copy_(out.reshape(tensor.shape))


def _same_bits(found: Tensor, tensor: Tensor) -> bool:
    if found.shape != tensor.shape or found.dtype != tensor.dtype:
        return False
    there = found.to(tensor.device).reshape(-1).contiguous().view(torch.uint8)
    return torch.equal(there, tensor.reshape(-1).contiguous().view(torch.uint8))


def _in_memory(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Checkpoint:
    """Weights in memory as a base model: names, shapes and dtypes, and which are the same memory."""
    shared = set()
    seen = set()
    for name, tensor in tensors.items():
        if _place(tensor) in seen and tensor.numel() and tensor.device.type != "meta":
            shared.add(name)
        seen.add(_place(tensor))
    return Checkpoint(
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        config=config,
        label="the model in memory",
        shared=frozenset(shared),
        mapped=tensors,
    )


def _config(target: torch.nn.Module | Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The configuration that models of transformers have."""
    stated: Any = getattr(target, "config", None)
    found = stated.to_dict() if hasattr(stated, "to_dict") else stated
    return found if isinstance(found, Mapping) else {}
