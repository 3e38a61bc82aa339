"""What an address on the Hub holds comes to this machine: exactly the files that it needs, of one commit."""

from typing import Literal

from adaptertools import containers
from adaptertools.containers.source import Located
from adaptertools.errors import UnsafeFileError
from adaptertools.hub.address import Address
from adaptertools.hub.cache import RemoteFile
from adaptertools.hub.choice import Choice, choose_adapter_files, has_adapter, pickle_refusal
from adaptertools.hub.models import choose_model_files, has_model
from adaptertools.hub.revision import Revision, as_given, resolve
from adaptertools.hub.transfer import Progress, download

__all__ = [
    "Choice",
    "RemoteFile",
    "Revision",
    "check_pickles",
    "choose",
    "choose_adapter_files",
    "choose_model_files",
    "download",
    "fetch",
    "located_at",
    "resolve",
]

_NO_TENSORS = (".json", ".txt", ".model", ".jinja", ".py")

What = Literal["adapter", "model", "either"]


def fetch(
    address: Address | str,
    what: What = "adapter",
    *,
    token: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    on_progress: Progress | None = None,
) -> Located:
    """An adapter or a base model of the Hub as a place on this machine, in the cache that all tools share.

    Raises: HubError and what stands below it; UnknownFormatError, AmbiguousFormatError, UnsafeFileError, OptionError
    """
    found = resolve(as_given(address, revision), token=token)
    choice = choose(found, what, allow_pickle=allow_pickle)
    download(found, choice.names, on_progress=on_progress)
    check_pickles(found, choice, allow_pickle=allow_pickle)
    return located_at(found, choice)


def choose(revision: Revision, what: What, *, allow_pickle: bool = False) -> Choice:
    """The files that are needed of an adapter, of a model, or of whichever of the two stands there.

    Raises: HubNotFoundError, UnknownFormatError, AmbiguousFormatError, UnsafeFileError
    """
    if what == "model" or (what == "either" and has_model(revision) and not has_adapter(revision)):
        return choose_model_files(revision, allow_pickle=allow_pickle)
    return choose_adapter_files(revision, allow_pickle=allow_pickle)


def check_pickles(revision: Revision, choice: Choice, *, allow_pickle: bool) -> None:
    """Make sure that no file that was fetched is a torch file, whatever it is named, unless those are allowed.

    Raises: UnsafeFileError, EmptyFileError, LfsPointerError
    """
    for name in choice.names:
        if name.endswith(_NO_TENSORS) or allow_pickle:
            continue
        found = containers.identify(revision.snapshot / name)
        if found is containers.torchfile:
            raise UnsafeFileError(pickle_refusal(revision, name, "adapter or model"))


def located_at(revision: Revision, choice: Choice) -> Located:
    """What was chosen of a commit, as a place on this machine that keeps its name on the Hub."""
    return Located(revision.snapshot / choice.at, revision.label_at(choice.at), revision.name_at(choice.at))
