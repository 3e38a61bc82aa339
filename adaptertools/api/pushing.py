"""An adapter, a model, or what becomes of one, goes to the Hub."""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptertools import formats
from adaptertools.adapter import Adapter
from adaptertools.api.conversion import convert
from adaptertools.api.places import Given
from adaptertools.api.reading import detect, read
from adaptertools.api.sending import container_there, place_there
from adaptertools.containers.source import Located, Source, located
from adaptertools.destination import Progress
from adaptertools.errors import MissingAlphaError, OptionError
from adaptertools.hub.address import Address, as_address, parse_address
from adaptertools.hub.contents import (
    Contents,
    adapter_contents,
    belongs_beside,
    contents_of,
    holds_model,
    model_contents,
)
from adaptertools.hub.download import choose, located_at
from adaptertools.hub.push import PushReport, upload
from adaptertools.hub.revision import as_given, resolve
from adaptertools.hub.transfer import download


def push(
    src: Given,
    repo: str | Address,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    message: str | None = None,
    to: str | None = None,
    drop: Collection[str] = (),
    dry_run: bool = False,
    revision: str | None = None,
    token: str | None = None,
    allow_nonfinite: bool = False,
    read_options: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> PushReport:
    """Send an adapter or a model, merged or not, to a repository on the Hub, in one commit, with a model card.

    The repository and the branch are made where they are missing; `private` is for a new one. What stands there already
    is not sent again. `to` converts an adapter to another format first; `drop`, what to give up, and `allow_nonfinite`
    are for that. `revision` is of an `src` that is itself on the Hub; `read_options` are those of `read`, for an
    adapter. With `dry_run` nothing is sent, and the report says what would be.

    Memory: headers; with `to` that of `convert`, and room for the result among the temporary files
    Raises: HubMovedError where someone else committed meanwhile; HubUnavailableError where the same call goes on;
            HubError, UnknownFormatError, OptionError, and what `read` and `convert` raise
    """
    address = destination(repo, branch)
    place = source_place(src, revision=revision, token=token)
    with _contents(place, address, to, drop, read_options or {}, allow_nonfinite) as contents:
        return upload(
            contents,
            address,
            message=message,
            private=private,
            create_pr=create_pr,
            dry_run=dry_run,
            source=place.name,
            token=token,
            on_progress=on_progress,
        )


def source_place(
    src: Given, *, revision: str | None = None, token: str | None = None, on_progress: Progress | None = None
) -> Located:
    """Where the adapter or the model is that is to be pushed: here, or in the cache if it comes from the Hub itself.

    From there its card and its tokenizer come along.

    Raises: HubError, OptionError
    """
    address = as_address(src)
    if address is not None:
        found = resolve(as_given(address, revision), token=token)
        choice = choose(found, "either")
        inside = f"{choice.folder}/" if choice.folder else ""
        beside = [name for name in found.files if name.startswith(inside) and belongs_beside(name[len(inside) :])]
        download(found, [*choice.names, *beside], on_progress=on_progress)
        return located_at(found, choice)
    if revision is not None:
        raise OptionError(f"a revision is given, {revision}, and {src} is a path on this machine: it has none")
    assert not isinstance(src, Address)
    return located(src)


def destination(repo: str | Address, branch: str | None = None) -> Address:
    """Where a push goes: a repository, also by an address, and a branch of it.

    Raises: OptionError
    """
    address = parse_address(repo) if isinstance(repo, str) else repo
    if branch is None or address.revision == branch:
        return address
    if address.revision is not None:
        raise OptionError(f"{address} names the branch {address.revision}, and --branch {branch}: give one of them")
    return replace(address, revision=branch)


@contextmanager
def _contents(
    place: Located,
    address: Address,
    to: str | None,
    drop: Collection[str],
    options: Mapping[str, Any],
    allow_nonfinite: bool,
) -> Iterator[Contents]:
    """The files to send; those of another format are made for the time of it."""
    if drop and to is None:
        raise OptionError(f"--drop {' --drop '.join(drop)} is for a conversion: give --to, the format, with it")
    source = Source(place)
    if not options.get("format") and holds_model(source):
        if to is not None or options:
            raise OptionError(f"{place.label} is a model: a format, and options for reading, are for adapters alone")
        yield model_contents(place.path)
        return
    source_format = options.get("format") or detect(place)
    found = adapter_contents(source, source_format, _read(place, options))
    if to is None or (to == source_format and not drop):
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="adaptertools-") as folder:
        container = container_there(address, formats.get(to))
        name = place_there(Address(address.repo_id), formats.get(to), container)[1]
        how: dict[str, Any] = {"container": container, "allow_nonfinite": allow_nonfinite, "drop": drop}
        report = convert(place, Path(folder) / name, to=to, read_options=options, **how)
        made = Located(Path(folder) / name, f"{place.label} as {to}", place.name)
        new = contents_of(made, to)
        yield replace(new, beside=found.beside, card=found.card, left_out=(*found.left_out, *_given_up(report.dropped)))


def _given_up(dropped: Collection[str]) -> list[tuple[str, str]]:
    """What a conversion gave up (`dora: model.layers.0.q_proj`), by name, each with the reason."""
    return [(name, f"{kind}, given up by --drop") for kind, _, name in (each.partition(": ") for each in dropped)]


def _read(place: Located, options: Mapping[str, Any]) -> Adapter | None:
    """The adapter, by which its files are found sound; one whose file does not state alpha can be sent all the same."""
    try:
        return read(place, **options)
    except MissingAlphaError:
        return None
