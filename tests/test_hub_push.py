"""Commits on the Hub: large files first, then one commit, whatever goes wrong on the way."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hub_cases import files_of, repositories
from hub_fixtures import XET
from hub_server import HubServer

import adaptertools
from adaptertools import api
from adaptertools.errors import (
    HubAccessError,
    HubError,
    HubMovedError,
    HubNotFoundError,
    HubUnavailableError,
    OptionError,
    SourceNotFoundError,
)
from adaptertools.hub.address import parse_address
from adaptertools.hub.commit import ATTEMPTS, Commit
from adaptertools.hub.sent import Sent

pytestmark = pytest.mark.usefixtures("impatient")
LFS = pytest.mark.skipif(XET, reason="the HTTP path of large files; this run takes Xet")
WEIGHTS = b"\x00\x01" * 5000
COMMIT = r"/commit/"


def begin(address: str = "me/new", **options) -> Commit:
    return Commit.open(parse_address(address), **options)


def transfers(hub: HubServer) -> int:
    """How often bytes of large files were on their way, by either protocol."""
    return len(hub.logged("xet-write-token")) if XET else hub.received("^/storage/", "PUT")


def titles(hub: HubServer, name: str = "me/new", branch: str = "main") -> list[str]:
    return [title for _, title in hub.commits(name, branch)]


def test_nothing_shows_before_the_commit_and_then_everything_does_in_one(hub: HubServer) -> None:
    commit = begin()
    before = repositories(hub)
    sent = commit.add_all({"a.safetensors": WEIGHTS, "config.json": b"{}"})
    assert [each.uploaded for each in sent] == [True, False]
    assert transfers(hub) > 0
    assert repositories(hub) == before
    done = commit.finish("both", "in one")
    assert titles(hub) == ["both", "initial commit"]
    assert done.sha == hub.head("me/new")
    assert hub.files("me/new")["a.safetensors"] == WEIGHTS
    assert hub.files("me/new")["config.json"] == b"{}"
    assert done.url == f"{hub.endpoint}/me/new/commit/{done.sha}"


def test_three_hundred_files_become_one_commit(hub: HubServer) -> None:
    files = {f"folder/{index:03}.safetensors": b"%d" % index * 50 for index in range(20)}
    files |= {f"folder/{index:03}.json": b"%d" % index for index in range(280)}
    commit = begin()
    commit.add_all(files)
    commit.finish("many")
    assert titles(hub) == ["many", "initial commit"]
    assert {name: content for name, content in hub.files("me/new").items() if "/" in name} == files


def test_a_file_may_go_as_soon_as_it_is_uploaded(hub: HubServer, tmp_path: Path) -> None:
    commit = begin()
    path = tmp_path / "shard.safetensors"
    path.write_bytes(WEIGHTS)
    assert commit.add("shard.safetensors", path).uploaded
    path.unlink()
    commit.finish("gone here, there on the Hub")
    assert hub.files("me/new")["shard.safetensors"] == WEIGHTS


def test_a_later_run_commits_what_an_earlier_one_uploaded(hub: HubServer) -> None:
    first = begin()
    said = json.dumps(first.add("shard.safetensors", WEIGHTS).to_json())
    count = transfers(hub)
    second = begin(parent=first.parent)
    second.resume(Sent.from_json(json.loads(said)))
    second.add("config.json", b"{}")
    second.finish("resumed")
    assert transfers(hub) == count
    assert hub.files("me/new")["shard.safetensors"] == WEIGHTS
    assert titles(hub) == ["resumed", "initial commit"]


def test_what_was_resumed_survives_a_lost_answer(hub: HubServer) -> None:
    sent = begin().add("shard.safetensors", WEIGHTS)
    commit = begin()
    commit.resume(sent)
    hub.faults.add("POST", COMMIT, status=None, after=True)
    done = commit.finish("resumed")
    assert titles(hub) == ["resumed", "initial commit"]
    assert done.sha == hub.head("me/new")


def test_a_file_that_was_resumed_and_stands_there_already_makes_no_commit(hub: HubServer) -> None:
    commit = begin()
    sent = commit.add("shard.safetensors", WEIGHTS)
    head = commit.finish("first").sha
    again = begin()
    again.resume(sent)
    done = again.finish("second")
    assert (done.changed, done.sha) == (False, head)
    assert titles(hub) == ["first", "initial commit"]


def test_a_small_file_cannot_be_resumed_since_nobody_has_its_bytes(hub: HubServer) -> None:
    sent = begin().add("config.json", b"{}")
    with pytest.raises(OptionError, match="add it again"):
        begin().resume(sent)


def test_a_resumed_run_on_a_branch_that_moved_is_told_so(hub: HubServer) -> None:
    parent = begin().parent
    hub.commit("me/new", {"other.txt": b"1"})
    with pytest.raises(HubMovedError, match="nothing was committed"):
        begin(parent=parent)


@pytest.mark.parametrize("status", [None, 503, 500])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: HubServer, status: int | None) -> None:
    commit = begin()
    commit.add_all({"a.safetensors": WEIGHTS, "config.json": b"{}"})
    hub.faults.add("POST", COMMIT, status=status, after=True)
    done = commit.finish("once")
    assert titles(hub) == ["once", "initial commit"]
    assert done.sha == hub.head("me/new")
    assert done.changed


def test_a_commit_whose_answer_is_lost_is_known_though_others_went_on_from_it(hub: HubServer) -> None:
    commit = begin()
    commit.add("config.json", b"{}")
    hub.faults.add("POST", COMMIT, status=503, after=True)
    theirs = partial(hub.commit, "me/new", {"other.txt": b"1"}, title="theirs")
    hub.faults.add("GET", "/refs", status=0, do=theirs)
    done = commit.finish("mine")
    assert titles(hub) == ["theirs", "mine", "initial commit"]
    assert done.sha == hub.commits("me/new")[1][0]


@pytest.mark.parametrize("status", [None, 502, 503, 429])
def test_a_commit_that_was_not_made_is_tried_again(hub: HubServer, status: int | None) -> None:
    commit = begin()
    commit.add_all({"a.safetensors": WEIGHTS, "config.json": b"{}"})
    hub.faults.add("POST", COMMIT, status=status, times=2)
    commit.finish("at last")
    assert titles(hub) == ["at last", "initial commit"]
    assert len(hub.logged(COMMIT, "POST")) == 3


def test_the_wait_that_the_hub_asks_for_is_kept(hub: HubServer) -> None:
    commit = begin()
    commit.add("config.json", b"{}")
    hub.faults.add("POST", COMMIT, status=429, headers={"Retry-After": "0.4"})
    commit.finish("later")
    first, second = hub.logged(COMMIT, "POST")
    assert second.started - first.ended >= 0.4
    late = begin()
    late.add("config.json", b"[]")
    hub.faults.add("POST", COMMIT, status=429, headers={"Retry-After": "3600"})
    with pytest.raises(HubUnavailableError, match="3600 seconds"):
        late.finish("never")


def test_an_answer_that_is_none_of_the_hubs_is_looked_behind(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = begin()
    commit.add("config.json", b"{}")
    answer = hub.api.answer

    def garbled(method, parts, *rest):
        made = answer(method, parts, *rest)
        return replace(made, body=b"<html>", length=6) if "commit" in parts else made

    monkeypatch.setattr(hub.api, "answer", garbled)  # the server's side; the client is as it is
    assert commit.finish("once").sha == hub.head("me/new")
    assert titles(hub) == ["once", "initial commit"]


def test_a_hub_that_takes_no_commit_is_given_up_and_the_next_run_sends_no_large_file(hub: HubServer) -> None:
    commit = begin()
    commit.add("a.safetensors", WEIGHTS)
    hub.faults.add("POST", COMMIT, status=503, times=ATTEMPTS)
    with pytest.raises(HubUnavailableError, match="503"):
        commit.finish("never")
    assert titles(hub) == ["initial commit"]
    count = transfers(hub)
    again = begin()
    again.add("a.safetensors", WEIGHTS)
    again.finish("now")
    assert titles(hub) == ["now", "initial commit"]
    if not XET:  # Xet looks for each piece by itself
        assert transfers(hub) == count


def test_someone_elses_commit_meanwhile_is_an_error_that_says_so(hub: HubServer) -> None:
    commit = begin()
    commit.add_all({"a.safetensors": WEIGHTS, "config.json": b"{}"})
    theirs = hub.commit("me/new", {"config.json": b"[]"}, title="theirs")
    with pytest.raises(HubMovedError) as raised:
        commit.finish("mine")
    assert commit.parent[:12] in str(raised.value)
    assert theirs[:12] in str(raised.value)
    assert titles(hub) == ["theirs", "initial commit"]
    assert len(hub.logged(COMMIT, "POST")) == 1


def test_someone_elses_commit_is_not_taken_for_ours_when_the_hub_fails(hub: HubServer) -> None:
    commit = begin()
    commit.add("config.json", b"{}")
    hub.commit("me/new", {"other.json": b"{}"}, title="theirs")
    hub.faults.add("POST", COMMIT, status=503)
    with pytest.raises(HubMovedError, match="moved on meanwhile"):
        commit.finish("mine")
    assert titles(hub) == ["theirs", "initial commit"]


@pytest.mark.parametrize(
    ("method", "path", "after"),
    [
        ("POST", "/api/repos/create", False),
        ("POST", "/api/repos/create", True),
        ("POST", "/preupload/", False),
        ("GET", "/refs", False),
        ("GET", "/tree/", False),
    ],
)
def test_a_hub_that_stumbles_on_the_way_is_waited_for(hub: HubServer, method: str, path: str, after: bool) -> None:
    hub.faults.add(method, path, status=503, after=after)
    commit = begin()
    commit.add_all({"a.safetensors": WEIGHTS, "config.json": b"{}"})
    commit.finish("whole")
    assert titles(hub) == ["whole", "initial commit"]
    assert hub.files("me/new")["a.safetensors"] == WEIGHTS
    assert not any(fault.times for fault in hub.faults.pending)


@LFS
@pytest.mark.parametrize(("status", "cut"), [(500, None), (None, None), (503, 4000)])
def test_an_upload_that_breaks_is_repeated(hub: HubServer, status: int | None, cut: int | None) -> None:
    commit = begin()
    hub.faults.add("PUT", "^/storage/", status=status, cut=cut)
    assert commit.add("a.safetensors", WEIGHTS).uploaded
    commit.finish("whole")
    assert hub.files("me/new")["a.safetensors"] == WEIGHTS
    assert not any(fault.times for fault in hub.faults.pending)


@pytest.mark.slow  # the client itself waits 20 seconds
def test_without_a_network_nothing_is_half_there(hub: HubServer) -> None:
    commit = begin()
    with hub.down(), pytest.raises(HubUnavailableError):
        commit.add("a.safetensors", WEIGHTS)
    commit.add("a.safetensors", WEIGHTS)
    commit.finish("whole")
    assert titles(hub) == ["whole", "initial commit"]


def test_what_stands_there_already_is_not_sent_again(hub: HubServer) -> None:
    first = begin()
    first.add_all({"a.safetensors": WEIGHTS, "config.json": b"{}"})
    head = first.finish("first").sha
    hub.requests.clear()
    second = begin()
    second.add_all({"a.safetensors": WEIGHTS, "config.json": b"{}"})
    done = second.finish("second")
    assert (done.changed, done.sha) == (False, head)
    assert second.unchanged == ["a.safetensors", "config.json"]
    assert transfers(hub) == 0
    assert not hub.logged(COMMIT)
    third = begin()
    third.add_all({"a.safetensors": WEIGHTS, "config.json": b"[]"})
    third.finish("third")
    assert list(third.added) == ["config.json"]
    assert transfers(hub) == 0
    assert titles(hub) == ["third", "first", "initial commit"]
    assert hub.files("me/new")["a.safetensors"] == WEIGHTS


def test_files_are_taken_out_in_the_same_commit(hub: HubServer) -> None:
    hub.create_repo("me/new", {"old.json": b"1", "kept.json": b"2"})
    commit = begin()
    commit.delete("old.json")
    commit.delete("never.json")
    commit.add("new.json", b"3")
    hub.faults.add("POST", COMMIT, status=None, after=True)
    commit.finish("replaced")
    assert titles(hub) == ["replaced", "commit"]
    assert {"kept.json", "new.json"} == set(hub.files("me/new")) - {".gitattributes"}


def test_a_folder_in_a_repository_is_written_to_alone(hub: HubServer) -> None:
    hub.create_repo("me/new", {"config.json": b"1", "sub/config.json": b"2", "subway/config.json": b"3"})
    commit = begin("hf://me/new/sub")
    assert set(commit.files) == {"config.json"}
    commit.add("a.safetensors", WEIGHTS)
    commit.delete("config.json")
    commit.finish("inside")
    files = set(hub.files("me/new"))
    assert files == {"config.json", "sub/a.safetensors", "subway/config.json"}


def test_a_file_in_a_repository_is_no_folder(hub: HubServer) -> None:
    hub.create_repo("me/new", {"sub/a.json": b"1"})
    with pytest.raises(OptionError, match="is a file"):
        begin("hf://me/new/sub/a.json")


def test_a_branch_is_made_from_main_and_main_stays(hub: HubServer) -> None:
    main = hub.create_repo("me/new", {"config.json": b"1"})
    commit = begin("me/new@next/one")
    commit.add("a.safetensors", WEIGHTS)
    commit.finish("on a branch")
    assert hub.head("me/new") == main
    assert titles(hub, branch="next/one") == ["on a branch", "commit"]


def test_a_tag_and_a_commit_are_no_branches(hub: HubServer) -> None:
    sha = hub.create_repo("me/new", {"config.json": b"1"})
    hub.tag("me/new", "v1", sha)
    for revision, word in (("v1", "tag"), (sha, "commit")):
        with pytest.raises(OptionError, match=f"a {word} is never"):
            begin(f"me/new@{revision}")
    assert repositories(hub)["me/new"] == {"refs/heads/main": sha, "refs/tags/v1": sha}


def test_a_pull_request_leaves_the_branch_as_it_is(hub: HubServer) -> None:
    main = hub.create_repo("me/new", {"config.json": b"1"})
    commit = begin(create_pr=True)
    commit.add_all({"a.safetensors": WEIGHTS, "config.json": b"2"})
    done = commit.finish("proposed")
    assert hub.head("me/new") == main
    assert done.pull_request == f"{hub.endpoint}/me/new/discussions/1"
    assert repositories(hub)["me/new"]["refs/pr/1"] == done.sha
    assert hub.files("me/new", "refs/pr/1")["config.json"] == b"2"


@pytest.mark.parametrize("after", [False, True])
def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub: HubServer, after: bool) -> None:
    hub.create_repo("me/new", {"config.json": b"1"})
    first = begin(create_pr=True)
    first.add("config.json", b"2")
    first.finish("an earlier one")
    commit = begin(create_pr=True)
    commit.add_all({"a.safetensors": WEIGHTS, "config.json": b"2"})
    hub.faults.add("POST", COMMIT, status=503, after=after)
    done = commit.finish("proposed")
    assert done.pull_request == f"{hub.endpoint}/me/new/discussions/2"
    assert set(repositories(hub)["me/new"]) == {"refs/heads/main", "refs/pr/1", "refs/pr/2"}


def test_a_pull_request_can_be_gone_on_with(hub: HubServer) -> None:
    hub.create_repo("me/new", {"config.json": b"1"})
    first = begin(create_pr=True)
    first.add("config.json", b"2")
    first.finish("proposed")
    commit = begin("hf://me/new@refs/pr/1")
    commit.add("config.json", b"3")
    commit.finish("better")
    assert hub.files("me/new", "refs/pr/1")["config.json"] == b"3"
    with pytest.raises(HubNotFoundError, match="no such pull request"):
        begin("hf://me/new@refs/pr/7")


def test_a_pull_request_to_a_repository_that_is_not_there_makes_none(hub: HubServer) -> None:
    with pytest.raises(HubNotFoundError, match="pull request"):
        begin(create_pr=True)
    assert not hub.repositories


def test_a_new_repository_is_private_where_that_is_asked_for(hub: HubServer) -> None:
    begin("me/secret", private=True)
    begin("me/open")
    assert hub.repositories["me/secret"].private
    assert not hub.repositories["me/open"].private
    begin("me/secret", private=True)
    with pytest.raises(OptionError, match="everyone can see it"):
        begin("me/open", private=True)


@pytest.mark.parametrize("token", ["hf_reader", "hf_outsider"])
def test_a_token_that_may_not_write_is_refused_before_anything_is_sent(hub: HubServer, token: str) -> None:
    hub.create_repo("org/theirs", {"config.json": b"1"})
    for name in ("org/theirs", "org/new"):
        with pytest.raises(HubAccessError) as raised:
            begin(name, token=token)
        assert token not in str(raised.value)
    assert transfers(hub) == 0
    assert set(hub.repositories) == {"org/theirs"}


def test_a_wrong_token_and_none_at_all_are_told_apart(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubAccessError, match="does not accept the token"):
        begin(token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(Path(os.environ["HF_HUB_CACHE"]).parent))
    with pytest.raises(HubAccessError, match="hf auth login"):
        begin()


def test_offline_nothing_can_be_sent(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*: unset it") as raised:
        begin()
    assert not isinstance(raised.value, HubUnavailableError)  # which says that the same call may go through later
    assert not hub.requests


def test_a_trial_changes_nothing_and_knows_what_would_change(hub: HubServer) -> None:
    hub.create_repo("me/new", {"config.json": b"1", "same.json": b"2"})
    hub.requests.clear()
    commit = begin(trial=True)
    commit.add_all({"a.safetensors": WEIGHTS, "config.json": b"2", "same.json": b"2"})
    assert commit.added == {"a.safetensors": len(WEIGHTS), "config.json": 1}
    assert commit.unchanged == ["same.json"]
    assert commit.finish("never").sha is None
    fresh = begin("me/none", trial=True)
    assert fresh.created
    fresh.add("config.json", b"1")
    assert {request.method for request in hub.requests} == {"GET"}
    assert set(hub.repositories) == {"me/new"}


def test_a_file_that_is_not_here_is_said_by_name(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="none"):
        begin().add("none.json", tmp_path / "none.json")


def test_every_page_of_a_large_repository_is_looked_at(hub: HubServer) -> None:
    hub.page = 7
    files = {f"{index:02}.json": b"%d" % index for index in range(30)}
    hub.create_repo("me/new", files)
    commit = begin()
    commit.add_all(files)
    assert len(commit.unchanged) == 30
    assert not commit.finish("nothing").changed


@pytest.mark.parametrize(
    ("format", "container"),
    [
        ("peft", "safetensors"),
        ("flax", "msgpack"),
        ("flax", "npz"),
        ("flax", "safetensors"),
        ("flax", "orbax"),
        ("loralib", "safetensors"),
        ("loralib", "torch"),
    ],
)
def test_every_format_comes_back_from_the_hub_as_it_went(
    hub: HubServer, plain: adaptertools.Adapter, tmp_path: Path, format: str, container: str
) -> None:
    from adaptertools import formats
    from adaptertools.hub.download import fetch

    name = "adapter" if formats.get(format).FOLDER else "lora.pt"
    written = adaptertools.write(plain, tmp_path / name, format=format, container=container)
    report = api.push(written.path, "me/new")
    assert report.format == format
    place = fetch("me/new", allow_pickle=True)
    back = adaptertools.read(place)
    assert place.name.startswith(f"me/new@{report.sha}")
    assert len(back.modules) == len(plain.modules)
    for new, old in zip(back.modules, adaptertools.read(written.path).modules, strict=True):
        assert (new.delta_weight() == old.delta_weight()).all()


def test_a_folder_goes_without_what_stays_here(hub: HubServer, peft_folder: Path) -> None:
    (peft_folder / ".env").write_text("SECRET=1")
    (peft_folder / ".cache").mkdir()
    (peft_folder / ".cache" / "x").write_text("x")
    (peft_folder / "checkpoint-10").mkdir()
    (peft_folder / "checkpoint-10" / "adapter_model.safetensors").write_text("x")
    for name in ("optimizer.pt", "training_args.bin", "notes.txt", "adapter_model.bin"):
        (peft_folder / name).write_bytes(b"x")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        (peft_folder / name).write_text("{}")
    report = api.push(peft_folder, "me/new")
    sent = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
    assert set(hub.files("me/new")) - {".gitattributes"} == sent | {"README.md"}
    assert dict(report.left_out) == {
        ".cache/": "hidden",
        ".env": "hidden",
        "adapter_model.bin": "a second copy of the weights",
        "checkpoint-10/": "state of training",
        "notes.txt": "no part of it",
        "optimizer.pt": "state of training",
        "training_args.bin": "state of training",
    }


def test_files_of_an_earlier_version_are_replaced_and_others_stay(hub: HubServer, peft_folder: Path) -> None:
    old = {"adapter_model.bin": b"x", "adapter_config.json": b"{}", "image.png": b"x", "flax_adapter.msgpack": b"x"}
    hub.create_repo("me/new", old)
    report = api.push(peft_folder, "me/new")
    assert report.removed == ("adapter_model.bin",)
    left = {"adapter_config.json", "adapter_model.safetensors", "image.png", "flax_adapter.msgpack", "README.md"}
    assert set(hub.files("me/new")) == left
    assert any("another format (flax" in note for note in report.notes)
    assert hub.files("me/new")["adapter_config.json"] == (peft_folder / "adapter_config.json").read_bytes()


def test_a_snapshot_of_links_is_sent_as_the_files_that_they_lead_to(
    hub: HubServer, peft_folder: Path, tmp_path: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for path in peft_folder.iterdir():
        (links / path.name).symlink_to(path)
    api.push(links, "me/new")
    for name, content in files_of(peft_folder).items():
        assert hub.files("me/new")[name] == content


def test_progress_ends_with_all_bytes(hub: HubServer, peft_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    api.push(peft_folder, "me/new", on_progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1] >= sum(path.stat().st_size for path in peft_folder.iterdir())
