"""JSON documents: what is read is an object without doubt, and what is written reads back."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptertools.containers.jsonfile import format_json, parse_object, read_json
from adaptertools.errors import DamagedFileError, UnsafeFileError, UnsupportedFeatureError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_what_is_written_reads_back(document: dict[str, object]) -> None:
    text = format_json(document)
    assert text.endswith("\n")
    assert parse_object("x", text) == document
    assert parse_object("x", text.encode()) == document


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x: not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("null", "found NoneType"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate keys 'c'"),
        ('{"a": ' * 100_000, "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"\x80abc", "not valid JSON"),
    ],
)
def test_what_is_no_sound_object_is_damage(text: str | bytes, message: str) -> None:
    with pytest.raises(DamagedFileError, match=message):
        parse_object("x", text)


def test_a_document_larger_than_any_configuration_is_unsafe(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    with path.open("wb") as file:
        file.truncate(30_000_000)
    with pytest.raises(UnsafeFileError, match="more than any configuration needs"):
        read_json(path)


def test_numbers_that_json_does_not_know_are_not_written() -> None:
    with pytest.raises(UnsupportedFeatureError, match="one stands under b"):
        format_json({"a": 1, "b": {"c": [float("nan")]}})
