"""Merges from and to the Hub, shard by shard: the same bytes as on one machine, in one commit, and resumable."""

import hashlib
import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import XET
from hub_server import HubServer
from merge_plans import COLUMNS, ROWS, contents, make_base
from safetensors.torch import load_file, save_file

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.merging.record import NAME
from adaptertools.merging.resume import Staging
from adaptertools.module import LoraModule, Target

SHARDS = 4
INDEX = "model.safetensors.index.json"
CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# The base

Prose of the base.
"""


over_lfs = pytest.mark.skipif(XET, reason="looks at requests for weights, which Xet sends to its own storage")


def make_adapter(folder: Path, *, layers: int, rows: int = ROWS, columns: int = COLUMNS) -> Path:
    """An adapter of every `mlp` of a base."""
    generator = torch.Generator().manual_seed(5)
    modules = tuple(
        LoraModule(
            target=Target(parameter=f"model.layers.{layer}.mlp"),
            lora_A=torch.randn(2, columns, generator=generator),
            lora_B=torch.randn(rows, 2, generator=generator),
            alpha=2.0,
        )
        for layer in range(layers)
    )
    return adaptertools.write(Adapter(modules=modules), folder, format="peft").path


@pytest.fixture(autouse=True)
def here(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None) -> Path:
    """The Hugging Face folder of this test; and nobody waits long before trying again."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", shards=SHARDS, layers=1)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", layers=SHARDS)


@pytest.fixture
def local(base: Path, adapter: Path, tmp_path: Path, run: Callable[..., Any]) -> dict[str, bytes]:
    """What the merge gives on this machine, without the record, which names its sources."""
    assert run("merge", base, adapter, tmp_path / "local").code == 0
    return {name: content for name, content in contents(tmp_path / "local").items() if name != NAME}


@pytest.fixture
def sources(hub: HubServer, base: Path, adapter: Path) -> tuple[str, str]:
    """Base and adapter on the Hub."""
    hub.create_repo("org/base", {**files_of(base), "README.md": CARD.encode()})
    hub.create_repo("org/adapter", files_of(adapter))
    return "hf://org/base", "hf://org/adapter"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_published(hub: HubServer, local: dict[str, bytes], repo: str = "me/merged") -> None:
    """All of it stands there, in one commit, beside what the Hub itself puts into a new repository."""
    found = hub.files(repo)
    assert {name: found.get(name) for name in local} == local
    assert set(found) - set(local) <= {NAME, "README.md", ".gitattributes"}
    assert len([title for _, title in hub.commits(repo) if title.startswith("Merge ")]) == 1


def uploads(hub: HubServer) -> Counter[str]:
    """The objects that were sent whole, each with how often."""
    done = [each for each in hub.logged(method="PUT") if each.status == 200 and each.received > 0]
    return Counter(each.path.partition("?")[0] for each in done)


def downloads(hub: HubServer) -> Counter[str]:
    """The shards that were fetched whole, by name, each with how often."""
    asked = [
        each for each in hub.logged(r"/resolve/.*model-0", "GET") if each.range is None or each.range == "bytes=0-"
    ]
    return Counter(each.path.rpartition("/")[2].partition("?")[0] for each in asked)


@pytest.mark.parametrize("options", [(), ("--low-disk",)], ids=["", "low-disk"])
def test_a_merge_from_hub_to_hub_is_that_on_one_machine_in_one_commit(
    options: tuple[str, ...], hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], run: Callable[..., Any]
) -> None:
    ran = run("merge", *sources, "hf://me/merged", *options)
    assert ran.code == 0, ran.err
    assert_published(hub, local)
    assert "hf://me/merged" in ran.out
    assert hub.head("me/merged") in ran.out
    index = json.loads(hub.files("me/merged")[INDEX])
    tensors = [tensor for name in local if name.endswith(".safetensors") for tensor in read(local[name]).values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)


def read(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def test_the_record_and_the_card_name_repositories_and_shas(
    hub: HubServer, sources: tuple[str, str], run: Callable[..., Any]
) -> None:
    ran = run("merge", *sources, "hf://me/merged", "--json")
    assert ran.code == 0, ran.err
    record = json.loads(hub.files("me/merged")[NAME])
    assert record["base"]["name"] == f"org/base@{hub.head('org/base')}"
    assert record["adapters"][0]["name"] == f"org/adapter@{hub.head('org/adapter')}"
    stated = {entry["name"]: entry["sha256"] for entry in record["base"]["files"]}
    assert stated == {name: hub.blobs("org/base")[name].sha256 for name in stated}
    assert ran.json["destination"]["sha"] == hub.head("me/merged")
    card = hub.files("me/merged")["README.md"].decode()
    assert "base_model_relation: merge" in card
    assert "license: apache-2.0" in card
    assert "language: en" in card
    assert "org/base" in card
    assert hub.head("org/adapter") in card
    assert "Prose of the base." not in card


def test_a_merge_from_the_hub_into_a_folder_is_that_on_one_machine(
    sources: tuple[str, str], local: dict[str, bytes], tmp_path: Path, run: Callable[..., Any]
) -> None:
    for option in ([], ["--low-disk"]):
        dst = tmp_path / f"merged{len(option)}"
        ran = run("merge", *sources, dst, *option)
        assert ran.code == 0, ran.err
        found = contents(dst)
        assert {name: found[name] for name in local} == local
        assert set(found) == {*local, NAME}
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".merging")] == []


@pytest.mark.parametrize("options", [(), ("--low-disk",)], ids=["", "low-disk"])
def test_a_merge_from_a_folder_to_the_hub_is_that_on_one_machine(
    options: tuple[str, ...],
    hub: HubServer,
    base: Path,
    adapter: Path,
    local: dict[str, bytes],
    here: Path,
    run: Callable[..., Any],
) -> None:
    before = contents(base)
    ran = run("merge", base, adapter, "hf://me/merged@trial", *options)
    assert ran.code == 0, ran.err
    assert {name: hub.files("me/merged", "trial").get(name) for name in local} == local
    assert contents(base) == before
    assert not list(here.rglob("*.safetensors")), "nothing is left in the working place"


@pytest.mark.parametrize("options", [("--dtype", "f32"), ("--dtype", "f32", "--low-disk")], ids=["", "low-disk"])
def test_shards_that_are_laid_out_anew_are_those_of_a_merge_on_one_machine(
    options: tuple[str, ...],
    hub: HubServer,
    base: Path,
    adapter: Path,
    sources: tuple[str, str],
    tmp_path: Path,
    run: Callable[..., Any],
) -> None:
    assert run("merge", base, adapter, tmp_path / "local", "--dtype", "f32").code == 0
    ran = run("merge", *sources, "hf://me/merged", *options)
    assert ran.code == 0, ran.err
    wanted = {name: content for name, content in contents(tmp_path / "local").items() if name != NAME}
    assert {name: hub.files("me/merged")[name] for name in wanted} == wanted


def test_a_head_that_is_made_of_another_shard_is_right_where_disk_space_is_low(
    hub: HubServer, tmp_path: Path, run: Callable[..., Any]
) -> None:
    """The embedding lies in the first shard, and the head that becomes its own tensor in the last one."""
    folder = make_base(tmp_path / "tied", shards=3, layers=1)
    first = folder / "model-00001-of-00003.safetensors"
    embedding = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(3)).bfloat16()
    save_file({**load_file(first), "model.embed_tokens.weight": embedding}, first, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.embed_tokens.weight"] = first.name
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 7, "tie_word_embeddings": true}')
    head = LoraModule(
        target=Target(parameter="lm_head"), lora_A=torch.ones(1, COLUMNS), lora_B=torch.ones(7, 1), alpha=1.0
    )
    adapter = adaptertools.write(Adapter(modules=(head,)), tmp_path / "head", format="peft").path
    assert run("merge", folder, adapter, tmp_path / "local", "--untie").code == 0
    hub.create_repo("org/tied", files_of(folder))
    ran = run("merge", "hf://org/tied", adapter, "hf://me/merged", "--untie", "--low-disk")
    assert ran.code == 0, ran.err
    wanted = {name: content for name, content in contents(tmp_path / "local").items() if name != NAME}
    assert {name: hub.files("me/merged")[name] for name in wanted} == wanted


@over_lfs
@pytest.mark.parametrize("options", [(), ("--low-disk", "--workers", "1")], ids=["", "low-disk"])
def test_an_upload_that_fails_for_good_stops_with_3_and_what_was_sent_is_not_sent_again(
    options: tuple[str, ...],
    hub: HubServer,
    sources: tuple[str, str],
    local: dict[str, bytes],
    run: Callable[..., Any],
) -> None:
    command = ("merge", *sources, "hf://me/merged", *options)
    hub.create_repo("me/merged")
    head = hub.head("me/merged")
    third = "model-00003-of-00004.safetensors"
    with failing_upload(hub, local[third]):
        ran = run(*command)
    assert ran.code == 3, ran.err
    assert hub.head("me/merged") == head, "nothing is visible"
    sent, fetched = uploads(hub), downloads(hub)
    del fetched["model-00004-of-00004.safetensors"]  # it may have been in the making
    if options:  # one after the other, as one worker makes them in order; else some go together
        assert sum(sent.values()) == 2
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert_published(hub, local)
    assert set(uploads(hub).values()) == {1}, "uploaded shards are not sent again"
    assert len(uploads(hub)) == SHARDS
    assert {name: downloads(hub)[name] for name in fetched} == fetched, "finished shards are not made again"
    assert "finished by a run before" in ran.out


@contextmanager
def failing_upload(hub: HubServer, content: bytes) -> Iterator[None]:
    """The object with this content cannot be uploaded."""
    hub.faults.add("PUT", hashlib.sha256(content).hexdigest(), status=520, times=1000)
    yield
    hub.faults.clear()


@over_lfs
@pytest.mark.parametrize("options", [(), ("--low-disk",)], ids=["", "low-disk"])
def test_a_download_that_fails_for_good_stops_with_3_and_the_same_command_goes_on(
    options: tuple[str, ...],
    hub: HubServer,
    sources: tuple[str, str],
    local: dict[str, bytes],
    run: Callable[..., Any],
) -> None:
    command = ("merge", *sources, "hf://me/merged", *options)
    hub.faults.add("HEAD", "model-00003-of", status=520, times=1000)  # range requests for headers are GET
    ran = run(*command)
    assert ran.code == 3, ran.err
    hub.faults.clear()
    sent = uploads(hub)
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert_published(hub, local)
    assert set(uploads(hub).values()) == {1}
    assert sent.items() <= uploads(hub).items()


@over_lfs
def test_a_connection_that_is_cut_in_a_download_is_gone_on_with(
    hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], run: Callable[..., Any]
) -> None:
    hub.faults.add("GET", "^/storage/", cut=50, times=SHARDS + 2)  # the headers, and two shards
    ran = run("merge", *sources, "hf://me/merged", "--low-disk")
    assert ran.code == 0, ran.err
    assert not hub.faults.pending[0].times
    assert_published(hub, local)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], run: Callable[..., Any]
) -> None:
    hub.faults.add("POST", "/commit/main", status=503, after=True)
    ran = run("merge", *sources, "hf://me/merged", "--low-disk")
    assert ran.code == 0, ran.err
    assert_published(hub, local)


def test_a_commit_that_is_not_answered_stops_with_3_and_the_same_command_only_commits(
    hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], run: Callable[..., Any]
) -> None:
    hub.faults.add("POST", "/commit/main", status=503, times=100)
    command = ("merge", *sources, "hf://me/merged", "--low-disk")
    ran = run(*command)
    assert ran.code == 3, ran.err
    assert not set(hub.files("me/merged")) & set(local)
    hub.faults.clear()
    before = uploads(hub), downloads(hub)
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert (uploads(hub), downloads(hub)) == before
    assert_published(hub, local)


def test_a_run_that_was_killed_after_its_commit_does_not_commit_again(
    hub: HubServer,
    sources: tuple[str, str],
    local: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Any],
) -> None:
    from adaptertools.merging.resume import Staging

    command = ("merge", *sources, "hf://me/merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "remove", lambda self: None)  # as if it was killed right there
        assert run(*command).code == 0
    head = hub.head("me/merged")
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert hub.head("me/merged") == head
    assert_published(hub, local)


@over_lfs
def test_a_repository_that_moved_on_meanwhile_is_an_error_that_says_so(
    hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], run: Callable[..., Any]
) -> None:
    hub.create_repo("me/merged")
    moved: list[str] = []

    def move() -> None:
        deadline = time.monotonic() + 30
        while not uploads(hub) and time.monotonic() < deadline:
            time.sleep(0.001)
        moved.append(hub.commit("me/merged", {"other.txt": b"theirs"}))

    hub.faults.add("PUT", "", status=0, delay=0.3)
    other = threading.Thread(target=move)
    other.start()
    ran = run("merge", *sources, "hf://me/merged")
    other.join()
    assert ran.code == 1, (ran.out, ran.err)
    assert "me/merged" in ran.err
    assert hub.head("me/merged") == moved[0]
    ran = run("merge", *sources, "hf://me/merged")
    assert ran.code == 0, ran.err
    assert hub.files("me/merged")["other.txt"] == b"theirs"
    assert set(uploads(hub).values()) == {1}


@over_lfs
def test_a_base_that_moved_on_between_two_runs_is_merged_anew(
    hub: HubServer, sources: tuple[str, str], base: Path, local: dict[str, bytes], run: Callable[..., Any]
) -> None:
    command = ("merge", *sources, "hf://me/merged")
    with failing_upload(hub, local["model-00003-of-00004.safetensors"]):
        assert run(*command).code == 3
    hub.commit("org/base", {"config.json": b'{"model_type": "tiny", "vocab_size": 8}'})
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert hub.files("me/merged")["config.json"] == b'{"model_type": "tiny", "vocab_size": 8}'
    record = json.loads(hub.files("me/merged")[NAME])
    assert record["base"]["name"] == f"org/base@{hub.head('org/base')}"
    assert "finished by a run before" not in ran.out


def test_weights_that_stand_there_are_replaced_only_where_an_earlier_merge_wrote_them(
    hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], tmp_path: Path, run: Callable[..., Any]
) -> None:
    small = make_base(tmp_path / "small", shards=2, layers=2)
    two = make_adapter(tmp_path / "two", layers=4)
    assert run("merge", small, two, "hf://me/merged").code == 0
    assert "model-00001-of-00002.safetensors" in hub.files("me/merged")
    for option in ([], ["--dry-run"]):
        refused = run("merge", *sources, "hf://me/merged", *option)
        assert refused.code == 1
        assert "--overwrite" in refused.err
    ran = run("merge", *sources, "hf://me/merged", "--overwrite")
    assert ran.code == 0, ran.err
    found = hub.files("me/merged")
    assert {name: found[name] for name in local} == local
    assert "model-00001-of-00002.safetensors" not in found
    hub.create_repo("me/foreign", {"model.safetensors": b"somebody's"})
    for option in ([], ["--overwrite"], ["--dry-run"]):
        refused = run("merge", *sources, "hf://me/foreign", *option)
        assert refused.code == 1
        assert "holds model.safetensors and no adaptertools_merge.json" in refused.err
        assert "--overwrite" not in refused.err
    assert hub.files("me/foreign") == {"model.safetensors": b"somebody's"}


def test_a_dry_run_changes_nothing_on_the_hub_and_fetches_no_weights(
    hub: HubServer, sources: tuple[str, str], here: Path, run: Callable[..., Any]
) -> None:
    ran = run("merge", *sources, "hf://me/merged", "--dry-run")
    assert ran.code == 0, ran.err
    assert "hf://me/merged, a new repository; nothing was written\n" in ran.out
    assert "me/merged" not in hub.repositories
    assert not downloads(hub)
    assert not list(here.rglob("*.part"))
    hub.create_repo("me/merged")
    assert (
        "hf://me/merged, which exists; nothing was written\n"
        in run("merge", *sources, "hf://me/merged", "--dry-run").out
    )
    ran = run("merge", *sources, "hf://me/merged", "--dry-run", "--json")
    assert ran.json["destination"] == {"path": "hf://me/merged", "exists": True}


def test_the_report_names_the_commit_and_its_page(
    hub: HubServer, sources: tuple[str, str], run: Callable[..., Any]
) -> None:
    ran = run("merge", *sources, "hf://me/merged")
    sha = hub.head("me/merged")
    assert f"  commit       {sha}\n" in ran.out
    assert f"/me/merged/commit/{sha}\n" in ran.out
    assert "  page         http" in ran.out


def test_an_interrupted_merge_to_the_hub_names_the_folder_that_it_goes_on_from(
    hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], run: Callable[..., Any]
) -> None:
    command = ("merge", *sources, "hf://me/merged")
    finish = Staging.finish

    def interrupted(self: Staging, *args: Any) -> None:
        finish(self, *args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "finish", interrupted)
        ran = run(*command, "--workers", "1")
    assert ran.code == 130
    _, told, folder = ran.err.partition("Error: interrupted; the same command goes on from what is finished, in ")
    assert told
    assert Path(folder.strip()).is_dir()
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert "  resumed      " in ran.out
    assert_published(hub, local)


@pytest.mark.parametrize(
    "options",
    [("DST", "--low-disk"), ("DST", "--private"), ("hf://me/merged/sub",)],
    ids=["low-disk", "private", "sub-folder"],
)
def test_what_makes_no_sense_there_is_wrong_usage(
    options: tuple[str, ...], base: Path, adapter: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    given = [str(tmp_path / "merged") if option == "DST" else option for option in options]
    ran = run("merge", base, adapter, *given)
    assert ran.code == 2, (ran.code, ran.err)


def test_a_base_in_the_cache_is_merged_offline_and_nothing_is_sent(
    hub: HubServer,
    sources: tuple[str, str],
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Any],
) -> None:
    assert run("merge", *sources, tmp_path / "online").code == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    ran = run("merge", *sources, tmp_path / "offline")
    assert ran.code == 0, ran.err
    assert {name: contents(tmp_path / "offline")[name] for name in local} == local
    refused = run("merge", *sources, "hf://me/merged")
    assert refused.code == 1
    assert "unset it" in refused.err
    assert not hub.requests


def test_a_token_that_may_not_write_is_told_before_any_weights_come(
    hub: HubServer, sources: tuple[str, str], run: Callable[..., Any]
) -> None:
    hub.create_repo("me/merged")
    ran = run("merge", *sources, "hf://me/merged", HF_TOKEN="hf_reader")
    assert ran.code == 1
    assert not downloads(hub)
    assert "hf_reader" not in ran.out + ran.err


def files_below(folder: Path) -> Iterator[str]:
    """Its files, whatever disappears meanwhile."""
    for home, _, names in os.walk(folder):
        yield from (f"{home}/{name}" for name in names)


class Disk:
    """The most bytes that files in a folder took while they were watched."""

    def __init__(self, *folders: Path, temporary: Path) -> None:
        self.folders, self.temporary, self.peak = folders, temporary, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Disk":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            seen = {}
            folders = [*self.folders, *self.temporary.glob("adaptertools-*")]  # not what the server keeps there
            for name in (place for folder in folders for place in files_below(folder)):
                with suppress(OSError):
                    found = os.lstat(name)
                    seen[found.st_ino] = found.st_blocks * 512
            self.peak = max(self.peak, sum(seen.values()))


def large(hub: HubServer, tmp_path: Path, shards: int, rows: int) -> tuple[Path, Path]:
    """A base of shards of 1 MB for every 512 rows, and its adapter, on the Hub and here."""
    base = make_base(tmp_path / "large", shards=shards, layers=1, rows=rows, columns=1024)
    adapter = make_adapter(tmp_path / "large-adapter", layers=shards, rows=rows, columns=1024)
    hub.create_repo("org/large", files_of(base))
    return base, adapter


def test_low_disk_takes_three_shards_whatever_the_size_of_the_model(
    hub: HubServer, tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    base, adapter = large(hub, tmp_path, shards=10, rows=1024)
    shard = (base / "model-00001-of-00010.safetensors").stat().st_size
    cache, temporary = tmp_path / "hub-cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    hub.throttle = 40e6
    with Disk(here, cache, temporary=temporary) as disk:
        ran = run("merge", "hf://org/large", adapter, "hf://me/merged", "--low-disk")
    assert ran.code == 0, ran.err
    assert 2 * shard < disk.peak < 3.2 * shard, disk.peak / shard
    assert run("merge", base, adapter, tmp_path / "local").code == 0
    wanted = {name: content for name, content in contents(tmp_path / "local").items() if name != NAME}
    assert {name: hub.files("me/merged")[name] for name in wanted} == wanted


@over_lfs
@pytest.mark.parametrize("options", [(), ("--low-disk",)], ids=["", "low-disk"])
def test_shards_come_while_others_go_and_where_disk_space_is_low_not_before_their_turn(
    options: tuple[str, ...], hub: HubServer, tmp_path: Path, run: Callable[..., Any]
) -> None:
    _, adapter = large(hub, tmp_path, shards=9, rows=1024)
    hub.throttle = 20e6
    ran = run("merge", "hf://org/large", adapter, "hf://me/merged", *options)
    assert ran.code == 0, ran.err
    gets = [each for each in hub.requests if each.method == "GET" and each.sent > 1 << 20]
    puts = [each for each in hub.requests if each.method == "PUT" and each.received > 1 << 20]
    assert len(gets) == len(puts) == 9
    pairs = [(max(get.started, put.started), min(get.ended, put.ended)) for get in gets for put in puts]
    together = sum(max(0.0, end - begin) for begin, end in pairs)
    assert together > (0.5 if options else 0.1) * sum(put.ended - put.started for put in puts[:-2])
    if options:
        turns = [(puts[shard], gets[shard + 3]) for shard in range(len(gets) - 3)]
        assert all(put.started < get.started for put, get in turns), "it came three shards before one went"


def merge_in_child(command: list[str], environment: dict[str, str], ready: Connection) -> None:
    """The command in a process of its own; tells when it begins."""
    from adaptertools.cli import main

    os.environ.update(environment)
    sys.argv = ["adaptertools", *command]
    ready.send(True)
    main()


def start(command: list[str], here: Path) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "huggingface_hub", "adaptertools.hub.stream", __name__])
    mine, theirs = context.Pipe(duplex=False)
    environment = {name: os.environ[name] for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_HOME")}
    process = context.Process(target=merge_in_child, args=(command, environment, theirs))
    process.start()
    theirs.close()
    mine.recv()
    return process


def kill_and_resume(
    times: int, hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], options: tuple[str, ...], here: Path
) -> None:
    """Kill merges at random moments until so many were hit, each time going on from what was left."""
    chance = random.Random(times)
    command = ["merge", *sources, "hf://me/merged", *options, "-q"]
    hub.faults.add("PUT", "^/storage/", status=0, delay=0.1, times=1 << 30)  # so that many are hit between uploads
    start(command, here).join()  # warms up the server of forks
    hub.repositories.pop("me/merged")
    process, begun = start(command, here), time.monotonic()
    process.join()
    whole = time.monotonic() - begun
    kills = went_on = 0
    finished = True
    while kills < times or not went_on:
        assert kills < times + 30, "never killed half-way"
        if finished:
            hub.repositories.pop("me/merged")
            hub.requests.clear()
        sent = set(uploads(hub))
        process = start(command, here)
        time.sleep(whole * chance.random())
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        kills += process.exitcode == -9
        went_on += bool(sent)
        standing = hub.files("me/merged") if "me/merged" in hub.repositories else {}
        finished = bool(set(standing) & set(local))
        if finished:
            assert_published(hub, local)
            head = hub.head("me/merged")
            process = start(command, here)
            process.join()
            assert process.exitcode == 0 or not list(here.rglob("journal.jsonl"))
            assert hub.head("me/merged") == head, "the same command does not commit again"
        assert sum(uploads(hub).values()) <= SHARDS + kills
    process = start(command, here)
    process.join()
    assert not list(here.rglob("*.safetensors"))


@over_lfs
@pytest.mark.parametrize("options", [("--low-disk",)], ids=["low-disk"])
def test_a_killed_merge_resumes_to_the_same_bytes(
    options: tuple[str, ...], hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], here: Path
) -> None:
    kill_and_resume(2, hub, sources, local, options, here)


@over_lfs
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--low-disk",)], ids=["", "low-disk"])
def test_a_merge_that_is_killed_many_times_resumes_to_the_same_bytes(
    options: tuple[str, ...], hub: HubServer, sources: tuple[str, str], local: dict[str, bytes], here: Path
) -> None:
    kill_and_resume(60, hub, sources, local, options, here)
