"""An adapter on the Hub is replaced where that is asked for alone; and what push, pull and their messages say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.errors import DestinationExistsError
from adaptertools.hub.commit import Commit
from adaptertools.module import Feature


@pytest.fixture
def dora(plain: Adapter) -> Adapter:
    return plain.map_modules(lambda module: replace(module, magnitude=torch.ones(module.lora_B.shape[0])))


def files_of(folder: Path) -> dict[str, bytes | Path]:
    return {path.name: path for path in folder.iterdir()}


HELD = {
    "the same format": ("peft", "hf://me/new", "replaces it"),
    "another format": ("flax", "hf://me/new", "writes this one beside it"),
    "a format without a folder": ("loralib", "hf://me/new", "writes this one beside it"),
}


@pytest.mark.parametrize(("format", "dst", "effect"), HELD.values(), ids=list(HELD))
def test_an_adapter_on_the_hub_is_replaced_only_on_demand(
    format: str, dst: str, effect: str, hub: HubServer, plain: Adapter
) -> None:
    sha = adaptertools.write(plain, dst, format="peft").commit
    assert sha is not None
    before = hub.files("me/new")
    hub.requests.clear()
    with pytest.raises(DestinationExistsError, match=f"^hf://me/new holds an adapter .*commit {sha[:12]}.*{effect}$"):
        adaptertools.write(adaptertools.rescale(plain, 4.0), dst, format=format)
    assert (hub.head("me/new"), hub.files("me/new")) == (sha, before)
    assert {request.method for request in hub.requests} == {"GET"}
    other = adaptertools.rescale(plain, 4.0)
    assert adaptertools.write(other, dst, format=format, overwrite=True).commit == hub.head("me/new") != sha


def test_a_file_on_the_hub_is_replaced_only_on_demand_and_others_may_stand_beside_it(
    hub: HubServer, plain: Adapter
) -> None:
    adaptertools.write(plain, "hf://me/new/a.safetensors", format="loralib")
    adaptertools.write(plain, "hf://me/new/b.safetensors", format="loralib")
    adaptertools.write(plain, "hf://me/new/sub", format="peft")
    for dst, kind in {
        "hf://me/new/a.safetensors": "loralib",
        "hf://me/new": "peft",
        "hf://me/new/sub/": "loralib",
    }.items():
        with pytest.raises(DestinationExistsError, match="holds an adapter"):
            adaptertools.write(plain, dst, format=kind)
    other = adaptertools.rescale(plain, 4.0)
    before = hub.files("me/new")
    adaptertools.write(other, "hf://me/new/a.safetensors", format="loralib", overwrite=True)
    changed = {path for path, content in hub.files("me/new").items() if content != before[path]}
    assert "a.safetensors" in changed
    assert not {path for path in changed if path.startswith(("b.", "sub/"))}


def test_what_is_no_adapter_does_not_stand_in_the_way(hub: HubServer, plain: Adapter) -> None:
    hub.create_repo("me/new", {"README.md": b"# Mine\n", "model.safetensors": b"x", "sub/adapter_config.json": b"{}"})
    assert adaptertools.write(plain, "hf://me/new", format="peft").commit == hub.head("me/new")


def test_an_adapter_that_comes_while_another_is_made_is_not_replaced(
    hub: HubServer, plain: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptertools.write(plain, tmp_path / "x", format="peft")
    hub.create_repo("me/new", {})
    looked = Commit.open.__func__
    theirs: list[str] = []

    def open_late(cls: type[Commit], *args: Any, **options: Any) -> Commit:
        if not options.get("trial"):
            theirs.append(hub.commit("me/new", files_of(tmp_path / "x")))
        return looked(cls, *args, **options)

    monkeypatch.setattr(Commit, "open", classmethod(open_late))
    with pytest.raises(DestinationExistsError, match="holds an adapter"):
        adaptertools.write(plain, "hf://me/new", format="peft")
    assert [hub.head("me/new")] == theirs


def test_a_push_gives_up_what_it_is_told_to_and_says_so(
    hub: HubServer, tmp_path: Path, run: Callable[..., Any], dora: Adapter
) -> None:
    adaptertools.write(dora, tmp_path / "x", format="peft")
    refused = run("push", tmp_path / "x", "me/new", "--to", "loralib")
    assert refused.code == 1
    assert "--drop dora" in refused.err
    ran = run("push", tmp_path / "x", "me/new", "--to", "loralib", "--drop", "dora", "--json")
    assert ran.code == 0, ran.err
    given_up = [each["name"] for each in ran.json["left_out"] if each["reason"] == "dora, given up by --drop"]
    assert len(given_up) == len(dora.modules)
    assert sorted(given_up) == sorted(dora.holders(Feature.DORA))
    assert "dora" not in adaptertools.read("me/new").features
    alone = run("push", tmp_path / "x", "me/new", "--drop", "dora")
    assert (alone.code, "--to" in alone.err) == (2, True)


def test_a_pull_names_the_format_of_an_adapter_that_is_one_file(
    hub: HubServer, plain: Adapter, run: Callable[..., Any], tmp_path: Path
) -> None:
    adaptertools.write(plain, "hf://me/new", format="loralib")
    ran = run("pull", "me/new", tmp_path / "pulled")
    assert "(loralib)" in ran.out.splitlines()[0]
    said = run("pull", "me/new", "--json").json
    assert (said["what"], said["format"]) == ("adapter", "loralib")


def test_without_any_token_a_command_that_sends_says_so(
    hub: HubServer, plain: Adapter, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adaptertools.write(plain, tmp_path / "x", format="peft")
    hub.create_repo("me/public", {})
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("me/new", "me/public"):
        ran = run("push", tmp_path / "x", name)
        assert (ran.code, ran.err.count("\n")) == (1, 1)
        assert "none was given" in ran.err, name
        assert "HF_TOKEN" in ran.err
        assert "hf auth login" in ran.err


def test_a_folder_of_a_repository_without_its_scheme_is_told_with_it(run: Callable[..., Any]) -> None:
    ran = run("pull", "org/sub/two")
    assert ran.code == 2
    assert "Is hf://org/sub/two meant?" in ran.err
