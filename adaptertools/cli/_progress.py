"""A progress bar on stderr, for work that takes long enough to want one."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adaptertools.cli.options import Output

_SECONDS_BEFORE_IT_SHOWS = 0.5


@contextmanager
def progress(label: str, output: Output, unit: str = "B") -> Iterator[Callable[[int, int], None] | None]:
    """A callback for `on_progress`; None where no bar is wanted: no terminal, `-q`, `--json`, or the Hub's variable."""
    switched_off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    if output.quiet or output.as_json or switched_off or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(
        desc=label, unit=unit, unit_scale=unit == "B", leave=False, delay=_SECONDS_BEFORE_IT_SHOWS, file=sys.stderr
    ) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
