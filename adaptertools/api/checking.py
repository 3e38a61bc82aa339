"""Whether an adapter loads and means the same in a program that serves it, and the file that does."""

import os
import shlex
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptertools import consumers, containers, formats
from adaptertools.adapter import Adapter, HistoryEntry, merge_notes
from adaptertools.api.case import Case, nonfinite_tensors
from adaptertools.api.places import Given, localize
from adaptertools.api.reading import read
from adaptertools.api.verdict import Check, Fixed
from adaptertools.api.writing import give_up, write
from adaptertools.consumers.judge import Finding
from adaptertools.consumers.mending import MENDED, WAYS_OUT
from adaptertools.consumers.rule import UNCHECKED, Consumer, version_number
from adaptertools.containers.source import Located, Source
from adaptertools.errors import OptionError, UnsupportedFeatureError
from adaptertools.hub.address import Address
from adaptertools.operations.diff import diff
from adaptertools.operations.difference import Difference
from adaptertools.operations.plain import Plain


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
    source = _source(src, token)
    adapter = read(_place(source, src), base=base, token=token, **read_options)
    return _check(case, source, adapter, version, read_options.get("adapter_name"), max_rank)


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
    where `base` gives its weights. What passes as it is is written as it was read. The result is read again and checked
    before it is put in its place. `drop` gives up what cannot be mended; `write_with` are the options of `write`.

    Memory: all factors three times; for DoRA a base weight and its delta weight
    Raises: UnsupportedFeatureError for what cannot be mended, with the way out; whatever `read` and `write` raise
    """
    case = Case.of(consumer, version, max_rank, base, token)
    options = dict(read_options or {})
    source = _source(src, token)
    adapter = read(_place(source, src), base=base, token=token, **options)
    before = _check(case, source, adapter, version, options.get("adapter_name"), max_rank)
    kept, dropped = give_up(adapter, drop)
    target = target_format(before)
    made = None if before.passes else case.plain(kept, allow_nonfinite=allow_nonfinite)
    if made is not None:
        _expect_mended(case, made.adapter, target)
    entry = HistoryEntry(
        operation="fix",
        source=adapter.origin.name if adapter.origin else None,
        details={"for": case.consumer.name, "version": case.version, **({"rank": made.rank} if made else {})},
    )
    given = {key: value for key, value in write_with.items() if value is not None}
    how = {"base": base, **(_as_it_stands(adapter, target) if made is None else {}), **given}
    how |= {"format": target, "allow_nonfinite": allow_nonfinite, "operation": entry}
    after, difference = _tried(case, made or kept, how, version)
    report = write(made.adapter if made else kept, dst, token=token, **how)
    widened = _is_quantised(adapter)
    said = ["quantised factors are written as they were read, in float32"] if widened and made is None else []
    return Fixed(
        before=before,
        after=replace(after, label=str(report.path)),
        report=replace(report, dropped=dropped, notes=merge_notes(before.notes, report.notes, said)),
        plain=made,
        difference=difference,
        widened=widened,
    )


def target_format(found: Check) -> str:
    """The format that `fix` writes: the consumer's own, or that of the source where either will do."""
    if found.passes and formats.get(found.format).CONTAINERS:
        return found.format
    return _target(found.format, consumers.get(found.consumer))


def fix_command(found: Check, *options: str) -> str | None:
    """The command that writes the file that loads; None where something stands in the way that `fix` cannot mend.

    `options` are further ones that the source was read with.
    """
    if found.passes or found.unmended or found.refused:
        return None
    words = ["adaptertools", "check", found.label, "--for", found.consumer, *found.asked, *options, "--fix", "DST"]
    return shlex.join(words)


def ways_out(found: Check) -> dict[str, str]:
    """What to do about each broken rule that `fix` cannot mend."""
    return {} if found.passes else {rule: WAYS_OUT.get(rule, "no way known") for rule in found.unmended}


def _target(format: str, consumer: Consumer) -> str:
    return format if format in consumer.keeps else consumer.writes


def _is_quantised(adapter: Adapter) -> bool:
    """Whether the tensors take more than the GGUF file that they were read from."""
    origin = adapter.origin
    if origin is None or origin.path is None or origin.container != "gguf":
        return False
    files = [origin.path] if origin.path.is_file() else origin.path.glob("*.gguf")
    nbytes = sum(tensor.nbytes for module in adapter.modules for tensor in module.tensors.values())
    return nbytes > sum(file.stat().st_size for file in files)


def _as_it_stands(adapter: Adapter, format: str) -> dict[str, Any]:
    """The arguments of `write` that write what was read as it was: its container and layout."""
    origin = adapter.origin
    if origin is None or origin.format != format:
        return {}
    kept = origin.container in formats.get(format).CONTAINERS
    return {**origin.options, **({"container": origin.container} if kept else {})}


def _source(src: Given, token: str | None) -> Source:
    """Raises: OptionError for what is neither a path nor an address, such as an adapter that was read already"""
    if not isinstance(src, str | os.PathLike | Located | Address):
        raise OptionError(f"expected a path or an address on the Hub, not {type(src).__name__}")
    return Source(localize(src, token=token))


def _place(source: Source, src: Given) -> Given:
    """Where the files are, so that an address on the Hub is resolved once."""
    return source.place if source.place is not None else src


def _check(
    case: Case,
    source: Source,
    adapter: Adapter,
    asked: str | None,
    adapter_name: str | None,
    max_rank: int | None = None,
) -> Check:
    assert adapter.origin is not None
    stands_as = adapter.origin.format
    target = _target(stands_as, case.consumer)
    nonfinite = nonfinite_tensors(adapter)
    findings = (*_too_old(case, asked), *case.judge_files(source, adapter, adapter_name, nonfinite))
    unmended = _unmended(case, adapter, target, nonfinite)
    is_broken = any(not finding.passes for finding in findings)
    return Check(
        label=source.label,
        format=stands_as,
        consumer=case.consumer.name,
        title=case.consumer.title,
        version=case.version,
        max_rank=case.cap,
        findings=findings,
        notes=merge_notes(_notes(case, asked), adapter.notes),
        unmended=unmended,
        refused=case.refusal(adapter, target) if is_broken and not unmended else "",
        asked=_asked(case, asked, max_rank),
    )


def _notes(case: Case, asked: str | None) -> tuple[str, ...]:
    consumer, read = case.consumer, case.consumer.versions
    if asked is None or _is_read(case, asked):
        return ()
    if not consumer.released:
        states = "one state" if len(read) == 1 else f"{len(read)} states"
        verb, whose = ("was", "its") if len(read) == 1 else ("were", "their")
        return (f"{states} of {consumer.title} {verb} read, {', '.join(read)}: {whose} rules count for every version",)
    return (f"{asked} itself was not read: its rules are those of {case.version}. Read were {', '.join(read)}",)


def _too_old(case: Case, asked: str | None) -> tuple[Finding, ...]:
    """That nothing is known of a version before the first one that was read."""
    oldest = case.consumer.versions[0]
    if asked is None or not case.consumer.released or version_number(asked) >= version_number(oldest):
        return ()
    reason = f"{asked} is older than any that was read: its rules are not known, those of {oldest} follow"
    return (Finding(rule="version", verdict=UNCHECKED, reason=reason, source=case.consumer.repository),)


def _is_read(case: Case, asked: str) -> bool:
    """Whether the version asked for is the one read, as `v0.11.0` is 0.11.0."""
    if not case.consumer.released:
        return asked.startswith(case.version)
    return version_number(asked) == version_number(case.version)


def _asked(case: Case, version: str | None, max_rank: int | None) -> tuple[str, ...]:
    given = {"--version": version, "--max-rank": max_rank, "--base": case.base}
    return tuple(word for name, value in given.items() if value is not None for word in (name, _word(value)))


def _word(value: object) -> str:
    return str(value.path) if isinstance(value, Located) else str(value)


def _unmended(case: Case, adapter: Adapter, format: str, nonfinite: tuple[str, ...] | None) -> tuple[str, ...]:
    """The rules that would still be broken by a plain adapter, of all that can be told without making it."""
    broken = [finding.rule for finding in case.judge(adapter, format, nonfinite) if not finding.passes]
    mended = (*MENDED, "DoRA") if case.knows_weights else MENDED
    return tuple(rule for rule in dict.fromkeys(broken) if rule not in mended)


def _expect_mended(case: Case, adapter: Adapter, format: str) -> None:
    """Raises: UnsupportedFeatureError that names what stands in the way, and the way out of it"""
    judged = case.judge(adapter, format, nonfinite_tensors(adapter))
    broken = [finding for finding in judged if not finding.passes]
    if broken:
        said = [f"{finding.rule} ({_few(finding)}): {WAYS_OUT.get(finding.rule, 'no way known')}" for finding in broken]
        raise UnsupportedFeatureError(f"not to be mended for {case.consumer.title}: {'. '.join(said)}")


def _few(finding: Finding) -> str:
    more = len(finding.found) - 1
    return finding.found[0] + (f" and {more} more" if more else "") if finding.found else finding.reason


def _tried(case: Case, made: Plain | Adapter, how: Mapping[str, Any], asked: str | None) -> tuple[Check, Difference]:
    """What the rules say of the result and how far it is from what was meant, from a copy that is thrown away.

    Raises: UnsupportedFeatureError if it breaks a rule
    """
    target = how["format"]
    adapter, meant = (made, made) if isinstance(made, Adapter) else (made.adapter, made.meant)
    with tempfile.TemporaryDirectory(prefix="adaptertools-") as folder:
        place = Path(folder) / ("fixed" if formats.get(target).FOLDER else f"fixed{_suffix(how)}")
        write(adapter, place, **{**how, "overwrite": False})
        result = read(place, format=target, base=case.base)
        after = _check(case, Source(place), result, asked, None)
        difference = diff(meant, result, norms=isinstance(made, Plain) and made.decomposed is not None)
    if not after.passes:
        said = "; ".join(f"{finding.rule}: {finding.reason}" for finding in after.broken)
        raise UnsupportedFeatureError(f"what was made still breaks rules of {case.consumer.title}: {said}")
    return after, difference


def _suffix(how: Mapping[str, Any]) -> str:
    container = how.get("container") or formats.get(how["format"]).CONTAINERS[0]
    return containers.get(container).SUFFIX
