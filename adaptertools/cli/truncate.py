"""`adaptertools truncate`: lower ranks, with the nearest delta weight and its exact distance."""

from collections.abc import Callable, Mapping
from dataclasses import replace
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
    """Read the adapter SRC, lower its ranks, and write it to DST in the format that was read. SRC may be an address on
    the Hub, as org/name; DST too, as hf://org/name.

    One of --rank, --energy, --error and --size says how far. What is kept is nearest to SRC in the Frobenius norm of
    the delta weight; how near is said for every module and for all together. --size counts all files of DST. With
    --dtype the new factors are rounded to it once. What --drop names is given up before. With --allow-nonfinite modules
    that hold NaN are kept, where their rank may stay.
    """
    from adaptertools import api
    from adaptertools.adapter import parse_feature
    from adaptertools.cli._progress import progress
    from adaptertools.destination import source_size
    from adaptertools.hub.address import Address
    from adaptertools.operations.summary import summarize
    from adaptertools.operations.truncate import truncate

    if dst is None and not dry_run:
        raise click.UsageError("Missing argument 'DST'; --dry-run alone needs none.")
    place = reading.locate(src, output)
    before = api.read(place, **reading.arguments(place))
    adapter, dropped = api.give_up(before, writing.drop)
    how = writing.arguments_like(adapter)
    how["drop"] = [kind for kind in writing.drop if not before.holders(parse_feature(kind))]
    how["allow_nonfinite"] = reading.allow_nonfinite
    computing = {"measure": measure(how, dst), **{name: how[name] for name in ("dtype", "allow_nonfinite")}}
    with progress("truncate", output, "module") as advance:
        if dry_run or dst is None:
            outlooks = _outlooks(adapter, ranks, computing, advance)
            output.show(lambda: _outlook_text(place.label, outlooks), lambda: _outlook_document(place.label, outlooks))
            return
        if not how["overwrite"] and isinstance(place_there := api.as_destination(dst), Address):
            api.check_there(place_there, how["format"], how["container"], token=reading.token)
        done = truncate(adapter, **ranks.arguments(), **computing, on_progress=advance)
    stored = source_size(before.origin) if before.origin else None  # now, since DST may be SRC
    with progress("write", output) as advance:
        report = replace(api.write(done.adapter, dst, token=reading.token, on_progress=advance, **how), dropped=dropped)
    source = {
        "path": place.label,
        "format": report.format,
        "nbytes": summarize(before).nbytes,
        "nbytes_on_disk": stored,
    }
    output.show(lambda: _text(source, adapter, done, report), lambda: _document(source, done, report))


def _outlooks(
    adapter: "Adapter", ranks: RankChoice, computing: Mapping[str, Any], advance: Callable[[int, int], None] | None
) -> "tuple[Outlook, ...]":
    """What several ranks would give, and what the rank options ask for, where they do."""
    from adaptertools.operations.truncate import truncate, truncation_table

    asked = truncate(adapter, **ranks.arguments(), **computing, on_progress=advance) if ranks.given else None
    table = truncation_table(adapter, device=ranks.device, **computing, on_progress=advance)
    return table if asked is None else (*table, asked.outlook)


_HEADINGS = ("MODULE", "RANK", "ENERGY KEPT", "RELATIVE ERROR", "ROUNDING", "FACTORS")
_OUTLOOK_HEADINGS = ("CHOICE", "RANK", "ENERGY KEPT", "RELATIVE ERROR", "ON DISK, AT MOST")


def _text(source: Mapping[str, Any], before: "Adapter", done: "Truncation", report: "WriteReport") -> str:
    from adaptertools.cli._report import change, field, number, relative, table, writing_lines

    old, new = before.modules, done.adapter.modules
    lowered = any(row.rank_after < row.rank_before for row in done.rows)
    lines = [
        f"Truncated {source['path']} to {report.path} ({report.format}): {done.choice}",
        change("rank", (m.nominal_rank for m in old), (m.nominal_rank for m in new)),
        change("alpha", (m.alpha for m in old), (m.alpha for m in new)),
        change("scaling", (m.scaling for m in old), (m.scaling for m in new)),
        field("energy kept", number(done.energy)),
        field("error", f"{relative(done.relative_error)} of the norm of the delta weight, exact"),
        field("rounding", f"{relative(done.rounding_error)}, beside that error"),
        field("size", _sizes(source, report)),
        *writing_lines(report, "as computed" if lowered else "bit for bit"),
    ]
    return "\n".join([*lines, "", table([_HEADINGS, *map(_row, done.rows)])])


def _sizes(source: Mapping[str, Any], report: "WriteReport") -> str:
    """What became of the size: on disk, or of the tensors where the files of the source cannot be told from others."""
    from adaptertools.cli._report import size

    if source["nbytes_on_disk"] is not None:
        return f"{size(source['nbytes_on_disk'])} -> {size(report.nbytes_on_disk)} on disk"
    return f"{size(source['nbytes'])} -> {size(report.nbytes)} of tensors; {size(report.nbytes_on_disk)} on disk"


def _row(module: "ModuleTruncation") -> tuple[str, ...]:
    from adaptertools.cli._report import number, relative, size

    lowered = module.rank_after < module.rank_before
    return (
        module.target,
        f"{module.rank_before} -> {module.rank_after}" if lowered else str(module.rank_before),
        number(module.energy),
        relative(module.relative_error),
        relative(module.rounding_error),
        size(module.nbytes),
    )


def _document(source: Mapping[str, Any], done: "Truncation", report: "WriteReport") -> dict[str, Any]:
    """The errors at the top are those of truncation and of rounding; what writing itself did stands under `writing`."""
    from adaptertools.cli._report import writing_document

    written = writing_document(report)
    own = {name: written.pop(name) for name in ("exact", "max_relative_error")}
    return {
        "source": dict(source),
        "truncate": done.to_json(),
        **written,
        "writing": own,
        "exact": done.exact and report.exact,
        "relative_error": done.relative_error,
        "rounding_error": done.rounding_error,
    }


def _outlook_text(src: str, outlooks: "tuple[Outlook, ...]") -> str:
    from adaptertools.cli._report import number, relative, size, span, table

    rows = [
        (
            outlook.choice,
            span(outlook.ranks),
            number(outlook.energy),
            relative(outlook.relative_error),
            size(outlook.nbytes_on_disk),
        )
        for outlook in outlooks
    ]
    return f"{src}: nothing was written\n\n{table([_OUTLOOK_HEADINGS, *rows])}"


def _outlook_document(src: str, outlooks: "tuple[Outlook, ...]") -> dict[str, Any]:
    from dataclasses import asdict

    return {"source": {"path": src}, "dry_run": True, "choices": [asdict(outlook) for outlook in outlooks]}
