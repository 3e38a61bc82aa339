"""The YAML at the top of a card, read as the Hub reads it, and changed entry by entry: the rest stays as it was."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from adaptertools.errors import DamagedFileError

_ENTRY = re.compile(r"^(?=[^\s#\-{}\[\]&*!|>'\"%@`])([^\s:]+):(?=\s|$)", re.MULTILINE)


def parse(block: str, label: str) -> dict[str, Any]:
    """The entries of the metadata.

    Raises: DamagedFileError if it is not YAML, or no mapping
    """
    import yaml

    try:
        found = yaml.load(block, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 2}" if mark is not None else ""
        raise DamagedFileError(f"{label}{line}: the metadata between the lines of --- is not YAML: mend it") from error
    if not isinstance(found, dict | None):
        raise DamagedFileError(
            f"{label}: the metadata between the lines of --- is no list of names and values: mend it"
        )
    return found or {}


def edited(block: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The YAML of `new`, in which every entry that is the same in `old` stands as it did, with its comments."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) or (key in old) != (key in new)]
    written = block.rstrip()
    for key in changed:
        written = _with_entry(written, key, dumped({key: new[key]}) if key in new else "")
    written = written.strip("\n")
    return written if _means(written, new) else dumped(new)


def dumped(data: Mapping[str, Any]) -> str:
    """These entries in YAML."""
    import yaml

    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)
    return text.rstrip("\n")


def _with_entry(block: str, key: str, entry: str) -> str:
    """The YAML with one entry in the place of the old one, or at the end."""
    found = list(_ENTRY.finditer(block))
    for index, match in enumerate(found):
        if match[1] == key:
            end = found[index + 1].start() if index + 1 < len(found) else len(block)
            before, after = block[: match.start()], block[end:]
            return f"{before}{entry}\n{after}" if entry else before + after
    return f"{block.rstrip()}\n{entry}" if entry else block


def _means(block: str, data: Mapping[str, Any]) -> bool:
    try:
        return parse(block, "") == data
    except DamagedFileError:
        return False


@cache
def _loader() -> Any:
    """YAML as of version 1.2 where it matters: `language: no` is Norwegian, not false, to the Hub."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
        """SafeLoader with fewer words for yes and no."""

    boolean = "tag:yaml.org,2002:bool"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != boolean]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(boolean, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
    return Loader
