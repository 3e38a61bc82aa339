"""What a rule is: something a file must not hold, what a consumer does with it, and where that was read."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum

from adaptertools.consumers.subject import Subject
from adaptertools.errors import OptionError


class Verdict(StrEnum):
    """What a consumer does with a file, as one rule says it."""

    OK = "ok"
    UNCHECKED = "not checked"
    """what it takes to tell was not given"""
    NOTE = "note"
    """it loads and means the same, and something is worth knowing"""
    CHANGES = "changes meaning"
    """it loads, and adds something else to the model than it should"""
    FAILS = "fails"
    """it does not load"""


OK, UNCHECKED, NOTE, CHANGES, FAILS = Verdict

Condition = Callable[[Subject], Sequence[str] | None]
"""What breaks a rule, by name; empty where nothing does, None where it cannot be told."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that a consumer does not take as it is meant, or that cannot be told: its verdict is UNCHECKED.

    `since` is the first of the versions read in which it holds, `until` the first in which it no longer does; empty
    where it holds in all. `formats` are those whose files it is about; empty for all.
    """

    name: str
    broken: Condition
    verdict: Verdict
    because: str
    source: str
    _: KW_ONLY
    since: str = ""
    until: str = ""
    formats: tuple[str, ...] = ()

    def holds_in(self, version: str) -> bool:
        """Whether the rule is one of this version."""
        if not self.since and not self.until:
            return True
        number = version_number(version)
        return not (
            (self.since and number < version_number(self.since))
            or (self.until and number >= version_number(self.until))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Which modules a consumer wants beside those that a file has; zeros there change nothing.

    `every` wants a module that stands in one layer in all of them. `together` are names of which a layer has all that
    are `wanted`, or none.
    """

    every: bool = False
    together: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A program that loads adapters: which files, by which rules, and what `fix` makes for it.

    `versions` are those whose source was read, oldest first: releases, or commits, which have the same rules. `formats`
    it loads; `writes` is the one that `fix` writes, unless the file has one of those in `keeps`. `max_rank` is the rank
    that it takes unless it is started with another; `caps` are those that it can be started with, by the version since
    which that is so, empty where any will do. Ranks are best `least_rank`, or a `multiple`.
    """

    name: str
    title: str
    repository: str
    versions: tuple[str, ...]
    formats: tuple[str, ...]
    writes: str
    keeps: tuple[str, ...] = ()
    rules: tuple[Rule, ...]
    max_rank: int | None = None
    caps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    cap_option: str = ""
    least_rank: int = 1
    multiple: int = 1
    layers: Layers = Layers()

    @property
    def newest(self) -> str:
        return self.versions[-1]

    @property
    def released(self) -> bool:
        """Whether releases were read, not commits."""
        return all("." in version for version in self.versions)

    def read_version(self, asked: str | None) -> str:
        """The version read whose rules count for the one asked for: the last that is not newer, else the first.

        Raises: OptionError for what is no version
        """
        if asked is None:
            return self.newest
        if not self.released:
            return next((commit for commit in self.versions if asked.startswith(commit)), self.newest)
        number = version_number(asked)
        older = [version for version in self.versions if version_number(version) <= number]
        return older[-1] if older else self.versions[0]

    def cap(self, version: str, asked: int | None) -> int | None:
        """The rank that it takes at most.

        Raises: OptionError for one that it cannot be started with
        """
        if asked is None:
            return self.max_rank
        if asked < 1:
            raise OptionError(f"max rank is {asked}, expected a number from 1 on")
        known = [caps for since, caps in self.caps.items() if version_number(since) <= version_number(version)]
        if known and asked not in known[-1]:
            larger = [cap for cap in known[-1] if cap > asked]
            listed = ", ".join(map(str, known[-1]))
            advice = f"start it with {larger[0]}" if larger else f"{known[-1][-1]} is the most"
            raise OptionError(
                f"{self.title} {version} takes one of {listed} as {self.cap_option}, not {asked}: {advice}"
            )
        return asked


def version_number(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare: 0.11.0 comes after 0.8.5, and 1 is 1.0.

    Raises: OptionError
    """
    match = re.match(r"v?b?(\d+(?:\.\d+)*)", version)
    if match is None:
        raise OptionError(f"{version!r} is no version: expected numbers such as 0.11.0")
    numbers = [int(part) for part in match[1].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
