"""Lower ranks: the nearest delta weight that fits, and how near it is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from adaptertools.adapter import Adapter, LoraModule, expect_adapter
from adaptertools.errors import OptionError
from adaptertools.operations.families import Spectra
from adaptertools.operations.fit import Fit
from adaptertools.operations.rank_rule import RankRule
from adaptertools.operations.ranks import kept_and_lost, nbytes, norm
from adaptertools.operations.sizes import parse_size, stored_bytes
from adaptertools.operations.spectra import cast_error, rebuild
from adaptertools.operations.truncation import ModuleTruncation, Outlook, Truncation, recorded, sketched
from adaptertools.tensors import in_parallel

__all__ = ["Measure", "ModuleTruncation", "Outlook", "Truncation", "truncate", "truncation_table"]

Measure = Callable[[Adapter, torch.dtype | None], int]
"""How many bytes an adapter takes in files whose tensors are cast to a dtype, if to any."""

_ATTEMPTS = 4
"""Adapters made in search of the one that fills a size, or that is within an error after rounding; one is the rule."""

_ROOM_FOR_DIGITS = 24
"""The most bytes by which a sketch may fall short: the digits of the error that writing adds to the history."""


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
    allow_nonfinite: bool = False,
    measure: Measure = stored_bytes,
    on_progress: Callable[[int, int], None] | None = None,
) -> Truncation:
    """Lower every module to the rank that one rule gives it, keeping the nearest delta weight.

    `rank`: at most that in every module. `energy`: for every module the smallest rank that keeps this share of Σσ².
    `error`: the smallest file within this relative error, over all modules together, rounding included where that can
    be; a note says where it cannot. `size`: the nearest delta weight whose files fit; a percentage is of what the files
    of this adapter take. `max_rank` caps any of them. `error` and `size` are optimal up to one singular direction, and
    keep rank 1 everywhere.

    `measure` says what files take. Unless given it counts a PEFT folder with a safetensors file, somewhat too high. For
    another format, or to fill a size to the byte, give what will write:
    `measure=lambda adapter, dtype: adaptertools.stored_size(adapter, format="flax", dtype=dtype)`.

    Nearest is in Frobenius norm. The scaling of every module stays what it was, so alpha follows the rank. Modules at
    or below their rank are the same objects; all slots of a fused projection and all experts of a stack have one rank,
    each truncated on its own basis. Modules that share lora_A as one tensor go on sharing it. Of DoRA the direction is
    truncated and the magnitude kept. The new factors are rounded once, to `dtype` if given; modules that stay as they
    are are left to the writer to cast, and `rounding_error` counts what that will do. With `allow_nonfinite`, modules
    that hold NaN or infinity stay as they are, if no rank that is asked for is below theirs.

    Shapes: lora_A (…, r, in) -> (…, k, in); lora_B (…, out, r) -> (…, out, k)
    Units:  ranks are nominal: r of a convolution of loralib's, whose factors have an inner dimension of k·r
    Memory: the new factors, two r by r matrices a module, a batch of factors in float64; never a delta weight
    Raises: OptionError unless one rule is given that makes sense, or if `size` is too small for rank 1 everywhere;
            UnsupportedFeatureError for an adapter on a changed base, or without modules; NonFiniteError
    Source: Eckart & Young 1936; QR of each factor, then SVD of an r by r matrix
    """
    expect_adapter(adapter)
    rule = RankRule.parse(rank=rank, energy=energy, error=error, size=size, max_rank=max_rank)
    spectra = Spectra.of(adapter, device, dtype, on_progress, allow_nonfinite=allow_nonfinite, limit=rule.limit)
    match rule.name:
        case "size":
            return _fitted(spectra, rule, measure)
        case "error":
            return _within_error(spectra, rule, measure)
        case _:
            return _truncated(spectra, rule.ranks(spectra.ladders), rule, measure)


def truncation_table(
    adapter: Adapter,
    *,
    ranks: Sequence[int] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    allow_nonfinite: bool = False,
    measure: Measure = stored_bytes,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Outlook, ...]:
    """What truncating to several ranks would give, from the singular values alone; 1, 2, 4 … unless given.

    Where modules with NaN or infinity are carried along, unless ranks are given only those that leave them as they are.

    Raises: as `truncate`
    """
    expect_adapter(adapter)
    rules = [RankRule.parse(rank=rank) for rank in ranks or ()]
    limit = min((rule.value for rule in rules), default=None)
    spectra = Spectra.of(adapter, device, dtype, on_progress, allow_nonfinite=allow_nonfinite, limit=limit)
    if ranks is None:
        carried = max((module.nominal_rank for module in spectra.carried), default=1)
        largest = max(map(len, spectra.ladders), default=carried)
        doubled = [1 << power for power in range(largest.bit_length())]
        chosen = dict.fromkeys(max(rank, carried) for rank in (*doubled, largest))
        rules = [RankRule.parse(rank=rank) for rank in chosen]
    return tuple(_outlook(spectra, rule, measure) for rule in rules)


def _outlook(spectra: Spectra, rule: RankRule, measure: Measure) -> Outlook:
    ranks = rule.ranks(spectra.ladders)
    energy, error = kept_and_lost(spectra.ladders, ranks)
    return Outlook(
        choice=str(rule),
        ranks=tuple(ranks),
        energy=energy,
        relative_error=error,
        nbytes_on_disk=measure(sketched(spectra, ranks, rule), spectra.dtype) + _ROOM_FOR_DIGITS,
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
        nbytes_on_disk=0,
    )
    done = recorded(spectra, ranks, result, rule)
    return replace(done, nbytes_on_disk=measure(done.adapter, spectra.dtype))


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


def _within_error(spectra: Spectra, rule: RankRule, measure: Measure) -> Truncation:
    """The smallest adapter within the error, and within it after rounding if finer ranks can make up for that.

    The sum of both errors is what counts: a bound that holds whatever the rounding.
    """
    first = result = _truncated(spectra, rule.ranks(spectra.ladders), rule, measure)
    for _ in range(_ATTEMPTS):
        left = rule.value - result.rounding_error
        if result.relative_error <= left or first.relative_error > rule.value or left <= 0:
            break
        result = _truncated(spectra, replace(rule, value=left).ranks(spectra.ladders), rule, measure)
    return result if result.relative_error + result.rounding_error <= rule.value else first


def _fitted(spectra: Spectra, rule: RankRule, measure: Measure) -> Truncation:
    """The truncation that takes most of the size asked for.

    Ranks are found on sketches, whose histories may differ in digits from that of the adapter itself, so that this one
    is measured in the end.

    Raises: OptionError that says the smallest size that would do
    """
    wanted = _wanted(spectra, rule, measure)
    fit = Fit(spectra.ladders, rule.max_rank, lambda ranks: measure(sketched(spectra, ranks, rule), spectra.dtype))
    target = wanted
    for _ in range(_ATTEMPTS):
        ranks = fit.within(target)
        if ranks is None:
            break
        result = _truncated(spectra, ranks, rule, measure)
        if result.nbytes_on_disk <= wanted:
            return result
        target -= result.nbytes_on_disk - wanted
    return _at_rank_one(spectra, rule, measure, wanted)


def _wanted(spectra: Spectra, rule: RankRule, measure: Measure) -> int:
    """The size in bytes. A percentage leaves out the history, which grows; at 100% nothing else makes room for it."""
    whole = measure(replace(spectra.adapter, history=()), None)
    wanted = parse_size(rule.value, whole)
    if wanted == whole and str(rule.value).rstrip().endswith("%"):
        untouched = replace(spectra, dtype=None)
        return measure(sketched(untouched, list(map(len, spectra.ladders)), rule), None)
    return wanted


def _at_rank_one(spectra: Spectra, rule: RankRule, measure: Measure, wanted: int) -> Truncation:
    """Raises: OptionError if even that takes more than `wanted` bytes"""
    least = [1] * len(spectra.ladders)
    result = _truncated(spectra, least, rule, measure)
    needed = result.nbytes_on_disk
    if needed <= wanted:
        return result
    for _ in range(_ATTEMPTS):  # the history says the size that was asked for, in as many digits as it has
        again = _truncated(spectra, least, replace(rule, value=needed), measure).nbytes_on_disk
        if again <= needed:
            break
        needed = again
    stated = f"{rule.value}, {wanted} bytes" if str(rule.value) != str(wanted) else f"{wanted} bytes"
    raise OptionError(f"size is {stated}; rank 1 in every module takes {needed}: ask for that at least")
