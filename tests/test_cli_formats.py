"""`adaptertools formats`."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Literal

import pytest

from adaptertools import api, formats
from adaptertools.cli import _values
from adaptertools.errors import OptionError


def test_the_table_has_a_line_for_every_format(run: Callable[..., Any]) -> None:
    ran = run("formats")
    assert ran.code == 0
    table, carried = ran.out.split("\n\n")
    for part in (table, carried):
        assert [line.split()[0] for line in part.splitlines()] == ["FORMAT", *formats.names()]
    for name, line in zip(formats.names(), table.splitlines()[1:], strict=True):
        assert formats.get(name).SUMMARY in line
        assert all(container in line for container in formats.get(name).CONTAINERS)


@pytest.mark.parametrize("name", formats.names())
def test_one_format_shows_its_options_and_its_grammar(name: str, run: Callable[..., Any]) -> None:
    ran = run("formats", name)
    assert ran.code == 0
    for option in api.read_options(name):
        assert f"--in {option}=" in ran.out
    for option in api.write_options(name):
        assert f"--out {option}=" in ran.out
    grammar = inspect.getdoc(formats.get(name))
    assert grammar
    assert grammar in ran.out


@pytest.mark.parametrize("name", formats.names())
def test_one_format_explains_its_options(name: str, run: Callable[..., Any]) -> None:
    module = formats.get(name)
    texts = {"reading": inspect.getdoc(module.read), "writing": inspect.getdoc(module.write)}
    shown, document = run("formats", name).out, run("formats", name, "--json").json
    for key, text in texts.items():
        assert document[key] == (text or "")
        assert textwrap.indent(text or "", "  ") in shown


def test_the_options_of_maxtext_are_explained(run: Callable[..., Any]) -> None:
    shown = run("formats", "flax-qwix").out
    assert "`naming` is hf, " in shown
    assert "`arch=llama3.1` with" in shown


def test_json_lists_every_format(run: Callable[..., Any]) -> None:
    listed = run("formats", "--json").json["formats"]
    assert tuple(listed) == formats.names()
    assert listed["peft"]["containers"][0] == "safetensors"
    assert run("formats", "peft", "--json").json == listed["peft"]


def sample(
    *,
    count: int = 1,
    ratio: float = 0.5,
    flag: bool = False,
    name: str | None = None,
    size: int | str = 1,
    mode: Literal["full", "half"] = "full",
) -> None:
    """Stands for a reader with options of every type."""


KNOWN = api.option_types(sample, ())


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("count=3", "count", 3),
        ("ratio=2", "ratio", 2.0),
        ("flag=true", "flag", True),
        ("flag=No", "flag", False),
        ("name=abc", "name", "abc"),
        ("name=none", "name", None),
        ("name=a=b", "name", "a=b"),
        ("size=3", "size", 3),
        ("size=auto", "size", "auto"),
        ("mode=half", "mode", "half"),
    ],
)
def test_values_become_what_the_parameter_is_annotated_as(text: str, name: str, value: object) -> None:
    parsed = _values.parse_assignments("--in", "sample", [text], KNOWN)
    assert parsed == {name: value}
    assert type(parsed[name]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count=many", "expected int after the equals sign"),
        ("flag=perhaps", "expected bool"),
        ("mode=quarter", r"expected full\|half"),
        ("count", "expected --in count=int"),
        ("nonsense=1", r"count=int, ratio=float, flag=bool, name=text\|none, size=int\|text, mode=full\|half"),
    ],
)
def test_values_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        _values.parse_assignments("--in", "sample", [text], KNOWN)


@pytest.mark.parametrize("name", formats.names())
def test_the_default_of_every_option_fits_its_type(name: str) -> None:
    for known in (api.read_options(name), api.write_options(name)):
        for option, parameter in known.items():
            if parameter.default is not None:
                assert _values.parse_value(str(parameter.default), parameter.annotation) == parameter.default, option
