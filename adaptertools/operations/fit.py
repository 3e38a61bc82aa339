"""The ranks whose files fill a size: found by measuring what each choice would take."""

import math
from collections.abc import Callable, Sequence

from adaptertools.operations.ranks import Ladder, at_most, energy_kept, nbytes, within_bytes

_ATTEMPTS = 10
"""Budgets that are tried; two or three are the rule."""

_MEASUREMENTS = 150
"""Choices that are measured in all, so that an end comes soon also where measuring reads the values of the factors."""

_FLATTEST = 0.5
"""The fewest bytes that a byte of factors is taken to need on disk."""

_SAVED = 200
"""The bytes that a step may save elsewhere: a module whose rank becomes that of most needs no rank of its own."""


class Fit:
    """The search for the ranks that keep most energy in files of a size. `size_of` says what the files of ranks take.

    The bytes of factors are adjusted by what they made of the last attempt: names, headers and configurations depend on
    the ranks too, and a format may fold a scaling in float32. Then single steps are tried, until none fits any more.
    """

    def __init__(
        self, ladders: Sequence[Ladder], max_rank: int | None, size_of: Callable[[Sequence[int]], int]
    ) -> None:
        self._ladders = ladders
        self._max_rank = max_rank
        self._size_of = size_of
        self._sizes: dict[tuple[int, ...], int] = {}
        self._all = [ladder.limited(max_rank) for ladder in ladders]
        self._slope = 1.0

    def within(self, wanted: int) -> list[int] | None:
        """The ranks whose files take `wanted` bytes at most; None where rank 1 everywhere takes more."""
        if self._size(self._all) <= wanted:
            return self._all
        least = [1] * len(self._ladders)
        if self._size(least) > wanted:
            return None
        best = self._climb(self._by_budget(wanted, least), wanted)
        while len(self._sizes) < _MEASUREMENTS and self._size(uniform := self._next_uniform(best)) <= wanted:
            best = self._climb(uniform, wanted)  # where no module needs a rank of its own, more may fit
        return best

    def _size(self, ranks: Sequence[int]) -> int:
        key = tuple(ranks)
        if key not in self._sizes:
            self._sizes[key] = self._size_of(ranks)
        return self._sizes[key]

    def _energy(self, ranks: Sequence[int]) -> float:
        return energy_kept(self._ladders, ranks)

    def _by_budget(self, wanted: int, best: list[int]) -> list[int]:
        all_spent, all_taken = nbytes(self._ladders, self._all), self._size(self._all)
        budget = all_spent - (all_taken - wanted)
        tried: set[tuple[int, ...]] = set()
        for _ in range(_ATTEMPTS):
            ranks = within_bytes(self._ladders, budget, self._max_rank)
            if tuple(ranks) in tried:
                break
            tried.add(tuple(ranks))
            taken, spent = self._size(ranks), nbytes(self._ladders, ranks)
            if taken <= wanted and self._energy(ranks) > self._energy(best):
                best = ranks
            if spent == all_spent:
                break
            self._slope = max(_FLATTEST, (all_taken - taken) / (all_spent - spent))
            budget = spent + math.floor((wanted - taken) / self._slope)
        return best

    def _climb(self, ranks: list[int], wanted: int) -> list[int]:
        """One step more wherever it fits, those that keep most per byte first."""
        while (higher := self._step(ranks, wanted)) is not None:
            ranks = higher
        return ranks

    def _step(self, ranks: list[int], wanted: int) -> list[int] | None:
        left = wanted - self._size(ranks) + _SAVED
        gains = [
            (ladder.norms[rank] / math.sqrt(ladder.costs[rank]), index)
            for index, (ladder, rank, most) in enumerate(zip(self._ladders, ranks, self._all, strict=True))
            if rank < min(most, ladder.useful) and self._slope * ladder.costs[rank] <= left
        ]
        for _, index in sorted(gains, key=lambda gain: -gain[0]):
            if len(self._sizes) >= _MEASUREMENTS:
                return None
            higher = [rank + (place == index) for place, rank in enumerate(ranks)]
            if self._size(higher) <= wanted:
                return higher
        return None

    def _next_uniform(self, ranks: Sequence[int]) -> list[int]:
        """The lowest rank for all that keeps more than these do."""
        energy = self._energy(ranks)
        choices = (at_most(self._ladders, rank) for rank in range(1, max(map(len, self._ladders)) + 1))
        capped = ([min(rank, most) for rank, most in zip(choice, self._all, strict=True)] for choice in choices)
        return next((choice for choice in capped if self._energy(choice) > energy), self._all)
