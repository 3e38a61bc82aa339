"""`adaptertools diff`: how far two adapters are from each other, whatever their formats and factors."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import Output, Sources, output_options, sources_options

if TYPE_CHECKING:
    from adaptertools.operations.difference import Difference, ModuleDifference
    from adaptertools.operations.values import ValueDifference

_DIFFER = 4
"""The exit code for adapters that differ."""


@click.command("diff", short_help="Measure how far two adapters are from each other.")
@click.argument("a")
@click.argument("b")
@click.option("--modules", is_flag=True, help="One line a module.")
@click.option(
    "--tolerance", type=float, default=1e-6, show_default=True, metavar="T", help="The relative distance that passes."
)
@sources_options(writes=False)
@output_options()
@click.pass_context
def command(
    ctx: click.Context, a: str, b: str, modules: bool, tolerance: float, sources: Sources, output: Output
) -> None:
    """Compare what the adapters A and B add to a model: the relative distance and the cosine of their delta weights.
    Both may be addresses on the Hub, as org/name.

    Formats, ranks, alphas, dtypes and the order of the factors may differ. Whole weights, DoRA magnitudes and whatever
    else changes the model is compared too. What DoRA adds depends on the base weights: --base compares it, where it has
    them, instead of direction and magnitude. Exits with 0 if all is the same within the tolerance, with 4 if not.
    """
    from adaptertools import api
    from adaptertools.cli._progress import progress

    places = sources.locate([a, b], output)
    one, other = sources.read_all(places)
    a, b = (place.label for place in places)
    with progress("diff", output, unit="parameters") as advance:
        found = api.diff(
            one, other, tolerance=tolerance, norms=modules, base=sources.base, token=sources.token, on_progress=advance
        )
    output.show(lambda: _text(a, b, found, modules), lambda: _document(a, b, found, modules))
    if not found.same:
        ctx.exit(_DIFFER)


def _text(a: str, b: str, found: "Difference", modules: bool) -> str:
    from adaptertools.cli._report import count, few, field

    within = f"within {found.tolerance:g}"
    verdict = f"The same {within}" if found.same else f"Not the same {within}"
    lines = [f"{verdict}: A = {a}, B = {b}"]
    if found.modules:
        lines += [field("distance", _distance_line(found)), field("cosine", _number(found.cosine))]
        both = [row for row in found.modules if row.only_in is None]
        identical = sum(row.identical for row in both)
        lines.append(field("modules", f"{len(both):,} in both, {identical:,} of them equal bit for bit"))
    for side in ("A", "B"):
        alone = [row for row in found.modules if row.only_in == side]
        if alone:
            zero = sum(row.distance == 0 for row in alone)
            names = few([str(row.target) for row in alone], 4)
            lines.append(field(f"only in {side}", f"{count(len(alone), 'module')}{_zeros(zero)}: {names}"))
    if found.modules and all(row.only_in for row in found.modules) and len({row.only_in for row in found.modules}) == 2:
        lines.append(field("note", "no name stands in both: flat ones (kohya, GGUF) become module paths with --base"))
    lines += [field("DoRA", line) for line in _dora_lines(found)]
    lines += [field(weight.kind, _weight_line(weight)) for weight in found.weights]
    lines += [field("differs", what) for what in found.others]
    lines += [field("note", f"{what}; that does not count") for what in found.notes]
    return "\n".join([*lines, "", _table(found.modules)] if modules and found.modules else lines)


def _distance_line(found: "Difference") -> str:
    from adaptertools.cli._report import relative

    if found.distance == 0:
        return "0"
    if not found.norm:
        return f"infinite: the delta weights of A are zero, those of B have the norm {_number(found.other_norm)}"
    norm, other_norm = _number(found.norm), _number(found.other_norm)
    return f"{relative(found.relative_distance)} of the norm of A, {norm}; that of B is {other_norm}"


def _dora_lines(found: "Difference") -> Iterator[str]:
    from adaptertools.cli._report import count, few

    if found.dora_on_base:
        yield f"{count(len(found.dora_on_base), 'module')} compared by what they add to the base model"
    if found.dora_in_parts:
        names = few(list(found.dora_in_parts), 4)
        how = "by direction and magnitude alone, without the base weight"
        them = "it adds" if len(found.dora_in_parts) == 1 else "they add"
        why = f"--base BASE, weights and all, compares what {them}: {names}"
        if found.base_lacks:
            others = len(found.base_lacks) - 1
            why = found.base_lacks[0] + (f"; so for {others} more" if others else "")
        yield f"{count(len(found.dora_in_parts), 'module')} compared {how}: {why}"


def _zeros(number: int) -> str:
    return f", {number} of them zero" if number else ""


def _weight_line(weight: "ValueDifference") -> str:
    from adaptertools.cli._report import relative

    if weight.only_in:
        return f"{weight.name}: only in {weight.only_in}"
    if weight.note:
        return f"{weight.name}: {weight.note}"
    far, most = relative(weight.relative_distance), _number(weight.max_abs)
    return f"{weight.name}: relative distance {far}, largest difference {most}"


def _table(rows: "tuple[ModuleDifference, ...]") -> str:
    from adaptertools.cli._report import relative, table

    return table(
        [
            ("MODULE", "DISTANCE", "COSINE", "NORM IN A", "NORM IN B", ""),
            *(
                (
                    row.target,
                    relative(row.relative_distance),
                    _number(row.cosine),
                    _number(row.norm),
                    _number(row.other_norm),
                    f"only in {row.only_in}" if row.only_in else "equal bit for bit" if row.identical else "",
                )
                for row in rows
            ),
        ]
    )


def _number(value: float | None) -> str:
    from adaptertools.cli._report import number

    return "-" if value is None else number(value)


def _document(a: str, b: str, found: "Difference", modules: bool) -> dict[str, Any]:
    """Infinite relative distances are null here, since JSON has no infinity."""
    document = {
        "a": a,
        "b": b,
        "same": found.same,
        "tolerance": found.tolerance,
        "relative_distance": found.relative_distance,
        "distance": found.distance,
        "cosine": found.cosine,
        "norm_a": found.norm,
        "norm_b": found.other_norm,
        "modules": {
            "in_both": sum(row.only_in is None for row in found.modules),
            "identical": sum(row.identical for row in found.modules),
            "only_in_a": [str(row.target) for row in found.modules if row.only_in == "A"],
            "only_in_b": [str(row.target) for row in found.modules if row.only_in == "B"],
        },
        "weights": [
            {
                "name": weight.name,
                "kind": weight.kind,
                "relative_distance": weight.relative_distance,
                "max_abs": weight.max_abs,
                "only_in": weight.only_in,
                "note": weight.note,
            }
            for weight in found.weights
        ],
        "dora": {
            "on_base": list(found.dora_on_base),
            "in_parts": list(found.dora_in_parts),
            "base_lacks": list(found.base_lacks),
        },
        "others": list(found.others),
        "notes": list(found.notes),
    }
    if modules:
        document["per_module"] = [_module_document(row) for row in found.modules]
    return document


def _module_document(row: "ModuleDifference") -> dict[str, Any]:
    return {
        "target": str(row.target),
        "relative_distance": row.relative_distance,
        "distance": row.distance,
        "cosine": row.cosine,
        "norm_a": row.norm,
        "norm_b": row.other_norm,
        "identical": row.identical,
        "only_in": row.only_in,
    }
