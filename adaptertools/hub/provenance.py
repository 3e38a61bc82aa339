"""How files were made, as their own records say, in the words of a card."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adaptertools.adapter import Adapter
from adaptertools.hub.address import Address, as_address
from adaptertools.hub.card import CardFacts, one_line
from adaptertools.hub.client import endpoint

_ON_THE_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<sha>[0-9a-f]{40})(?P<inside>/.*)?")
_ELSEWHERE = ("operation", "source", "sources", "history", "format")
_MOST = 300
_LIBRARIES = {"peft": "peft"}
"""The library that loads what is in a format, where the Hub knows one."""


def adapter_facts(adapter: Adapter | None, format: str, title: str) -> CardFacts:
    """What an adapter's history and configuration say."""
    bases = [base.id for base in adapter.bases.values()] if adapter else []
    history = [entry.to_json() for entry in adapter.history] if adapter else []
    steps = tuple(dict.fromkeys(_step(entry) for entry in _in_order(history)))
    return CardFacts(
        title=title,
        relation="adapter",
        base_models=_known(bases),
        library=_LIBRARIES.get(format),
        tags=("lora", "adaptertools") if steps else ("lora",),
        steps=steps,
    )


def merge_facts(record: Mapping[str, Any] | None, config: Mapping[str, Any], title: str) -> CardFacts:
    """What a merge says of itself (`adaptertools_merge.json`), and the model's configuration."""
    library = "transformers" if {"model_type", "architectures"} & config.keys() else None
    if record is None:  # a model of which nothing says how it was made
        return CardFacts(title=title, relation=None, library=library)
    base, adapters = _merged(record)
    return CardFacts(
        title=title,
        relation="merge",
        base_models=_known([base, *(name for name, _ in adapters)]),
        library=library,
        tags=("merge", "lora", "adaptertools"),
        steps=(_merge_step(record, base, adapters),),
    )


def sources_of(names: Iterable[str]) -> list[Address]:
    """The repositories among these names of sources, each at its commit, in order."""
    found = [match for name in names if (match := _ON_THE_HUB.fullmatch(name))]
    return list(dict.fromkeys(Address(match["repo"], match["sha"]) for match in found))


def adapter_sources(adapter: Adapter | None) -> list[str]:
    """The names of all sources of an adapter's history, the latest first."""
    history = [entry.to_json() for entry in adapter.history] if adapter else []
    return [name for entry in reversed([*_in_order(history)]) for name in _sources(entry)]


def merge_sources(record: Mapping[str, Any] | None) -> list[str]:
    """The names of the base and the adapters of a merge."""
    base, adapters = _merged(record or {})
    return [base, *(name for name, _ in adapters)]


def _in_order(history: Sequence[Any]) -> Iterable[Mapping[str, Any]]:
    """The operations in the order in which they were done, those of a stack's sources before it."""
    for entry in history:
        if isinstance(entry, Mapping):
            for source in _listed(entry.get("sources")):
                yield from _in_order(_listed(source.get("history")) if isinstance(source, Mapping) else [])
            yield entry


def _sources(entry: Mapping[str, Any]) -> list[str]:
    several = [source.get("source") for source in _listed(entry.get("sources")) if isinstance(source, Mapping)]
    return [name for name in [entry.get("source"), *several] if isinstance(name, str)]


def _step(entry: Mapping[str, Any]) -> str:
    several = [source for source in _listed(entry.get("sources")) if isinstance(source, Mapping)]
    named = [_named(name) for name in _sources(entry)]
    if several:
        weights = [source.get("weight") for source in several]
        named = [
            f"{_value('weight', weight)} × {name}" for weight, name in zip(weights, named[-len(weights) :], strict=True)
        ]
    details = [_said(key, entry[key]) for key in sorted(entry, key=_rank) if key not in _ELSEWHERE]
    of = f" of {' + '.join(named)}" if named else ""
    return f"`{one_line(entry.get('operation', 'unknown'))}`{of}{': ' if details else ''}{', '.join(details)}"


def _merged(record: Mapping[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
    base = record.get("base")
    name = str(base.get("name", "")) if isinstance(base, Mapping) else ""
    adapters = [entry for entry in _listed(record.get("adapters")) if isinstance(entry, Mapping)]
    return name, [(str(entry.get("name", "")), entry.get("weight")) for entry in adapters]


def _merge_step(record: Mapping[str, Any], base: str, adapters: Sequence[tuple[str, Any]]) -> str:
    named = " + ".join(f"{_value('weight', weight)} × {_named(name)}" for name, weight in adapters)
    total = record.get("total")
    figures = total if isinstance(total, Mapping) else {}
    said = [
        f"{words} {_value(key, figures[key])}"
        for key, words in (
            ("relative_delta", "delta relative to the weights that it changes"),
            ("rounding_error", "rounding error relative to the delta"),
            ("unchanged", "share of these weights that rounding left as they were"),
        )
        if isinstance(figures.get(key), int | float)
    ]
    device = f"on {one_line(record['device'])}" if record.get("device") else ""
    return f"`merge` of {named} into {_named(base)}: {', '.join([*([device] if device else []), *said])}"


def _named(name: str) -> str:
    """A source in Markdown: linked where it is a commit of a repository."""
    match = _ON_THE_HUB.fullmatch(name)
    shown = f"`{one_line(name)}`"
    return f"[{shown}]({endpoint()}/{match['repo']}/tree/{match['sha']})" if match else shown


def _rank(key: str) -> tuple[bool, bool, bool, str]:
    """Settings in alphabetical order, `from` before all others; figures of errors at the end."""
    return "error" in key, key == "exact", key != "from", key


def _said(key: str, value: Any) -> str:
    words = one_line(key).replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"not {words}"
    return f"{words} {_value(key, value)}"


def _value(key: str, value: Any) -> str:
    match value:
        case float() if math.isfinite(value) and 0 < abs(value) < 1e-3 and "error" in key:
            return f"{value:.1e}"
        case int() | float():
            return f"{value:.4g}" if isinstance(value, float) else str(value)
        case str():
            said = one_line(value)
        case list() if all(isinstance(item, str | int | float) for item in value):
            said = ", ".join(one_line(item) for item in value)
        case _:
            said = one_line(json.dumps(value))
    return f"`{said}`" if len(said) <= _MOST else f"`{said[:_MOST]}…`"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _known(names: Iterable[str | None]) -> tuple[str, ...]:
    """Those of these names that are repositories on the Hub."""
    found = []
    for name in names:
        match = _ON_THE_HUB.fullmatch(name or "")
        address = None if match else as_address(name)
        found.append(match["repo"] if match else address.repo_id if address else None)
    return tuple(dict.fromkeys(name for name in found if name))
