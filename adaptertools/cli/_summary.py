"""The summary of an adapter as text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptertools.cli._report import count, field, number, size, table

if TYPE_CHECKING:
    from adaptertools.operations.summary import ModuleSummary, Summary


def summary_text(src: str, summary: "Summary", values: str | None = None) -> str:
    """One line a fact, then one line a module where the summary holds them. `values` says what was not looked at."""
    lines = [f"{src}: {summary.format}, {summary.container}"]
    lines += [field("base model", f"{part}: {base}" if part else base) for part, base in summary.bases.items()]
    lines += [
        field("modules", f"{summary.modules:,} ({_listed(summary.targets)})"),
        field("rank", _counted(summary.ranks)),
        field("alpha", _counted(summary.alphas)),
        field("scaling", f"{_counted(summary.scalings)} {' and '.join(map(_by, summary.scale_rules))}"),
        field("dtype", _counted(summary.dtypes)),
        field("size", size(summary.nbytes)),
        field("parameters", _parameters(summary)),
    ]
    lines += [field("full weight", f"{name} {_shape(shape)}") for name, shape in summary.full_weights.items()]
    lines += [field("token rows", f"{rows} of {name}") for name, rows in summary.token_rows.items()]
    lines += [field("holds", ", ".join(summary.features))] if summary.features else []
    lines += [field("history", _operation(entry)) for entry in summary.history]
    lines += [field("odd", oddity) for oddity in summary.oddities]
    lines += [field("values", values)] if values else []
    if summary.rows:
        lines += ["", table([_HEADINGS, *map(_row, summary.rows)])]
    return "\n".join(lines)


_HEADINGS = ("MODULE", "KIND", "RANK", "ALPHA", "SCALING", "WEIGHT", "DTYPE", "NORM OF ΔW")


def _row(module: "ModuleSummary") -> tuple[str, ...]:
    norm = "" if module.delta_norm is None else number(module.delta_norm)
    dora = " without its magnitude" if "dora" in module.features else ""
    return (
        module.target,
        module.kind,
        str(module.rank),
        number(module.alpha),
        number(module.scaling),
        _shape(module.shape),
        ", ".join(module.dtypes),
        norm + dora,
    )


def _parameters(summary: "Summary") -> str:
    """The parameter count beside that of the update in full rank."""
    factors, full = summary.factor_parameters, summary.full_rank_parameters
    stored = f"{summary.parameters:,}"
    if not full:
        return stored
    share = "" if factors == summary.parameters else f", {factors:,} of them in factors"
    return f"{stored}{share}; the full-rank update has {full:,} ({factors / full:.2%})"


def _counted(counts: Mapping[Any, int]) -> str:
    """Each value, and how many have it where there are several: `8 (20), 16 (4)`."""
    named = {number(value) if isinstance(value, int | float) else value: times for value, times in counts.items()}
    return _listed(named) if len(named) > 1 else ", ".join(named) or "none"


def _by(rule: str) -> str:
    return "as the file states it" if rule == "direct" else f"by {rule}"


def _listed(counts: Mapping[str, int], most: int = 12) -> str:
    shown = [f"{name} ({times})" for name, times in list(counts.items())[:most]]
    rest = [count(len(counts) - most, "more name")] if len(counts) > most else []
    return ", ".join(shown + rest) or "none"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _operation(entry: Mapping[str, Any]) -> str:
    details = ", ".join(f"{key} {_plain(value)}" for key, value in entry.items() if key != "operation")
    return f"{entry.get('operation')}{': ' if details else ''}{details}"


def _plain(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return number(value)
        case list() | tuple():
            return f"[{', '.join(map(_plain, value))}]"
        case Mapping():
            return f"({', '.join(f'{key} {_plain(item)}' for key, item in value.items())})"
        case _:
            return str(value)
