"""The command line: the group of commands, and the one place where errors become messages and exit codes.

A command is one file of this folder that defines `command`; its file name is its name. Files that begin with an
underscore, and `options.py`, are what commands share. Commands import the library when they run, so that `--help` and
shell completion never load torch.

Exit codes: 0 done, 1 failed, 2 usage, 130 Ctrl-C.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from adaptertools import __version__
from adaptertools.cli.options import names_in, wants_json
from adaptertools.errors import AdapterToolsError, OptionError


class Failed(click.ClickException):
    """What the user sees of an error: one line, and an exit code."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class BadOption(Failed):
    """An option whose value makes no sense here."""

    exit_code = 2


class Interrupted(Failed):
    """Ctrl-C."""

    exit_code = 130


class Commands(click.Group):
    """The commands of this folder, found by file name and imported one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in names_in(Path(__file__).parent) if name != "options"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own: usage errors, --help, and a reader that has gone
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None
        except Exception as error:
            if os.environ.get("ADAPTERTOOLS_DEBUG") == "1":
                traceback.print_exc()
            failure = explain(error)
            if wants_json(ctx):
                said = {"type": type(error).__name__, "message": failure.message, "exit_code": failure.exit_code}
                click.echo(json.dumps({"error": said}))
            raise failure from None


def explain(error: Exception) -> Failed:
    """The one line and the exit code for an error."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror
        if not isinstance(error, AdapterToolsError) and error.filename is not None:
            message = f"{os.fsdecode(error.filename)}: {message}"
    match error:
        case OptionError():
            return BadOption(message)
        case AdapterToolsError() | OSError():
            return Failed(message)
        case MemoryError():
            return Failed(f"not enough memory{': ' if message else ''}{message}")
        case _:
            what = f"unexpected {type(error).__name__}: {message}"
            return Failed(f"{what}. This is a fault of adaptertools; ADAPTERTOOLS_DEBUG=1 shows where")


def _one_line(message: str) -> str:
    """Names in a file may hold anything; what is shown keeps to one line of printable text."""
    joined = " ".join(line.strip() for line in message.splitlines() if line.strip())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in joined)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="adaptertools")
def group() -> None:
    """Convert, rescale and inspect LoRA adapters."""


def main() -> None:
    """The program: run the command that the arguments name, and exit with its code."""
    # Work here streams through memory, which one thread saturates. A second gains nothing on an idle machine, and on a
    # busy one every small operation waits for it: ten times slower, as measured.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        group(prog_name="adaptertools")
    except KeyboardInterrupt:  # outside any command
        sys.exit(Interrupted.exit_code)
