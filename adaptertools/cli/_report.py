"""What commands say about an adapter that they wrote."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaptertools.errors import count as count
from adaptertools.errors import few as few

if TYPE_CHECKING:
    from adaptertools.adapter import Adapter
    from adaptertools.api import WriteReport

_WIDTH = 12


def field(label: str, value: object) -> str:
    """One line of a report: the label in a column of its own."""
    return f"  {label:<{_WIDTH}} {value}"


def size(nbytes: int) -> str:
    """Bytes in the unit that fits: `512 B`, `13.6 MB`."""
    value, units = float(nbytes), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"


def number(value: float) -> str:
    """A number in six digits at most: `16`, `0.5`, `11.3137`."""
    return f"{value:.6g}"


def error(value: float) -> str:
    """A relative error, of which the magnitude matters: `3.0e-08`."""
    return f"{value:.1e}"


def relative(value: float) -> str:
    """A distance relative to a norm: `0.2655`, in the magnitude alone where it is small: `3.0e-08`."""
    if value == 0:
        return "0"
    return "infinite" if math.isinf(value) else f"{value:.4g}" if value >= 1e-3 else error(value)


def span(values: Iterable[float]) -> str:
    """The one value, or the smallest and the largest: `16`, `8 to 32`."""
    found = sorted(set(values))
    return " to ".join(map(number, dict.fromkeys((found[0], found[-1])))) if found else "none"


def change(label: str, before: Iterable[float], after: Iterable[float]) -> str:
    """One line that says what values became: `scaling  2 -> 4`, or `rank  8` where they stayed."""
    old, new = span(before), span(after)
    return field(label, old if old == new else f"{old} -> {new}")


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows in columns as wide as their widest cell."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def writing_lines(report: "WriteReport", unchanged: str = "bit for bit") -> list[str]:
    """What was written, what it lost, and what to know about it; `unchanged` is the word for nothing lost."""
    lines = [
        field("modules", f"{report.modules:,}"),
        field("stored", f"{size(report.nbytes)} of tensors in {report.container}, {values_line(report, unchanged)}"),
    ]
    if report.commit:
        lines.append(field("commit", report.commit))
    if report.left_out:
        lines.append(field("left out", f"{len(report.left_out)}: {few(report.left_out, 4)}"))
    by_kind: dict[str, list[str]] = {}
    for item in report.dropped:
        kind, _, name = item.partition(": ")
        by_kind.setdefault(kind, []).append(name)
    lines += [field("dropped", f"{kind} of {len(names)}: {few(names, 4)}") for kind, names in by_kind.items()]
    return lines + [field("note", note) for note in report.notes]


def values_line(report: "WriteReport", unchanged: str = "bit for bit") -> str:
    """Whether the values in the file are those that were read, and how far off if not."""
    if not report.losses:
        return unchanged
    folded = [loss for loss in report.losses if loss.factor != 1.0]
    cast = Counter(loss.dtype for loss in report.losses if loss.factor == 1.0)
    done = [f"scaling folded into {count(len(folded), 'tensor')}"] if folded else []
    done += [f"{count(number, 'tensor')} cast to {dtype}" for dtype, number in cast.items()]
    if report.exact:
        return f"{', '.join(done)}; exact, checked bit by bit"
    inexact = sum(not loss.exact for loss in report.losses)
    vanished = " (some values too small for the dtype became 0)" if report.max_relative_error == 1.0 else ""
    return f"{', '.join(done)}; {inexact} inexact, largest relative error {error(report.max_relative_error)}{vanished}"


def whole_loss(change: Mapping[str, Any], report: "WriteReport") -> tuple[bool, float]:
    """Whether changing the weights and writing them lost no bit, and at most how far off they are after both."""
    exact = change.get("exact", True) and report.exact
    return exact, change.get("max_relative_error", 0.0) + report.max_relative_error


def promoted(before: "Adapter", after: "Adapter") -> dict[str, str]:
    """The tensors that an operation gave another dtype, with that dtype."""
    from adaptertools.tensors import dtype_name

    old = before.named_tensors
    return {
        name: dtype_name(tensor.dtype)
        for name, tensor in after.named_tensors.items()
        if name in old and old[name].dtype != tensor.dtype
    }


def promoted_lines(dtypes: Mapping[str, str]) -> list[str]:
    """One line a dtype that tensors were given."""
    return [
        field("promoted", f"{count(times, 'tensor')} to {dtype}") for dtype, times in Counter(dtypes.values()).items()
    ]


def writing_document(report: "WriteReport") -> dict[str, Any]:
    """The same for `--json`."""
    return {
        "destination": {
            "path": str(report.path),
            "format": report.format,
            "container": report.container,
            "nbytes": report.nbytes,
            "nbytes_on_disk": report.nbytes_on_disk,
            **({"commit": report.commit, "url": report.url} if report.commit else {}),
        },
        "modules": report.modules,
        "exact": report.exact,
        "max_relative_error": report.max_relative_error,
        "losses": [
            {
                "tensor": loss.tensor,
                "factor": loss.factor,
                "dtype": loss.dtype,
                "exact": loss.exact,
                "max_relative_error": loss.max_relative_error,
            }
            for loss in report.losses
        ],
        "left_out": list(report.left_out),
        "dropped": list(report.dropped),
        "notes": list(report.notes),
    }
