"""`adaptertools check`: whether an adapter loads in another program as it is meant, and the file that does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import Output, Reading, Writing, output_options, reading_options, writing_options

if TYPE_CHECKING:
    from adaptertools.api.verdict import Check, Fixed

CONSUMERS = ("comfyui", "diffusers", "llama.cpp", "lorax", "mlx", "ollama", "sglang", "tensorrt-llm", "vllm")
"""The names of adaptertools.consumers, whose import would load torch."""

_BROKEN = 4
"""The exit code for an adapter that does not load, or means something else."""


@click.command("check", short_help="Say whether an adapter loads in vLLM, llama.cpp … as it is meant.")
@click.argument("src")
@click.option("--for", "consumer", type=click.Choice(CONSUMERS), required=True, help="The program that is to load it.")
@click.option("--version", metavar="V", help="Its version. [default: the newest that is known]")
@click.option("--max-rank", type=int, metavar="N", help="The highest rank that it is started with.")
@click.option("--fix", "dst", metavar="DST", help="Write the file that does to DST.")
@writing_options()
@reading_options()
@output_options()
@click.pass_context
def command(
    ctx: click.Context,
    src: str,
    consumer: str,
    version: str | None,
    max_rank: int | None,
    dst: str | None,
    writing: Writing,
    reading: Reading,
    output: Output,
) -> None:
    """Say whether the adapter SRC loads in another program and means the same there, rule by rule. SRC may be an
    address on the Hub, as org/name.

    --fix writes the file that does: one rank within the cap, by truncation to the nearest delta weight or by zeros, the
    scaling in the factors, no patterns, in the program's own format; what that cost is measured. What loads as it is is
    written unchanged. Exits with 0 if it loads and means the same, with 4 if not.
    """
    from adaptertools.api import checking

    place = reading.locate(src, output)
    how = reading.arguments(place)
    own = {"version": version, "max_rank": max_rank, "base": how.pop("base"), "token": how.pop("token")}
    found = checking.check(place, consumer, **own, **how)
    if dst is None:
        given = _given(reading)
        output.show(lambda: _text(found, given), lambda: _document(found, given))
        if not found.passes:
            ctx.exit(_BROKEN)
        return
    options = writing.arguments(checking.target_format(found))
    nonfinite = reading.allow_nonfinite
    fixed = checking.fix(place, dst, consumer, **own, **options, read_options=how, allow_nonfinite=nonfinite)
    output.show(lambda: _fixed_text(fixed), lambda: _fixed_document(fixed))


def _given(reading: Reading) -> list[str]:
    """The options that the source was read with, which the command that fixes it needs too."""
    named = {"--from": reading.source_format, "--source-alpha": reading.source_alpha, "--slots": reading.slots}
    named |= {"--revision": reading.revision}
    words = [word for name, value in named.items() if value is not None for word in (name, str(value))]
    return words + [word for option in reading.in_options for word in ("--in", option)]


def _text(found: "Check", given: Sequence[str]) -> str:
    from adaptertools.cli._report import field, table

    rows = [(finding.rule, str(finding.verdict), finding.reason) for finding in found.findings]
    head = [_headline(found), *(field("note", note) for note in found.notes)]
    return "\n".join([*head, "", table([("RULE", "VERDICT", "REASON"), *rows]), *_advice(found, given)])


def _headline(found: "Check") -> str:
    cap = "" if found.max_rank is None else f", ranks up to {found.max_rank}"
    limits = ", as far as it was checked" if found.unchecked else ""
    says = f"loads and means the same{limits}" if found.passes else "does not load as it is meant"
    return f"{found.label} ({found.format}) {says}: {found.title} {found.version}{cap}"


def _advice(found: "Check", given: Sequence[str]) -> list[str]:
    from adaptertools.api import checking

    if found.passes:
        return []
    command = checking.fix_command(found, *given)
    if command is not None:
        return ["", f"The file that does: {command}"]
    if found.refused:
        return ["", f"--fix cannot write {checking.target_format(found)} as it is: {found.refused}"]
    return ["", *(f"--fix cannot mend {rule}: {way}" for rule, way in checking.ways_out(found).items())]


def _fixed_text(fixed: "Fixed") -> str:
    from adaptertools.cli._report import field, writing_lines

    src, dst = f"{fixed.before.label} ({fixed.before.format})", f"{fixed.report.path} ({fixed.report.format})"
    where = f"{fixed.after.title} {fixed.after.version}"
    if fixed.before.passes:
        lines = [f"{src} passes as it is, {where}; written {'unchanged ' * fixed.unchanged}to {dst}"]
    else:
        mended = ", ".join(dict.fromkeys(finding.rule for finding in fixed.before.broken))
        lines = [f"Fixed {src} to {dst} for {where}", field("mended", mended)]
    lines += [*(field("done", step) for step in fixed.steps), field("error", _error(fixed))]
    return "\n".join([*lines, *writing_lines(fixed.report)])


def _error(fixed: "Fixed") -> str:
    from adaptertools.cli._report import relative

    if fixed.dropped:
        return f"{relative(fixed.relative_error)}, beside what was dropped: {', '.join(fixed.dropped)}"
    if fixed.relative_error == 0:
        return "0: the delta weights are the same"
    return f"{relative(fixed.relative_error)} of the norm of the delta weights"


def _document(found: "Check", given: Sequence[str] = ()) -> dict[str, Any]:
    from adaptertools.api import checking

    return {
        "source": {"path": found.label, "format": found.format},
        "for": found.consumer,
        "version": found.version,
        "max_rank": found.max_rank,
        "passes": found.passes,
        "rules": [
            {
                "rule": finding.rule,
                "verdict": finding.verdict,
                "reason": finding.reason,
                "found": list(finding.found),
                "source": finding.source,
            }
            for finding in found.findings
        ],
        "notes": list(found.notes),
        "fix": checking.fix_command(found, *given),
        "ways_out": checking.ways_out(found),
        "refused": found.refused or None,
    }


def _fixed_document(fixed: "Fixed") -> dict[str, Any]:
    from adaptertools.cli._report import writing_document

    return {
        "source": {"path": fixed.before.label, "format": fixed.before.format},
        "unchanged": fixed.unchanged,
        "mended": [finding.rule for finding in fixed.before.broken],
        "done": list(fixed.steps),
        "relative_error": fixed.relative_error,
        "error_is_beside": list(fixed.dropped),
        "check": _document(fixed.after),
        **writing_document(fixed.report),
        "exact": fixed.exact,
    }
