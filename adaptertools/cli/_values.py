"""Text to values and values to text: `NAME=VALUE` options by their annotation, and JSON that every parser reads."""

import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptertools.errors import OptionError, count

_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_assignments(
    flag: str, format: str, assignments: Sequence[str], known: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """The values of `NAME=VALUE` options, each made what its parameter is annotated as.

    Raises: OptionError that lists the known names with their types
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.replace("-", "_")
        if name not in known:
            listed = ", ".join(f"{key}={type_name(parameter.annotation)}" for key, parameter in known.items())
            raise OptionError(f"{flag} {assignment}: {format} has no such option; it has {listed or 'none'}")
        wanted = type_name(known[name].annotation)
        if not equals:
            raise OptionError(f"{flag} {assignment}: expected {flag} {name}={wanted}")
        try:
            values[name] = parse_value(text, known[name].annotation)
        except ValueError:
            raise OptionError(f"{flag} {assignment}: expected {wanted} after the equals sign") from None
    return values


def parse_value(text: str, annotation: Any) -> Any:
    """The text as what the annotation says; of a union, the first that fits, `None`, numbers and truth before text.

    Raises: ValueError
    """
    choices = sorted(_choices(annotation), key=lambda choice: choice in (str, Path, inspect.Parameter.empty))
    for choice in choices:
        try:
            return _parser(choice)(text)
        except ValueError:
            continue
    raise ValueError(text)


def type_name(annotation: Any) -> str:
    """How a help text names an annotation: `float`, `none|str`, `full|half`."""
    return "|".join(_choice_name(choice) for choice in _choices(annotation))


def parse_weights(text: str | None, adapters: int) -> list[float] | None:
    """A weight for each of so many adapters, from numbers with commas between.

    Raises: OptionError
    """
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--weights {text}: expected numbers with commas between, such as 0.7,0.3,-1") from None
    if not all(map(math.isfinite, weights)):
        raise OptionError(f"--weights {text}: expected finite numbers")
    if len(weights) != adapters:
        numbers = f"{count(len(weights), 'weight')} for {count(adapters, 'adapter')}"
        raise OptionError(f"--weights {text}: {numbers}; give one for each, in order")
    return weights


def to_json(document: Mapping[str, Any]) -> str:
    """One JSON object; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=False)


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _choice_name(choice: Any) -> str:
    if typing.get_origin(choice) is typing.Literal:
        return "|".join(map(str, typing.get_args(choice)))
    if choice is type(None):
        return "none"
    return {str: "text", Path: "path", inspect.Parameter.empty: "text"}.get(choice, getattr(choice, "__name__", "text"))


def _parser(choice: Any) -> Callable[[str], Any]:
    if typing.get_origin(choice) is typing.Literal:
        named = {str(value): value for value in typing.get_args(choice)}
        return functools.partial(_look_up, named)
    parsers: dict[Any, Callable[[str], Any]] = {
        type(None): functools.partial(_look_up, {"none": None}),
        bool: functools.partial(_look_up, _TRUTH),
        int: int,
        float: float,
        Path: Path,
    }
    return parsers.get(choice, str)


def _look_up(named: Mapping[str, Any], text: str) -> Any:
    if text not in named and text.lower() not in named:
        raise ValueError(text)
    return named.get(text, named.get(text.lower()))


def _plain(value: Any) -> Any:
    """The value in JSON's own terms."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | str():
            return value
        case _:
            return str(value)
