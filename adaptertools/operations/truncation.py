"""What a truncation gives: the adapter, the figures of every module and of all, and what to know about them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from adaptertools.adapter import Adapter, Feature, HistoryEntry, merge_notes
from adaptertools.errors import count
from adaptertools.operations.families import Spectra
from adaptertools.operations.rank_rule import RankRule
from adaptertools.operations.ranks import energy_kept, kept_and_lost
from adaptertools.tensors import dtype_name

_ANY_ROUNDING = 1e-9 / 3
"""A rounding error that takes as much room in the history as any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleTruncation:
    """What became of one module. Modules that share lora_A as one tensor are truncated as one, under all their names.

    Units: ranks are nominal, as alpha is divided by them; errors are relative to the module's own ‖ΔW‖; bytes are those
    of both factors
    """

    target: str
    rank_before: int
    rank_after: int
    energy: float
    relative_error: float
    rounding_error: float
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a choice of ranks would give. `nbytes_on_disk` is that of all files, by `measure`, at most."""

    choice: str
    ranks: tuple[int, ...]
    energy: float
    relative_error: float
    nbytes_on_disk: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truncation:
    """A truncated adapter, and how near it is to the one before: over all modules together, and for each in `rows`.

    `energy` is the share of ‖ΔW‖² that was kept. `relative_error` is ‖ΔW' − ΔW‖ / ‖ΔW‖ before anything is rounded,
    `rounding_error` what storing the new factors in their dtype adds to it, at most. Both are exact, and leave out
    DoRA's magnitudes. `nbytes_on_disk` is what `measure` says that the adapter's files take.
    """

    adapter: Adapter
    choice: str
    rows: tuple[ModuleTruncation, ...]
    energy: float
    relative_error: float
    rounding_error: float
    nbytes_on_disk: int
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether no module was truncated, and none will be rounded."""
        return self.rounding_error == 0 and all(row.rank_after == row.rank_before for row in self.rows)

    @property
    def outlook(self) -> Outlook:
        """The totals alone."""
        return Outlook(
            choice=self.choice,
            ranks=tuple(row.rank_after for row in self.rows),
            energy=self.energy,
            relative_error=self.relative_error,
            nbytes_on_disk=self.nbytes_on_disk,
        )

    def to_json(self) -> dict[str, Any]:
        """The figures, without the adapter."""
        return {
            "choice": self.choice,
            "exact": self.exact,
            "energy": self.energy,
            "relative_error": self.relative_error,
            "rounding_error": self.rounding_error,
            "modules": [asdict(row) for row in self.rows],
        }


def recorded(spectra: Spectra, ranks: Sequence[int], result: Truncation, rule: RankRule) -> Truncation:
    """The result with its entry in the history and with its notes, on itself and on the adapter."""
    notes = tuple(_notes(spectra, ranks, result, rule))
    figures = (result.energy, result.relative_error, result.rounding_error)
    adapter = with_entry(replace(result.adapter, notes=merge_notes(result.adapter.notes, notes)), rule, *figures)
    return replace(result, adapter=adapter, notes=notes)


def with_entry(
    adapter: Adapter, rule: RankRule, energy: float, relative_error: float, rounding_error: float
) -> Adapter:
    """The adapter with this truncation in its history."""
    details = {
        "choice": str(rule),
        "energy": energy,
        "relative_error": relative_error,
        "rounding_error": rounding_error,
    }
    source = adapter.origin.name if adapter.origin else None
    return adapter.then(HistoryEntry(operation="truncate", source=source, details=details))


def sketched(spectra: Spectra, ranks: Sequence[int], rule: RankRule) -> Adapter:
    """An adapter that takes as much room as the one at these ranks of the groups: with parts of the old factors.

    Memory: none; the parts are views
    """
    modules, untouched = list(spectra.adapter.modules), True
    for family, ladder, rank in zip(spectra.families, spectra.steps, spectra.of_families(ranks), strict=True):
        if rank == len(ladder):
            continue
        inner, untouched = rank * family.joined.kernel_fold, False
        parts = family.joined.lora_A[..., :inner, :], family.joined.lora_B[..., :inner]
        for place, module in zip(family.places, family.with_factors(*parts, rank), strict=True):
            modules[place] = module
    rounding = 0.0 if untouched and spectra.dtype is None else _ANY_ROUNDING
    adapter = replace(spectra.adapter, modules=tuple(modules))
    return with_entry(adapter, rule, *kept_and_lost(spectra.ladders, ranks), rounding)


def _notes(spectra: Spectra, ranks: Sequence[int], result: Truncation, rule: RankRule) -> Iterator[str]:
    error, rounding = result.relative_error, result.rounding_error
    if rule.name == "error" and error > rule.value:
        yield (
            f"at most rank {rule.max_rank} keeps the relative error at {error:.4g}, above the {rule.value:g} that was "
            "asked for"
        )
    elif rule.name == "error" and error + rounding > rule.value:
        yield (
            f"the relative error is {error:.4g}, with the rounding to {_dtypes(result.adapter, spectra.dtype)} at most "
            f"{error + rounding:.4g}, above the {rule.value:g} that was asked for"
        )
    if rule.name == "energy":
        kept = [energy_kept([ladder], [rank]) for ladder, rank in zip(spectra.ladders, ranks, strict=True)]
        below = [i for i, share in enumerate(kept) if share < rule.value and ranks[i] == rule.max_rank]
        if below:
            least = min(below, key=lambda index: kept[index])
            yield (
                f"at most rank {rule.max_rank} keeps less than the energy {rule.value:g} that was asked for in "
                f"{len(below)} of {len(kept)} places, least in {spectra.families[spectra.groups[least][0]].name}: "
                f"{kept[least]:.4g}"
            )
    if spectra.carried:
        kept_whole = count(len(spectra.carried), "module", ("is", "are"))
        yield (
            f"NaN or infinity in {spectra.carried[0].target}: {kept_whole} kept bit for bit, and energies and errors "
            "leave that out"
        )
    if dora := result.adapter.holders(Feature.DORA):
        yield (
            f"DoRA in {count(len(dora), 'module')}: the direction was truncated and the magnitude kept; energies and "
            "errors are those of the direction"
        )


def _dtypes(adapter: Adapter, cast: torch.dtype | None) -> str:
    """Those that factors are stored in."""
    if cast is not None:
        return dtype_name(cast)
    return " and ".join(sorted({dtype_name(factor.dtype) for m in adapter.modules for factor in (m.lora_A, m.lora_B)}))
