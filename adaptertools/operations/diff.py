"""How far two adapters are from each other, whatever their formats, ranks and factors.

What counts is ΔW = scaling·B·A of every parameter, and beside it all else that changes the model: whole weights, token
rows, DoRA magnitudes, biases, invocation tokens, a change of the base.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from adaptertools.adapter import Adapter, Base, LoraModule, RowSlice, RowWeights, expect_adapter
from adaptertools.dialects.diffusers.paths import comparable
from adaptertools.errors import OptionError
from adaptertools.linalg import delta_norm
from adaptertools.operations.agree import model_name
from adaptertools.operations.align import by_parameter, in_common_layout
from adaptertools.operations.difference import Difference, ModuleDifference, cosine_together
from adaptertools.operations.distance import compare_products
from adaptertools.operations.renormalized import BaseWeight, base_matrix, compare_on_base
from adaptertools.operations.values import Side, ValueDifference, compare_rows, compare_values, equal_bits, not_finite
from adaptertools.tensors import in_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one task found; `modules` are those of A that are equal bit for bit in B, else None."""

    rows: Sequence[ModuleDifference] = ()
    modules: Sequence[LoraModule | None] = ()
    weights: Sequence[ValueDifference | None] = ()
    dora_on_base: Sequence[str] = ()
    dora_in_parts: Sequence[str] = ()
    base_lacks: Sequence[str] = ()


def diff(
    a: Adapter,
    b: Adapter,
    *,
    tolerance: float = 1e-6,
    norms: bool = False,
    base_weight: BaseWeight | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """How far B is from A: the relative Frobenius distance of their delta weights, and whatever else differs.

    Of the factors only their product counts: ranks, alphas, dtypes, formats, order and gauge may differ, and the slots
    of a fused projection may meet the whole of it, as diffusers' names of Flux's layers meet the published ones.
    Distances come from QR factorisations of the stacked factors in float64 and are right down to its last bits. Modules
    that are equal bit for bit are not computed with; `norms` measures them even if nothing needs it.

    Where `base_weight` has the weight that DoRA renormalises, the delta weights that it makes of it are compared; else
    its magnitude is, beside the direction. The bias of a module is compared times its scaling. Names and revisions of
    base models are compared where both are known; a difference is noted and does not count.

    Units:  tolerance is relative to A
    Memory: a few float64 copies of one parameter's factors a core, with DoRA on its base some blocks of a few MB; the
            (out, in) delta weight is never formed
    Raises: OptionError for a tolerance that is negative or no number, and for what is no adapter
            ShapeError if the delta weights of a parameter have different shapes
            NonFiniteError for NaN or infinity in what is not equal bit for bit, or whose norm is needed
    """
    expect_adapter(a)
    expect_adapter(b)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise OptionError(f"tolerance is {tolerance!r:.40}, expected a number of 0 or more")
    tasks = list(_tasks(a, b, base_weight))
    found: list[_Found] = []
    for one in in_parallel(lambda task: task(), tasks):
        found.append(one)
        if on_progress is not None:
            on_progress(len(found), len(tasks))
    rows = [(row, module) for one in found for row, module in zip(one.rows, one.modules, strict=True)]
    needed = any(row.distance for row, _ in rows)
    if norms or needed:
        measured = tuple(in_parallel(lambda pair: _measured(*pair, base_weight, needed=needed), rows))
    else:
        measured = tuple(row for row, _ in rows)
    return Difference(
        tolerance=float(tolerance),
        modules=measured,
        weights=tuple(weight for one in found for weight in one.weights if weight is not None),
        others=tuple(_others(a, b)),
        notes=tuple(_notes(a, b)),
        dora_on_base=tuple(name for one in found for name in one.dora_on_base),
        dora_in_parts=tuple(name for one in found for name in one.dora_in_parts),
        base_lacks=tuple(why for one in found for why in one.base_lacks),
    )


def _tasks(a: Adapter, b: Adapter, base_weight: BaseWeight | None) -> Iterator[Callable[[], _Found]]:
    """One for each parameter and for each stored weight: those of A in its order, then what is only in B."""
    one, other = map(tuple, _of_one_model(*comparable(a.modules, b.modules)))
    ours, theirs = by_parameter(replace(a, modules=one)), by_parameter(replace(b, modules=other))
    for parameter in dict.fromkeys((*ours, *theirs)):
        yield partial(_compare_parameter, ours.get(parameter, ()), theirs.get(parameter, ()), base_weight)
    for name in dict.fromkeys((*a.full_weights, *b.full_weights)):
        yield partial(_compare_full_weight, name, a, b)
    for name in dict.fromkeys((*a.row_weights, *b.row_weights)):
        yield partial(_compare_token_rows, name, a.row_weights.get(name), b.row_weights.get(name))


def _of_one_model(*adapters: Sequence[LoraModule]) -> Sequence[Sequence[LoraModule]]:
    """The modules of each adapter; where one names no model and the other a single one, as modules of that."""
    homes = [{module.target.component for module in modules} for modules in adapters]
    if any(len(found) != 1 for found in homes) or {""} not in homes:
        return adapters
    home = max(set().union(*homes))
    return [[replace(m, target=replace(m.target, component=home)) for m in modules] for modules in adapters]


def _compare_full_weight(name: str, a: Adapter, b: Adapter) -> _Found:
    one, other = (adapter.full_weights[name].weight if name in adapter.full_weights else None for adapter in (a, b))
    return _Found(weights=[compare_values("full weight", name, one, other)])


def _compare_token_rows(name: str, one: RowWeights | None, other: RowWeights | None) -> _Found:
    return _Found(weights=[compare_rows("token rows", name, one, other)])


def _compare_parameter(
    ours: Sequence[LoraModule], theirs: Sequence[LoraModule], base_weight: BaseWeight | None
) -> _Found:
    bare = [[replace(m, magnitude=None, lora_bias=None) for m in group] for group in (ours, theirs)]
    one, other = ({module.target.rows: module for module in group} for group in in_common_layout(bare, ("A", "B")))
    slices = sorted({*one, *other}, key=lambda rows: rows.start if rows else 0)
    biases = _compare_biases(ours, theirs)
    dora = [str(replace(m.target, rows=None)) for m in (*ours, *theirs) if m.magnitude is not None][:1]
    if dora and _are_equal(ours, theirs):
        return _Found(rows=[_identical(module) for module in ours], modules=ours, weights=[biases])
    matrix, lacking = base_matrix((*ours, *theirs), base_weight)
    if matrix is not None:
        found = [_compare_on_base(ours, theirs, rows, matrix) for rows in slices]
        return _Found(rows=found, modules=[None] * len(found), weights=[biases], dora_on_base=dora)
    compared = [_compare_modules(one.get(rows), other.get(rows)) for rows in slices]
    magnitudes, other_magnitudes = _magnitudes(ours), _magnitudes(theirs)
    return _Found(
        rows=[row for row, _ in compared],
        modules=[module for _, module in compared],
        weights=[
            *(
                compare_rows("magnitude", name, magnitudes.get(name), other_magnitudes.get(name))
                for name in dict.fromkeys((*magnitudes, *other_magnitudes))
            ),
            biases,
        ],
        dora_in_parts=dora,
        base_lacks=[lacking] if lacking else [],
    )


def _are_equal(ours: Sequence[LoraModule], theirs: Sequence[LoraModule]) -> bool:
    """Whether the modules of a parameter are equal bit for bit, magnitudes too; biases are compared by themselves."""
    return len(ours) == len(theirs) and all(
        (one.target.rows, one.scaling, one.magnitude_axis) == (other.target.rows, other.scaling, other.magnitude_axis)
        and (one.magnitude is None) == (other.magnitude is None)
        and all(equal_bits(one.tensors[name], other.tensors[name]) for name in one.tensors if name != "lora_bias")
        for one, other in zip(ours, theirs, strict=True)
    )


def _identical(module: LoraModule) -> ModuleDifference:
    return ModuleDifference(target=module.target, norm=None, other_norm=None, distance=0.0, cosine=1.0, identical=True)


def _compare_on_base(
    ours: Sequence[LoraModule], theirs: Sequence[LoraModule], rows: RowSlice | None, matrix: Tensor
) -> ModuleDifference:
    here = [[m for m in group if rows is None or m.target.rows == rows] for group in (ours, theirs)]
    found = compare_on_base(here[0], here[1], rows, matrix)
    alone: Side | None = None if all(here) else "A" if here[0] else "B"
    return ModuleDifference(
        target=replace((*ours, *theirs)[0].target, rows=rows),
        norm=found.norm,
        other_norm=found.other_norm,
        distance=found.distance,
        cosine=found.cosine,
        only_in=alone,
    )


def _compare_modules(one: LoraModule | None, other: LoraModule | None) -> tuple[ModuleDifference, LoraModule | None]:
    if one is None or other is None:
        return _alone(one, other), None
    if one.scaling == other.scaling and all(equal_bits(one.tensors[name], other.tensors[name]) for name in one.tensors):
        return _identical(one), one
    parts = []
    for factors in zip(
        *(_matrices(factor, one) for factor in (one.lora_A, one.lora_B, other.lora_A, other.lora_B)), strict=True
    ):
        found = compare_products(*factors, scaling=one.scaling, other_scaling=other.scaling)
        parts.append((float(found.norm), float(found.other_norm), float(found.cosine), float(found.distance)))
    norms, other_norms, cosines, distances = zip(*parts, strict=True)
    norm, other_norm, distance = math.hypot(*norms), math.hypot(*other_norms), math.hypot(*distances)
    if not math.isfinite(norm + other_norm + distance):
        sides = {"A": one, "B": other}
        raise not_finite(
            {f"{side}: {m.target}.{name}": t for side, m in sides.items() for name, t in m.tensors.items()}
        )
    return (
        ModuleDifference(
            target=one.target,
            norm=norm,
            other_norm=other_norm,
            distance=distance,
            cosine=cosine_together(list(zip(norms, other_norms, cosines, strict=True)), norm, other_norm),
        ),
        None,
    )


def _matrices(factor: Tensor, beside: LoraModule) -> Iterator[Tensor]:
    """The factor's matrices, one for each expert, on the device of the module: one at a time takes little memory."""
    return iter(factor.to(beside.lora_A.device).reshape(-1, *factor.shape[-2:]))


def _alone(one: LoraModule | None, other: LoraModule | None) -> ModuleDifference:
    module = one or other
    assert module is not None
    norm = _norm("A" if one else "B", module)
    return ModuleDifference(
        target=module.target,
        norm=norm if one else 0.0,
        other_norm=0.0 if one else norm,
        distance=norm,
        cosine=None,
        only_in="A" if one else "B",
    )


def _measured(
    row: ModuleDifference, module: LoraModule | None, base_weight: BaseWeight | None, *, needed: bool
) -> ModuleDifference:
    """The row with the norm of a module that is equal bit for bit; NaN if it is not finite and nothing needs it."""
    if module is None:
        return row
    matrix, _ = base_matrix([module], base_weight)
    if matrix is not None:
        norm = compare_on_base([module], [], module.target.rows, matrix).norm
    else:
        norm = _norm("A and B", module) if needed else delta_norm(module)
    return replace(row, norm=norm, other_norm=norm, cosine=1.0 if norm else None)


def _norm(side: str, module: LoraModule) -> float:
    norm = delta_norm(module)
    if not math.isfinite(norm):
        raise not_finite({f"{side}: {module.target}.{name}": tensor for name, tensor in module.tensors.items()})
    return norm


def _magnitudes(modules: Sequence[LoraModule]) -> dict[str, RowWeights]:
    """DoRA magnitudes by name: those of outputs as rows of one vector for all slots, those of inputs for each slot."""
    named: dict[str, RowWeights] = {}
    outputs: list[tuple[Iterable[int], Tensor]] = []
    for module in modules:
        if module.magnitude is None:
            continue
        start = module.target.rows.start if module.target.rows else 0
        size = len(module.magnitude)
        if module.magnitude_axis == "out":
            outputs.append((range(start, start + size), module.magnitude))
        else:
            named[f"{module.target}.magnitude of inputs"] = RowWeights(
                indices=tuple(range(size)), rows=module.magnitude.unsqueeze(1)
            )
    if outputs:
        indices = tuple(row for rows, _ in outputs for row in rows)
        values = torch.cat([magnitude for _, magnitude in outputs]).unsqueeze(1)
        named[f"{replace(modules[0].target, rows=None)}.magnitude"] = RowWeights(indices=indices, rows=values)
    return named


def _compare_biases(ours: Sequence[LoraModule], theirs: Sequence[LoraModule]) -> ValueDifference | None:
    """The biases of a parameter's modules, times their scalings; none is one of zeros."""
    one, other = _bias(ours), _bias(theirs)
    present = one if one is not None else other
    if present is None:
        return None
    zeros = torch.zeros_like(present)
    name = f"{replace((*ours, *theirs)[0].target, rows=None)}.lora_bias"
    return compare_values("lora_bias", name, zeros if one is None else one, zeros if other is None else other)


def _bias(modules: Sequence[LoraModule]) -> Tensor | None:
    """The whole parameter's, in float64."""
    found: Tensor | None = None
    for module in modules:
        if module.lora_bias is not None:
            rows = module.target.rows
            start, total = (rows.start, rows.total) if rows else (0, module.out_features)
            found = module.lora_bias.new_zeros(total, dtype=torch.float64) if found is None else found
            found[start : start + module.out_features] = module.lora_bias.to(torch.float64) * module.scaling
    return found


def _others(a: Adapter, b: Adapter) -> Iterator[str]:
    if a.invocation_tokens != b.invocation_tokens:
        tokens, other_tokens = (list(adapter.invocation_tokens or ()) or "none" for adapter in (a, b))
        yield f"invocation tokens: {tokens} in A, {other_tokens} in B"
    for component, one, other in _bases(a, b):
        if one.change != other.change:
            yield f"{component}base: {_said(one.change)} in A, {_said(other.change)} in B"
        if one.layer_replication != other.layer_replication:
            layers, other_layers = (list(map(list, b.layer_replication)) or "as published" for b in (one, other))
            yield f"{component}base: layers {layers} in A, {other_layers} in B"


def _said(change: str | None) -> str:
    return f"changed by {change}" if change else "unchanged"


def _notes(a: Adapter, b: Adapter) -> Iterator[str]:
    for component, one, other in _bases(a, b):
        if one.id and other.id and model_name(one) != model_name(other):
            yield f"{component}base model: {one.id} in A, {other.id} in B"
        elif one.revision and other.revision and one.revision != other.revision:
            yield f"{component}base model: revision {one.revision} in A, {other.revision} in B"


def _bases(a: Adapter, b: Adapter) -> Iterator[tuple[str, Base, Base]]:
    for component in dict.fromkeys((*a.bases, *b.bases)):
        label = f"{component}: " if component else ""
        yield label, a.bases.get(component, Base()), b.bases.get(component, Base())
