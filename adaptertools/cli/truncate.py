"""`adaptertools truncate`: lower ranks, with the nearest delta weight and its exact distance."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import (
    Output,
    RankChoice,
    Reading,
    Writing,
    measure,
    output_options,
    rank_options,
    reading_options,
    writing_options,
)

if TYPE_CHECKING:
    from adaptertools.adapter import Adapter
    from adaptertools.api import WriteReport
    from adaptertools.operations.truncate import ModuleTruncation, Outlook, Truncation


@click.command("truncate", short_help="Lower ranks, keeping the nearest delta weight.")
@click.argument("src")
@click.argument("dst", required=False)
@rank_options()
@click.option("--dry-run", is_flag=True, help="Show what several ranks would keep; write nothing, DST may be left out.")
@writing_options()
@reading_options()
@output_options()
def command(
    src: str,
    dst: str | None,
    ranks: RankChoice,
    dry_run: bool,
    reading: Reading,
    writing: Writing,
    output: Output,
) -> None:
    """Read the adapter SRC, lower its ranks, and write it to DST in the format that was read.

    One of --rank, --energy, --error and --size says how far. What is kept is nearest to SRC in the Frobenius norm of
    the delta weight; how near is said for every module and for all together. --size counts all files of DST. With
    --dtype the new factors are rounded to it once.
    """
    from adaptertools import api
    from adaptertools.cli._progress import progress
    from adaptertools.operations.truncate import truncate

    if dst is None and not dry_run:
        raise click.UsageError("Missing argument 'DST'; --dry-run alone needs none.")
    adapter = api.read(src, **reading.arguments(src))
    how = writing.arguments_like(adapter)
    computing = {"dtype": how["dtype"], "measure": measure(how)}
    with progress("truncate", output, "module") as advance:
        if dry_run or dst is None:
            outlooks = _outlooks(adapter, ranks, computing, advance)
            output.show(lambda: _outlook_text(src, outlooks), lambda: _outlook_document(src, outlooks))
            return
        done = truncate(adapter, **ranks.arguments(), **computing, on_progress=advance)
    with progress("write", output) as advance:
        report = api.write(done.adapter, dst, allow_nonfinite=reading.allow_nonfinite, on_progress=advance, **how)
    output.show(lambda: _text(src, adapter, done, report), lambda: _document(src, adapter, done, report))


def _outlooks(
    adapter: "Adapter", ranks: RankChoice, computing: Mapping[str, Any], advance: Callable[[int, int], None] | None
) -> "tuple[Outlook, ...]":
    """What several ranks would give, and what the rank options ask for, where they do."""
    from adaptertools.operations.truncate import truncate, truncation_table

    asked = truncate(adapter, **ranks.arguments(), **computing, on_progress=advance) if ranks.given else None
    table = truncation_table(adapter, device=ranks.device, **computing, on_progress=advance)
    return table if asked is None else (*table, asked.outlook)


_HEADINGS = ("MODULE", "RANK", "ENERGY KEPT", "RELATIVE ERROR", "ROUNDING", "SIZE")
_OUTLOOK_HEADINGS = ("CHOICE", "RANK", "ENERGY KEPT", "RELATIVE ERROR", "SIZE, AT MOST")


def _text(src: str, before: "Adapter", done: "Truncation", report: "WriteReport") -> str:
    from adaptertools.cli._report import change, error, field, number, size, table, writing_lines

    old, new = before.modules, done.adapter.modules
    lines = [
        f"Truncated {src} to {report.path} ({report.format}): {done.choice}",
        change("rank", (m.nominal_rank for m in old), (m.nominal_rank for m in new)),
        change("alpha", (m.alpha for m in old), (m.alpha for m in new)),
        change("scaling", (m.scaling for m in old), (m.scaling for m in new)),
        field("energy kept", number(done.energy)),
        field("error", f"{_share(done.relative_error)} of the norm of the delta weight, exact"),
        field("rounding", f"{error(done.rounding_error)}, beside that error"),
        field("size", f"{size(_tensor_bytes(before))} -> {size(report.nbytes)}"),
        *writing_lines(report, "as computed"),
    ]
    return "\n".join([*lines, "", table([_HEADINGS, *map(_row, done.rows)])])


def _row(module: "ModuleTruncation") -> tuple[str, ...]:
    from adaptertools.cli._report import error, number, size

    lowered = module.rank_after < module.rank_before
    return (
        module.target,
        f"{module.rank_before} -> {module.rank_after}" if lowered else str(module.rank_before),
        number(module.energy),
        _share(module.relative_error),
        error(module.rounding_error) if module.rounding_error else "0",
        size(module.nbytes),
    )


def _share(value: float) -> str:
    return f"{value:.4g}"


def _tensor_bytes(adapter: "Adapter") -> int:
    from adaptertools.operations.summary import summarize

    return summarize(adapter).nbytes


def _document(src: str, before: "Adapter", done: "Truncation", report: "WriteReport") -> dict[str, Any]:
    from adaptertools.cli._report import writing_document

    return {
        "source": {"path": src, "format": report.format, "nbytes": _tensor_bytes(before)},
        "truncate": done.to_json(),
        **writing_document(report),
    }


def _outlook_text(src: str, outlooks: "tuple[Outlook, ...]") -> str:
    from adaptertools.cli._report import number, size, span, table

    rows = [
        (
            outlook.choice,
            span(outlook.ranks),
            number(outlook.energy),
            _share(outlook.relative_error),
            size(outlook.nbytes),
        )
        for outlook in outlooks
    ]
    return f"{src}: nothing was written\n\n{table([_OUTLOOK_HEADINGS, *rows])}"


def _outlook_document(src: str, outlooks: "tuple[Outlook, ...]") -> dict[str, Any]:
    from dataclasses import asdict

    return {"source": {"path": src}, "dry_run": True, "choices": [asdict(outlook) for outlook in outlooks]}
