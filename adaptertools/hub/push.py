"""A file or a folder goes to the Hub: its large files first, its model card with it, and all of it in one commit."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from adaptertools import formats
from adaptertools.adapter import Adapter
from adaptertools.errors import DamagedFileError, FileError, HubError, HubUnavailableError
from adaptertools.hub import card
from adaptertools.hub.address import Address
from adaptertools.hub.card import CardFacts
from adaptertools.hub.client import connect
from adaptertools.hub.commit import Commit
from adaptertools.hub.contents import Contents
from adaptertools.hub.provenance import adapter_facts, adapter_sources, merge_facts, merge_sources, sources_of
from adaptertools.hub.revision import resolve
from adaptertools.hub.standing import asked, size_of
from adaptertools.hub.transfer import download

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

_BARE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PEFT = "adapter_config.json"
_TOGETHER = 4
"""Large files that go at the same time."""
_LARGE = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What a push did, or with `dry_run` would do."""

    address: Address
    format: str | None
    """Of an adapter; None for a model."""
    dry_run: bool
    sha: str | None
    """The commit that holds it all; None for a dry run."""
    url: str
    pull_request: str | None
    changed: bool
    """False where everything stood there already, so that no commit was made."""
    created: bool
    """Whether the repository is new."""
    sent: tuple[tuple[str, int], ...]
    """Files that are new or differ, with their bytes."""
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    """Files of an earlier version that these take the place of."""
    left_out: tuple[tuple[str, str], ...]
    """Names that stayed here, each with the reason."""
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of the files that are new or differ."""
        return sum(size for _, size in self.sent)


def upload(
    contents: Contents,
    address: Address,
    *,
    message: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    source: str | None = None,
    check: Callable[[Commit], None] | None = None,
    token: str | None = None,
    on_progress: Progress | None = None,
) -> PushReport:
    """Send files to a repository in one commit, with their model card. What stands there already is not sent again.

    `source` is what records call the place of the files, `org/name@sha` where they came from the Hub. `check` may
    refuse, by an error, what stands there, before anything is sent.

    Raises: HubMovedError where someone else committed meanwhile; HubUnavailableError where the same call goes on;
            HubError, OptionError
    """
    local = _text(contents.card, str(contents.card)) if contents.card else None
    card.read_card(local or "", str(contents.card))  # what is wrong with it is said before a repository is made
    commit = Commit.open(address, token=token, private=private, create_pr=create_pr, trial=dry_run)
    if check is not None:
        check(commit)
    sources = [*([source] if source else []), *_sources(contents)]
    facts = facts_of(contents, address, token=token)
    readme, notes = model_card(commit, facts, sources=sources, local=local, token=token)
    for path in _replaced(commit, contents):
        commit.delete(path)
    _send(commit, {**contents.files, card.NAME: readme.encode()}, on_progress)
    done = commit.finish(message or _message(contents))
    return PushReport(
        address=address,
        format=contents.format,
        dry_run=dry_run,
        sha=done.sha,
        url=done.url,
        pull_request=done.pull_request,
        changed=bool(commit.added or commit.deleted),
        created=commit.created,
        sent=tuple((path, commit.added[path]) for path in commit.added),
        unchanged=tuple(commit.unchanged),
        removed=tuple(commit.deleted),
        left_out=contents.left_out,
        notes=(*notes, *_others(commit, contents)),
    )


def facts_of(contents: Contents, address: Address, *, token: str | None = None) -> CardFacts:
    """What the card is to say of these files.

    Raises: HubUnavailableError
    """
    title = address.repo_id.rpartition("/")[2]
    if contents.format is None:
        return merge_facts(contents.record, contents.config or {}, title)
    facts = adapter_facts(contents.adapter, contents.format, title)
    named = _without_namespace(contents.adapter, token)
    return replace(facts, base_models=tuple(dict.fromkeys([*facts.base_models, *named])))


def _without_namespace(adapter: Adapter | None, token: str | None) -> list[str]:
    """Base models of an adapter that are named as the first ones on the Hub are, `gpt2`, by their names there now.

    A folder may be called so too, which is why the Hub is asked.
    """
    found = []
    for name in (base.id for base in (adapter.bases.values() if adapter else ())):
        if name and _BARE_NAME.fullmatch(name) and not Path(name).exists():
            api = connect(token)
            try:
                found.append(asked(api, Address(name), partial(api.model_info, name)).id)
            except HubUnavailableError:
                raise
            except HubError:
                continue
    return found


def model_card(
    commit: Commit, facts: CardFacts, *, sources: Sequence[str] = (), local: str | None = None, token: str | None = None
) -> tuple[str, list[str]]:
    """The card that goes with a commit, and what is to be known about it.

    The repository's own card is kept where somebody wrote in it; else the one beside the files (`local`) is taken, else
    a new one is made. What `sources` (names as records have them: `org/name@sha`) say of licence, languages and
    datasets fills what the card leaves open.

    Raises: HubError; DamagedFileError where the metadata of the card cannot be read
    """
    standing = _text_at(commit.address, commit.parent, token) if card.NAME in commit.files else None
    existing, notes = _chosen(commit.address, standing, local)
    cards = [text for address in sources_of(sources) if (text := _text_of(address, token, notes)) is not None]
    if local is not None and existing is not local:
        cards.insert(0, local)
    carried = card.carried([data for text in cards if (data := _data(text))])
    notes += _licences(existing, cards)
    label = card.NAME if existing is local else f"{commit.address}: {card.NAME}"
    written = card.write_card(existing, replace(_beside_peft(commit, facts), carried=carried), label)
    return written, notes


def _beside_peft(commit: Commit, facts: CardFacts) -> CardFacts:
    """A repository in which an adapter of PEFT's stays is still one that PEFT loads."""
    return replace(facts, library="peft") if facts.library is None and _PEFT in commit.files else facts


def _chosen(address: Address, standing: str | None, local: str | None) -> tuple[str | None, list[str]]:
    """The card to go on with: that of the repository if somebody wrote in it, else the one beside the files."""
    if standing is None or local is None:
        return local if standing is None else standing, []
    if not card.has_prose(standing):
        return local, []
    if card.same_prose(standing, local):
        return standing, []
    return standing, [f"the card of {address} is kept: the prose of the local {card.NAME} differs and was not sent"]


def _text_at(address: Address, sha: str | None, token: str | None) -> str:
    """The card that stands in the address's folder at a commit."""
    revision = resolve(Address(address.repo_id, sha), token=token)
    name = f"{address.inside}/{card.NAME}" if address.inside else card.NAME
    return _text(download(revision, [name]) / name, f"{address}: {card.NAME}")


def _text(path: Path, label: str) -> str:
    """A card as it is, with its kind of line ends.

    Raises: DamagedFileError
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{label}: the card is no text in UTF-8: mend it") from error


def _text_of(address: Address, token: str | None, notes: list[str]) -> str | None:
    """The card of a source; one that cannot be had is no reason to stop, but is said."""
    try:
        revision = resolve(address, token=token)
        if card.NAME not in revision.files:
            return None
        return _text(download(revision, [card.NAME]) / card.NAME, str(address))
    except HubUnavailableError:
        raise
    except (HubError, FileError) as error:
        notes.append(f"licence, languages and datasets of {address} were not carried over: {error}")
        return None


def _data(text: str) -> Mapping[str, Any]:
    """The metadata of a source's card; one that cannot be read says nothing."""
    try:
        return card.read_card(text).data
    except DamagedFileError:
        return {}


def _licences(existing: str | None, cards: Sequence[str]) -> list[str]:
    """A word where sources have different licences: which of them holds is not for a program to say."""
    said = [_data(text).get("license") for text in [*([existing] if existing else []), *cards]]
    named = list(dict.fromkeys(licence for licence in said if isinstance(licence, str)))
    if len(named) < 2:
        return []
    return [f"the sources have different licences, {' and '.join(named)}: the card says {named[0]}. See whether it may"]


def _sources(contents: Contents) -> list[str]:
    return adapter_sources(contents.adapter) if contents.format is not None else merge_sources(contents.record)


def _replaced(commit: Commit, contents: Contents) -> list[str]:
    """Files of an earlier version of the same format, which a reader would take for a part of this one."""
    return [
        path
        for path in commit.files
        if path not in contents.files and any(fnmatch(path.split("/")[0], pattern) for pattern in contents.owned)
    ]


def _others(commit: Commit, contents: Contents) -> list[str]:
    """A word on adapters of other formats that stay in the same place."""
    staying = [path for path in commit.files if path not in contents.files and path not in commit.deleted]
    found = {
        path: name
        for name in formats.names()
        for path in staying
        if formats.get(name).FOLDER and any(fnmatch(path, pattern) for pattern in formats.get(name).FILES)
    }
    if not found:
        return []
    path, name = next(iter(found.items()))
    return [
        f"{commit.address} also holds an adapter of another format ({name}: {path}), which stays. Programs may take "
        "that one: delete it there, or push to a repository of its own"
    ]


def _send(commit: Commit, files: Mapping[str, Path | bytes], on_progress: Progress | None) -> None:
    """Put the files into the commit, the large ones first."""
    sizes = {path: size_of(content) for path, content in files.items()}
    total, done = sum(sizes.values()), 0
    for group in _groups(sizes):
        commit.add_all({path: files[path] for path in group})
        done += sum(sizes[path] for path in group)
        if on_progress is not None:
            on_progress(done, total)


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Large files a few at a time, then all small ones together."""
    large = sorted((path for path, size in sizes.items() if size >= _LARGE), key=lambda path: -sizes[path])
    for start in range(0, len(large), _TOGETHER):
        yield large[start : start + _TOGETHER]
    yield [path for path, size in sizes.items() if size < _LARGE]


def _message(contents: Contents) -> str:
    if contents.format is not None:
        return f"Upload a LoRA adapter ({contents.format}) with adaptertools"
    return "Upload a model with adaptertools"
