"""`adaptertools stack`: several adapters become one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import (
    FORMAT,
    Output,
    RankChoice,
    Sources,
    Writing,
    measure,
    output_options,
    rank_options,
    sources_options,
    writing_options,
)

if TYPE_CHECKING:
    from adaptertools.api import WriteReport
    from adaptertools.operations.stack import Method, Stacked

_METHODS = ("sum", "ties", "dare-linear", "dare-ties", "knots-ties")


@click.command("stack", short_help="Combine adapters into one.")
@click.argument("paths", nargs=-1, metavar="SRC SRC... DST")
@click.option("--weights", metavar="W,W,...", help="A weight for each source, such as 0.7,0.3,-1. [default: all 1]")
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    default="sum",
    show_default=True,
    help="What becomes of w·ΔW of all sources.",
)
@click.option(
    "--density",
    type=float,
    metavar="F",
    help="Share of entries that ties, dare and knots keep. [default: 0.2 for ties and knots-ties, 0.5 for dare]",
)
@click.option("--seed", type=int, metavar="S", help="What dare drops by. [default: 0]")
@click.option(
    "--full-weights",
    type=int,
    metavar="SRC_NUMBER",
    help="Source, from 1 on, whose heads and other whole weights count.",
)
@click.option("--force", is_flag=True, help="Stack adapters of different base models; the first is kept.")
@click.option("--to", type=FORMAT, help="Format of DST. [default: that of the first source]")
@rank_options()
@writing_options()
@sources_options()
@output_options()
def command(
    paths: tuple[str, ...],
    weights: str | None,
    method: "Method",
    density: float | None,
    seed: int | None,
    full_weights: int | None,
    force: bool,
    to: str | None,
    ranks: RankChoice,
    writing: Writing,
    sources: Sources,
    output: Output,
) -> None:
    """Combine the adapters SRC into one and write it to DST, in the format of the first unless --to names another.
    Sources may be addresses on the Hub, as org/name; DST too, as hf://org/name.

    sum gives w1·ΔW1 + w2·ΔW2 + … exactly, by concatenation, so that the ranks add up. ties, dare-linear, dare-ties and
    knots-ties drop and elect entries in the sources' joint singular basis. A rank option then lowers the rank of the
    result, and says how near it stays.
    """
    from adaptertools import api, formats
    from adaptertools.adapter import merge_notes
    from adaptertools.cli._progress import progress
    from adaptertools.cli._values import parse_weights
    from adaptertools.destination import check_destination, check_named
    from adaptertools.operations.stack import stack

    *srcs, dst = _places(paths)
    given = parse_weights(weights, len(srcs))
    places = sources.locate(srcs, output)
    srcs = [place.label for place in places]
    read = [api.give_up(adapter, writing.drop) for adapter in sources.read_all(places)]
    adapters, dropped = [adapter for adapter, _ in read], merge_notes(*(names for _, names in read))
    how = writing.arguments_like(adapters[0]) if to is None else {**writing.arguments(to), "format": to}
    how["drop"] = [kind for kind in writing.drop if not any(name.startswith(f"{kind}: ") for name in dropped)]
    how["base"] = sources.base
    if isinstance(place := api.as_destination(dst), Path):
        check_named(dst, formats.get(how["format"]))
        check_destination(place, formats.get(how["format"]), how["overwrite"])
    elif not how["overwrite"]:
        api.check_there(place, how["format"], how["container"], token=sources.token)
    with progress("stack", output, "module") as advance:
        stacked = stack(
            adapters,
            given,
            method=method,
            density=density,
            seed=seed,
            full_weights=full_weights,
            force=force,
            allow_nonfinite=sources.allow_nonfinite,
            dtype=how["dtype"],
            measure=measure(how, dst),
            on_progress=advance,
            **ranks.arguments(),
        )
    with progress("write", output) as advance:
        carried: dict[str, Any] = {"allow_nonfinite": sources.allow_nonfinite, "token": sources.token}
        report = api.write(stacked.adapter, dst, on_progress=advance, **carried, **how)
        report = replace(report, dropped=dropped)
    off = api.delta_error_of(report, stacked.adapter, base=sources.base, token=sources.token)
    output.show(lambda: _text(srcs, stacked, report, off), lambda: _document(srcs, stacked, report, off))


def _places(paths: Sequence[str]) -> Sequence[str]:
    """Raises: click.UsageError unless there are two sources and a destination, and none is empty"""
    if not all(paths):
        raise click.UsageError("A path is empty, expected SRC SRC... DST; the current folder is .")
    if len(paths) < 3:
        raise click.UsageError("Expected two sources at least, and a destination: SRC SRC... DST.")
    return paths


def _text(srcs: Sequence[str], stacked: "Stacked", report: "WriteReport", off: float | None) -> str:
    """`off` is how far writing led the delta weight away from the stack, None where nothing tells."""
    from adaptertools.cli._report import change, count, field, number, promoted_lines, writing_lines

    said = stacked.settings
    whole = replace(report, left_out=(*report.left_out, *stacked.left_out))
    choices = [f"{name} {said[name]:g}" for name in ("density", "seed") if name in said]
    adapters = count(len(srcs), "adapter")
    lines = [f"Stacked {adapters} into {report.path} ({report.format}): {', '.join([said['method'], *choices])}"]
    lines += [
        field("source", f"{number(source['weight'])} × {src}")
        for src, source in zip(srcs, said["sources"], strict=True)
    ]
    lines.append(
        change("rank", (rank for row in stacked.rows for rank in row.ranks if rank), (row.rank for row in stacked.rows))
    )
    lines += [*_delta_lines(stacked, off), *promoted_lines(stacked.promoted), *writing_lines(whole, "as computed")]
    return "\n".join(lines)


def _delta_lines(stacked: "Stacked", off: float | None) -> list[str]:
    """How far the delta weight in the file is from the one that was meant, and what of that stacking and writing did.

    One figure where writing lost nothing. That of a truncation is of another norm, and is not added to any.
    """
    from adaptertools.cli._report import error, field, number, relative, span

    cut, kept = stacked.truncation, off == 0.0
    lines = [field("delta weight" if kept else "stacking", _exactness(stacked))]
    if cut is not None:
        before, after = (row.rank for row in stacked.rows), (module.nominal_rank for module in stacked.adapter.modules)
        became = f"rank {span(before)} -> {span(after)}"
        lines += [
            field("truncated", f"{became} by {cut.choice}, energy kept {number(cut.energy)}"),
            field("error", f"{relative(cut.relative_error)} of the norm of the delta weight, exact"),
            field("rounding", f"{error(cut.rounding_error)}, beside that error"),
        ]
    if kept:
        return lines
    whole = _error_of_file(stacked, off)
    first = [] if whole is None else [field("delta weight", f"{_off_by(whole, stacked.estimated)}, in the file")]
    last = "inexact, by how much was not measured" if off is None else f"{_off_by(off)}, read back from the file"
    return [*first, *lines, field("writing", last)]


def _error_of_file(stacked: "Stacked", off: float | None) -> float | None:
    """How far the file is at most from the delta weight that was meant; None where no one figure says it."""
    meant = stacked.max_delta_error
    return None if off is None or stacked.truncation is not None else meant + off * (1 + meant)


def _off_by(error: float, estimated: bool = False) -> str:
    from adaptertools.cli._report import relative

    return f"off by {'about ' if estimated else ''}{relative(error)} of a module's norm at most"


def _exactness(stacked: "Stacked") -> str:
    from adaptertools.cli._report import error

    if stacked.exact:
        return "exact, checked bit by bit"
    said, elements = "exact", error(stacked.max_element_error)
    if stacked.max_delta_error:
        said = _off_by(stacked.max_delta_error, stacked.estimated)
    return f"{said}; elements rounded to within {elements}" if stacked.max_element_error else said


def _document(srcs: Sequence[str], stacked: "Stacked", report: "WriteReport", off: float | None) -> dict[str, Any]:
    from adaptertools.cli._report import writing_document

    done, cut = stacked.to_json(), stacked.truncation
    given = zip(srcs, stacked.settings["sources"], strict=True)
    lost = cut is not None and not cut.exact
    written = writing_document(report)
    elements = written.pop("max_relative_error")  # of single tensors, it would be taken for that of the sum
    return {
        "stack": {**done, "sources": [{"path": src, "weight": source["weight"]} for src, source in given]},
        **written,
        "writing": {"exact": report.exact, "max_delta_error": off, "max_element_error": elements},
        "max_delta_error": _error_of_file(stacked, off),
        "exact": stacked.exact and report.exact and not lost,
    }
