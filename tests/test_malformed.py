"""Every damaged or hostile file of `fixtures/malformed/<Error>/` raises the error that it is filed under."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adaptertools
from adaptertools import errors

FOLDER = Path(__file__).parents[1] / "fixtures" / "malformed"
CASES = sorted(case for error in FOLDER.iterdir() if error.is_dir() for case in error.iterdir())


def test_the_folder_names_are_errors_and_hold_something() -> None:
    assert CASES
    for folder in FOLDER.iterdir():
        if folder.is_dir():
            assert issubclass(getattr(errors, folder.name), errors.AdapterToolsError)
            assert any(folder.iterdir())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_a_malformed_adapter_raises_the_error_that_it_is_filed_under(case: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterToolsError) as raised:
        adaptertools.convert(case, tmp_path / "dst", to="peft")
    assert type(raised.value).__name__ == case.parent.name, raised.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_the_command_line_says_so_in_one_line_and_writes_nothing(
    case: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("convert", case, tmp_path / "dst", "--to", "peft")
    assert ran.code == 1, ran.err
    assert ran.out == ""
    assert ran.err.startswith("Error: ")
    assert ran.err.count("\n") == 1
    assert "unexpected" not in ran.err.split(":")[1]
    assert list(tmp_path.iterdir()) == []
