"""Lower ranks: the nearest delta weight that fits, and how near it is."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from adaptertools.adapter import Adapter, LoraModule
from adaptertools.errors import OptionError
from adaptertools.operations.families import Spectra
from adaptertools.operations.rank_rule import RankRule
from adaptertools.operations.ranks import energy_kept, kept_and_lost, nbytes, norm, relative_error
from adaptertools.operations.sizes import parse_size, stored_bytes
from adaptertools.operations.spectra import cast_error, rebuild
from adaptertools.operations.truncation import ModuleTruncation, Outlook, Truncation, recorded, with_entry
from adaptertools.tensors import in_parallel

__all__ = ["Measure", "ModuleTruncation", "Outlook", "Truncation", "truncate", "truncation_table"]

Measure = Callable[[Adapter, torch.dtype | None], int]
"""At most how many bytes an adapter takes in files whose tensors are cast to a dtype, if to any."""

_ATTEMPTS = 10
"""Adapters made in search of the one that fills a size; one is the rule."""

_LEFT_OVER = 0.005
"""The share of a size that may be left over before another attempt is made to use it."""

_ROOM_FOR_PATTERNS = 100
"""Bytes of configuration for a module whose rank and alpha become its own, beside two mentions of its name."""

_ROOM_FOR_ENTRY = 100
"""The history says which size was asked for, and what became of it in as many digits as that takes."""

_FLATTEST = 0.5
"""The fewest bytes that a byte of factors is taken to need on disk."""


def truncate(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    size: int | str | None = None,
    max_rank: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    measure: Measure = stored_bytes,
    on_progress: Callable[[int, int], None] | None = None,
) -> Truncation:
    """Lower every module to the rank that one rule gives it, keeping the nearest delta weight.

    `rank`: at most that in every module. `energy`: for every module the smallest rank that keeps this share of Σσ².
    `error`: the smallest file within this relative error, over all modules together. `size`: the nearest delta weight
    that fits, where `measure` says what an adapter takes; a percentage is of what this adapter takes. `max_rank` caps
    any of them. `error` and `size` are optimal up to one singular direction, and keep rank 1 everywhere.

    Nearest is in Frobenius norm. The scaling of every module stays what it was, so alpha follows the rank. Modules at
    or below their rank are the same objects; all slots of a fused projection and all experts of a stack have one rank,
    each truncated on its own basis. Modules that share lora_A as one tensor go on sharing it. Of DoRA the direction is
    truncated and the magnitude kept. The new factors are rounded once, to `dtype` if given; modules that stay as they
    are are left to the writer to cast, and `rounding_error` counts what that will do.

    Shapes: lora_A (…, r, in) -> (…, k, in); lora_B (…, out, r) -> (…, out, k)
    Units:  ranks are nominal: r of a convolution of loralib's, whose factors have an inner dimension of k·r
    Memory: the new factors, two r by r matrices a module, a batch of factors in float64; never a delta weight
    Raises: OptionError unless one rule is given that makes sense, or if `size` is too small for rank 1 everywhere;
            UnsupportedFeatureError for an adapter on a changed base, or without modules; NonFiniteError
    Source: Eckart & Young 1936; QR of each factor, then SVD of an r by r matrix
    """
    rule = RankRule.parse(rank=rank, energy=energy, error=error, size=size, max_rank=max_rank)
    spectra = Spectra.of(adapter, device, dtype, on_progress)
    if rule.name == "size":
        return _fitted(spectra, rule, measure)
    return _truncated(spectra, rule.ranks(spectra.ladders), rule, measure)


def truncation_table(
    adapter: Adapter,
    *,
    ranks: Sequence[int] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    measure: Measure = stored_bytes,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Outlook, ...]:
    """What truncating to several ranks would give, from the singular values alone; 1, 2, 4 … unless given.

    Raises: as `truncate`
    """
    rules = [RankRule.parse(rank=rank) for rank in ranks] if ranks is not None else None
    spectra = Spectra.of(adapter, device, dtype, on_progress)
    largest = max(map(len, spectra.ladders))
    doubled = [1 << power for power in range(largest.bit_length())]
    rules = rules or [RankRule.parse(rank=rank) for rank in dict.fromkeys([*doubled, largest])]
    rest = measure(with_entry(adapter, rules[-1]), spectra.dtype) - spectra.factor_bytes(
        list(map(len, spectra.ladders))
    )
    return tuple(
        Outlook(
            choice=str(rule),
            ranks=tuple(chosen),
            energy=energy_kept(spectra.ladders, chosen),
            relative_error=relative_error(spectra.ladders, chosen),
            nbytes=rest + spectra.factor_bytes(chosen),
        )
        for rule in rules
        for chosen in [rule.ranks(spectra.ladders)]
    )


def _truncated(spectra: Spectra, ranks: Sequence[int], rule: RankRule, measure: Measure) -> Truncation:
    """The adapter at these ranks of its groups."""
    chosen = spectra.of_families(ranks)
    lowered = [i for i, (rank, ladder) in enumerate(zip(chosen, spectra.steps, strict=True)) if rank < len(ladder)]
    rebuilt = dict(
        zip(
            lowered,
            rebuild(
                [spectra.families[i].joined for i in lowered],
                [spectra.decompositions[i] for i in lowered],
                [chosen[i] * spectra.families[i].joined.kernel_fold for i in lowered],
                spectra.device,
                spectra.dtype,
            ),
            strict=True,
        )
    )
    modules = list(spectra.adapter.modules)
    roundings = dict(_kept_roundings(spectra, [i for i in range(len(chosen)) if i not in rebuilt]))
    for index, new in rebuilt.items():
        family = spectra.families[index]
        made = family.with_factors(new.lora_A, new.lora_B, chosen[index])
        for place, module in zip(family.places, made, strict=True):
            modules[place] = module
        roundings[index] = new.rounding * abs(family.joined.scaling) + _scaling_error(spectra, index, made, chosen)
    rows = tuple(_row(spectra, i, rank, roundings[i]) for i, rank in enumerate(chosen))
    total = norm(value for ladder in spectra.steps for value in ladder.norms)
    energy, error = kept_and_lost(spectra.ladders, ranks)
    result = Truncation(
        adapter=replace(spectra.adapter, modules=tuple(modules)),
        choice=str(rule),
        rows=rows,
        energy=energy,
        relative_error=error,
        rounding_error=norm(roundings.values()) / total if total else 0.0,
        nbytes=0,
    )
    done = recorded(spectra, ranks, result, rule)
    return replace(done, nbytes=measure(done.adapter, spectra.dtype))


def _kept_roundings(spectra: Spectra, kept: Sequence[int]) -> Iterator[tuple[int, float]]:
    """What casting does to the modules that stay as they are."""

    def of(index: int) -> tuple[int, float]:
        module = spectra.families[index].joined
        error = cast_error(module, spectra.dtype) if spectra.dtype is not None else 0.0
        return index, error * abs(module.scaling)

    return in_parallel(of, kept)


def _scaling_error(spectra: Spectra, index: int, made: Sequence[LoraModule], ranks: Sequence[int]) -> float:
    """What the new scaling is off by, where no alpha gives exactly the old one: one unit in the last place."""
    old = spectra.families[index].inner.scaling
    kept = norm(spectra.steps[index].norms[: ranks[index]])
    return abs(made[0].scaling - old) / abs(old) * kept if old else 0.0


def _row(spectra: Spectra, index: int, rank: int, rounding: float) -> ModuleTruncation:
    family, ladder = spectra.families[index], spectra.steps[index]
    total = norm(ladder.norms)
    energy, error = kept_and_lost([ladder], [rank])
    return ModuleTruncation(
        target=family.name,
        rank_before=len(ladder),
        rank_after=rank,
        energy=energy,
        relative_error=error,
        rounding_error=rounding / total if total else 0.0,
        nbytes=nbytes([ladder], [rank]),
    )


def _fitted(spectra: Spectra, rule: RankRule, measure: Measure) -> Truncation:
    """The truncation that takes most of the size asked for.

    What an adapter takes is known only when it is there: a format may fold a scaling in float32, or fuse modules. So
    the bytes of factors are adjusted, by what they made of the last two attempts, until they fit and little is left.

    Raises: OptionError that says the smallest size that would do
    """
    noted = with_entry(spectra.adapter, rule)
    wanted = parse_size(rule.value, measure(noted, None))
    whole, all_bytes = measure(noted, spectra.dtype), spectra.factor_bytes(list(map(len, spectra.ladders)))
    names = sum(len(family.name.encode()) for family in spectra.families)
    patterns = 2 * names + _ROOM_FOR_PATTERNS * len(spectra.adapter.modules) if whole > wanted else 0
    budget = wanted - (whole - all_bytes) - patterns
    too_much = (all_bytes, whole)
    best: Truncation | None = None
    tried: set[tuple[int, ...]] = set()
    while len(tried) < _ATTEMPTS:
        ranks = replace(rule, value=budget).ranks(spectra.ladders)
        if tuple(ranks) in tried:
            break
        tried.add(tuple(ranks))
        result = _truncated(spectra, ranks, rule, measure)
        taken, spent = result.nbytes, spectra.factor_bytes(ranks)
        if taken <= wanted and (best is None or result.energy > best.energy):
            best = result
        if spent == too_much[0] or 0 <= wanted - taken <= _LEFT_OVER * wanted:
            break
        slope = max(_FLATTEST, (too_much[1] - taken) / (too_much[0] - spent))
        too_much = (spent, taken) if taken > wanted else too_much
        budget = spent + math.floor((wanted - taken) / slope)
    if best is not None:
        return best
    result = _truncated(spectra, [1] * len(spectra.ladders), rule, measure)
    if result.nbytes > wanted:
        stated = f"{rule.value}, {wanted} bytes" if str(rule.value) != str(wanted) else f"{wanted} bytes"
        raise OptionError(
            f"size is {stated}; rank 1 in every module takes up to {result.nbytes + _ROOM_FOR_ENTRY}: ask for that at "
            "least"
        )
    return result
