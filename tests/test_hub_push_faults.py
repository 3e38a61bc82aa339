"""Writing to the Hub when something is wrong: one clear line, the right exit code, and all of it visible or nothing."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_cases import assert_one_line, files_of, repositories, wide
from hub_fixtures import XET
from hub_server import HubServer

from adaptertools.cli import group

LFS = pytest.mark.skipif(XET, reason="the HTTP path of large files; this run takes Xet")
SOMEONE = {"notes.md": b"someone else's"}


@pytest.fixture
def stocked(hub: HubServer) -> HubServer:
    """A Hub with a repository to push to, and one that only its members see."""
    hub.create_repo("org/there", {"notes.md": b"kept"})
    hub.create_repo("org/private", private=True)
    return hub


@pytest.mark.parametrize(
    ("repo", "said"),
    [
        ("org/na..me", ["org/na..me", "org/name"]),
        ("hf://org/-name", ["hf://org/-name", "org/name"]),
        ("org/" + "n" * 97, ["org/name"]),
        ("https://example.com/org/name", ["example.com"]),
        ("org/there@" + "0" * 40, ["names a commit", "branch"]),
        ("org/there@v1", ["names a tag", "branch"]),
    ],
)
def test_what_is_no_place_to_push_to_is_said_before_anything_is_sent(stocked, tool, peft_folder, repo, said):
    stocked.tag("org/there", "v1")
    before = repositories(stocked)
    assert_one_line(tool("push", peft_folder, repo), 2, *said)
    assert repositories(stocked) == before
    assert not [each for each in stocked.requests if each.method != "GET"]


@pytest.mark.parametrize("repo", ["org/there", "org/new"])
@pytest.mark.parametrize(
    ("given", "env", "said"),
    [
        ([], "hf_reader", "token"),
        ([], "hf_outsider", "token"),
        ([], "hf_wrong", "does not accept the token"),
        ([], "", "HF_TOKEN"),
        (["--token", "hf_reader"], "hf_writer", "token"),
        (["--token", "hf_wrong"], "hf_writer", "does not accept the token"),
    ],
)
def test_without_the_right_to_write_nothing_changes(stocked, tool, peft_folder, repo, given, env, said):
    before = repositories(stocked)
    assert_one_line(tool("push", peft_folder, repo, *given, HF_TOKEN=env), 1, said)
    assert repositories(stocked) == before
    assert not stocked.logged("^/storage/", "PUT")


def test_a_private_repository_that_this_token_does_not_see_is_not_overwritten(stocked, tool, peft_folder):
    before = repositories(stocked)
    assert_one_line(tool("push", peft_folder, "org/private", HF_TOKEN="hf_outsider"), 1)
    assert repositories(stocked) == before


def test_what_is_no_adapter_is_refused_before_a_repository_is_made(stocked, tool, tmp_path):
    (folder := tmp_path / "text").mkdir()
    (folder / "README.md").write_text("words")
    before = repositories(stocked)
    for source in (folder, tmp_path / "none"):
        assert_one_line(tool("push", source, "org/new"), 1)
    assert repositories(stocked) == before


def test_without_a_network_the_command_can_be_tried_again(stocked, tool, peft_folder):
    before = repositories(stocked)
    with stocked.down():
        assert_one_line(tool("push", peft_folder, "org/there"), 3, stocked.endpoint, "repeat")
    assert_one_line(tool("push", peft_folder, "org/there", HF_ENDPOINT="http://127.0.0.1:9"), 3, "127.0.0.1:9")
    assert repositories(stocked) == before
    assert tool("push", peft_folder, "org/there").code == 0


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("path", ["repos/create", "/refs", "/commit/"])
def test_a_server_that_goes_on_failing_can_be_tried_again(stocked, tool, peft_folder, path, status):
    repo = "org/new" if path == "repos/create" else "org/there"
    stocked.faults.add("*", path, status=status, times=1000)
    before = repositories(stocked)
    assert_one_line(tool("push", peft_folder, repo), 3, str(status), "repeat")
    assert repositories(stocked) == before
    stocked.faults.clear()
    assert tool("push", peft_folder, repo).code == 0
    assert len(stocked.commits(repo)) == 2


@pytest.mark.parametrize("status", [429, 503, None])
@pytest.mark.parametrize("path", ["repos/create", "/refs", "preupload", "/commit/"])
def test_a_server_that_fails_for_a_while_is_waited_for_and_one_commit_is_made(stocked, tool, peft_folder, path, status):
    stocked.faults.add("*", path, status=status, headers={"Retry-After": "0"})
    ran = tool("push", peft_folder, "org/new")
    assert ran.code == 0, ran.err
    assert len(stocked.commits("org/new")) == 2  # the first is the repository's own
    pushed = stocked.files("org/new")
    assert {name: pushed[name] for name in files_of(peft_folder)} == files_of(peft_folder)


@LFS
@pytest.mark.parametrize("cut", [1_000_000, None])
def test_an_upload_that_breaks_off_is_repeated_or_leaves_nothing_visible(stocked, tool, tmp_path, cut):
    folder = wide(tmp_path)
    before = repositories(stocked)
    stocked.faults.add("PUT", "^/storage/", cut=cut, status=None, times=1)
    ran = tool("push", folder, "org/there")
    if ran.code:
        assert_one_line(ran, 3, "repeat")
        assert repositories(stocked) == before
        assert tool("push", folder, "org/there").code == 0
    assert len(stocked.commits("org/there")) == 2
    pushed = stocked.files("org/there")
    assert {name: pushed[name] for name in files_of(folder)} == files_of(folder)


@LFS
def test_what_was_uploaded_before_the_failure_is_not_sent_again(stocked, tool, tmp_path):
    folder = wide(tmp_path)
    stocked.faults.add("POST", "/commit/", status=503, times=1000)
    assert_one_line(tool("push", folder, "org/there"), 3, "503")
    sent = stocked.received("^/storage/")
    assert sent >= 25_000_000
    stocked.faults.clear()
    assert tool("push", folder, "org/there").code == 0
    assert stocked.received("^/storage/") == sent


@pytest.mark.parametrize("status", [503, 500, None])
def test_a_commit_whose_answer_is_lost_is_made_once(stocked, tool, peft_folder, status):
    stocked.faults.add("POST", "/commit/", status=status, after=True)
    ran = tool("push", peft_folder, "org/there", "--message", "the adapter", "--json")
    assert ran.code == 0, ran.err
    assert [title for _, title in stocked.commits("org/there")] == ["the adapter", "commit"]
    assert stocked.head("org/there") in ran.out
    assert len(stocked.logged("/commit/", "POST")) == 1


@pytest.mark.parametrize("status", [503, None])
def test_a_pull_request_whose_answer_is_lost_is_opened_once(stocked, tool, peft_folder, status):
    stocked.faults.add("POST", "/commit/", status=status, after=True)
    ran = tool("push", peft_folder, "org/there", "--create-pr")
    assert ran.code == 0, ran.err
    assert sorted(repositories(stocked)["org/there"]) == ["refs/heads/main", "refs/pr/1"]
    assert "/org/there/discussions/1" in ran.out


def test_a_lost_answer_with_someone_elses_commit_after_it_is_still_recognised(stocked, tool, peft_folder):
    stocked.faults.add("POST", "/commit/", status=503, after=True)
    stocked.faults.add("*", "/refs", status=0, times=1)
    stocked.faults.add("*", "/refs", status=0, do=lambda: stocked.commit("org/there", SOMEONE, title="theirs"))
    ran = tool("push", peft_folder, "org/there", "--message", "ours")
    assert ran.code == 0, ran.err
    assert sorted(title for _, title in stocked.commits("org/there")) in (
        ["commit", "ours", "theirs"],
        ["commit", "ours"],
    )


@pytest.mark.parametrize("status", [0, 503])
def test_a_branch_that_moved_meanwhile_is_an_error_and_nothing_is_committed(stocked, tool, peft_folder, status):
    move = {"do": lambda: stocked.commit("org/there", SOMEONE, title="theirs")}
    stocked.faults.add("POST", "/commit/", status=status, **move)
    assert_one_line(tool("push", peft_folder, "org/there"), 1, "org/there", "moved", "again")
    assert [title for _, title in stocked.commits("org/there")] == ["theirs", "commit"]
    assert stocked.files("org/there") == SOMEONE
    assert tool("push", peft_folder, "org/there").code == 0
    assert stocked.files("org/there")["notes.md"] == SOMEONE["notes.md"]


def test_a_push_is_one_commit_on_top_of_what_it_saw(stocked, tool, peft_folder):
    sent = []
    parent = stocked.head("org/there")
    stocked.faults.add("POST", "/commit/", status=0, do=lambda: sent.append(repositories(stocked)["org/there"]))
    assert tool("push", peft_folder, "org/there").code == 0
    assert sent == [{"refs/heads/main": parent}]
    repository = stocked.repositories["org/there"]
    assert repository.find("main").parent == parent
    assert repository.find("main").tree["notes.md"].read() == b"kept"


def test_a_card_that_the_hub_refuses_is_said_in_one_line(stocked, tool, peft_folder):
    (peft_folder / "README.md").write_text("---\nbase_model: ./here\nlicense: [No Licence, at all]\n---\nWords.\n")
    before = repositories(stocked)
    ran = tool("push", peft_folder, "org/there")
    if ran.code:
        assert_one_line(ran, 1, "README.md")
        assert repositories(stocked) == before
    else:
        assert stocked.logged("validate-yaml")


def test_no_token_shows_even_in_a_traceback(stocked, peft_folder):
    for args in (["push", peft_folder, "org/there"], ["pull", "org/private"], ["inspect", "org/none"]):
        for token in ([], ["--token", "hf_outsider"]):
            env = {"ADAPTERTOOLS_DEBUG": "1", "HF_TOKEN": "hf_wrong"}
            ran = CliRunner(env=env).invoke(group, [*map(str, args), *token])
            assert "Traceback" in ran.output
            assert "hf_wrong" not in ran.output
            assert "hf_outsider" not in ran.output


def test_offline_nothing_is_sent(stocked, tool, peft_folder):
    before = len(stocked.requests)
    ran = tool("push", peft_folder, "org/there", HF_HUB_OFFLINE="1")
    assert_one_line(ran, 1, "HF_HUB_OFFLINE", "unset it")
    assert len(stocked.requests) == before


def test_a_dry_run_sends_nothing(stocked, tool, peft_folder):
    before = repositories(stocked)
    ran = tool("push", peft_folder, "org/there", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["dry_run"] is True
    assert tool("push", peft_folder, "org/new", "--dry-run").code == 0
    assert repositories(stocked) == before
    assert not stocked.logged("", "PUT")


def test_a_folder_of_300_files_is_one_commit(stocked, tool, tmp_path, peft_folder):
    templates = peft_folder / "additional_chat_templates"
    templates.mkdir()
    for number in range(300):
        (templates / f"{number:03}.jinja").write_text(f"template {number}")
    ran = tool("push", peft_folder, "org/there")
    assert ran.code == 0, ran.err
    assert len(stocked.commits("org/there")) == 2
    assert len([name for name in stocked.files("org/there") if name.endswith(".jinja")]) == 300
    ran = tool("pull", "org/there", tmp_path / "dst")
    assert ran.code == 0, ran.err
    assert (tmp_path / "dst" / "adapter_model.safetensors").read_bytes() == Path(
        peft_folder / "adapter_model.safetensors"
    ).read_bytes()
