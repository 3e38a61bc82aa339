"""Addresses on the Hub: what is one, what it means, and what is a path on this machine."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptertools.errors import OptionError
from adaptertools.hub.address import Address, as_address, parse_address


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("org/name", Address("org/name")),
        ("org/name@v1.0", Address("org/name", "v1.0")),
        ("org/name@refs/pr/7", Address("org/name", "refs/pr/7")),
        ("org/name@feature/x", Address("org/name", "feature/x")),
        ("_org/name", Address("_org/name")),
        ("hf://org/name", Address("org/name")),
        ("hf://org/name/", Address("org/name")),
        ("hf://models/org/name@main", Address("org/name", "main")),
        ("hf://gpt2", Address("gpt2")),
        ("hf://org/name/sub/folder", Address("org/name", None, "sub/folder")),
        ("hf://org/name@v1/sub/folder/", Address("org/name", "v1", "sub/folder")),
        ("hf://org/name@refs/pr/7/sub", Address("org/name", "refs/pr/7", "sub")),
        ("hf://org/name@feature%2Fx/sub", Address("org/name", "feature/x", "sub")),
        ("https://huggingface.co/org/name", Address("org/name")),
        ("https://huggingface.co/org/name/", Address("org/name")),
        ("https://hf.co/org/name/tree/main", Address("org/name", "main")),
        ("https://huggingface.co/org/name/tree/main/sub/folder", Address("org/name", "main", "sub/folder")),
        ("https://huggingface.co/org/name/blob/v1/a%20b.pt?download=true", Address("org/name", "v1", "a b.pt")),
        ("https://huggingface.co/org/name/resolve/v1/lora.pt", Address("org/name", "v1", "lora.pt")),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F7/sub", Address("org/name", "refs/pr/7", "sub")),
        ("https://huggingface.co/org/name/tree/refs/pr/7/sub", Address("org/name", "refs/pr/7", "sub")),
        ("https://huggingface.co/org/name/tree/feature%2Fx/sub", Address("org/name", "feature/x", "sub")),
        (f"https://huggingface.co/org/name/commit/{'a' * 40}", Address("org/name", "a" * 40)),
    ],
)
def test_every_spelling_of_an_address_is_understood(text: str, meant: Address) -> None:
    assert parse_address(text) == meant
    assert parse_address(str(meant)) == meant


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://org/na me",
        "hf://org/name@",
        "hf://org/name@a..b",
        "hf://org/name@/x",
        "hf://org/name@main/../../etc",
        "hf://org/name/a//b",
        "hf://org/name/a\\b",
        "hf://org/na--me",
        "hf://org/name.git",
        "hf://org/.name",
        "hf://a/" + "b" * 100,
        "hf://datasets/org/name",
        "https://huggingface.co/datasets/org/name",
        "https://huggingface.co/org",
        "https://huggingface.co/org/name/discussions/1",
        "https://example.com/org/name",
        "https://[org/name",
        "org/name@-x",
        "org/name@a^b",
        "org/name@x.lock",
        "name",
        "a/b/c",
        "",
    ],
)
def test_what_is_no_address_is_refused_with_what_one_looks_like(text: str) -> None:
    with pytest.raises(OptionError, match="no address on the Hub: expected org/name"):
        parse_address(text)


def test_an_existing_path_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_address("org/name") == Address("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert as_address("org/name") is None
    assert as_address("hf://org/name") == Address("org/name")


def test_paths_stay_paths(tmp_path: Path) -> None:
    for path in ("adapter", "./org/name", "../org/name", "/org/name", "a/b/c", "", "a/b c", Path("org/name"), None):
        assert as_address(path) is None


def test_what_claims_to_be_an_address_and_is_none_is_no_path() -> None:
    with pytest.raises(OptionError):
        as_address("hf://nothing//here")


def test_the_host_of_the_endpoint_counts_as_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080/hf/")
    assert parse_address("http://mirror.example:8080/hf/org/name/tree/v1/sub") == Address("org/name", "v1", "sub")
    monkeypatch.setenv("HF_ENDPOINT", "")
    with pytest.raises(OptionError):
        parse_address("http://mirror.example:8080/hf/org/name")


def test_who_asks_and_the_query_of_a_web_address_are_not_repeated() -> None:
    with pytest.raises(OptionError) as refusal:
        parse_address("https://me:hf_secret@huggingface.co/org/name?token=hf_secret")
    assert "hf_secret" not in str(refusal.value)


names = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9._]{0,10}[A-Za-z0-9])?", fullmatch=True).filter(
    lambda name: ".." not in name and not name.endswith(".git")
)
places = st.lists(names.map(lambda name: f"{name}%2F "), max_size=3).map("/".join)


@given(names, names, st.none() | st.from_regex(r"[a-z0-9]{1,9}(?:/[a-z0-9%]{1,9}){0,2}", fullmatch=True), places)
def test_an_address_reads_back_as_it_is_written(one: str, other: str, revision: str | None, inside: str) -> None:
    if one in ("datasets", "spaces", "buckets", "kernels", "api", "docs", "papers", "collections", "blog", "settings"):
        return
    address = Address(f"{one}/{other}", revision, inside)
    assert parse_address(str(address)) == address


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for spelled in (text, f"hf://{text}", f"https://huggingface.co/{text}"):
        try:
            address = parse_address(spelled)
        except OptionError:
            continue
        assert ".." not in address.inside.split("/")
        assert parse_address(str(address)) == address


def test_a_path_in_a_folder_that_may_not_be_looked_into_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", stat)
    assert as_address("closed/model") is None
