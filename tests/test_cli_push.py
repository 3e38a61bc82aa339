"""`adaptertools push`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_cases import assert_one_line, repositories
from hub_server import HubServer

import adaptertools
from adaptertools.adapter import Adapter

COMMIT = r"/commit/"
BASE = Path(__file__).parents[1] / "fixtures" / "base"
Tool = Callable[..., Any]


def titles(hub: HubServer, name: str = "me/new", branch: str = "main") -> list[str]:
    return [title for _, title in hub.commits(name, branch)]


def test_an_adapter_becomes_a_repository_that_others_can_use(
    hub: HubServer, peft_folder: Path, tool: Tool, tmp_path: Path
) -> None:
    ran = tool("push", peft_folder, "me/new")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert ran.out.startswith(f"Pushed {peft_folder} to hf://me/new (peft)\n")
    assert f"  commit       {hub.head('me/new')}\n" in ran.out
    assert f"  page         {hub.endpoint}/me/new/commit/{hub.head('me/new')}\n" in ran.out
    assert "  sent         3 files, " in ran.out
    assert titles(hub) == ["Upload a LoRA adapter (peft) with adaptertools", "initial commit"]
    back = tool("pull", "me/new", tmp_path / "back")
    assert back.code == 0, back.err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (peft_folder / name).read_bytes()


@pytest.mark.parametrize("case", ["litgpt/llama_all/final", "torchtune/llama/epoch_0"])
def test_what_says_how_an_adapter_is_read_goes_and_comes_with_it(
    case: str, hub: HubServer, tool: Tool, tmp_path: Path
) -> None:
    folder = BASE.parent / case
    assert tool("push", folder, "me/new").code == 0
    assert {path.name for path in folder.iterdir()} <= set(hub.files("me/new"))
    assert tool("pull", "me/new", tmp_path / "back", "--allow-pickle").code == 0
    before, after = adaptertools.read(folder), adaptertools.read(tmp_path / "back")
    assert adaptertools.diff(before, after, tolerance=0.0).same


def test_json_says_all_of_it(hub: HubServer, peft_folder: Path, tool: Tool) -> None:
    (peft_folder / "optimizer.pt").write_bytes(b"x")
    ran = tool("push", peft_folder, "me/new", "--private", "--message", "first", "--json")
    assert ran.code == 0, ran.err
    sizes = {path.name: path.stat().st_size for path in peft_folder.iterdir()}
    sizes["README.md"] = len(hub.files("me/new")["README.md"])
    del sizes["optimizer.pt"]
    assert {each["path"]: each["nbytes"] for each in ran.json["sent"]} == sizes
    assert ran.json["nbytes"] == sum(sizes.values())
    assert ran.json["left_out"] == [{"name": "optimizer.pt", "reason": "state of training"}]
    assert ran.json["destination"] == {
        "address": "hf://me/new",
        "repository": "me/new",
        "commit": hub.head("me/new"),
        "url": f"{hub.endpoint}/me/new/commit/{hub.head('me/new')}",
        "pull_request": None,
        "created": True,
    }
    assert ran.json["changed"] is True
    assert ran.json["dry_run"] is False
    assert hub.repositories["me/new"].private
    assert titles(hub)[0] == "first"


def test_the_same_again_sends_nothing_and_makes_no_commit(hub: HubServer, peft_folder: Path, tool: Tool) -> None:
    tool("push", peft_folder, "me/new")
    before = repositories(hub)
    ran = tool("push", peft_folder, "me/new")
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"hf://me/new holds {peft_folder} (peft) already; nothing was sent\n")
    assert "  unchanged    adapter_config.json, adapter_model.safetensors, README.md\n" in ran.out
    assert repositories(hub) == before
    assert tool("push", peft_folder, "me/new", "-q").out == ""


def test_a_dry_run_lists_what_would_go_and_sends_nothing(hub: HubServer, peft_folder: Path, tool: Tool) -> None:
    (peft_folder / ".env").write_text("SECRET=1")
    ran = tool("push", peft_folder, "me/new", "--dry-run")
    assert ran.code == 0, ran.err
    assert "to hf://me/new (peft), a new repository; nothing was sent" in ran.out
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert f"  {name}\n" in ran.out
    assert "  left out     .env (hidden)" in ran.out
    assert not hub.repositories
    assert {request.method for request in hub.requests} == {"GET"}
    hub.create_repo("me/new", {"adapter_model.bin": b"x", "adapter_config.json": (peft_folder / "adapter_config.json")})
    ran = tool("push", peft_folder, "me/new", "--dry-run", "--json")
    assert {each["path"] for each in ran.json["sent"]} == {"adapter_model.safetensors", "README.md"}
    assert ran.json["unchanged"] == ["adapter_config.json"]
    assert ran.json["removed"] == ["adapter_model.bin"]
    assert ran.json["destination"]["commit"] is None
    assert titles(hub) == ["commit"]


def test_a_branch_and_a_pull_request_leave_main_as_it_is(hub: HubServer, peft_folder: Path, tool: Tool) -> None:
    main = hub.create_repo("me/new", {"notes.txt": b"1"})
    for branch in ("next", "feature/one"):
        assert tool("push", peft_folder, "me/new", "--branch", branch).code == 0
        assert "adapter_model.safetensors" in hub.files("me/new", branch)
    ran = tool("push", peft_folder, "me/new", "--create-pr")
    assert ran.code == 0, ran.err
    assert f"  page         {hub.endpoint}/me/new/discussions/1\n" in ran.out
    assert hub.head("me/new") == main
    assert tool("push", peft_folder, "hf://me/new@next/sub").code == 0
    assert "sub/adapter_model.safetensors" in hub.files("me/new", "next")


@pytest.mark.parametrize("to", ["flax", "loralib"])
def test_it_is_converted_on_the_way(hub: HubServer, peft_folder: Path, tool: Tool, tmp_path: Path, to: str) -> None:
    (peft_folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    (peft_folder / "tokenizer.json").write_text("{}")
    ran = tool("push", peft_folder, "me/new", "--to", to)
    assert ran.code == 0, ran.err
    assert f"to hf://me/new ({to})" in ran.out
    files = hub.files("me/new")
    assert "adapter_model.safetensors" not in files
    assert "tokenizer.json" in files
    assert b"1. `convert` of `adapter`: from `peft`, to `" + to.encode() + b"`" in files["README.md"]
    assert b"Words." in files["README.md"]
    pulled = tool("pull", "me/new", tmp_path / "back", "--allow-pickle")
    assert pulled.code == 0, pulled.err
    read = adaptertools.read(next((tmp_path / "back").glob("*.pt"), tmp_path / "back"))
    for new, old in zip(read.modules, adaptertools.read(peft_folder).modules, strict=True):
        assert new.delta_weight().allclose(old.delta_weight())


def test_a_file_that_cannot_state_its_alpha_goes_as_it_is(
    hub: HubServer, plain: Adapter, tool: Tool, tmp_path: Path
) -> None:
    adaptertools.write(plain, tmp_path / "lora.pt", format="loralib")
    bare = tmp_path / "bare" / "lora.pt"
    bare.parent.mkdir()
    bare.write_bytes((tmp_path / "lora.pt").read_bytes())
    assert tool("push", tmp_path / "lora.pt", "me/both").code == 0
    assert {"lora.pt", "lora.pt.adaptertools.json"} <= set(hub.files("me/both"))
    assert tool("push", bare, "me/bare").code == 0
    assert hub.files("me/bare")["lora.pt"] == bare.read_bytes()
    refused = tool("push", bare, "me/peft", "--to", "peft")
    assert_one_line(refused, 1, "--source-alpha")
    ran = tool("push", bare, "me/peft", "--to", "peft", "--source-alpha", "16")
    assert ran.code == 0, ran.err
    assert b'"lora_alpha": 16' in hub.files("me/peft")["adapter_config.json"]


def test_what_is_on_the_hub_can_go_elsewhere_on_it(hub: HubServer, peft_folder: Path, tool: Tool) -> None:
    files = {path.name: path.read_bytes() for path in peft_folder.iterdir()}
    sha = hub.create_repo("org/source", files)
    hub.commit("org/source", {"adapter_config.json": b"broken"})
    ran = tool("push", "org/source", "me/copy", "--revision", sha)
    assert ran.code == 0, ran.err
    assert hub.files("me/copy")["adapter_model.safetensors"] == files["adapter_model.safetensors"]


def test_a_model_is_told_by_its_weights(hub: HubServer, tool: Tool) -> None:
    ran = tool("push", BASE / "llama_tiny", "me/model")
    assert ran.code == 0, ran.err
    assert "to hf://me/model (model)" in ran.out
    assert "model.safetensors" in hub.files("me/model")
    card = hub.files("me/model")["README.md"].decode()
    assert "library_name: transformers" in card
    assert "A model." in card
    for claim in ("merge", "lora", "How these files were made"):
        assert claim not in card
    refused = tool("push", BASE / "llama_tiny", "me/model", "--to", "peft")
    assert_one_line(refused, 2, "is a model")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["{src}", "no repository"], 2, ["no address on the Hub"]),
        (["{src}", "me/new@a", "--branch", "b"], 2, ["--branch b", "give one of them"]),
        (["{src}", "me/new@" + "0" * 40], 2, ["a commit is never changed"]),
        (["{src}", "me/new", "--revision", "v1"], 2, ["a path on this machine"]),
        (["none", "me/new"], 1, ["none", "no such file or folder"]),
        (["{empty}", "me/new"], 1, ["no adapter of a known format"]),
        (["{src}", "me/new", "--token", "hf_reader"], 1, ["not allowed"]),
        (["{src}", "me/new", "--token", "hf_wrong"], 1, ["does not accept the token"]),
        (["{src}", "me/new", "--create-pr"], 1, ["pull request"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    hub: HubServer, peft_folder: Path, tool: Tool, tmp_path: Path, args: list[str], code: int, said: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    given = [arg.format(src=peft_folder, empty=tmp_path / "empty") for arg in args]
    assert_one_line(tool("push", *given), code, *said)
    assert not hub.repositories


def test_a_repository_that_moved_meanwhile_is_said_and_the_same_command_then_works(
    hub: HubServer, peft_folder: Path, tool: Tool
) -> None:
    hub.create_repo("me/new", {"notes.txt": b"1"})
    hub.faults.add("POST", COMMIT, status=0, do=lambda: hub.commit("me/new", {"notes.txt": b"2"}, title="theirs"))
    assert_one_line(tool("push", peft_folder, "me/new"), 1, "moved on meanwhile", "nothing was committed")
    assert titles(hub) == ["theirs", "commit"]
    assert tool("push", peft_folder, "me/new").code == 0
    assert hub.files("me/new")["notes.txt"] == b"2"


def test_a_hub_that_is_down_can_be_tried_again(hub: HubServer, peft_folder: Path, tool: Tool) -> None:
    with hub.down():
        assert_one_line(tool("push", peft_folder, "me/new"), 3, "repeat it")
    hub.faults.add("POST", COMMIT, status=503, times=50)
    assert_one_line(tool("push", peft_folder, "me/new"), 3, "503", "repeat it")
    assert titles(hub) == ["initial commit"]
    hub.faults.clear()
    assert tool("push", peft_folder, "me/new").code == 0
    assert len(titles(hub)) == 2


def test_no_bar_of_the_client_shows(hub: HubServer, peft_folder: Path, tool: Tool) -> None:
    assert tool("push", peft_folder, "me/new").err == ""
    assert tool("push", peft_folder, "me/new", "--to", "flax").err == ""


def test_a_card_that_cannot_be_read_stops_before_anything_is_sent(
    hub: HubServer, peft_folder: Path, tool: Tool
) -> None:
    head = hub.create_repo("me/new", {"README.md": b"---\na: [\n---\nwords"})
    assert_one_line(tool("push", peft_folder, "me/new"), 1, "hf://me/new: README.md", "not YAML")
    assert hub.head("me/new") == head
    (peft_folder / "README.md").write_text("---\n- a\n---\n")
    assert_one_line(tool("push", peft_folder, "me/other"), 1, "README.md", "no list of names")
    assert "me/other" not in hub.repositories
