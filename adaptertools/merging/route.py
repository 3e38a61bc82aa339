"""Where the files of a merge come from and where they go, as far as the engine must know.

On one machine all files are here from the start, and the result stays. From and to elsewhere, a file of the base may be
on its way until the engine begins with what is made of it, and one of the result may go as soon as it is finished.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptertools.merging.destination_folder import check_free, replaced_files
from adaptertools.merging.plan import MergePlan
from adaptertools.merging.record import stamps
from adaptertools.merging.resume import Staging
from adaptertools.merging.shards import Layout


class HaltedError(Exception):
    """Says to a worker that waits for a file that another one failed: it never leaves the engine."""


class Route:
    """From a folder on this machine to a folder on this machine. What brings or sends files does more than this one.

    `gradual` says that room for the files of the result is taken one by one, when their turn comes. `at_once` files are
    in the making together: systems let one writer at a time into a file, but a run that is killed loses all of them.
    """

    gradual = False
    at_once = 4

    def stamps(self, plan: MergePlan) -> list[list[Any]]:
        """What the base's files are known by from one run to the next.

        Raises: SourceNotFoundError
        """
        return stamps(plan)

    def hashes(self) -> Mapping[str, str]:
        """The SHA-256 of files of the base, by name, where they are known without reading them."""
        return {}

    def check(self, dst: Path, overwrite: bool) -> None:
        """Make sure that nothing that has to stay stands where the result goes.

        Raises: DestinationExistsError
        """
        check_free(dst, overwrite)

    def begin(self, staging: Staging, done: Sequence[Layout], needed: Sequence[Path]) -> None:
        """Called before anything is made.

        `done` are the files of the result that earlier runs finished, `needed` those of the base that the rest is made
        of, in the order in which it is.

        Raises: HubError, DestinationError
        """

    def ready(self, layout: Layout, needed: Sequence[Path], alone: Path | None) -> bool:
        """Wait until a file of the result can be begun with.

        `alone` is the file of the base that nothing else is made of, and that differs from the result in the bytes of
        edited tensors alone. True says that it was put in the place of the file in the making, to be changed there.

        Raises: HubError; HaltedError after `halt`
        """
        return False

    def place(self, path: Path) -> Path:
        """Where the bytes of a file of the base are to be read."""
        return path

    def spent(self, path: Path) -> None:
        """Nothing more is made of this file of the base."""

    def finished(self, layout: Layout) -> None:
        """A file of the result is made, and recorded."""

    def halt(self) -> None:
        """Wake whoever waits: no more is made. Called at the end of every run, and by any thread."""

    def settle(self, tell: Callable[[], None]) -> None:
        """Wait until all files are where they go, and call `tell` now and then.

        Raises: HubError
        """

    def published(self, staging: Staging, recipe: str) -> bool:
        """Whether an earlier run got as far as publishing."""
        return staging.published(recipe)

    def publish(self, staging: Staging, names: Sequence[str]) -> None:
        """Make the result visible in one step: the files of these names, which stand in the staging folder's result.

        Raises: DestinationError, HubError
        """
        staging.publish(replaced_files(staging.dst))
