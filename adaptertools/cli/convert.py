"""`adaptertools convert`: an adapter of one format becomes one of another."""

from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import (
    FORMAT,
    Output,
    Reading,
    Writing,
    output_options,
    reading_options,
    selection_options,
    writing_options,
)

if TYPE_CHECKING:
    from adaptertools.api import WriteReport


@click.command("convert", short_help="Write an adapter in another format.")
@click.argument("src")
@click.argument("dst")
@click.option("--to", type=FORMAT, required=True, help="Format of DST.")
@selection_options()
@writing_options()
@reading_options("--alpha")
@output_options()
def command(
    src: str, dst: str, to: str, reading: Reading, writing: Writing, output: Output, **selection: tuple[str, ...]
) -> None:
    """Read the adapter SRC and write it to DST in another format. SRC may be an address on the Hub, as org/name; DST
    too, as hf://org/name.

    What the format of DST cannot hold is refused by name, unless --drop gives it up. Where it has no alpha, the scaling
    is folded into lora_B, and the report says whether that was exact.
    """
    from adaptertools import api
    from adaptertools.cli._progress import progress

    place = reading.locate(src, output)
    with progress("convert", output) as on_progress:
        report = api.convert(
            place,
            dst,
            to=to,
            read_options=reading.arguments(place),
            allow_nonfinite=reading.allow_nonfinite,
            token=reading.token,
            on_progress=on_progress,
            **selection,
            **writing.arguments(to),
        )
    output.show(lambda: _text(place.label, report), lambda: _document(place.label, report))


def _text(src: str, report: "WriteReport") -> str:
    from adaptertools.cli._report import writing_lines

    headline = f"Converted {src} ({report.source_format}) to {report.path} ({report.format})"
    return "\n".join([headline, *writing_lines(report)])


def _document(src: str, report: "WriteReport") -> dict[str, Any]:
    from adaptertools.cli._report import writing_document

    return {"source": {"path": src, "format": report.source_format}, **writing_document(report)}
