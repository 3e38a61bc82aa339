"""Part of an adapter, under other names."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from adaptertools.adapter import Adapter, HistoryEntry
from adaptertools.errors import DuplicateTargetError, OptionError
from adaptertools.names import leaf, matches

Value = TypeVar("Value")
Renaming = tuple[re.Pattern[str], str]


def select(
    adapter: Adapter, *, only: Sequence[str] = (), exclude: Sequence[str] = (), rename: Sequence[str] = ()
) -> Adapter:
    """The modules and weights that `only` names, without those that `exclude` names, renamed.

    `only` and `exclude` are glob patterns. One fits the name of a target or of a stored weight, whole or its last
    parts, or that of a module it lies in: `q_proj`, `model.layers.1.*`, `vision_tower`; `unet:*` are those of one of
    several models. `rename` are `REGEX=NEW`, split at the last `=`; each in turn replaces what it finds in every name
    that is left. `left_out` says what stays behind.

    Raises: OptionError for a pattern that fits nothing, with names near it; for a faulty expression; if nothing is left
            DuplicateTargetError if two names become one
    """
    known = _names(adapter)
    for pattern in (*only, *exclude):
        if not any(_fits(pattern, shown, name) for shown, name in known.items()):
            raise OptionError(f"{pattern!r} fits no target and no stored weight of the adapter{_near(pattern, known)}")
    dropped = set(left_out(adapter, only=only, exclude=exclude))
    if dropped == known.keys():
        raise OptionError("the selection leaves nothing of the adapter")
    kept = replace(
        adapter,
        modules=tuple(module for module in adapter.modules if str(module.target) not in dropped),
        full_weights={name: weight for name, weight in adapter.full_weights.items() if name not in dropped},
        row_weights={name: rows for name, rows in adapter.row_weights.items() if name not in dropped},
    )
    for text in rename:
        kept = _rename(kept, text)
    details = {"only": list(only), "exclude": list(exclude), "rename": list(rename)}
    return kept.then(HistoryEntry(operation="select", details={key: value for key, value in details.items() if value}))


def left_out(adapter: Adapter, *, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of the modules and weights that such a selection leaves behind."""
    return tuple(
        shown
        for shown, name in _names(adapter).items()
        if (only and not any(_fits(pattern, shown, name) for pattern in only))
        or any(_fits(pattern, shown, name) for pattern in exclude)
    )


def _names(adapter: Adapter) -> dict[str, str]:
    """How each module and weight is shown, and the name that patterns see."""
    targets = {str(module.target): module.target.parameter for module in adapter.modules}
    return targets | {name: name for name in (*adapter.full_weights, *adapter.row_weights)}


def _fits(pattern: str, shown: str, name: str) -> bool:
    component, colon, within = pattern.partition(":")
    if colon:
        return shown.startswith(f"{component}:") and (not within or _is_named(within, name))
    return _is_named(pattern, name)


def _is_named(pattern: str, name: str) -> bool:
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[:count])) for count in range(len(parts), 0, -1))


def _near(wanted: str, known: Iterable[str]) -> str:
    names = list(known)
    leaves = sorted({leaf(name) for name in names} - {*names})
    near = difflib.get_close_matches(wanted, [*leaves, *names], n=3, cutoff=0.5) or leaves[:5]
    return f". Its names are like {', '.join(near)}"


def _rename(adapter: Adapter, text: str) -> Adapter:
    pattern, replacement = _parse(text)
    known = _names(adapter)
    if not any(pattern.search(name) for name in known.values()):
        raise OptionError(f"--rename {text}: the expression finds nothing{_near(pattern.pattern, known)}")

    def new_name(name: str) -> str:
        try:
            renamed = pattern.sub(replacement, name)
        except (re.error, IndexError) as error:
            raise OptionError(f"--rename {text}: {replacement!r} is no replacement ({error})") from None
        if not renamed:
            raise OptionError(f"--rename {text}: nothing is left of the name {name}")
        return renamed

    def rename_keys(weights: Mapping[str, Value]) -> dict[str, Value]:
        renamed: dict[str, Value] = {}
        for name, weight in weights.items():
            if new_name(name) in renamed:
                raise DuplicateTargetError(f"--rename {text}: two weights become {new_name(name)}")
            renamed[new_name(name)] = weight
        return renamed

    modules = [
        replace(module, target=replace(module.target, parameter=new_name(module.target.parameter)))
        for module in adapter.modules
    ]
    full_weights, row_weights = rename_keys(adapter.full_weights), rename_keys(adapter.row_weights)
    try:
        return replace(adapter, modules=tuple(modules), full_weights=full_weights, row_weights=row_weights)
    except DuplicateTargetError as error:
        raise DuplicateTargetError(f"--rename {text}: {error}") from None


def _parse(text: str) -> Renaming:
    regex, equals, replacement = text.rpartition("=")
    if not equals or not regex:
        raise OptionError(f"--rename {text}: expected REGEX=NEW, such as '^model\\.=model.language_model.'")
    try:
        return re.compile(regex), replacement
    except re.error as error:
        raise OptionError(f"--rename {text}: {regex!r} is no regular expression ({error})") from None
