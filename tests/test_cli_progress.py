"""The progress bar: on stderr, only where somebody watches, only when work is long."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptertools.cli import _progress
from adaptertools.cli.options import Output

WATCHED = Output(as_json=False, quiet=False)


class Terminal(io.StringIO):
    """A stderr that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)


def work(output: Output, stderr: io.StringIO) -> bool:
    """Report some progress; whether anybody wanted it."""
    with contextlib.redirect_stderr(stderr), _progress.progress("convert", output) as advance:
        if advance is not None:
            advance(10_000_000, 40_000_000)
            advance(40_000_000, 40_000_000)
        return advance is not None


def test_long_work_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "_SECONDS_BEFORE_IT_SHOWS", 0)
    terminal = Terminal()
    assert work(WATCHED, terminal)
    assert "convert" in terminal.getvalue()


def test_short_work_shows_none() -> None:
    terminal = Terminal()
    assert work(WATCHED, terminal)
    assert "convert" not in terminal.getvalue()


@pytest.mark.parametrize("output", [Output(as_json=True, quiet=False), Output(as_json=False, quiet=True)])
def test_json_and_quiet_show_none(output: Output) -> None:
    assert not work(output, Terminal())


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes"])
def test_the_variable_of_the_hub_turns_it_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", value)
    assert not work(WATCHED, Terminal())


def test_where_stderr_is_no_terminal_there_is_none() -> None:
    assert not work(WATCHED, io.StringIO())


def test_a_conversion_reports_every_byte(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr("adaptertools.cli._progress.progress", lambda *_: Watcher(seen))
    ran = run("convert", peft_folder, tmp_path / "lora.pt", "--to", "loralib", "--json")
    total = ran.json["destination"]["nbytes"]
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


class Watcher:
    """Stands for the bar and notes what it is told."""

    def __init__(self, seen: list[tuple[int, int]]) -> None:
        self.seen = seen

    def __enter__(self) -> Callable[[int, int], None]:
        return lambda done, total: self.seen.append((done, total))

    def __exit__(self, *_: object) -> None:
        pass
