"""`adaptertools verify`: proof that a merged model is its base and adapters, merged."""

from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import Output, Sources, device_option, output_options, sources_options

if TYPE_CHECKING:
    from adaptertools.merging.coefficients import Coefficient
    from adaptertools.merging.comparison import TensorCheck
    from adaptertools.merging.verify import Verification

_FAILED = 4
"""The exit code for a merge that is wrong."""

_SHOWN = 5
"""Problems that are listed, and tensors, the worst first."""

_ALLOWED = {
    1: "one rounding",
    2: "two roundings for each adapter",
    6: "six roundings for each adapter with DoRA, two for others",
}


@click.command("verify", short_help="Prove that a merged model is right.")
@click.argument("model", metavar="BASE")
@click.argument("adapters", nargs=-1, metavar="ADAPTER...")
@click.argument("merged")
@click.option("--weights", metavar="W,W,...", help="The weight of each adapter, as merged. [default: all 1]")
@click.option(
    "--full-weights", type=int, metavar="N", help="Adapter, from 1 on, whose heads and whole weights were taken."
)
@click.option("--allow-unmatched", is_flag=True, help="Modules that match nothing were left out.")
@device_option()
@sources_options(writes=False, base=False)
@output_options()
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    adapters: tuple[str, ...],
    merged: str,
    weights: str | None,
    full_weights: int | None,
    allow_unmatched: bool,
    device: str,
    sources: Sources,
    output: Output,
) -> None:
    """Compare MERGED with what the base model BASE and the adapters have to give, tensor by tensor. Each may be an
    address on the Hub, as org/name.

    What no adapter changes must be the base's own, byte by byte; the rest within one rounding of W + s·B·A, or two for
    each adapter (six with DoRA) where another tool made the merge. Exits with 0 if all is right, with 4 if not.
    """
    if not adapters:
        raise click.UsageError("Expected a base model, an adapter at least, and a merge: BASE ADAPTER... MERGED.")
    from adaptertools.cli._progress import progress
    from adaptertools.cli._sources import read_sources
    from adaptertools.cli._values import parse_weights
    from adaptertools.containers.pipeline import open_checkpoint
    from adaptertools.merging.verify import verify_merge

    given = parse_weights(weights, len(adapters))
    base = open_checkpoint(sources.locate_model(model, output))
    result = sources.locate_model(merged, output)
    places = sources.locate(adapters, output)
    read = read_sources(sources, places, base)
    with progress("verify", output) as advance:
        found = verify_merge(
            base,
            read,
            result,
            given,
            allow_unmatched=allow_unmatched,
            full_weights=full_weights,
            sources=[place.label for place in places],
            device=device,
            on_progress=advance,
        )
    output.show(lambda: _text(found), lambda: _document(found))
    if not found.ok:
        ctx.exit(_FAILED)


def _text(found: "Verification") -> str:
    from adaptertools.cli._report import count, field

    computed = [each for each in found.tensors if each.computed]
    lines = [f"{found.merged} is {'a right merge' if found.ok else 'not a right merge'}"]
    if found.tensors:
        copied = len(found.tensors) - len(computed)
        lines.append(field("tensors", f"{len(computed):,} merged, {copied:,} to be the same bit for bit"))
        lines.append(field("allowed", f"{_ALLOWED[found.allowed]}, beyond the error of sums in float32"))
    lines += [field("wrong", problem) for problem in found.problems[:_SHOWN]]
    if len(found.problems) > _SHOWN:
        lines.append(field("wrong", f"and {len(found.problems) - _SHOWN:,} more"))
    lines += [field("wrong", _wrong_line(each)) for each in found.wrong[:_SHOWN]]
    if len(found.wrong) > _SHOWN:
        lines.append(field("wrong", f"and {count(len(found.wrong) - _SHOWN, 'more tensor')}"))
    if not found.wrong:
        lines += [field("farthest off", _worst_line(each)) for each in found.worst[:_SHOWN]]
    lines += [field("adapter", _adapter_line(each, found)) for each in found.coefficients]
    return "\n".join([*lines, *(field("note", note) for note in found.notes)])


def _wrong_line(check: "TensorCheck") -> str:
    share = f"{check.wrong:,} of {check.elements:,} values"
    if not check.computed:
        return f"{check.name}: {share} are not the bits that they have to be"
    return f"{check.name}: {share}, up to {_number(check.roundings)} roundings or {_number(check.max_abs)} off"


def _worst_line(check: "TensorCheck") -> str:
    return f"{check.name}: {check.roundings:.3f} roundings, {_number(check.max_abs)}"


def _adapter_line(coefficient: "Coefficient", found: "Verification") -> str:
    named = f"{coefficient.source}, weight {_number(coefficient.weight)}"
    if coefficient.found is None:
        return f"{named}: it adds no delta weight that the others do not add too"
    fitted = f"coefficient {_number(coefficient.found)}"
    match coefficient.verdict:
        case "once":
            return f"{named}: applied once ({fitted})"
        case "twice":
            return f"{named}: applied twice ({fitted})"
        case "not at all":
            return f"{named}: not applied ({fitted})"
        case "cannot tell":
            return f"{named}: rounding takes so much of it that its coefficient says nothing ({fitted})"
    return f"{named}: applied with {_number(coefficient.found)} times this weight"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _document(found: "Verification") -> dict[str, Any]:
    return {
        "merged": found.merged,
        "ok": found.ok,
        "by_other_tool": found.by_other_tool,
        "tensors": {
            "merged": sum(each.computed for each in found.tensors),
            "copied": sum(not each.computed for each in found.tensors),
        },
        "problems": list(found.problems),
        "wrong": [_check_document(each) for each in found.wrong],
        "worst": [_check_document(each) for each in found.worst[:_SHOWN]],
        "adapters": [
            {
                "source": each.source,
                "weight": each.weight,
                "coefficient": each.found,
                "expected_coefficient": each.expected,
                "verdict": each.verdict,
            }
            for each in found.coefficients
        ],
        "notes": list(found.notes),
    }


def _check_document(check: "TensorCheck") -> dict[str, Any]:
    return {
        "name": check.name,
        "merged": check.computed,
        "elements": check.elements,
        "wrong": check.wrong,
        "roundings": check.roundings,
        "max_abs": check.max_abs,
    }
