"""Several adapters as one: the exact weighted sum of their delta weights, or a consensus of them."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Literal, get_args

import torch

from adaptertools.adapter import Adapter, HistoryEntry, LoraModule, expect_adapter, merge_notes
from adaptertools.errors import OptionError, count
from adaptertools.linalg import parse_device
from adaptertools.operations.agree import Agreement, Source, agree
from adaptertools.operations.combine import Combined, Rule, combine
from adaptertools.operations.consensus import check_density
from adaptertools.operations.core_space import DEFAULT_DENSITY
from adaptertools.operations.core_space import Method as ConsensusMethod
from adaptertools.operations.rank_rule import RankRule
from adaptertools.operations.sizes import stored_bytes
from adaptertools.operations.stacked import Stacked, StackedModule
from adaptertools.operations.truncate import Measure, truncate
from adaptertools.tensors import dtype_name, parse_dtype

__all__ = ["METHODS", "Method", "Stacked", "StackedModule", "stack"]

Method = Literal["sum"] | ConsensusMethod

METHODS: tuple[str, ...] = ("sum", *get_args(ConsensusMethod))

_SEEDED = ("dare-linear", "dare-ties")

_CANCELLATION = 100.0
"""How many times the error of elements that of a delta weight is where a note says that terms nearly cancel."""


def stack(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: Method = "sum",
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    size: int | str | None = None,
    max_rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    full_weights: int | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    measure: Measure = stored_bytes,
    on_progress: Callable[[int, int], None] | None = None,
) -> Stacked:
    """Combine adapters into one whose delta weight is Σ wᵢ·ΔWᵢ, or what another method makes of wᵢ·ΔWᵢ.

    `sum` is exact: B = [w₁s₁B₁ w₂s₂B₂ …] and A = [A₁; A₂; …] as they are, where the coefficients do not differ, or by
    powers of two alone, in alpha and without any rounding; else folded into lora_B and rounded once, half precision
    becoming float32. Sources with the same lora_A or lora_B add up in the other factor. Ranks, alphas, scale rules,
    formats and the modules themselves may differ. The rank stays within min(out, in): beyond, the factors are made
    anew, which loses no direction. What one source has alone is kept bit for bit, a weight other than 1 in alpha.

    `ties`, `dare-linear`, `dare-ties` and `knots-ties` are element-wise rules in the sources' joint singular basis,
    see `core_space`. `density` is theirs, `seed` (0 unless given) that of DARE.

    `rank`, `energy`, `error`, `size`, `max_rank` and `measure` are those of `truncate`, which follows if one of the
    first five is given; `size` may be a share of the stack. `weights` are 1 unless given; a source of weight 0
    contributes nothing. Whole weights that differ are refused unless `full_weights` says whose to take, base models
    that differ unless `force`. `dtype` is that of all factors. The history has one entry, which holds that of every
    source; with a rank option that of `truncate` follows, and all factors are in the dtype of the sources, where that
    is one and `dtype` names no other.

    How far the sum is from the one that was meant is measured wherever factors were rounded, relative to its norm:
    exactly up to rank 128, beyond by an estimate from random directions, see `sum_error`.

    Shapes: lora_A (…, rᵢ, in) -> (…, Σrᵢ, in); lora_B (…, out, rᵢ) -> (…, out, Σrᵢ)
    Memory: the new factors; never a delta weight
    Raises: OptionError for weights, methods and settings that make no sense
            UnsupportedFeatureError for DoRA, a changed base, and what sources contradict one another in, by name
            ShapeError for delta weights of different shapes, NonFiniteError
    """
    sources = _sources(adapters, weights)
    limits: dict[str, Any] = {"rank": rank, "energy": energy, "error": error, "size": size, "max_rank": max_rank}
    lowered = any(limit is not None for limit in limits.values())
    if lowered:
        RankRule.parse(**limits)  # so that a bad one fails before the work
    wanted = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    rule = _rule(method, density, seed, None if lowered else wanted, allow_nonfinite, device)
    agreed = agree(sources, full_weights=full_weights, force=force)
    combined = combine([source for source in sources if source.weight], rule, on_progress)
    settings = {**rule.settings, "full_weights": full_weights, "force": force or None}
    given = {key: value for key, value in settings.items() if value is not None}
    stacked = _stacked(sources, agreed, combined, given, cast=rule.dtype is not None)
    if not lowered:
        return stacked
    own = wanted or _dtype_of_sources(combined)
    done = truncate(
        replace(stacked.adapter, origin=None),  # not of one source, so that the history names none
        **limits,
        device=device,
        dtype=own,
        allow_nonfinite=allow_nonfinite,
        measure=measure,
        on_progress=on_progress,
    )
    adapter = done.adapter if own is None else _cast(done.adapter, own, biases=wanted is not None)
    adapter = replace(adapter, origin=stacked.adapter.origin)
    promoted = {} if wanted else _promoted(adapter, combined)
    return replace(stacked, adapter=adapter, promoted=promoted, truncation=replace(done, adapter=adapter))


def _dtype_of_sources(combined: Sequence[Combined]) -> torch.dtype | None:
    """The widest dtype of the factors in the sources; None where modules differ in that."""
    widest = set()
    for one in combined:
        dtypes = [dtype for name in ("lora_A", "lora_B") for dtype in one.dtypes[name]]
        widest.add(reduce(torch.promote_types, (torch.float32 if d.itemsize == 1 else d for d in dtypes)))
    return widest.pop() if len(widest) == 1 else None


def _cast(adapter: Adapter, dtype: torch.dtype, *, biases: bool) -> Adapter:
    """The modules that truncation left as they were in the dtype too, in which it counted their rounding."""

    def cast(module: LoraModule) -> LoraModule:
        bias = module.lora_bias.to(dtype) if biases and module.lora_bias is not None else module.lora_bias
        return replace(module, lora_A=module.lora_A.to(dtype), lora_B=module.lora_B.to(dtype), lora_bias=bias)

    return adapter.map_modules(cast)


def _promoted(adapter: Adapter, combined: Sequence[Combined]) -> dict[str, str]:
    """The tensors of modules whose dtype is that of no source, with that dtype."""
    before = {one.module.target: one.dtypes for one in combined}
    return {
        f"{module.target}.{name}": dtype_name(tensor.dtype)
        for module in adapter.modules
        for name, tensor in module.tensors.items()
        if tensor.dtype not in before[module.target][name]
    }


def _sources(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[Source]:
    """Raises: OptionError"""
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise OptionError(f"adapters is of type {type(adapters).__name__}, expected a list of adapters")
    if not adapters:
        raise OptionError("there is no adapter to stack")
    for adapter in adapters:
        expect_adapter(adapter)
    if weights is not None and (isinstance(weights, str) or not isinstance(weights, Iterable)):
        raise OptionError(f"weights is {weights!r:.40}, expected a list of numbers, one for each source")
    given = [1.0] * len(adapters) if weights is None else list(weights)
    if len(given) != len(adapters):
        numbers = f"{count(len(given), 'weight')} for {count(len(adapters), 'source')}"
        raise OptionError(f"{numbers}: give one for each, in their order")
    for weight in given:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not _is_usable(weight):
            raise OptionError(f"a weight is {weight!r:.40}, expected a finite number")
    if not any(given):
        raise OptionError("every weight is 0, so that nothing would be left")
    return [
        Source(number=number, name=_name(adapter), adapter=adapter, weight=float(weight))
        for number, (adapter, weight) in enumerate(zip(adapters, given, strict=True), start=1)
    ]


def _is_usable(weight: float) -> bool:
    try:
        return weight == 0 or (math.isfinite(weight) and abs(float(weight)) >= sys.float_info.min)
    except OverflowError:  # an integer beyond every float
        return False


def _name(adapter: Adapter) -> str:
    return adapter.origin.name if adapter.origin else "in memory"


def _rule(
    method: str,
    density: float | None,
    seed: int | None,
    dtype: torch.dtype | None,
    allow_nonfinite: bool,
    device: str | torch.device,
) -> Rule:
    """Raises: OptionError"""
    if method not in METHODS:
        raise OptionError(f"method is {method!r:.40}, expected one of {', '.join(METHODS)}")
    if method == "sum" and density is not None:
        raise OptionError("density is for the methods that drop or trim entries; sum keeps all of them")
    if method not in _SEEDED and seed is not None:
        raise OptionError(f"seed is for {' and '.join(_SEEDED)}; {method} leaves nothing to chance")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise OptionError(f"seed is {seed!r:.40}, expected a whole number")
    if method != "sum":
        density = DEFAULT_DENSITY[method] if density is None else check_density(density)
    return Rule(
        method=method,
        density=density,
        seed=(seed or 0) if method in _SEEDED else None,
        dtype=dtype,
        allow_nonfinite=allow_nonfinite,
        device=parse_device(device),
    )


def _stacked(
    sources: Sequence[Source],
    agreed: Agreement,
    combined: Sequence[Combined],
    settings: Mapping[str, Any],
    *,
    cast: bool,
) -> Stacked:
    first = sources[0].adapter
    carried = [f"{source}: {note}" for source in sources for note in source.adapter.notes]
    rows = tuple(
        StackedModule(
            target=str(one.module.target),
            ranks=tuple(one.ranks.get(source.number, 0) for source in sources),
            rank=one.module.nominal_rank,
            delta_error=one.error.delta,
            element_error=one.error.element,
            estimated=one.error.estimated,
        )
        for one in combined
    )
    adapter = Adapter(
        modules=tuple(one.module for one in combined),
        full_weights=agreed.full_weights,
        row_weights=agreed.row_weights,
        bases=agreed.bases,
        invocation_tokens=agreed.invocation_tokens,
        metadata=agreed.metadata,
        notes=merge_notes(carried, agreed.notes, _notes(sources, combined)),
        origin=first.origin,
    )
    promoted = {} if cast else _promoted(adapter, combined)
    said = {**settings, "sources": [{"source": source.name, "weight": source.weight} for source in sources]}
    stacked = Stacked(adapter=adapter, settings=said, rows=rows, left_out=agreed.left_out, promoted=promoted)
    details = {
        **settings,
        "sources": [_recorded(source) for source in sources],
        **stacked.figures,
        **({"left_out": list(agreed.left_out)} if agreed.left_out else {}),
    }
    return replace(stacked, adapter=adapter.then(HistoryEntry(operation="stack", details=details)))


def _recorded(source: Source) -> dict[str, Any]:
    """A source as the history holds it, with its own history inside."""
    history = [entry.to_json() for entry in source.adapter.history]
    return {"source": source.name, "weight": source.weight, **({"history": history} if history else {})}


def _notes(sources: Sequence[Source], combined: Sequence[Combined]) -> list[str]:
    notes = [f"{source} has weight 0 and contributes nothing" for source in sources if not source.weight]
    if gone := [str(one.module.target) for one in combined if one.cancelled]:
        some = f"{len(gone)} of {len(combined)} modules, such as {gone[0]}"
        where = some if len(gone) < len(combined) else "all modules"
        notes.append(f"the sources cancel one another in {where}: the delta weight is zero there")
    summed = [one for one in combined if one.error.element and not one.capped_from]
    if small := [one for one in summed if one.error.delta > _CANCELLATION * one.error.element]:
        most = max(small, key=lambda one: one.error.delta)
        notes.append(
            f"the sources nearly cancel one another in {count(len(small), 'module')}: beside what is left, the "
            f"rounding of the factors is large, in {most.module.target} {most.error.delta:.2g} of its norm"
        )
    if remade := [one for one in combined if one.capped_from]:
        full = count(len(remade), "module", ("has", "have"))
        notes.append(
            f"{full} the full rank of the weight, as the ranks of the sources add up to more: "
            f"{remade[0].module.target} {remade[0].module.nominal_rank} instead of {remade[0].capped_from}"
        )
    return notes
