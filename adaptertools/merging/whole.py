"""Whole weights and trained token rows of several adapters: found in the base, and made agree."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptertools.adapter import Adapter, RowWeights, WeightRole
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import MatchError, OptionError, ShapeError, UnsupportedFeatureError, few
from adaptertools.merging.match import Names
from adaptertools.tensors import check_finite

_LAST = re.compile(r"(^|\.)(score|classifier|(classifier|classification_head)\.out_proj)\.(weight|bias)$")
_LABELLERS = ("classification_head", "classifier", "pre_classifier", "qa_outputs", "regression_head", "score")
_HEADS = frozenset(("cls", "head", "heads", "lm_head", "v_head", "value_head", *_LABELLERS))
"""Parts of names of heads, which a base model may lack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of the adapters that are merged. `number` counts from 0."""

    number: int
    name: str
    weight: float
    adapter: Adapter


@dataclass(slots=True, kw_only=True, eq=False)
class Whole:
    """Whole weights and token rows by the names of the base's tensors."""

    weights: dict[str, tuple[Tensor, WeightRole, Member]] = field(default_factory=dict)
    rows: dict[str, list[tuple[RowWeights, Member]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather(
    members: Sequence[Member],
    base: Checkpoint,
    names: Names,
    head: str | None,
    full_weights: int | None,
    unmatched: Callable[[str, str], None],
) -> Whole:
    """What replaces weights of the base. `head` is the name of an output head that the base has no tensor for.

    `full_weights` is the number of the adapter, from 1 on, whose alone are taken.

    Raises: UnsupportedFeatureError where adapters differ; MatchError, ShapeError, OptionError, NonFiniteError
    """
    found = Whole()
    numbers = {member.number + 1 for member in members}
    if full_weights is not None and full_weights not in numbers:
        known = ", ".join(map(str, sorted(numbers)))
        raise OptionError(f"full_weights is {full_weights!r}, expected the number of an adapter: {known}")
    for member in members:
        if full_weights not in (None, member.number + 1):
            _leave_out(found, member)
            continue
        for stated, weight in member.adapter.full_weights.items():
            check_finite(f"{member.name}: {stated}", weight.weight, may_pass=False)
            name = names.find(stated) or _new(stated, weight.role, names, head)
            if name is None:
                unmatched(f"{member.name}: {stated}", stated)
                found.left_out.append(stated)
            else:
                _take(found, name, weight.weight, weight.role, member)
        for stated, rows in member.adapter.row_weights.items():
            check_finite(f"{member.name}: {stated} (token rows)", rows.rows, may_pass=False)
            name = names.find(stated)
            if name is None:
                unmatched(f"{member.name}: the token rows of {stated}", stated)
                found.left_out.append(f"{stated} (token rows)")
            else:
                _take_rows(found, name, rows, member)
    _check_rows(found)
    replaced = [name for name, (_, _, member) in found.weights.items() if member.weight != 1]
    replaced += [
        f"{name} (token rows)" for name, all_rows in found.rows.items() if any(of.weight != 1 for _, of in all_rows)
    ]
    if replaced:
        found.notes.append(f"whole weights replace those of the base whatever the weight: {few(replaced)}")
    new = [name for name in found.weights if name not in base.shapes and name != head]
    if new:
        found.notes.append(f"the base has no {few(new)}; added as the adapter holds them")
    return found


def check_replacement(name: str, weight: Tensor, base: Checkpoint, resizable: Callable[[str], bool]) -> None:
    """Raises: ShapeError unless a whole weight is of the base's shape, or has more or fewer rows where it may"""
    shape, old = tuple(weight.shape), base.shapes.get(name)
    if old is None or shape == old:
        return
    if len(shape) == len(old) and shape[1:] == old[1:] and shape and (resizable(name) or is_classifier(name)):
        return
    raise ShapeError(f"{name}: the adapter's weight has shape {shape}, the base's {old}. Is it the right base model?")


def is_classifier(name: str) -> bool:
    """Whether a name is that of a head that a model is trained with for a task."""
    return not _HEADS.isdisjoint(name.split("."))


def labels(found: Whole, base: Checkpoint) -> int | None:
    """The labels of a head that is new, or has another number of them than the base's; None where there is none."""
    for name, (weight, _, _) in found.weights.items():
        if _LAST.search(name) and base.shapes.get(name, (0,))[0] != weight.shape[0]:
            return weight.shape[0]
    return None


def _new(stated: str, role: WeightRole, names: Names, head: str | None) -> str | None:
    """The name of a weight that the base does not have, if that is nothing odd."""
    if head is not None and names.canonical(stated) == names.canonical(head):
        return head
    return stated if role is WeightRole.MODULE and is_classifier(stated) else None


def _take(found: Whole, name: str, weight: Tensor, role: WeightRole, member: Member) -> None:
    if name not in found.weights:
        found.weights[name] = (weight, role, member)
        return
    other, _, first = found.weights[name]
    if first is member:
        raise MatchError(f"{member.name}: two of its whole weights are {name} of the base")
    if not _equal(weight, other):
        raise UnsupportedFeatureError(
            f"{first.name} and {member.name} bring different weights for {name}. full_weights (--full-weights N) says "
            "whose to take"
        )


def _take_rows(found: Whole, name: str, rows: RowWeights, member: Member) -> None:
    known = {
        index: (row, first)
        for other, first in found.rows.get(name, ())
        for index, row in zip(other.indices, other.rows, strict=True)
    }
    for index, row in zip(rows.indices, rows.rows, strict=True):
        if index in known and not _equal(row, known[index][0]):
            raise UnsupportedFeatureError(
                f"{known[index][1].name} and {member.name} bring different rows for token {index} of {name}. "
                "full_weights (--full-weights N) says whose to take"
            )
    found.rows.setdefault(name, []).append((rows, member))


def _check_rows(found: Whole) -> None:
    """Raises: UnsupportedFeatureError where one adapter replaces a weight of which another one trained some rows"""
    for name in (name for name in found.rows if name in found.weights):
        weight, _, whose = found.weights[name]
        for rows, member in found.rows[name]:
            inside = max(rows.indices, default=0) < len(weight)
            if member is not whose and not (inside and _equal(weight[list(rows.indices)], rows.rows)):
                raise UnsupportedFeatureError(
                    f"{whose.name} replaces all of {name}, and {member.name} brings other rows of it. full_weights "
                    "(--full-weights N) says whose to take"
                )


def _leave_out(found: Whole, member: Member) -> None:
    held = [*member.adapter.full_weights, *(f"{name} (token rows)" for name in member.adapter.row_weights)]
    if held:
        found.notes.append(f"whole weights of {member.name} are not taken: {few(held)}")


def _equal(one: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return one.shape == other.shape and torch.equal(one.to(wide), other.to(wide))
