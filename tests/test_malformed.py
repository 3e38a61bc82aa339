"""Every damaged or hostile file of `fixtures/malformed/<Error>/` raises the error that it is filed under."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adaptertools
from adaptertools import errors

FOLDER = Path(__file__).parents[1] / "fixtures" / "malformed"
CASES = sorted(case for error in FOLDER.iterdir() if error.is_dir() for case in error.iterdir())


IDS = [f"{case.parent.name}/{case.name}" for case in CASES]


def leaves(base: type[Exception]) -> set[str]:
    """The names of the errors at the tips of the tree."""
    return set().union(*map(leaves, base.__subclasses__())) if base.__subclasses__() else {base.__name__}


def convert(case: Path, dst: Path) -> None:
    """Convert with no option but alpha, which is given where it is asked for and its absence is not what is tested."""
    try:
        adaptertools.convert(case, dst, to="peft")
    except errors.MissingAlphaError:
        if case.parent.name == "MissingAlphaError":
            raise
        adaptertools.convert(case, dst, to="peft", read_options={"alpha": 16})


def test_every_error_about_content_has_a_malformed_case() -> None:
    filed = {folder.name for folder in FOLDER.iterdir() if any(folder.iterdir())}
    wanted = leaves(errors.FileError) | leaves(errors.FormatError) | leaves(errors.AdapterError)
    assert wanted <= filed
    assert all(issubclass(getattr(errors, name), errors.AdapterToolsError) for name in filed)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_malformed_adapter_raises_the_error_that_it_is_filed_under(case: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterToolsError) as raised:
        convert(case, tmp_path / "dst")
    assert type(raised.value).__name__ == case.parent.name, raised.value
    assert str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_command_line_says_so_in_one_line_and_writes_nothing(
    case: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("convert", case, tmp_path / "dst", "--to", "peft")
    assert ran.code == 1, ran.err
    assert ran.out == ""
    assert ran.err.startswith("Error: ")
    assert not ran.err.startswith("Error: unexpected")
    assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
