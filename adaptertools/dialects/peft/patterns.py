"""rank_pattern and alpha_pattern of PEFT: regular expressions for ends of module paths, the first in the file first.

Read in huggingface/peft 0.21.2, `get_pattern_key` in `utils/other.py`.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from adaptertools.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Patterns:
    """Regular expressions and their values, in the order of the file, of which the first that matches counts.

    An expression matches the end of a path, from a dot on. Expressions that are one whole path, as they are written
    here for single modules, are looked up by it: there may be one for every module.
    """

    exact: Mapping[str, tuple[int, Any]]
    others: tuple[tuple[int, re.Pattern[str], Any], ...]

    @classmethod
    def parse(cls, raw: Mapping[str, Any], label: str, key: str) -> Self:
        """Raises: ConfigError"""
        stated = raw.get(key) or {}
        if not isinstance(stated, Mapping):
            raise ConfigError(f"{label}: {key} is {stated!r:.80}, expected an object of patterns and numbers")
        exact, others = {}, []
        for order, (pattern, value) in enumerate(stated.items()):
            path = re.sub(r"\\(.)", r"\1", pattern[1:-1])
            if pattern == anchored(path):
                exact[path] = (order, value)
            else:
                others.append((order, compile_pattern(rf"(.*\.)?({pattern})$", label, key), value))
        return cls(exact, tuple(others))

    def value(self, path: str, default: Any) -> Any:
        """The value for a module, or `default` where nothing matches."""
        order, value = self.exact.get(path, (sys.maxsize, default))
        return next((other for at, pattern, other in self.others if at < order and pattern.match(path)), value)


def anchored(path: str) -> str:
    """The expression that matches this path alone."""
    return f"^{re.escape(path)}$"


def compile_pattern(expression: str, label: str, key: str) -> re.Pattern[str]:
    """The regular expression that a field of the configuration holds.

    Raises: ConfigError
    """
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{label}: {key} holds {expression!r:.80}, no regular expression: {error}") from None
