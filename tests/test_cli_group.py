"""The command line as a whole: help, exit codes, how errors look."""

import errno
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from adaptertools import cli, errors
from adaptertools.cli.options import FORMAT, names_in
from adaptertools.formats import names

COMMANDS = cli.group.list_commands(click.Context(cli.group))


def process(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program."""
    command = [sys.executable, "-m", "adaptertools", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_the_end_of_the_program_removes_what_something_still_holds() -> None:
    code = """
from adaptertools.cli import _leave
from adaptertools.hub.headers import Home
home = Home()
print(home.path, home.path.is_dir())
_leave(3)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    place, stood = ran.stdout.split()
    assert (ran.returncode, stood, ran.stderr) == (3, "True", "")
    assert not Path(place).exists()


def test_the_commands_are_the_files_of_the_folder() -> None:
    assert {"convert", "rescale", "inspect", "formats"} <= set(COMMANDS)
    assert not {"options", "-report", "report"} & set(COMMANDS)


def test_the_installed_program_shows_help_and_version() -> None:
    shown = process("--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in COMMANDS)
    assert process("--version").stdout.startswith("adaptertools, version ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_its_options(command: str, run: Callable[..., Any]) -> None:
    shown = run(command, "--help")
    assert shown.code == 0
    assert "--json" in shown.out
    assert "-q, --quiet" in shown.out
    loaded = cli.group.get_command(click.Context(cli.group), command)
    assert loaded is not None
    assert loaded.help
    for option in loaded.params:
        assert isinstance(option, click.Argument) or option.help, f"{command} {option.name} has no help"


def test_the_format_options_know_the_formats_without_loading_them() -> None:
    assert tuple(FORMAT.choices) == names()


def test_names_with_an_underscore_in_front_are_no_commands(tmp_path: Path) -> None:
    for name in ("_report.py", "two_words.py", "notes.txt"):
        (tmp_path / name).touch()
    assert names_in(tmp_path) == ["two-words"]


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("convert",),
        ("convert", "src", "dst"),
        ("convert", "src", "dst", "--to", "nonsense"),
        ("rescale", "src", "dst"),
        ("rescale", "src", "dst", "--alpha", "many"),
        ("rescale", "src", "dst", "--alpha", "8", "--keep", "nothing"),
        ("inspect",),
        ("inspect", "src", "--nonsense"),
        ("formats", "nonsense"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(args: tuple[str, ...], run: Callable[..., Any]) -> None:
    ran = run(*args)
    assert ran.code == 2
    assert ran.out == ""
    assert "Usage:" in ran.err


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (("convert", "src", "dst", "--to", "nonsense"), "BadParameter", "'nonsense' is not one of 'diffusers'"),
        (("convert", "src", "dst"), "MissingParameter", "Missing option '--to'. Choose from: diffusers, "),
        (("convert",), "MissingParameter", "Missing argument 'SRC'."),
        (("rescale", "src", "dst", "--alpha", "many"), "BadParameter", "'many' is not a valid float"),
        (("inspect", "src", "--nonsense"), "NoSuchOption", "No such option '--nonsense'"),
        (("nonsense",), "NoSuchCommand", "No such command 'nonsense'"),
        (("convrt",), "NoSuchCommand", "No such command 'convrt'. Did you mean 'convert'?"),
        (("--nonsense", "formats"), "NoSuchOption", "No such option '--nonsense'"),
    ],
    ids=str,
)
def test_with_json_wrong_usage_is_an_object_as_well(
    args: tuple[str, ...], kind: str, message: str, run: Callable[..., Any]
) -> None:
    ran = run(*args, "--json")
    assert ran.code == 2
    said = ran.json["error"]
    assert (said["type"], said["exit_code"]) == (kind, 2)
    assert message in said["message"]
    assert "\n" not in said["message"]
    assert "Usage:" in ran.err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_what_quiet_leaves(command: str, run: Callable[..., Any]) -> None:
    assert "Print nothing but errors and what --json asks for." in " ".join(run(command, "--help").out.split())


def test_quiet_prints_nothing_but_json(peft_folder: Path, run: Callable[..., Any]) -> None:
    for command in (("inspect", peft_folder), ("formats",)):
        assert run(*command, "-q").out == ""
        assert run(*command, "-q", "--json").json


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `adaptertools formats` raise."""

    def fail(error: BaseException) -> None:
        def names() -> tuple[str, ...]:
            raise error

        monkeypatch.setattr("adaptertools.formats.names", names)

    return fail


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.ShapeError("q_proj: ranks disagree"), 1, "q_proj: ranks disagree"),
        (errors.OptionError("--in x: no such option"), 2, "--in x: no such option"),
        (errors.DestinationError(28, "cannot write x: the disk is full"), 1, "cannot write x: the disk is full"),
        (PermissionError(13, "Permission denied", "weights.bin"), 1, "weights.bin: Permission denied"),
        (OSError("odd"), 1, "odd"),
        (MemoryError(), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (errors.ShapeError("two\nlines \x1b[31m and a colour"), 1, r"two lines \x1b[31m and a colour"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException, code: int, message: str, run: Callable[..., Any], failing: Callable[..., None]
) -> None:
    failing(error)
    ran = run("formats")
    assert ran.code == code
    assert ran.out == ""
    assert ran.err == f"Error: {message}\n"


def test_a_fault_of_our_own_is_called_one(run: Callable[..., Any], failing: Callable[..., None]) -> None:
    failing(ZeroDivisionError("division by zero"))
    ran = run("formats")
    assert ran.code == 1
    assert ran.err.startswith("Error: unexpected ZeroDivisionError: division by zero.")
    assert ran.err.count("\n") == 1


def test_the_traceback_is_shown_only_when_asked_for(run: Callable[..., Any], failing: Callable[..., None]) -> None:
    failing(errors.ShapeError("ranks disagree"))
    assert "Traceback" not in run("formats", ADAPTERTOOLS_DEBUG="0").err
    shown = run("formats", ADAPTERTOOLS_DEBUG="1")
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert shown.err.endswith("Error: ranks disagree\n")


def test_with_json_an_error_is_an_object_as_well(run: Callable[..., Any], failing: Callable[..., None]) -> None:
    failing(errors.ShapeError("ranks disagree"))
    ran = run("formats", "--json")
    assert ran.json == {"error": {"type": "ShapeError", "message": "ranks disagree", "exit_code": 1}}
    assert ran.err == "Error: ranks disagree\n"


def test_a_reader_that_goes_away_is_no_error_to_talk_about() -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "adaptertools", "formats", "peft"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout is not None
    program.stdout.close()
    assert program.stderr is not None
    assert program.stderr.read() == b""
    program.stderr.close()
    program.wait()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("command", ["convert", "formats"])
def test_a_full_stdout_is_one_line(command: str, flags: tuple[str, ...], peft_folder: Path, tmp_path: Path) -> None:
    words = ["formats"] if command == "formats" else ["convert", peft_folder, tmp_path / "new", "--to", "flax"]
    with open("/dev/full", "w") as full:
        program = [sys.executable, "-m", "adaptertools", *map(str, words), *flags]
        ran = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 1
    assert ran.stderr == f"Error: cannot write to standard output: {os.strerror(errno.ENOSPC)}\n"


def test_a_closed_stdout_is_no_fault() -> None:
    ran = subprocess.run(["sh", "-c", f"{sys.executable} -m adaptertools formats >&-"], stderr=subprocess.PIPE)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_a_reader_that_has_gone_is_no_fault() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "adaptertools", "formats"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == b""


_WAITS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
from adaptertools import containers
from adaptertools.cli import main

def wait(path):
    print("reading", flush=True)
    time.sleep(60)

containers.identify = wait
sys.argv[0] = "adaptertools"
main()
"""
"""The program, waiting inside the command, so that the signal surely arrives there."""


def test_ctrl_c_ends_the_program_with_130(tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    with subprocess.Popen(
        [sys.executable, "-c", _WAITS, "inspect", str(tmp_path / "x.bin")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"reading\n"
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    assert program.returncode == 130
    assert said == b"Error: interrupted\n"


_INTERRUPTED_EARLY = """
import sys

wanted, sys.argv[1] = sys.argv[1], "formats"

class Finder:
    def find_spec(self, name, *_):
        if name == wanted:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from adaptertools.cli import main
main()
"""
"""The program, with Ctrl-C arriving while it imports what its argument names."""


@pytest.mark.parametrize("module", ["click", "adaptertools.cli.options", "adaptertools.cli.formats", "torch"])
def test_ctrl_c_during_an_import_ends_the_program_with_130(module: str) -> None:
    ran = subprocess.run([sys.executable, "-c", _INTERRUPTED_EARLY, module], capture_output=True, text=True)
    assert ran.returncode == 130
    assert ran.stderr == "Error: interrupted\n"


@pytest.mark.slow
def test_the_help_takes_at_most_twice_as_long_as_importing_click() -> None:
    """In turns, so that both meet the same machine; the median of many."""
    commands = {
        "click": [sys.executable, "-c", "import click"],
        "help": [sys.executable, "-m", "adaptertools", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(40):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    assert statistics.median(seconds["help"]) <= 2 * statistics.median(seconds["click"])
