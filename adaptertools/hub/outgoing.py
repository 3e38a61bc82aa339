"""The result of a merge on its way to the Hub: each file is uploaded as soon as it is finished, and all become visible
in one commit.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from adaptertools.containers.jsonfile import read_json
from adaptertools.errors import DestinationExistsError, FileError
from adaptertools.hub.cache import cache_folder
from adaptertools.hub.card import NAME as CARD
from adaptertools.hub.client import connect, explained, retried
from adaptertools.hub.commit import Commit, Committed
from adaptertools.hub.line import Line
from adaptertools.hub.sent import Sent
from adaptertools.merging.destination_folder import WEIGHTS
from adaptertools.merging.record import NAME
from adaptertools.merging.resume import Staging
from adaptertools.merging.shards import Layout

_BETWEEN_REPORTS = 0.1
_MOST_AT_ONCE = 4
"""Files that are uploaded together; one where disk space is low."""
_MOST_WAITING = 1
"""Files that may be on their way, or wait for it, while the next one is made; where disk space is low."""


class Outgoing:
    """One commit in the making, and the files that go into it."""

    def __init__(self, commit: Commit, *, token: str | None, low_disk: bool) -> None:
        self.commit, self.low_disk = commit, low_disk
        self.committed: Committed | None = None
        self.token = token
        self._staging: Staging | None = None
        self._layouts: dict[str, Layout] = {}
        self._known: set[str] = set()
        self._line: Line[str, Sent] = Line("upload", self._send, most=1 if low_disk else _MOST_AT_ONCE)

    def check(self, overwrite: bool) -> None:
        """Make sure that no weights stand there but those of an earlier merge, and those only to be replaced.

        Raises: DestinationExistsError, HubError
        """
        address, weights = self.commit.address, [name for name in self.commit.files if name.endswith(WEIGHTS)]
        if not weights:
            return
        if NAME not in self.commit.files:
            raise DestinationExistsError(
                f"{address} holds {weights[0]} and no {NAME}, so it is not replaced: give another repository"
            )
        foreign = sorted(set(weights) - set(self._written()))
        if foreign:
            raise DestinationExistsError(
                f"{address} holds {foreign[0]}, which the merge there did not write, so it is not replaced: give "
                "another repository"
            )
        if not overwrite:
            raise DestinationExistsError(f"{address} holds {weights[0]}. --overwrite replaces an earlier merge")

    def begin(self, staging: Staging, done: Iterable[Layout]) -> None:
        """Go on from what earlier runs finished: what they uploaded is not sent again."""
        self._staging = staging
        rest = []
        for layout in done:
            self._layouts[layout.name] = layout
            sent = staging.sent(layout)
            if sent is None:
                rest.append(layout.name)
            else:
                self.commit.resume(Sent.from_json(sent))
                self._known.add(layout.name)
                self._tidy(layout)
        self._line.begin(rest)
        self._line.let_through(rest)

    def add(self, layout: Layout) -> None:
        """Upload a finished file when its turn comes."""
        self._layouts[layout.name] = layout
        self._line.add(layout.name)

    def wait_for_room(self) -> None:
        """Wait until the next file may be made: at once where all of them have room.

        Raises: HubError, HaltedError
        """
        if self.low_disk:
            self._line.wait_for_rest(_MOST_WAITING)
        else:
            self._line.check()

    def settle(self, tell: Callable[[], None]) -> None:
        """Wait until all files are uploaded.

        Raises: HubError, HaltedError
        """
        while not self._line.wait_for_rest(0, _BETWEEN_REPORTS):
            tell()

    def halt(self) -> None:
        """Upload no more."""
        self._line.halt()

    def stands(self, staging: Staging) -> bool:
        """Whether an earlier run got as far as its commit: the record of this very merge stands on the Hub."""
        standing = self.commit.files.get(NAME)
        return standing is not None and staging.announced.is_file() and standing.is_same(staging.announced)

    def publish(self, names: Sequence[str], card: str, title: str) -> None:
        """Commit, once: the uploaded files, the small ones beside them, and the card. Of an older merge the rest goes.

        Raises: HubMovedError, HubError
        """
        result = self._result
        contents: dict[str, Path | bytes] = {name: result / name for name in names if name not in self._known}
        self.commit.add_all({CARD: card.encode(), **contents})
        for name in self._written():
            if name not in (*names, CARD):
                self.commit.delete(name)
        assert self._staging is not None
        self._staging.announce(NAME)
        self.committed = self.commit.finish(title)

    @property
    def _result(self) -> Path:
        assert self._staging is not None
        return self._staging.result

    def _send(self, names: Sequence[str]) -> list[Sent]:
        assert self._staging is not None
        found = self.commit.add_all({name: self._result / name for name in names})
        for name, sent in zip(names, found, strict=True):
            self._known.add(name)
            if sent.uploaded:
                self._staging.note_sent(self._layouts[name], sent.to_json())
                self._tidy(self._layouts[name])
        return found

    def _tidy(self, layout: Layout) -> None:
        """What the Hub has need not be here where disk space is low."""
        if self.low_disk:
            with suppress(OSError):
                (self._result / layout.name).unlink(missing_ok=True)

    def _written(self) -> list[str]:
        """The files of the merge that stands there, as its record names them."""
        if NAME not in self.commit.files or self.commit.parent is None:
            return []
        address = self.commit.address
        api = connect(self.token)
        name = f"{address.inside}/{NAME}" if address.inside else NAME
        with explained(address, token=self.token):
            path = retried(
                lambda: api.hf_hub_download(
                    address.repo_id, name, revision=self.commit.parent, cache_dir=cache_folder()
                )
            )
        try:
            files = read_json(Path(path)).get("files")
        except FileError:
            return []
        return [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
