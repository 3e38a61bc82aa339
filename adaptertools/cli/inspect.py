"""`adaptertools inspect`: what there is to know about an adapter before using it."""

import click

from adaptertools.cli.options import Output, Reading, output_options, reading_options

_READ_AT_ONCE = 256_000_000
"""Bytes of an adapter up to which its values are looked at unasked; of a larger one the headers must do."""


@click.command("inspect", short_help="Say what an adapter is, and what is odd about it.")
@click.argument("src")
@click.option("--modules", is_flag=True, help="One line a module, with the norm of its delta weight.")
@reading_options()
@output_options()
def command(src: str, modules: bool, reading: Reading, output: Output) -> None:
    """Print what the adapter SRC is: format, base model, ranks, alphas, scalings, size, and what is odd about it.

    Values (NaN, factors that are all zero) are looked at in adapters of up to 256 MB, and always with --modules.
    """
    from dataclasses import replace

    from adaptertools import api
    from adaptertools.cli._summary import summary_text
    from adaptertools.operations.summary import summarize

    how = reading.arguments(src)
    adapter = api.read(src, **how)
    summary = summarize(adapter)
    if modules or summary.nbytes <= _READ_AT_ONCE:
        summary = summarize(adapter, values=True)
        summary = replace(summary, oddities=(*summary.oddities, *api.oddities(src, **how)))
    if not modules:
        summary = replace(summary, rows=())
    output.show(lambda: summary_text(src, summary), summary.to_json)
