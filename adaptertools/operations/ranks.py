"""Which rank every module gets: arithmetic on singular values and bytes alone.

A ladder is what one rank number governs: a module, the slots of a fused projection, a stack of experts. Its steps are
taken in order, so choosing ranks is choosing how far to climb each. Steps are scored by energy per byte.
Source: fractional knapsack; as the steps of a ladder fall, sorting all scores is optimal up to the last step
"""

import bisect
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The steps of one rank number. `norms` are what each adds to ‖ΔW‖, falling; `costs` are their bytes."""

    norms: tuple[float, ...]
    costs: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.norms)

    @property
    def useful(self) -> int:
        """The rank beyond which nothing changes, at least 1."""
        return max(1, sum(norm > 0 for norm in self.norms))

    def limited(self, most: int | None) -> int:
        """The rank under a limit: all of a ladder that is no longer than it, else no step that changes nothing."""
        return len(self) if most is None or len(self) <= most else min(most, self.useful)


def joined(ladders: Sequence[Ladder]) -> Ladder:
    """Several ladders climbed in step; the shorter ones end earlier."""
    if len(ladders) == 1:
        return ladders[0]
    height = max(map(len, ladders))
    steps = [[ladder for ladder in ladders if len(ladder) > step] for step in range(height)]
    return Ladder(
        norms=tuple(math.hypot(*(ladder.norms[i] for ladder in present)) for i, present in enumerate(steps)),
        costs=tuple(sum(ladder.costs[i] for ladder in present) for i, present in enumerate(steps)),
    )


def nbytes(ladders: Sequence[Ladder], ranks: Sequence[int]) -> int:
    """The bytes of the steps that are kept."""
    return sum(sum(ladder.costs[:rank]) for ladder, rank in zip(ladders, ranks, strict=True))


def kept_and_lost(ladders: Sequence[Ladder], ranks: Sequence[int]) -> tuple[float, float]:
    """What these ranks do to all ladders together: the share of ‖ΔW‖² that they keep, and ‖ΔW' − ΔW‖ / ‖ΔW‖.

    The error comes from what is lost itself, so that small ones have all digits. Of nothing, all is kept.
    """
    energies = _energies(ladders)
    total = math.fsum(energy for steps in energies for energy in steps)
    kept = math.fsum(energy for steps, rank in zip(energies, ranks, strict=True) for energy in steps[:rank])
    lost = math.fsum(energy for steps, rank in zip(energies, ranks, strict=True) for energy in steps[rank:])
    return kept / total if total else 1.0, _relative(lost, total)


def energy_kept(ladders: Sequence[Ladder], ranks: Sequence[int]) -> float:
    """The share of ‖ΔW‖² that these ranks keep."""
    return kept_and_lost(ladders, ranks)[0]


def relative_error(ladders: Sequence[Ladder], ranks: Sequence[int]) -> float:
    """‖ΔW' − ΔW‖ / ‖ΔW‖ at these ranks."""
    return kept_and_lost(ladders, ranks)[1]


def at_most(ladders: Sequence[Ladder], rank: int) -> list[int]:
    """At most this rank everywhere."""
    return [ladder.limited(rank) for ladder in ladders]


def within_energy(ladders: Sequence[Ladder], share: float, most: int | None = None) -> list[int]:
    """For every ladder the smallest rank that keeps this share of its energy; at most `most`."""
    return [min(_keeping(ladder, share), ladder.limited(most)) for ladder in ladders]


def within_error(ladders: Sequence[Ladder], error: float, most: int | None = None) -> list[int]:
    """The fewest bytes whose relative error, over all ladders together, is at most `error`; `most` goes before it.

    The steps that lose least per byte go first. Where the next one is too much, those of other ladders still go, as
    long as they fit: the result is the smallest up to one step. Every ladder keeps its first.
    """
    ranks = [ladder.limited(most) for ladder in ladders]
    energies = _energies(ladders)
    total = math.fsum(energy for steps in energies for energy in steps)
    lost = math.fsum(energy for steps, rank in zip(energies, ranks, strict=True) for energy in steps[rank:])
    taken: list[int] = []
    waiting = [(_score(energies, ladders, i, rank - 1), i) for i, rank in enumerate(ranks) if rank > 1]
    heapq.heapify(waiting)
    while waiting:
        _, index = heapq.heappop(waiting)
        energy = energies[index][ranks[index] - 1]
        if energy and _relative(lost + energy, total) > error:
            continue
        lost += energy
        ranks[index] -= 1
        taken.append(index)
        if ranks[index] > 1:
            heapq.heappush(waiting, (_score(energies, ladders, index, ranks[index] - 1), index))
    while taken and relative_error(ladders, ranks) > error:  # the running sum is rounded at every step
        ranks[taken.pop()] += 1
    return ranks


def within_bytes(ladders: Sequence[Ladder], budget: int, most: int | None = None) -> list[int]:
    """The ranks that keep most energy in at most `budget` bytes; rank 1 everywhere even if that is more.

    Where all fits, all stays as it is. Else no step is taken that changes nothing, and those that keep most per byte
    come first. Where the next one does not fit, those of other ladders still come, as long as they do: the result is
    the best up to one step.
    """
    limits = [ladder.limited(most) for ladder in ladders]
    if nbytes(ladders, limits) <= budget:
        return limits
    limits = [min(limit, ladder.useful) for ladder, limit in zip(ladders, limits, strict=True)]
    energies = _energies(ladders)
    ranks = [1] * len(ladders)
    spent = nbytes(ladders, ranks)
    waiting = [(-_score(energies, ladders, i, 1), i) for i, limit in enumerate(limits) if limit > 1]
    heapq.heapify(waiting)
    while waiting:
        _, index = heapq.heappop(waiting)
        cost = ladders[index].costs[ranks[index]]
        if spent + cost > budget:
            continue
        spent += cost
        ranks[index] += 1
        if ranks[index] < limits[index]:
            heapq.heappush(waiting, (-_score(energies, ladders, index, ranks[index]), index))
    return ranks


def _keeping(ladder: Ladder, share: float) -> int:
    if share >= 1.0:
        return ladder.useful
    ranks = range(1, len(ladder) + 1)
    return ranks[bisect.bisect_left(ranks, share, key=lambda rank: energy_kept([ladder], [rank]), hi=len(ladder) - 1)]


def _energies(ladders: Sequence[Ladder]) -> list[list[float]]:
    """The squared norms, all in one unit that keeps them within the range of a float: a power of two, to be exact."""
    exponent = math.frexp(max((norm for ladder in ladders for norm in ladder.norms), default=0.0))[1]
    return [[math.ldexp(norm, -exponent) ** 2 for norm in ladder.norms] for ladder in ladders]


def _score(energies: Sequence[Sequence[float]], ladders: Sequence[Ladder], index: int, step: int) -> float:
    return energies[index][step] / ladders[index].costs[step]


def _relative(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total else 0.0


def norm(values: Iterable[float]) -> float:
    """√Σx², whatever the size of the values."""
    return math.hypot(*values)
