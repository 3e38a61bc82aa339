"""The command line. This file holds the program's start alone; the group of commands stands in `_group.py`.

A command is one file of this folder that defines `command`; its file name is its name. Files that begin with an
underscore, and `options.py`, are what commands share. Commands import the library when they run, so that `--help` and
shell completion never load torch.

Exit codes: 0 done, 1 failed, 2 usage, 4 done and the answer is no (`diff`, `check`, `verify`), 130 Ctrl-C.
"""

import atexit
import gc
import os
import sys
from typing import Any, NoReturn


def main() -> NoReturn:
    """The program: run the command that the arguments name, and exit with its code."""
    # Work here streams through memory, which one thread saturates. A second gains nothing on an idle machine, and on a
    # busy one every small operation waits for it: ten times slower, as measured.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Torch brings a million objects that stay, and at the usual threshold Python looks through all of them again and
    # again: for a tenth of a second each time.
    gc.set_threshold(100_000)
    try:
        from adaptertools.cli._group import group  # here, since Ctrl-C may arrive while click is being imported

        group(prog_name="adaptertools")
    except SystemExit as end:
        _leave(end.code)
    except KeyboardInterrupt:  # outside any command
        print("Error: interrupted", file=sys.stderr)
        _leave(130)
    _leave(0)


def _leave(code: str | int | None) -> NoReturn:
    """End the process at once: Python takes longer to take apart what torch has loaded than many a command takes."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # it was closed before
                stream.flush()
    except (OSError, ValueError):
        sys.exit(code)  # Python says what it can
    if isinstance(code, str):
        sys.exit(code)
    atexit._run_exitfuncs()  # temporary folders that something still holds
    os._exit(code or 0)


def __getattr__(name: str) -> Any:
    """`adaptertools.cli.group`, loaded when asked for."""
    if name != "group":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from adaptertools.cli._group import group

    return group
