"""Formats: named tensors <-> Adapter, one file each. The folder is the registry.

A format module says what it is in these names:

    SUMMARY     one line for tables
    CONTAINERS  the containers that it is written in, the default first; empty if it is only read
    FOLDER      True if it is written as a folder, False if as one file
    CONFIG      the name of its JSON document; for formats that are one file, what is added to the file's name
    FILES       patterns of the file names that belong to it in a folder; what `--overwrite` replaces
    CARRIES     the Features that it can hold; a writer never sees an adapter with any other
    detect(source) -> bool
    read(source, *, options) -> Adapter
    write(adapter, encoder, *, container, options) -> Artifact
    oddities(source, *, options) -> tuple[str, ...]    only where values beside the adapter's own are worth a look
    KEEPS_SETTINGS = True    only where its own record holds what other formats say of the adapter
    OPAQUE_IS_OWN = True    only where opaque names may stand for rows in an order of its own; no other format gets them

The keyword-only parameters of `read` and `write` are the format's options on the command line. `alpha` and `slots`,
where `read` has them, and `base`, where `read` or `write` has it, are `--source-alpha`, `--slots` and `--base`. A base
may be its config.json alone, without one shape: who cannot do without names and shapes says so.
"""

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Protocol, cast

from adaptertools.adapter import Adapter, Feature
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.checkpoint import WEIGHTS
from adaptertools.containers.source import Source
from adaptertools.errors import (
    AmbiguousFormatError,
    OptionError,
    UnknownFormatError,
    UnsupportedFeatureError,
    few,
)


class Format(Protocol):
    """What a format module offers."""

    SUMMARY: str
    CONTAINERS: tuple[str, ...]
    FOLDER: bool
    CONFIG: str
    FILES: tuple[str, ...]
    CARRIES: frozenset[Feature]
    read: Callable[..., Adapter]
    write: Callable[..., Artifact]

    def detect(self, source: Source) -> bool: ...


@cache
def names() -> tuple[str, ...]:
    """The names of all formats, as the command line spells them."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))


def get(name: str) -> Format:
    """The format with this name.

    Raises: OptionError
    """
    if name not in names():
        raise OptionError(f"unknown format {name!r}: expected one of {', '.join(names())}")
    return cast(Format, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


def detect(source: Source) -> str:
    """The name of the one format that recognises the content.

    Raises: UnknownFormatError, AmbiguousFormatError; what the only tensor file raises where that cannot be read
    """
    found = [name for name in names() if get(name).detect(source)]
    if not found and source.is_folder and any(map(source.has, WEIGHTS)):
        raise UnknownFormatError(
            f"{source.label}: a whole model, it seems ({_contents(source)}), and an adapter is expected here"
        )
    if not found:
        raise UnknownFormatError(
            f"{source.label}: no adapter of a known format ({_contents(source)}). Known are {', '.join(names())}; "
            "name one with --from to see what is wrong with it"
        )
    if len(found) > 1:
        raise AmbiguousFormatError(f"{source.label}: this may be {' or '.join(found)}; say which with --from")
    return found[0]


def check_features(adapter: Adapter, name: str) -> None:
    """Raises: UnsupportedFeatureError that names what the format cannot carry and who holds it."""
    check = getattr(get(name), "check", None)
    if check is not None:
        check(adapter)
    _check_opaque(adapter, name)
    missing = sorted(adapter.features - get(name).CARRIES)
    if missing:
        lines = [f"{feature} ({few(adapter.holders(feature))})" for feature in missing]
        drop = " ".join(f"--drop {feature}" for feature in missing)
        raise UnsupportedFeatureError(f"{name} cannot carry {'; '.join(lines)}. To give that up: {drop}")


def _check_opaque(adapter: Adapter, name: str) -> None:
    """Refuse names that have a meaning only in the format that the adapter comes from, even if they were renamed."""
    opaque = [str(module.target) for module in adapter.modules if module.target.opaque]
    homes = {*adapter.metadata, *([adapter.origin.format] if adapter.origin else [])} & set(names())
    for home in sorted(homes - {name}):
        if opaque and getattr(get(home), "OPAQUE_IS_OWN", False):
            raise UnsupportedFeatureError(
                f"{few(opaque)}: {home}'s own names, which could not be turned back, for weights whose rows {home} "
                f"may have in another order; {name} would have them wrong. {adapter.naming_advice}"
            )


def _contents(source: Source) -> str:
    """What stands at a place that no format recognises, so that the user sees why."""
    files = source.tensor_names
    if len(files) == 1:
        return f"its tensors are named like {few(sorted(source.tensors(files[0]).tensors), 2)}"
    return f"tensor files: {few(files)}" if files else "no tensor file"
