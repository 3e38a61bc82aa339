"""Consumers: the programs that adapters are loaded into, and the rules by which each takes a file or does not.

A consumer is one file in `tables/` that defines `CONSUMER`: its name, the formats it loads, and its rules as a table,
each with the version it holds in and the file it was read in. The folder is the registry.
"""

import importlib
import pkgutil
from functools import cache

from adaptertools.consumers import tables
from adaptertools.consumers.rule import Consumer
from adaptertools.errors import OptionError


@cache
def _all() -> dict[str, Consumer]:
    modules = (importlib.import_module(f"{tables.__name__}.{m.name}") for m in pkgutil.iter_modules(tables.__path__))
    found = [module.CONSUMER for module in modules]
    return {consumer.name: consumer for consumer in found}


def names() -> tuple[str, ...]:
    """The names of all consumers, as the command line spells them."""
    return tuple(sorted(_all()))


def get(name: str) -> Consumer:
    """The consumer with this name.

    Raises: OptionError
    """
    if name not in _all():
        raise OptionError(f"unknown consumer {name!r}: expected one of {', '.join(names())}")
    return _all()[name]
