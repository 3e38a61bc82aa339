"""Files of one commit come into the shared cache: the right ones, whole, and of that commit alone."""

import json
import os
from pathlib import Path

import pytest
from hub_fixtures import XET
from hub_server import HubServer

from adaptertools.adapter import Adapter
from adaptertools.errors import (
    DestinationError,
    HubAccessError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    OptionError,
    UnknownFormatError,
    UnsafeFileError,
)
from adaptertools.hub import client
from adaptertools.hub.cache import CachedRepository, cache_folder
from adaptertools.hub.choice import choose_adapter_files
from adaptertools.hub.download import fetch
from adaptertools.hub.revision import resolve
from adaptertools.hub.transfer import download

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTER = FIXTURES / "base" / "llama_tiny_lora"
MODEL = FIXTURES / "base" / "llama_tiny"
WEIGHTS = "adapter_model.safetensors"
LFS = pytest.mark.skipif(XET, reason="the HTTP path of large files; this run takes Xet")


def files_of(folder: Path) -> dict[str, bytes | Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sha(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The repository `org/lora` with an adapter and what a training leaves; and a client that is not patient."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    beside = {"README.md": b"# A card", "optimizer.pt": b"o" * 5000, "adapter_model.bin": b"b" * 900}
    return hub.create_repo("org/lora", {**files_of(ADAPTER), **beside})


def downloads(hub: HubServer) -> list[str]:
    """The files that were asked for."""
    return sorted({each.path.partition("/resolve/")[2] for each in hub.logged("/resolve/")})


def test_only_what_the_format_needs_is_fetched_and_by_the_sha_alone(hub: HubServer, sha: str) -> None:
    found = fetch("org/lora")
    assert found.path == cache_folder() / "models--org--lora" / "snapshots" / sha
    assert downloads(hub) == [f"{sha}/adapter_config.json", f"{sha}/{WEIGHTS}"]
    assert {path.name for path in found.path.iterdir()} == {"adapter_config.json", WEIGHTS}
    assert (found.path / WEIGHTS).read_bytes() == (ADAPTER / WEIGHTS).read_bytes()
    assert found.name == f"org/lora@{sha}"
    assert sha[:12] in found.label


def test_the_cache_is_the_one_of_every_other_tool(hub: HubServer, sha: str) -> None:
    import huggingface_hub

    fetch("org/lora")
    asked = len(hub.requests)
    for revision in ("main", sha):
        path = huggingface_hub.hf_hub_download(
            "org/lora", WEIGHTS, revision=revision, cache_dir=cache_folder(), local_files_only=True
        )
        assert Path(path).read_bytes() == (ADAPTER / WEIGHTS).read_bytes()
    assert len(hub.requests) == asked
    (repository,) = huggingface_hub.scan_cache_dir(cache_folder()).repos
    assert repository.repo_id == "org/lora"
    assert {file.file_name for revision in repository.revisions for file in revision.files} == {
        "adapter_config.json",
        WEIGHTS,
    }


def test_what_another_tool_has_fetched_is_not_fetched_again(hub: HubServer, sha: str) -> None:
    import huggingface_hub

    huggingface_hub.hf_hub_download("org/lora", WEIGHTS, cache_dir=cache_folder(), endpoint=hub.endpoint)
    before = len(hub.logged(WEIGHTS))
    fetch("org/lora")
    assert len(hub.logged(WEIGHTS)) == before


def test_a_second_fetch_asks_for_the_sha_and_for_nothing_else(hub: HubServer, sha: str) -> None:
    fetch("org/lora")
    before = len(hub.requests)
    fetch("org/lora")
    assert [request.path.partition("?")[0] for request in hub.requests[before:]] == ["/api/models/org/lora"]


def test_a_branch_a_tag_a_sha_and_a_pull_request_name_their_own_commit(hub: HubServer, sha: str) -> None:
    hub.tag("org/lora", "v1", sha)
    hub.branch("org/lora", "feature/x")
    later = hub.commit("org/lora", {"adapter_config.json": b"{}"}, branch="feature/x")
    assert resolve("org/lora").sha == resolve("org/lora@v1").sha == resolve(f"org/lora@{sha}").sha == sha
    assert resolve("org/lora@feature/x").sha == later
    hub.repositories["org/lora"].refs["refs/pr/1"] = later
    assert resolve("hf://org/lora@refs/pr/1").sha == later
    assert fetch("org/lora", revision="v1").name == f"org/lora@{sha}"
    with pytest.raises(OptionError, match="give one of them"):
        fetch("org/lora@v1", revision="main")


def test_a_repository_that_moves_meanwhile_gives_the_files_of_one_commit(hub: HubServer, sha: str) -> None:
    found = resolve("org/lora")
    hub.commit("org/lora", {WEIGHTS: b"new", "adapter_config.json": b"new"})
    folder = download(found, choose_adapter_files(found))
    assert (folder / WEIGHTS).read_bytes() == (ADAPTER / WEIGHTS).read_bytes()
    assert (folder / "adapter_config.json").read_bytes() == (ADAPTER / "adapter_config.json").read_bytes()


def test_a_server_in_trouble_is_an_error_and_never_an_older_copy(
    hub: HubServer, sha: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.1)
    fetch("org/lora")
    hub.commit("org/lora", {WEIGHTS: b"new"})
    hub.faults.add("GET", "/api/models/org/lora", times=99)
    with pytest.raises(HubUnavailableError, match=rf"answers 503.*HF_HUB_OFFLINE=1.*{sha[:12]}"):
        fetch("org/lora")


def test_a_server_in_trouble_for_a_moment_is_asked_again(hub: HubServer, sha: str) -> None:
    hub.faults.add("GET", "/api/models/org/lora", status=503, times=2)
    hub.faults.add("GET", "/storage/", status=503, times=1)
    assert fetch("org/lora").path.is_dir()


def test_the_wait_that_a_server_asks_for_is_kept(hub: HubServer, sha: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", lambda seconds: waits.append(seconds) if seconds else None)
    hub.faults.add("GET", "/api/models/org/lora", status=429, headers={"Retry-After": "7"})
    resolve("org/lora")
    assert waits == [7.0]
    hub.faults.add("GET", "/api/models/org/lora", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(HubUnavailableError, match=r"429, too many requests.*in 3600 seconds"):
        resolve("org/lora")


@LFS
def test_a_download_that_was_cut_is_gone_on_with(hub: HubServer, sha: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.0)
    hub.faults.add("GET", "/storage/", status=509, times=99)
    with pytest.raises(HubUnavailableError, match="goes on from what is there"):
        fetch("org/lora")
    assert (CachedRepository("org/lora").snapshot(sha) / "adapter_config.json").exists()
    hub.faults.clear()
    before = len(hub.requests)
    assert (fetch("org/lora").path / WEIGHTS).exists()
    assert not [request for request in hub.requests[before:] if "adapter_config" in request.path]


@LFS
def test_a_connection_that_is_cut_in_a_file_goes_on_where_it_was_cut(hub: HubServer, sha: str) -> None:
    large = os.urandom(24 << 20)
    hub.create_repo("org/large", {"large.bin": large})
    hub.faults.add("GET", "/storage/", cut=15 << 20)
    path = download(resolve("org/large"), ["large.bin"]) / "large.bin"
    assert path.read_bytes() == large
    asked = [request.range for request in hub.logged("/storage/", "GET")]
    assert asked[0] is None
    assert int(asked[1].removeprefix("bytes=").rstrip("-")) >= 8 << 20


def test_a_file_in_the_cache_that_is_too_short_is_fetched_again(hub: HubServer, sha: str) -> None:
    path = fetch("org/lora").path / WEIGHTS
    os.truncate(path, 100)
    assert (fetch("org/lora").path / WEIGHTS).read_bytes() == (ADAPTER / WEIGHTS).read_bytes()


def test_progress_counts_every_byte_once(hub: HubServer, sha: str) -> None:
    seen: list[tuple[int, int]] = []
    hub.faults.add("GET", "/storage/", status=500)
    fetch("org/lora", on_progress=lambda done, total: seen.append((done, total)))
    whole = sum(path.stat().st_size for path in ADAPTER.iterdir())
    assert seen[-1] == (whole, whole)
    assert all(0 <= done <= total == whole for done, total in seen)


# Offline


def test_offline_the_cache_is_used_without_any_request(
    hub: HubServer, sha: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = fetch("org/lora")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.requests)
    assert fetch("org/lora") == fetch("org/lora@main") == fetch(f"org/lora@{sha}") == online
    assert fetch(f"org/lora@{sha[:9]}").path == online.path
    assert len(hub.requests) == asked


def test_offline_what_is_missing_is_named(hub: HubServer, sha: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch("org/lora").path / WEIGHTS
    path.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubNotFoundError, match=f"the cache lacks {WEIGHTS}"):
        fetch("org/lora")
    with pytest.raises(HubNotFoundError, match="the cache does not have v9"):
        fetch("org/lora@v9")
    with pytest.raises(HubNotFoundError, match="the cache does not have main"):
        fetch("org/other")


def test_offline_a_copy_that_another_tool_made_is_used_and_said_to_be_unchecked(
    hub: HubServer, sha: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    for name in ("adapter_config.json", WEIGHTS):
        huggingface_hub.hf_hub_download("org/lora", name, cache_dir=cache_folder(), endpoint=hub.endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = resolve("org/lora")
    assert (found.sha, found.offline, found.complete) == (sha, True, False)
    assert (fetch("org/lora").path / WEIGHTS).exists()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert cache_folder() == Path("/home/me/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "$HOME/cache")
    assert cache_folder() == Path("/home/me/cache")


# Models


def test_of_a_model_in_shards_those_that_the_index_names_are_fetched(hub: HubServer, sha: str) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 50 for n in (1, 2)}
    index = {"metadata": {"total_size": 1}, "weight_map": {f"t{n}": name for n, name in enumerate(shards)}}
    old = {"model-00001-of-00009.safetensors": b"old", "pytorch_model.bin": b"old"}
    hub.create_repo(
        "org/model", {**shards, **old, "config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    )
    folder = fetch("org/model", "model").path
    assert {path.name for path in folder.iterdir()} == {*shards, "config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("weight_map", "error"),
    [
        ({"t": "../../x"}, UnsafeFileError),
        ({"t": "gone.safetensors"}, HubNotFoundError),
        ({"t": 3}, ValueError),
        ([], ValueError),
    ],
)
def test_an_index_that_names_no_shard_of_the_repository_is_refused(
    hub: HubServer, sha: str, weight_map: object, error: type[Exception]
) -> None:
    index = json.dumps({"weight_map": weight_map}).encode()
    hub.create_repo("org/model", {"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(error, match=r"shard|weight_map"):
        fetch("org/model", "model")


# What goes wrong


def test_what_is_not_there_is_named(hub: HubServer, sha: str) -> None:
    cases = {
        "org/none": (HubNotFoundError, "there is no org/none here, and on the Hub there is no such repository"),
        "org/lora@none": (HubNotFoundError, "no branch, tag or commit none"),
        "hf://org/lora/none": (HubNotFoundError, "no file and no folder none"),
    }
    for address, (error, said) in cases.items():
        with pytest.raises(error, match=said):
            fetch(address)
    with pytest.raises(HubNotFoundError, match=r"has no file none\.txt"):
        download(resolve("org/lora"), ["none.txt"])


def test_a_repository_without_an_adapter_is_named_and_nothing_is_fetched(hub: HubServer, sha: str) -> None:
    hub.create_repo("org/empty", {"README.md": b"# Nothing"})
    with pytest.raises(UnknownFormatError, match=r"no adapter in it \(its files are README.md\)"):
        fetch("org/empty")
    assert not downloads(hub)


def test_private_and_gated_repositories_say_what_to_do(
    hub: HubServer, sha: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create_repo("org/secret", files_of(ADAPTER), private=True)
    hub.create_repo("org/gated", files_of(ADAPTER), gated=True)
    assert fetch("org/secret", token="hf_reader").path.is_dir()
    with pytest.raises(HubAccessError, match=r"gated. Ask for it at http://127.0.0.1:\d+/org/gated.*HF_TOKEN"):
        fetch("org/gated")
    hub.admitted.add("hf_writer")
    assert fetch("org/gated").path.is_dir()
    with pytest.raises(HubNotFoundError, match="or it is private"):
        fetch("org/secret", token="hf_outsider")
    with pytest.raises(HubAccessError, match="does not accept the token"):
        fetch("org/lora", token="hf_nobodys")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubNotFoundError, match="for a private one set HF_TOKEN, give --token"):
        fetch("org/secret")


@pytest.mark.parametrize("token", ["", " ", "a b", "a\nb", "ä"])
def test_what_cannot_be_a_token_is_refused_before_it_is_sent(hub: HubServer, sha: str, token: str) -> None:
    with pytest.raises(OptionError, match="token that was given is none"):
        fetch("org/lora", token=token)
    assert not hub.requests


def test_a_network_that_is_down_is_an_error_that_a_repetition_may_mend(
    sha: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.0)
    with hub.down(), pytest.raises(HubUnavailableError, match=r"the connection to .* fails"):
        fetch("org/lora")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnavailableError, match=r"127.0.0.1:9 fails"):
        fetch("org/lora")


def test_what_is_no_hub_is_said_to_be_none(sha: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.add("GET", "/api/models", status=418)
    with pytest.raises(HubError, match="answered 418"):
        resolve("org/lora")


def test_a_disk_that_is_full_is_found_before_anything_is_fetched(
    hub: HubServer, sha: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(DestinationError, match=r"1,000 are free.*HF_HUB_CACHE"):
        fetch("org/lora")
    assert not downloads(hub)


def test_a_cache_that_cannot_be_written_to_is_named(
    hub: HubServer, sha: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DestinationError, match=r"cannot write .*file"):
        fetch("org/lora")


# Hostile repositories


@pytest.mark.parametrize("name", ["../../../evil.txt", "/etc/evil", "a/../../evil", "a\\..\\..\\evil", "x\x1b[2J"])
def test_a_repository_with_path_like_names_is_refused_whole(hub: HubServer, sha: str, name: str) -> None:
    hub.create_repo("org/evil", {**files_of(ADAPTER), name: b"evil"})
    with pytest.raises(UnsafeFileError, match="outside its folder"):
        fetch("org/evil")
    assert not downloads(hub)


def test_a_link_in_the_cache_that_leads_out_of_it_is_refused(hub: HubServer, sha: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((ADAPTER / WEIGHTS).read_bytes())
    path = fetch("org/lora").path / WEIGHTS
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(UnsafeFileError, match="leads out of the cache"):
        fetch("org/lora")


def test_a_folder_of_the_cache_that_leads_out_of_it_is_not_written_to(hub: HubServer, sha: str, tmp_path: Path) -> None:
    hub.create_repo("org/below", {f"sub/{name}": content for name, content in files_of(ADAPTER).items()})
    outside = tmp_path / "outside"
    outside.mkdir()
    snapshot = CachedRepository("org/below").snapshot(hub.head("org/below"))
    snapshot.mkdir(parents=True)
    (snapshot / "sub").symlink_to(outside)
    with pytest.raises(UnsafeFileError, match="leads out of the cache"):
        fetch("org/below")
    assert not list(outside.iterdir())


@LFS
def test_a_repository_that_lies_on_another_disk_by_a_link_of_the_user_is_read(
    hub: HubServer, sha: str, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "big-disk"
    elsewhere.mkdir()
    cache_folder().mkdir()
    CachedRepository("org/lora").folder.symlink_to(elsewhere)
    assert (fetch("org/lora").path / WEIGHTS).exists()


# Secrets


def test_no_token_is_left_in_any_message_or_file(
    hub: HubServer, sha: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_verysecret"
    hub.tokens[secret] = "read"
    said = []
    fetch("org/lora", token=secret)
    monkeypatch.setattr(client, "PATIENCE", 0.0)
    for status in (400, 401, 403, 404, 418, 429, 500):
        hub.faults.add("GET", "/api/models", status=status, headers={"X-Error-Message": f"no {secret}"})
        with pytest.raises(HubError) as error:
            fetch("org/lora", token=secret)
        said += [str(error.value), repr(error.value), str(error.value.__cause__)]
    assert repr(resolve("org/lora", token=secret)).count(secret) == 0
    said += [*capfd.readouterr()]
    assert secret not in "".join(said)
    for path in tmp_path.rglob("*"):
        assert secret not in path.name
        if path.is_file():
            assert secret.encode() not in path.read_bytes()
    assert {each.token for each in hub.logged("/resolve/")} == {secret}
    assert {each.token for each in hub.logged("/storage/")} <= {None}  # another host, which must not see it


def test_the_client_says_nothing_of_its_own(
    hub: HubServer, sha: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.add("GET", "/storage/", cut=100)
    fetch("org/lora")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_an_adapter_that_was_fetched_reads_as_the_one_that_was_sent(hub: HubServer, sha: str) -> None:
    import adaptertools

    here, there = adaptertools.read(ADAPTER), adaptertools.read(fetch("org/lora"))
    assert isinstance(there, Adapter)
    assert {name: tensor.tolist() for name, tensor in here.named_tensors.items()} == {
        name: tensor.tolist() for name, tensor in there.named_tensors.items()
    }
