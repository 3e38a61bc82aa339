"""Merging from and to the Hub, shard by shard: the next one is fetched while this one merges and the last one is sent.

The base is planned by its headers, and each of its files fetched when its turn comes. A finished file of the result is
uploaded at once, and all of them become visible in one commit. What was made and what was uploaded is remembered in a
folder, so that the same call goes on from there. With `low_disk` no file stays longer than it is needed: a shard is
changed where it lies, so that three are here at most, one that comes, one that merges, one that goes; four where the
shards of the result are laid out anew.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from adaptertools.containers.atomic import explained
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.source import Located, as_path, located
from adaptertools.errors import OptionError
from adaptertools.hub import client
from adaptertools.hub.address import Address, as_address
from adaptertools.hub.commit import Commit
from adaptertools.hub.download import choose, located_at
from adaptertools.hub.headers import Home, fetch_headers
from adaptertools.hub.incoming import Incoming
from adaptertools.hub.merge_card import merge_card
from adaptertools.hub.outgoing import Outgoing
from adaptertools.hub.revision import as_given, resolve
from adaptertools.hub.standing import MAIN
from adaptertools.hub.transfer import Progress, download
from adaptertools.merging.destination_folder import check_apart, check_free
from adaptertools.merging.plan import MergePlan
from adaptertools.merging.record import MergeReport
from adaptertools.merging.resume import Staging, staging_folder
from adaptertools.merging.route import Route
from adaptertools.merging.run import run_merge
from adaptertools.merging.shards import Layout


@dataclass(frozen=True, slots=True)
class Merged:
    """What became of a merge. `url` is the page of its commit, where the Hub is its destination."""

    report: MergeReport
    place: str
    sha: str | None = None
    url: str | None = None


@dataclass(kw_only=True)
class Way:
    """The way of one merge: a base model, here or on the Hub, to a folder, or a repository on the Hub.

    First `open_base`, whose result is what to plan with, then `check` or `run`. `low_disk` keeps no shard longer than
    it is needed. A merge to the Hub is made in `work`, which has to be the same when it is gone on with.
    """

    dst: Path | Address
    token: str | None = None
    low_disk: bool = False
    private: bool = False
    work: Path | None = None
    _incoming: Incoming | None = field(default=None, init=False, repr=False)

    @classmethod
    def parse(cls, dst: str, *, work_dir: str | None = None, **options: Any) -> Self:
        """To a place that is named by a path, or by an address that begins with hf://.

        Raises: OptionError
        """
        address = as_address(dst) if dst.startswith(("hf://", "https://", "http://")) else None
        if address and address.inside:
            raise OptionError(f"{dst}: a merged model stands at the top of a repository: leave out /{address.inside}")
        way = cls(dst=address or as_path(dst), work=as_path(work_dir) if work_dir is not None else None, **options)
        if address is None and (way.private or way.work):
            raise OptionError(f"--private and --work-dir are for a repository on the Hub, and {dst} is a folder")
        return way

    def open_base(
        self, model: str | Path, *, revision: str | None = None, on_progress: Progress | None = None
    ) -> Located:
        """The base model, of which only the small files and headers are fetched if it is on the Hub.

        Raises: HubError and what stands below it; UnknownFormatError, UnsafeFileError, OptionError
        """
        address = as_address(model)
        if address is None:
            if revision is not None:
                raise OptionError(f"--revision {revision}: {model} is a path on this machine, and has no revisions")
            if self.low_disk and not isinstance(self.dst, Address):
                raise OptionError("--low-disk is for merges from or to the Hub")
            return located(model)
        place, self._incoming = stream_base(
            as_given(address, revision), token=self.token, low_disk=self.low_disk, on_progress=on_progress
        )
        return place

    def check_free(self, base: Checkpoint, *, overwrite: bool = False) -> None:
        """Make sure, before adapters are read, that a folder may be put there; not where a merge is gone on with.

        Raises: DestinationExistsError
        """
        if isinstance(self.dst, Path):
            check_apart(base, self.dst)
            if self.unfinished() is None:
                check_free(self.dst, overwrite)

    def check(self, plan: MergePlan, *, overwrite: bool = False) -> bool:
        """Make sure that the result may be put there, and change nothing; whether the repository or folder exists.

        Raises: DestinationExistsError, HubError, OptionError
        """
        if isinstance(self.dst, Address):
            outgoing = self._outgoing(trial=True)
            outgoing.check(overwrite)
            return not outgoing.commit.created
        check_apart(plan.base, self.dst, plan.folders)
        check_free(self.dst, overwrite)
        return self.dst.exists()

    def run(self, plan: MergePlan, *, overwrite: bool = False, **options: Any) -> Merged:
        """Do what `run_merge` does, by this way; `options` are the other ones of `run_merge`.

        On the Hub nothing is visible before the one commit at the end.

        Raises: as `run_merge`; HubMovedError if the branch moves on meanwhile
        """
        outgoing = self._outgoing() if isinstance(self.dst, Address) else None
        is_local = not (self._incoming or outgoing)
        route = Route() if is_local else HubRoute(plan, self._incoming, outgoing, low_disk=self.low_disk)
        report = run_merge(plan, self._folder, overwrite=overwrite, route=route, **options)
        if outgoing is None:
            return Merged(report, str(report.path))
        done = outgoing.committed
        return Merged(report, str(self.dst), done.sha if done else outgoing.commit.parent, done.url if done else None)

    def unfinished(self) -> Path | None:
        """Where a run that was stopped kept what it finished; None where there is nothing to go on from."""
        folder = staging_folder(self._folder)
        return folder if folder.exists() else None

    @property
    def _folder(self) -> Path:
        return self.dst if isinstance(self.dst, Path) else work_folder(self.dst, self.work)

    def _outgoing(self, *, trial: bool = False) -> Outgoing:
        assert isinstance(self.dst, Address)
        commit = Commit.open(self.dst, token=self.token, private=self.private, trial=trial)
        return Outgoing(commit, token=self.token, low_disk=self.low_disk)


def stream_base(
    address: Address, *, token: str | None, low_disk: bool, on_progress: Progress | None
) -> tuple[Located, Incoming]:
    """A base model on the Hub without its weights, and what brings them.

    The folder holds what a model needs and nothing else, whatever the cache has of the repository.

    Raises: HubError and what stands below it; UnknownFormatError, UnsafeFileError
    """
    found = resolve(address, token=token)
    choice = choose(found, "model")
    hollow = fetch_headers(replace(found.address, revision=found.sha), "model", token=token)
    holder: Any = hollow.holder if hollow.here else Home()
    home = _above(hollow.path, choice.at) if hollow.here else holder.path
    folder = home / choice.folder
    awaited = {path: path.relative_to(home).as_posix() for path in hollow.here if path.parent == folder}
    whole = [name for name in choice.names if name not in awaited.values()]
    snapshot = download(found, whole, on_progress=on_progress)
    for name in whole:
        with explained(home):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).unlink(missing_ok=True)
            (home / name).symlink_to((snapshot / name).resolve())
    place = replace(located_at(found, choice), path=home / choice.at, holder=holder)
    return place, Incoming(found, choice.folder, awaited, low_disk=low_disk)


def _above(path: Path, at: str) -> Path:
    """The folder in which `at` leads to `path`."""
    return path.parents[len(Path(at).parts) - 1] if at else path


class HubRoute(Route):
    """The way of a merge with the Hub at one of its ends, or at both: one file after the other comes and goes."""

    at_once = 1

    def __init__(
        self, plan: MergePlan, incoming: Incoming | None, outgoing: Outgoing | None, *, low_disk: bool
    ) -> None:
        self.gradual = low_disk
        self._plan, self._incoming, self._outgoing = plan, incoming, outgoing
        self._staging: Staging | None = None

    def stamps(self, plan: MergePlan) -> list[list[Any]]:
        return self._incoming.stamps(plan.base, plan.copied) if self._incoming else super().stamps(plan)

    def hashes(self) -> dict[str, str]:
        return self._incoming.hashes() if self._incoming else {}

    def check(self, dst: Path, overwrite: bool) -> None:
        if self._outgoing:
            self._outgoing.check(overwrite)
        else:
            super().check(dst, overwrite)

    def begin(self, staging: Staging, done: Sequence[Layout], needed: Sequence[Path]) -> None:
        self._staging = staging
        if self._outgoing:
            self._outgoing.begin(staging, done)
        if self._incoming:
            self._incoming.begin(needed, staging.incoming)

    def ready(self, layout: Layout, needed: Sequence[Path], alone: Path | None) -> bool:
        if self._outgoing:
            self._outgoing.wait_for_room()
        if not self._incoming:
            return False
        self._incoming.wait(needed)
        assert self._staging is not None
        return alone is not None and self._incoming.give(alone, self._staging.part(layout))

    def place(self, path: Path) -> Path:
        return self._incoming.place(path) if self._incoming else path

    def spent(self, path: Path) -> None:
        if self._incoming:
            self._incoming.spent(path)

    def finished(self, layout: Layout) -> None:
        if self._outgoing:
            self._outgoing.add(layout)

    def halt(self) -> None:
        for way in (self._incoming, self._outgoing):
            if way:
                way.halt()

    def settle(self, tell: Callable[[], None]) -> None:
        if self._outgoing:
            self._outgoing.settle(tell)

    def published(self, staging: Staging, recipe: str) -> bool:
        if not self._outgoing:
            return super().published(staging, recipe)
        return staging.is_of(recipe) and self._outgoing.stands(staging)

    def publish(self, staging: Staging, names: Sequence[str]) -> None:
        if not self._outgoing:
            super().publish(staging, names)
            return
        card = merge_card(self._outgoing.commit, staging.result, token=self._outgoing.token)
        self._outgoing.publish(names, card, _title(self._plan))
        staging.remove()


def _title(plan: MergePlan) -> str:
    adapters = " and ".join(plan.recorded) if len(plan.recorded) < 3 else f"{len(plan.recorded)} adapters"
    return f"Merge {adapters} into {plan.base.name}"


def work_folder(dst: Address, work: Path | None = None) -> Path:
    """Where a merge to an address is made: the same folder in every run."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    assets = Path(os.path.expandvars(os.environ.get("HF_ASSETS_CACHE") or f"{home}/assets")).expanduser()
    place = f"{client.endpoint()} {dst.repo_id} {dst.revision or MAIN}"
    known = hashlib.sha256(place.encode()).hexdigest()[:8]
    return (work or assets / "adaptertools" / "merging") / f"{dst.repo_id.replace('/', '--')}-{known}"
