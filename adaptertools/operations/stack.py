"""Several adapters as one: the exact weighted sum of their delta weights, or a consensus of them."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from adaptertools.adapter import Adapter, HistoryEntry, merge_notes
from adaptertools.errors import OptionError
from adaptertools.linalg import parse_device
from adaptertools.operations.agree import Agreement, Source, agree
from adaptertools.operations.combine import Combined, Rule, combine
from adaptertools.operations.consensus import check_density
from adaptertools.operations.core_space import DEFAULT_DENSITY
from adaptertools.operations.core_space import Method as ConsensusMethod
from adaptertools.operations.rank_rule import RankRule
from adaptertools.operations.sizes import stored_bytes
from adaptertools.operations.truncate import Measure, truncate
from adaptertools.operations.truncation import Truncation
from adaptertools.tensors import parse_dtype

Method = Literal["sum"] | ConsensusMethod

METHODS: tuple[str, ...] = ("sum", *get_args(ConsensusMethod))

_SEEDED = ("dare-linear", "dare-ties")


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedModule:
    """One module of the stack. `ranks` has an entry for every source, 0 where it does not change the weight.

    `relative_error` is the largest of any element that was folded or added up, against the magnitudes that went into
    it; `rounding_error` that of factors made anew, ‖ΔW' − ΔW‖ / ‖ΔW‖. Both come before a truncation.

    Units: ranks are nominal, as alpha is divided by them
    """

    target: str
    ranks: tuple[int, ...]
    rank: int
    relative_error: float
    rounding_error: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stacked:
    """The stack, and how near it is to what was meant: the largest errors of its modules, which `rows` has one by one.

    `settings` are the method and what it was given, with the name and weight of every source. `left_out` are the whole
    weights that were not taken, `truncation` what lowering the rank did to the stack.
    """

    adapter: Adapter
    settings: Mapping[str, Any]
    rows: tuple[StackedModule, ...]
    left_out: tuple[str, ...] = ()
    truncation: Truncation | None = None

    @property
    def max_relative_error(self) -> float:
        return max((row.relative_error for row in self.rows), default=0.0)

    @property
    def rounding_error(self) -> float:
        return max((row.rounding_error for row in self.rows), default=0.0)

    @property
    def exact(self) -> bool:
        """Whether not one bit was lost in combining the sources; a truncation comes after that."""
        return self.max_relative_error == 0.0 and self.rounding_error == 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        return self.adapter.notes

    def to_json(self) -> dict[str, Any]:
        """The settings and the figures, without the adapter."""
        return {
            **self.settings,
            "exact": self.exact,
            "max_relative_error": self.max_relative_error,
            "rounding_error": self.rounding_error,
            "left_out": list(self.left_out),
            "modules": [asdict(row) for row in self.rows],
            "truncation": None if self.truncation is None else self.truncation.to_json(),
        }


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
    source; with a rank option that of `truncate` follows.

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
    stacked = _stacked(sources, agreed, combined, {key: value for key, value in settings.items() if value is not None})
    if not lowered:
        return stacked
    done = truncate(
        replace(stacked.adapter, origin=None),  # not of one source, so that the history names none
        **limits,
        device=device,
        dtype=wanted,
        measure=measure,
        on_progress=on_progress,
    )
    adapter = replace(done.adapter if wanted is None else _cast(done.adapter, wanted), origin=stacked.adapter.origin)
    return replace(stacked, adapter=adapter, truncation=replace(done, adapter=adapter))


def _cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The modules that truncation left as they were in the dtype too, in which it counted their rounding."""
    return adapter.map_modules(
        lambda module: replace(
            module,
            lora_A=module.lora_A.to(dtype),
            lora_B=module.lora_B.to(dtype),
            lora_bias=None if module.lora_bias is None else module.lora_bias.to(dtype),
        )
    )


def _sources(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[Source]:
    """Raises: OptionError"""
    if not adapters:
        raise OptionError("there is no adapter to stack")
    given = [1.0] * len(adapters) if weights is None else list(weights)
    if len(given) != len(adapters):
        raise OptionError(f"{len(given)} weights for {len(adapters)} sources: give one for each, in their order")
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
    return Path(adapter.origin.label).name if adapter.origin else "in memory"


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
) -> Stacked:
    first = sources[0].adapter
    carried = [f"{source}: {note}" for source in sources for note in source.adapter.notes]
    rows = tuple(
        StackedModule(
            target=str(one.module.target),
            ranks=tuple(one.ranks.get(source.number, 0) for source in sources),
            rank=one.module.nominal_rank,
            relative_error=one.error,
            rounding_error=one.rounding,
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
    said = {**settings, "sources": [{"source": source.name, "weight": source.weight} for source in sources]}
    stacked = Stacked(adapter=adapter, settings=said, rows=rows, left_out=agreed.left_out)
    details = {
        **settings,
        "sources": [_recorded(source) for source in sources],
        "exact": stacked.exact,
        "max_relative_error": stacked.max_relative_error,
        **({"rounding_error": stacked.rounding_error} if stacked.rounding_error else {}),
        **({"left_out": list(agreed.left_out)} if agreed.left_out else {}),
    }
    return replace(stacked, adapter=adapter.then(HistoryEntry(operation="stack", details=details)))


def _recorded(source: Source) -> dict[str, Any]:
    """A source as the history holds it, with its own history inside."""
    history = [entry.to_json() for entry in source.adapter.history]
    return {"source": source.name, "weight": source.weight, **({"history": history} if history else {})}


def _notes(sources: Sequence[Source], combined: Sequence[Combined]) -> list[str]:
    notes = [f"{source} has weight 0 and contributes nothing" for source in sources if not source.weight]
    remade = [one for one in combined if one.capped_from]
    if remade:
        notes.append(
            f"{len(remade)} modules have the full rank of their weight, as the ranks of the sources add up to more: "
            f"{remade[0].module.target} {remade[0].module.nominal_rank} instead of {remade[0].capped_from}"
        )
    return notes
