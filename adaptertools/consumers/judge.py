"""An adapter under the rules of a consumer: rule by rule what happens to it there, and why."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from adaptertools.consumers.rule import CHANGES, FAILS, OK, UNCHECKED, Consumer, Rule, Verdict
from adaptertools.consumers.subject import Subject
from adaptertools.errors import count


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one rule says of a file. `found` are the names that break it."""

    rule: str
    verdict: Verdict
    reason: str
    source: str
    found: tuple[str, ...] = ()

    @property
    def passes(self) -> bool:
        return self.verdict not in (FAILS, CHANGES)


def judge(subject: Subject, consumer: Consumer, version: str) -> tuple[Finding, ...]:
    """What every rule of this version says, in the order of the table."""
    rules = [rule for rule in consumer.rules if rule.holds_in(version)]
    first = (_format(subject, consumer), _finite(subject))
    return (*first, *(_finding(rule, subject) for rule in rules if _is_about(rule, subject)))


def _is_about(rule: Rule, subject: Subject) -> bool:
    return not rule.formats or subject.format in rule.formats


def _format(subject: Subject, consumer: Consumer) -> Finding:
    loads = " or ".join(consumer.formats)
    known = subject.format in consumer.formats
    reason = f"{consumer.title} loads {loads}"
    base = " ".join(["", *map(shlex.quote, subject.base_option)])
    first = f"convert it first: adaptertools convert SRC DST --to {consumer.writes}{base}"
    return Finding(
        rule="format",
        verdict=OK if known else FAILS,
        reason=reason if known else f"{reason}; this is {subject.format}, so {first}",
        source=consumer.repository,
    )


def _finite(subject: Subject) -> Finding:
    """What no consumer can make sense of, so that no table names it."""
    found, source = subject.nonfinite, "IEEE 754"
    if found is None:
        return Finding(rule="finite", verdict=UNCHECKED, reason="too large to be read for this", source=source)
    if not found:
        return Finding(rule="finite", verdict=OK, reason="", source=source)
    reason = f"NaN or infinity makes every output NaN: {_few(found, subject)}"
    return Finding(rule="finite", verdict=CHANGES, reason=reason, source=source, found=found)


def _finding(rule: Rule, subject: Subject) -> Finding:
    found = rule.broken(subject)
    if found is None:
        base = "needs --base with config.json and weights" if subject.has_base else "needs --base"
        why = rule.because if rule.verdict is UNCHECKED else base
        return Finding(rule=rule.name, verdict=UNCHECKED, reason=why, source=rule.source)
    if not found:
        return Finding(rule=rule.name, verdict=OK, reason="", source=rule.source)
    reason = f"{rule.because}: {_few(found, subject)}"
    return Finding(rule=rule.name, verdict=rule.verdict, reason=reason, source=rule.source, found=tuple(found))


def _few(names: Sequence[str], subject: Subject) -> str:
    """The first of the names, and how many more there are: of modules, where each of them begins with one."""
    modules = {str(module.target) for module in subject.adapter.modules}
    more = count(len(names) - 1, "more module") if all(name.partition(" ")[0] in modules for name in names) else ""
    return names[0] if len(names) == 1 else f"{names[0]} and {more or f'{len(names) - 1} more'}"
