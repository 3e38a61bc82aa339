"""README holds what it shows: its transcripts, its Python, its table of formats, its two set-up commands."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hub_fixtures import hub  # noqa: F401
from hub_server import HubServer

from adaptertools import formats
from adaptertools.cli import group

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


ON_THE_HUB = {"my-org/llama-tiny": "base/llama_tiny", "my-org/llama-lora": "base/llama_tiny_lora"}
"""The repositories that README reads, and the fixtures that are in them."""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> Path:  # noqa: F811
    """An empty folder to work in, with the fixtures that README reads, and a Hub."""
    for repository, folder in ON_THE_HUB.items():
        hub.create_repo(repository, {path.name: path.read_bytes() for path in (ROOT / "fixtures" / folder).iterdir()})
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> str:
    """What a command line prints, on stdout and stderr, and its exit code where it is not 0."""
    words = shlex.split(command)
    assert words[0] == "adaptertools", f"README shows another program: {command}"
    ran = CliRunner().invoke(group, words[1:], prog_name="adaptertools")
    output = ran.output.replace(os.environ["HF_ENDPOINT"], "https://huggingface.co")
    return output + (f"[exit code {ran.exit_code}]\n" if ran.exit_code else "")


def without_commits(text: str) -> str:
    """A commit's name depends on all that is in it, and a card names the address of the Hub."""
    return re.sub(r"\b[0-9a-f]{40}\b|(?<=@)[0-9a-f]{12}\b", "COMMIT", text)


def test_the_transcripts_are_what_the_commands_print(desk: Path) -> None:
    steps = list(transcript())
    assert {"convert", "rescale", "inspect", "formats"} <= {shlex.split(command)[1] for command, _ in steps}
    for command, shown in steps:
        assert without_commits(run(command)) == without_commits(shown), command


def test_the_python_runs(desk: Path) -> None:
    code = "\n".join(blocks("python"))
    assert "adaptertools.read(" in code
    for command, _ in transcript():
        run(command)
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=desk, check=True, capture_output=True)


def test_the_first_set_up_command_does_the_main_job(desk: Path) -> None:
    make, install, *job = [step.strip() for step in blocks("sh")[0].replace("\\\n", "").split("&&")]
    assert make == "python3 -m venv .venv"
    assert install == ".venv/bin/pip install -q -c tests/constraints.txt -e ."
    assert [shlex.split(step)[1] for step in job] == ["convert", "rescale", "inspect"]
    program = Path(".venv/bin/adaptertools")
    program.parent.mkdir(parents=True)
    program.symlink_to(Path(sys.executable).with_name("adaptertools"))
    ran = subprocess.run(" && ".join(job), shell=True, cwd=desk, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "alpha        32" in ran.stdout


def test_the_second_set_up_command_installs_with_test_and_runs_the_tests() -> None:
    command = blocks("sh")[1]
    assert '".[test]"' in command
    assert "tests/constraints.txt" in command
    assert "pytest" in command


def table_of_formats() -> dict[str, dict[str, str]]:
    """The cells of each format's row, under the first word of their column's title."""
    section = re.search(r"^## Formats$(.*?)^## ", README, flags=re.MULTILINE | re.DOTALL)
    assert section
    header, _, *rows = re.findall(r"^\| (.*) \|$|^\|(-+)", section[1], flags=re.MULTILINE)
    titles = [title.split()[0] for title in header[0].split(" | ")]
    cells = [dict(zip(titles, row[0].split(" | "), strict=True)) for row in rows]
    return {row["format"].strip("`"): row for row in cells}


def test_the_table_of_formats_says_what_the_code_says() -> None:
    table = table_of_formats()
    assert tuple(table) == formats.names()
    for name, row in table.items():
        module = formats.get(name)
        assert row["read"] == "yes", name
        assert row["written"] == (", ".join(module.CONTAINERS) or "–"), name
        assert set(row["carries"].split(", ")) - {"–"} == {str(feature) for feature in module.CARRIES}, name


def with_its_neighbours(test: Path) -> str:
    """The text of a test file, and of those beside it that it imports."""
    text = test.read_text()
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, flags=re.MULTILINE))
    return "\n".join([text, *(path.read_text() for path in test.parent.glob("*.py") if path.stem in imported)])


IMPORTED = {"google-tunix": "tunix", "llama-cpp-python": "llama_cpp", "lycoris-lora": "lycoris"}
"""Packages that are imported under another name than their own."""


@pytest.mark.parametrize("name", formats.names())
def test_what_proves_a_format_is_run_by_a_test_at_the_version_that_readme_names(name: str) -> None:
    lines = (ROOT / "tests" / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    proof = table_of_formats()[name]["proved"]
    programs = re.findall(r"([a-z][\w-]*) (\d+\.[\w.]+)", proof)
    tests = [with_its_neighbours(ROOT / "tests" / file) for file in re.findall(r"`(\w+\.py)`", proof)]
    assert tests
    assert programs or proof.startswith("no program")
    for program, version in programs:
        assert pins[program] == version
        package = IMPORTED.get(program, program.replace("-", "_"))
        assert any(re.search(rf"\b{package}\b", test) for test in tests), program


def test_every_command_and_option_is_mentioned() -> None:
    for name in (*formats.names(), "--json", "--from", "--source-alpha", "--slots", "--base", "--allow-nonfinite"):
        assert name in README


def test_alpha_stands_where_readme_says() -> None:
    takes_alpha = {
        name
        for name in group.list_commands(click.Context(group))
        if (command := group.get_command(click.Context(group), name))
        for option in command.params
        if option.name == "source_alpha" and "--alpha" in option.opts
    }
    assert takes_alpha == {"convert"}
    assert "`convert` alone also takes it as `--alpha`" in README


@pytest.mark.parametrize("extra", ["orbax", "gguf", "consumers"])
def test_the_extras_of_readme_are_those_of_the_project(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
    assert re.search(rf'pip install -c tests/constraints.txt -e "\.\[[\w,]*\b{extra}\b[\w,]*\]"', README)
