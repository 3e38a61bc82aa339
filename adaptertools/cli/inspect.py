"""`adaptertools inspect`: what there is to know about an adapter before using it."""

from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import Output, Reading, output_options, reading_options

if TYPE_CHECKING:
    from adaptertools.adapter import Adapter
    from adaptertools.containers.source import Located
    from adaptertools.operations.summary import Summary


@click.command("inspect", short_help="Say what an adapter is, and what is odd about it.")
@click.argument("src")
@click.option("--modules", is_flag=True, help="One line a module, with the norm of its delta weight.")
@reading_options()
@output_options()
def command(src: str, modules: bool, reading: Reading, output: Output) -> None:
    """Print what the adapter SRC is: format, base model, ranks, alphas, scalings, size, and what is odd about it.

    Values (NaN, factors that are all zero) are looked at in adapters of up to 256 MB on this machine, and always with
    --modules. Of an adapter on the Hub that is not in the cache, the headers alone are fetched, unless with --modules.
    """
    from dataclasses import replace

    from adaptertools import api
    from adaptertools.cli._summary import summary_text
    from adaptertools.operations.sizes import READ_AT_ONCE
    from adaptertools.operations.summary import summarize

    place, how, adapter = _read(src, modules, reading, output)
    summary = summarize(adapter)
    looked = modules or (summary.nbytes <= READ_AT_ONCE and not place.here)
    if looked:
        summary = summarize(adapter, values=True)
        summary = replace(summary, oddities=(*summary.oddities, *api.oddities(place, **how)))
    if not modules:
        summary = replace(summary, rows=())
    left = None if looked else _not_looked_at(place)
    output.show(lambda: summary_text(place.label, summary, left), lambda: _document(summary, looked))


def _read(src: str, modules: bool, reading: Reading, output: Output) -> "tuple[Located, dict[str, Any], Adapter]":
    """The adapter, of which the values are here where they are wanted: by `--modules`, or by its format."""
    from adaptertools import api

    place = reading.locate(src, output, headers=not modules)
    try:
        how = reading.arguments(place)
        return place, how, api.read(place, **how)
    except RuntimeError:  # torch's for a tensor without values
        if not place.here:
            raise
        place = reading.locate(src, output)
        how = reading.arguments(place)
        return place, how, api.read(place, **how)


def _not_looked_at(place: "Located") -> str:
    where = "the headers alone were fetched" if place.here else "the headers alone were read"
    return f"not checked: {where}. --modules looks at them"


def _document(summary: "Summary", looked: bool) -> dict[str, Any]:
    return {**summary.to_json(), "values_checked": looked}
