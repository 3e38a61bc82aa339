"""Several adapters read for one command, each with the options that are meant for it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adaptertools.cli._values import parse_assignments, type_name
from adaptertools.errors import MissingAlphaError, OptionError

if TYPE_CHECKING:
    from adaptertools.adapter import Adapter
    from adaptertools.cli.options import Sources
    from adaptertools.containers.pipeline import Model
    from adaptertools.containers.source import Located


def read_sources(options: "Sources", srcs: "Sequence[Located]", base: "Model | None" = None) -> "list[Adapter]":
    """The adapters at these places, in order. Alpha goes to those alone whose file does not state it.

    `base` is the base model where the options do not name it.

    Raises: OptionError where an option fits no source, or counts do not match; AdapterToolsError of any reader
    """
    from adaptertools import api

    formats = _formats(options.source_formats, srcs)
    if options.base is not None:
        base = api.open_base(options.base, options.token, format=formats[0])
    given = [{**each, "base": base} for each in _reading_arguments(options, formats)]
    adapters: list[Adapter | None] = []
    missing: dict[int, MissingAlphaError] = {}
    for index, (src, arguments) in enumerate(zip(srcs, given, strict=True)):
        try:
            adapters.append(api.read(src, **arguments))
        except MissingAlphaError as error:
            adapters.append(None)
            missing[index] = error
    for index, alpha in _alphas(options.source_alphas, srcs, missing).items():
        adapters[index] = api.read(srcs[index], alpha=alpha, **given[index])
    return [adapter for adapter in adapters if adapter is not None]


def _formats(named: Sequence[str], srcs: "Sequence[Located]") -> list[str]:
    from adaptertools import api

    if len(named) not in (0, 1, len(srcs)):
        raise OptionError(
            f"--from is given {len(named)} times for {len(srcs)} sources: give it once for all of them, once for each "
            "in their order, or not at all"
        )
    if not named:
        return [api.detect(src) for src in srcs]
    return list(named) * len(srcs) if len(named) == 1 else list(named)


def _reading_arguments(options: "Sources", formats: Sequence[str]) -> list[dict[str, Any]]:
    """The keyword arguments of `adaptertools.read` for each source, alpha left out."""
    from adaptertools import api

    own = {name: api.read_options(name) for name in formats}
    for assignment in options.in_options:
        key = assignment.partition("=")[0].replace("-", "_")
        if not any(key in known for known in own.values()):
            listed = "; ".join(f"{name} has {_listed(known)}" for name, known in own.items())
            raise OptionError(f"--in {assignment}: no source is of a format with such an option: {listed}")
    slotted = [name for name in formats if api.reads_with(name, "slots")]
    if options.slots is not None and not slotted:
        raise OptionError(f"--slots {options.slots}: no source is of a format that takes it, but {_joined(formats)}")
    return [
        {
            "format": name,
            "slots": options.slots if name in slotted else None,
            **parse_assignments("--in", name, _meant_for(own[name], options.in_options), own[name]),
        }
        for name in formats
    ]


def _meant_for(known: Any, assignments: Sequence[str]) -> list[str]:
    return [text for text in assignments if text.partition("=")[0].replace("-", "_") in known]


def _alphas(
    values: Sequence[float], srcs: "Sequence[Located]", missing: dict[int, MissingAlphaError]
) -> dict[int, float]:
    """The alpha of each source whose file states none.

    Raises: MissingAlphaError where none was given; OptionError where it fits none, or not as many
    """
    if missing and not values:
        raise next(iter(missing.values()))
    if values and not missing:
        raise OptionError(f"--source-alpha {values[0]:g}: every source states its alpha, so that it would do nothing")
    if values and len(values) not in (1, len(missing)):
        raise OptionError(
            f"--source-alpha is given {len(values)} times, and {_joined([srcs[index].label for index in missing])} of "
            f"{len(srcs)} sources state no alpha: give one value for all of these, or one for each in their order"
        )
    each = list(values) * len(missing) if len(values) == 1 else values
    return dict(zip(missing, each, strict=True))


def _listed(known: Any) -> str:
    return ", ".join(f"{key}={type_name(parameter.annotation)}" for key, parameter in known.items()) or "none"


def _joined(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))
