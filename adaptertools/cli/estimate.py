"""`adaptertools estimate`: how large an adapter would be, before anything is trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adaptertools.cli.options import Output, output_options, revision_option, token_option
from adaptertools.errors import OptionError

if TYPE_CHECKING:
    from adaptertools.operations.estimate import Estimate


@click.command("estimate", short_help="Say how large an adapter of a base model would be.")
@click.argument("base")
@click.option("--rank", "ranks", multiple=True, required=True, metavar="N,…", help="Rank, or several; repeatable.")
@click.option(
    "--targets",
    multiple=True,
    metavar="NAME,…",
    help="Target modules by name, last parts of a name, or glob; repeatable. [default: all-linear]",
)
@revision_option()
@token_option()
@output_options()
def command(
    base: str, ranks: Sequence[str], targets: Sequence[str], revision: str | None, token: str | None, output: Output
) -> None:
    """Print the parameters, share of the model and size of LoRA on BASE, by target module and in all.

    BASE is a folder, an index, a file of weights or an address on the Hub; the headers alone are read. all-linear is
    every linear layer but the output head, as in PEFT.
    """
    from adaptertools import api
    from adaptertools.operations.estimate import ALL_LINEAR, estimate

    chosen = [name for text in targets for name in _listed("--targets", text)]
    wanted = [_rank(text) for given in ranks for text in _listed("--rank", given)]
    place = api.localize(base, "model", revision=revision, token=token, headers=True)
    found = estimate(place, ranks=wanted, targets=chosen or [ALL_LINEAR])
    output.show(lambda: _text(found), found.to_json)


def _listed(flag: str, text: str) -> list[str]:
    """The parts between commas.

    Raises: OptionError if one is empty
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise OptionError(f"{flag} {text!r}: a part is empty, expected values with commas between them")
    return parts


def _rank(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"--rank {text!r}: expected a whole number, or several with commas between them") from None


def _text(found: "Estimate") -> str:
    from adaptertools.cli._report import count, field, size, table

    headings = ["TARGET", "MODULES", "SHAPE"]
    for rank in found.ranks:
        headings += [f"RANK {rank}", "SHARE", "F32", "F16, BF16"]

    def cells(parameters: int) -> list[str]:
        return [f"{parameters:,}", f"{found.share(parameters):.2%}", size(4 * parameters), size(2 * parameters)]

    rows = [headings]
    for row in found.rows:
        shapes = [", ".join("x".join(map(str, shape)) for shape in row.shapes)]
        sizes = [cell for rank in found.ranks for cell in cells(row.parameters(rank))]
        rows.append([row.name, f"{row.modules:,}", *shapes, *sizes])
    totals = [cell for rank in found.ranks for cell in cells(found.parameters(rank))]
    rows.append(["total", f"{found.modules:,}", "", *totals])
    title = f"{found.base}: {found.model_parameters:,} parameters in {', '.join(found.dtypes)}"
    lines = [title, field("targets", count(found.modules, "module")), "", table(rows)]
    return "\n".join([*lines, *([""] if found.notes else []), *(field("note", note) for note in found.notes)])
