"""The Hub server of the tests, checked with the real client: whatever passes here is what the client believes."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hub_fixtures import XET
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LARGE = bytes(range(256)) * 1500
LFS = pytest.mark.skipif(XET, reason="the HTTP path of large files; this run takes Xet")


def client(hub: HubServer, token: str | bool = "hf_writer") -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def add(**files: bytes) -> list[CommitOperationAdd]:
    """Operations that add files; `_` in a keyword stands for a dot."""
    return [CommitOperationAdd(name.replace("_", "."), content) for name, content in files.items()]


def cached(api: HfApi, *args: str, **options: object) -> bytes:
    path = api.hf_hub_download(*args, cache_dir=os.environ["HF_HUB_CACHE"], **options)
    return Path(path).read_bytes()


def test_a_token_has_a_name_and_a_role(hub):
    access = client(hub, "hf_reader").whoami()
    assert (access["name"], access["auth"]["accessToken"]["role"]) == ("reader", "read")
    with pytest.raises(OSError, match=r"401|[Ii]nvalid"):
        client(hub, "hf_unknown").whoami()


def test_small_and_large_files_go_up_in_one_commit_and_come_down_again(hub):
    api = client(hub)
    api.create_repo("org/a")
    api.create_repo("org/a", exist_ok=True)
    created = hub.head("org/a")
    done = api.create_commit(
        "org/a", add(config_json=b"{}", model_safetensors=LARGE), commit_message="first", parent_commit=created
    )
    assert done.oid == hub.head("org/a")
    assert [title for _, title in hub.commits("org/a")] == ["first", "initial commit"]
    assert hub.files("org/a", done.oid) | {".gitattributes": b""} == {
        ".gitattributes": b"",
        "config.json": b"{}",
        "model.safetensors": LARGE,
    }
    assert cached(api, "org/a", "model.safetensors") == LARGE
    assert cached(api, "org/a", "config.json", revision=done.oid) == b"{}"
    assert [hub.blobs("org/a")[name].large for name in ("config.json", "model.safetensors")] == [False, True]


@LFS
def test_a_large_file_comes_from_another_origin_and_the_log_counts_its_bytes(hub):
    hub.create_repo("org/a", {"model.safetensors": LARGE})
    cached(client(hub), "org/a", "model.safetensors")
    assert hub.sent("^/storage/") == len(LARGE)
    assert hub.sent("resolve") == 0


@LFS
def test_files_above_the_size_of_a_part_go_up_in_parts(hub):
    hub.part_size = 100_000
    client(hub).create_repo("org/a")
    client(hub).create_commit("org/a", add(model_safetensors=LARGE), commit_message="parts")
    parts = hub.logged("^/storage/", "PUT")
    assert sorted(each.received for each in parts) == [84_000, 100_000, 100_000, 100_000]
    assert hub.files("org/a")["model.safetensors"] == LARGE


@LFS
def test_what_a_repository_holds_is_not_sent_to_it_again_but_to_another_it_is(hub):
    api = client(hub)
    for repo in ("org/a", "org/b"):
        api.create_repo(repo)
        api.create_commit(repo, add(model_safetensors=LARGE), commit_message="first")
        api.create_commit(repo, add(copy_safetensors=LARGE), commit_message="second")
    assert [each.received for each in hub.logged("^/storage/", "PUT")] == [len(LARGE)] * 2


def test_files_and_folders_are_deleted_and_the_past_stays(hub):
    before = hub.create_repo("org/a", {"a.json": b"1", "old/b.json": b"2", "older.json": b"3", "old/c.bin": LARGE})
    gone = [CommitOperationDelete("a.json"), CommitOperationDelete("old/")]
    client(hub).create_commit("org/a", gone, commit_message="less")
    assert list(hub.files("org/a")) == ["older.json"]
    assert len(hub.files("org/a", before)) == 4


def test_a_pull_request_leaves_the_branch_alone(hub):
    before = hub.create_repo("org/a", {"a.json": b"1"})
    done = client(hub, "hf_reader").create_commit("org/a", add(a_json=b"2"), commit_message="please", create_pr=True)
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert hub.head("org/a") == before
    assert cached(client(hub), "org/a", "a.json", revision="refs/pr/1") == b"2"
    assert hub.files("org/a", "refs/pr/1") == {"a.json": b"2"}


def test_branches_and_tags_are_made_listed_read_and_deleted(hub):
    api = client(hub)
    first = hub.create_repo("org/a", {"a.json": b"1"})
    api.create_tag("org/a", tag="v1")
    api.create_branch("org/a", branch="next/one", revision=first)
    api.create_commit("org/a", add(a_json=b"2"), commit_message="on the branch", revision="next/one")
    refs = api.list_repo_refs("org/a")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": first,
        "next/one": hub.head("org/a", "next/one"),
    }
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    assert cached(api, "org/a", "a.json", revision="v1") == b"1"
    assert cached(api, "org/a", "a.json", revision="next/one") == b"2"
    assert [each.title for each in api.list_repo_commits("org/a", revision="next/one")] == ["on the branch", "commit"]
    api.create_branch("org/a", branch="next/one", exist_ok=True)
    api.delete_tag("org/a", tag="v1")
    api.delete_branch("org/a", branch="next/one")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/a", revision="v1")


def test_300_files_are_one_commit_and_their_list_has_pages(hub):
    files = {f"part/{number:03}.json": b"%d" % number for number in range(300)}
    client(hub).create_repo("org/a")
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    client(hub).create_commit("org/a", operations, commit_message="all")
    assert len(hub.commits("org/a")) == 2
    listed = {each.path: each.size for each in client(hub).list_repo_tree("org/a", "part", recursive=True)}
    assert listed == {path: len(content) for path, content in files.items()}
    assert len(hub.logged("/tree/")) == 3


def test_sizes_and_hashes_are_told_in_every_listing(hub):
    sha = hub.create_repo("org/a", {"a.json": b"12", "sub/deep/model.safetensors": LARGE})
    api = client(hub)
    info = api.model_info("org/a", files_metadata=True)
    assert info.sha == sha
    assert {each.rfilename: each.size for each in info.siblings} == {
        "a.json": 2,
        "sub/deep/model.safetensors": len(LARGE),
    }
    (entry,) = api.get_paths_info("org/a", ["sub/deep/model.safetensors", "missing"])
    assert entry.lfs.sha256 == hub.blobs("org/a")["sub/deep/model.safetensors"].sha256
    assert [each.path for each in api.list_repo_tree("org/a")] == ["a.json", "sub"]
    assert [each.path for each in api.list_repo_tree("org/a", "sub", recursive=True)] == [
        "sub/deep",
        "sub/deep/model.safetensors",
    ]


def test_a_stale_parent_is_refused_and_changes_nothing(hub):
    stale = hub.create_repo("org/a", {"a.json": b"1"})
    hub.commit("org/a", {"b.json": b"2"})
    with pytest.raises(HfHubHTTPError, match="412"):
        client(hub).create_commit("org/a", add(a_json=b"3"), commit_message="late", parent_commit=stale)
    assert hub.files("org/a") == {"a.json": b"1", "b.json": b"2"}


def asked(url: str, token: str | None = "hf_writer", method: str = "GET", data: bytes | None = None, **headers: str):
    """A bare request. Gives status, headers and body."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if token:
        names["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data=data, headers=names, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_ranges_of_small_and_of_large_files(hub):
    hub.create_repo("org/a", {"a.json": b"0123456789", "m.safetensors": LARGE})
    small, large = (f"{hub.endpoint}/org/a/resolve/main/{name}" for name in ("a.json", "m.safetensors"))
    status, headers, body = asked(small, Range="bytes=2-4")
    assert (status, headers["Content-Range"], body) == (206, "bytes 2-4/10", b"234")
    assert asked(large, Range="bytes=256-511")[2] == LARGE[256:512]
    assert asked(large, Range="bytes=-6")[2] == LARGE[-6:]
    assert asked(large, Range="bytes=383990-")[2] == LARGE[-10:]
    assert asked(small, Range="bytes=10-")[0] == 416


@pytest.mark.parametrize(
    ("repo", "revision", "name", "token", "status", "code"),
    [
        ("org/a", "main", "a.json", None, 200, None),
        ("org/a", "main", "b.json", None, 404, "EntryNotFound"),
        ("org/a", "v9", "a.json", None, 404, "RevisionNotFound"),
        ("org/none", "main", "a.json", None, 401, "RepoNotFound"),
        ("org/none", "main", "a.json", "hf_reader", 404, "RepoNotFound"),
        ("org/secret", "main", "a.json", "hf_reader", 200, None),
        ("org/secret", "main", "a.json", None, 401, "RepoNotFound"),
        ("org/secret", "main", "a.json", "hf_outsider", 404, "RepoNotFound"),
        ("org/gated", "main", "a.json", None, 401, "GatedRepo"),
        ("org/gated", "main", "a.json", "hf_writer", 403, "GatedRepo"),
        ("org/gated", "main", "a.json", "hf_reader", 200, None),
        ("org/a", "main", "a.json", "hf_wrong", 401, None),
    ],
)
def test_who_may_read_what(hub, repo, revision, name, token, status, code):
    hub.admitted.add("hf_reader")
    hub.create_repo("org/a", {"a.json": b"1"})
    hub.create_repo("org/secret", {"a.json": b"1"}, private=True)
    hub.create_repo("org/gated", {"a.json": b"1"}, gated=True)
    answer = asked(f"{hub.endpoint}/{repo}/resolve/{revision}/{name}", token)
    assert (answer[0], answer[1]["X-Error-Code"]) == (status, code)
    if code == "EntryNotFound":
        assert answer[1]["X-Repo-Commit"] == hub.head("org/a")


def test_the_client_understands_the_refusals(hub):
    hub.create_repo("org/a", {"a.json": b"1"})
    hub.create_repo("org/gated", {"a.json": b"1"}, gated=True)
    assert client(hub).model_info("org/gated").gated
    for repo, name, expected in (
        ("org/none", "a.json", RepositoryNotFoundError),
        ("org/a", "b.json", EntryNotFoundError),
        ("org/gated", "a.json", GatedRepoError),
    ):
        with pytest.raises(expected):
            client(hub).hf_hub_download(repo, name, cache_dir=os.environ["HF_HUB_CACHE"])
    for token in ("hf_reader", "hf_outsider", False):
        with pytest.raises(HfHubHTTPError, match=r"40[13]"):
            client(hub, token).create_commit("org/a", add(a_json=b"2"), commit_message="no")
        with pytest.raises(HfHubHTTPError, match=r"40[13]"):
            client(hub, token).create_repo("org/new")
    assert hub.files("org/a") == {"a.json": b"1"}
    assert "org/new" not in hub.repositories


def test_a_commit_of_a_large_file_that_was_never_uploaded_is_refused_whole(hub):
    before = hub.create_repo("org/a", {"a.json": b"1"})
    lines = [
        {"key": "header", "value": {"summary": "half", "description": ""}},
        {"key": "file", "value": {"path": "a.json", "content": "Mg==", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "m.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 9}},
    ]
    data = b"\n".join(json.dumps(line).encode() for line in lines)
    url = f"{hub.endpoint}/api/models/org/a/commit/main"
    assert asked(url, method="POST", data=data, Content_Type="application/x-ndjson")[0] == 400
    assert (hub.head("org/a"), hub.files("org/a")) == (before, {"a.json": b"1"})


def test_a_card_whose_metadata_the_hub_would_refuse_is_refused(hub):
    hub.create_repo("org/a")
    for metadata, fits in (
        ("base_model: org/base\nlicense: mit", True),
        ("base_model: /models/base", False),
        ("base_model:\n- org/base\n- ./b", False),
        ("base_model: [", False),
        ("license: [MIT License]", False),
    ):
        card = add(README_md=f"---\n{metadata}\n---\nText.\n".encode())
        if fits:
            client(hub).create_commit("org/a", card, commit_message="card")
        else:
            with pytest.raises(ValueError, match=r"[Ii]nvalid metadata"):
                client(hub).create_commit("org/a", card, commit_message="card")
    assert len(hub.commits("org/a")) == 2


def test_a_fault_hits_as_many_requests_as_it_says_and_carries_its_headers(hub):
    hub.create_repo("org/a", {"a.json": b"1"})
    url = f"{hub.endpoint}/org/a/resolve/main/a.json"
    hub.faults.add("GET", "resolve/.*json", status=429, times=2, headers={"Retry-After": "7"})
    assert [asked(url)[0] for _ in range(3)] == [429, 429, 200]
    assert [each.status for each in hub.requests] == [429, 429, 200]
    hub.faults.add("*", "", status=500)
    status, headers, _ = asked(url)
    assert (status, headers["Retry-After"]) == (500, None)


def test_a_lost_answer_comes_after_the_work(hub):
    hub.create_repo("org/a", {"a.json": b"1"})
    for status in (503, None):
        hub.faults.add("POST", "/commit/", status=status, after=True)
        with pytest.raises(Exception, match=r"503|[Dd]isconnect|[Aa]bort|reset|closed"):
            client(hub).create_commit("org/a", add(a_json=b"%d" % (status or 0)), commit_message=f"lost {status}")
    hub.faults.add("POST", "/commit/")
    with pytest.raises(HfHubHTTPError, match="503"):
        client(hub).create_commit("org/a", add(a_json=b"never"), commit_message="refused")
    assert [title for _, title in hub.commits("org/a")] == ["lost None", "lost 503", "commit"]
    assert hub.files("org/a") == {"a.json": b"0"}


def test_connections_are_cut_where_the_fault_says_in_either_direction(hub):
    hub.create_repo("org/a", {"a.json": b"0123456789"})
    hub.faults.add("GET", "a.json", cut=4)
    with pytest.raises(Exception, match=r"IncompleteRead.4 bytes read, 6 more"):
        asked(f"{hub.endpoint}/org/a/resolve/main/a.json")
    hub.faults.add("PUT", "/storage/", cut=100_000)
    with pytest.raises(OSError, match=r"closed|reset|[Bb]roken"):
        asked(f"{hub.store}/storage/{'0' * 64}", method="PUT", data=LARGE)
    assert hub.sent("a.json") == 4
    assert 100_000 <= hub.received("/storage/") < len(LARGE) or not hub.failures


@LFS
def test_nobody_answers_while_the_server_is_down(hub):
    hub.create_repo("org/a", {"a.json": b"1"})
    url = f"{hub.endpoint}/org/a/resolve/main/a.json"
    with hub.down(), pytest.raises(OSError, match=r"closed|reset"):
        asked(url)
    assert asked(url)[0] == 200


def test_the_throttle_holds_in_both_directions(hub):
    hub.create_repo("org/a", {"a.txt": b"x" * 60_000})
    hub.throttle = 200_000
    started = time.monotonic()
    asked(f"{hub.endpoint}/org/a/resolve/main/a.txt")
    middle = time.monotonic()
    asked(f"{hub.store}/storage/{'0' * 64}", method="PUT", data=b"x" * 60_000)
    assert middle - started >= 0.3
    assert time.monotonic() - middle >= 0.3
    hub.throttle = None
    hub.faults.add("GET", "a.txt", status=0, delay=0.2)
    started = time.monotonic()
    assert asked(f"{hub.endpoint}/org/a/resolve/main/a.txt")[0] == 200
    assert time.monotonic() - started >= 0.2


def test_any_file_name_can_be_stored_for_hostile_repositories(hub):
    hub.create_repo("org/evil", {"../../up.json": b"1", "/etc/x": b"2", "a\\b": b"3"})
    listed = {each.rfilename for each in client(hub).model_info("org/evil").siblings}
    assert listed == {"../../up.json", "/etc/x", "a\\b"}


XET_BOTH_WAYS = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
api, cache, content = HfApi(), sys.argv[1], bytes(range(256)) * 20_000
files = {"m.safetensors": content, "n.safetensors": content + b"more", "a.json": b"{}"}
api.create_repo("org/b")
api.create_commit("org/b", [CommitOperationAdd(*file) for file in files.items()], commit_message="xet")
for repo, given in (("org/b", files), ("org/a", {"m.safetensors": content})):
    for name, expected in given.items():
        assert open(api.hf_hub_download(repo, name, cache_dir=cache), "rb").read() == expected, name
"""


def test_xet_carries_large_files_both_ways(tmp_path):
    content = bytes(range(256)) * 20_000
    with HubServer(xet=True) as hub:
        hub.create_repo("org/a", {"m.safetensors": content})
        env = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "0",
            "HF_TOKEN": "hf_writer",
            "HF_HOME": str(tmp_path),
        }
        command = [sys.executable, "-c", XET_BOTH_WAYS, str(tmp_path / "cache")]
        subprocess.run(command, env=os.environ | env, check=True, capture_output=True, text=True, timeout=120)
        assert hub.files("org/b")["n.safetensors"] == content + b"more"
        assert hub.logged("xet-write-token")
        assert hub.logged("xet-read-token")
        assert hub.logged("^/storage/") == []
        assert hub.failures == []


def test_the_client_takes_the_path_that_the_environment_names():
    assert XET != constants.HF_HUB_DISABLE_XET
