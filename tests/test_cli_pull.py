"""`adaptertools pull`: what comes from the Hub, where it stands, and what is said about it."""

import os
import stat
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import Ran
from hub_fixtures import XET
from hub_server import HubServer
from proof import needed

import adaptertools
from adaptertools import containers, formats
from adaptertools.hub.cache import cache_folder

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTER = FIXTURES / "base" / "llama_tiny_lora"
MODEL = FIXTURES / "base" / "llama_tiny"
WEIGHTS = "adapter_model.safetensors"
NAMES = {"adapter_config.json", WEIGHTS}

LFS = pytest.mark.skipif(XET, reason="the HTTP path of large files; this run takes Xet")

Run = Callable[..., Ran]


def files_of(folder: Path) -> dict[str, bytes | Path]:
    """What stands in a folder of the fixtures, without what is there for the tests alone."""
    own = ("case.json", "expected.safetensors")
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in own
    }


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def safetensors_file(nbytes: int) -> bytes:
    """A file of this size with one tensor, whose bytes are random."""
    header = b'{"lora_A":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (nbytes, nbytes)
    return len(header).to_bytes(8, "little") + header + os.urandom(nbytes)


@pytest.fixture
def sha(hub: HubServer, impatient: None) -> str:
    return hub.create_repo("org/lora", {**files_of(ADAPTER), "README.md": b"# A card", "optimizer.pt": b"o" * 5000})


def test_an_adapter_becomes_a_folder_of_ordinary_files(hub: HubServer, sha: str, run: Run, tmp_path: Path) -> None:
    dst = tmp_path / "new" / "dst"
    ran = run("pull", "org/lora", dst)
    assert (ran.code, ran.err) == (0, "")
    assert names_in(dst) == NAMES
    assert all(not path.is_symlink() for path in dst.iterdir())
    assert (dst / WEIGHTS).read_bytes() == (ADAPTER / WEIGHTS).read_bytes()
    assert ran.out.splitlines() == [
        f"Pulled hf://org/lora (peft) to {dst}",
        f"  commit       {sha}",
        "  files        10.0 kB in 2 files: adapter_config.json, adapter_model.safetensors",
        "  fetched      10.0 kB",
        "  left there   2: README.md, optimizer.pt",
    ]
    assert not list(dst.parent.glob(".*"))


def test_without_a_destination_the_cache_is_made_ready(hub: HubServer, sha: str, run: Run) -> None:
    document = run("pull", "org/lora", "--json").json
    snapshot = cache_folder() / "models--org--lora" / "snapshots" / sha
    assert document["destination"] == {"path": str(snapshot), "nbytes": document["fetched"]}
    assert document["source"] == {"address": "hf://org/lora", "repo": "org/lora", "sha": sha}
    assert set(document["files"]) == NAMES
    again = run("pull", "org/lora", "--json").json
    assert (again["fetched"], again["destination"]) == (0, document["destination"])
    assert run("pull", "org/lora", "-q").out == ""


def test_every_revision_is_pulled_as_it_was(hub: HubServer, sha: str, run: Run, tmp_path: Path) -> None:
    hub.tag("org/lora", "v1", sha)
    config = (ADAPTER / "adapter_config.json").read_bytes() + b"\n"
    later = hub.commit("org/lora", {"adapter_config.json": config})
    cases = {("org/lora", "main"): later, ("org/lora@v1", None): sha, ("org/lora", sha): sha, ("org/lora", "v1"): sha}
    for index, ((address, revision), expected) in enumerate(cases.items()):
        dst = tmp_path / str(index)
        document = run("pull", address, dst, *(("--revision", revision) if revision else ()), "--json").json
        assert document["source"]["sha"] == expected
        assert ((dst / "adapter_config.json").read_bytes() == config) == (expected == later)


def test_a_folder_a_file_and_a_web_address_are_pulled(hub: HubServer, sha: str, run: Run, tmp_path: Path) -> None:
    files = files_of(ADAPTER)
    hub.create_repo("org/both", {f"{place}/{name}": path for place in ("fr", "de") for name, path in files.items()})
    ran = run("pull", "org/both", tmp_path / "both")
    assert ran.code == 1
    assert "Name one: hf://org/both@main/de" in ran.err
    assert run("pull", "hf://org/both/fr", tmp_path / "fr").code == 0
    assert run("pull", f"{hub.endpoint}/org/both/tree/main/de", tmp_path / "de").code == 0
    assert run("pull", f"hf://org/both@main/fr/{WEIGHTS}", tmp_path / "file").code == 0
    assert names_in(tmp_path / "fr") == names_in(tmp_path / "de") == names_in(tmp_path / "file") == NAMES


def test_a_model_is_pulled_without_a_second_kind_of_weights(hub: HubServer, sha: str, run: Run, tmp_path: Path) -> None:
    hub.create_repo("org/model", {**files_of(MODEL), "pytorch_model.bin": b"x" * 99, "tokenizer.json": b"{}"})
    document = run("pull", "org/model", tmp_path / "model", "--json").json
    assert (document["what"], document["format"], document["left_out"]) == ("model", None, ["pytorch_model.bin"])
    assert names_in(tmp_path / "model") == {"config.json", "model.safetensors", "tokenizer.json"}
    assert run("estimate", tmp_path / "model", "--rank", "4", "--targets", "q_proj").code == 0


CASES = sorted(
    path.parent for name in formats.names() for path in FIXTURES.glob(f"{name.replace('-', '_')}/*/case.json")
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_every_fixture_of_every_format_comes_as_it_is(
    hub: HubServer, run: Run, tmp_path: Path, case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(case)
    hub.create_repo("org/case", files)
    ran = run("pull", "org/case", tmp_path / "dst", "--allow-pickle")
    assert (ran.code, ran.err) == (0, "")
    for name in names_in(tmp_path / "dst"):
        assert any((tmp_path / "dst" / name).read_bytes() == Path(str(path)).read_bytes() for path in files.values())


@pytest.mark.parametrize("name", [name for name in formats.names() if formats.get(name).CONTAINERS])
def test_what_is_written_in_any_format_comes_back_from_the_hub(
    hub: HubServer, run: Run, tmp_path: Path, plain: adaptertools.Adapter, name: str
) -> None:
    for container in formats.get(name).CONTAINERS:
        place = tmp_path / container
        place.mkdir()
        file = "made" + containers.get(container).SUFFIX
        written = adaptertools.write(plain, place / file, format=name, container=container, **needed(name)).path
        hub.create_repo("org/made", files_of(place if written.is_file() else written))
        options = ["--allow-pickle"] if container == "torch" else []
        dst = tmp_path / f"{container}-dst"
        assert run("pull", "org/made", dst, *options).code == 0
        home = place if written.is_file() else written
        assert {path: (dst / path).read_bytes() for path in names_in(dst)} == {
            path: (home / path).read_bytes() for path in names_in(home)
        }
        if container == "orbax" and find_spec("tensorstore") is None:
            continue  # whoever reads these needs it; their bytes were compared
        for module, expected in zip(adaptertools.read(dst).modules, plain.modules, strict=True):
            assert torch.equal(module.delta_weight(), expected.delta_weight())


def test_what_needs_an_extra_to_be_read_is_pulled_without_it(
    hub: HubServer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    files = files_of(FIXTURES / "flax" / "nnx_orbax_state")
    hub.create_repo("org/made", files)
    ran = run("pull", "org/made", tmp_path / "dst")
    assert ran.code == 0
    assert "note         not checked: reading Orbax checkpoints needs tensorstore" in ran.out
    assert {f"checkpoint/{name}" for name in names_in(tmp_path / "dst")} == set(files)


# The destination


def test_large_weights_are_linked_and_read_only_unless_copies_are_asked_for(
    hub: HubServer, sha: str, run: Run, tmp_path: Path
) -> None:
    large = safetensors_file(2_000_000)
    hub.create_repo("org/large", {"model.safetensors": large, "config.json": b"{}"})
    ran = run("pull", "org/large", tmp_path / "linked")
    linked = tmp_path / "linked" / "model.safetensors"
    assert "linked       to the cache, and so read-only: model.safetensors; --copy makes copies" in ran.out
    assert linked.stat().st_nlink == 2
    assert stat.S_IMODE(linked.stat().st_mode) == 0o444
    assert (tmp_path / "linked" / "config.json").stat().st_nlink == 1
    document = run("pull", "org/large", tmp_path / "copied", "--copy", "--json").json
    assert document["linked"] == []
    copied = tmp_path / "copied" / "model.safetensors"
    assert (copied.stat().st_nlink, copied.read_bytes()) == (1, large)
    assert os.access(copied, os.W_OK)


def test_what_stands_at_the_destination_is_replaced_only_on_demand(
    hub: HubServer, sha: str, run: Run, tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    (tmp_path / "dst").mkdir()
    assert run("pull", "org/lora", dst).code == 0  # an empty folder
    (dst / "notes.txt").write_text("mine")
    (dst / "adapter_model.bin").write_text("old")
    refused = run("pull", "org/lora", dst)
    assert (refused.code, refused.err) == (1, f"Error: {dst} exists. overwrite=True (--overwrite) replaces it\n")
    assert run("pull", "org/lora", dst, "--overwrite").code == 0
    assert names_in(dst) == {*NAMES, "notes.txt"}


def test_what_is_no_adapter_is_not_replaced(
    hub: HubServer, sha: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("a")
    (tmp_path / "file").write_text("a")
    monkeypatch.chdir(tmp_path)
    before = len(hub.requests)
    for dst, said in {
        "photos": "holds no file of an adapter or a model",
        "file": "is a file",
        ".": "the current folder",
        "hf://org/other": "push sends to the Hub",
        "": "an empty path",
    }.items():
        ran = run("pull", "org/lora", dst, "--overwrite")
        assert ran.code in (1, 2)
        assert said in ran.err
    assert len(hub.requests) == before


# What goes wrong


@LFS
def test_a_download_that_stops_exits_with_3_and_is_gone_on_with(
    hub: HubServer, sha: str, run: Run, tmp_path: Path
) -> None:
    hub.faults.add("GET", "/storage/", status=509, times=99)
    stopped = run("pull", "org/lora", tmp_path / "dst")
    assert stopped.code == 3
    assert stopped.err.count("\n") == 1
    assert "The same command goes on from what is there" in stopped.err
    assert not (tmp_path / "dst").exists()
    hub.faults.clear()
    ran = run("pull", "org/lora", tmp_path / "dst")
    assert ran.code == 0
    assert "; the rest was in the cache" in ran.out
    assert len(hub.logged("adapter_config", "GET")) == 1


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("org/none", 1, "there is no such repository"),
        ("org/lora@none", 1, "no branch, tag or commit none"),
        ("hf://org/lora/none", 1, "no file and no folder none"),
        ("org/private", 1, "or it is private"),
        ("org/gated", 1, "access to this repository is gated"),
        ("org/card", 1, "no adapter in it"),
        ("not a repository", 2, "is no address on the Hub: expected org/name"),
        ("hf://org/lora@main/../..", 2, "is no address on the Hub"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(
    hub: HubServer, sha: str, run: Run, tmp_path: Path, address: str, code: int, said: str
) -> None:
    hub.create_repo("org/private", files_of(ADAPTER), private=True)
    hub.create_repo("org/gated", files_of(ADAPTER), gated=True)
    hub.create_repo("org/card", {"README.md": b"# A card"})
    ran = run("pull", address, tmp_path / "dst", "--token", "hf_outsider")
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err
    assert ran.err.startswith("Error: ")
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "dst").exists()


def test_a_network_that_is_down_exits_with_3(hub: HubServer, sha: str, run: Run) -> None:
    ran = run("pull", "org/lora", HF_ENDPOINT="http://127.0.0.1:9")
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert "the connection to http://127.0.0.1:9 fails" in ran.err


def test_offline_the_message_says_which_commit_the_cache_has(
    hub: HubServer, sha: str, run: Run, tmp_path: Path
) -> None:
    run("pull", "org/lora")
    hub.commit("org/lora", {"adapter_config.json": b"{}"})
    asked = len(hub.requests)
    ran = run("pull", "org/lora", tmp_path / "dst", HF_HUB_OFFLINE="1")
    assert ran.code == 0
    assert f"note         offline (HF_HUB_OFFLINE): from the cache, which has {sha}" in ran.out
    assert len(hub.requests) == asked
    ran = run("pull", "org/other", HF_HUB_OFFLINE="1")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "Unset HF_HUB_OFFLINE" in ran.err


# Hostile repositories


def hostile() -> dict[str, tuple[dict[str, bytes | Path], str]]:
    """Repositories that are refused, and what is said."""
    files = files_of(ADAPTER)
    config = {"adapter_config.json": files["adapter_config.json"]}
    lying = (100 << 30).to_bytes(8, "little") + b"{" + b" " * 100
    huge = (26_000_000).to_bytes(8, "little") + b"{" + b" " * 26_000_000
    return {
        "path-like names": ({**files, "../../../evil": b"x"}, "outside its folder"),
        "a pickle only": ({**config, "adapter_model.bin": b"x" * 50}, "a pickle, which can hold code"),
        "a header of 100 GB": ({**config, WEIGHTS: lying}, "the header claims 107374182400 bytes"),
        "a header of 26 MB": ({**config, WEIGHTS: huge}, "a header of 26000000 bytes"),
        "a pickle by another name": (
            {**config, WEIGHTS: FIXTURES / "loralib/roberta_tiny/roberta_lora.bin"},
            "a pickle",
        ),
        "a link for weights": ({**config, WEIGHTS: b"../../../../etc/passwd"}, "adapter_model.safetensors"),
        "a pointer for weights": (
            {**config, "adapter_model-00001-of-00001.safetensors": b"version https://git-lfs.github.com/spec/v1\n"},
            "pointer",
        ),
    }


@pytest.mark.parametrize("name", hostile())
def test_a_hostile_repository_is_refused_and_nothing_stands_at_the_destination(
    hub: HubServer, sha: str, run: Run, tmp_path: Path, name: str
) -> None:
    files, said = hostile()[name]
    hub.create_repo("org/evil", files)
    ran = run("pull", "org/evil", tmp_path / "a" / "b" / "dst")
    assert ran.code == 1
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"hub-cache"}


def test_a_pickle_that_is_asked_for_is_read_without_running_it(
    hub: HubServer, sha: str, run: Run, tmp_path: Path
) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    hub.create_repo("org/evil", {**files_of(ADAPTER), "adapter_model.bin": pickle.dumps({"a": Evil()})}, private=False)
    hub.commit("org/evil", {}, delete=[WEIGHTS])
    ran = run("pull", "org/evil", tmp_path / "dst", "--allow-pickle")
    assert ran.code == 1
    assert "posix.system" in ran.err
    assert not (tmp_path / "dst").exists()
    assert not (tmp_path / "ran").exists()


def test_a_token_on_the_command_line_is_shown_nowhere(
    hub: HubServer, sha: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_verysecret"
    hub.tokens[secret] = "read"
    said = []
    for address in ("org/lora", "org/none", "org/lora@x"):
        for options in ([], ["--json"]):
            ran = run("pull", address, "--token", secret, *options, ADAPTERTOOLS_DEBUG="1")
            said += [ran.out, ran.err]
    wrong = run("pull", "org/lora", "--token", "hf_wrongsecret", ADAPTERTOOLS_DEBUG="1")
    assert "does not accept the token" in wrong.err
    said += [wrong.out, wrong.err]
    assert "secret" not in "".join(said)
    assert {each.token for each in hub.logged("/api/")} == {secret, "hf_wrongsecret"}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes()
