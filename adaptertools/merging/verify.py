"""Proof of a finished merge: every byte of it is the base's own, or within one rounding of W + Σ s·B·A.

What the tensors have to be comes from the plan of the same merge; their values from reference.py, in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adaptertools.adapter import Adapter
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.pipeline import open_checkpoint
from adaptertools.containers.source import Located, located
from adaptertools.errors import AmbiguousFormatError, FileError, SourceNotFoundError, count, few
from adaptertools.linalg import parse_device
from adaptertools.merging import record
from adaptertools.merging.coefficients import Coefficient, fit, misapplied
from adaptertools.merging.comparison import Comparison, TensorCheck
from adaptertools.merging.layout import dropped_buffers, problems_of_files, problems_of_names
from adaptertools.merging.plan import MergePlan, plan_merge
from adaptertools.tensors import dtype_name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verification:
    """What is known of a merge after every byte of it was looked at.

    `problems` are faults beside values: tensors missing, extra or of another shape, index, configuration, files.
    `by_other_tool` says that no record of ours stands beside it: then two roundings are `allowed` for each adapter, six
    for one with DoRA (of the delta weight, W + it, the elements that the norm is of, the norm, the gain, the product),
    else one in all. Where every value passes, the coefficients have to be right still.
    """

    merged: str
    tensors: tuple[TensorCheck, ...] = ()
    problems: tuple[str, ...] = ()
    coefficients: tuple[Coefficient, ...] = ()
    by_other_tool: bool = False
    allowed: int = 1
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        found = [f"{count(sum(each.computed for each in self.tensors), 'tensor')} of {len(self.tensors):,} merged"]
        found += [count(len(self.problems), "problem")] if self.problems else []
        found += [f"{count(len(self.wrong), 'tensor')} wrong"] if self.wrong else []
        return f"<Verification of {self.merged}: {'right' if self.ok else 'not right'}, {', '.join(found)}>"

    @property
    def ok(self) -> bool:
        return not self.problems and not self.wrong

    @property
    def wrong(self) -> tuple[TensorCheck, ...]:
        """The tensors that are not what they have to be, the worst first."""
        return tuple(sorted((each for each in self.tensors if each.wrong), key=_badness, reverse=True))

    @property
    def worst(self) -> tuple[TensorCheck, ...]:
        """Those, then the merged tensors, the farthest off first."""
        return tuple(sorted((each for each in self.tensors if each.wrong or each.computed), key=_badness, reverse=True))


def _badness(check: TensorCheck) -> tuple[float, float]:
    return check.wrong / max(check.elements, 1), check.roundings


def verify_merge(
    base: str | Path | Located | Checkpoint,
    adapters: Sequence[Adapter],
    merged: str | Path | Located,
    weights: Sequence[float] | None = None,
    *,
    dtype: torch.dtype | None = None,
    allow_unmatched: bool = False,
    untie: bool | None = None,
    full_weights: int | None = None,
    sources: Sequence[str] | None = None,
    device: str | torch.device = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare a merge with what base and adapters have to give: all of its tensors, its index, configuration and files.

    The options are those of `plan_merge`. `dtype` and `untie` are read off the merge where they are not given.

    Memory: the adapters, and some blocks of rows for each core
    Raises: AdapterToolsError where base or adapters are at fault, or `merged` is an adapter; faults of the merge are in
            the result
    """
    start = open_checkpoint(base)
    made = located(merged)
    try:
        result = open_checkpoint(made)
    except (AmbiguousFormatError, FileError, SourceNotFoundError) as error:
        if not made.path.exists():
            raise SourceNotFoundError(f"{made.label}: there is no such merged model") from error
        return Verification(merged=made.label, problems=(str(error),))
    plan = plan_merge(
        start,
        adapters,
        weights,
        dtype=dtype or _dtype_of(start, result),
        allow_unmatched=allow_unmatched,
        untie=_is_untied(start, result) if untie is None else untie,
        full_weights=full_weights,
        sources=sources,
    )
    ours = (result.folder / record.NAME).is_file()
    dropped = [] if ours else dropped_buffers(plan, result)
    problems, comparable = problems_of_names(plan, result, dropped)
    comparison = Comparison(plan, result, parse_device(device), ours)
    checks, moments = comparison.run(comparable, on_progress)
    coefficients = fit(moments, plan.sources, plan.weights)
    if not any(each.wrong for each in checks):
        problems += misapplied(coefficients)
    return Verification(
        merged=made.label,
        tensors=checks,
        problems=(*problems, *problems_of_files(plan, result, ours)),
        coefficients=tuple(coefficients[source] for source in _judged(plan, comparable)),
        by_other_tool=not ours,
        allowed=1 if ours else 6 if any(edit.renormalizations for edit in plan.edits.values()) else 2,
        notes=_notes(plan, dropped),
    )


def _dtype_of(base: Checkpoint, merged: Checkpoint) -> torch.dtype | None:
    """The dtype that every floating-point tensor was cast to, if one was."""
    pairs = {(base.dtypes[name], dtype) for name, dtype in merged.dtypes.items() if name in base.dtypes}
    found = {after for before, after in pairs if before.is_floating_point}
    changed = any(before != after for before, after in pairs)
    return found.pop() if changed and len(found) == 1 else None


def _is_untied(base: Checkpoint, merged: Checkpoint) -> bool:
    """Whether the merge has a head of its own that the base has not."""
    ties = (checkpoint.config.get("tie_word_embeddings", True) is not False for checkpoint in (base, merged))
    return tuple(ties) == (True, False) and any(name not in base.shapes for name in merged.shapes)


def _judged(plan: MergePlan, comparable: Sequence[str]) -> list[int]:
    """The adapters whose coefficients can be told: not those of whose delta weights no tensor could be compared."""
    changing = {name: edit.adapters for name, edit in plan.edits.items()}
    compared = {source for name in comparable for source in changing.get(name, ())}
    unseen = {source for sources in changing.values() for source in sources} - compared
    return [source for source in range(len(plan.sources)) if source not in unseen]


def _notes(plan: MergePlan, dropped: Sequence[str]) -> tuple[str, ...]:
    """What the plan has to say, what it leaves out, and what a merge by another tool does."""
    without = (f"it is without {few(dropped, 5)}, which the class of the model makes anew",) if dropped else ()
    unmatched, first = count(len(plan.left_out), "module", ("matches", "match")), ", ".join(plan.left_out[:3])
    left_out = (f"{unmatched} no weight of the base, without effect: {first}",) if plan.left_out else ()
    cast = plan.cast
    to = f"{count(len(cast), 'tensor')} cast to {dtype_name(plan.edits[cast[0]].dtype)}" if cast else ""
    as_cast = (f"{to}: compared with the base's own, cast",) if cast else ()
    return (*left_out, *without, *as_cast, *plan.notes)
