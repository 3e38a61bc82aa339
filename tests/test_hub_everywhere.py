"""A Hub address wherever a command or a function takes a path, and what the results then say of their sources."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click import Argument
from hub_server import HubServer
from proof import needed

import adaptertools
from adaptertools import api, formats
from adaptertools.adapter import Adapter, Base
from adaptertools.cli import group
from adaptertools.errors import AdapterToolsError, OptionError, UnsafeFileError
from adaptertools.merging.record import NAME as RECORD

FIXTURES = Path(__file__).parents[1] / "fixtures" / "base"
COMBINATIONS = [(name, kind) for name in formats.names() for kind in formats.get(name).CONTAINERS]
SPELLINGS = (
    "org/lora",
    "org/lora@{sha}",
    "org/lora@v1",
    "hf://org/lora",
    "hf://org/lora@main",
    "hf://org/lora@main/adapter_model.safetensors",
    "{web}/org/lora/blob/main/adapter_model.safetensors",
    "{web}/org/lora/tree/v1",
)


def files_of(folder: Path) -> dict[str, bytes | Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def repositories(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A base model, two adapters of it, and the merge of the first one, by name with their commits."""
    monkeypatch.chdir(tmp_path)
    base, lora = FIXTURES / "llama_tiny", FIXTURES / "llama_tiny_lora"
    adapter = adaptertools.read(lora)
    adaptertools.write(adaptertools.rescale(adapter, 4.0), "other", format="peft")
    adaptertools.run_merge(adaptertools.plan_merge(base, [adapter]), "whole")
    made = {"org/base": base, "org/lora": lora, "org/other": Path("other"), "org/merged": Path("whole")}
    shas = {name: hub.create_repo(name, files_of(folder)) for name, folder in made.items()}
    hub.tag("org/lora", "v1")
    shutil.rmtree("other")
    shutil.rmtree("whole")
    return shas


COMMANDS = {
    "inspect": ("inspect", "org/lora"),
    "inspect --modules": ("inspect", "org/lora", "--modules"),
    "convert": ("convert", "org/lora", "out.safetensors", "--to", "loralib"),
    "convert --base": ("convert", "org/lora", "out", "--to", "flax-qwix", "--base", "org/base"),
    "rescale": ("rescale", "org/lora", "out", "--alpha", "8"),
    "truncate": ("truncate", "org/lora", "out", "--rank", "1"),
    "stack": ("stack", "org/lora", "hf://org/other", "out"),
    "diff": ("diff", "org/lora", "org/other"),
    "estimate": ("estimate", "org/base", "--rank", "8"),
    "merge": ("merge", "org/base", "org/lora", "org/other", "out"),
    "verify": ("verify", "org/base", "org/lora", "org/merged"),
    "check": ("check", "org/lora", "--for", "vllm"),
    "pull": ("pull", "org/lora", "out"),
    "push": ("push", "org/lora", "me/copy"),
}
"""A command for each place that takes an address."""


@pytest.mark.parametrize("args", COMMANDS.values(), ids=list(COMMANDS))
def test_a_command_takes_addresses_where_it_takes_paths(
    args: tuple[str, ...], repositories: dict[str, str], run: Callable[..., Any]
) -> None:
    ran = run(*args, "--json")
    assert ran.code == 0, ran.err
    assert ran.json.get("by_other_tool", False) is False  # the record of a merge comes with it
    said = json.dumps(ran.json)
    for name in {arg.removeprefix("hf://") for arg in args} & repositories.keys():
        if name != "org/base" or args[0] in ("estimate", "merge"):  # elsewhere it goes into no result
            assert re.search(rf"{name}@{repositories[name][:12]}|{repositories[name]}", said), name
    assert "hub-cache" not in said


def test_every_command_that_takes_a_path_is_among_these() -> None:
    commands = {name: group.commands.get(name) or group.get_command(None, name) for name in group.list_commands(None)}
    paths = {name for name, command in commands.items() if any(isinstance(each, Argument) for each in command.params)}
    assert paths - {"formats"} == {args[0] for args in COMMANDS.values()}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_address_is_spelt_in_many_ways(
    spelling: str, hub: HubServer, repositories: dict[str, str], run: Callable[..., Any]
) -> None:
    src = spelling.format(sha=repositories["org/lora"], web=hub.endpoint)
    assert run("diff", src, FIXTURES / "llama_tiny_lora").code == 0


def test_a_path_that_exists_wins(repositories: dict[str, str], plain: Adapter, run: Callable[..., Any]) -> None:
    adaptertools.write(plain, "org/lora", format="peft")
    assert run("inspect", "org/lora", "--json").json["modules"] == len(plain.modules)
    assert run("inspect", "hf://org/lora", "--json").json["source"].startswith("hf://org/lora@")


def test_a_revision_is_chosen_by_option_or_in_the_address(
    hub: HubServer, repositories: dict[str, str], run: Callable[..., Any]
) -> None:
    newer = hub.commit("org/lora", {}, delete=["adapter_model.safetensors"])
    assert run("inspect", "org/lora").code == 1
    for args in (("org/lora", "--revision", "v1"), ("org/lora", "--revision", repositories["org/lora"])):
        assert repositories["org/lora"][:12] in run("inspect", *args).out
    ran = run("inspect", "org/lora@main", "--revision", "v1")
    assert (ran.code, newer[:12] in ran.out) == (2, False)


@pytest.mark.parametrize("command", ["inspect", "convert", "rescale", "truncate", "estimate"])
def test_a_path_on_this_machine_has_no_revision(
    command: str, repositories: dict[str, str], run: Callable[..., Any]
) -> None:
    src = FIXTURES / ("llama_tiny" if command == "estimate" else "llama_tiny_lora")
    rest = {
        "inspect": (),
        "convert": ("out", "--to", "peft"),
        "rescale": ("out", "--alpha", "8"),
        "truncate": ("out", "--rank", "1"),
        "estimate": ("--rank", "8"),
    }[command]
    ran = run(command, src, *rest, "--revision", "main")
    assert ran.code == 2
    assert "is a path on this machine" in ran.err


def test_an_operation_looks_up_each_address_once_and_keeps_to_that_commit(
    hub: HubServer, repositories: dict[str, str], run: Callable[..., Any]
) -> None:
    hub.requests.clear()
    assert run("stack", "org/lora", "org/other", "org/lora", "out", "-q").code == 0
    assert len(hub.logged(r"^/api/models/org/lora(/revision/[^/]+)?\?", "GET")) == 1
    assert len(hub.logged(r"^/api/models/org/other(/revision/[^/]+)?\?", "GET")) == 1
    assert {each.path.split("/")[4] for each in hub.logged("^/org/lora/resolve/")} == {repositories["org/lora"]}


def test_histories_name_the_repository_and_its_commit(repositories: dict[str, str], run: Callable[..., Any]) -> None:
    lora = f"org/lora@{repositories['org/lora']}"
    for args in (
        ("convert", "org/lora", "a", "--to", "peft"),
        ("rescale", "org/lora", "b", "--alpha", "8"),
        ("truncate", "org/lora", "c", "--rank", "1"),
    ):
        assert run(*args).code == 0
        (entry,) = adaptertools.read(args[2]).history
        assert entry.source == lora
    assert run("stack", "org/lora", "org/other", "d", "--rank", "2").code == 0
    first, second = adaptertools.read("d").history
    assert [source["source"] for source in first.details["sources"]] == [lora, f"org/other@{repositories['org/other']}"]
    assert second.source is None  # the truncation of the sum has no source of its own


def test_a_sub_folder_is_a_part_of_the_name(hub: HubServer, plain: Adapter, tmp_path: Path) -> None:
    adaptertools.write(plain, tmp_path / "x", format="peft")
    files = {f"a/b/{name}": path for name, path in files_of(tmp_path / "x").items()}
    sha = hub.create_repo("org/deep", files)
    for address in ("hf://org/deep/a/b", "hf://org/deep@main/a/b"):
        adapter = adaptertools.read(address)
        assert adapter.origin is not None
        assert adapter.origin.name == f"org/deep@{sha}/a/b"
        assert adaptertools.rescale(adapter, 3.0).history[-1].source == f"org/deep@{sha}/a/b"


def test_the_record_of_a_merge_names_repositories_and_commits(
    repositories: dict[str, str], run: Callable[..., Any]
) -> None:
    assert run("merge", "org/base", "org/lora", "out").code == 0
    record = json.loads((Path("out") / RECORD).read_text())
    assert record["base"]["name"] == f"org/base@{repositories['org/base']}"
    assert record["base"]["commit"] == repositories["org/base"]
    assert [each["name"] for each in record["adapters"]] == [f"org/lora@{repositories['org/lora']}"]
    assert run("verify", "org/base", "org/lora", "out").code == 0
    local = run("merge", FIXTURES / "llama_tiny", FIXTURES / "llama_tiny_lora", "local")
    assert local.code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("local/model.safetensors").read_bytes()
    assert json.loads((Path("local") / RECORD).read_text())["base"]["name"] == "llama_tiny"


def test_functions_take_addresses_too(repositories: dict[str, str], tmp_path: Path) -> None:
    assert adaptertools.estimate("org/base", ranks=8).base == f"hf://org/base@{repositories['org/base'][:12]}"
    assert api.detect("org/lora") == "peft"
    assert api.oddities("org/lora", format="peft") == ()
    adapter = adaptertools.read("org/lora", base="org/base")
    plan = adaptertools.plan_merge("org/base", [adapter])
    assert plan.base.name == f"org/base@{repositories['org/base']}"
    adaptertools.run_merge(plan, tmp_path / "merged")
    assert adaptertools.verify_merge("hf://org/base", [adapter], tmp_path / "merged").ok
    assert adaptertools.verify_merge("org/base", [adapter], "org/merged").ok
    weights = {name: plan.base.tensor(name).clone() for name in plan.base.shapes}
    merged = adaptertools.merge_into(weights, [adapter], keep="org/base", config=plan.base.config)
    assert not torch.equal(weights[plan.changed[0]], plan.base.tensor(plan.changed[0]))
    merged.undo()
    assert all(torch.equal(tensor, plan.base.tensor(name)) for name, tensor in weights.items())
    report = adaptertools.pull("org/lora", tmp_path / "pulled")
    assert report.sha == repositories["org/lora"]
    assert adaptertools.push(tmp_path / "pulled", "me/copy").format == "peft"


DESTINATIONS = {
    "convert": ("convert", "org/lora", "{dst}", "--to", "flax", "--container", "safetensors"),
    "rescale": ("rescale", "org/lora", "{dst}", "--alpha", "8"),
    "truncate": ("truncate", "org/lora", "{dst}", "--rank", "1"),
    "stack": ("stack", "org/lora", "org/other", "{dst}"),
}


@pytest.mark.parametrize("args", DESTINATIONS.values(), ids=list(DESTINATIONS))
@pytest.mark.parametrize(("dst", "branch"), [("hf://me/new", "main"), ("hf://me/new@dev/sub/x", "dev")])
def test_a_result_goes_to_the_hub_in_one_commit_with_a_card(
    args: tuple[str, ...],
    dst: str,
    branch: str,
    hub: HubServer,
    repositories: dict[str, str],
    run: Callable[..., Any],
) -> None:
    ran = run(*(arg.format(dst=dst) for arg in args), "--json")
    assert ran.code == 0, ran.err
    assert run(*(arg.format(dst="here") for arg in args)).code == 0
    said = ran.json["destination"]
    assert (said["path"], said["commit"]) == (dst, hub.head("me/new", branch))
    folder = "sub/x/" if "sub" in dst else ""
    there = hub.files("me/new", branch)
    for path in Path("here").iterdir():
        assert there[f"{folder}{path.name}"] == path.read_bytes()
    card = there[f"{folder}README.md"].decode()
    assert f"org/lora@{repositories['org/lora']}" in card
    assert f"`{args[0]}`" in card
    assert len(hub.commits("me/new", branch)) == 2  # the repository's own first one, and this
    assert run("diff", dst, "here").code == 0


@pytest.mark.parametrize("args", DESTINATIONS.values(), ids=list(DESTINATIONS))
@pytest.mark.parametrize("dst", ["hf://org/other", "hf://org/other@dev/sub/x"])
def test_a_command_asks_for_overwrite_before_it_computes(
    args: tuple[str, ...],
    dst: str,
    hub: HubServer,
    repositories: dict[str, str],
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = tuple(arg.format(dst=dst).replace("flax", "peft") for arg in args)
    branch = "dev" if "dev" in dst else "main"
    if branch == "dev":
        assert run("convert", "org/other", dst, "--to", "peft").code == 0
    sha = hub.head("org/other", branch)
    with monkeypatch.context() as patched:
        for name in ("stack.stack", "truncate.truncate"):
            patched.setattr(f"adaptertools.operations.{name}", None)  # calling it would be an error
        ran = run(*args)
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert f"{dst} holds an adapter (" in ran.err
    assert f"commit {sha[:12]}). overwrite=True (--overwrite) " in ran.err
    assert hub.head("org/other", branch) == sha
    done = run(*args, "--overwrite", "--json")
    assert done.code == 0, done.err
    assert done.json["destination"]["commit"] == hub.head("org/other", branch) != sha


def test_a_result_for_the_hub_leaves_nothing_on_this_machine(
    hub: HubServer,
    repositories: dict[str, str],
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert run("rescale", "org/lora", "hf://me/new", "--alpha", "8").code == 0
    ran = run("rescale", "org/lora", "hf://me/new2", "--alpha", "8", "--token", "hf_reader")
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert "me/new2" not in hub.repositories
    assert list((tmp_path / "temporary").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "hub-cache"}


@pytest.mark.parametrize(
    ("dst", "name"),
    [
        ("hf://me/new", "new.safetensors"),
        ("hf://me/new/x.safetensors", "x.safetensors"),
        ("hf://me/new/sub", "sub/new.safetensors"),
        ("hf://me/new/sub/x.pt", "sub/x.pt"),
    ],
)
def test_an_adapter_that_is_one_file_has_the_name_in_the_address_or_that_of_the_repository(
    dst: str, name: str, hub: HubServer, plain: Adapter
) -> None:
    report = adaptertools.write(plain, dst, format="loralib")
    assert str(report.path) == f"hf://me/new/{name}"
    assert {path for path in hub.files("me/new") if path.endswith((".safetensors", ".pt"))} == {name}


def test_a_destination_without_a_scheme_is_a_path(
    hub: HubServer, repositories: dict[str, str], run: Callable[..., Any]
) -> None:
    assert run("rescale", "org/lora", "me/new", "--alpha", "8").code == 0
    assert "me/new" not in hub.repositories
    assert Path("me/new/adapter_config.json").is_file()
    assert run("rescale", "org/lora", "hf://no-name-of-two-parts@/", "--alpha", "8").code == 2


def test_python_writes_to_the_hub(hub: HubServer, plain: Adapter, tmp_path: Path) -> None:
    report = adaptertools.write(plain, "hf://me/new@dev", format="peft", dtype="bf16")
    assert str(report.path) == "hf://me/new@dev"
    assert report.commit == hub.head("me/new", "dev")
    assert not report.exact
    again = adaptertools.convert("hf://me/new@dev", "hf://me/other", to="loralib")
    assert again.commit == hub.head("me/other")
    assert adaptertools.stored_size(plain, format="peft", path="hf://me/new") > 0
    assert adaptertools.read("hf://me/other").history[-1].source == f"me/new@{report.commit}"


@pytest.mark.parametrize(("name", "container"), COMBINATIONS)
def test_every_format_is_pushed_and_pulled_and_read_there(
    name: str, container: str, plain: Adapter, hub: HubServer, tmp_path: Path, run: Callable[..., Any]
) -> None:
    adapter = plain.map_modules(lambda module: module)
    single = "x" if formats.get(name).FOLDER else f"x{'.pt' if container == 'torch' else '.' + container}"
    place = adaptertools.write(adapter, tmp_path / single, format=name, container=container, **needed(name)).path
    assert run("push", place, "me/new").code == 0
    pickled = container == "torch"
    if pickled:
        for args in (("pull", "me/new", tmp_path / "refused"), ("inspect", "me/new")):
            ran = run(*args)
            assert (ran.code, "--allow-pickle" in ran.err) == (1, True)
    ran = run("pull", "me/new", tmp_path / "pulled", *(["--allow-pickle"] if pickled else []))
    assert ran.code == 0, ran.err
    sent = files_of(place) if place.is_dir() else {place.name: place}
    pulled = files_of(tmp_path / "pulled")
    assert {path: Path(file).read_bytes() for path, file in sent.items()} == {
        path: Path(pulled[path]).read_bytes() for path in sent
    }
    source = tmp_path / "pulled" if pickled else "me/new"
    assert adaptertools.diff(adapter, adaptertools.read(source), tolerance=0.0).same


@pytest.mark.parametrize(("name", "container"), COMBINATIONS)
def test_every_format_is_written_to_the_hub(
    name: str, container: str, plain: Adapter, hub: HubServer, tmp_path: Path
) -> None:
    report = adaptertools.write(plain, "hf://me/new", format=name, container=container, **needed(name))
    assert (report.container, report.commit) == (container, hub.head("me/new"))
    if container == "torch":
        with pytest.raises(UnsafeFileError, match="pickle"):
            adaptertools.read("me/new")
    else:
        assert adaptertools.diff(plain, adaptertools.read("me/new"), tolerance=0.0).same


def test_a_private_repository_takes_a_token_and_no_token_is_shown(
    hub: HubServer,
    repositories: dict[str, str],
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    hub.create_repo("org/secret", files_of(FIXTURES / "llama_tiny_lora"), private=True)
    hub.create_repo("org/hidden", files_of(FIXTURES / "llama_tiny"), private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    commands = [
        ("inspect", "org/secret"),
        ("convert", "org/secret", "a", "--to", "peft"),
        ("rescale", "org/secret", "hf://me/r", "--alpha", "8"),
        ("truncate", "org/secret", "c", "--rank", "1"),
        ("stack", "org/secret", "org/lora", "d"),
        ("diff", "org/secret", "org/lora"),
        ("estimate", "org/hidden", "--rank", "8"),
        ("merge", "org/hidden", "org/secret", "e"),
        ("verify", "org/hidden", "org/secret", "e"),
    ]
    for args in commands:
        refused, done = run(*args), run(*args, "--token", "hf_writer")
        assert refused.code == 1, args
        assert refused.err.count("\n") == 1
        assert "HF_TOKEN" in refused.err
        assert done.code == 0, done.err
        assert "hf_writer" not in refused.out + refused.err + done.out + done.err
        wrong = run(*args, "--token", "hf_wrong_token")
        assert wrong.code == 1, args
        assert "hf_wrong_token" not in wrong.out + wrong.err
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if b"hf_writer" in path.read_bytes()]


@pytest.mark.parametrize("args", COMMANDS.values(), ids=list(COMMANDS))
def test_a_repository_that_is_not_there_is_said_in_one_line(
    args: tuple[str, ...], hub: HubServer, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*args)
    assert ran.code == 1
    assert "there is no such repository, or it is private" in ran.err
    assert ran.err.count("\n") == 1
    assert not Path("out").exists()


def test_offline_the_cache_is_read_and_the_message_says_which_commit(
    hub: HubServer, repositories: dict[str, str], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("diff", "org/lora", "org/other").code == 0
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = run("inspect", "org/lora")
    assert ran.code == 0, ran.err
    assert f"hf://org/lora@{repositories['org/lora'][:12]}" in ran.out
    assert "not checked" not in ran.out
    assert run("inspect", "org/base").code == 1
    assert hub.requests == []


def test_an_address_that_is_none_is_wrong_usage(run: Callable[..., Any]) -> None:
    for src in ("hf://", "hf://org/a..b", "https://example.org/org/name"):
        assert run("inspect", src).code == 2
    with pytest.raises(OptionError):
        adaptertools.read("hf://")


def test_operations_on_adapters_of_the_hub_speak_of_them_by_address(
    hub: HubServer, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    """Errors that a reader finds name the file on the Hub, not a path in the cache."""
    files = files_of(adaptertools.write(plain, tmp_path / "x", format="peft").path)
    config = json.loads(Path(files["adapter_config.json"]).read_text())
    sha = hub.create_repo("org/bad", {**files, "adapter_config.json": json.dumps({**config, "r": 0}).encode()})
    with pytest.raises(AdapterToolsError, match=f"org/bad@{sha[:12]}"):
        adaptertools.read("org/bad")


def test_a_base_by_name_is_not_fetched_whole(
    hub: HubServer, repositories: dict[str, str], run: Callable[..., Any]
) -> None:
    hub.requests.clear()
    assert run("convert", "org/lora", "out", "--to", "peft", "--base", "org/base").code == 0
    size = (FIXTURES / "llama_tiny" / "model.safetensors").stat().st_size
    assert hub.sent("model.safetensors") < size


def test_the_base_of_an_adapter_is_kept(hub: HubServer, plain: Adapter, tmp_path: Path) -> None:
    bases = {"": Base(id="org/base", revision="a" * 40)}
    report = adaptertools.write(Adapter(modules=plain.modules, bases=bases), "hf://me/new", format="peft")
    assert "base_model: org/base" in hub.files("me/new")["README.md"].decode()
    assert adaptertools.read(f"me/new@{report.commit}").bases == bases
