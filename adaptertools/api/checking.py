"""Whether an adapter loads and means the same in a program that serves it, and the file that does."""

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptertools import consumers, containers, formats
from adaptertools.adapter import Adapter, HistoryEntry
from adaptertools.api.case import Case
from adaptertools.api.places import Given, localize
from adaptertools.api.reading import read
from adaptertools.api.writing import WriteReport, give_up, write
from adaptertools.consumers.judge import Finding
from adaptertools.containers.source import Source
from adaptertools.errors import UnsupportedFeatureError
from adaptertools.operations.diff import diff
from adaptertools.operations.difference import Difference
from adaptertools.operations.plain import Plain

_MERGE = "merge it into the base model (adaptertools merge)"
_WAYS_OUT = {
    "DoRA": f"--base BASE makes it the nearest LoRA; or {_MERGE}",
    "heads": f"{_MERGE}, or --drop full-weights",
    "bias": f"{_MERGE}, or --drop bias",
    "lora_bias": f"{_MERGE}, or --drop lora-bias",
    "token rows": f"{_MERGE}, or --drop token-rows",
    "changed base": "PEFT's path_initial_model_for_weight_conversion makes it a plain one; on a base that has the "
    "change already, --drop changed-base",
    "layer replication": f"{_MERGE}",
    "aLoRA": "--drop alora lets it act on every token",
    "names in the base": "adaptertools convert --rename or --exclude",
    "module names": "read it with --base, so that its names become module paths",
}
"""What to do about what `fix` cannot mend, by rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the rules of a consumer say of an adapter. `version` is the one whose source was read."""

    label: str
    format: str
    consumer: str
    title: str
    version: str
    max_rank: int | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether it loads there and means the same."""
        return not self.broken

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The findings that stand in the way."""
        return tuple(finding for finding in self.findings if not finding.passes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fixed:
    """The file that loads: how it was made, what it cost, and what the rules say of it.

    `difference` is what sets it apart from the source; of DoRA that became LoRA it knows nothing, but
    `plain.decomposed` does. `relative_error` counts both: ‖ΔW' − ΔW‖ / ‖ΔW‖, at most.
    """

    before: Check
    after: Check
    report: WriteReport
    plain: Plain
    difference: Difference

    @property
    def steps(self) -> tuple[str, ...]:
        """What was done, one line each."""
        return tuple(_steps(self.plain))

    @property
    def relative_error(self) -> float:
        apart = self.plain.decomposed
        if apart is None:
            return self.difference.relative_distance
        norm = math.hypot(self.difference.norm or 0.0, apart.error)  # what was cut off is orthogonal to what is left
        return (self.difference.distance + apart.error) / norm if norm else 0.0


def check(
    src: Given,
    consumer: str,
    *,
    version: str | None = None,
    max_rank: int | None = None,
    base: Given | None = None,
    token: str | None = None,
    **read_options: Any,
) -> Check:
    """Whether an adapter loads in a consumer (vllm, llama.cpp …) and means the same there, rule by rule.

    `version` chooses the rules of the last version read that is not newer; the newest one unless given. `max_rank` is
    the rank that the consumer is started with. `base` settles names; `read_options` are the others of `read`.

    Memory: headers, and what reading the adapter takes
    Raises: OptionError for an unknown consumer, for what is no version, for a rank that it cannot be started with;
            AdapterToolsError of the reader
    """
    case = Case.of(consumer, version, max_rank, base, token)
    source = Source(localize(src, token=token))
    adapter = read(_place(source, src), base=base, token=token, **read_options)
    return _check(case, source, adapter, version, read_options.get("adapter_name"))


def fix(
    src: Given,
    dst: Given,
    consumer: str,
    *,
    version: str | None = None,
    max_rank: int | None = None,
    base: Given | None = None,
    token: str | None = None,
    drop: Collection[str] = (),
    allow_nonfinite: bool = False,
    read_options: Mapping[str, Any] | None = None,
    **write_with: Any,
) -> Fixed:
    """Write the file that loads in a consumer and means the same there: plain, and in the consumer's own format.

    One rank within the cap, by truncation to the nearest delta weight or by zeros; the scaling in the factors, so that
    alpha is the rank; no patterns; layers of zeros where the consumer wants every one. DoRA becomes the nearest LoRA
    where `base` gives its weights. The result is read again and checked before it is put in its place. `drop` gives up
    what cannot be mended; `write_with` are the options of `write`.

    Memory: all factors three times; for DoRA a base weight and its delta weight
    Raises: UnsupportedFeatureError for what cannot be mended, with the way out; whatever `read` and `write` raise
    """
    case = Case.of(consumer, version, max_rank, base, token)
    options = dict(read_options or {})
    source = Source(localize(src, token=token))
    adapter = read(_place(source, src), base=base, token=token, **options)
    before = _check(case, source, adapter, version, options.get("adapter_name"))
    kept, dropped = give_up(adapter, drop)
    made = case.plain(kept, allow_nonfinite=allow_nonfinite)
    target = target_format(before)
    _expect_mended(case, made.adapter, target)
    entry = HistoryEntry(
        operation="fix",
        source=adapter.origin.name if adapter.origin else None,
        details={"for": case.consumer.name, "version": case.version, "rank": made.rank},
    )
    how = {"base": base, **write_with, "format": target, "allow_nonfinite": allow_nonfinite}
    after, difference = _tried(case, made, {**how, "operation": entry}, version)
    report = write(made.adapter, dst, token=token, operation=entry, **how)
    return Fixed(
        before=before,
        after=replace(after, label=str(report.path)),
        report=replace(report, dropped=dropped),
        plain=made,
        difference=difference,
    )


def target_format(found: Check) -> str:
    """The format that `fix` writes: the consumer's own, or that of the source where either will do."""
    consumer = consumers.get(found.consumer)
    return found.format if found.format in consumer.keeps else consumer.writes


def fix_command(found: Check) -> str:
    """The command that writes the file that loads."""
    options = [f"--for {found.consumer}"]
    if found.max_rank is not None and found.max_rank != consumers.get(found.consumer).max_rank:
        options.append(f"--max-rank {found.max_rank}")
    return f"adaptertools check {found.label} {' '.join(options)} --fix DST"


def ways_out(found: Check) -> dict[str, str]:
    """What to do about each broken rule that `fix` cannot mend alone."""
    return {finding.rule: _WAYS_OUT[finding.rule] for finding in found.broken if finding.rule in _WAYS_OUT}


def _steps(done: Plain) -> Iterator[str]:
    if done.decomposed is not None:
        apart = done.decomposed
        yield (
            f"DoRA of {apart.modules} modules became LoRA of rank {apart.rank}, which keeps its delta weights up to a "
            f"relative error of {apart.relative_error:.4g}"
        )
    if done.truncation is not None:
        lowered = sum(row.rank_after < row.rank_before for row in done.truncation.rows)
        yield f"{lowered} modules were truncated to rank {done.rank}"
    if done.padded:
        yield f"{done.padded} modules were filled up with zeros to rank {done.rank}"
    yield f"alpha is the rank, {done.rank}, and the scaling stands in the factors"
    if done.filled:
        yield f"{len(done.filled)} modules of zeros were added: {done.filled[0]}{' …' * (len(done.filled) > 1)}"
    if done.left_out:
        yield f"left out, being untrained: {', '.join(done.left_out)}"


def _place(source: Source, src: Given) -> Given:
    """Where the files are, so that an address on the Hub is resolved once."""
    return source.place if source.place is not None else src


def _check(case: Case, source: Source, adapter: Adapter, asked: str | None, adapter_name: str | None) -> Check:
    assert adapter.origin is not None
    return Check(
        label=source.label,
        format=adapter.origin.format,
        consumer=case.consumer.name,
        title=case.consumer.title,
        version=case.version,
        max_rank=case.cap,
        findings=case.judge_files(source, adapter, adapter_name),
        notes=_notes(case, asked),
    )


def _notes(case: Case, asked: str | None) -> tuple[str, ...]:
    read = case.consumer.versions
    if asked is None or asked == case.version:
        return ()
    if len(read) == 1:
        return (f"one state of {case.consumer.title} was read, {read[0]}: its rules count for every version",)
    return (f"{asked} itself was not read: its rules are those of {case.version}. Read were {', '.join(read)}",)


def _expect_mended(case: Case, adapter: Adapter, format: str) -> None:
    """Raises: UnsupportedFeatureError that names what stands in the way, and the way out of it"""
    broken = [finding for finding in case.judge(adapter, format) if not finding.passes]
    if broken:
        said = [
            f"{finding.rule} ({_few(finding)}): {_WAYS_OUT.get(finding.rule, 'no way known')}" for finding in broken
        ]
        raise UnsupportedFeatureError(f"not to be mended for {case.consumer.title}: {'. '.join(said)}")


def _few(finding: Finding) -> str:
    more = len(finding.found) - 1
    return finding.found[0] + (f" and {more} more" if more else "") if finding.found else finding.reason


def _tried(case: Case, made: Plain, how: Mapping[str, Any], asked: str | None) -> tuple[Check, Difference]:
    """What the rules say of the result and how far it is from what was meant, from a copy that is thrown away.

    Raises: UnsupportedFeatureError if it breaks a rule
    """
    target = how["format"]
    with tempfile.TemporaryDirectory(prefix="adaptertools-") as folder:
        place = Path(folder) / ("fixed" if formats.get(target).FOLDER else f"fixed{_suffix(how)}")
        write(made.adapter, place, **{**how, "overwrite": False})
        result = read(place, format=target, base=case.base)
        after = _check(case, Source(place), result, asked, None)
        difference = diff(made.meant, result, norms=made.decomposed is not None)
    if not after.passes:
        said = "; ".join(f"{finding.rule}: {finding.reason}" for finding in after.broken)
        raise UnsupportedFeatureError(f"what was made still breaks rules of {case.consumer.title}: {said}")
    return after, difference


def _suffix(how: Mapping[str, Any]) -> str:
    container = how.get("container") or formats.get(how["format"]).CONTAINERS[0]
    return containers.get(container).SUFFIX
