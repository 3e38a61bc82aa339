"""Reading from the Hub when something is wrong: one clear line, the right exit code, nothing half-written."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran
from hub_cases import assert_one_line, files_of, wide
from hub_fixtures import XET
from hub_server import HubServer

from adaptertools.hub import client

Arrange = Callable[[HubServer, pytest.MonkeyPatch], None]
LFS = pytest.mark.skipif(XET, reason="the HTTP path of large files; this run takes Xet")

ABSENT: dict[str, tuple[str, int, list[str]]] = {
    "no such repository": ("org/none", 1, ["org/none", "no such repository", "HF_TOKEN"]),
    "no such branch": ("org/adapter@v9", 1, ["org/adapter@v9", "no branch, tag or commit v9"]),
    "no such sha": ("org/adapter@" + "0" * 40, 1, ["no branch, tag or commit"]),
    "no such folder": ("hf://org/adapter/none", 1, ["hf://org/adapter", "none"]),
    "no such file": ("hf://org/adapter@main/none.safetensors", 1, ["none.safetensors"]),
    "gated": ("org/gated", 1, ["gated", "/org/gated"]),
    "no adapter": ("org/text", 1, ["no adapter"]),
    "empty": ("org/empty", 1, ["empty"]),
    "no repository id": ("hf://org/na..me", 2, ["org/na..me", "org/name"]),
    "no repository id, as the Hub has it": ("hf://org/-name", 2, ["org/-name"]),
    "another site": ("https://example.com/org/name", 2, ["example.com"]),
}


@pytest.fixture
def stocked(hub: HubServer, peft_folder: Path) -> HubServer:
    """A Hub with an adapter in several states."""
    files = files_of(peft_folder)
    hub.create_repo("org/adapter", files)
    hub.create_repo("org/private", files, private=True)
    hub.create_repo("org/gated", files, gated=True)
    hub.create_repo("org/text", {"README.md": b"words", "config.json": b"{}"})
    hub.create_repo("org/empty")
    return hub


def nothing_at(dst: Path) -> bool:
    """Whether neither the destination nor anything hidden beside it is there."""
    return not dst.exists() and not [path for path in dst.parent.glob(".*") if dst.name in path.name]


@pytest.mark.parametrize("case", ABSENT)
@pytest.mark.parametrize("command", ["pull", "inspect"])
def test_what_is_not_there_is_said_in_one_line(stocked, tool, tmp_path, command, case):
    address, code, said = ABSENT[case]
    dst = tmp_path / "dst"
    assert_one_line(tool(command, address, *([dst] if command == "pull" else [])), code, *said)
    assert nothing_at(dst)


@pytest.mark.parametrize("command", ["pull", "inspect"])
@pytest.mark.parametrize(
    ("token", "address", "said"),
    [
        ("hf_outsider", "org/private", ["no such repository", "private"]),
        ("hf_wrong", "org/adapter", ["does not accept the token"]),
        ("hf_wrong", "org/private", ["does not accept the token"]),
        ("hf_outsider", "org/gated", ["gated"]),
        ("", "org/private", ["private"]),
    ],
)
def test_a_token_without_the_right_is_refused_wherever_it_comes_from(
    stocked, tool, tmp_path, command, token, address, said
):
    dst = [tmp_path / "dst"] if command == "pull" else []
    assert_one_line(tool(command, address, *dst, HF_TOKEN=token), 1, *said)
    if token:
        assert_one_line(tool(command, address, *dst, "--token", token), 1, *said)
    assert nothing_at(tmp_path / "dst")


def test_the_right_token_reads_what_is_private(stocked, tool, tmp_path):
    assert tool("pull", "org/private", tmp_path / "dst", HF_TOKEN="hf_reader").code == 0
    assert tool("inspect", "org/private", "--token", "hf_reader", HF_TOKEN="hf_outsider").code == 0
    assert {each.token for each in stocked.logged("^/storage/")} <= {None}  # another origin learns no token


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("command", ["pull", "inspect"])
def test_a_server_that_goes_on_failing_can_be_tried_again(stocked, tool, tmp_path, command, status):
    stocked.faults.add("*", "^/api/models", status=status, times=1000)
    dst = tmp_path / "dst"
    args = (command, "org/adapter", *([dst] if command == "pull" else []))
    assert_one_line(tool(*args), 3, str(status), "repeat")
    assert nothing_at(dst)
    stocked.faults.clear()
    assert tool(*args).code == 0


@pytest.mark.parametrize("command", ["pull", "inspect"])
def test_without_a_network_the_command_can_be_tried_again(stocked, tool, tmp_path, command):
    dst = tmp_path / "dst"
    args = (command, "org/adapter", *([dst] if command == "pull" else []))
    with stocked.down():
        assert_one_line(tool(*args), 3, stocked.endpoint, "repeat")
    assert nothing_at(dst)
    assert_one_line(tool(*args, HF_ENDPOINT="http://127.0.0.1:9"), 3, "http://127.0.0.1:9")
    assert tool(*args).code == 0


@pytest.mark.parametrize("status", [429, 503, None])
def test_a_server_that_fails_for_a_while_is_waited_for(stocked, tool, tmp_path, peft_folder, status):
    for path in ("^/api/models", "resolve/.*config", "resolve/.*safetensors"):
        stocked.faults.add("*", path, status=status, times=2, headers={"Retry-After": "0"})
    ran = tool("pull", "org/adapter", tmp_path / "dst")
    assert ran.code == 0, ran.err
    pulled = files_of(tmp_path / "dst")
    assert pulled == {name: content for name, content in files_of(peft_folder).items() if name in pulled}
    assert "adapter_model.safetensors" in pulled


def test_the_wait_that_a_server_asks_for_is_kept(stocked, tool, monkeypatch):
    monkeypatch.setattr(client, "PATIENCE", 10.0)
    stocked.faults.add("*", "^/api/models", status=429, headers={"Retry-After": "1"})
    assert tool("inspect", "org/adapter").code == 0
    refused, repeated = stocked.logged("^/api/models")[:2]
    assert 1.0 <= repeated.started - refused.ended < 3.0


@LFS
def test_a_connection_that_is_cut_once_is_taken_up_where_it_broke(hub, tool, tmp_path):
    files = files_of(wide(tmp_path))
    hub.create_repo("org/wide", files)
    hub.faults.add("GET", "^/storage/", cut=15_000_000)
    ran = tool("pull", "org/wide", tmp_path / "dst", "--copy")
    assert ran.code == 0, ran.err
    assert files_of(tmp_path / "dst")["adapter_model.safetensors"] == files["adapter_model.safetensors"]
    assert hub.sent("^/storage/") < 2 * len(files["adapter_model.safetensors"])


@LFS
@pytest.mark.slow
def test_a_connection_that_is_always_cut_leaves_nothing_and_the_same_command_goes_on(hub, tool, tmp_path):
    files = files_of(wide(tmp_path))
    hub.create_repo("org/wide", files)
    hub.faults.add("GET", "^/storage/", cut=1_000_000, times=1000)
    assert_one_line(tool("pull", "org/wide", tmp_path / "dst"), 3, "repeat")
    assert nothing_at(tmp_path / "dst")
    hub.faults.clear()
    before = len(hub.requests)
    assert tool("pull", "org/wide", tmp_path / "dst").code == 0
    assert files_of(tmp_path / "dst")["adapter_model.safetensors"] == files["adapter_model.safetensors"]
    assert not [each for each in hub.requests[before:] if "adapter_config" in each.path]


def test_a_disk_that_is_too_small_is_found_before_anything_is_fetched(hub, tool, tmp_path, monkeypatch):
    hub.create_repo("org/wide", files_of(wide(tmp_path)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(30_000_000, 29_000_000, 1_000_000))
    assert_one_line(tool("pull", "org/wide", tmp_path / "dst"), 1, "bytes are needed", "1,000,000 are free")
    assert hub.sent("^/storage/") == 0
    assert nothing_at(tmp_path / "dst")


SMALL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, resource.RLIM_INFINITY))
from adaptertools.cli import main
sys.argv[0] = "adaptertools"
main()
"""


@LFS
def test_a_file_that_the_disk_does_not_take_leaves_nothing(hub, tool, tmp_path):
    hub.create_repo("org/wide", files_of(wide(tmp_path)))
    command = [sys.executable, "-c", SMALL_DISK, "pull", "org/wide", str(tmp_path / "dst")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert_one_line(Ran(ran.returncode, ran.stdout, ran.stderr), 1, "cannot write")
    assert nothing_at(tmp_path / "dst")
    assert tool("pull", "org/wide", tmp_path / "dst").code == 0


@pytest.mark.parametrize(
    "name", ["../up.json", "/etc/passwd", "a/../../b.json", "a\\..\\b.json", "C:x.json", "a\nb.json", "./x"]
)
@pytest.mark.parametrize("command", ["pull", "inspect"])
def test_a_repository_with_path_like_names_is_refused(stocked, tool, tmp_path, command, name):
    stocked.commit("org/adapter", {name: b"{}"})
    dst = tmp_path / "dst"
    assert_one_line(tool(command, "org/adapter", *([dst] if command == "pull" else [])), 1, "file named")
    assert nothing_at(dst)
    assert not stocked.logged("resolve|storage")


def test_a_repository_of_a_pickle_alone_is_refused_until_it_is_allowed(stocked, tool, tmp_path, plain):
    import torch

    weights = tmp_path / "adapter_model.bin"
    prefix = "base_model.model."
    tensors = {
        f"{prefix}{module.target.parameter}.lora_{which}.weight": getattr(module, f"lora_{which}")
        for module in plain.modules
        for which in "AB"
    }
    torch.save(tensors, weights)
    config = stocked.files("org/adapter")["adapter_config.json"]
    stocked.create_repo("org/pickle", {"adapter_model.bin": weights, "adapter_config.json": config})
    for command in (
        ["pull", "org/pickle", tmp_path / "dst"],
        ["inspect", "org/pickle"],
        ["convert", "org/pickle", tmp_path / "dst", "--to", "peft"],
    ):
        assert_one_line(tool(*command), 1, "pickle", "adapter_model.bin", "--allow-pickle")
    assert not stocked.logged("resolve/.*bin|storage")
    assert nothing_at(tmp_path / "dst")
    ran = tool("pull", "org/pickle", tmp_path / "dst", "--allow-pickle")
    assert ran.code == 0, ran.err


def header_of_100_gigabytes() -> bytes:
    return struct.pack("<Q", 100 << 30) + b"{" + b" " * 100


def header_of_26_megabytes() -> bytes:
    header = json.dumps({"__metadata__": {"filler": "x" * 26_000_000}}).encode()
    return struct.pack("<Q", len(header)) + header


def link_out_of_the_repository() -> bytes:
    return b"../../../../../../etc/passwd"


@pytest.mark.parametrize("content", [header_of_100_gigabytes, header_of_26_megabytes, link_out_of_the_repository])
@pytest.mark.parametrize("command", ["pull", "inspect"])
def test_weights_that_are_none_are_refused_without_much_traffic(stocked, tool, tmp_path, command, content):
    stocked.commit("org/adapter", {"adapter_model.safetensors": content()})
    dst = tmp_path / "dst"
    assert_one_line(tool(command, "org/adapter", *([dst] if command == "pull" else [])), 1, "adapter_model.safetensors")
    assert nothing_at(dst)
    if command == "inspect":
        assert stocked.sent() < 1_000_000


def test_a_link_in_the_cache_that_leads_out_of_it_is_refused(stocked, tool, tmp_path):
    assert tool("pull", "org/adapter").code == 0
    (secret := tmp_path / "secret").write_bytes(b"x" * len(stocked.files("org/adapter")["adapter_config.json"]))
    snapshot = next((Path(os.environ["HF_HUB_CACHE"]) / "models--org--adapter" / "snapshots").iterdir())
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to(secret)
    assert_one_line(tool("pull", "org/adapter", tmp_path / "dst"), 1, "leads out of the cache")
    assert nothing_at(tmp_path / "dst")


def newer(hub: HubServer) -> dict[str, bytes]:
    """The adapter with another configuration and other weights, of the same sizes."""
    files = hub.files("org/adapter")
    weights = files["adapter_model.safetensors"]
    return files | {"adapter_model.safetensors": weights[:-64] + bytes(64)}


def test_what_is_pulled_again_is_the_new_version(stocked, tool, tmp_path):
    assert tool("pull", "org/adapter", tmp_path / "old").code == 0
    sha = stocked.commit("org/adapter", new := newer(stocked))
    ran = tool("pull", "org/adapter", tmp_path / "new", "--json")
    assert ran.json["source"]["sha"] == sha
    assert files_of(tmp_path / "new")["adapter_model.safetensors"] == new["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("method", "failing"), [("*", "^/api/"), pytest.param("HEAD", "resolve", marks=pytest.mark.slow)]
)
def test_a_stale_copy_is_never_served_for_a_fresh_one(stocked, tool, tmp_path, method, failing):
    assert tool("pull", "org/adapter").code == 0
    stocked.commit("org/adapter", newer(stocked))
    stocked.faults.add(method, failing, status=503, times=100_000)
    assert_one_line(tool("pull", "org/adapter", tmp_path / "dst"), 3, "503")
    assert nothing_at(tmp_path / "dst")
    stocked.faults.clear()
    assert tool("pull", "org/adapter", tmp_path / "dst").code == 0


def test_a_branch_that_moves_in_the_middle_mixes_nothing(stocked, tool, tmp_path):
    old = stocked.files("org/adapter")
    sha = stocked.head("org/adapter")
    moved = {"adapter_model.safetensors": newer(stocked)["adapter_model.safetensors"], "adapter_config.json": b"{}"}
    stocked.faults.add("*", "resolve", status=0, do=lambda: stocked.commit("org/adapter", moved))
    ran = tool("pull", "org/adapter", tmp_path / "dst", "--json")
    assert ran.json["source"]["sha"] == sha != stocked.head("org/adapter")
    assert {
        name: content for name, content in old.items() if content != files_of(tmp_path / "dst").get(name)
    }.keys() <= {"README.md"}
    assert {each.path.split("/")[4] for each in stocked.logged("/resolve/")} == {sha}


def test_offline_the_cache_is_used_and_the_sha_is_named(stocked, tool, tmp_path):
    sha = stocked.head("org/adapter")
    assert tool("pull", "org/adapter").code == 0
    stocked.commit("org/adapter", newer(stocked))
    asked = len(stocked.requests)
    ran = tool("pull", "org/adapter", tmp_path / "dst", HF_HUB_OFFLINE="1")
    assert ran.code == 0, ran.err
    assert sha in ran.out
    assert "offline" in ran.out
    assert tool("inspect", "org/adapter", HF_HUB_OFFLINE="1").code == 0
    assert_one_line(tool("pull", "org/text", tmp_path / "other", HF_HUB_OFFLINE="1"), 1, "HF_HUB_OFFLINE")
    assert len(stocked.requests) == asked


def test_a_file_that_the_cache_lost_is_noticed_offline(stocked, tool, tmp_path):
    assert tool("pull", "org/adapter").code == 0
    snapshot = next((Path(os.environ["HF_HUB_CACHE"]) / "models--org--adapter" / "snapshots").iterdir())
    (snapshot / "adapter_model.safetensors").unlink()
    ran = tool("pull", "org/adapter", tmp_path / "dst", HF_HUB_OFFLINE="1")
    assert_one_line(ran, 1, "HF_HUB_OFFLINE", "adapter_model.safetensors")
    assert nothing_at(tmp_path / "dst")
