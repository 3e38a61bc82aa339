"""The modules of several adapters combined, parameter by parameter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule, ScaleRule
from adaptertools.errors import ShapeError, UnsupportedFeatureError
from adaptertools.linalg import delta_norm
from adaptertools.operations.agree import Source
from adaptertools.operations.align import Parameter, by_parameter, in_common_layout
from adaptertools.operations.concatenate import Contribution, Terms
from adaptertools.operations.core_space import Method, combine_in_core_space
from adaptertools.operations.spectra import cast_error, decompose, rebuild
from adaptertools.operations.sum_error import SumError
from adaptertools.tensors import check_finite, dtype_name, in_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How to combine: the method with its settings, and what comes of it."""

    method: str
    density: float | None
    seed: int | None
    dtype: torch.dtype | None
    allow_nonfinite: bool
    device: torch.device

    @property
    def settings(self) -> dict[str, Any]:
        """The method and what belongs to it; None for what does not."""
        return {"method": self.method, "density": self.density, "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Combined:
    """One module of the result, the nominal rank it has in each source by number, and its errors.

    `dtypes` are those that its tensors have in the sources; `cancelled` says that nothing is left of several terms.
    """

    module: LoraModule
    ranks: dict[int, int]
    error: SumError
    dtypes: Mapping[str, frozenset[torch.dtype]] = field(default_factory=dict)
    cancelled: bool = False
    capped_from: int | None = None


Place = Sequence[tuple[Source, LoraModule]]
"""What sources have on one target, a whole weight or a slot of it, in one layout; one of them at least."""

Groups = Sequence[tuple[LoraModule, ...]]
"""The modules of each source on one parameter, none or several slots."""


def combine(
    sources: Sequence[Source], rule: Rule, on_progress: Callable[[int, int], None] | None = None
) -> list[Combined]:
    """The modules of all sources combined, in the order of the first source, then of the next that has more.

    `on_progress` counts parameters.

    Memory: the new factors
    Raises: ShapeError, UnsupportedFeatureError, NonFiniteError, each with the source; OptionError
    """
    tables = [by_parameter(source.adapter) for source in sources]
    parameters = list(dict.fromkeys(parameter for table in tables for parameter in table))

    def make(parameter: Parameter) -> list[Combined]:
        groups = [table.get(parameter, ()) for table in tables]
        places = _places(groups, sources)
        own = rule if rule.dtype or not _widened(groups, places) else replace(rule, dtype=torch.float32)
        made = _summed(places, own) if rule.method == "sum" else _merged(places, sources, own)
        return [replace(one, dtypes=_dtypes(groups)) for one in made]

    on_cpu = rule.method == "sum" or rule.device.type == "cpu"
    combined: list[Combined] = []
    for done, group in enumerate((in_parallel if on_cpu else map)(make, parameters), start=1):
        combined += group
        if on_progress is not None:
            on_progress(done, len(parameters))
    return _within_full_rank(combined, rule)


def _places(groups: Groups, sources: Sequence[Source]) -> list[Place]:
    """The modules by target.

    Raises: ShapeError that names the sources
    """
    try:
        aligned = in_common_layout(groups)
    except ShapeError as error:
        holders = [f"adapter {i} is {source}" for i, source in enumerate(sources, start=1) if groups[i - 1]]
        raise ShapeError(f"{error}; {', '.join(holders)}") from None
    places: dict[Any, list[tuple[Source, LoraModule]]] = {}
    for source, modules in zip(sources, aligned, strict=True):
        for module in modules:
            places.setdefault(module.target.rows, []).append((source, module))
    return [_conformed(place) for place in places.values()]


def _widened(groups: Groups, places: Sequence[Place]) -> bool:
    """Whether a common layout took float64 where the sources have none: to fold scalings that differ between slots."""
    before = {module.lora_B.dtype for group in groups for module in group}
    return torch.float64 in {module.lora_B.dtype for place in places for _, module in place} - before


def _conformed(place: Place) -> Place:
    """The same modules, each knowing of the weight what any of them knows.

    Raises: ShapeError where two contradict each other
    """
    kind = _only(place, "kind")
    shape, transposed = _only(place, "shape"), _only(place, "transposed")
    return [
        (source, replace(module, kind=kind, shape=shape, transposed=transposed))
        if (module.shape, module.transposed) != (shape, transposed)
        else (source, module)
        for source, module in place
    ]


def _only(place: Place, name: str) -> Any:
    """What all modules that know it say the attribute is; None where none does."""
    known = [(source, getattr(module, name)) for source, module in place if getattr(module, name) is not None]
    for source, value in known[1:]:
        if value != known[0][1]:
            raise ShapeError(
                f"{place[0][1].target}: {name} is {known[0][1]} in {known[0][0]} and {value} in {source}, so that they "
                "change different weights; --base settles what files leave open"
            )
    return known[0][1] if known else None


def _summed(places: Sequence[Place], rule: Rule) -> list[Combined]:
    """The weighted sums of the places of one parameter, all of the same rank."""
    terms = [
        Terms([Contribution(source=str(source), module=module, weight=source.weight) for source, module in place])
        for place in places
    ]
    rank = max(term.rank for term in terms)
    grown = rank > max(_full_rank([term.first for term in terms]), *(m.rank for place in places for _, m in place))
    dtype = None if grown else rule.dtype  # made anew, they are rounded then
    sums = [term.add(rank, dtype=dtype, allow_nonfinite=rule.allow_nonfinite) for term in terms]
    return [
        Combined(module=done.module, ranks=_ranks(place), error=done.error, cancelled=term.cancel)
        for place, term, done in zip(places, terms, sums, strict=True)
    ]


def _merged(places: Sequence[Place], sources: Sequence[Source], rule: Rule) -> list[Combined]:
    """What the method makes of the places of one parameter, in float32 at least and all of the same rank."""
    made = []
    for place in places:
        for source, module in place:
            if module.lora_bias is not None:
                raise UnsupportedFeatureError(
                    f"{source}: {module.target} has a lora_bias, and {rule.method} is a rule for delta weights alone; "
                    "sum adds biases, convert --drop lora-bias gives them up"
                )
            for name in ("lora_A", "lora_B"):
                check_finite(f"{source}: {module.target}.{name}", module.tensors[name])
        held = {source.number: module for source, module in place}
        contributions = [(held.get(source.number), source.weight) for source in sources]
        method = cast(Method, rule.method)
        made.append(
            combine_in_core_space(contributions, method, density=rule.density, seed=rule.seed or 0, device=rule.device)
        )
    fold = places[0][0][1].kernel_fold
    rank = -(-max(lora_A.shape[-2] for lora_A, _ in made) // fold) * fold
    return [
        _rounded(place, *_padded(lora_A, lora_B, rank), rule)
        for place, (lora_A, lora_B) in zip(places, made, strict=True)
    ]


def _padded(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - lora_A.shape[-2]
    return torch.nn.functional.pad(lora_A, (0, 0, 0, missing)), torch.nn.functional.pad(lora_B, (0, missing))


def _rounded(place: Place, lora_A: Tensor, lora_B: Tensor, rule: Rule) -> Combined:
    """A module of new factors in float64, rounded once."""
    first = place[0][1]
    device = first.lora_A.device
    wide = replace(
        first, lora_A=lora_A.to(device), lora_B=lora_B.to(device), scale_rule=ScaleRule.ALPHA_OVER_RANK, alpha=1.0
    )
    wide = replace(wide, alpha=float(wide.nominal_rank))
    dtype = rule.dtype or _new_dtype([module for _, module in place])
    module = replace(wide, lora_A=wide.lora_A.to(dtype), lora_B=wide.lora_B.to(dtype))
    for name in ("lora_A", "lora_B"):
        check_finite(f"{first.target}.{name} as {dtype_name(dtype)}", module.tensors[name])
    norm = delta_norm(wide)
    error = SumError(delta=cast_error(wide, dtype) / norm if norm else 0.0)
    gone = norm == 0 and any(delta_norm(module) for _, module in place)
    return Combined(module=module, ranks=_ranks(place), error=error, cancelled=gone)


def _ranks(place: Place) -> dict[int, int]:
    return {source.number: module.nominal_rank for source, module in place}


def _dtypes(groups: Groups) -> dict[str, frozenset[torch.dtype]]:
    """Those of all tensors of one parameter, by name."""
    found: dict[str, frozenset[torch.dtype]] = {}
    for name, tensor in (item for group in groups for module in group for item in module.tensors.items()):
        found[name] = found.get(name, frozenset()) | {tensor.dtype}
    return found


def _full_rank(modules: Sequence[LoraModule]) -> int:
    """The largest rank that the delta weights of one parameter can have."""
    return max(min(module.out_features, module.in_features) for module in modules)


def _new_dtype(modules: Sequence[LoraModule]) -> torch.dtype:
    dtypes = {factor.dtype for module in modules for factor in (module.lora_A, module.lora_B)}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _within_full_rank(combined: Sequence[Combined], rule: Rule) -> list[Combined]:
    """Modules whose rank has grown beyond that of any such matrix made anew, losing nothing but rounding."""
    by_name: dict[tuple[str, str], list[Combined]] = {}
    for one in combined:
        by_name.setdefault((one.module.target.component, one.module.target.parameter), []).append(one)
    large: dict[int, int] = {}
    for group in by_name.values():
        full = _full_rank([one.module for one in group])
        if group[0].module.rank > full and any(one.module.nominal_rank > max(one.ranks.values()) for one in group):
            large |= {id(one): full for one in group}
    grown = [one for one in combined if id(one) in large]
    modules = [one.module for one in grown]
    decompositions = decompose(modules, rule.device)
    ranks = [large[id(one)] for one in grown]
    rebuilt = rebuild(modules, decompositions, ranks, rule.device, rule.dtype or _new_dtype(modules))
    made = {}
    for one, decomposition, new in zip(grown, decompositions, rebuilt, strict=True):
        norm = float(torch.linalg.vector_norm(decomposition.singular_values))
        module = replace(one.module, lora_A=new.lora_A, lora_B=new.lora_B)
        alpha = ScaleRule.ALPHA_OVER_RANK.alpha(one.module.scaling, module.nominal_rank)
        module = replace(module, alpha=alpha, scale_rule=ScaleRule.ALPHA_OVER_RANK)
        slip = abs(module.scaling / one.module.scaling - 1) if one.module.scaling else 0.0
        rounding = (new.rounding / norm if norm else 0.0) + slip
        delta = one.error.delta + rounding * (1 + one.error.delta)  # at most: one error after the other
        error = replace(one.error, delta=delta)
        made[id(one)] = replace(one, module=module, error=error, capped_from=one.module.nominal_rank)
    return [made.get(id(one), one) for one in combined]
