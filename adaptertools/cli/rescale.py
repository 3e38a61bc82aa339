"""`adaptertools rescale`: another alpha, with the weights kept consistent with it."""

from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import Output, Reading, Writing, output_options, reading_options, writing_options

if TYPE_CHECKING:
    from adaptertools.adapter import Adapter
    from adaptertools.api import WriteReport
    from adaptertools.operations.rescale import Keep


@click.command("rescale", short_help="Change alpha and keep the weights consistent with it.")
@click.argument("src")
@click.argument("dst")
@click.option("--alpha", type=float, required=True, help="The new alpha of every module.")
@click.option(
    "--keep",
    type=click.Choice(["delta", "ratio", "weights"]),
    default="delta",
    show_default=True,
    help="delta: lora_B absorbs the change; ratio: the rank follows alpha; weights: only the number changes.",
)
@writing_options()
@reading_options()
@output_options()
def command(src: str, dst: str, alpha: float, keep: "Keep", reading: Reading, writing: Writing, output: Output) -> None:
    """Read the adapter SRC, give every module the new alpha, and write it to DST in the format that was read. SRC may
    be an address on the Hub, as org/name; DST too, as hf://org/name.

    With --keep delta and --keep ratio the adapter acts as before. With --keep weights it becomes stronger or weaker,
    and the message says how many times.
    """
    from adaptertools import api
    from adaptertools.cli._progress import progress
    from adaptertools.operations.rescale import rescale

    place = reading.locate(src, output)
    adapter = api.read(place, **reading.arguments(place))
    nonfinite = reading.allow_nonfinite
    rescaled = rescale(adapter, alpha, keep, allow_nonfinite=nonfinite)
    with progress("rescale", output) as advance:
        how = writing.arguments_like(adapter)
        report = api.write(rescaled, dst, allow_nonfinite=nonfinite, token=reading.token, on_progress=advance, **how)
    told = (place.label, adapter, rescaled, report)
    output.show(lambda: _text(*told), lambda: _document(*told))


def _text(src: str, before: "Adapter", after: "Adapter", report: "WriteReport") -> str:
    from adaptertools.cli._report import change, error, field, promoted, promoted_lines, whole_loss, writing_lines

    done = after.history[-1].details
    exact, most = whole_loss(done, report)
    if "strength" in done:
        effect = f"changed: the adapter is {_times(done['strength'])} as before"
    elif exact:
        effect = "kept exactly, checked bit by bit"
    else:
        effect = f"kept with a largest relative error of {error(most)}"
    lines = [
        f"Rescaled {src} to {report.path} ({report.format})",
        change("alpha", (m.alpha for m in before.modules), (m.alpha for m in after.modules)),
        change("rank", (m.nominal_rank for m in before.modules), (m.nominal_rank for m in after.modules)),
        change("scaling", (m.scaling for m in before.modules), (m.scaling for m in after.modules)),
        field("delta weight", effect),
    ]
    return "\n".join([*lines, *promoted_lines(promoted(before, after)), *writing_lines(report)])


def _times(strength: Any) -> str:
    from adaptertools.cli._report import span

    if strength is None:
        return "no longer of scaling 0, so not to be compared in strength,"
    return f"{span(strength.values() if isinstance(strength, dict) else [strength])} times as strong"


def _document(src: str, before: "Adapter", after: "Adapter", report: "WriteReport") -> dict[str, Any]:
    from adaptertools.cli._report import promoted, whole_loss, writing_document

    done = after.history[-1].details
    exact, most = whole_loss(done, report)
    return {
        "source": {"path": src, "format": report.format},
        "rescale": dict(done),
        "promoted": promoted(before, after),
        **writing_document(report),
        "exact": exact,
        "max_relative_error": most,
    }
