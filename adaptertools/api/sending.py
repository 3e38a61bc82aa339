"""An adapter that is written to the Hub: made as files in a temporary folder first, then sent in one commit."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from adaptertools import containers, formats
from adaptertools.adapter import Adapter
from adaptertools.api.reading import read
from adaptertools.containers.source import Source
from adaptertools.destination import default_container
from adaptertools.errors import MissingAlphaError
from adaptertools.formats import Format
from adaptertools.hub.address import Address
from adaptertools.hub.commit import Commit
from adaptertools.hub.contents import adapter_contents
from adaptertools.hub.occupied import check_free
from adaptertools.hub.push import PushReport, upload

_SAFE = "safetensors"


def container_there(address: Address, module: Format) -> str:
    """The container that a file's name in the address asks for, else the one that everybody may load."""
    named = not module.FOLDER and PurePosixPath(address.inside).suffix in map(_suffix, module.CONTAINERS)
    if named or _SAFE not in module.CONTAINERS:
        return default_container(module, Path(address.inside))
    return _SAFE


def place_there(address: Address, module: Format, container: str) -> tuple[Address, str]:
    """The folder in the repository, and the name of the folder or file that goes there.

    An adapter that is one file has the name at the end of the address, or that of the repository.
    """
    own = address.repo_id.rpartition("/")[2]
    if module.FOLDER:
        return address, own
    inside = PurePosixPath(address.inside)
    if not inside.suffix:
        return address, own + _suffix(container)
    return replace(address, inside=str(inside.parent).removeprefix(".")), inside.name


def check_there(address: Address, format: str, container: str | None = None, *, token: str | None = None) -> None:
    """Make sure that no adapter stands at an address to which one is to be written. Nothing there is changed.

    Raises: DestinationExistsError, HubError, OptionError
    """
    module = formats.get(format)
    folder, name = place_there(address, module, container or container_there(address, module))
    _refusal(address, folder, module, name)(Commit.open(folder, token=token, trial=True))


def send(
    address: Address,
    format: str,
    container: str,
    make: Callable[[Path], object],
    *,
    overwrite: bool,
    token: str | None,
    message: str,
) -> PushReport:
    """Have an adapter made in a temporary folder, and send it to an address. What is there already is looked at first.

    Raises: DestinationExistsError, HubError; AdapterToolsError of whatever makes it
    """
    module = formats.get(format)
    folder_there, name = place_there(address, module, container)
    if not overwrite:
        check_there(address, format, container, token=token)
    with tempfile.TemporaryDirectory(prefix="adaptertools-") as folder:
        place = Path(folder) / name
        make(place)
        contents = adapter_contents(Source(place), format, _as_stored(place, format))
        check = None if overwrite else _refusal(address, folder_there, module, name)  # it may have come meanwhile
        return upload(contents, folder_there, message=message, check=check, token=token)


def _refusal(address: Address, folder: Address, module: Format, name: str) -> Callable[[Commit], None]:
    return partial(check_free, module=module, name=name, named=folder != address)


def _as_stored(place: Path, format: str) -> Adapter:
    """The adapter with the history that its files have, from which the card is made."""
    try:
        return read(place, format=format)
    except MissingAlphaError:
        return read(place, format=format, alpha=1.0)  # what a card says does not depend on it


def _suffix(container: str) -> str:
    return containers.get(container).SUFFIX
