"""The group of commands, and the one place where errors become messages and exit codes."""

import importlib
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from adaptertools import __version__
from adaptertools.cli.options import names_in
from adaptertools.errors import AdapterToolsError, HubUnavailableError, OptionError, StoppedMergeError

_JSON = "adaptertools.json"
"""Where the context remembers whether `--json` is among the arguments."""


class Failed(click.ClickException):
    """What the user sees of an error: one line, and an exit code."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class BadOption(Failed):
    """An option whose value makes no sense here."""

    exit_code = 2


class Stopped(Failed):
    """Not done, and the same command resumes it."""

    exit_code = 3


class Interrupted(Failed):
    """Ctrl-C."""

    exit_code = 130


class NoSuchCommand(click.UsageError):
    """A word that is no command, with the one that may be meant, as click has it for options."""

    def __init__(self, word: str, known: Sequence[str], ctx: click.Context) -> None:
        from difflib import get_close_matches  # here, since few ever need it

        near = get_close_matches(word, known, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"No such command {word!r}.{meant}", ctx)


class Commands(click.Group):
    """The commands of this folder, found by file name and imported one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in names_in(Path(__file__).parent) if name != "options"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{__package__}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if not ctx.resilient_parsing and args[0] not in known and not args[0].startswith("-"):
            raise NoSuchCommand(args[0], known, ctx)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_JSON] = "--json" in args  # now, since a command that is used wrongly never gets to say it
        with _explained(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _explained(ctx):
            return super().invoke(ctx)


@contextmanager
def _explained(ctx: click.Context) -> Iterator[None]:
    """Errors within become what click shows and, with `--json`, an object on stdout."""
    try:
        yield
    except (click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise  # click's own: --help, and a reader that has gone
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("ADAPTERTOOLS_DEBUG") == "1":
            traceback.print_exc()
        failure = explain(error)
        if ctx.meta[_JSON]:
            message = _one_line(failure.format_message())
            said = {"type": type(error).__name__, "message": message, "exit_code": failure.exit_code}
            with suppress(OSError):  # stdout may be what failed; stderr says it in any case
                click.echo(json.dumps({"error": said}))
        raise failure from None


def explain(error: BaseException) -> click.ClickException:
    """The one line and the exit code for an error; wrong usage is click's to show."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror
        if not isinstance(error, AdapterToolsError) and error.filename is not None:
            message = f"{os.fsdecode(error.filename)}: {message}"
    match error:
        case click.ClickException():
            return error
        case KeyboardInterrupt():
            return Interrupted(message or "interrupted")
        case OptionError():
            return BadOption(message)
        case StoppedMergeError() | HubUnavailableError():
            return Stopped(message)
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
    """Convert, change, combine, merge and compare LoRA adapters, on this machine or on the Hugging Face Hub."""
