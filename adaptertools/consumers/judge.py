"""An adapter under the rules of a consumer: rule by rule what happens to it there, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

from adaptertools.consumers.rule import CHANGES, FAILS, OK, UNCHECKED, Consumer, Rule, Verdict
from adaptertools.consumers.subject import Subject


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
    return (_format(subject, consumer), *(_finding(rule, subject) for rule in rules if _is_about(rule, subject)))


def _is_about(rule: Rule, subject: Subject) -> bool:
    return not rule.formats or subject.format in rule.formats


def _format(subject: Subject, consumer: Consumer) -> Finding:
    loads = " or ".join(consumer.formats)
    known = subject.format in consumer.formats
    reason = f"{consumer.title} loads {loads}"
    first = f"convert it first: adaptertools convert SRC DST --to {consumer.writes}"
    return Finding(
        rule="format",
        verdict=OK if known else FAILS,
        reason=reason if known else f"{reason}; this is {subject.format}, so {first}",
        source=consumer.repository,
    )


def _finding(rule: Rule, subject: Subject) -> Finding:
    found = rule.broken(subject)
    if found is None:
        base = "needs --base with config.json and weights" if subject.has_base else "needs --base"
        why = rule.because if rule.verdict is UNCHECKED else base
        return Finding(rule=rule.name, verdict=UNCHECKED, reason=why, source=rule.source)
    if not found:
        return Finding(rule=rule.name, verdict=OK, reason="", source=rule.source)
    reason = f"{rule.because}: {_few(found)}"
    return Finding(rule=rule.name, verdict=rule.verdict, reason=reason, source=rule.source, found=tuple(found))


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
