"""Whether an adapter stands already where one is to go on the Hub."""

from collections.abc import Collection
from fnmatch import fnmatch

from adaptertools import formats
from adaptertools.errors import DestinationExistsError
from adaptertools.formats import Format
from adaptertools.hub.choice import may_hold_an_adapter
from adaptertools.hub.commit import Commit
from adaptertools.hub.standing import shown


def check_free(commit: Commit, module: Format, name: str, *, named: bool) -> None:
    """Make sure that an adapter of this format may go to the commit's folder, and takes no other's place there.

    `name` is the file that it becomes if the format has no folder of its own. Was the file `named` by the caller,
    adapters beside it are no matter.

    Raises: DestinationExistsError
    """
    own = [] if module.FOLDER or name not in commit.files else [name]
    held = own if named else own or _adapter_in(commit.files)
    if not held:
        return
    replaced = bool(own) or (module.FOLDER and any(_fits(path, module) for path in held))
    effect = "replaces it" if replaced else "writes this one beside it"
    raise DestinationExistsError(
        f"{commit.address} holds an adapter ({held[0]}, commit {shown(commit.parent)}). overwrite=True (--overwrite) "
        f"{effect}"
    )


def _adapter_in(files: Collection[str]) -> list[str]:
    """The files in a folder that a format would take for an adapter, or a part of one."""
    folders = [module for module in map(formats.get, formats.names()) if module.FOLDER]
    names = [path for path in files if "/" not in path]
    return [
        path
        for path in files
        if any(_fits(path, module) for module in folders) or (path in names and may_hold_an_adapter(path, names))
    ]


def _fits(path: str, module: Format) -> bool:
    return any(fnmatch(path.split("/")[0], pattern) for pattern in module.FILES)
