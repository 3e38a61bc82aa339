"""README holds what it shows: its transcripts, its Python, its table of formats, its two set-up commands."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptertools import formats

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def transcript() -> Iterator[tuple[str, str]]:
    """Every command of the console blocks with the output shown for it, in order."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """An empty folder to work in, with the fixtures that README reads."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    return tmp_path


def run(command: str, folder: Path) -> str:
    """What a command line prints; `adaptertools` is the one under test, whatever stands on the PATH."""
    words = shlex.split(command)
    assert words[0] == "adaptertools", f"README shows another program: {command}"
    program = [sys.executable, "-m", "adaptertools", *words[1:]]
    ran = subprocess.run(program, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    shown = ran.stdout
    return shown + f"[exit code {ran.returncode}]\n" if ran.returncode else shown


def test_the_transcripts_are_what_the_commands_print(desk: Path) -> None:
    steps = list(transcript())
    assert {"convert", "rescale", "inspect", "formats"} <= {shlex.split(command)[1] for command, _ in steps}
    for command, shown in steps:
        assert run(command, desk) == shown, command


def test_the_python_runs(desk: Path) -> None:
    code = "\n".join(blocks("python"))
    assert "adaptertools.read(" in code
    for command, _ in transcript():
        run(command, desk)
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=desk, check=True, capture_output=True)


def test_the_first_set_up_command_does_the_main_job(desk: Path) -> None:
    steps = [step.strip().removeprefix(".venv/bin/") for step in blocks("sh")[0].replace("\\\n", "").split("&&")]
    assert steps[0] == "python3 -m venv .venv"
    assert steps[1].startswith("pip install")
    job = steps[2:]
    assert [shlex.split(step)[1] for step in job] == ["convert", "rescale", "inspect"]
    for step in job:
        assert "[exit code" not in run(step, desk), step
    assert "alpha        32" in run(job[-1], desk)


def test_the_second_set_up_command_installs_with_test_and_runs_the_tests() -> None:
    command = blocks("sh")[1]
    assert '".[test]"' in command
    assert "tests/constraints.txt" in command
    assert "pytest" in command


def test_the_table_of_formats_says_what_the_code_says() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| ([^|]*) \| ([^|]*) \|", README, flags=re.MULTILINE)
    table = {name: (containers.strip(), carries.strip()) for name, containers, carries in rows}
    assert set(table) == set(formats.names())
    for name, (containers, carries) in table.items():
        module = formats.get(name)
        assert tuple(containers.split(", ")) == module.CONTAINERS, name
        assert set(carries.split(", ")) - {"–"} == {str(feature) for feature in module.CARRIES}, name


def test_every_command_and_option_is_mentioned() -> None:
    for name in (*formats.names(), "--json", "--from", "--source-alpha", "--slots", "--base", "--allow-nonfinite"):
        assert name in README
