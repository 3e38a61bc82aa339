"""The model card: what it says of the files, and that it leaves alone what somebody wrote."""

import json
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer

import adaptertools
from adaptertools import api
from adaptertools.adapter import Adapter, Base, HistoryEntry
from adaptertools.errors import DamagedFileError, UnsafeFileError
from adaptertools.hub.card import CardFacts, carried, has_prose, one_line, read_card, same_prose, write_card
from adaptertools.hub.provenance import adapter_facts, merge_facts, sources_of

pytestmark = pytest.mark.usefixtures("impatient")
SHA, OTHER = "a" * 40, "b" * 40
FACTS = CardFacts(
    title="new",
    relation="adapter",
    base_models=("org/base",),
    library="peft",
    tags=("lora", "adaptertools"),
    steps=("`rescale` of `old`",),
)
PROSE = """---
# chosen with care
language: en  # not yet the others
license: mit
tags:
- chat
model-index:
- name: x
  results: []
---

# My adapter

It is **very** good.
"""


def metadata(text: str) -> dict:
    return dict(read_card(text).data)


def readme(hub: HubServer, name: str, rev: str = "main") -> str:
    return hub.files(name, rev)["README.md"].decode()


def test_a_new_card_says_what_the_files_are() -> None:
    card = write_card(None, FACTS)
    assert metadata(card) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "adaptertools"],
    }
    assert "# new" in card
    assert "1. `rescale` of `old`" in card
    assert "`org/base`" in card


def test_prose_and_everything_else_in_the_metadata_stay_as_they_were_written() -> None:
    card = write_card(PROSE, FACTS)
    for line in PROSE.splitlines():
        assert line in card.splitlines()
    assert metadata(card) == {
        **metadata(PROSE),
        "tags": ["chat", "lora", "adaptertools"],
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
    }


def test_writing_a_card_again_changes_nothing() -> None:
    for existing in (None, PROSE, "just words", "---\na: {b: c}\n---\n"):
        once = write_card(existing, FACTS)
        assert write_card(once, FACTS) == once


def test_only_the_marked_section_is_replaced() -> None:
    old = write_card(PROSE, FACTS) + "\nWords after it.\n"
    new = write_card(old, CardFacts(title="new", relation="adapter", steps=("`truncate` of `other`",)))
    assert "`rescale`" not in new
    assert new.count("How these files were made") == 1
    assert "1. `truncate` of `other`" in new
    assert new.endswith("\nWords after it.\n")
    assert "It is **very** good." in new
    gone = write_card(old, CardFacts(title="new", relation="adapter"))
    assert "How these files were made" not in gone
    assert gone.endswith("\nWords after it.\n")


def test_a_section_whose_end_was_deleted_swallows_no_words() -> None:
    card = write_card(None, FACTS)
    begin = card[card.index("<!--") : card.index("-->") + 3]
    broken = f"Before.\n\n{begin}\n\nMine now.\n"
    twice = write_card(write_card(broken, FACTS), FACTS)
    assert "Before." in twice
    assert "Mine now." in twice


def test_norwegian_is_no_boolean() -> None:
    assert metadata("---\nlanguage: no\n---\n") == {"language": "no"}
    assert metadata("---\ngated: false\nx: on\n---\n") == {"gated": False, "x": "on"}
    card = write_card(None, CardFacts(title="t", relation="adapter", carried={"language": "no"}))
    assert yaml.safe_load(card.split("---")[1])["language"] == "no"


def test_lines_of_windows_stay_those_of_windows() -> None:
    card = write_card(PROSE.replace("\n", "\r\n"), FACTS)
    assert card.count("\n") == card.count("\r\n")
    assert metadata(card)["base_model"] == "org/base"
    assert write_card(card, FACTS) == card


def test_metadata_that_is_not_yaml_is_said_with_its_line_and_nothing_is_overwritten() -> None:
    with pytest.raises(DamagedFileError, match="line 3"):
        write_card("---\na: b\nc: [\n---\nwords", FACTS)
    with pytest.raises(DamagedFileError, match="no list of names"):
        write_card("---\n- a\n---\nwords", FACTS)
    with pytest.raises(DamagedFileError, match="not YAML"):
        write_card("---\na: " + "[" * 5000 + "\n---\n", FACTS)


def test_a_rule_in_markdown_is_no_metadata() -> None:
    card = write_card("Words\n\n---\n\nmore: words\n\n---\n", FACTS)
    assert metadata(card)["base_model"] == "org/base"
    assert "Words\n\n---\n\nmore: words\n\n---\n" in card


def test_what_the_card_says_itself_counts_before_what_is_carried_over() -> None:
    facts = CardFacts(
        title="t",
        relation="adapter",
        carried={"license": "other", "license_name": "x", "license_link": "y", "datasets": ["org/data"]},
    )
    assert metadata(write_card("---\nlicense: mit\n---\n", facts)) == {"license": "mit", "datasets": ["org/data"]}
    assert metadata(write_card("---\nlicense_name: z\n---\n", facts)) == {"license_name": "z", "datasets": ["org/data"]}
    assert metadata(write_card(None, facts)) == facts.carried


def test_a_licence_is_carried_over_with_its_own_name_and_link() -> None:
    cards = [
        {"language": ["en", "de"], "license_name": "lost"},
        {"license": "other", "license_name": "llama3", "license_link": "https://x", "language": "fr"},
        {"license": "mit", "datasets": "org/data", "license_link": "https://y"},
    ]
    assert carried(cards) == {
        "license": "other",
        "license_name": "llama3",
        "license_link": "https://x",
        "language": ["en", "de"],
        "datasets": "org/data",
    }
    assert carried([{"license": {"evil": 1}, "language": [1], "datasets": ""}]) == {}


def test_an_adapter_of_another_format_is_not_said_to_be_loaded_by_peft() -> None:
    flax = CardFacts(title="t", relation="adapter", tags=("lora",))
    assert metadata(write_card("---\nlibrary_name: peft\n---\n", flax)) == {"tags": ["lora"]}
    assert metadata(write_card("---\nlibrary_name: keras\n---\n", flax))["library_name"] == "keras"


def test_several_bases_are_a_list_and_none_leaves_the_relation_out() -> None:
    two = write_card(None, CardFacts(title="t", relation="merge", base_models=("org/a", "org/b")))
    assert metadata(two) == {"base_model": ["org/a", "org/b"], "base_model_relation": "merge"}
    assert "base_model_relation" not in metadata(write_card(None, CardFacts(title="t", relation="merge")))
    kept = write_card("---\nbase_model: org/mine\n---\n", CardFacts(title="t", relation="adapter"))
    assert metadata(kept) == {"base_model": "org/mine", "base_model_relation": "adapter"}


def test_names_from_files_cannot_write_into_the_card(plain: Adapter) -> None:
    evil = "x`\n<!-- adaptertools: end -->\n# Owned <script>"
    entry = HistoryEntry(operation=evil, source=evil, details={evil: evil, "list": [evil], "deep": {"a": evil}})
    facts = adapter_facts(plain.then(entry), "peft", evil)
    card = write_card(None, facts)
    assert card.count("<!--") == 2
    assert "<script>" not in card
    assert not [line for line in card.splitlines() if line.startswith("# Owned")]
    assert write_card(card, facts) == card
    assert "\n" not in one_line("a\nb\u2028c\x00")


def test_the_operations_stand_in_order_with_sources_settings_and_errors(plain: Adapter, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    sources = [
        {"source": f"org/one@{SHA}", "weight": 1.0, "history": [{"operation": "rescale", "alpha": 8, "source": "s"}]},
        {"source": "two", "weight": -0.5},
    ]
    made = plain.then(HistoryEntry(operation="stack", details={"sources": sources, "method": "sum", "exact": False}))
    made = made.then(HistoryEntry(operation="truncate", source="stacked", details={"relative_error": 2.5e-8}))
    steps = adapter_facts(made, "peft", "t").steps
    assert steps == (
        "`rescale` of `s`: alpha 8",
        f"`stack` of 1 × [`org/one@{SHA}`](https://hub.example/org/one/tree/{SHA}) + -0.5 × `two`: method `sum`, "
        "not exact",
        "`truncate` of `stacked`: relative error 2.5e-08",
    )


def test_a_merge_names_its_parts_and_figures() -> None:
    record = {
        "base": {"name": f"org/base@{SHA}"},
        "adapters": [{"name": f"org/lora@{OTHER}", "weight": 0.5}, {"name": "local", "weight": 1.0}],
        "total": {"relative_delta": 0.25, "rounding_error": 2e-6, "unchanged": 0.5, "elements": 3},
        "device": "cpu",
    }
    facts = merge_facts(record, {"model_type": "llama"}, "t")
    assert facts.base_models == ("org/base", "org/lora")
    assert facts.library == "transformers"
    assert facts.relation == "merge"
    (step,) = facts.steps
    for said in (f"org/base@{SHA}", f"0.5 × [`org/lora@{OTHER}`]", "1 × `local`", "on cpu", "0.25", "2.0e-06", "0.5"):
        assert said in step
    assert merge_facts(None, {}, "t") == CardFacts(title="t", relation=None)
    assert merge_facts({"base": 1, "adapters": {}, "total": []}, {}, "t").base_models == ()


def test_sources_are_told_from_other_names() -> None:
    found = sources_of([f"org/a@{SHA}/sub", "local", f"org/a@{SHA}", "org/b@main", f"org/b@{OTHER}"])
    assert [str(address) for address in found] == [f"hf://org/a@{SHA}", f"hf://org/b@{OTHER}"]


def test_prose_is_more_than_headings_and_what_is_written_here() -> None:
    assert not has_prose(write_card(None, FACTS))
    assert has_prose(PROSE)
    assert same_prose(PROSE, write_card(PROSE, FACTS))
    assert not same_prose(PROSE, PROSE + "More.")


def test_the_prose_that_stands_on_the_hub_is_kept(hub: HubServer, peft_folder: Path) -> None:
    hub.create_repo("me/new", {"README.md": PROSE.encode()})
    api.push(peft_folder, "me/new")
    card = readme(hub, "me/new")
    assert "It is **very** good." in card
    assert metadata(card)["base_model"] == "tiny/llama"
    assert metadata(card)["license"] == "mit"
    (peft_folder / "README.md").write_text("# Other\n\nOther words.\n")
    report = api.push(peft_folder, "me/new")
    assert readme(hub, "me/new") == card
    assert any("is kept" in note for note in report.notes)
    assert not report.changed


def test_a_card_of_windows_lines_is_not_sent_again(hub: HubServer, peft_folder: Path) -> None:
    hub.create_repo("me/new", {"README.md": PROSE.replace("\n", "\r\n").encode()})
    api.push(peft_folder, "me/new")
    card = hub.files("me/new")["README.md"]
    assert card.count(b"\n") == card.count(b"\r\n")
    assert not api.push(peft_folder, "me/new").changed


def test_a_card_that_is_no_text_is_not_overwritten(hub: HubServer, peft_folder: Path) -> None:
    head = hub.create_repo("me/new", {"README.md": b"\xff\xfe words"})
    with pytest.raises(DamagedFileError, match="UTF-8"):
        api.push(peft_folder, "me/new")
    assert hub.head("me/new") == head


def test_the_card_beside_the_files_goes_where_none_stands(hub: HubServer, peft_folder: Path) -> None:
    (peft_folder / "README.md").write_text(PROSE)
    api.push(peft_folder, "me/new")
    assert "It is **very** good." in readme(hub, "me/new")
    assert (peft_folder / "README.md").read_text() == PROSE


def test_the_card_beside_the_files_replaces_one_that_nobody_wrote_in(hub: HubServer, peft_folder: Path) -> None:
    api.push(peft_folder, "me/new")
    (peft_folder / "README.md").write_text(PROSE)
    api.push(peft_folder, "me/new")
    assert "It is **very** good." in readme(hub, "me/new")


def test_licence_languages_and_datasets_come_from_the_source_on_the_hub(
    hub: HubServer, peft_folder: Path, tmp_path: Path
) -> None:
    card = b"---\nlicense: apache-2.0\nlanguage: [en]\ndatasets: org/data\ntags: [theirs]\n---\n# Theirs\n"
    files = {path.name: path.read_bytes() for path in peft_folder.iterdir()}
    sha = hub.create_repo("org/source", {**files, "README.md": card})
    report = api.push("org/source", "me/copy")
    said = metadata(readme(hub, "me/copy"))
    assert (said["license"], said["language"], said["datasets"]) == ("apache-2.0", ["en"], "org/data")
    assert "# Theirs" in readme(hub, "me/copy")
    assert report.notes == ()
    for _ in range(2):  # what an earlier push left in the cache changes nothing
        api.push("org/source", "me/flax", to="flax")
        assert f"`convert` of [`org/source@{sha}`]({hub.endpoint}/org/source/tree/{sha})" in readme(hub, "me/flax")
        assert metadata(readme(hub, "me/flax"))["license"] == "apache-2.0"
    rescaled = adaptertools.rescale(adaptertools.read("org/source"), alpha=8)
    api.push(adaptertools.write(rescaled, tmp_path / "rescaled", format="peft").path, "me/rescaled")
    said = metadata(readme(hub, "me/rescaled"))
    assert (said["license"], said["language"], said["datasets"]) == ("apache-2.0", ["en"], "org/data")
    assert "theirs" not in said["tags"]
    assert "Theirs" not in readme(hub, "me/rescaled")
    assert f"`rescale` of [`org/source@{sha}`]" in readme(hub, "me/rescaled")


def test_sources_whose_licences_differ_are_named(hub: HubServer, plain: Adapter, tmp_path: Path) -> None:
    names = {
        name: hub.create_repo(f"org/{name}", {"README.md": f"---\nlicense: {name}\n---\n".encode()}) for name in "ab"
    }
    sources = [{"source": f"org/{name}@{sha}", "weight": 1} for name, sha in names.items()]
    made = plain.then(HistoryEntry(operation="stack", details={"sources": sources}))
    report = api.push(adaptertools.write(made, tmp_path / "stacked", format="peft").path, "me/new")
    assert metadata(readme(hub, "me/new"))["license"] == "a"
    assert any("different licences, a and b" in note for note in report.notes)


def test_a_source_that_is_gone_is_said_and_stops_nothing(hub: HubServer, plain: Adapter, tmp_path: Path) -> None:
    made = plain.then(HistoryEntry(operation="rescale", source=f"org/gone@{SHA}"))
    report = api.push(adaptertools.write(made, tmp_path / "made", format="peft").path, "me/new")
    assert report.changed
    assert any("org/gone" in note and "not carried over" in note for note in report.notes)
    assert f"org/gone@{SHA}" in readme(hub, "me/new")


def test_a_merged_model_is_pushed_with_the_card_of_a_merge(
    hub: HubServer, tmp_path: Path, fixtures_base: tuple[Path, Path]
) -> None:
    base, lora = fixtures_base
    hub.create_repo("org/base", {**files(base), "README.md": b"---\nlicense: llama3\n---\n"})
    hub.create_repo("org/lora", {**files(lora), "README.md": b"---\nlicense: mit\n---\n"})
    plan = api.plan_merge("org/base", [adaptertools.read("org/lora")])
    adaptertools.run_merge(plan, tmp_path / "merged")
    (tmp_path / "merged" / "notes.txt").write_text("x")
    report = api.push(tmp_path / "merged", "me/merged")
    assert report.format is None
    assert dict(report.left_out) == {"notes.txt": "no part of it"}
    said = metadata(readme(hub, "me/merged"))
    assert said["base_model"] == ["org/base", "org/lora"]
    assert said["base_model_relation"] == "merge"
    assert said["library_name"] == "transformers"
    assert said["license"] == "llama3"
    card = readme(hub, "me/merged")
    for name in ("org/base", "org/lora"):
        assert f"{name}@{hub.head(name)}" in card
    total = json.loads((tmp_path / "merged" / "adaptertools_merge.json").read_text())["total"]
    assert f"{total['relative_delta']:.4g}" in card
    assert f"{total['rounding_error']:.4g}" in card
    for name in ("model.safetensors", "config.json", "adaptertools_merge.json"):
        assert hub.files("me/merged")[name] == (tmp_path / "merged" / name).read_bytes()


def test_shards_of_an_earlier_model_do_not_stay(hub: HubServer, fixtures_base: tuple[Path, Path]) -> None:
    old = {f"model-0000{n}-of-00002.safetensors": b"x" for n in (1, 2)} | {"model.safetensors.index.json": b"{}"}
    hub.create_repo("me/model", {**old, "image.png": b"x"})
    report = api.push(fixtures_base[0], "me/model")
    assert set(report.removed) == set(old)
    assert "image.png" in hub.files("me/model")


def test_a_card_with_a_token_in_it_is_refused(hub: HubServer, peft_folder: Path) -> None:
    token = "hf_" + "x" * 34
    (peft_folder / "README.md").write_text(f"use {token} to download")
    with pytest.raises(UnsafeFileError) as raised:
        api.push(peft_folder, "me/new")
    assert token not in str(raised.value)
    assert not hub.repositories


def test_a_base_model_without_namespace_is_asked_for(hub: HubServer, plain: Adapter, tmp_path: Path) -> None:
    from dataclasses import replace

    made = adaptertools.write(replace(plain, bases={"": Base(id="folder")}), tmp_path / "made", format="peft").path
    api.push(made, "me/new")
    assert "base_model" not in metadata(readme(hub, "me/new"))
    assert hub.logged("/api/models/folder", "GET")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def fixtures_base() -> tuple[Path, Path]:
    """A tiny base model and an adapter of it."""
    root = Path(__file__).parents[1] / "fixtures" / "base"
    return root / "llama_tiny", root / "llama_tiny_lora"


def test_long_lists_do_not_fill_a_card(plain: Adapter) -> None:
    entry = HistoryEntry(operation="select", details={"only": [f"layer.{index}" for index in range(1000)]})
    (step,) = adapter_facts(plain.then(entry), "peft", "t").steps
    assert len(step) < 400
