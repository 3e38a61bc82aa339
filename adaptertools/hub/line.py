"""Work that is done in order by threads of its own, beside what the caller does: files that come, files that go."""

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from adaptertools.merging.route import HaltedError

Item = TypeVar("Item", bound=Hashable)
Made = TypeVar("Made")


class Line(Generic[Item, Made]):
    """Items that wait in line for `work`, in order and as far as they are let through.

    Each of the threads takes as many as wait, `most` at most. The first failure ends it, and whoever waits is told.
    """

    def __init__(
        self, name: str, work: Callable[[Sequence[Item]], Sequence[Made]], *, most: int = 1, threads: int = 1
    ) -> None:
        self._name, self._work, self._most, self._threads = name, work, most, threads
        self._taken = 0
        self._items: list[Item] = []
        self._made: dict[Item, Made] = {}
        self._let_through = 0
        self._fault: BaseException | None = None
        self._halted = False
        self._changed = threading.Condition()

    def begin(self, items: Iterable[Item] = ()) -> None:
        """Start, with what is in line from the beginning."""
        self._items += items
        for _ in range(self._threads):
            threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def add(self, item: Item) -> None:
        """Put one more item into the line, and let all through."""
        with self._changed:
            self._items.append(item)
            self._let_through = len(self._items)
            self._changed.notify_all()

    def let_through(self, items: Iterable[Item], ahead: int = 0) -> None:
        """Let these items have their turn, those before them, and some of those after them."""
        with self._changed:
            upto = max((self._items.index(item) + 1 for item in items), default=0) + ahead
            self._let_through = max(self._let_through, min(upto, len(self._items)))
            self._changed.notify_all()

    def wait(self, items: Iterable[Item]) -> None:
        """Wait until these items are done.

        Raises: whatever the work raised; HaltedError after `halt`
        """
        wanted = list(items)
        self._wait(lambda: all(item in self._made for item in wanted))

    def wait_for_rest(self, most: int, seconds: float | None = None) -> bool:
        """Wait until no more than `most` items are left; whether that is so after so many seconds.

        Raises: whatever the work raised; HaltedError after `halt`
        """
        return self._wait(lambda: len(self._items) - len(self._made) <= most, seconds)

    def check(self) -> None:
        """Raises: whatever the work raised; HaltedError after `halt`"""
        self._wait(lambda: True)

    def result(self, item: Item) -> Made | None:
        """What came of an item; None if it is not done."""
        return self._made.get(item)

    def put(self, item: Item, made: Made) -> None:
        """Say what has become of an item since."""
        self._made[item] = made

    @property
    def halted(self) -> bool:
        """Whether nobody waits for more."""
        return self._halted

    def halt(self) -> None:
        """End it after the item that is being worked on, and wake whoever waits."""
        with self._changed:
            self._halted = True
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._fault or self._halted or ready(), seconds)
            if self._fault is not None:
                raise self._fault
            if self._halted:
                raise HaltedError
            return ready()

    def _run(self) -> None:
        while items := self._next():
            try:
                made = dict(zip(items, self._work(items), strict=True))
            except BaseException as error:
                with self._changed:
                    self._fault = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._made |= made
                self._changed.notify_all()

    def _next(self) -> list[Item]:
        """The next items, as soon as one is let through; none once it has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._halted or self._fault or self._taken < self._let_through)
            if self._halted or self._fault:
                return []
            first, self._taken = self._taken, min(self._let_through, self._taken + self._most)
            return self._items[first : self._taken]
