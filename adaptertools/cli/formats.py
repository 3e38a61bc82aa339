"""`adaptertools formats`: what can be read and written, and the options and key grammar of one format."""

import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

import click

from adaptertools.cli.options import FORMAT, Output, output_options


@click.command("formats", short_help="List the formats, or one format's options.")
@click.argument("format", type=FORMAT, required=False)
@output_options()
def command(format: str | None, output: Output) -> None:
    """List the formats: how each is written, and what it carries beyond plain linear factors.

    With FORMAT: its own options, given as --in NAME=VALUE and --out NAME=VALUE, what they mean, and its key grammar.
    """
    from adaptertools import formats

    if format is not None:
        name = format
        output.show(lambda: _one_as_text(name), lambda: _one(name))
        return
    listed = {name: _one(name) for name in formats.names()}
    output.show(lambda: _all_as_text(listed), lambda: {"formats": listed})


def _one(name: str) -> dict[str, Any]:
    from adaptertools import api, formats

    module = formats.get(name)
    return {
        "summary": module.SUMMARY,
        "containers": list(module.CONTAINERS),
        "carries": sorted(module.CARRIES),
        "read_options": _options(api.read_options(name)),
        "reading": inspect.getdoc(module.read) or "",
        "write_options": _options(api.write_options(name)),
        "writing": inspect.getdoc(module.write) or "",
        "grammar": inspect.getdoc(module) or "",
    }


def _options(parameters: Mapping[str, inspect.Parameter]) -> dict[str, dict[str, Any]]:
    from adaptertools.cli._values import type_name

    return {
        name: {"type": type_name(parameter.annotation), "default": parameter.default}
        for name, parameter in parameters.items()
    }


def _all_as_text(listed: Mapping[str, Mapping[str, Any]]) -> str:
    from adaptertools.cli._report import table

    rows = [("FORMAT", "READ", "WRITTEN AS", "WHAT IT IS")]
    rows += [(name, "yes", _written_as(entry), entry["summary"]) for name, entry in listed.items()]
    carried = [("FORMAT", "CARRIES BESIDE PLAIN LINEAR FACTORS")]
    carried += [(name, ", ".join(entry["carries"]) or "nothing") for name, entry in listed.items()]
    return f"{table(rows)}\n\n{table(carried)}"


def _one_as_text(name: str) -> str:
    from adaptertools.cli._report import table

    entry = _one(name)
    lines = [f"{name}: {entry['summary']}", "", f"written as  {_written_as(entry)}"]
    lines.append(f"carries     {', '.join(entry['carries']) or 'plain linear factors alone'}")
    for flag, options, explained in (
        ("--in", entry["read_options"], entry["reading"]),
        ("--out", entry["write_options"], entry["writing"]),
    ):
        rows = [
            (f"  {flag} {key}={each['type']}", f"[default: {_shown(each['default'])}]") for key, each in options.items()
        ]
        lines += ["", f"{flag} options:", table(rows) if rows else "  none"]
        lines += ["", textwrap.indent(explained, "  ")] if explained else []
    return "\n".join([*lines, "", entry["grammar"]])


def _written_as(entry: Mapping[str, Any]) -> str:
    return ", ".join(entry["containers"]) or "not written"


def _shown(default: object) -> str:
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)
